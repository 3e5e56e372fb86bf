//! `sync` and `token`: who has everything, who lags, who does not count.

use rustix::process::{Pid, Signal, kill_process};

use crate::refusal::processes;
use crate::support::{Node, pair, wait_equal, wait_for};

const SCHEMA: &str = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)";

fn signal(node: &Node, signal: Signal) {
    kill_process(Pid::from_child(node.process.as_ref().unwrap()), signal).unwrap();
}

fn sync(node: &Node, timeout: &str) -> (Option<i32>, String) {
    let output = node.run(&["sync", "--timeout", timeout]);
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[test]
fn laggards_are_named_and_the_dead_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), SCHEMA);
    a.exec("app.db", "INSERT INTO t VALUES('one', 1)");
    let (code, text) = sync(&a, "60s");
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("1 other node has everything"), "{text}");
    assert_eq!(b.app("app.db").query_row("SELECT count(*) FROM t", [], |r| r.get(0)), Ok(1));

    signal(&b, Signal::STOP);
    a.exec("app.db", "INSERT INTO t VALUES('two', 2)");
    let (code, text) = sync(&a, "1s");
    signal(&b, Signal::CONT);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("node b") && text.contains("app"), "the laggard is named: {text}");
    assert_eq!(sync(&a, "80s").0, Some(0), "it goes on");
    wait_equal(&[&a, &b], "app.db");

    b.kill();
    wait_for("its server ends with it", || processes(b.home.to_str().unwrap()).is_empty());
    a.exec("app.db", "INSERT INTO t VALUES('three', 3)");
    let (code, text) = sync(&a, "80s");
    assert_eq!(code, Some(0), "a node that is dead is waited for no longer than it counts as live: {text}");
    b.start(None);
    wait_equal(&[&a, &b], "app.db");
}

#[test]
fn an_unknown_database_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    a.exec("app.db", SCHEMA);
    a.start(None);
    let output = a.run(&["sync", "other"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("other"), "{text}");
}

#[test]
fn a_third_node_joins_with_the_token_that_is_printed() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), SCHEMA);
    let token = || String::from_utf8(b.run(&["token"]).stdout).unwrap().trim().to_owned();
    wait_for("b knows both addresses", || {
        let token = token();
        [&a, &b].iter().all(|n| token.contains(&n.addresses[0].to_string()))
    });
    let token = token();
    assert!(token.starts_with("lm1-") && !token.contains(char::is_whitespace), "one line, nothing else");
    let mut c = Node::new(dir.path(), "c", &["app.db"]);
    // From a file, with the first address of the token out of order.
    b.stop();
    std::fs::write(c.file("token"), format!("{token}\n")).unwrap();
    c.extra = vec!["--join-file".into(), "token".into()];
    c.start(None);
    c.exec("app.db", "INSERT INTO t VALUES('from c', 1)");
    wait_equal(&[&a, &c], "app.db");
    b.start(None);
    wait_equal(&[&a, &b, &c], "app.db");
    let count: i64 = b.app("app.db").query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap();
    assert_eq!(count, 1);
}
