//! Changing the mesh key: while all goes on, for those who are there, and for those who were away.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::refusal::up_refused;
use crate::support::{Node, wait_equal, wait_for};

#[test]
fn the_key_is_changed_while_all_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = ["a", "b", "c"].map(|name| Node::new(dir.path(), name, &["app.db"]));
    nodes[0].exec("app.db", "CREATE TABLE t(node TEXT, n INTEGER, PRIMARY KEY(node, n)) WITHOUT ROWID");
    nodes[0].start(None);
    let old = nodes[0].token();
    nodes[1].start(Some(&old));
    nodes[2].start(Some(&old));
    let [mut a, mut b, mut c] = nodes;
    wait_for("all know each other", || {
        [&a, &b].iter().all(|n| n.status()["peers"].as_array().unwrap().len() == 2)
    });
    c.stop();
    wait_for("c is away", || {
        [&a, &b].iter().all(|n| n.status()["fabric"]["routes"].as_array().unwrap().len() == 1)
    });

    let on = Arc::new(AtomicBool::new(true));
    let writers: Vec<_> = [&a, &b]
        .map(|node| {
            let (conn, name, on) = (node.app("app.db"), node.name.clone(), on.clone());
            std::thread::spawn(move || {
                let mut n = 0;
                while on.load(Ordering::Relaxed) {
                    n += 1;
                    conn.execute("INSERT INTO t VALUES(?1, ?2)", (&name, n)).expect("no write fails");
                    std::thread::sleep(Duration::from_millis(5));
                }
            })
        })
        .into();
    let rotated = a.run(&["token", "--rotate"]);
    let (out, err) = (String::from_utf8_lossy(&rotated.stdout), String::from_utf8_lossy(&rotated.stderr));
    assert!(rotated.status.success(), "{err}{}", a.log.lock().unwrap().join("\n"));
    let new = out.trim().to_owned();
    assert!(new.starts_with("lm1-") && new.split('@').next() != old.split('@').next(), "another key");
    assert!(err.contains("the new key yet: c.") && !err.contains(new.split('@').next().unwrap()), "{err}");
    assert_eq!(String::from_utf8_lossy(&b.run(&["token"]).stdout).split('@').next(), new.split('@').next());
    a.sync();
    b.sync();
    on.store(false, Ordering::Relaxed);
    writers.into_iter().for_each(|w| w.join().unwrap());
    a.sync();
    b.sync();
    wait_equal(&[&a, &b], "app.db");
    for node in [&a, &b] {
        assert_eq!(node.status()["fabric"]["server_restarts"], 0, "nothing was started again");
        for file in ["mesh.key", "tls/node.key", "tls/ca.crt"] {
            let mode = std::fs::metadata(node.state_dir().join(file)).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{file}");
        }
        let log = node.log.lock().unwrap().join("\n");
        for token in [&old, &new] {
            let secret = token.split(['@']).next().unwrap().trim_start_matches("lm1-");
            assert!(!log.contains(secret), "in the log");
        }
    }

    let warned = |n: &Node| n.status()["warnings"].to_string().contains("c has not got the new one yet");
    wait_for("status says who is waited for", || warned(&a) && warned(&b));
    let dropped = a.run(&["token", "--drop-old"]);
    assert!(dropped.status.success() && String::from_utf8_lossy(&dropped.stdout).trim() == new);
    wait_for("both go by the new key alone", || !warned(&a) && !warned(&b));

    // What was made before is worthless.
    let stranger = Node::new(dir.path(), "stranger", &["app.db"]);
    up_refused(&stranger, Some(&old), &["the token is for another mesh"]);
    let mut d = Node::new(dir.path(), "d", &["app.db"]);
    d.start(Some(&new));
    wait_equal(&[&a, &b, &d], "app.db");

    // A node that belongs ignores its old token, as it did; and one that was away is told.
    b.stop();
    b.start(Some(&old));
    b.exec("app.db", "INSERT INTO t VALUES('after', 1)");
    b.sync();
    a.stop();
    a.start(None);
    wait_equal(&[&a, &b, &d], "app.db");
    c.spawn(None);
    let told = "does not accept this node's key";
    wait_for("c is told", || c.log.lock().unwrap().iter().any(|l| l.contains(told)));
    c.exec("app.db", "INSERT INTO t VALUES('c, alone', 1)");
    c.kill();
    c.start(Some(&new));
    wait_equal(&[&a, &b, &c, &d], "app.db");
    c.stop();
    c.start(Some(&old));
    c.exec("app.db", "INSERT INTO t VALUES('c, back', 1)");
    c.sync();
    let foreign = Node::new(dir.path(), "foreign", &[]);
    let mut foreign = foreign;
    foreign.start(None);
    c.stop();
    up_refused(&c, Some(&foreign.token()), &["belongs to another mesh"]);
}
