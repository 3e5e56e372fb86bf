//! What it costs to tell programs of changes over NATS: when nobody listens, and when somebody does.

use std::time::Duration;

use futures::StreamExt;
use serde_json::Value;

use super::support::Node;
use super::{INSERT, SCHEMA, open, processor_s, transactions};

const ROWS: i64 = 200_000;
const SIZE: i64 = 100;

/// Processor time a row of litemesh and of its server, without `--cdc`, with it and nobody there, and with a subscriber.
pub fn unheard() {
    for (what, extra, listens) in [
        ("without --cdc", None, false),
        ("--cdc, nobody listens", Some("--cdc"), false),
        ("--cdc, somebody listens", Some("--cdc"), true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut node = Node::new(dir.path(), "n", &["app.db"]);
        node.extra.extend(extra.map(str::to_owned));
        node.exec("app.db", SCHEMA);
        node.start(None);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let heard = listens.then(|| runtime.block_on(subscribe(&node)));
        let listener = heard.map(|mut heard| {
            runtime.spawn(async move {
                for _ in 0..ROWS {
                    heard.next().await.unwrap();
                }
            })
        });
        let pids = [node.process.as_ref().unwrap().id(), node.server_pid() as u32];
        let before = pids.map(processor_s);
        let rate = transactions(&mut open(&node.file("app.db")), 1, ROWS / SIZE, SIZE, INSERT);
        node.sync();
        if let Some(listener) = listener {
            runtime.block_on(listener).unwrap();
        }
        std::thread::sleep(Duration::from_secs(2));
        let used = [0, 1].map(|i| (processor_s(pids[i]) - before[i]) * 1e6 / ROWS as f64);
        println!(
            "{what}: {rate:.0} rows/s written, {:.1} us/row of litemesh, {:.1} of nats-server",
            used[0], used[1]
        );
    }
}

async fn subscribe(node: &Node) -> async_nats::Subscriber {
    let settings: Value = serde_json::from_slice(&node.run(&["env", "--json"]).stdout).unwrap();
    let word = |name: &str| settings[name].as_str().unwrap().to_owned();
    let options = async_nats::ConnectOptions::with_user_and_password(word("user"), word("password"));
    let client = options.subscription_capacity(1_000_000).connect(word("url")).await.unwrap();
    let heard = client.subscribe("cdc.>").await.unwrap();
    client.flush().await.unwrap();
    heard
}
