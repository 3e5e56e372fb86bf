//! `litemesh watch`, as a program behind a pipe reads it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Node, litemesh, pair, wait_for};

const SCHEMA: &str =
    "CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT); CREATE TABLE u(id TEXT PRIMARY KEY, n INT)";

/// What a watch that ends by itself prints.
fn once(node: &Node, args: &[&str]) -> Vec<Value> {
    let output = node.run(&[&["watch", "app", "--once"], args].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn brief(changes: &[Value]) -> Vec<String> {
    let word = |c: &Value, name: &str| c[name].as_str().unwrap().to_owned();
    changes.iter().map(|c| format!("{} {} {}", word(c, "op"), word(c, "table"), c["key"]["id"])).collect()
}

#[test]
fn tells_changes_of_all_nodes_from_any_cursor_on() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), SCHEMA);
    b.exec("app.db", "INSERT INTO t VALUES(1, 'one'), (2, 'two'); INSERT INTO u VALUES('x', 1)");
    b.sync();
    a.exec("app.db", "UPDATE t SET v = 'uno' WHERE id = 1; DELETE FROM t WHERE id = 2");
    a.sync();
    for node in [&a, &b] {
        let all = once(node, &["--since", "0"]);
        let mut told = brief(&all);
        told.sort();
        assert_eq!(told, ["delete t 2", "insert u \"x\"", "update t 1"], "on {}", node.name);
        let update = all.iter().find(|c| c["op"] == "update").unwrap();
        assert_eq!(
            (&update["new"], &update["changed"], &update["node"]),
            (&json!({"id": 1, "v": "uno"}), &json!(["v"]), &json!("a"))
        );
        let (first, rest) = all.split_first().unwrap();
        let after = once(node, &["--since", first["cursor"].as_str().unwrap()]);
        assert_eq!(after, rest);
        assert_eq!(brief(&once(node, &["u", "--since", "0"])), ["insert u \"x\""]);
        assert!(once(node, &[]).is_empty(), "from now on: nothing yet");
    }
    for (args, why) in [
        (&["watch", "other"][..], "does not replicate other"),
        (&["watch", "app", "nothing", "--since", "0"], "no table \"nothing\" is replicated"),
        (&["watch", "app", "--since", "yesterday"], "is no cursor"),
    ] {
        let output = a.run(args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(why), "{text}");
    }
}

#[test]
fn a_file_that_went_back_is_told_without_what_was_told_before() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), SCHEMA);
    a.exec("app.db", "INSERT INTO t VALUES(1, 'one'), (2, 'two')");
    a.sync();
    assert_eq!(once(&a, &["--since", "0", "--resume", "kept"]).len(), 2);
    a.exec("app.db", &format!("VACUUM INTO '{}'", a.file("backup.db").display()));
    a.exec("app.db", "INSERT INTO t VALUES(3, 'three')");
    b.exec("app.db", "INSERT INTO u VALUES('b', 1)");
    a.sync();
    b.sync();
    assert_eq!(once(&a, &["--resume", "kept"]).len(), 2);
    let other = a.run(&["watch", "app", "t", "--resume", "kept"]);
    assert!(String::from_utf8_lossy(&other.stderr).contains("is about another watch"));
    a.stop();
    for suffix in ["-wal", "-shm"] {
        drop(std::fs::remove_file(a.file(&format!("app.db{suffix}"))));
    }
    std::fs::copy(a.file("backup.db"), a.file("app.db")).unwrap();
    a.exec("app.db", "INSERT INTO t VALUES(4, 'four')");
    a.start(None);
    wait_for("the mesh gives its rows back", || a.text("app.db", "SELECT count(*) || '' FROM t") == "4");
    // All that it was told before is covered by what the cursor holds; what is new is told.
    let told = brief(&once(&a, &["--resume", "kept"]));
    assert_eq!(told, ["insert t 4"]);
}

/// A watch that runs, and the lines it has printed.
struct Watch {
    process: Child,
    lines: Arc<Mutex<Vec<Value>>>,
}

impl Watch {
    fn start(node: &Node, lines: &Arc<Mutex<Vec<Value>>>) -> Self {
        let mut process = litemesh()
            .current_dir(&node.home)
            .args(["watch", "app", "t", "--since", "0", "--resume", "kept", "--state-dir"])
            .arg(node.state_dir())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (out, sink) = (process.stdout.take().unwrap(), lines.clone());
        std::thread::spawn(move || {
            // A kill may cut the last line short: it was not told then.
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                sink.lock().unwrap().extend(serde_json::from_str::<Value>(&line).ok());
            }
        });
        Self { process, lines: lines.clone() }
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

#[test]
fn killed_at_any_moment_it_goes_on_and_misses_nothing() {
    const ROWS: i64 = 600;
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), SCHEMA);
    let lines = Arc::default();
    let mut watch = Watch::start(&a, &lines);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let app = b.app("app.db");
            for i in 1..=ROWS {
                app.execute("INSERT INTO t VALUES(?1, 'x')", [i]).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        for round in 0..6 {
            std::thread::sleep(Duration::from_millis(350));
            if round == 3 {
                // It waits for the node.
                a.kill();
                a.start(None);
            } else {
                watch.kill();
                watch = Watch::start(&a, &lines);
            }
        }
        writer.join().unwrap();
    });
    let count = |lines: &[Value]| {
        lines
            .iter()
            .map(|c| c["key"]["id"].as_i64().unwrap())
            .collect::<std::collections::BTreeSet<_>>()
            .len()
    };
    wait_for("all rows are told", || count(&watch.lines.lock().unwrap()) == ROWS as usize);
    let told = lines.lock().unwrap();
    let mut ids: BTreeMap<i64, &str> = BTreeMap::new();
    for change in told.iter() {
        let id = change["id"].as_str().unwrap();
        assert_eq!(*ids.entry(change["key"]["id"].as_i64().unwrap()).or_insert(id), id, "one id a change");
    }
    assert!(told.len() < ROWS as usize * 2, "{} lines: it begins anew each time", told.len());
    drop(told);
    watch.kill();
}
