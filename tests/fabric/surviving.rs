//! What works when others are gone: the facts about nats-server that the design stands on.

use std::time::Instant;

use litemesh::fabric::JoinToken;
use litemesh::fabric::keys::MeshKey;
use serde_json::json;

use crate::support::{Site, api, commit, eventually, last_logged, log_messages, pair, until_heard};

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_survivor_started_after_kill_9_serves_its_log() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let (a, b) = pair(&a_site, &b_site).await;
    a.log_exists().await;
    b.log_exists().await;
    a.fabric.send(commit(b"before")).await.expect("sent");
    eventually("the log has it", async || a.fabric.server_info().await.log.acked > 0).await;
    a.kill_9().await;
    b.kill_9().await;

    let started = Instant::now();
    let a = a_site.start(None).await;
    let ready = started.elapsed();
    let client = a_site.look_inside().await;
    let kept = async || last_logged(&client, &a_site.name).await.as_deref() == Some(b"before");
    eventually("what was logged before is read", kept).await;
    let read = started.elapsed();
    a.fabric.send(commit(b"after")).await.expect("sent");
    eventually("the log takes more", async || a.fabric.server_info().await.log.acked > 0).await;
    assert_eq!(last_logged(&client, &a_site.name).await.as_deref(), Some(&b"after"[..]));
    println!("alone: ready {ready:?}, log read {read:?}, log written {:?}", started.elapsed());
    // Half of the two do not decide anything: no new stream, and no harm in that.
    let created = api(&client, "$JS.API.STREAM.CREATE.other", json!({ "name": "other" })).await;
    assert!(created.is_none_or(|answer| answer.get("error").is_some()), "no leader, no new stream");

    let info = a.fabric.server_info().await;
    assert!(info.healthy && info.restarts == 0, "alone is not ill: {info:?}");

    let mut b = b_site.start(None).await;
    until_heard(&a, &mut b, "together again").await;
    eventually("nothing was lost", async || log_messages(&client, &a_site.name).await == Some(2)).await;
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_takes_over_the_name_of_a_dead_node() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let (a, b) = pair(&a_site, &b_site).await;
    b.log_exists().await;
    let join = a.fabric.join_token().expect("a token");
    b.kill_9().await;

    let mut new_site = Site::new("b");
    // At the address that the others know.
    (new_site.cluster, new_site.client) = (b_site.cluster, b_site.client);
    let started = Instant::now();
    let mut b = new_site.start(Some(join)).await;
    until_heard(&a, &mut b, "welcome back").await;
    let heard = started.elapsed();
    b.log_exists().await;
    b.fabric.send(commit(b"new life")).await.expect("sent");
    eventually("its log works", async || b.fabric.server_info().await.log.acked > 0).await;
    println!("replacement: messages {heard:?}, log {:?}", started.elapsed());
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_node_that_lost_its_disk_returns_and_founds_nothing() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    // With its own token, as all nodes are started where one line serves for all.
    let key = MeshKey::generate().expect("randomness");
    let token = JoinToken::new(key, vec![a_site.cluster.into()]).expect("has an address");
    let a = a_site.start(Some(token.clone())).await;
    let mut b = b_site.start(Some(token.clone())).await;
    until_heard(&a, &mut b, "hello b").await;
    b.log_exists().await;
    b.fabric.send(commit(b"b's own")).await.expect("sent");
    eventually("the log has it", async || b.fabric.server_info().await.log.acked > 0).await;
    a.kill_9().await;

    let mut new_site = Site::new("a");
    (new_site.cluster, new_site.client) = (a_site.cluster, a_site.client);
    let a = new_site.start(Some(token)).await;
    until_heard(&a, &mut b, "back again").await;
    a.log_exists().await;
    let client = b_site.look_inside().await;
    eventually("b's log is whole", async || log_messages(&client, &b_site.name).await == Some(1)).await;
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
}
