//! What travels, byte for byte: `v1.txt` holds what the first release sends, and later ones have to read it. Never change
//! a line of a release that is out; a new format gets a file of its own.

use std::collections::BTreeMap;
use std::fmt::Debug;

use bytes::Bytes;
use litemesh::core::frame::{Frame, FrameWriter, RowBuffer, RowVersions, WireError};
use litemesh::core::message::{
    CommitHeader, CopyPart, CopyRequest, Fragment, Hello, Holding, Message, SyncPage, SyncRequest,
    WIRE_VERSION, decode, encode,
};
use litemesh::core::value::ValueRef;
use litemesh::core::vector::{Point, Vector};
use litemesh::core::verify::{Question, VerifyMessage};
use litemesh::core::version::{Hlc, SiteId, Version};
use serde::Serialize;
use serde::de::DeserializeOwned;

fn golden() -> BTreeMap<&'static str, Vec<u8>> {
    let byte = |hex: &str, i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hexadecimal");
    let lines = include_str!("v1.txt").lines().filter_map(|line| line.split_once(' '));
    lines.map(|(name, hex)| (name, (0..hex.len()).step_by(2).map(|i| byte(hex, i)).collect())).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What this release writes is what is on record, and it reads that.
fn same<T: Serialize + DeserializeOwned + PartialEq + Debug>(
    name: &str,
    message: &T,
    wrong: &mut Vec<String>,
) {
    let written = encode(message);
    match golden().get(name) {
        Some(recorded) => {
            assert_eq!(decode::<T>(recorded).as_ref(), Ok(message), "{name} cannot be read any more");
            if *recorded != written {
                wrong.push(format!("{name} {}", hex(&written)));
            }
        }
        None => wrong.push(format!("{name} {}", hex(&written))),
    }
}

fn vector() -> Vector {
    let point = |n, id| Point { n, hlc: Hlc(0x0123_4567_89ab_0000 + n), id };
    Vector([(SiteId(1), point(7, 0xdead)), (SiteId(0xfedc_ba98_7654_3210), point(1 << 40, 1))].into())
}

#[test]
fn messages_are_as_the_first_release_sends_them() {
    let db: litemesh::core::names::DbName = "app".parse().expect("a name");
    let data = Bytes::from_static(&[0, 1, 0xff]);
    let seen = vec![(SiteId(2), 9, Hlc(3)), (SiteId(3), 1, Hlc(4))];
    let header = CommitHeader { from: 4, to: 5, id: 6, prev: 7, hlc: Hlc(8), seen, rows: 9 };
    let mut wrong = Vec::new();
    same("fragment", &Fragment { attempt: 1, index: 2, last: true, data: data.clone() }, &mut wrong);
    same("header", &header, &mut wrong);
    let hello = Hello { version: "0.1.0".to_owned(), now_ms: 1_795_000_000_000, dbs: vec![db.clone()] };
    let holding = Holding {
        db: db.clone(),
        lineage: 10,
        site: SiteId(11),
        vector: vector(),
        lsn: 12,
        answer: true,
        collected: Vector::default(),
        joining: vec![("c".parse().expect("a name"), vector())],
        left: vec![SiteId(13)],
    };
    let request = SyncRequest { db: db.clone(), lineage: 1, request: 2, vector: vector(), after_lsn: 3 };
    let page = SyncPage {
        db: db.clone(),
        request: 1,
        site: SiteId(2),
        frames: vec![data.clone()],
        next_lsn: 3,
        complete: Some(vector()),
    };
    let copy = CopyRequest { db: db.clone(), request: 1, copy: 2, offset: 3, have: None };
    let part = CopyPart { request: 1, copy: 2, size: 3, offset: 4, data, same: false, hash: [5; 32] };
    let verify = VerifyMessage::Ask { db: db.clone(), lineage: 1, request: 2, question: Question::Layouts };
    for (name, message) in [
        ("hello", Message::Hello(hello)),
        ("holding", Message::Holding(holding)),
        ("ask", Message::Ask { db }),
        ("sync_request", Message::SyncRequest(request)),
        ("sync_page", Message::SyncPage(page)),
        ("copy_request", Message::CopyRequest(copy)),
        ("copy_part", Message::CopyPart(part)),
        ("refused", Message::Refused { request: 1, why: "no".to_owned() }),
        ("bye", Message::Bye),
        ("verify", Message::Verify(verify)),
    ] {
        same(name, &message, &mut wrong);
    }
    assert!(wrong.is_empty(), "the format has changed; this is written now:\n{}", wrong.join("\n"));
    assert_eq!(
        WIRE_VERSION, 1,
        "a new format: record what this one writes in a file of its own, and go on reading v1.txt"
    );
}

#[test]
fn rows_are_as_the_first_release_sends_them() {
    let at = |h, s| Version { hlc: Hlc(h), site: SiteId(s) };
    let mut writer = FrameWriter::new(at(5, 1));
    writer.begin_section("t", &["id"], &["a", "b"], true);
    let columns = [(1, at(7, 2))];
    let alive =
        RowVersions { birth: at(6, 2), dead: None, columns: &columns, refs: &[(0, at(3, 1))], fixed: true };
    let values = [ValueRef::Real(-0.0), ValueRef::Blob(&[0xff])];
    writer.row([ValueRef::Int(-1)].into_iter(), alive, values.into_iter());
    let dead = RowVersions { birth: at(5, 1), dead: Some(at(9, 1)), columns: &[], refs: &[], fixed: false };
    writer.row([ValueRef::Text(b"k")].into_iter(), dead, [].into_iter());
    let written = writer.finish();
    let recorded = golden().remove("frame").unwrap_or_default();
    assert_eq!(hex(&recorded), hex(&written), "the format has changed");
    // And is read: both rows, with all that they say.
    let frame = Frame::open(&recorded).expect("a frame");
    let mut sections = frame.sections().expect("sections");
    let section = &mut sections[0];
    assert!(section.table == "t" && section.keys_and_columns() && section.keeps_both);
    let mut row = RowBuffer::default();
    assert_eq!(section.next_row(&mut row), Ok(Some((at(6, 2), None))));
    assert_eq!(
        (row.columns.as_slice(), row.refs.as_slice(), row.fixed),
        (&columns[..], &[(0, at(3, 1))][..], true)
    );
    assert_eq!(section.next_row(&mut row), Ok(Some((at(5, 1), Some(at(9, 1))))));
    assert_eq!(section.next_row(&mut row), Ok(None));
}

trait Named {
    fn keys_and_columns(&self) -> bool;
}

impl Named for litemesh::core::frame::Section<'_> {
    fn keys_and_columns(&self) -> bool {
        self.keys == ["id"] && self.columns == ["a", "b"]
    }
}

#[test]
fn a_later_format_is_refused_with_what_to_do() {
    assert_eq!(golden().len(), 13);
    for mut bytes in golden().into_iter().filter(|(name, _)| *name != "frame").map(|(_, bytes)| bytes) {
        bytes[0] = WIRE_VERSION + 1;
        let refused = decode::<Message>(&bytes).expect_err("refused");
        assert_eq!(refused, WireError::Version(WIRE_VERSION + 1, WIRE_VERSION));
        assert!(refused.to_string().contains("upgrade this node"));
    }
}
