//! Readers that need nothing but bytes.

use litemesh::config::raw::Raw;
use litemesh::core::frame::{Frame, RowBuffer};
use litemesh::core::message::{CommitHeader, Fragment, Message, decode, encode};
use litemesh::core::{ddl, names};
use litemesh::fabric::JoinToken;
use litemesh::fabric::keys::MeshKey;

use crate::{attempt, fuzz, write_samples};

const CASES: u64 = 20_000;

#[test]
fn messages() {
    fuzz("message", CASES, |bytes| {
        attempt(|| {
            if let Ok(message) = decode::<Message>(bytes) {
                assert_eq!(decode::<Message>(&encode(&message)), Ok(message), "it does not come back");
            }
        })
    });
}

#[test]
fn pieces_and_headers() {
    fuzz("piece", CASES, |bytes| {
        attempt(|| {
            if let Ok(piece) = decode::<Fragment>(bytes) {
                drop(piece.begins());
            }
            drop(decode::<CommitHeader>(bytes));
        })
    });
}

#[test]
fn frames() {
    fuzz("frame", CASES, |bytes| {
        attempt(|| {
            let Ok(frame) = Frame::open(bytes) else { return };
            let Ok(sections) = frame.sections() else { return };
            for mut section in sections {
                let mut row = RowBuffer::default();
                while let Ok(Some(_)) = section.next_row(&mut row) {}
            }
        })
    });
}

#[test]
fn join_tokens() {
    let addresses = ["10.0.0.1:6222", "[fe80::2]:6223", "c.example:1"].map(|a| a.parse().unwrap());
    let token = JoinToken::new(MeshKey::from_bytes([9; 32]), addresses.to_vec()).unwrap();
    write_samples("token", &[token.reveal().into_bytes()]);
    fuzz("token", CASES, |bytes| {
        attempt(|| {
            let text = String::from_utf8_lossy(bytes);
            match text.parse::<JoinToken>() {
                Ok(token) => drop(token.reveal().parse::<JoinToken>().expect("it is read again")),
                Err(e) => assert!(!e.to_string().is_empty()),
            }
        })
    });
}

#[test]
fn definitions_of_the_schema() {
    fuzz("definition", CASES, |bytes| {
        attempt(|| {
            let text = String::from_utf8_lossy(bytes);
            drop(ddl::parse_table(&text));
            drop((ddl::normal(&text), ddl::column_shape(&text), ddl::on_table(&text)));
            drop((ddl::is_constant(&text), ddl::numbered_columns(&text)));
            drop(litemesh::replica::schema::TableDef::parse(&text));
            drop(text.parse::<names::NodeName>());
        })
    });
}

#[test]
fn configuration_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("litemesh.toml");
    fuzz("config", 2_000, |bytes| {
        std::fs::write(&file, bytes).unwrap();
        attempt(|| drop(Raw::from_file(&file)))
    });
}

/// MessagePack that goes very deep, or says that it is very long, is refused without a stack or memory for it.
#[test]
fn what_is_deep_or_says_that_it_is_long() {
    for marker in [0x91, 0x81, 0x92, 0xc7, 0xdd, 0xdf, 0xc6, 0xdb, 0xc9] {
        let deep = [&[1][..], &vec![marker; 400 * 1024]].concat();
        let long = [1, marker, 0xff, 0xff, 0xff, 0xff, 1];
        for bytes in [&deep[..], &long[..]] {
            assert!(decode::<Message>(bytes).is_err(), "{marker:x}");
            assert!(decode::<Fragment>(bytes).is_err(), "{marker:x}");
            assert!(decode::<CommitHeader>(bytes).is_err(), "{marker:x}");
            let frame = Frame::open(&[&[0][..], &bytes[1..]].concat()).unwrap();
            assert!(frame.sections().is_err(), "{marker:x}");
        }
    }
}
