//! The fixed work that is counted and timed: the same inputs whenever and wherever it runs. Invariant: what a piece of
//! work prepares is not a part of it, and running it once uses up what was prepared.

use std::path::Path;

use litemesh::core::frame::{Frame, FrameWriter, RowBuffer, RowVersions};
use litemesh::core::merge::{Row, RowState, merge};
use litemesh::core::message::{Fragment, decode};
use litemesh::core::schema::SchemaMode;
use litemesh::core::value::{Value, ValueRef};
use litemesh::core::version::{Hlc, SiteId, Version};
use litemesh::replica::absorb::OwnCommit;
use litemesh::replica::adopt;
use litemesh::replica::apply::PeerCommit;
use litemesh::replica::assemble::Assembler;
use litemesh::replica::send::commit_pieces;
use litemesh::replica::store::Store;
use rusqlite::Connection;
use tempfile::TempDir;

/// A piece of work: what it is called, how many rows it is, and what makes it ready.
pub struct Work {
    pub name: &'static str,
    pub rows: i64,
    pub prepare: fn() -> Box<dyn FnMut()>,
}

/// All of it.
pub const ALL: [Work; 11] = [
    Work { name: "merge", rows: PURE, prepare: merging },
    Work { name: "encode", rows: PURE, prepare: encoding },
    Work { name: "decode", rows: PURE, prepare: decoding },
    Work { name: "absorb-insert", rows: ROWS, prepare: || absorbing(INTEGER, &[INSERT]) },
    Work { name: "absorb-insert-text", rows: ROWS, prepare: || absorbing(TEXT, &[INSERT]) },
    Work { name: "absorb-update", rows: ROWS, prepare: || absorbing(INTEGER, &[INSERT, UPDATE]) },
    Work { name: "absorb-delete", rows: ROWS, prepare: || absorbing(INTEGER, &[INSERT, DELETE]) },
    Work { name: "apply-insert", rows: ROWS, prepare: || applying(INTEGER, &[INSERT]) },
    Work { name: "apply-insert-text", rows: ROWS, prepare: || applying(TEXT, &[INSERT]) },
    Work { name: "apply-update", rows: ROWS, prepare: || applying(INTEGER, &[INSERT, UPDATE]) },
    Work { name: "apply-delete", rows: ROWS, prepare: || applying(INTEGER, &[INSERT, DELETE]) },
];

/// Rows of the work that touches no file.
const PURE: i64 = 10_000;
/// Rows of the work that does.
const ROWS: i64 = 4_000;
const COLUMNS: u32 = 6;

const INTEGER: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, a TEXT, b INTEGER, c REAL)";
const TEXT: &str = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, a TEXT, b INTEGER, c REAL)";
const INSERT: &str = "INSERT INTO t VALUES(?1, 'what a row of about one hundred and twenty bytes holds besides its key and two numbers', ?2, ?2 / 3.0)";
const UPDATE: &str = "UPDATE t SET b = ?2 + 1, c = 0.5 WHERE id = ?1";
const DELETE: &str = "DELETE FROM t WHERE id = ?1 AND ?2 = ?2";

fn at(hlc: i64, site: u64) -> Version {
    Version { hlc: Hlc(1 << 40 | hlc as u64), site: SiteId(site) }
}

/// One side's state of a row: sides agree on its birth three times of four, and each wrote other columns.
fn side(i: i64, site: u64) -> Row {
    let birth = if i % 4 == 0 { at(i, site) } else { at(i, 1) };
    let mut state = RowState::born(birth);
    for column in 0..COLUMNS {
        if (i as u32 + column).is_multiple_of(site as u32 + 1) {
            state.columns.insert(column, at(i + 7 * i64::from(column) % 5, site));
        }
    }
    if i % 16 == 1 && site == 2 {
        let dead = Some(at(i + 9, site));
        return Row { state: RowState { dead, ..RowState::born(birth) }, values: Default::default() };
    }
    let value = |c: u32| match c % 3 {
        0 => Value::Int(i + i64::from(c)),
        1 => Value::Text(format!("text {i} {site}").into_bytes()),
        _ => Value::Null,
    };
    Row { state, values: (0..COLUMNS).map(|c| (c, value(c))).collect() }
}

fn merging() -> Box<dyn FnMut()> {
    let pairs: Vec<(Row, Row)> = (0..PURE).map(|i| (side(i, 1), side(i, 2))).collect();
    Box::new(move || {
        for (ours, theirs) in &pairs {
            std::hint::black_box(merge(ours, theirs));
        }
    })
}

fn encode() -> Vec<u8> {
    let mut frame = FrameWriter::new(at(0, 1));
    frame.begin_section("t", &["id"], &["a", "b", "c"], false);
    for i in 0..PURE {
        let text = format!("what a row holds besides its key and two numbers {}", i * 7_919 % 1_009);
        let columns = [(1, at(i % 50, 2))];
        let versions = RowVersions {
            birth: at(0, 1),
            dead: None,
            columns: if i % 5 == 0 { &columns } else { &[] },
            refs: &[],
            fixed: false,
        };
        let values = [ValueRef::Text(text.as_bytes()), ValueRef::Int(i * 7), ValueRef::Real(i as f64 / 3.0)];
        frame.row([ValueRef::Int(i)].into_iter(), versions, values.into_iter());
    }
    frame.finish()
}

fn encoding() -> Box<dyn FnMut()> {
    Box::new(|| {
        std::hint::black_box(encode());
    })
}

fn decoding() -> Box<dyn FnMut()> {
    let bytes = encode();
    Box::new(move || {
        let frame = Frame::open(&bytes).unwrap();
        let mut rows = 0;
        for mut section in frame.sections().unwrap() {
            let mut row = RowBuffer::default();
            while section.next_row(&mut row).unwrap().is_some() {
                rows += 1;
            }
        }
        assert_eq!(rows, PURE);
    })
}

/// A file that replicates and the application's connection to it.
struct Site {
    app: Connection,
    store: Store,
    /// The commit that tells the schema.
    first: Option<OwnCommit>,
    // Goes last: what is open in it goes before.
    dir: TempDir,
}

impl Site {
    fn new(site: u64, schema: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.db");
        let app = Connection::open(&path).unwrap();
        app.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL").unwrap();
        app.execute_batch(schema).unwrap();
        adopt::install(&app, 7, SiteId(site)).unwrap();
        let mut store = Store::open(&path, dir.path(), Box::new(|_| true), SchemaMode::Replicate).unwrap();
        let first = store.absorb().unwrap();
        Self { app, store, first, dir }
    }

    /// One transaction of the application, a statement a row.
    fn write(&self, sql: &str) {
        self.app.execute_batch("BEGIN").unwrap();
        let mut statement = self.app.prepare(sql).unwrap();
        let is_text =
            self.app.query_row("SELECT type = 'TEXT' FROM pragma_table_info('t')", [], |r| r.get(0));
        let is_text: bool = is_text.unwrap();
        for i in 0..ROWS {
            let changed = match is_text {
                true => statement.execute((format!("{:08x}-{i}", i * 2_654_435_761 % (1 << 32)), i)),
                false => statement.execute((i, i)),
            };
            assert_eq!(changed.unwrap(), 1);
        }
        drop(statement);
        self.app.execute_batch("COMMIT").unwrap();
    }

    /// Absorbs one transaction of the application.
    fn absorb(&mut self, sql: &str) -> OwnCommit {
        self.write(sql);
        let own = self.store.absorb().unwrap().expect("a commit");
        assert_eq!(own.header.rows, ROWS as u64);
        own
    }
}

/// Absorbs what the last of the statements did to every row.
fn absorbing(schema: &str, statements: &[&str]) -> Box<dyn FnMut()> {
    let mut site = Site::new(1, schema);
    let (last, before) = statements.split_last().unwrap();
    before.iter().for_each(|sql| drop(site.absorb(sql)));
    site.write(last);
    Box::new(move || {
        let site = &mut site;
        let own = site.store.absorb().unwrap().expect("a commit");
        assert_eq!(own.header.rows, ROWS as u64);
    })
}

/// What a peer makes of a commit's pieces.
fn received(mut own: OwnCommit, spool: &Path) -> PeerCommit {
    let (mut assembler, mut whole) = (Assembler::new(spool), None);
    let site = own.site;
    commit_pieces(&mut own, |piece| {
        let piece: Fragment = decode(&piece).unwrap();
        whole = whole.take().or(assembler.push(site, &piece).unwrap());
    })
    .unwrap();
    whole.expect("a whole commit")
}

/// Applies what the last of the statements did to every row of a peer.
fn applying(schema: &str, statements: &[&str]) -> Box<dyn FnMut()> {
    let (mut from, mut to) = (Site::new(1, schema), Site::new(2, schema));
    let spool = to.dir.path().to_owned();
    let first = from.first.take().into_iter().collect::<Vec<_>>();
    let theirs = statements.iter().map(|sql| from.absorb(sql)).collect::<Vec<_>>();
    let mut before: Vec<PeerCommit> =
        first.into_iter().chain(theirs).map(|own| received(own, &spool)).collect();
    let mut last = vec![before.pop().expect("a statement")];
    assert_eq!(to.store.apply(&mut before).unwrap().count, before.len());
    Box::new(move || {
        let to = &mut to;
        assert_eq!(to.store.apply(&mut last).unwrap().count, 1);
    })
}
