//! Programs that use the mesh's NATS with what `litemesh env` prints: in Rust with async-nats, in Python with nats-py.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use async_nats::jetstream::{self, kv, stream};
use futures::StreamExt;

use crate::support::{Node, PATIENCE, pair, wait_for};

const PACKAGE: &str = "nats-py==2.16.0";

/// The Python interpreter that has the package, installed once under the build's directory.
fn python() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nats-py");
    let (python, done) = (dir.join("bin/python"), dir.join("installed"));
    if !done.exists() {
        let run = |command: &mut Command| command.output().is_ok_and(|o| o.status.success());
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE];
        let ok = run(Command::new("python3").args(["-m", "venv"]).arg(&dir))
            && run(Command::new(&python).args(pip));
        if !ok {
            eprintln!("skipped, nats-py cannot be installed");
            return None;
        }
        std::fs::write(done, PACKAGE).unwrap();
    }
    Some(python)
}

/// What `litemesh env` prints, as a shell reads it.
fn variables(node: &Node) -> Vec<(String, String)> {
    let output = node.run(&["env"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let script = format!("{}\nenv", String::from_utf8(output.stdout).unwrap());
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let pairs = text.lines().filter_map(|l| l.split_once('=')).filter(|(n, _)| n.starts_with("NATS_"));
    pairs.map(|(n, v)| (n.to_owned(), v.to_owned())).collect()
}

async fn connect(node: &Node) -> async_nats::Client {
    let output = node.run(&["env", "--json"]);
    let settings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let word = |name: &str| settings[name].as_str().unwrap().to_owned();
    assert_eq!(word("node"), node.name);
    async_nats::ConnectOptions::with_user_and_password(word("user"), word("password"))
        .request_timeout(Some(PATIENCE))
        .connect(word("url"))
        .await
        .unwrap()
}

/// Until the cluster has a leader that both nodes' servers follow, nothing can be made.
async fn eventually<T, E: std::fmt::Display>(
    what: &str,
    mut attempt: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let began = std::time::Instant::now();
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(e) => assert!(began.elapsed() < PATIENCE, "{what}: {e}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rust_programs_meet_over_two_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = tokio::task::block_in_place(|| pair(dir.path(), "CREATE TABLE t(id INTEGER PRIMARY KEY)"));
    let (at_a, at_b) = (connect(&a).await, connect(&b).await);

    let mut heard = at_b.subscribe("news").await.unwrap();
    at_b.flush().await.unwrap();
    // The other server hears of the subscription a moment later.
    let told = async {
        loop {
            at_a.publish("news", "from a".into()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let first = tokio::select! { message = heard.next() => message, () = told => None };
    assert_eq!(first.unwrap().payload, "from a");

    for (node, client, other) in [(&a, &at_a, &at_b), (&b, &at_b, &at_a)] {
        let placement = stream::Placement { tags: vec![format!("node:{}", node.name)], cluster: None };
        let streams = jetstream::new(client.clone());
        let name = format!("LOCAL_{}", node.name);
        let config = stream::Config {
            name: name.clone(),
            subjects: vec![format!("local.{}", node.name)],
            num_replicas: 1,
            placement: Some(placement.clone()),
            ..Default::default()
        };
        let made = eventually("a stream", async || streams.create_stream(config.clone()).await).await;
        assert_eq!(made.cached_info().cluster.as_ref().unwrap().leader.as_deref(), Some(node.name.as_str()));
        streams.publish(format!("local.{}", node.name), "kept".into()).await.unwrap().await.unwrap();

        let bucket = kv::Config {
            bucket: format!("of_{}", node.name),
            placement: Some(placement),
            ..Default::default()
        };
        let store = eventually("a bucket", async || streams.create_key_value(bucket.clone()).await).await;
        store.put("colour", "green".into()).await.unwrap();
        // Seen from the other node, too.
        let elsewhere = jetstream::new(other.clone());
        let there = elsewhere.get_key_value(format!("of_{}", node.name)).await.unwrap();
        assert_eq!(there.get("colour").await.unwrap().unwrap(), "green");
        let mut stream = elsewhere.get_stream(&name).await.unwrap();
        assert_eq!(stream.info().await.unwrap().state.messages, 1);
    }
    // A program cannot listen in on litemesh, nor ask as the system does.
    let mut mesh = at_a.subscribe("lm.>").await.unwrap();
    a.exec("app.db", "INSERT INTO t VALUES(1)");
    tokio::task::block_in_place(|| {
        wait_for("the row is on b", || b.text("app.db", "SELECT count(*) || '' FROM t") == "1");
    });
    assert!(tokio::time::timeout(Duration::from_millis(300), mesh.next()).await.is_err());
}

#[test]
fn python_programs_meet_over_two_nodes() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), "CREATE TABLE t(id INTEGER PRIMARY KEY)");
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/nats/client.py");
    let mut server = Command::new(&python)
        .arg(&program)
        .arg("serve")
        .envs(variables(&a))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "serving\n");
    let mut run = Command::new(&python);
    let output = run.arg(&program).args(["use", &b.name]).envs(variables(&b)).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        // It would wait for ever.
        drop(server.kill());
    }
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text, "hello python\norders.0 0\norders.1 1\norders.2 2\ngreen\n");
    assert!(server.wait().unwrap().success());
}
