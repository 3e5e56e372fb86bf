//! Tables that keep both rows of an id collision, on real nodes.

use serde_json::json;

use crate::support::{Node, dump, pair, wait_equal, wait_for};

const SCHEMA: &str = "CREATE TABLE orders(id INTEGER PRIMARY KEY, who, state);
    CREATE TABLE line(id INTEGER PRIMARY KEY, what, ord INTEGER REFERENCES orders(id));
    INSERT INTO orders VALUES(1, 'first', NULL); INSERT INTO line VALUES(1, 'of first', 1);";
const TREE: &str = "SELECT group_concat(t, ' ') FROM
    (SELECT who || '>' || what AS t FROM orders AS o JOIN line AS l ON l.ord = o.id ORDER BY 1)";

fn order(node: &Node, who: &str) {
    node.exec(
        "app.db",
        &format!(
            "BEGIN; INSERT INTO orders VALUES(5, '{who}', NULL);
             INSERT INTO line VALUES(5, 'a of {who}', 5), (6, 'b of {who}', 5); COMMIT"
        ),
    );
}

#[test]
fn two_nodes_that_were_cut_off_keep_both_rows_and_all_their_children() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), SCHEMA);
    a.sync();
    // One of them says it, later on.
    a.stop();
    a.extra = vec!["--rekey".to_owned(), "*".to_owned()];
    a.start(None);
    a.sync();
    wait_for("both keep both", || {
        [&a, &b].iter().all(|n| n.status()["databases"][0]["moved_rows"] == json!({"line": 0, "orders": 0}))
    });
    b.stop();
    order(&a, "ann");
    a.exec("app.db", "UPDATE orders SET state = 'early' WHERE id = 1");
    order(&b, "bob");
    b.start(None);
    wait_equal(&[&a, &b], "app.db");
    a.sync();
    b.sync();
    let tree = "ann>a of ann ann>b of ann bob>a of bob bob>b of bob first>of first";
    for node in [&a, &b] {
        assert_eq!(node.text("app.db", TREE), tree);
        assert_eq!(
            node.text("app.db", "SELECT who FROM orders WHERE id = 5"),
            "bob",
            "the later one has the id"
        );
        wait_for("status says so", || {
            let status = &node.status()["databases"][0];
            status["moved_rows"] == json!({"line": 2, "orders": 1}) && status["conflicts"] == 0
        });
        let shown = node.run(&["status"]);
        let text = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(text.contains("keeps both rows of an id collision"), "{text}");
    }
    // The moved row is a row like any other, and a node that is set up now has it too.
    b.exec("app.db", "UPDATE orders SET state = 'paid' WHERE who = 'ann'");
    let mut c = Node::new(dir.path(), "c", &["app.db"]);
    c.start(Some(&a.token()));
    c.exec("app.db", "DELETE FROM line WHERE what = 'b of ann'");
    for node in [&b, &c] {
        node.sync();
    }
    wait_equal(&[&a, &b, &c], "app.db");
    assert_eq!(a.text("app.db", "SELECT state FROM orders WHERE who = 'ann'"), "paid");
    assert_eq!(a.text("app.db", TREE), tree.replace(" ann>b of ann", ""));
    let verified = a.run(&["verify", "app"]);
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    // Changed past litemesh on one node, under an id that no program gave out: found, and made right from another.
    let moved = "UPDATE orders SET state = 'forged' WHERE who = 'ann'; UPDATE line SET ord = 1 WHERE what = 'a of ann';";
    let conn = b.app("app.db");
    conn.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false).unwrap();
    conn.execute_batch(moved).unwrap();
    drop(conn);
    let found = a.run(&["verify", "app"]);
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    assert!(!found.status.success() && text.contains("orders") && text.contains("line"), "{text}");
    let repaired = a.run(&["repair", "app", "--from", "a"]);
    assert!(repaired.status.success(), "{}", String::from_utf8_lossy(&repaired.stderr));
    a.sync();
    wait_equal(&[&a, &b, &c], "app.db");
    assert_eq!(a.text("app.db", TREE), tree.replace(" ann>b of ann", ""));
    assert!(!dump(&b.file("app.db")).iter().any(|l| l.contains("forged")));
}
