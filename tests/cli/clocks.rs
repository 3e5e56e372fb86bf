//! A node whose clock is an hour ahead: nobody waits while others are there to tell; what it dated alone waits, and
//! `repair --restamp` frees it.

use crate::support::{Node, wait_equal, wait_for};

const SCHEMA: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t VALUES(0, 'adopted')";
const HOUR_MS: &str = "3600000";

/// A write by an application on a host whose clock is an hour ahead.
fn write_an_hour_ahead(node: &Node, sql: &str) {
    node.exec(
        "app.db",
        &format!("BEGIN IMMEDIATE; {sql}; UPDATE __litemesh_log SET ms = ms + 1.0 / 24; COMMIT"),
    );
}

fn has(node: &Node, row: &str) -> bool {
    node.app("app.db").prepare("SELECT 1 FROM t WHERE v = ?1").unwrap().exists([row]).unwrap()
}

fn warns(node: &Node, parts: &[&str]) -> bool {
    let warnings = node.status()["warnings"].to_string();
    parts.iter().all(|p| warnings.contains(p))
}

#[test]
fn a_clock_an_hour_ahead_is_told_moves_nobody_and_what_it_dated_alone_is_freed() {
    let dir = tempfile::tempdir().unwrap();
    let [mut a, mut b, mut c] = ["a", "b", "c"].map(|n| Node::new(dir.path(), n, &["app.db"]));
    a.exec("app.db", SCHEMA);
    a.start(None);
    b.start(Some(&a.token()));
    c.start(Some(&a.token()));
    c.stop();
    c.variables = vec![("LITEMESH_TEST_CLOCK_OFFSET_MS".to_owned(), HOUR_MS.to_owned())];
    c.start(None);
    wait_for("c says it of itself", || warns(&c, &["node c (this node) is 3600 s ahead of", "3 clocks"]));
    wait_for("a says whose clock is wrong", || warns(&a, &["the clock of node c is 3600 s ahead of"]));
    assert!(!warns(&a, &["(this node)"]));
    write_an_hour_ahead(&c, "INSERT INTO t VALUES(1, 'from c')");
    wait_equal(&[&a, &b, &c], "app.db");
    a.exec("app.db", "UPDATE t SET v = 'from a' WHERE id = 1");
    wait_for("a's later write is later", || has(&b, "from a") && has(&c, "from a"));

    // Alone, c has only its own clock to go by.
    a.stop();
    b.stop();
    wait_for("c hears nobody", || c.status()["clocks"] == 1);
    write_an_hour_ahead(&c, "INSERT INTO t VALUES(2, 'alone'); DELETE FROM t WHERE id = 0");
    wait_for("it is absorbed", || c.status()["databases"][0]["commits_published"].as_u64() >= Some(2));
    c.stop();
    c.variables.clear();
    c.start(None);
    a.start(None);
    b.start(None);
    let told = |n: &Node| n.status()["databases"][0]["stopped"].to_string();
    wait_for("it waits at a, which says why and what helps", || {
        told(&a).contains("ahead of the mesh's clock") && told(&a).contains("repair --restamp")
    });
    assert!(warns(&c, &["dated 3"]) && warns(&c, &["litemesh repair --restamp app"]), "{}", c.status());
    assert!(!has(&a, "alone") && has(&c, "alone"));
    let output = c.run(&["repair", "app", "--restamp"]);
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success() && text.contains("2 rows that were dated up to 3"), "{text}");
    wait_equal(&[&a, &b, &c], "app.db");
    assert!(has(&a, "alone") && !has(&b, "adopted"));
    for node in [&a, &b, &c] {
        wait_for("nothing stands still", || {
            told(node) == "[]" && node.status()["warnings"] == serde_json::json!([])
        });
    }
    let output = c.run(&["repair", "--restamp"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("nothing was changed"), "{text}");
    // The state directory knows the new site.
    c.stop();
    c.start(None);
    assert!(!c.log.lock().unwrap().iter().any(|l| l.contains("new site")), "it is the same file");
    c.exec("app.db", "UPDATE t SET v = 'last' WHERE id = 2");
    wait_equal(&[&a, &b, &c], "app.db");
    assert_eq!(c.run(&["verify"]).status.code(), Some(0));
}
