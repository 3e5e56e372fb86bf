//! A node that was away makes up for what it missed: from the log of the node that wrote it, or else from anybody's rows.

use std::time::Duration;

use crate::support::{Node, pair, wait_equal, wait_for};

const SCHEMA: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, who TEXT, n BLOB)";

/// Transactions of 50 rows, each a commit of its own, as far as absorbing keeps up.
fn write(node: &Node, transactions: u64) {
    let app = node.app("app.db");
    for _ in 0..transactions {
        let sql = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 50)
                   INSERT INTO t(who, n) SELECT ?1, randomblob(200) FROM c";
        app.execute(sql, [&node.name]).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn number(node: &Node, field: &str) -> u64 {
    node.status()["databases"][0][field].as_u64().unwrap_or(0)
}

#[test]
fn a_node_that_was_away_reads_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), SCHEMA);
    wait_for("a's log is there", || {
        a.exec("app.db", "INSERT INTO t(who) VALUES('first')");
        a.status()["fabric"]["log_acked"].as_u64() > Some(0)
    });
    wait_equal(&[&a, &b], "app.db");
    b.kill();
    write(&a, 300);
    wait_for("the log has it", || a.status()["fabric"]["log_unacked"] == 0);
    b.start(None);
    wait_equal(&[&a, &b], "app.db");
    wait_for("told: from the log", || number(&b, "logged_pieces") > 0);
    wait_for("nothing is missing", || b.status()["databases"][0]["catching_up"].is_null());
    assert_eq!(number(&b, "peer_syncs"), 0, "the log was enough");

    // Killed again and again while it catches up, it goes on from where it was.
    b.kill();
    write(&a, 300);
    for pause_ms in [0, 10, 20, 40, 80, 160] {
        b.start(None);
        std::thread::sleep(Duration::from_millis(pause_ms));
        b.kill();
    }
    b.start(None);
    wait_equal(&[&a, &b], "app.db");
    let ok: String = b.app("app.db").query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
    assert_eq!(ok, "ok");
    a.stop();
}

#[test]
fn what_no_log_has_comes_from_anybody() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), SCHEMA);
    let mut c = Node::new(dir.path(), "c", &["app.db"]);
    c.start(Some(&a.token()));
    wait_equal(&[&a, &b, &c], "app.db");
    c.kill();
    write(&a, 50);
    wait_equal(&[&a, &b], "app.db");
    a.kill();
    c.start(None);
    wait_equal(&[&b, &c], "app.db");
    wait_for("told: a's log was not there", || number(&c, "peer_syncs") > 0);
    b.stop();
}

#[test]
fn the_minority_that_sees_each_other_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), SCHEMA);
    let mut others: Vec<Node> =
        ["c", "d", "e"].iter().map(|name| Node::new(dir.path(), name, &["app.db"])).collect();
    let token = a.token();
    for node in &mut others {
        node.start(Some(&token));
    }
    wait_equal(&[&a, &b, &others[0], &others[1], &others[2]], "app.db");
    others.iter_mut().for_each(Node::kill);
    write(&a, 20);
    write(&b, 20);
    wait_equal(&[&a, &b], "app.db");
    // Also one that comes back among two of five.
    b.kill();
    write(&a, 20);
    b.start(None);
    wait_equal(&[&a, &b], "app.db");
    for node in &mut others {
        node.start(None);
    }
    wait_equal(&[&a, &b, &others[0], &others[1], &others[2]], "app.db");
}
