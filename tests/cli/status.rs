//! `status`: every field of the contract says what is so.

use serde_json::Value;

use crate::support::{Node, pair, wait_for};

const SCHEMA: &str = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)";

fn text_status(node: &Node) -> String {
    let output = node.run(&["status"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn settled(status: &Value) -> bool {
    let db = &status["databases"][0];
    let peer = &db["peers"][0];
    db["vector"].as_object().is_some_and(|v| v.len() == 2)
        && peer["caught_up"] == true
        && status["fabric"]["log_unacked"] == 0
        && status["fabric"]["routes"].as_array().is_some_and(|r| r.len() == 1)
}

fn settled_status(node: &Node) -> Value {
    let mut last = Value::Null;
    wait_for("all is told and caught up", || {
        last = node.status();
        settled(&last)
    });
    last
}

#[test]
fn every_field_is_filled() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), SCHEMA);
    a.exec("app.db", "INSERT INTO t VALUES('from a', 1)");
    b.exec("app.db", "INSERT INTO t VALUES('from b', 1)");
    a.sync();
    b.sync();
    let (told, by_b) = (settled_status(&a), settled_status(&b));
    assert_eq!(told["node"], "a");
    assert_eq!(told["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(told["pid"], a.process.as_ref().unwrap().id());
    assert_eq!(told["state_dir"], a.state_dir().to_str().unwrap());
    assert!(told["started_at"].as_str().unwrap().ends_with('Z'), "{told}");
    assert_eq!(told["ready"], true);
    assert_eq!(told["not_ready_because"], serde_json::json!([]));
    assert_eq!(told["warnings"], serde_json::json!([]));
    let fabric = &told["fabric"];
    assert_eq!(fabric["connected"], true);
    assert!(fabric["server_version"].as_str().unwrap().starts_with("2."), "{fabric}");
    let server = format!("/proc/{}/cmdline", fabric["server_pid"]);
    assert!(!cfg!(target_os = "linux") || std::fs::read_to_string(server).unwrap().contains("nats-server"));
    assert_eq!(fabric["server_restarts"], 0);
    assert_eq!(fabric["client_url"], format!("nats://{}", a.addresses[1]));
    assert_eq!(fabric["cluster_listen"], a.addresses[0].to_string());
    assert_eq!(fabric["routes"], serde_json::json!(["b"]));
    let peer = &told["peers"][0];
    assert_eq!(told["peers"].as_array().unwrap().len(), 1);
    assert_eq!((&peer["node"], &peer["live"]), (&"b".into(), &true.into()));
    assert!(peer["last_heard_s"].as_f64().unwrap() < 7.0);
    assert!(peer["clock_offset_ms"].as_f64().unwrap().abs() < 1_000.0);
    assert_eq!(peer["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(peer["databases"], serde_json::json!(["app"]));
    let (db, other) = (&told["databases"][0], &by_b["databases"][0]);
    assert_eq!(db["name"], "app");
    assert_eq!(db["path"], a.file("app.db").to_str().unwrap());
    assert_eq!(db["state"], "ok");
    assert_eq!(db["lineage"], other["lineage"]);
    assert_ne!(db["site"], other["site"]);
    assert_eq!(db["vector"], other["vector"]);
    assert_eq!(db["peers"][0]["site"], other["site"]);
    for (what, least) in [("lsn", 2), ("commits_published", 1), ("rows_published", 1), ("commits_applied", 1)]
    {
        assert!(db[what].as_u64().unwrap() >= least, "{what}: {db}");
    }
    for what in ["pending_commits", "messages_refused", "conflicts", "null_key_rows"] {
        assert_eq!(db[what], 0, "{what}");
    }
    let text = text_status(&a);
    for part in ["node", "ready   yes", "routes: b", "PEER", "DATABASE", "app", "ok"] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    b.stop();
    peer_that_is_away_is_still_listed(&a);
}

fn peer_that_is_away_is_still_listed(a: &Node) {
    wait_for("b is told not to be live", || {
        let status = a.status();
        status["peers"][0]["live"] == false && status["fabric"]["routes"] == serde_json::json!([])
    });
    let status = a.status();
    assert_eq!(status["ready"], true, "a peer that is away does not make this node unready");
    assert_eq!(status["peers"][0]["node"], "b");
    assert!(text_status(a).contains("NO"));
}

#[test]
fn a_member_that_was_never_heard_of_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), SCHEMA);
    a.exec("app.db", "INSERT INTO t VALUES('x', 1)");
    a.sync();
    wait_for("a keeps where b is", || a.status()["peers"][0]["node"] == "b");
    a.stop();
    b.stop();
    a.start(None);
    wait_for("b is listed", || a.status()["peers"][0]["node"] == "b");
    let peer = a.status()["peers"][0].clone();
    assert_eq!((&peer["live"], &peer["last_heard_s"]), (&false.into(), &Value::Null));
}

#[test]
fn without_a_node_it_says_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(dir.path(), "a", &["app.db"]);
    for command in [&["status"][..], &["token"], &["sync"]] {
        let output = node.run(command);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{command:?}: {text}");
        assert!(text.contains(node.state_dir().to_str().unwrap()) && text.contains("litemesh up"), "{text}");
    }
}

#[test]
fn commits_made_before_there_was_a_log_are_not_awaited_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), SCHEMA);
    // Before b's server has its stream: nothing will ever acknowledge it.
    b.exec("app.db", "INSERT INTO t VALUES('early', 1)");
    b.sync();
    let mut n = 0;
    wait_for("later ones are acknowledged", || {
        n += 1;
        b.exec("app.db", &format!("INSERT INTO t VALUES('later {n}', 1)"));
        b.status()["fabric"]["log_acked"].as_u64() >= Some(1)
    });
    wait_for("none is counted as under way", || b.status()["fabric"]["log_unacked"] == 0);
    b.stop();
    a.sync();
}
