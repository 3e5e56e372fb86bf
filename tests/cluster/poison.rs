//! What cannot be applied stops one feed of one database, and what cannot be read stops nothing.

use std::time::Duration;

use bytes::Bytes;
use litemesh::core::frame::{FrameWriter, RowVersions};
use litemesh::core::message::{
    CommitHeader, CopyPart, Fragment, Holding, Message, SyncPage, WIRE_VERSION, encode,
};
use litemesh::core::value::ValueRef;
use litemesh::core::vector::{Point, Vector};
use litemesh::core::verify::{Reply, VerifyMessage};
use litemesh::core::version::{Hlc, SiteId, Version};
use litemesh::fabric::accounts::{Accounts, MESH_USER};
use serde_json::Value;

use crate::support::{Node, pair, wait_equal, wait_for};

fn database(node: &Node, name: &str) -> Value {
    let status = node.status();
    let all = status["databases"].as_array().unwrap();
    all.iter().find(|d| d["name"] == name).unwrap_or_else(|| panic!("{name} in {status}")).clone()
}

#[test]
fn a_commit_that_cannot_be_applied_stops_its_feed_alone() {
    let dir = tempfile::tempdir().unwrap();
    let files = ["app.db", "other.db"];
    let mut nodes: Vec<Node> = ["a", "b", "c"].iter().map(|n| Node::new(dir.path(), n, &files)).collect();
    for file in files {
        nodes[0].exec(file, "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    }
    nodes.iter_mut().for_each(|n| n.extra = vec!["--schema".into(), "manual".into()]);
    nodes[0].start(None);
    let token = nodes[0].token();
    for node in &mut nodes[1..] {
        node.start(Some(&token));
    }
    let [a, b, c] = &nodes[..] else { unreachable!() };
    let extra = "CREATE TABLE extra(id TEXT PRIMARY KEY NOT NULL, v)";
    [a, c].iter().for_each(|n| n.exec("app.db", extra));
    a.exec("app.db", "INSERT INTO extra VALUES('x', 1)");
    wait_for("b says what is missing", || database(b, "app")["state"] == "stopped");
    a.exec("app.db", "INSERT INTO t VALUES('behind it', 1)");
    let app = database(b, "app");
    let why = app["stopped"][0].as_str().unwrap();
    assert!(
        why.contains("feed of node a") && why.contains("\"extra\" does not exist in this file yet"),
        "{why}"
    );

    // The same feed of another database, and the other feeds of this one.
    a.exec("other.db", "INSERT INTO t VALUES('of a', 1)");
    b.exec("app.db", "INSERT INTO t VALUES('of b', 1)");
    c.exec("app.db", "INSERT INTO t VALUES('of c', 1)");
    wait_equal(&[a, b, c], "other.db");
    assert_eq!(database(b, "other")["state"], "ok");
    let has =
        |n: &Node, id: &str| n.text("app.db", &format!("SELECT max(id) FROM t WHERE id = '{id}'")) == id;
    wait_for("other feeds go on", || has(a, "of b") && has(c, "of b") && has(b, "of c") && has(a, "of c"));
    wait_for("c has all", || has(c, "behind it"));
    assert!(!has(b, "behind it"), "nothing goes before what is stopped");
    assert_eq!(database(b, "app")["state"], "stopped");
    assert_eq!(
        (database(a, "app")["state"].clone(), database(c, "app")["state"].clone()),
        ("ok".into(), "ok".into())
    );

    b.exec("app.db", extra);
    wait_equal(&[a, b, c], "app.db");
    assert!(has(b, "behind it"));
    wait_for("it goes on by itself", || database(b, "app")["state"] == "ok");
}

/// A field of `/proc/PID/status` in KiB.
fn memory_kib(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A message in one piece.
fn piece(data: Vec<u8>) -> Vec<u8> {
    encode(&Fragment { attempt: 1, index: 0, last: true, data: data.into() }).to_vec()
}

fn message(message: &Message) -> Vec<u8> {
    piece(encode(message).to_vec())
}

/// A commit of these numbers with these frames.
fn commit(from: u64, to: u64, frames: &[Vec<u8>]) -> Vec<u8> {
    let header = CommitHeader { from, to, id: 1, prev: 1, hlc: Hlc(u64::MAX), seen: vec![], rows: 1 };
    let mut bytes = Vec::new();
    for block in std::iter::once(encode(&header).to_vec()).chain(frames.iter().cloned()) {
        bytes.extend_from_slice(&(block.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&block);
    }
    piece(bytes)
}

/// A frame of one row whose value unpacks to a gigabyte.
fn bomb() -> Vec<u8> {
    let zeros = vec![0; 1 << 20];
    let mut packer = zstd::stream::write::Encoder::new(vec![1], 1).unwrap();
    for _ in 0..1_000 {
        std::io::Write::write_all(&mut packer, &zeros).unwrap();
    }
    packer.finish().unwrap()
}

/// A frame that is as it should be.
fn frame() -> Vec<u8> {
    let mut writer = FrameWriter::new(Version { hlc: Hlc(1), site: SiteId(77) });
    writer.begin_section("t", &["id"], &["v"], false);
    let versions = RowVersions {
        birth: Version { hlc: Hlc(1), site: SiteId(77) },
        dead: None,
        columns: &[],
        refs: &[],
        fixed: false,
    };
    writer.row([ValueRef::Text(b"poison")].into_iter(), versions, [ValueRef::Int(1)].into_iter());
    writer.finish()
}

/// What nothing should be done by, each as it travels.
fn hostile(lineage: u64, real: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let db: litemesh::core::names::DbName = "app".parse().unwrap();
    let deep = |byte: u8| [&[WIRE_VERSION][..], &vec![byte; 400 * 1024]].concat();
    let huge = [0xdd, 0xdf, 0xc6, 0xdb, 0xc9].map(|m| vec![WIRE_VERSION, m, 0xff, 0xff, 0xff, 0xff, 1]);
    let most = Point { n: u64::MAX, hlc: Hlc(u64::MAX), id: 1 };
    let vector = Vector([(SiteId(5), most), (SiteId(6), most), (SiteId(u64::MAX), most)].into());
    let holding = |vector: Vector| Holding {
        db: db.clone(),
        lineage,
        site: SiteId(5),
        vector,
        lsn: u64::MAX,
        answer: true,
        collected: Vector::default(),
        joining: Vec::new(),
        left: Vec::new(),
    };
    let mut all = vec![Vec::new(), vec![WIRE_VERSION], vec![2, 0x91], vec![255, 0x91], vec![7; 7 << 20]];
    all.extend((0..20_u64).map(|i| blake3::hash(&i.to_be_bytes()).as_bytes().repeat(i as usize * 200 + 1)));
    for bytes in [deep(0x91), deep(0x81), deep(0xc7)].into_iter().chain(huge) {
        all.push(piece(bytes.clone()));
        all.push(commit(0, 1, &[bytes[1..].to_vec()]));
        all.push(bytes);
    }
    for (from, to) in
        [(0, u64::MAX), (u64::MAX - 1, u64::MAX), (9, 3), (5, 5), (u64::MAX, 0), (1 << 40, 1 << 41)]
    {
        all.push(commit(from, to, &[frame()]));
    }
    // Nothing may follow it in its feed until it has been found out.
    all.push(commit(0, 1, &[bomb()]));
    all.push(message(&Message::Holding(holding(vector.clone()))));
    let frames = vec![Bytes::from(bomb()); 3];
    let page =
        SyncPage { db, request: 1, site: SiteId(5), frames, next_lsn: u64::MAX, complete: Some(vector) };
    all.push(message(&Message::SyncPage(page)));
    let data = Bytes::from_static(b"SQLite format 3");
    let part =
        CopyPart { request: 1, copy: 1, size: u64::MAX, offset: u64::MAX, data, same: true, hash: [1; 32] };
    all.push(message(&Message::CopyPart(part)));
    all.push(message(&Message::Refused { request: 1, why: "no".repeat(10_000) }));
    all.push(message(&Message::Verify(VerifyMessage::Reply {
        request: 1,
        reply: Reply::Refused("no".into()),
    })));
    for bytes in real {
        for at in [1, 2, bytes.len() / 3, bytes.len() - 1] {
            all.push(bytes[..at.min(bytes.len())].to_vec());
        }
        all.push([&[2], &bytes[1..]].concat());
    }
    all
}

/// A connection to a node's server as litemesh's own.
pub async fn look_inside(node: &Node) -> async_nats::Client {
    let accounts = Accounts::load_or_create(&node.state_dir().join("accounts.json")).unwrap();
    let password = accounts.mesh.reveal().to_owned();
    let options = async_nats::ConnectOptions::with_user_and_password(MESH_USER.to_owned(), password);
    options.connect(format!("nats://{}", node.addresses[1])).await.unwrap()
}

/// Real messages of this mesh, of all kinds that are said at the moment.
async fn overhear(client: &async_nats::Client, write: impl Fn()) -> Vec<Vec<u8>> {
    use futures::StreamExt;
    let mut heard = client.subscribe("lm.>").await.unwrap();
    client.flush().await.unwrap();
    let mut all = Vec::new();
    while all.len() < 20 {
        write();
        while let Ok(Some(m)) = tokio::time::timeout(Duration::from_millis(50), heard.next()).await {
            all.push(m.payload.to_vec());
        }
    }
    all
}

async fn attack(near: &Node, lineage: u64, site: &str, write: impl Fn()) {
    let client = look_inside(near).await;
    let real = overhear(&client, write).await;
    let subjects = [
        // In the name of a peer, of nobody, and of a feed that there is.
        "lm.c.b.app.00000000000000aa".to_owned(),
        format!("lm.c.b.app.{site}"),
        "lm.c.ghost.app.00000000000000ab".to_owned(),
        "lm.c.ghost.none.00000000000000ab".to_owned(),
        "lm.b.b".to_owned(),
        "lm.b.ghost".to_owned(),
        "lm.d.a.b".to_owned(),
        "lm.d.b.a".to_owned(),
        "lm.d.a.ghost".to_owned(),
        "lm.m.ghost".to_owned(),
    ];
    for payload in hostile(lineage, &real) {
        for subject in &subjects {
            client.publish(subject.clone(), payload.clone().into()).await.unwrap();
        }
        client.flush().await.unwrap();
    }
    endless(&client, 0..300).await;
}

/// Commits of ever more feeds that never end, and such messages.
async fn endless(client: &async_nats::Client, numbers: std::ops::Range<u64>) {
    for n in numbers {
        let data = Bytes::from(vec![n as u8; 500 * 1024]);
        let endless = encode(&Fragment { attempt: n, index: 0, last: false, data });
        client.publish(format!("lm.c.ghost.app.{n:016x}"), endless.clone()).await.unwrap();
        client.publish(format!("lm.d.a.ghost{n}"), endless).await.unwrap();
        client.flush().await.unwrap();
    }
}

#[test]
fn what_cannot_be_read_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    let write = |n: &Node| n.exec("app.db", "INSERT INTO t VALUES(hex(randomblob(8)), randomblob(2000))");
    for _ in 0..20 {
        write(&a);
        write(&b);
    }
    wait_equal(&[&a, &b], "app.db");
    let pids = [&a, &b].map(|n| (n.process.as_ref().unwrap().id(), n.server_pid()));
    let before = pids.map(|(pid, _)| memory_kib(pid, "VmRSS"));
    let lines = a.log.lock().unwrap().len();
    let told = database(&a, "app");
    let lineage = u64::from_str_radix(told["lineage"].as_str().unwrap(), 16).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let site = database(&b, "app")["site"].as_str().unwrap().to_owned();
    runtime.block_on(attack(&a, lineage, &site, || write(&b)));

    for _ in 0..20 {
        write(&a);
        write(&b);
    }
    a.sync();
    b.sync();
    wait_equal(&[&a, &b], "app.db");
    assert_eq!(pids, [&a, &b].map(|n| (n.process.as_ref().unwrap().id(), n.server_pid())), "all live");
    assert_eq!(a.status()["fabric"]["server_restarts"], 0);
    for ((pid, _), before) in pids.into_iter().zip(before) {
        let (most, now) = (memory_kib(pid, "VmHWM"), memory_kib(pid, "VmRSS"));
        println!("memory: {before} KiB before, {now} after, {most} at most");
        assert!(most < before + 160 * 1024, "{before} KiB became {most}");
    }
    let most = pids.map(|(pid, _)| memory_kib(pid, "VmHWM"));
    // Ten times the bytes take no more.
    runtime.block_on(async { endless(&look_inside(&a).await, 300..3_000).await });
    a.sync();
    for ((pid, _), before) in pids.into_iter().zip(most) {
        let now = memory_kib(pid, "VmHWM");
        println!("memory after ten times as many: {now} KiB at most, {before} before");
        assert!(now < before + 48 * 1024, "{before} KiB became {now}");
    }
    let refused =
        [&database(&a, "app"), &a.status()["fabric"]].map(|s| s["messages_refused"].as_u64().unwrap());
    assert!(refused[0] > 10 && refused[1] > 100, "{refused:?}");
    let log = a.log.lock().unwrap()[lines..].join("\n");
    let told = log.lines().filter(|l| l.contains("refused")).count();
    println!("{refused:?} refused, told {told} times in {} lines", log.lines().count());
    assert!((1..40).contains(&told) && log.lines().count() < 120, "{log}");
    assert_eq!(a.text("app.db", "SELECT CAST(count(*) AS TEXT) FROM t WHERE id = 'poison'"), "0");
    for node in [&a, &b] {
        assert_eq!(node.text("app.db", "PRAGMA integrity_check"), "ok");
    }
    write(&b);
    wait_equal(&[&a, &b], "app.db");
}
