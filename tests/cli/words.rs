//! What the other commands print: `check`, `conflicts list`, `completions`, `man`, `--version`, `--help`.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::support::{Node, litemesh, pair, wait_equal, wait_for};

fn run(dir: &Path, args: &[&str]) -> Output {
    litemesh().current_dir(dir).args(args).output().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn help_version_completions_and_manual() {
    let dir = Path::new(".");
    let version = run(dir, &["--version"]);
    assert_eq!(out(&version), format!("litemesh {}\n", env!("CARGO_PKG_VERSION")));
    for help in [&["--help"][..], &["help"], &["up", "--help"], &["help", "sync"], &["conflicts", "--help"]] {
        let output = run(dir, help);
        assert!(output.status.success() && out(&output).contains("Usage:"), "{help:?}");
        assert!(output.stderr.is_empty());
        assert!(out(&output).lines().all(|l| l.chars().count() <= 100), "{help:?}");
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = run(dir, &["completions", shell]);
        assert!(output.status.success() && out(&output).contains("litemesh"), "{shell}");
    }
    let manual = out(&run(dir, &["man"]));
    for part in [".TH", "\\-\\-join", "detach", "LITEMESH_"] {
        assert!(manual.contains(part), "{part} is missing in the manual");
    }
    for wrong in [&["up", "--nonsense"][..], &["nonsense"], &["sync", "--timeout", "soon"], &[]] {
        let output = run(dir, wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn check_reads_a_file_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let conn = rusqlite::Connection::open(&path).unwrap();
    conn.execute_batch(
        "CREATE TABLE sound(id TEXT PRIMARY KEY NOT NULL, v);
         CREATE TABLE fragile(id INTEGER PRIMARY KEY AUTOINCREMENT, v); INSERT INTO fragile(v) VALUES(1)",
    )
    .unwrap();
    drop(conn);
    let before = std::fs::read(&path).unwrap();
    let text = run(dir.path(), &["check", "app.db"]);
    assert!(text.status.success());
    assert!(out(&text).contains("fragile") && out(&text).contains("advice"), "{}", out(&text));
    let json = run(dir.path(), &["check", "app.db", "--json"]);
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(report["tables"].as_array().unwrap().len(), 2, "{report}");
    let about = |t: &str| report["findings"].as_array().unwrap().iter().any(|f| f["table"] == t);
    assert!(about("fragile") && !about("sound"), "{report}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let missing = run(dir.path(), &["check", "missing.db"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("missing.db"));
}

#[test]
fn a_write_that_lost_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v TEXT)");
    a.exec("app.db", "INSERT INTO t VALUES('row', 'at first')");
    a.sync();
    let none = litemesh().current_dir(&a.home).args(["conflicts", "list", "app.db"]).output().unwrap();
    assert!(none.status.success() && out(&none).contains("no conflicts"), "{}", out(&none));
    b.stop();
    a.exec("app.db", "UPDATE t SET v = 'as a has it' WHERE id = 'row'");
    b.exec("app.db", "UPDATE t SET v = 'as b has it' WHERE id = 'row'");
    b.start(None);
    wait_equal(&[&a, &b], "app.db");
    let kept: String = a.app("app.db").query_row("SELECT v FROM t", [], |r| r.get(0)).unwrap();
    let lost = if kept == "as a has it" { "as b has it" } else { "as a has it" };
    let listed = |node: &Node| -> Vec<Value> {
        let args = ["conflicts", "list", "app.db", "--json"];
        let output = litemesh().current_dir(&node.home).args(args).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    // The node that merged has it; one that got the merged row has nothing to keep.
    let mut found = Vec::<Value>::new();
    let mut holder = &a;
    wait_for("the loser is kept", || {
        holder = if listed(&a).is_empty() { &b } else { &a };
        found = listed(holder);
        !found.is_empty()
    });
    let other = if holder.name == "a" { &b } else { &a };
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0]["table"], "t");
    assert!(found[0]["lost"].to_string().contains(lost), "{found:?}");
    assert!(found[0]["key"].to_string().contains("row"), "{found:?}");
    let text = litemesh().current_dir(&holder.home).args(["conflicts", "list", "app.db"]).output().unwrap();
    assert!(out(&text).contains(lost) && out(&text).lines().count() == 1, "{}", out(&text));
    wait_for("status counts it", || holder.status()["databases"][0]["conflicts"] == 1);
    let warnings = holder.status()["warnings"].to_string();
    assert!(warnings.contains("litemesh conflicts list"), "{warnings}");
    assert!(listed(other).iter().all(|c| c["id"] == found[0]["id"]), "the same conflict is one entry");
}
