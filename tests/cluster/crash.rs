//! Nodes and servers are killed at any moment, and all is equal again by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{Node, pair, wait_equal, wait_for};

const SCHEMA: &str = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, n INTEGER)";

/// An application that inserts until it is told to stop; it counts what was acknowledged and never sees an error.
fn application(node: &Node, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<i64> {
    let (app, name) = (node.app("app.db"), node.name.clone());
    std::thread::spawn(move || {
        let mut n = 0;
        while !stop.load(Ordering::Relaxed) {
            app.execute("INSERT INTO t VALUES(?1 || '-' || ?2, ?2)", (&name, n))
                .expect("a writer never fails because of us");
            n += 1;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        n
    })
}

fn count(node: &Node) -> i64 {
    node.app("app.db").query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap()
}

#[test]
fn killed_nodes_and_servers_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), SCHEMA);
    let stop = Arc::new(AtomicBool::new(false));
    let writers = [application(&a, stop.clone()), application(&b, stop.clone())];
    for round in 0..3 {
        let seen = count(&b);
        wait_for("some rows", || count(&b) > seen + 100);
        match round {
            0 => {
                b.kill();
                let seen = count(&a);
                wait_for("a goes on alone", || count(&a) > seen + 100);
                b.start(None);
            }
            1 => {
                let pid = rustix::process::Pid::from_raw(a.server_pid() as i32).unwrap();
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            }
            _ => {
                a.kill();
                b.kill();
                a.start(None);
                b.start(None);
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    let acknowledged: i64 = writers.into_iter().map(|w| w.join().unwrap()).sum();
    wait_for("every acknowledged row is on both", || count(&a) == acknowledged && count(&b) == acknowledged);
    wait_equal(&[&a, &b], "app.db");
    for node in [&a, &b] {
        let ok: String = node.app("app.db").query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
        assert_eq!(ok, "ok");
    }
}

#[test]
fn writes_made_while_a_node_is_down_arrive_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), SCHEMA);
    let mut c = Node::new(dir.path(), "c", &["app.db"]);
    c.start(Some(&a.token()));
    a.exec("app.db", "INSERT INTO t VALUES('before', 1)");
    a.sync();
    b.stop();
    a.exec("app.db", "INSERT INTO t VALUES('a while b is down', 1); DELETE FROM t WHERE id = 'before'");
    b.exec("app.db", "INSERT INTO t VALUES('b while it is down', 1)");
    c.exec("app.db", "INSERT INTO t VALUES('c while b is down', 1)");
    c.sync();
    // b gets c's rows although c is gone: from whoever has them.
    c.kill();
    b.start(None);
    wait_for("b has everything", || count(&b) == 3);
    wait_equal(&[&a, &b], "app.db");
    a.kill();
    b.exec("app.db", "UPDATE t SET n = 5 WHERE id = 'c while b is down'");
    c.start(None);
    wait_equal(&[&b, &c], "app.db");
    a.start(None);
    wait_equal(&[&a, &b, &c], "app.db");
    assert_eq!(count(&a), 3);
}
