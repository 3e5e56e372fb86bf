//! What two nodes say to each other.

use std::time::{Duration, Instant};

use bytes::Bytes;
use litemesh::fabric::link::{Incoming, Outgoing};
use litemesh::fabric::{FabricError, MAX_MESSAGE_BYTES};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Node, Site, commit, eventually, pair, until_heard};

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_exchange_all_kinds() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let (a, mut b) = pair(&a_site, &b_site).await;
    a.fabric.send(commit(b"from a")).await.expect("sent");
    let (from, db, site, payload) = b
        .receive(|incoming| match incoming {
            Incoming::Commit { from, db, site, payload } => Some((from, db, site, payload)),
            Incoming::Message { .. } | Incoming::Logged(_) => None,
        })
        .await;
    assert_eq!((from.as_str(), db.as_str(), site, &payload[..]), ("a", "app", 7, &b"from a"[..]));

    let large = Bytes::from(vec![7; 4 * 1024 * 1024]);
    let to = b_site.name.clone();
    a.fabric.send(Outgoing::Direct { to, payload: large.clone() }).await.expect("sent");
    let got = b.receive(message_of("a", |payload| payload.len() > 100)).await;
    assert_eq!(got, large);

    let to = "somebody-else".parse().expect("a name");
    a.fabric.send(Outgoing::Direct { to, payload: "not for b".into() }).await.expect("sent");
    a.fabric.send(Outgoing::Broadcast { payload: "for all".into() }).await.expect("sent");
    let next = b.receive(message_of("a", |_| true)).await;
    assert_eq!(next, "for all", "what is for another does not arrive");

    let payload = Bytes::from(vec![0; MAX_MESSAGE_BYTES + 1]);
    let refused = a.fabric.send(Outgoing::Broadcast { payload }).await;
    assert!(matches!(refused, Err(FabricError::TooLarge { .. })));
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_messages_do_not_come_back() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let (mut a, mut b) = pair(&a_site, &b_site).await;
    a.fabric.send(commit(b"x")).await.expect("sent");
    a.fabric.send(Outgoing::Broadcast { payload: "x".into() }).await.expect("sent");
    let to = a_site.name.clone();
    a.fabric.send(Outgoing::Direct { to, payload: "x".into() }).await.expect("sent");
    a.fabric.flush().await.expect("the server has them");
    // The next one that arrives is b's: nothing of ours was in front of it.
    until_heard(&b, &mut a, "the end").await;
    b.receive(message_of("a", |payload| payload == "x")).await;
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_take_messages_holds_nobody_up() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let (a, mut b) = pair(&a_site, &b_site).await;
    // Twice what b's channel holds.
    for _ in 0..300 {
        a.fabric.send(commit(b"x")).await.expect("sent");
        a.fabric.send(Outgoing::Broadcast { payload: "x".into() }).await.expect("sent");
    }
    let dropped = async || {
        let info = b.fabric.server_info().await;
        info.dropped_commits > 0 && info.dropped_messages > 0
    };
    eventually("what does not fit is counted", dropped).await;
    let taken = async { while b.incoming.recv().await.is_some_and(|next| !is_end(&next)) {} };
    let end = async {
        loop {
            a.fabric.send(Outgoing::Broadcast { payload: "end".into() }).await.expect("sent");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! { () = taken => {}, () = end => {} }
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
}

fn is_end(incoming: &Incoming) -> bool {
    matches!(incoming, Incoming::Message { payload, .. } if payload == "end")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_comes_back_and_messages_flow_again() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let (mut a, mut b) = pair(&a_site, &b_site).await;
    a.log_exists().await;
    let pid = a.fabric.server_info().await.pid.expect("it runs");
    let pid = Pid::from_raw(i32::try_from(pid).expect("an id")).expect("not zero");
    let killed = Instant::now();
    kill_process(pid, Signal::KILL).expect("ours");
    let refused = async || {
        let sent = a.fabric.send(Outgoing::Broadcast { payload: "lost".into() }).await;
        matches!(sent, Err(FabricError::NotConnected)) || a.fabric.server_info().await.restarts == 1
    };
    eventually("the loss is told or the server is back", refused).await;
    until_heard(&a, &mut b, "there").await;
    until_heard(&b, &mut a, "back").await;
    println!("messages flow again after {:?}", killed.elapsed());
    assert_eq!(a.fabric.server_info().await.restarts, 1);
    let logged = async || {
        a.fabric.send(commit(b"x")).await.expect("sent");
        a.fabric.server_info().await.log.acked > 0
    };
    eventually("the log goes on", logged).await;
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_message_is_quick() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let (mut a, mut b) = pair(&a_site, &b_site).await;
    let mut rounds_us: Vec<u128> = Vec::new();
    for _ in 0..300 {
        let started = Instant::now();
        echo(&a, &mut b).await;
        echo(&b, &mut a).await;
        rounds_us.push(started.elapsed().as_micros());
    }
    rounds_us.sort_unstable();
    let (half_us, p99_us) = (rounds_us[150] / 2, rounds_us[297] / 2);
    println!("one hop: median {half_us} us, p99 {p99_us} us");
    assert!(half_us < 2_000, "a hop takes {half_us} us");
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
}

async fn echo(from: &Node, to: &mut Node) {
    from.fabric.send(commit(b"ping")).await.expect("sent");
    to.receive(|incoming| matches!(incoming, Incoming::Commit { .. }).then_some(())).await;
}

fn message_of(sender: &'static str, fits: impl Fn(&Bytes) -> bool) -> impl FnMut(Incoming) -> Option<Bytes> {
    move |incoming| match incoming {
        Incoming::Message { from, payload } if from.as_str() == sender && fits(&payload) => Some(payload),
        _ => None,
    }
}
