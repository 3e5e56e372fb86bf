//! Changes of rows as programs are told of them over NATS.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream::{self, consumer, stream};
use futures::StreamExt;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Node, PATIENCE, wait_for};

async fn connect(node: &Node) -> async_nats::Client {
    let output = node.run(&["env", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let settings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let word = |name: &str| settings[name].as_str().unwrap().to_owned();
    async_nats::ConnectOptions::with_user_and_password(word("user"), word("password"))
        .request_timeout(Some(PATIENCE))
        .connect(word("url"))
        .await
        .unwrap()
}

/// A message as (subject, header, content).
fn read(message: &async_nats::Message) -> (String, String, Value) {
    let header = message.headers.as_ref().and_then(|h| h.get("Nats-Msg-Id")).expect("an id");
    (message.subject.to_string(), header.to_string(), serde_json::from_slice(&message.payload).unwrap())
}

async fn next(heard: &mut async_nats::Subscriber) -> (String, String, Value) {
    read(&tokio::time::timeout(PATIENCE, heard.next()).await.expect("it is told").expect("it goes on"))
}

const SCHEMA: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT, n); CREATE TABLE \"o.d d\"(a TEXT, b INT, v, \
                      PRIMARY KEY(a, b)) WITHOUT ROWID; INSERT INTO t VALUES(1, 'old', NULL)";

fn pair_with_cdc(dir: &std::path::Path) -> (Node, Node) {
    let (mut a, mut b) = (Node::new(dir, "a", &["app.db"]), Node::new(dir, "b", &["app.db"]));
    a.extra.push("--cdc".to_owned());
    b.extra.push("--cdc".to_owned());
    a.exec("app.db", SCHEMA);
    a.start(None);
    b.start(Some(&a.token()));
    (a, b)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_node_tells_what_its_file_has_once_and_under_one_id() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = tokio::task::block_in_place(|| pair_with_cdc(dir.path()));
    let (at_a, at_b) = (connect(&a).await, connect(&b).await);
    let mut heard = [at_a.subscribe("cdc.>").await.unwrap(), at_b.subscribe("cdc.>").await.unwrap()];
    at_a.flush().await.unwrap();
    at_b.flush().await.unwrap();
    let steps = [
        (&a, "INSERT INTO t VALUES(2, 'two', 9007199254740993)", "cdc.app.t.insert"),
        (&b, "UPDATE t SET name = 'zwei' WHERE id = 2", "cdc.app.t.update"),
        (&a, "UPDATE t SET n = x'00ff' WHERE id = 1", "cdc.app.t.update"),
        (&b, "INSERT INTO \"o.d d\" VALUES('x', 1, 1e999)", "cdc.app.o%2Ed%20d.insert"),
        (&a, "DELETE FROM \"o.d d\"", "cdc.app.o%2Ed%20d.delete"),
        (&b, "DELETE FROM t WHERE id = 1", "cdc.app.t.delete"),
    ];
    let mut told = [Vec::new(), Vec::new()];
    for (node, sql, subject) in steps {
        node.exec("app.db", sql);
        for (i, heard) in heard.iter_mut().enumerate() {
            let (got, header, mut change) = next(heard).await;
            assert_eq!(got, subject);
            assert_eq!(change["id"], header);
            assert_eq!(change["db"], "app");
            let fields = change.as_object_mut().unwrap();
            // A file learns a moment later which node a site is that it has never heard of.
            let writer = fields.remove("node");
            assert!(writer.is_none_or(|w| w == node.name));
            let cursor = fields.remove("cursor").expect("a place in this file");
            assert!(cursor.as_str().unwrap().len() > 17);
            told[i].push(change);
        }
    }
    let [at_a, at_b] = told;
    assert_eq!(at_a, at_b, "but for the place in the file, every node tells the same");
    assert_eq!(at_a[0]["new"], json!({"id": 2, "name": "two", "n": {"int": "9007199254740993"}}));
    assert_eq!(at_a[1]["changed"], json!(["name"]));
    assert_eq!(at_a[2]["new"], json!({"id": 1, "name": "old", "n": {"blob": "AP8="}}));
    assert_eq!(at_a[3]["new"], json!({"a": "x", "b": 1, "v": {"real": "inf"}}));
    assert_eq!(at_a[4]["key"], json!({"a": "x", "b": 1}));
    assert!(at_a[4].get("new").is_none() && at_a[5]["key"] == json!({"id": 1}));
    let ids: BTreeSet<&str> = at_a.iter().map(|c| c["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 6);
    // Nothing more comes: not from the other node either.
    for heard in &mut heard {
        let more = tokio::time::timeout(Duration::from_millis(500), heard.next()).await;
        assert!(more.is_err(), "{more:?}");
    }
}

/// Inserts rows 1, 2, 3 … until it is told to end; returns how many.
fn write_until(node: &Node, end: &AtomicBool) -> i64 {
    let app = node.app("app.db");
    let mut count = 0;
    while !end.load(Ordering::Relaxed) {
        count += 1;
        app.execute("INSERT INTO t VALUES(?1, 'row', ?1)", [count + 100]).unwrap();
        std::thread::sleep(Duration::from_millis(3));
    }
    count
}

/// All messages of a stream, in order.
async fn all_of(stream: &stream::Stream, count: u64) -> Vec<Value> {
    let config = consumer::pull::OrderedConfig::default();
    let consumer = stream.create_consumer(config).await.unwrap();
    let mut messages = consumer.messages().await.unwrap();
    let mut all = Vec::new();
    while all.len() < count as usize {
        let message =
            tokio::time::timeout(PATIENCE, messages.next()).await.expect("it is there").unwrap().unwrap();
        all.push(read(&message).2);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_of_litemesh_and_of_its_server_skip_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    a.extra.push("--cdc".to_owned());
    a.exec("app.db", SCHEMA);
    tokio::task::block_in_place(|| {
        a.start(None);
    });
    let config = stream::Config {
        name: "CHANGES".to_owned(),
        subjects: vec!["cdc.>".to_owned()],
        ..Default::default()
    };
    let began = Instant::now();
    while let Err(e) = jetstream::new(connect(&a).await).create_stream(config.clone()).await {
        assert!(began.elapsed() < PATIENCE, "{e}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let end = AtomicBool::new(false);
    let mut restarted = 0;
    let count = tokio::task::block_in_place(|| {
        std::thread::scope(|scope| {
            let writing = Node::new(dir.path(), "a", &["app.db"]);
            let end = &end;
            let writer = scope.spawn(move || write_until(&writing, end));
            for round in 0..4 {
                std::thread::sleep(Duration::from_millis(1_200));
                if round % 2 == 0 {
                    a.kill();
                    std::thread::sleep(Duration::from_millis(300));
                    a.start(None);
                } else {
                    let pid = Pid::from_raw(a.server_pid() as i32).unwrap();
                    kill_process(pid, Signal::KILL).unwrap();
                    restarted += 1;
                }
            }
            std::thread::sleep(Duration::from_millis(800));
            end.store(true, Ordering::Relaxed);
            writer.join().unwrap()
        })
    });
    assert!(count > 300 && restarted == 2, "{count}");
    let streams = jetstream::new(connect(&a).await);
    let mut changes = streams.get_stream("CHANGES").await.unwrap();
    let began = Instant::now();
    while changes.info().await.unwrap().state.messages < count as u64 {
        assert!(began.elapsed() < PATIENCE, "of {count} only {}", changes.cached_info().state.messages);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // What was published again had its id, and the stream has it once.
    let kept = changes.info().await.unwrap().state.messages;
    assert_eq!(kept, count as u64);
    let all = all_of(&changes, kept).await;
    let keys: Vec<i64> = all.iter().map(|c| c["key"]["id"].as_i64().unwrap()).collect();
    assert_eq!(keys, (101..=100 + count).collect::<Vec<_>>(), "in the order of commits");
    let ids: BTreeMap<&str, i64> =
        all.iter().zip(&keys).map(|(c, k)| (c["id"].as_str().unwrap(), *k)).collect();
    assert_eq!(ids.len(), keys.len());
}

/// How many messages the node's nats-server was sent.
fn messages_in(node: &Node) -> u64 {
    use std::io::{Read, Write};
    let conf = std::fs::read_to_string(node.state_dir().join("nats.conf")).unwrap();
    let monitor = conf.lines().find_map(|line| line.strip_prefix("http: ")).unwrap().trim_matches('"');
    let mut stream = std::net::TcpStream::connect(monitor).unwrap();
    write!(stream, "GET /varz HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let answer: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    answer["in_msgs"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_listens_to_is_not_told_and_whoever_comes_is() {
    const ROWS: u64 = 3_000;
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    a.extra.push("--cdc".to_owned());
    a.exec("app.db", SCHEMA);
    tokio::task::block_in_place(|| {
        a.start(None);
    });
    let insert = |from: u64| {
        let sql = "WITH RECURSIVE c(i) AS (SELECT ?1 UNION ALL SELECT i + 1 FROM c WHERE i + 1 < ?1 + ?2) INSERT INTO t SELECT \
                   i, 'x', i FROM c";
        a.app("app.db").execute(sql, [from, ROWS]).unwrap();
    };
    let before = messages_in(&a);
    insert(10_000);
    a.sync();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let sent = messages_in(&a) - before;
    assert!(sent < ROWS / 2, "{sent} messages for {ROWS} rows that nobody wants to know of");
    let client = connect(&a).await;
    let mut heard = client.subscribe("cdc.app.t.insert").await.unwrap();
    client.flush().await.unwrap();
    insert(20_000);
    for n in 0..ROWS {
        let (.., change) = next(&mut heard).await;
        assert_eq!(change["key"]["id"], 20_000 + n, "every one, in order, and none of those before");
    }
    drop(heard);
    client.flush().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_gone_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    a.extra.push("--cdc".to_owned());
    a.exec("app.db", SCHEMA);
    tokio::task::block_in_place(|| {
        a.start(None);
    });
    let client = connect(&a).await;
    let streams = jetstream::new(client.clone());
    let config = stream::Config {
        name: "CHANGES".to_owned(),
        subjects: vec!["cdc.app.t.insert".to_owned()],
        ..Default::default()
    };
    let began = Instant::now();
    while let Err(e) = streams.create_stream(config.clone()).await {
        assert!(began.elapsed() < PATIENCE, "{e}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    a.exec("app.db", "INSERT INTO t VALUES(5, 'a', 1)");
    let mut changes = streams.get_stream("CHANGES").await.unwrap();
    while changes.info().await.unwrap().state.messages < 1 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    streams.delete_stream("CHANGES").await.unwrap();
    let mut heard = client.subscribe("cdc.app.t.insert").await.unwrap();
    client.flush().await.unwrap();
    a.exec("app.db", "INSERT INTO t VALUES(6, 'b', 1)");
    // A subscriber is told at once, and again while the stream is awaited; after a minute it is given up.
    let (_, id, first) = next(&mut heard).await;
    assert_eq!(first["key"]["id"], 6);
    a.exec("app.db", "INSERT INTO t VALUES(7, 'c', 1)");
    let seventh = async {
        loop {
            let (_, again, change) = next(&mut heard).await;
            if change["key"]["id"] == 7 {
                return;
            }
            assert_eq!(again, id, "repeated under its id");
        }
    };
    tokio::time::timeout(PATIENCE, seventh).await.expect("it goes on");
    let log = a.log.clone();
    tokio::task::block_in_place(|| {
        wait_for("it was said", || log.lock().unwrap().iter().any(|l| l.contains("not waited for any more")));
    });
}
