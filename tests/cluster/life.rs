//! A mesh's life: from one node to five and back to one, while programs on all of them write to SQLite and publish to
//! streams of their own.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::stream::{Config, Placement};

use crate::support::{Node, PATIENCE, wait_for};

/// A node with its programs.
struct Host {
    node: Node,
    writing: Arc<AtomicBool>,
    publishing: Arc<AtomicBool>,
    /// The last row that was committed, and the last message that the stream said it has.
    wrote: Arc<AtomicU64>,
    published: Arc<AtomicU64>,
    programs: Vec<JoinHandle<()>>,
}

impl Host {
    fn start(dir: &Path, name: &str, token: Option<&str>) -> Self {
        let mut node = Node::new(dir, name, &["app.db"]);
        if token.is_none() {
            node.exec("app.db", "CREATE TABLE t(node TEXT, n INTEGER, PRIMARY KEY(node, n)) WITHOUT ROWID");
        }
        node.start(token);
        let on = || Arc::new(AtomicBool::new(true));
        let mut host = Self {
            node,
            writing: on(),
            publishing: on(),
            wrote: Arc::default(),
            published: Arc::default(),
            programs: Vec::new(),
        };
        host.programs = vec![host.writer(), host.publisher()];
        host
    }

    /// Inserts one row after the other; a write that fails ends the test.
    fn writer(&self) -> JoinHandle<()> {
        let (conn, name) = (self.node.app("app.db"), self.node.name.clone());
        let (on, wrote) = (self.writing.clone(), self.wrote.clone());
        std::thread::spawn(move || {
            while on.load(Ordering::Relaxed) {
                let n = wrote.load(Ordering::Relaxed) + 1;
                let wrong = |e| panic!("{name} cannot write: {e}");
                conn.execute("INSERT INTO t VALUES(?1, ?2)", (&name, n)).unwrap_or_else(wrong);
                wrote.store(n, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        })
    }

    /// Publishes one message after the other to a stream that is bound to this node.
    fn publisher(&self) -> JoinHandle<()> {
        let (context, name) = (self.jetstream(), self.node.name.clone());
        let (on, published) = (self.publishing.clone(), self.published.clone());
        let publish = async move {
            let tags = vec![format!("node:{name}")];
            let config = Config {
                name: format!("OWN_{name}"),
                subjects: vec![format!("own.{name}")],
                placement: Some(Placement { tags, ..Placement::default() }),
                ..Config::default()
            };
            let context = context.await;
            // A cluster that is electing does not answer.
            while context.get_or_create_stream(config.clone()).await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            while on.load(Ordering::Relaxed) {
                let n = published.load(Ordering::Relaxed) + 1;
                let sent = context.publish(format!("own.{name}"), n.to_string().into()).await;
                let stored = sent.expect("sent").await;
                stored.unwrap_or_else(|e| panic!("the stream of {name} does not take message {n}: {e}"));
                published.store(n, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        std::thread::spawn(move || runtime().block_on(publish))
    }

    fn jetstream(&self) -> impl Future<Output = jetstream::Context> + use<> {
        let accounts = std::fs::read(self.node.state_dir().join("accounts.json")).unwrap();
        let accounts: serde_json::Value = serde_json::from_slice(&accounts).unwrap();
        let password = accounts["app"].as_str().unwrap().to_owned();
        let url = format!("nats://{}", self.node.addresses[1]);
        async move {
            let options = async_nats::ConnectOptions::with_user_and_password("app".to_owned(), password);
            jetstream::new(options.connect(url).await.expect("it lets programs in"))
        }
    }

    /// The messages of its own stream.
    fn stored(&self) -> u64 {
        let name = format!("OWN_{}", self.node.name);
        runtime().block_on(async {
            let stream = self.jetstream().await.get_stream(name).await.expect("the stream answers");
            stream.cached_info().state.messages
        })
    }

    /// Waits until both programs have done something.
    fn go_on(&self) {
        let (wrote, published) = (self.wrote.load(Ordering::Relaxed), self.published.load(Ordering::Relaxed));
        wait_for("programs go on", || {
            assert!(self.programs.iter().all(|p| !p.is_finished()), "a program of {} failed", self.node.name);
            self.wrote.load(Ordering::Relaxed) > wrote + 10
                && self.published.load(Ordering::Relaxed) > published + 10
        });
    }

    fn end_publishing(&mut self) {
        self.publishing.store(false, Ordering::Relaxed);
        self.programs.pop().expect("the publisher").join().expect("no message was refused");
    }

    fn end_writing(&mut self) {
        self.writing.store(false, Ordering::Relaxed);
        self.programs.pop().expect("the writer").join().expect("no write failed");
    }

    fn rows_of(&self, name: &str) -> u64 {
        let sql = "SELECT count(*), coalesce(max(n), 0) FROM t WHERE node = ?1";
        let row = |r: &rusqlite::Row<'_>| Ok((r.get::<_, u64>(0)?, r.get::<_, u64>(1)?));
        let (count, last) = self.node.app("app.db").query_row(sql, [name], row).unwrap();
        assert_eq!(count, last, "rows of {name} are missing on {}", self.node.name);
        count
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Lets a node leave while its program writes; tells up to which of its rows the mesh has them.
fn leave(hosts: &mut Vec<Host>, name: &str) -> (String, u64) {
    let index = hosts.iter().position(|h| h.node.name == name).expect("it runs");
    let mut host = hosts.remove(index);
    host.end_publishing();
    let refused = host.node.run(&["leave"]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains(&format!("OWN_{name}")) && text.contains("--drop-streams"), "{text}");

    let before = host.wrote.load(Ordering::Relaxed);
    let left = host.node.run(&["leave", "--drop-streams", "--timeout", "80s"]);
    let (out, err) = (String::from_utf8_lossy(&left.stdout), String::from_utf8_lossy(&left.stderr));
    assert!(left.status.success(), "{name}: {err}{}", host.node.log.lock().unwrap().join("\n"));
    assert!(out.contains("has left the mesh") && out.contains("plain SQLite file"), "{out}");
    let status = host.node.process.take().unwrap().wait().unwrap();
    assert!(status.success(), "{status}");
    host.end_writing();

    let names = "SELECT count(*) FROM sqlite_schema WHERE name LIKE '%litemesh%'";
    assert_eq!(
        host.node.text("app.db", &format!("SELECT CAST(({names}) AS TEXT)")),
        "0",
        "nothing is left in it"
    );
    assert!(!host.node.state_dir().join("mesh.key").exists(), "the secret is gone");
    let again = host.node.up_command(None).output().unwrap();
    let text = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!again.status.success() && text.contains("left the mesh"), "{text}");

    let kept = hosts[0].rows_of(name);
    assert!(kept >= before, "{name} had written {before} rows when it was to leave, and the mesh has {kept}");
    assert!(host.rows_of(name) >= kept, "what it wrote last is its own");
    (name.to_owned(), kept)
}

#[test]
fn from_one_node_to_five_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut hosts = vec![Host::start(dir.path(), "a", None)];
    for name in ["b", "c", "d", "e"] {
        hosts.iter().for_each(Host::go_on);
        let token = hosts[0].node.token();
        hosts.push(Host::start(dir.path(), name, Some(&token)));
    }
    hosts.iter().for_each(Host::go_on);
    let mut gone = Vec::new();
    // The one that founded the mesh goes last.
    for name in ["e", "d", "c", "a"] {
        gone.push(leave(&mut hosts, name));
        hosts.iter().for_each(Host::go_on);
        let names: Vec<_> = hosts.iter().map(|h| h.node.name.clone()).collect();
        for host in &hosts {
            let others: Vec<_> = names.iter().filter(|n| **n != host.node.name).cloned().collect();
            let peers = || -> Vec<String> {
                let status = host.node.status();
                let peers = status["peers"].as_array().unwrap().iter();
                peers.map(|p| p["node"].as_str().unwrap().to_owned()).collect()
            };
            wait_for("who left is not shown any more", || peers() == others);
        }
        hosts[0].node.sync();
        for (name, kept) in &gone {
            for host in &hosts {
                wait_for("all have the rows of who left", || host.rows_of(name) == *kept);
            }
        }
    }
    let mut last = hosts.pop().unwrap();
    last.end_publishing();
    last.end_writing();
    assert_eq!(last.stored(), last.published.load(Ordering::Relaxed), "no message is missing");
    assert_eq!(last.rows_of("b"), last.wrote.load(Ordering::Relaxed));
    runtime().block_on(async {
        let context = last.jetstream().await;
        let made = tokio::time::timeout(PATIENCE, context.create_stream("alone")).await;
        made.expect("it decides alone").expect("a new stream");
    });
    assert!(last.node.status()["ready"].as_bool().unwrap());
}

#[test]
fn the_log_answers_when_the_node_is_ready() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    for start in 0..3 {
        a.start(None);
        let accounts = std::fs::read(a.state_dir().join("accounts.json")).unwrap();
        let accounts: serde_json::Value = serde_json::from_slice(&accounts).unwrap();
        let password = accounts["mesh"].as_str().unwrap().to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answer = runtime.block_on(async {
            let options = async_nats::ConnectOptions::with_user_and_password("mesh".to_owned(), password);
            let client = options.connect(format!("nats://{}", a.addresses[1])).await.unwrap();
            client.request("$JS.API.STREAM.INFO.LM_a", "".into()).await.unwrap()
        });
        let answer = String::from_utf8_lossy(&answer.payload).into_owned();
        assert!(answer.contains("\"state\"") && !answer.contains("\"error\""), "start {start}: {answer}");
        a.stop();
    }
}
