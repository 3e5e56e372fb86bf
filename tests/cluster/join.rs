//! Ways to come into a mesh.

use rusqlite::Connection;

use crate::support::{Node, dump, pair, wait_equal};

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
