//! `conflicts`: what two nodes wrote while they were apart is listed, shown and brought back, on every node.

use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};

use crate::support::{Node, litemesh, pair, wait_equal, wait_for};

const SCHEMA: &str = "
    CREATE TABLE orders(id INTEGER PRIMARY KEY, item TEXT, n INTEGER);
    CREATE TABLE line(id TEXT PRIMARY KEY NOT NULL, of_order INTEGER REFERENCES orders(id), what TEXT);
    CREATE TABLE note(orders INTEGER REFERENCES orders, n INTEGER, t, PRIMARY KEY(orders, n)) WITHOUT ROWID;
    CREATE TABLE person(id TEXT PRIMARY KEY NOT NULL, mail TEXT UNIQUE, nick TEXT NOT NULL UNIQUE);
    CREATE TABLE later(id TEXT PRIMARY KEY NOT NULL, v);
    CREATE TABLE audit(id TEXT PRIMARY KEY NOT NULL DEFAULT (hex(randomblob(16))), what);
    CREATE TRIGGER audited AFTER INSERT ON orders BEGIN INSERT INTO audit(what) VALUES(NEW.item); END;
    INSERT INTO orders VALUES(1, 'first', 0);";

fn conflicts(node: &Node, args: &[&str]) -> Output {
    litemesh().current_dir(&node.home).arg("conflicts").args(args).output().unwrap()
}

fn says(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn list(node: &Node, more: &[&str]) -> Vec<Value> {
    let args: Vec<&str> = ["list", "app.db", "--json"].iter().chain(more).copied().collect();
    serde_json::from_str(&says(&conflicts(node, &args))).unwrap()
}

fn only(node: &Node, table: &str) -> Value {
    let found = list(node, &["--table", table]);
    assert_eq!(found.len(), 1, "{found:#?}");
    found[0].clone()
}

fn ask(node: &Node, sql: &str) -> String {
    let found = node.app("app.db").query_row(sql, [], |r| r.get::<_, Option<String>>(0));
    found.unwrap().unwrap_or_default()
}

/// Two nodes that share `app.db`, and what each writes while it does not see the other; `second` wins.
fn apart(dir: &Path, schema: &str, first: &str, second: &str) -> (Node, Node) {
    let (a, mut b) = pair(dir, schema);
    a.sync();
    b.stop();
    a.exec("app.db", first);
    std::thread::sleep(std::time::Duration::from_millis(5));
    b.exec("app.db", second);
    b.start(None);
    a.sync();
    b.sync();
    wait_equal(&[&a, &b], "app.db");
    wait_for("both keep the same", || {
        let kept = |n: &Node| ask(n, "SELECT group_concat(hex(id)) FROM __litemesh_conflicts");
        !kept(&a).is_empty() && kept(&a) == kept(&b)
    });
    (a, b)
}

#[test]
fn a_row_that_lost_its_id_comes_back_with_its_children() {
    let dir = tempfile::tempdir().unwrap();
    let first =
        "INSERT INTO orders VALUES(5, 'pears', 1); INSERT INTO line VALUES('a1', 5, 'x'), ('a2', 5, 'y');
                 INSERT INTO note VALUES(5, 1, 'of a')";
    let second = "INSERT INTO orders VALUES(5, 'plums', 2); INSERT INTO line VALUES('b1', 5, 'z')";
    let (a, b) = apart(dir.path(), SCHEMA, first, second);
    assert_eq!(ask(&a, "SELECT item FROM orders WHERE id = 5"), "plums");
    for node in [&a, &b] {
        let c = only(node, "orders");
        assert_eq!((&c["kind"], &c["key"], &c["open"]), (&json!("row"), &json!([5]), &json!(true)));
        assert_eq!(c["lost"], json!({ "item": "pears", "n": 1 }));
        assert_eq!((&c["loser_node"], &c["winner_node"]), (&json!("a"), &json!("b")));
        assert_eq!(c["children"].as_array().unwrap().len(), 3, "{c:#}");
        assert_eq!(list(node, &["--table", "ORDERS", "--key", "5"]).len(), 1);
        assert!(list(node, &["--key", "6"]).is_empty() && list(node, &["--table", "line"]).is_empty());
    }
    let id = only(&a, "orders")["id"].as_str().unwrap().to_owned();
    let listed = says(&conflicts(&a, &["list", "app.db"]));
    let line = listed.trim_end();
    assert!(line.starts_with(&id[..12]), "{line}");
    assert!(line.ends_with("row orders key 5: lost {\"item\":\"pears\",\"n\":1}, 3 children"), "{line}");
    let shown = says(&conflicts(&b, &["show", "app.db", &id[..4]]));
    for part in [
        "two rows were inserted under one key",
        "by node a,",
        "by node b,",
        "lost: item = \"pears\"",
        "the row with this key now: {\"item\":\"plums\",\"n\":2}",
        "child: line key a1 by of_order",
        "child: note key [5,1] by orders",
        &format!("litemesh conflicts restore app.db {} --new-id", &id[..12]),
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    wait_for("status and metrics count it", || {
        let db = &a.status()["databases"][0];
        db["conflicts"] == 1 && db["id_collisions"] == 1 && db["collision_children"] == 3
    });
    let warned = a.status()["warnings"].to_string();
    assert!(warned.contains("with 3 children") && warned.contains("--new-id"), "{warned}");
    let checked = litemesh().current_dir(&a.home).args(["check", "app.db"]).output().unwrap();
    assert!(String::from_utf8_lossy(&checked.stdout).contains("[id-collisions]"), "{checked:?}");

    let done = says(&conflicts(&b, &["restore", "app.db", &id, "--new-id"]));
    assert_eq!(done, "restored: orders has the row again, under the key 6; 3 children refer to it\n");
    b.sync();
    wait_equal(&[&a, &b], "app.db");
    let orders = "SELECT group_concat(id || item || n, ' ') FROM (SELECT * FROM orders ORDER BY id)";
    let lines = "SELECT group_concat(id || of_order, ' ') FROM (SELECT * FROM line ORDER BY id)";
    for node in [&a, &b] {
        assert_eq!(ask(node, orders), "1first0 5plums2 6pears1");
        assert_eq!(ask(node, lines), "a16 a26 b15");
        assert_eq!(ask(node, "SELECT orders || t FROM note"), "6of a");
        wait_for("it is settled everywhere", || list(node, &[]).is_empty());
        assert_eq!(list(node, &["--all"])[0]["restored"]["key"], json!([6]));
        assert!(says(&conflicts(node, &["list", "app.db"])).contains("all restored: --all shows them"));
    }
    assert_eq!(
        ask(&b, "SELECT count(*) || '' FROM audit WHERE what = 'pears'"),
        "2",
        "triggers saw the write"
    );
    wait_for("status counts none", || a.status()["databases"][0]["conflicts"] == 0);
    let again = refused(&conflicts(&a, &["restore", "app.db", &id, "--new-id"]));
    assert!(again.contains("it was restored before"), "{again}");
}

#[test]
fn a_child_that_comes_later_is_known_and_follows() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), SCHEMA);
    let mut c = Node::new(dir.path(), "c", &["app.db"]);
    c.start(Some(&a.token()));
    a.sync();
    // c sees a's row and goes away; it writes a child that nobody knows until the conflict is long restored.
    a.exec("app.db", "INSERT INTO orders VALUES(5, 'pears', 1)");
    b.stop();
    a.sync();
    wait_equal(&[&a, &c], "app.db");
    c.stop();
    c.exec("app.db", "INSERT INTO line VALUES('late', 5, 'of a')");
    b.exec("app.db", "INSERT INTO orders VALUES(5, 'plums', 2)");
    b.start(None);
    b.sync();
    wait_equal(&[&a, &b], "app.db");
    wait_for("it is kept", || list(&a, &[]).len() == 1);
    let id = only(&a, "orders")["id"].as_str().unwrap().to_owned();
    says(&conflicts(&a, &["restore", "app.db", &id, "--new-id"]));
    c.start(None);
    c.sync();
    a.sync();
    wait_equal(&[&a, &b, &c], "app.db");
    wait_for("the late child opens it again", || list(&b, &[]).len() == 1);
    assert_eq!(list(&b, &[])[0]["children"][0]["key"], json!(["late"]));
    let done = says(&conflicts(&b, &["restore", "app.db", &id[..6], "--new-id"]));
    assert!(done.contains("1 child refers to it"), "{done}");
    b.sync();
    wait_equal(&[&a, &b, &c], "app.db");
    assert_eq!(ask(&c, "SELECT of_order || '' FROM line"), "6");
    assert_eq!(ask(&c, "SELECT count(*) || '' FROM orders"), "3");
}

#[test]
fn columns_and_deleted_rows_come_back_and_nobody_has_to_run() {
    let dir = tempfile::tempdir().unwrap();
    let schema = format!("{SCHEMA} INSERT INTO orders VALUES(2, 'two', 0);");
    let first =
        "UPDATE orders SET item = 'of a', n = 7 WHERE id = 1; UPDATE orders SET item = 'kept' WHERE id = 2";
    let (mut a, mut b) = apart(
        dir.path(),
        &schema,
        first,
        "UPDATE orders SET item = 'of b' WHERE id = 1; DELETE FROM orders WHERE id = 2",
    );
    let found = list(&a, &["--table", "orders"]);
    assert_eq!(found.len(), 2, "{found:#?}");
    let of =
        |kind: &str| found.iter().find(|c| c["kind"] == kind).unwrap()["id"].as_str().unwrap().to_owned();
    let (column, delete) = (of("column"), of("delete"));
    let new_id = refused(&conflicts(&a, &["restore", "app.db", &column, "--new-id"]));
    assert!(new_id.contains("--new-id is for a row that lost"), "{new_id}");
    a.stop();
    b.stop();
    assert_eq!(
        says(&conflicts(&a, &["restore", "app.db", &column])),
        "restored: 1 columns of orders key 1 are written\n"
    );
    says(&conflicts(&a, &["restore", "app.db", &delete]));
    a.start(None);
    b.start(None);
    a.sync();
    wait_equal(&[&a, &b], "app.db");
    let orders = "SELECT group_concat(id || item || n, ' ') FROM (SELECT * FROM orders ORDER BY id)";
    assert_eq!(ask(&b, orders), "1of a7 2kept0");
    wait_for("b knows that it is settled", || list(&b, &[]).is_empty());
}

#[test]
fn what_cannot_be_restored_is_refused_and_nothing_changes() {
    let dir = tempfile::tempdir().unwrap();
    let schema =
        format!("{SCHEMA} INSERT INTO later VALUES('k', 0); INSERT INTO orders VALUES(3, 'three', 0);");
    let first = "INSERT INTO person VALUES('p', 'p@x', 'P'); UPDATE later SET v = 'of a';
                 UPDATE orders SET item = 'of a' WHERE id = 3";
    let second = "INSERT INTO person VALUES('q', 'p@x', 'P'); UPDATE later SET v = 'of b';
                  UPDATE orders SET item = 'of b' WHERE id = 3";
    let (a, b) = apart(dir.path(), &schema, first, second);
    // The row inserted first stays; the other had to go.
    assert_eq!(ask(&b, "SELECT group_concat(id) FROM person"), "p");
    let unique = only(&b, "person");
    assert_eq!((&unique["kind"], &unique["key"]), (&json!("unique"), &json!(["q"])));
    let before = crate::support::dump(&b.file("app.db"));
    let text = refused(&conflicts(&b, &["restore", "app.db", unique["id"].as_str().unwrap()]));
    assert!(text.contains("another row stands in the way") && text.contains("person."), "{text}");
    assert!(text.contains("nothing was changed"), "{text}");
    assert_eq!(crate::support::dump(&b.file("app.db")), before);
    let gone = only(&b, "later")["id"].as_str().unwrap().to_owned();
    for node in [&a, &b] {
        node.exec("app.db", "DROP TABLE later; DELETE FROM orders WHERE id = 3");
    }
    let text = refused(&conflicts(&b, &["restore", "app.db", &gone]));
    assert!(text.contains("table \"later\" does not exist any more"), "{text}");
    let column = only(&b, "orders")["id"].as_str().unwrap().to_owned();
    let text = refused(&conflicts(&b, &["restore", "app.db", &column]));
    assert!(text.contains("was deleted since: insert it first"), "{text}");
    let text = refused(&conflicts(&b, &["show", "app.db", "ffffffffffff"]));
    assert!(text.contains("no conflict that is kept has an id that begins with"), "{text}");
    assert!(refused(&conflicts(&b, &["show", "app.db", ""])).contains("give more of it"));
    // The way is free: it goes.
    b.exec("app.db", "DELETE FROM person");
    says(&conflicts(&b, &["restore", "app.db", unique["id"].as_str().unwrap()]));
    b.sync();
    wait_equal(&[&a, &b], "app.db");
    assert_eq!(ask(&a, "SELECT id || mail || nick FROM person"), "qp@xP");
}

#[test]
fn old_and_too_many_conflicts_go_on_every_node() {
    let dir = tempfile::tempdir().unwrap();
    let rows = (0..9).map(|i| format!("INSERT INTO later VALUES('k{i}', 0);")).collect::<String>();
    let (mut a, b) = apart(
        dir.path(),
        &format!("{SCHEMA}{rows}"),
        "UPDATE later SET v = 'of a'",
        "UPDATE later SET v = 'of b'",
    );
    assert_eq!(list(&b, &[]).len(), 9);
    a.stop();
    a.extra = vec!["--conflicts-max".into(), "4".into()];
    a.start(None);
    for node in [&a, &b] {
        wait_for("only the newest stay", || list(node, &[]).len() == 4);
    }
    let metrics = |n: &Node| ureq::get(format!("http://{}/metrics", n.addresses[2])).call().unwrap();
    wait_for("the metric counts them", || {
        let text = metrics(&a).body_mut().read_to_string().unwrap();
        text.contains("litemesh_db_conflicts_pruned_total{node=\"a\",db=\"app\"} 5\n")
    });
    a.stop();
    a.extra = vec!["--conflicts-age".into(), "1ms".into()];
    a.start(None);
    for node in [&a, &b] {
        wait_for("none stays", || {
            says(&conflicts(node, &["list", "app.db"])).contains("no conflicts are kept")
        });
    }
}

#[test]
fn rows_merged_as_a_whole_are_not_mixed_on_any_node() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (Node::new(dir.path(), "a", &["app.db"]), Node::new(dir.path(), "b", &["app.db"]));
    a.exec("app.db", SCHEMA);
    a.extra = vec!["--whole-row".into(), "ORD*".into()];
    a.start(None);
    b.start(Some(&a.token()));
    let whole = |n: &Node| n.status()["databases"][0]["whole_row_tables"] == json!(["orders"]);
    wait_for("both know", || whole(&a) && whole(&b));
    b.stop();
    a.exec("app.db", "UPDATE orders SET item = 'of a' WHERE id = 1");
    std::thread::sleep(std::time::Duration::from_millis(5));
    b.exec("app.db", "UPDATE orders SET n = 7 WHERE id = 1");
    b.start(None);
    a.sync();
    b.sync();
    wait_equal(&[&a, &b], "app.db");
    assert_eq!(ask(&a, "SELECT item || n FROM orders"), "first7", "b's row stays, with all its columns");
    wait_for("what a wrote is kept", || list(&b, &[]).len() == 1);
    assert_eq!(only(&b, "orders")["lost"]["item"], "of a");
    // The other node takes it back.
    b.stop();
    b.extra = vec!["--by-column".into(), "orders".into()];
    b.start(None);
    let none = |n: &Node| n.status()["databases"][0]["whole_row_tables"] == json!([]);
    wait_for("both know", || none(&a) && none(&b));
}
