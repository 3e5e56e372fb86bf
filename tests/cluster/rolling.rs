//! A rolling restart, as an upgrade is done: one node after the other, while programs write on all of them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use litemesh::core::message::{Hello, Message, WIRE_VERSION, encode};
use litemesh::fabric::accounts::{Accounts, MESH_USER};
use rusqlite::Connection;

use crate::support::{Node, pair, wait_equal, wait_for};

/// Writes until it is told to end; every failure is one too many. Returns how many rows it has inserted.
fn write(conn: &Connection, name: &str, end: &AtomicBool) -> u64 {
    let mut count = 0;
    while !end.load(Ordering::Relaxed) {
        let id = format!("{name}-{count}");
        conn.execute("INSERT INTO t VALUES(?1, 0, ?2)", (&id, name))
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        conn.execute("UPDATE t SET n = n + 1 WHERE id = ?1", [&id]).unwrap_or_else(|e| panic!("{name}: {e}"));
        // A row that all nodes write.
        conn.execute("UPDATE t SET v = ?1 WHERE id = 'shared'", [name])
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        count += 1;
        std::thread::sleep(Duration::from_millis(10));
    }
    count
}

#[test]
fn a_rolling_restart_under_load_fails_no_write_and_loses_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes: Vec<Node> = ["a", "b", "c"].map(|n| Node::new(dir.path(), n, &["app.db"])).into();
    nodes[0].exec(
        "app.db",
        "CREATE TABLE t(id TEXT PRIMARY KEY, n INTEGER, v TEXT); INSERT INTO t VALUES('shared', 0, '')",
    );
    nodes[0].start(None);
    let token = nodes[0].token();
    nodes[1].start(Some(&token));
    nodes[2].start(Some(&token));
    let end = AtomicBool::new(false);
    let apps: Vec<(String, Connection)> = nodes.iter().map(|n| (n.name.clone(), n.app("app.db"))).collect();
    let counts: Vec<u64> = std::thread::scope(|scope| {
        let end = &end;
        let writers: Vec<_> =
            apps.into_iter().map(|(name, app)| scope.spawn(move || write(&app, &name, end))).collect();
        for round in 0..2 {
            for node in &mut nodes {
                std::thread::sleep(Duration::from_millis(500));
                // An upgrade stops a node in good order; a crash of its host does not.
                if round == 0 {
                    node.stop()
                } else {
                    node.kill()
                }
                std::thread::sleep(Duration::from_millis(300));
                node.start(None);
            }
        }
        end.store(true, Ordering::Relaxed);
        writers.into_iter().map(|w| w.join().expect("no write failed")).collect()
    });
    assert!(counts.iter().all(|c| *c > 20), "{counts:?}");
    wait_equal(&nodes.iter().collect::<Vec<_>>(), "app.db");
    for node in &nodes {
        assert_eq!(
            node.text("app.db", "SELECT count(*) || '' FROM t"),
            (counts.iter().sum::<u64>() + 1).to_string()
        );
        assert_eq!(node.text("app.db", "SELECT count(*) || '' FROM t WHERE n <> 1 AND id <> 'shared'"), "0");
        let status = node.status();
        assert_eq!(status["ready"], true);
    }
}

/// A node of a later release, as far as an earlier one can tell: the same subjects, another format.
#[tokio::test(flavor = "multi_thread")]
async fn a_later_release_is_refused_by_name_and_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = tokio::task::block_in_place(|| pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY, v)"));
    let accounts = Accounts::load_or_create(&a.state_dir().join("accounts.json")).unwrap();
    let options = async_nats::ConnectOptions::with_user_and_password(
        MESH_USER.to_owned(),
        accounts.mesh.reveal().to_owned(),
    );
    let client = options.connect(format!("nats://{}", a.addresses[1])).await.unwrap();
    let hello = Message::Hello(Hello { version: "9.0.0".to_owned(), now_ms: 0, dbs: Vec::new() });
    let mut later = encode(&hello).to_vec();
    later[0] = WIRE_VERSION + 1;
    client.publish("lm.b.future", later.into()).await.unwrap();
    client.flush().await.unwrap();
    tokio::task::block_in_place(|| {
        for node in [&a, &b] {
            wait_for("it is said who has to be upgraded", || {
                let log = node.log.lock().unwrap();
                log.iter().any(|l| l.contains("future") && l.contains("upgrade this node"))
            });
            wait_for("it is counted", || node.status()["fabric"]["messages_refused"] == 1);
        }
        a.exec("app.db", "INSERT INTO t VALUES('x', 1)");
        wait_equal(&[&a, &b], "app.db");
    });
}
