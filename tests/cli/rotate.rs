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

fn key_of(node: &Node) -> String {
    let said = node.run(&["token"]);
    String::from_utf8_lossy(&said.stdout).trim().split('@').next().unwrap_or_default().to_owned()
}

fn is_whole(nodes: &[&Node]) -> bool {
    nodes.iter().all(|n| {
        let status = n.status();
        let routes = status["fabric"]["routes"].as_array().map_or(0, Vec::len);
        routes + 1 == nodes.len()
            && !status["warnings"].to_string().contains("the mesh's key is being changed")
    }) && nodes.iter().all(|n| key_of(n) == key_of(nodes[0]))
}

/// Says it until it is done: one that was begun before ends first.
fn rotate(node: &Node) {
    wait_for("the key can be changed", || {
        let said = node.run(&["token", "--rotate"]);
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.status.success() || text.contains("is being changed already"), "{text}");
        said.status.success()
    });
}

#[test]
fn a_change_that_dies_at_any_moment_can_be_said_again_and_locks_nobody_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = ["a", "b", "c"].map(|name| Node::new(dir.path(), name, &["app.db"]));
    nodes[0].exec("app.db", "CREATE TABLE t(id INTEGER PRIMARY KEY, v)");
    nodes[0].start(None);
    let token = nodes[0].token();
    nodes[1].start(Some(&token));
    nodes[2].start(Some(&token));
    wait_for("all are there", || is_whole(&nodes.each_ref()));
    for (round, delay_ms) in [0, 3, 6, 10, 20, 40, 80, 160, 320, 640].into_iter().enumerate() {
        let before = key_of(&nodes[0]);
        let ring_before = std::fs::read_to_string(nodes[0].state_dir().join("mesh.key")).unwrap();
        let mut asked = crate::support::litemesh();
        asked.args(["token", "--rotate", "--state-dir"]).arg(nodes[0].state_dir());
        asked.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut asked = asked.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        // The one that began it, and sometimes one that is being given the new key.
        nodes[0].kill();
        if round % 3 == 2 {
            nodes[1].kill();
        }
        asked.wait().unwrap();
        let ring = std::fs::read_to_string(nodes[0].state_dir().join("mesh.key")).unwrap();
        let both = ring.contains("previous ");
        println!("killed after {delay_ms} ms: begun {}, both accepted {both}", ring != ring_before);
        for node in nodes.iter_mut().filter(|n| n.process.is_none()) {
            node.start(None);
        }
        rotate(&nodes[0]);
        wait_for("the change ends", || is_whole(&nodes.each_ref()));
        assert_ne!(key_of(&nodes[0]), before);
        nodes[2].exec("app.db", &format!("INSERT INTO t VALUES({round}, 1)"));
        wait_equal(&nodes.each_ref(), "app.db");
    }
    let mut d = Node::new(dir.path(), "d", &["app.db"]);
    let token = String::from_utf8_lossy(&nodes[1].run(&["token"]).stdout).trim().to_owned();
    d.start(Some(&token));
    let [a, b, c] = &nodes;
    wait_equal(&[a, b, c, &d], "app.db");
}

#[test]
fn a_change_that_died_between_its_files_goes_on_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = crate::support::pair(dir.path(), "CREATE TABLE t(id INTEGER PRIMARY KEY, v)");
    wait_for("both are there", || is_whole(&[&a, &b]));
    let tls = |file: &str| a.state_dir().join("tls").join(file);
    let files = ["node.key", "node.crt", "ca.crt"];
    let before = files.map(|file| std::fs::read(tls(file)).unwrap());
    // The new key is there, and so much of what is made from it.
    for written in 0..=files.len() {
        let was = key_of(&a);
        let mut asked = crate::support::litemesh();
        let asked = asked.args(["token", "--rotate", "--state-dir"]).arg(a.state_dir()).output().unwrap();
        assert!(asked.status.success());
        a.kill();
        for (file, bytes) in files.iter().zip(&before).skip(written) {
            std::fs::write(a.state_dir().join("tls").join(file), bytes).unwrap();
        }
        a.start(None);
        wait_for("the change ends", || is_whole(&[&a, &b]));
        assert_ne!(key_of(&a), was);
        a.exec("app.db", &format!("INSERT INTO t VALUES({written}, 1)"));
        wait_equal(&[&a, &b], "app.db");
    }
}
