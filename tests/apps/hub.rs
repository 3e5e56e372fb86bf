//! Another NATS system beside the mesh, which the programs' account is connected to as a leafnode.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use futures::StreamExt;
use serde_json::Value;

use crate::support::authority::authority;
use crate::support::operator::Operator;
use crate::support::{Node, free_addresses, wait_for};

const USERS: &str = "accounts { HUB { jetstream: enabled, users: [{user: leaf, password: secret-of-the-hub}, {user: app, \
                     password: p}] } }\n";

/// A nats-server that knows nothing of litemesh; it is stopped when dropped.
struct Hub {
    process: Child,
    client: SocketAddr,
    leaf: SocketAddr,
}

impl Drop for Hub {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

impl Hub {
    /// With what its configuration says of its users, and of its leafnode port.
    fn start(program: &Path, dir: &Path, [client, leaf]: [SocketAddr; 2], users: &str, port: &str) -> Self {
        let conf = format!(
            "server_name: hub\nlisten: \"{client}\"\nleafnodes {{ listen: \"{leaf}\"\n{port} }}\njetstream {{ store_dir: \
             {:?} }}\n{users}",
            dir.join("hub")
        );
        std::fs::write(dir.join("hub.conf"), conf).unwrap();
        let log = std::fs::File::create(dir.join("hub.log")).unwrap();
        let mut command = Command::new(program);
        command.arg("-c").arg(dir.join("hub.conf")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let hub = Self { process: command.spawn().unwrap(), client, leaf };
        wait_for("the hub listens", || std::net::TcpStream::connect(client).is_ok());
        hub
    }

    async fn connect(&self) -> async_nats::Client {
        let options = async_nats::ConnectOptions::with_user_and_password("app".to_owned(), "p".to_owned());
        options.connect(format!("nats://{}", self.client)).await.unwrap()
    }
}

async fn connect(node: &Node) -> async_nats::Client {
    let output = node.run(&["env", "--json"]);
    let settings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let word = |name: &str| settings[name].as_str().unwrap().to_owned();
    let options = async_nats::ConnectOptions::with_user_and_password(word("user"), word("password"));
    options.connect(word("url")).await.unwrap()
}

/// What arrives first, while it is said again and again.
async fn heard(
    heard: &mut async_nats::Subscriber,
    speaker: &async_nats::Client,
    text: &'static str,
) -> String {
    let speak = async {
        loop {
            speaker.publish("news", text.into()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let listen = async {
        loop {
            let message = heard.next().await.unwrap();
            if message.payload == text {
                return text.to_owned();
            }
        }
    };
    let both = async {
        tokio::select! { said = listen => said, () = speak => unreachable!() }
    };
    tokio::time::timeout(crate::support::PATIENCE, both).await.expect("it is heard")
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_at_the_hub_and_on_the_nodes_hear_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let program = nats_launcher::Bundle::install(&dir.path().join("bin")).unwrap();
    let addresses = free_addresses(2);
    let addresses = [addresses[0], addresses[1]];
    let (mut a, mut b) = (Node::new(dir.path(), "a", &["app.db"]), Node::new(dir.path(), "b", &["app.db"]));
    for node in [&mut a, &mut b] {
        let url = format!("nats-leaf://leaf:secret-of-the-hub@{}", addresses[1]);
        node.variables.push(("LITEMESH_LEAF_URL".to_owned(), url));
        node.extra.push("--cdc".to_owned());
    }
    a.exec("app.db", "CREATE TABLE t(id TEXT PRIMARY KEY, v)");
    // The hub is away: nothing waits for it.
    tokio::task::block_in_place(|| {
        a.start(None);
        b.start(Some(&a.token()));
        a.exec("app.db", "INSERT INTO t VALUES('x', 1)");
        wait_for("b has it", || b.text("app.db", "SELECT count(*) || '' FROM t") == "1");
    });
    let hub = tokio::task::block_in_place(|| Hub::start(&program, dir.path(), addresses, USERS, ""));
    assert_eq!(hub.leaf, addresses[1]);
    let (at_hub, at_a, at_b) = (hub.connect().await, connect(&a).await, connect(&b).await);
    let mut to_hub = at_hub.subscribe("news").await.unwrap();
    let mut to_b = at_b.subscribe("news").await.unwrap();
    let mut changes = at_hub.subscribe("cdc.>").await.unwrap();
    let mut ours = at_hub.subscribe("lm.>").await.unwrap();
    at_hub.flush().await.unwrap();
    at_b.flush().await.unwrap();
    heard(&mut to_hub, &at_a, "from a").await;
    heard(&mut to_b, &at_hub, "from the hub").await;
    heard(&mut to_hub, &at_b, "from b").await;
    // Streams of the two sides are apart.
    let config = stream::Config {
        name: "SAME".to_owned(),
        subjects: vec!["same.subject".to_owned()],
        ..Default::default()
    };
    jetstream::new(at_hub.clone()).create_stream(config).await.unwrap();
    let there = jetstream::new(at_a.clone()).get_stream("SAME").await;
    assert!(there.is_err(), "the mesh's JetStream is its own");
    // Both nodes tell the hub of a change, under one id; and nothing of litemesh's own goes there.
    a.exec("app.db", "INSERT INTO t VALUES('y', 1)");
    let mut ids = Vec::new();
    for _ in 0..2 {
        let told = tokio::time::timeout(crate::support::PATIENCE, changes.next()).await.unwrap().unwrap();
        let change: Value = serde_json::from_slice(&told.payload).unwrap();
        assert_eq!(change["key"]["id"], "y");
        ids.push(change["id"].clone());
    }
    assert_eq!(ids[0], ids[1]);
    assert!(tokio::time::timeout(Duration::from_millis(300), ours.next()).await.is_err());
    for node in [&a, &b] {
        assert!(!node.log.lock().unwrap().iter().any(|l| l.contains("secret-of-the-hub")), "{}", node.name);
    }
}

fn logged(node: &Node, words: &[&str]) -> bool {
    node.log.lock().unwrap().iter().any(|line| words.iter().all(|word| line.contains(word)))
}

/// A node whose programs' account is connected to a hub, with these options.
fn spoke(dir: &Path, name: &str, url: String, options: &[&str]) -> Node {
    let mut node = Node::new(dir, name, &["app.db"]);
    node.variables.push(("LITEMESH_LEAF_URL".to_owned(), url));
    node.extra = options.iter().map(|o| (*o).to_owned()).collect();
    node
}

/// Expects that a node works though its hub does not let it in, and says why.
fn refused(mut node: Node, words: &[&str]) {
    node.exec("app.db", "CREATE TABLE t(id TEXT PRIMARY KEY)");
    node.start(None);
    node.exec("app.db", "INSERT INTO t VALUES('x')");
    node.sync();
    wait_for(&format!("{} says {words:?}", node.name), || logged(&node, words));
    let warned = |status: &Value| words.iter().all(|word| status["warnings"].to_string().contains(word));
    wait_for("status says it, too", || warned(&node.status()));
    let status = node.status();
    assert_eq!((&status["ready"], &status["fabric"]["connected"]), (&true.into(), &true.into()));
    assert!(!logged(&node, &["secret-of-the-hub"]) && !status.to_string().contains("secret-of-the-hub"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_over_tls_with_a_password() {
    let dir = tempfile::tempdir().unwrap();
    let program = nats_launcher::Bundle::install(&dir.path().join("bin")).unwrap();
    let addresses = [free_addresses(1)[0], free_addresses(1)[0]];
    let (ca, cert, key) = authority(dir.path(), "good");
    let (other_ca, ..) = authority(dir.path(), "other");
    let tls = format!("tls {{ cert_file: {cert:?}, key_file: {key:?}, timeout: 5 }}");
    let url = format!("tls://leaf:secret-of-the-hub@{}", addresses[1]);
    let wrong = format!("tls://leaf:not-secret-of-the-hub@{}", addresses[1]);
    let mut a = spoke(dir.path(), "a", url.clone(), &["--leaf-ca", &ca]);
    a.exec("app.db", "CREATE TABLE t(id TEXT PRIMARY KEY)");
    let hub = tokio::task::block_in_place(|| {
        let hub = Hub::start(&program, dir.path(), addresses, USERS, &tls);
        a.start(None);
        refused(spoke(dir.path(), "b", url.clone(), &["--leaf-ca", &other_ca]), &["hub", "--leaf-ca"]);
        refused(spoke(dir.path(), "c", url.clone(), &[]), &["hub", "--leaf-ca"]);
        refused(spoke(dir.path(), "d", wrong, &["--leaf-ca", &ca]), &["hub", "user and password"]);
        hub
    });
    let (at_hub, at_a) = (hub.connect().await, connect(&a).await);
    both_ways(&at_hub, &at_a).await;
    wait_for("it is told", || logged(&a, &["is connected to the hub at"]));
    drop(hub);
    wait_for("its end, too", || a.status()["warnings"].to_string().contains("it cannot be reached"));
    let _hub = Hub::start(&program, dir.path(), addresses, USERS, &tls);
    wait_for("and that it is back", || !a.status()["warnings"].to_string().contains("hub"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_over_tls_with_credentials_of_its_operator() {
    let dir = tempfile::tempdir().unwrap();
    let program = nats_launcher::Bundle::install(&dir.path().join("bin")).unwrap();
    let addresses = [free_addresses(1)[0], free_addresses(1)[0]];
    let (ca, cert, key) = authority(dir.path(), "good");
    let tls = format!("tls {{ cert_file: {cert:?}, key_file: {key:?}, timeout: 5 }}");
    let (operator, other) = (Operator::new(), Operator::new());
    let (ours, at_the_hub) = (operator.user(dir.path(), "leaf"), operator.user(dir.path(), "app"));
    let foreign = other.user(dir.path(), "foreign");
    let url = format!("tls://{}", addresses[1]);
    let with = |name: &str, credentials: &Path| {
        let credentials = credentials.display().to_string();
        spoke(dir.path(), name, url.clone(), &["--leaf-ca", &ca, "--leaf-credentials", &credentials])
    };
    let mut a = with("a", &ours);
    a.exec("app.db", "CREATE TABLE t(id TEXT PRIMARY KEY)");
    let hub = tokio::task::block_in_place(|| {
        let hub = Hub::start(&program, dir.path(), addresses, &operator.conf(), &tls);
        a.start(None);
        refused(with("b", &foreign), &["hub", "--leaf-credentials"]);
        hub
    });
    let options = async_nats::ConnectOptions::with_credentials_file(at_the_hub).await.unwrap();
    let at_hub = options.connect(format!("nats://{}", hub.client)).await.unwrap();
    both_ways(&at_hub, &connect(&a).await).await;
}

/// What either says the other hears.
async fn both_ways(at_hub: &async_nats::Client, at_node: &async_nats::Client) {
    let mut to_hub = at_hub.subscribe("news").await.unwrap();
    at_hub.flush().await.unwrap();
    heard(&mut to_hub, at_node, "from the node").await;
    let mut to_node = at_node.subscribe("news").await.unwrap();
    at_node.flush().await.unwrap();
    heard(&mut to_node, at_hub, "from the hub").await;
}
