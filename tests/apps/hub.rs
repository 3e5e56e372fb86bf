//! Another NATS system beside the mesh, which the programs' account is connected to as a leafnode.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use futures::StreamExt;
use serde_json::Value;

use crate::support::{Node, free_addresses, wait_for};

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
    fn start(program: &Path, dir: &Path, [client, leaf]: [SocketAddr; 2]) -> Self {
        let conf = format!(
            "server_name: hub\nlisten: \"{client}\"\nleafnodes {{ listen: \"{leaf}\" }}\njetstream {{ store_dir: {:?} }}\n\
             accounts {{ HUB {{ jetstream: enabled, users: [{{user: leaf, password: secret-of-the-hub}}, {{user: app, \
             password: p}}] }} }}\n",
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
    let hub = tokio::task::block_in_place(|| Hub::start(&program, dir.path(), addresses));
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
