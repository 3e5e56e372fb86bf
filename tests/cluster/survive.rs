//! What a node does when the other, or its own nats-server, is not there.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use async_nats::jetstream::stream::{Config, Placement};
use async_nats::jetstream::{self, Context};

use crate::support::{Node, pair, wait_equal, wait_for};

const SCHEMA: &str = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)";

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

async fn jetstream(node: &Node) -> Context {
    let accounts = std::fs::read(node.state_dir().join("accounts.json")).unwrap();
    let accounts: serde_json::Value = serde_json::from_slice(&accounts).unwrap();
    let password = accounts["app"].as_str().unwrap().to_owned();
    let options = async_nats::ConnectOptions::with_user_and_password("app".to_owned(), password);
    let mut context = jetstream::new(options.connect(format!("nats://{}", node.addresses[1])).await.unwrap());
    // What is asked while nobody leads is never answered: ask again soon.
    context.set_timeout(Duration::from_millis(500));
    context
}

async fn make_stream(node: &Node, name: &str) {
    let context = jetstream(node).await;
    let tags = vec![format!("node:{}", node.name)];
    let config = Config {
        name: name.to_owned(),
        subjects: vec![name.to_owned()],
        placement: Some(Placement { tags, ..Placement::default() }),
        allow_direct: true,
        ..Config::default()
    };
    while context.get_or_create_stream(config.clone()).await.is_err() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Publishes a message and reads it back, without asking anything of the cluster; how long that took.
async fn use_stream(node: &Node, name: &str, text: &str) -> Duration {
    let started = Instant::now();
    let context = jetstream(node).await;
    // The server is there some milliseconds before its streams are.
    let stored = loop {
        match context.publish(name.to_owned(), text.to_owned().into()).await.unwrap().await {
            Ok(stored) => break stored,
            Err(e) if started.elapsed() > Duration::from_secs(30) => panic!("{e}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    let stream = context.get_stream_no_info(name).await.unwrap();
    let read = stream.direct_get(stored.sequence).await.unwrap();
    assert_eq!(read.payload, text);
    started.elapsed()
}

#[test]
fn of_two_that_were_cut_off_each_starts_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), SCHEMA);
    let runtime = runtime();
    runtime.block_on(make_stream(&a, "own_a"));
    runtime.block_on(make_stream(&b, "own_b"));
    a.exec("app.db", "INSERT INTO t VALUES('before', 1)");
    a.sync();
    // A power cut for both; they come back at different times.
    a.kill();
    b.kill();
    for (node, stream) in [(&mut a, "own_a"), (&mut b, "own_b")] {
        let started = Instant::now();
        node.start(None);
        let ready = started.elapsed();
        let used = runtime.block_on(use_stream(node, stream, "alone"));
        println!("{}: ready after {ready:?}, its stream written and read in {used:?}", node.name);
        node.exec("app.db", &format!("INSERT INTO t VALUES('{}', 1)", node.name));
        if node.name == "a" {
            // Killed again, alone as it is.
            node.kill();
            let started = Instant::now();
            node.start(None);
            println!("{}: ready again after {:?}", node.name, started.elapsed());
            runtime.block_on(use_stream(node, stream, "once more"));
        }
    }
    let back = Instant::now();
    wait_equal(&[&a, &b], "app.db");
    println!("rows of both are on both {:?} after the second was ready", back.elapsed());
    runtime.block_on(use_stream(&a, "own_a", "together"));
    runtime.block_on(use_stream(&b, "own_b", "together"));
    for (node, name) in [(&b, "new_b"), (&a, "new_a")] {
        runtime.block_on(make_stream(node, name));
        runtime.block_on(use_stream(node, name, "new"));
    }
    let resumed = back.elapsed();
    println!("streams can be made on both and used {resumed:?} after the second was ready");
    // A second, on a quiet host.
    assert!(resumed < Duration::from_secs(20), "{resumed:?}");
    assert_eq!(a.text("app.db", "SELECT group_concat(id) FROM (SELECT id FROM t ORDER BY id)"), "a,b,before");
    let messages = runtime.block_on(async {
        let stream = jetstream(&a).await.get_stream("own_a").await.unwrap();
        stream.cached_info().state.messages
    });
    assert_eq!(messages, 3, "nothing of the stream is missing");
}

fn processes_of(node: &Node) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(node.home.to_str().unwrap()) {
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let state = stat.rsplit(") ").next().unwrap_or_default().chars().take(1).collect();
            found.push((pid, state));
        }
    }
    found
}

#[test]
fn a_server_that_is_killed_hangs_or_loses_its_port_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), SCHEMA);
    let signal = |pid: u64, signal: &str| {
        assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
    };
    let children = |node: &Node| {
        let id = node.process.as_ref().unwrap().id();
        let threads = std::fs::read_dir(format!("/proc/{id}/task")).unwrap().flatten();
        // A thread that has ended has none.
        threads
            .map(|t| std::fs::read_to_string(t.path().join("children")).unwrap_or_default())
            .collect::<String>()
    };
    let log = |node: &Node, text: &str| node.log.lock().unwrap().iter().any(|l| l.contains(text));
    let mut restarts = 0;
    let mut back = |a: &Node, b: &Node, what: &str| {
        restarts += 1;
        wait_for(what, || {
            let fabric = &a.status()["fabric"];
            fabric["connected"] == true && fabric["server_restarts"].as_u64() >= Some(restarts)
        });
        a.exec("app.db", &format!("INSERT INTO t VALUES('a{restarts}', 1)"));
        b.exec("app.db", &format!("INSERT INTO t VALUES('b{restarts}', 1)"));
        wait_equal(&[a, b], "app.db");
        restarts = a.status()["fabric"]["server_restarts"].as_u64().unwrap();
    };
    signal(a.server_pid(), "-KILL");
    back(&a, &b, "the killed server is back");
    assert!(log(&a, ": it is started again in "));

    signal(a.server_pid(), "-STOP");
    a.exec("app.db", "INSERT INTO t VALUES('while it hangs', 1)");
    back(&a, &b, "the server that hung is back");
    assert!(log(&a, "nats-server does not answer: it is ended and started again"));

    // Another program is quicker to take the port than the next server.
    signal(a.server_pid(), "-KILL");
    let mut taken = None;
    for _ in 0..20_000 {
        taken = taken.or_else(|| TcpListener::bind(a.addresses[1]).ok());
    }
    if let Some(taken) = taken {
        a.exec("app.db", "INSERT INTO t VALUES('while the port is taken', 1)");
        wait_for("it says so", || log(&a, "PortTaken"));
        assert!(a.status()["ready"].as_bool().unwrap(), "writes go on");
        drop(taken);
    } else {
        eprintln!("skipped: the server was quicker");
    }
    back(&a, &b, "the server has its port");
    assert_eq!(children(&a).split_whitespace().count(), 1, "one server, and none that is not reaped");

    let server = a.server_pid();
    a.kill();
    wait_for("no server is left", || processes_of(&a).iter().all(|(_, state)| state == "Z"));
    wait_for("nor its ports", || a.addresses.iter().all(|address| TcpListener::bind(address).is_ok()));
    assert!(!Path::new(&format!("/proc/{server}")).exists() || processes_of(&a).is_empty());
    a.start(None);
    a.sync();
}

#[test]
fn a_store_that_is_damaged_or_gone_costs_no_row() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), SCHEMA);
    let acked = |node: &Node| node.status()["fabric"]["log_acked"].as_u64().unwrap();
    wait_for("the log is there", || {
        acked(&a) > 0 || {
            a.exec("app.db", "INSERT OR REPLACE INTO t VALUES('first', 1)");
            false
        }
    });
    let store = a.state_dir().join("jetstream");
    for damage in ["gone", "damaged", "gone while it runs"] {
        if damage == "gone while it runs" {
            std::fs::remove_dir_all(&store).unwrap();
        } else {
            b.stop();
            a.exec("app.db", &format!("INSERT INTO t VALUES('b is away, {damage}', 1)"));
            a.kill();
            match damage {
                "gone" => std::fs::remove_dir_all(&store).unwrap(),
                _ => spoil(&store),
            }
            a.start(None);
            b.start(None);
        }
        a.exec("app.db", &format!("INSERT INTO t VALUES('a, {damage}', 1)"));
        b.exec("app.db", &format!("INSERT INTO t VALUES('b, {damage}', 1)"));
        wait_equal(&[&a, &b], "app.db");
        let before = acked(&a);
        let mut n = 0;
        wait_for(&format!("the log is written again: {damage}"), || {
            n += 1;
            a.exec("app.db", &format!("INSERT OR REPLACE INTO t VALUES('more', {n})"));
            std::thread::sleep(Duration::from_millis(100));
            acked(&a) > before + 3
        });
        wait_equal(&[&a, &b], "app.db");
    }
}

/// Overwrites every file below a directory.
fn spoil(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.path().is_dir() {
            spoil(&entry.path());
        } else {
            let len = entry.metadata().unwrap().len() as usize;
            std::fs::write(entry.path(), vec![0xa5; len.min(100_000)]).unwrap();
        }
    }
}
