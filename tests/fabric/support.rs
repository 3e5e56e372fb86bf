//! Nodes on loopback. Everything waits for a condition, with a generous bound; every server dies with its node.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use litemesh::core::names::NodeName;
use litemesh::fabric::accounts::{APP_USER, Accounts, MESH_USER, Password};
use litemesh::fabric::link::{Incoming, Outgoing};
use litemesh::fabric::{Fabric, FabricError, FabricOptions, JoinToken, StateDir};
use rustix::process::{Pid, test_kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc::Receiver;
use tokio::time::timeout;

pub const PATIENCE: Duration = Duration::from_secs(30);

/// A node whose state outlives its process.
pub struct Site {
    pub name: NodeName,
    pub dir: TempDir,
    pub cluster: SocketAddr,
    pub client: SocketAddr,
}

/// A node that runs.
pub struct Node {
    pub fabric: Fabric,
    pub incoming: Receiver<Incoming>,
}

/// No two of this process, and none that an outgoing connection may take while its owner is down.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    loop {
        let count = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + (std::process::id() as usize * 101 + count * 7) % 5_000;
        let address = SocketAddr::from(([127, 0, 0, 1], u16::try_from(port).expect("below 15,000")));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

impl Site {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.parse().expect("a name"),
            dir: tempfile::tempdir().expect("a directory"),
            cluster: free_address(),
            client: free_address(),
        }
    }

    pub fn options(&self, join: Option<JoinToken>) -> FabricOptions {
        let state = self.dir.path().join("state");
        let mut options = FabricOptions::new(self.name.clone(), state, self.cluster, self.client);
        options.join = join;
        options
    }

    pub async fn try_start(&self, join: Option<JoinToken>) -> Result<Node, FabricError> {
        let (fabric, incoming) = Fabric::start(self.options(join)).await?;
        Ok(Node { fabric, incoming })
    }

    pub async fn start(&self, join: Option<JoinToken>) -> Node {
        self.try_start(join).await.expect("the node starts")
    }

    pub fn state(&self) -> StateDir {
        StateDir::new(&self.dir.path().join("state"))
    }

    /// A connection as our own account, to look behind the scenes.
    pub async fn look_inside(&self) -> async_nats::Client {
        self.log_in(MESH_USER, |accounts| accounts.mesh).await
    }

    /// A connection as a program of the host.
    pub async fn app(&self) -> async_nats::Client {
        self.log_in(APP_USER, |accounts| accounts.app).await
    }

    async fn log_in(&self, user: &str, password: impl Fn(Accounts) -> Password) -> async_nats::Client {
        let accounts = Accounts::load_or_create(&self.state().accounts()).expect("readable");
        let password = password(accounts).reveal().to_owned();
        let attempt = async || {
            let (user, password) = (user.to_owned(), password.clone());
            let options = async_nats::ConnectOptions::with_user_and_password(user, password);
            options.connect(format!("nats://{}", self.client)).await
        };
        // A server that is just reading its configuration anew turns away who has not said its name yet.
        for _ in 0..20 {
            match attempt().await {
                Ok(client) => return client,
                Err(e) if e.kind() == async_nats::ConnectErrorKind::AuthorizationViolation => {}
                Err(e) => panic!("it connects: {e}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{user} is turned away every time")
    }
}

impl Node {
    /// The next message that fits.
    pub async fn receive<T>(&mut self, mut fits: impl FnMut(Incoming) -> Option<T>) -> T {
        let wait = async {
            loop {
                let incoming = self.incoming.recv().await.expect("the fabric runs");
                if let Some(found) = fits(incoming) {
                    return found;
                }
            }
        };
        timeout(PATIENCE, wait).await.expect("the message arrives")
    }

    /// As a power cut would end it: nothing is flushed, the server gets no signal it could handle.
    pub async fn kill_9(self) {
        let pid = self.fabric.server_info().await.pid.expect("it runs");
        drop(self);
        let pid = Pid::from_raw(i32::try_from(pid).expect("an id")).expect("not zero");
        eventually("the server is gone", async || test_kill_process(pid).is_err()).await;
    }

    pub async fn log_exists(&self) {
        eventually("the log's stream is made", async || self.fabric.server_info().await.log.exists).await;
    }

    pub async fn connected_to(&self, peer: &str) {
        let connected = async || self.fabric.server_info().await.routes.iter().any(|name| name == peer);
        eventually("the servers are connected", connected).await;
    }
}

/// Two nodes of one mesh that hear each other.
pub async fn pair(a_site: &Site, b_site: &Site) -> (Node, Node) {
    let mut a = a_site.start(None).await;
    let mut b = b_site.start(Some(a.fabric.join_token().expect("a token"))).await;
    until_heard(&a, &mut b, "hello b").await;
    until_heard(&b, &mut a, "hello a").await;
    // What was said more often than it had to be must not turn up in a test.
    a.fabric.flush().await.expect("flushed");
    while b.incoming.try_recv().is_ok() {}
    (a, b)
}

/// A commit of site 7 of the database `app`.
pub fn commit(payload: &'static [u8]) -> Outgoing {
    let db = "app".parse().expect("a name");
    Outgoing::Commit { db, site: 7, payload: Bytes::from_static(payload) }
}

/// Passes connections on, and counts them.
pub struct Relay(Arc<AtomicUsize>);

impl Relay {
    pub async fn start(to: SocketAddr) -> (SocketAddr, Self) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let count = Arc::new(AtomicUsize::new(0));
        let counter = count.clone();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    let mut far = tokio::net::TcpStream::connect(to).await?;
                    tokio::io::copy_bidirectional(&mut near, &mut far).await
                });
            }
        });
        (address, Self(count))
    }

    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Sends until `receiver` has got it: interest in a subject takes a moment to spread through a new cluster.
pub async fn until_heard(sender: &Node, receiver: &mut Node, text: &'static str) {
    let wait = async {
        loop {
            let payload = Bytes::from_static(text.as_bytes());
            // A sender that is not connected at the moment tries again like any other.
            let _ = sender.fabric.send(Outgoing::Broadcast { payload }).await;
            let heard = timeout(Duration::from_millis(50), receiver.incoming.recv()).await;
            if matches!(heard, Ok(Some(Incoming::Message { payload, .. })) if payload == text.as_bytes()) {
                return;
            }
        }
    };
    timeout(PATIENCE, wait).await.expect("the message gets through");
}

pub async fn eventually(what: &str, holds: impl AsyncFnMut() -> bool) {
    within(PATIENCE, what, holds).await;
}

pub async fn within(patience: Duration, what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let until = Instant::now() + patience;
    while !holds().await {
        assert!(Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Asks JetStream; `None` when it does not answer in a moment.
pub async fn api(client: &async_nats::Client, subject: &str, request: Value) -> Option<Value> {
    let answer =
        timeout(Duration::from_secs(1), client.request(subject.to_owned(), request.to_string().into()));
    serde_json::from_slice(&answer.await.ok()?.ok()?.payload).ok()
}

/// How many messages a node's log holds.
pub async fn log_messages(client: &async_nats::Client, node: &NodeName) -> Option<u64> {
    let name = litemesh::fabric::stream_name(node);
    let info = api(client, &format!("$JS.API.STREAM.INFO.{name}"), json!({})).await?;
    info["state"]["messages"].as_u64()
}

/// The last commit of [`commit`]'s site in a node's log, read without any leader.
pub async fn last_logged(client: &async_nats::Client, node: &NodeName) -> Option<Bytes> {
    let name = litemesh::fabric::stream_name(node);
    let subject = format!("lm.c.{node}.app.0000000000000007");
    let request = client.request(format!("$JS.API.DIRECT.GET.{name}.{subject}"), Bytes::new());
    let answer = timeout(Duration::from_secs(1), request).await.ok()?.ok()?;
    answer.headers.is_some().then_some(answer.payload)
}

/// Every file of a directory tree.
pub fn files_below(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("readable").flatten() {
        if entry.file_type().expect("has one").is_dir() {
            found.extend(files_below(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}
