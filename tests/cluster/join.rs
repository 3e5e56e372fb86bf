//! Ways to come into a mesh.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use futures::StreamExt;
use litemesh::core::message::{CopyPart, CopyRequest, Fragment, Message, decode, encode};
use rusqlite::Connection;
use rustix::process::{Pid, Signal, kill_process};

use crate::poison::look_inside;
use crate::support::{Node, PATIENCE, dump, pair, wait_equal, wait_for};

const SCHEMA: &str =
    "CREATE TABLE t(id INTEGER PRIMARY KEY, v); CREATE INDEX i ON t(v); CREATE VIEW w AS SELECT v FROM t;
    INSERT INTO t VALUES(1, 'one'), (2, 'two')";

#[test]
fn a_file_that_is_missing_empty_or_the_same_is_taken_in() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), SCHEMA);
    let token = a.token();
    a.exec("app.db", "INSERT INTO t VALUES(3, 'three'); DELETE FROM t WHERE id = 1");
    let (mut empty, mut same) =
        (Node::new(dir.path(), "empty", &["app.db"]), Node::new(dir.path(), "same", &["app.db"]));
    empty.exec("app.db", "CREATE TABLE t(id INTEGER PRIMARY KEY, v); CREATE TABLE own(x)");
    same.exec("app.db", SCHEMA.split("INSERT").next().unwrap());
    same.exec("app.db", "INSERT INTO t VALUES(3, 'three'), (2, 'two')");
    empty.start(Some(&token));
    same.start(Some(&token));
    wait_equal(&[&a, &b, &same], "app.db");
    same.exec("app.db", "INSERT INTO t VALUES(4, 'four')");
    empty.exec("app.db", "UPDATE t SET v = 'TWO' WHERE id = 2");
    for node in [&same, &empty] {
        node.sync();
    }
    let own = "SELECT count(*) FROM own";
    let own: i64 = empty.app("app.db").query_row(own, [], |r| r.get(0)).unwrap();
    assert_eq!(own, 0, "its own table is still there");
    let rows =
        |n: &Node| dump(&n.file("app.db")).into_iter().filter(|l| l.starts_with("t:")).collect::<Vec<_>>();
    assert_eq!(rows(&a).len(), 3);
    assert!(rows(&a) == rows(&b) && rows(&a) == rows(&empty) && rows(&a) == rows(&same));
    // The index and the view came along with the copy.
    let names: i64 = b
        .app("app.db")
        .query_row("SELECT count(*) FROM sqlite_schema WHERE name IN ('i', 'w')", [], |r| r.get(0))
        .unwrap();
    assert_eq!(names, 2);
    // A node that belongs ignores the token; so the same line starts it again.
    a.stop();
    a.start(Some(&token));
    a.sync();
}

#[test]
fn a_file_with_other_rows_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (a, _b) = pair(dir.path(), SCHEMA);
    let other = Node::new(dir.path(), "other", &["app.db"]);
    other.exec("app.db", "CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t VALUES(1, 'mine')");
    let before = dump(&other.file("app.db"));
    let output = other.up_command(Some(&a.token())).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("rows of its own") && text.contains("\"t\""), "{text}");
    let conn = Connection::open(other.file("app.db")).unwrap();
    let ours: i64 = conn
        .query_row("SELECT count(*) FROM sqlite_schema WHERE name LIKE '%litemesh%'", [], |r| r.get(0))
        .unwrap();
    assert_eq!(ours, 0, "nothing of litemesh is in it");
    drop(conn);
    assert_eq!(before, dump(&other.file("app.db")));
    let left: Vec<_> = std::fs::read_dir(&other.home).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|n| n.to_string_lossy().contains("litemesh-join")), "{left:?}");
}

#[test]
fn several_databases_go_by_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["data/*.db", "notes=other file.sqlite"]);
    std::fs::create_dir(a.file("data")).unwrap();
    for file in ["data/one.db", "data/two.db", "other file.sqlite"] {
        a.exec(file, &format!("CREATE TABLE t(v); INSERT INTO t VALUES('{file}')"));
    }
    a.start(None);
    let mut b = Node::new(dir.path(), "b", &["one.db", "two=zwei.db", "notes.db", "extra.db"]);
    b.exec("extra.db", "CREATE TABLE t(v); INSERT INTO t VALUES('only b has it')");
    b.start(Some(&a.token()));
    assert_eq!(dump(&b.file("one.db")), dump(&a.file("data/one.db")));
    assert_eq!(dump(&b.file("zwei.db")), dump(&a.file("data/two.db")));
    assert_eq!(dump(&b.file("notes.db")), dump(&a.file("other file.sqlite")));
    b.exec("notes.db", "INSERT INTO t VALUES('from b')");
    b.sync();
    assert_eq!(dump(&b.file("notes.db")), dump(&a.file("other file.sqlite")));
    let names: Vec<String> = a.status()["databases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| d["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["notes", "one", "two"]);
}

/// A file that takes a moment to fetch.
fn large(dir: &Path) -> (Node, Node) {
    let (mut a, b) = (Node::new(dir, "a", &["app.db"]), Node::new(dir, "b", &["app.db"]));
    a.exec(
        "app.db",
        "PRAGMA journal_mode = WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, v);
         WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 160)
         INSERT INTO t SELECT i, randomblob(1000000) FROM c",
    );
    a.start(None);
    (a, b)
}

const ON_ITS_WAY: &str = "app.db.litemesh-join";

fn wait_for_part(b: &Node) {
    let there = || std::fs::metadata(b.file(ON_ITS_WAY)).map_or(0, |m| m.blocks() * 512);
    wait_for("a part of the copy is there", || there() > 24 << 20);
}

fn check_joined(a: &Node, b: &Node) {
    a.exec("app.db", "INSERT INTO t VALUES(1000, 'after')");
    a.sync();
    wait_equal(&[a, b], "app.db");
    assert_eq!(b.text("app.db", "PRAGMA integrity_check"), "ok");
    for suffix in ["", "-wal", "-shm"] {
        assert!(!b.file(&format!("{ON_ITS_WAY}{suffix}")).exists(), "the copy{suffix} is left");
    }
}

#[test]
fn a_node_that_was_killed_while_it_joined_goes_on_from_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = large(dir.path());
    b.spawn(Some(&a.token()));
    wait_for_part(&b);
    b.kill();
    a.exec("app.db", "INSERT INTO t VALUES(999, 'meanwhile')");
    // As if it had been killed while it installed a copy.
    let other = Connection::open(dir.path().join("other.db")).unwrap();
    other
        .execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE other(x); INSERT INTO other VALUES(1)")
        .unwrap();
    std::fs::copy(dir.path().join("other.db-wal"), b.file(&format!("{ON_ITS_WAY}-wal"))).unwrap();
    b.start(Some(&a.token()));
    let log = b.log.lock().unwrap().join("\n");
    let fetched = log.lines().find(|l| l.contains("fetched ")).expect("it says what it fetched");
    let same = fetched.split("; ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    assert!(same.parse::<u64>().unwrap() > 16 << 20, "{fetched}");
    check_joined(&a, &b);
}

#[test]
fn a_node_goes_on_joining_when_its_peer_was_started_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = large(dir.path());
    let token = a.token();
    b.spawn(Some(&token));
    wait_for_part(&b);
    a.kill();
    a.exec("app.db", "UPDATE t SET v = 'shorter' WHERE id > 100; INSERT INTO t VALUES(999, 'meanwhile')");
    a.start(None);
    b.wait_ready();
    let log = b.log.lock().unwrap().join("\n");
    let done = log.contains("goes on from what is here") || log.contains("; 0 of them were here already");
    assert!(done, "{log}");
    check_joined(&a, &b);
}

/// How many connections a node has to its file: a copy that is being fetched has one.
fn readers(node: &Node) -> usize {
    let all = std::fs::read_dir(format!("/proc/{}/fd", pid(node))).unwrap();
    let open = |e: std::io::Result<std::fs::DirEntry>| std::fs::read_link(e.ok()?.path()).ok();
    all.filter_map(open).filter(|to| to.ends_with("app.db-wal")).count()
}

fn pid(node: &Node) -> u64 {
    u64::from(node.process.as_ref().unwrap().id())
}

fn signal(pid: u64, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

#[test]
fn who_fetches_slowly_does_not_keep_the_log_of_a_file_growing() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = large(dir.path());
    let at_rest = readers(&a);
    b.spawn(Some(&a.token()));
    wait_for_part(&b);
    signal(pid(&b), Signal::STOP);
    assert_eq!(readers(&a), at_rest + 1, "the copy is read from the file itself");
    // While it is, what programs write stays in the log. When that has grown, the copy is put aside.
    let app = a.app("app.db");
    let write = "UPDATE t SET v = randomblob(1000000) WHERE id <= 20";
    let mut written = 0;
    while readers(&a) > at_rest {
        if written < 5 {
            app.execute(write, []).unwrap();
            written += 1;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // From then on the log can be begun anew.
    let emptied = || {
        let sql = "PRAGMA wal_checkpoint(TRUNCATE)";
        app.query_row(sql, [], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, i64>(1)?))).unwrap() == (0, 0)
    };
    wait_for("the log is empty", emptied);
    let spool = std::fs::read_dir(a.state_dir().join("spool")).unwrap();
    assert_eq!(
        spool.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains("copy")).count(),
        0
    );
    signal(pid(&b), Signal::CONT);
    b.wait_ready();
    check_joined(&a, &b);
}

#[test]
fn a_link_that_is_cut_while_a_node_joins_costs_time_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = large(dir.path());
    b.spawn(Some(&a.token()));
    wait_for_part(&b);
    // Nothing goes through it any more, and what was on its way is lost when its peer gives the connection up.
    let server = a.server_pid();
    signal(server, Signal::STOP);
    let there = || std::fs::metadata(b.file(ON_ITS_WAY)).map_or(0, |m| m.blocks());
    let mut before = u64::MAX;
    wait_for("nothing comes any more", || {
        std::thread::sleep(Duration::from_secs(5));
        std::mem::replace(&mut before, there()) == before
    });
    a.exec("app.db", "INSERT INTO t VALUES(999, 'meanwhile')");
    // Its supervisor may have started another by now.
    if let Some(pid) = Pid::from_raw(server as i32) {
        let _ = kill_process(pid, Signal::CONT);
    }
    b.wait_ready();
    check_joined(&a, &b);
}

/// A request of a node that does not exist.
async fn ask(client: &async_nats::Client, ghost: u64, (request, copy, offset): (u64, u64, u64)) {
    let ask = CopyRequest { db: "app".parse().unwrap(), request, copy, offset, have: None };
    let data = encode(&Message::CopyRequest(ask));
    let piece = encode(&Fragment { attempt: request, index: 0, last: true, data });
    client.publish(format!("lm.d.a.ghost{ghost}"), piece).await.unwrap();
    client.flush().await.unwrap();
}

/// The next answer; none when none comes for a while.
async fn answer(answers: &mut async_nats::Subscriber, patience: Duration) -> Option<CopyPart> {
    loop {
        let heard = tokio::time::timeout(patience, answers.next()).await.ok()??;
        let piece: Fragment = decode(&heard.payload).unwrap();
        if let Ok(Message::CopyPart(part)) = decode(&piece.data) {
            return Some(part);
        }
    }
}

#[test]
fn copies_for_nodes_that_join_are_few_at_once_and_go_when_they_are_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    a.exec("app.db", SCHEMA);
    a.start(None);
    let at_rest = readers(&a);
    let copies = || readers(&a) - at_rest;
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let client = look_inside(&a).await;
        let mut answers = client.subscribe("lm.d.*.a").await.unwrap();
        for ghost in 0..12 {
            ask(&client, ghost, (ghost + 1, 0, 0)).await;
        }
        let mut made = Vec::new();
        while made.len() < 8 {
            made.push(answer(&mut answers, PATIENCE).await.expect("a copy"));
        }
        assert!(answer(&mut answers, Duration::from_secs(2)).await.is_none(), "no more than eight");
        assert_eq!(copies(), 8);
        // Who asks once more has one copy all the same.
        let again = made[0].request - 1;
        ask(&client, again, (made[0].request, 0, 0)).await;
        let same = answer(&mut answers, PATIENCE).await.expect("the same");
        assert_eq!((same.copy, copies()), (made[0].copy, 8));
        // What was fetched goes, and the others get theirs.
        for part in &made[..4] {
            ask(&client, part.request - 1, (part.request, part.copy, part.size)).await;
        }
        for _ in 0..4 {
            let part = answer(&mut answers, PATIENCE).await.expect("those that waited");
            assert!(!made.iter().any(|m| m.request == part.request));
        }
        wait_for("eight again", || copies() == 8);
    });
}
