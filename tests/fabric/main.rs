//! The fabric over real nats-servers on loopback.

mod support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use litemesh::fabric::link::{Incoming, Outgoing};
use support::{Site, eventually, last_logged, log_messages};

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_node_founds_its_cluster_and_serves_its_log() {
    let site = Site::new("a");
    let started = Instant::now();
    let node = site.start(None).await;
    eprintln!("first start: {:?}", started.elapsed());
    node.log_exists().await;
    eprintln!("log after: {:?}", started.elapsed());
    let db: litemesh::core::names::DbName = "app".parse().expect("a name");
    for _ in 0..3 {
        let payload = Bytes::from_static(b"commit");
        node.fabric.send(Outgoing::Commit { db: db.clone(), site: 7, payload }).await.expect("sent");
    }
    eventually("the log has all", async || node.fabric.server_info().await.log.acked == 3).await;
    node.fabric.shutdown().await;

    let started = Instant::now();
    let node = site.start(None).await;
    eprintln!("later start: {:?}", started.elapsed());
    let client = site.look_inside().await;
    let kept = async || {
        last_logged(&client, &site.name, "lm.c.a.app.0000000000000007").await.as_deref() == Some(b"commit")
    };
    eventually("the log is served again", kept).await;
    eprintln!("log after: {:?}", started.elapsed());
    node.fabric.shutdown().await;
}
