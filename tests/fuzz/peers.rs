//! What a peer sends, into a database: a commit or a page is taken in whole or not at all, nothing panics, the file
//! stays sound, and what was right in the first place is taken in afterwards.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use litemesh::core::message::{
    CopyPart, CopyRequest, FRAGMENT_BYTES, Fragment, Hello, Message, decode, encode,
};
use litemesh::core::names::{DbName, NodeName};
use litemesh::core::schema::SchemaMode;
use litemesh::core::version::SiteId;
use litemesh::replica::store::Store;
use litemesh::replica::{adopt, copy};
use rusqlite::Connection;

use crate::site::{START_MS, Site, talk};
use crate::{attempt, fuzz, fuzz_also, write_samples};

const SCHEMA: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, v, w TEXT UNIQUE);
    CREATE TABLE k(a TEXT, b BLOB, c REAL, PRIMARY KEY(a, b)) WITHOUT ROWID;
    INSERT INTO t VALUES(1, 'there before', 'x')";

/// What the writer did, a commit each.
const WRITES: [&str; 5] = [
    "INSERT INTO t VALUES(2, 'two', 'y'), (3, x'00ff', NULL); INSERT INTO k VALUES('a', x'01', 1.5), ('é', x'', -0.0)",
    "UPDATE t SET v = 7 WHERE id = 2; UPDATE t SET w = 'z' WHERE id = 1; DELETE FROM k WHERE a = 'a'",
    "ALTER TABLE t ADD COLUMN extra INTEGER DEFAULT 5; CREATE INDEX i ON t(v)",
    "WITH RECURSIVE c(i) AS (SELECT 10 UNION ALL SELECT i + 1 FROM c WHERE i < 60)
     INSERT INTO t(id, v) SELECT i, 'row ' || i FROM c",
    "DELETE FROM t WHERE id % 7 = 0; CREATE TABLE later(x TEXT PRIMARY KEY NOT NULL); INSERT INTO later VALUES('l')",
];

static NUMBER: AtomicU64 = AtomicU64::new(0);

/// The writer, and a reader that has nothing of it.
fn two() -> (Site, Site) {
    let test = format!("fuzz-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    let site = |name, site| Site::with_mode(&test, name, (site, 7), SCHEMA, SchemaMode::Replicate);
    (site("a", 1), site("b", 2))
}

fn whole(pieces: &[Bytes]) -> Vec<u8> {
    pieces.iter().flat_map(|p| decode::<Fragment>(p).unwrap().data).collect()
}

fn pieces(commit: &[u8]) -> Vec<Bytes> {
    let count = commit.len().div_ceil(FRAGMENT_BYTES).max(1);
    let piece = |index| {
        let part = &commit[index * FRAGMENT_BYTES..commit.len().min((index + 1) * FRAGMENT_BYTES)];
        let data = Bytes::copy_from_slice(part);
        encode(&Fragment { attempt: 1, index: index as u32, last: index + 1 == count, data })
    };
    (0..count).map(piece).collect()
}

/// All rows of the application's tables.
fn dump(conn: &Connection) -> String {
    let tables = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE '\\_\\_%' ESCAPE '\\'
                  AND name NOT LIKE 'sqlite%' ORDER BY name";
    let mut statement = conn.prepare(tables).unwrap();
    let names: Vec<String> = statement.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
    let mut out = String::new();
    for name in names {
        let name = name.replace('"', "\"\"");
        let mut rows = conn.prepare(&format!("SELECT * FROM \"{name}\"")).unwrap();
        let width = rows.column_count();
        let mut lines = Vec::new();
        let mut found = rows.query([]).unwrap();
        while let Some(row) = found.next().unwrap() {
            lines.push(format!("{:?}", (0..width).map(|i| row.get_ref(i).unwrap()).collect::<Vec<_>>()));
        }
        lines.sort();
        out.push_str(&format!("{name}: {}\n", lines.join("\n  ")));
    }
    out
}

fn is_sound(conn: &Connection) -> Result<(), String> {
    let found: String = conn.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
    if found == "ok" { Ok(()) } else { Err(found) }
}

/// The commits of the writer, and the messages that tell of them.
fn history() -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let (mut a, mut b) = two();
    let commits: Vec<Vec<u8>> = WRITES.iter().map(|sql| whole(&a.write(sql))).collect();
    a.engine.announce(START_MS);
    a.settle(START_MS);
    let mut messages = Vec::new();
    b.write("UPDATE t SET v = 'b' WHERE id = 1");
    b.engine.announce(START_MS);
    b.settle(START_MS);
    for now_ms in (START_MS..).step_by(200).take(20) {
        let said = [std::mem::take(&mut a.messages), std::mem::take(&mut b.messages)];
        for (from_a, said) in [true, false].into_iter().zip(said) {
            for (_, message) in said {
                messages.push(encode(&message).to_vec());
                let (from, to) = if from_a { (&a.name, &mut b) } else { (&b.name, &mut a) };
                to.hear(from, message, now_ms);
            }
        }
        a.settle(now_ms);
        b.settle(now_ms);
    }
    messages.extend(rare_messages().iter().map(|m| encode(m).to_vec()));
    messages.sort();
    messages.dedup();
    (commits, messages)
}

/// What those two do not say to each other.
fn rare_messages() -> Vec<Message> {
    let (db, name): (DbName, NodeName) = ("app".parse().unwrap(), "a".parse().unwrap());
    let data = Bytes::from_static(b"SQLite format 3");
    vec![
        Message::Hello(Hello { version: "0.1.0".into(), now_ms: START_MS, dbs: vec![db.clone()] }),
        Message::Ask { db: db.clone() },
        Message::CopyRequest(CopyRequest { db, request: 1, copy: 2, offset: 1 << 20, have: Some([8; 32]) }),
        Message::CopyPart(CopyPart {
            request: 1,
            copy: 2,
            size: 15,
            offset: 0,
            data,
            same: false,
            hash: [7; 32],
        }),
        Message::Refused { request: 1, why: format!("node {name} is stopping") },
        Message::Bye,
    ]
}

#[test]
fn commits_of_a_peer() {
    let (commits, messages) = history();
    write_samples("commit", &commits);
    write_samples("message", &messages);
    let pieces_of: Vec<Vec<u8>> = commits.iter().map(|c| pieces(c)[0].to_vec()).collect();
    write_samples("piece", &pieces_of);
    let frames: Vec<Vec<u8>> = commits.iter().flat_map(|c| blocks(c)).collect();
    write_samples("frame", &frames);
    fuzz("commit", 300, |bytes| attempt(|| one_commit(&commits, bytes))?);
}

/// The frames of a commit.
fn blocks(commit: &[u8]) -> Vec<Vec<u8>> {
    let (mut rest, mut out) = (commit, Vec::new());
    while let Some((len, more)) = rest.split_first_chunk::<4>() {
        let (block, more) = more.split_at(u32::from_be_bytes(*len) as usize);
        out.push(block.to_vec());
        rest = more;
    }
    out.split_off(1)
}

fn one_commit(commits: &[Vec<u8>], bytes: &[u8]) -> Result<(), String> {
    let (_, mut b) = two();
    let writer = SiteId(1);
    let before = dump(&b.app);
    b.take(writer, &pieces(bytes));
    b.settle(START_MS);
    is_sound(&b.app)?;
    if b.engine.store().head().vector.n(writer) != 0 {
        // It could be read, and says something else: a peer's word is a peer's word.
        return Ok(());
    }
    if dump(&b.app) != before {
        return Err("it was applied in part".to_owned());
    }
    // A commit that waits for others is one that could be read. It is dropped for the true one, which begins there too.
    for commit in commits {
        b.take(writer, &pieces(commit));
    }
    b.settle(START_MS + 10_000);
    let n = b.engine.store().head().vector.n(writer);
    let waits = b.stopped();
    if n < commits.len() as u64 && waits.is_empty() {
        return Err(format!("the true commits are not taken in afterwards: {n}"));
    }
    is_sound(&b.app)
}

#[test]
fn messages_of_a_peer() {
    fuzz("message", 600, |bytes| attempt(|| one_message(bytes))?);
}

fn one_message(bytes: &[u8]) -> Result<(), String> {
    let Ok(message) = decode::<Message>(bytes) else { return Ok(()) };
    let (mut a, mut b) = two();
    for sql in WRITES {
        a.write(sql);
    }
    b.write("INSERT INTO t VALUES(100, 'b', 'own')");
    // So that b has asked for rows, and a page means something to it.
    a.engine.announce(START_MS);
    a.settle(START_MS);
    for (_, m) in std::mem::take(&mut a.messages) {
        b.hear(&a.name, m, START_MS);
    }
    b.settle(START_MS);
    b.settle(START_MS + 200);
    let before = dump(&b.app);
    let vector = b.engine.store().head().vector.clone();
    b.hear(&a.name, message, START_MS + 200);
    b.settle(START_MS + 200);
    is_sound(&b.app)?;
    if b.engine.store().head().vector == vector && dump(&b.app) != before {
        return Err("it was applied in part".to_owned());
    }
    Ok(())
}

#[test]
fn copies_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let (file, made) = (dir.path().join("a.db"), dir.path().join("made"));
    let app = Connection::open(&file).unwrap();
    app.execute_batch(SCHEMA).unwrap();
    adopt::install(&app, 7, SiteId(1)).unwrap();
    let mut a = Site::open(file.to_str().unwrap(), "a", SchemaMode::Replicate);
    for sql in WRITES {
        a.write(sql);
    }
    let reader = a.engine.snapshot().unwrap();
    copy::write_copy(&reader, &made).unwrap();
    drop(reader);
    let number = AtomicU64::new(0);
    fuzz_also("copy", vec![std::fs::read(&made).unwrap()], 100, |bytes| {
        let n = number.fetch_add(1, Ordering::Relaxed);
        let (fetched, dest) = (dir.path().join(format!("{n}.copy")), dir.path().join(format!("{n}.db")));
        std::fs::write(&fetched, bytes).unwrap();
        attempt(|| {
            // Damage that SQLite does not see at once is found when it is read: an error then, and no panic.
            if copy::install_copy(&fetched, &dest, SiteId(9)).is_ok()
                && let Ok(mut store) =
                    Store::open(&dest, dir.path(), Box::new(|_| true), SchemaMode::Replicate)
            {
                drop(store.absorb());
            }
        })
    });
}

#[test]
fn the_right_bytes_are_taken_in() {
    let (mut a, mut b) = two();
    for sql in WRITES {
        let commit = whole(&a.write(sql));
        b.take(SiteId(1), &pieces(&commit));
    }
    b.settle(START_MS);
    assert_eq!(dump(&a.app), dump(&b.app));
    let (mut a, mut b) = two();
    for sql in WRITES {
        a.write(sql);
    }
    a.engine.announce(START_MS);
    a.settle(START_MS);
    talk(&mut a, &mut b, START_MS);
    b.settle(START_MS + 200);
    talk(&mut a, &mut b, START_MS + 200);
    b.settle(START_MS + 400);
    assert_eq!(dump(&a.app), dump(&b.app));
}
