//! A Python program with a busy timeout, as most are: it never meets an error while its node replicates.

use std::process::{Command, Stdio};

use crate::support::{pair, wait_equal};

const PROGRAM: &str = r#"
import sqlite3, sys
name, count = sys.argv[1], int(sys.argv[2])
conn = sqlite3.connect("app.db", timeout=10)
for i in range(count):
    with conn:
        conn.execute("INSERT INTO t VALUES(?, ?, ?)", (f"{name}-{i}", i, "x" * (i % 300)))
    if i % 3 == 0:
        with conn:
            conn.execute("UPDATE t SET n = n + 1 WHERE id = ?", (f"{name}-{i // 2}",))
    if i % 10 == 9:
        with conn:
            conn.execute("DELETE FROM t WHERE id = ?", (f"{name}-{i - 5}",))
    if i % 50 == 0:
        conn.execute("SELECT count(*), max(n) FROM t").fetchone()
print("wrote", count)
"#;

#[test]
fn python_writes_on_both_nodes_without_an_error() {
    const COUNT: usize = 1_500;
    let python = Command::new("python3").args(["-c", "import sqlite3"]).output();
    if !python.is_ok_and(|p| p.status.success()) {
        eprintln!("skipped: there is no python3 with its sqlite3 module");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, n INTEGER, v TEXT)");
    let writer = |node: &crate::support::Node| {
        Command::new("python3")
            .current_dir(&node.home)
            .args(["-c", PROGRAM, &node.name, &COUNT.to_string()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let writers = [writer(&a), writer(&b)];
    // In the middle of it, a node is killed and comes back.
    let half = || b.app("app.db").query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0)).unwrap();
    crate::support::wait_for("they write", || half() > 300);
    b.kill();
    b.start(None);
    for child in writers {
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && errors.is_empty(), "a writer met an error: {errors}");
    }
    wait_equal(&[&a, &b], "app.db");
    let count: i64 = a.app("app.db").query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap();
    assert_eq!(count, 2 * (COUNT - COUNT / 10) as i64, "every row that was written, less those deleted");
}
