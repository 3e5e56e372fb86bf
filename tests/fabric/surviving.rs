//! What works when others are gone: the facts about nats-server that the design stands on.

use std::time::{Duration, Instant};

use litemesh::fabric::JoinToken;
use litemesh::fabric::keys::MeshKey;
use serde_json::{Value, json};

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

/// What was until then: a peer that comes back has lost nothing, and the survivor has waited for it in one of these ways.
#[derive(Debug, Clone, Copy)]
enum Survivor {
    /// It ran all the time.
    RanOn,
    /// It was killed and started again, alone.
    StartedAlone,
    /// Both were killed at one moment, and it was the first to be back.
    FirstOfBoth,
}

/// How long after its start a peer that comes back is heard and hears, new streams can be made on both, and one with a copy on
/// each takes messages again.
async fn resumes_after(a_site: &Site, b_site: &Site, survivor: Survivor, alone: Duration) -> [Duration; 3] {
    let (mut a, b) = pair(a_site, b_site).await;
    a.log_exists().await;
    b.log_exists().await;
    let copied = json!({ "name": "both", "subjects": ["both"], "num_replicas": 2 });
    let client = a_site.app().await;
    let made = async || api(&client, "$JS.API.STREAM.CREATE.both", copied.clone()).await.is_some_and(is_good);
    eventually("a stream with two copies is made", made).await;
    b.kill_9().await;
    if !matches!(survivor, Survivor::RanOn) {
        if matches!(survivor, Survivor::StartedAlone) {
            eventually("nobody leads", async || a.fabric.server_info().await.leader.is_none()).await;
        }
        a.kill_9().await;
        a = a_site.start(None).await;
    }
    tokio::time::sleep(alone).await;
    let started = Instant::now();
    let mut b = b_site.start(None).await;
    until_heard(&a, &mut b, "welcome back").await;
    until_heard(&b, &mut a, "thanks").await;
    let heard = started.elapsed();
    for site in [a_site, b_site] {
        let (client, name) = (site.app().await, format!("new_{}", site.name));
        let subject = format!("$JS.API.STREAM.CREATE.{name}");
        let tags = [format!("node:{}", site.name)];
        let config = json!({ "name": name, "subjects": [name], "placement": { "tags": tags } });
        let made = async || api(&client, &subject, config.clone()).await.is_some_and(is_good);
        eventually("a new stream is made", made).await;
    }
    let made = started.elapsed();
    let client = a_site.app().await;
    let taken = async || api(&client, "both", json!("x")).await.is_some_and(is_good);
    eventually("the stream with two copies takes a message", taken).await;
    let taken = started.elapsed();
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
    [heard, made, taken]
}

fn is_good(answer: Value) -> bool {
    answer.get("error").is_none()
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_resumes_soon_after_the_peer_is_back() {
    let rounds = std::env::var("LITEMESH_TEST_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    for round in 0..rounds {
        for survivor in [Survivor::RanOn, Survivor::StartedAlone, Survivor::FirstOfBoth] {
            let (a, b) = (Site::new("a"), Site::new("b"));
            // At another moment between two elections each time.
            let alone = Duration::from_millis(12_000 + round * 700);
            let [heard, made, taken] = resumes_after(&a, &b, survivor, alone).await;
            println!(
                "{survivor:?}: heard {heard:?}, new streams {made:?}, a stream with two copies {taken:?}"
            );
            assert!(taken < Duration::from_secs(20), "{survivor:?}: {taken:?}");
        }
    }
}
