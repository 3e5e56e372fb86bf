//! `verify` and `repair`: rows changed behind litemesh's back are found, located and repaired; writers notice nothing.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::Connection;
use rusqlite::config::DbConfig;
use serde_json::Value;

use crate::support::{Node, dump, pair, wait_equal, wait_for};

const SCHEMA: &str = "
    CREATE TABLE t(id INTEGER PRIMARY KEY, v, w);
    CREATE TABLE k(a TEXT COLLATE NOCASE, b BLOB, x, PRIMARY KEY(a, b)) WITHOUT ROWID;
    INSERT INTO t VALUES(1, 'adopted', 1), (2, 'adopted', 2), (3, 'adopted', 3);
    WITH RECURSIVE n(i) AS (SELECT 10 UNION ALL SELECT i + 1 FROM n WHERE i < 9000)
    INSERT INTO t SELECT i, 'row ' || i, i FROM n;";

fn run(node: &Node, args: &[&str]) -> (Option<i32>, String) {
    let output = node.run(args);
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

fn verify(node: &Node) -> Value {
    let output = node.run(&["verify", "app", "--json"]);
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// A connection that fires no triggers.
fn tool(node: &Node) -> Connection {
    let conn = node.app("app.db");
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false).unwrap();
    conn
}

/// Drops our triggers, writes, and puts them back, in one transaction.
fn without_triggers(node: &Node, sql: &str) {
    let conn = node.app("app.db");
    conn.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut list = conn.prepare("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").unwrap();
    let rows = list.query_map([], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
    let triggers: Vec<(String, String)> = rows.map(Result::unwrap).collect();
    triggers.iter().for_each(|(name, _)| conn.execute_batch(&format!("DROP TRIGGER {name}")).unwrap());
    conn.execute_batch(sql).unwrap();
    triggers.iter().for_each(|(_, text)| conn.execute_batch(text).unwrap());
    conn.execute_batch("COMMIT").unwrap();
}

/// Takes our triggers away without a change of the schema's version.
fn robbed_of_triggers(node: &Node) {
    let conn = node.app("app.db");
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, false).unwrap();
    conn.execute_batch("PRAGMA writable_schema = ON; DELETE FROM sqlite_schema WHERE type = 'trigger'")
        .unwrap();
}

fn get(node: &Node, path: &str) -> String {
    let mut answer = ureq::get(format!("http://{}{path}", node.addresses[2])).call().unwrap();
    answer.body_mut().read_to_string().unwrap()
}

fn first_row(node: &Node) -> String {
    let sql = "SELECT group_concat(id || '=' || v || '/' || w, ' ') FROM (SELECT * FROM t WHERE id < 10 ORDER BY id)";
    node.app("app.db").query_row(sql, [], |r| r.get(0)).unwrap()
}

#[test]
fn rows_changed_behind_its_back_are_named_and_repaired_in_the_direction_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), SCHEMA);
    a.exec("app.db", "INSERT INTO k VALUES('Key', x'01', 'x'), ('gone', x'02', 'y')");
    a.sync();
    let (code, text) = run(&a, &["verify"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("the same here and on b"), "{text}");

    without_triggers(&b, "UPDATE t SET w = 99 WHERE id = 2; DELETE FROM t WHERE id = 3");
    // Until the node has seen that the schema changed: else it puts back what is taken away below.
    b.sync();
    let writer = tool(&a);
    writer
        .execute_batch("INSERT INTO t VALUES(4, 'tool', 4); UPDATE k SET a = 'KEY' WHERE a = 'key'")
        .unwrap();
    robbed_of_triggers(&b);
    b.exec("app.db", "DELETE FROM k WHERE a = 'gone'");

    let (code, text) = run(&a, &["verify", "app"]);
    assert_eq!(code, Some(1), "{text}");
    for part in [
        "5 differ",
        "t [2]: w differ on a, b",
        "t [3]: missing on b",
        "t [4]: missing on b",
        r#"k ["gone",{"blob":"02"}]: missing on b"#,
        "its key differ on a, b",
        "litemesh repair app --from a",
        "litemesh repair app --from b",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    // Seen from the other side, and in status there.
    let found = verify(&b);
    assert_eq!((&found[0]["divergent_rows"], &found[0]["differences"][0]["table"]), (&5.into(), &"k".into()));
    wait_for("the alarm is in both nodes' status", || {
        [&a, &b].iter().all(|n| {
            let status = n.status();
            let told = status["warnings"].to_string().contains("5 rows were not the same");
            told && status["databases"][0]["verified"]["divergent_rows"] == 5
        })
    });
    repairs_follow(&a, &b);
}

fn repairs_follow(a: &Node, b: &Node) {
    let before = dump(&a.file("app.db"));
    let (code, text) = run(b, &["repair", "app", "--from", "a", "--dry-run"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("5 rows would become what node a has; nothing was changed"), "{text}");
    assert_eq!(before, dump(&a.file("app.db")));
    // One table from b, asked for on a; the rest from a, asked for on b.
    let (code, text) = run(a, &["repair", "app", "--from", "b", "--table", "T"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("3 rows are now what node b has"), "{text}");
    assert!(text.contains("t [2]: written") && text.contains("t [3]: deleted"), "{text}");
    for node in [a, b] {
        wait_for("b's rows are there", || first_row(node) == "1=adopted/1 2=adopted/99");
    }
    let (code, text) = run(b, &["repair", "app", "--from", "a"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("2 rows are now what node a has"), "{text}");
    wait_equal(&[a, b], "app.db");
    let key: String =
        b.app("app.db").query_row("SELECT min(a) FROM k WHERE b = x'01'", [], |r| r.get(0)).unwrap();
    assert_eq!(key, "KEY");
    b.exec("app.db", "INSERT INTO k VALUES('the triggers are back', x'', 1)");
    b.sync();
    wait_equal(&[a, b], "app.db");
    for node in [a, b] {
        assert_eq!(run(node, &["verify"]).0, Some(0));
        wait_for("the alarm is over", || node.status()["databases"][0]["verified"]["divergent_rows"] == 0);
    }
    let (code, text) = run(a, &["repair", "app", "--from", "b"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("nothing to repair"), "{text}");
}

#[test]
fn wrong_questions_and_absent_nodes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), SCHEMA);
    for (args, part) in [
        (&["verify", "other"][..], "does not replicate other"),
        (&["repair", "app", "--from", "c"], "node c is not there"),
        (&["repair", "app", "--from", "b", "--table", "none"], "there is no table \"none\""),
        (&["repair", "--from", "a"], "name the database"),
    ] {
        let (code, text) = run(&a, args);
        assert_eq!(code, Some(1), "{args:?}: {text}");
        assert!(text.contains(part), "{args:?}: {text}");
    }
    b.exec("app.db", "CREATE TABLE only_here(id INTEGER PRIMARY KEY)");
    wait_for("the table is known", || verify(&a)[0]["not_compared"].to_string().contains("only_here"));
    b.stop();
    wait_for("b is named as not compared", || {
        let (_, text) = run(&a, &["verify"]);
        text.contains("not compared: node b is not there")
    });
    let (code, text) = run(&a, &["repair", "app", "--from", "a"]);
    assert!(code == Some(1) && text.contains("no other node"), "{text}");
}

/// Writes rows that nobody else writes, and counts on a row that both write, until told to stop.
fn writer(node: &Node, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let (app, name, stop) = (node.app("app.db"), node.name.clone(), stop.clone());
    std::thread::spawn(move || {
        let mut n = 0;
        while !stop.load(Ordering::Relaxed) {
            let id = 10 + n * 37 % 8_900;
            app.execute("UPDATE t SET v = ?1 || ?2 WHERE id = ?3", (&name, n, id)).unwrap();
            app.execute("INSERT OR REPLACE INTO k VALUES(?1, x'03', ?2)", (&name, n)).unwrap();
            n += 1;
            // A row that is written shows its peer's values again, or its own: most are still different when that is told.
            std::thread::sleep(std::time::Duration::from_millis(15));
        }
    })
}

#[test]
fn while_both_write_only_what_is_different_is_told_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), SCHEMA);
    let stop = Arc::new(AtomicBool::new(false));
    let writers = [writer(&a, &stop), writer(&b, &stop)];
    for node in [&a, &b, &a] {
        let found = verify(node);
        assert_eq!(found[0]["divergent_rows"], 0, "{found}");
    }
    tool(&b).execute_batch("UPDATE t SET w = -w").unwrap();
    let found = verify(&a);
    // Rows that both write all the time may differ in what was written behind our back only.
    assert!(found[0]["divergent_rows"].as_u64().unwrap() > 1_000, "{}", found[0]["divergent_rows"]);
    assert_eq!(found[0]["differences"].as_array().unwrap().len(), 1_000);

    // The node that repairs is killed on the way; what it has repaired stays so, and the rest is repaired later.
    let mut command = crate::support::litemesh();
    command.args(["repair", "app", "--from", "a", "--state-dir"]).arg(b.state_dir());
    let repairing = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let negative = |node: &Node| -> i64 {
        let sql = "SELECT count(*) FROM t WHERE w < 0";
        node.app("app.db").query_row(sql, [], |r| r.get(0)).unwrap()
    };
    wait_for("a part is repaired", || negative(&b) < 8_900);
    a.kill();
    a.start(None);
    wait_for("a sees b again", || a.status()["peers"][0]["live"] == true);
    // Whoever asked is told, once the new process does not know of it, or nothing was left to be done.
    drop(repairing);
    // All of them in one go: rows that are being written at that moment may be left.
    let (code, text) = run(&b, &["repair", "app", "--from", "a"]);
    assert!(code == Some(0) || text.contains("are left as they are"), "{text}");
    assert!(negative(&b) < 500, "{text}");
    stop.store(true, Ordering::Relaxed);
    writers.into_iter().for_each(|w| w.join().unwrap());
    a.sync();
    b.sync();
    let (code, text) = run(&b, &["repair", "app", "--from", "a"]);
    assert_eq!(code, Some(0), "{text}");
    wait_equal(&[&a, &b], "app.db");
    assert_eq!((negative(&a), negative(&b)), (0, 0));
    assert_eq!(run(&a, &["verify"]).0, Some(0));
}

#[test]
fn rows_are_compared_regularly_and_a_third_node_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (Node::new(dir.path(), "a", &["app.db"]), Node::new(dir.path(), "b", &["app.db"]));
    let mut c = Node::new(dir.path(), "c", &["app.db"]);
    for node in [&mut a, &mut b, &mut c] {
        node.extra = ["--verify-every", "1s"].map(str::to_owned).to_vec();
    }
    a.exec("app.db", SCHEMA);
    a.start(None);
    b.start(Some(&a.token()));
    c.start(Some(&a.token()));
    let verified = |n: &Node| n.status()["databases"][0]["verified"].clone();
    wait_for("all three have been compared", || {
        [&a, &b, &c].iter().all(|n| verified(n)["nodes"].as_array().is_some_and(|l| l.len() == 2))
    });
    tool(&c).execute_batch("UPDATE t SET v = 'c' WHERE id = 1").unwrap();
    wait_for("found by itself, and told on all nodes", || {
        [&a, &b, &c].iter().all(|n| verified(n)["divergent_rows"] == 1)
    });
    assert!(c.log.lock().unwrap().iter().any(|l| l.contains("1 rows are not the same on")));
    let (_, text) = run(&a, &["verify"]);
    assert!(text.contains("t [1]: v differ on c"), "{text}");
    let metrics = get(&b, "/metrics");
    assert!(metrics.contains("litemesh_divergent_rows{node=\"b\",db=\"app\"} 1"), "{metrics}");
    assert_eq!(run(&c, &["repair", "app", "--from", "b"]).0, Some(0));
    wait_for("the alarm ends by itself", || [&a, &b, &c].iter().all(|n| verified(n)["divergent_rows"] == 0));
    wait_equal(&[&a, &b, &c], "app.db");
}
