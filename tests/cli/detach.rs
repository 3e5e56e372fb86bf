//! `detach`: nothing of litemesh is left, and nothing else is touched.

use crate::support::{Node, dump, wait_equal};

const SCHEMA: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT UNIQUE);
    CREATE TABLE audit(what); CREATE TRIGGER own AFTER INSERT ON t BEGIN INSERT INTO audit VALUES(NEW.v); END;
    INSERT INTO t VALUES(1, 'one'), (2, 'two')";

fn schema(node: &Node, file: &str) -> Vec<String> {
    let app = node.app(file);
    let mut statement = app.prepare("SELECT coalesce(sql, name) FROM sqlite_schema ORDER BY name").unwrap();
    statement.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect()
}

fn assert_traceless(node: &Node, file: &str, before: &[String]) {
    let after = schema(node, file);
    assert!(!after.iter().any(|s| s.contains("litemesh")), "{after:?}");
    assert_eq!(after, before);
    let ok: String = node.app(file).query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
    assert_eq!(ok, "ok");
}

#[test]
fn of_a_node_that_does_not_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    a.exec("app.db", SCHEMA);
    let before = schema(&a, "app.db");
    let never = a.run(&["detach", "app.db"]);
    assert!(never.status.success() && String::from_utf8_lossy(&never.stdout).contains("not replicated"));
    a.start(None);
    a.exec("app.db", "INSERT INTO t VALUES(3, 'three'); DELETE FROM t WHERE id = 1");
    a.sync();
    a.stop();
    let rows = dump(&a.file("app.db"));
    let output = a.run(&["detach", "app.db"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_traceless(&a, "app.db", &before);
    assert_eq!(dump(&a.file("app.db")), rows);
    // The application goes on, and the file may be taken in again.
    a.exec("app.db", "INSERT INTO t VALUES(4, 'four')");
    a.start(None);
    let token = a.token();
    let mut b = Node::new(dir.path(), "b", &["app.db"]);
    b.start(Some(&token));
    b.exec("app.db", "INSERT INTO t VALUES(5, 'five')");
    wait_equal(&[&a, &b], "app.db");
    assert_eq!(dump(&a.file("app.db")).iter().filter(|l| l.starts_with("t:")).count(), 4);
}

#[test]
fn through_a_node_that_runs() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db", "other.db"]);
    let mut b = Node::new(dir.path(), "b", &["app.db", "other.db"]);
    a.exec("app.db", SCHEMA);
    a.exec("other.db", SCHEMA);
    let before = schema(&a, "app.db");
    a.start(None);
    b.start(Some(&a.token()));
    b.exec("app.db", "INSERT INTO t VALUES(3, 'three')");
    wait_equal(&[&a, &b], "app.db");
    let rows = dump(&a.file("app.db"));
    let output = a.run(&["detach", "app.db"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("detached"));
    assert_traceless(&a, "app.db", &before);
    assert_eq!(dump(&a.file("app.db")), rows);
    let names = |n: &Node| n.status()["databases"].as_array().unwrap().len();
    crate::support::wait_for("status forgets it", || names(&a) == 1);
    // It is the application's alone now; the other file and the other node go on.
    a.exec(
        "app.db",
        "INSERT INTO t VALUES(4, 'four'); DELETE FROM t WHERE id = 4; DELETE FROM audit WHERE what = 'four'",
    );
    b.exec("other.db", "INSERT INTO t VALUES(3, 'three')");
    a.exec("other.db", "INSERT INTO t VALUES(4, 'four')");
    wait_equal(&[&a, &b], "other.db");
    assert_traceless(&a, "app.db", &before);
    // A second time there is nothing to do; a file of nobody's is told as such.
    assert!(a.run(&["detach", "app.db"]).status.success());
    assert_eq!(a.run(&["detach", "missing.db"]).status.code(), Some(1));
    // It has the mesh's rows still, and is taken in again by the same line.
    a.stop();
    a.start(None);
    a.exec("app.db", "INSERT INTO t VALUES(9, 'nine')");
    wait_equal(&[&a, &b], "app.db");
}
