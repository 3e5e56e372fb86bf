//! Reading a peer's log: what the stream holds after a commit, found by the commit's number.

use bytes::Bytes;
use litemesh::core::message::{CommitHeader, Fragment, decode, encode};
use litemesh::core::version::Hlc;
use litemesh::fabric::link::{Incoming, LogEnd, LogRequest, Logged, Outgoing};
use serde_json::json;

use crate::support::{Node, Site, api, eventually, pair};

/// A commit of site 7 in pieces.
fn pieces(from: u64, to: u64, count: u32) -> Vec<Bytes> {
    let header = CommitHeader { from, to, id: to, prev: from, hlc: Hlc(to), seen: vec![], rows: 0 };
    let header = encode(&header);
    let mut data = (header.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(&header);
    data.resize(1_000, 0);
    let piece = |index| Fragment {
        attempt: to,
        index,
        last: index + 1 == count,
        data: if index == 0 { Bytes::from(data.clone()) } else { Bytes::from(vec![1; 1_000]) },
    };
    (0..count).map(|index| encode(&piece(index))).collect()
}

async fn publish(node: &Node, site: u64, pieces: Vec<Bytes>) {
    for payload in pieces {
        let db = "app".parse().expect("a name");
        node.fabric.send(Outgoing::Commit { db, site, payload }).await.expect("sent");
    }
}

fn request(node: &str, site: u64, after: u64, max_bytes: usize) -> LogRequest {
    let (node, db) = (node.parse().expect("a name"), "app".parse().expect("a name"));
    LogRequest { node, db, site, after, position: None, max_bytes, request: 1 }
}

async fn read(node: &mut Node, asked: &LogRequest) -> Logged {
    node.fabric.send(Outgoing::ReadLog(asked.clone())).await.expect("taken");
    node.receive(|incoming| match incoming {
        Incoming::Logged(logged) if logged.asked == *asked => Some(logged),
        _ => None,
    })
    .await
}

/// What begins in what was read.
fn starts(logged: &Logged) -> Vec<u64> {
    let begins = |p: &Bytes| decode::<Fragment>(p).expect("a piece").begins();
    logged.pieces.iter().filter_map(begins).map(|h| h.to).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peers_log_is_read_from_any_commit_on() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let (a, mut b) = pair(&a_site, &b_site).await;
    a.log_exists().await;
    let mut sent = 0;
    for n in 0..60 {
        // Every seventh is long, and another feed's lie between.
        let commit = pieces(n, n + 1, if n % 7 == 3 { 9 } else { 1 });
        sent += 1 + commit.len() as u64;
        publish(&a, 7, commit).await;
        publish(&a, 8, pieces(n, n + 1, 1)).await;
    }
    eventually("the log has all", async || a.fabric.server_info().await.log.acked == sent).await;
    for after in [0, 1, 2, 3, 4, 5, 24, 25, 31, 58, 59] {
        let logged = read(&mut b, &request("a", 7, after, 1 << 20)).await;
        assert_eq!(starts(&logged), (after + 1..=60).collect::<Vec<_>>(), "after {after}: {:?}", logged.end);
        assert_eq!(logged.end, LogEnd::End);
    }
    let logged = read(&mut b, &request("a", 7, 60, 1 << 20)).await;
    assert!(logged.pieces.is_empty() && logged.end == LogEnd::End, "nothing follows: {:?}", logged.end);

    // In parts, which may end within a commit.
    let (mut asked, mut all, mut parts) = (request("a", 7, 2, 4_000), Vec::new(), 0);
    loop {
        let logged = read(&mut b, &asked).await;
        all.extend(logged.pieces);
        parts += 1;
        match logged.end {
            LogEnd::More(position) => asked.position = Some(position),
            LogEnd::End => break,
            LogEnd::Gone(why) => panic!("{why}"),
        }
    }
    let whole = read(&mut b, &request("a", 7, 2, 1 << 20)).await;
    assert!(parts > 10 && all == whole.pieces, "{parts} parts");
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_does_not_help_says_so() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let (a, mut b) = pair(&a_site, &b_site).await;
    a.log_exists().await;
    for n in [0, 1, 2, 5, 6, 7] {
        publish(&a, 7, pieces(n, n + 1, 1)).await;
    }
    eventually("the log has all", async || a.fabric.server_info().await.log.acked == 6).await;
    let logged = read(&mut b, &request("a", 7, 3, 1 << 20)).await;
    assert!(matches!(&logged.end, LogEnd::Gone(why) if why.contains("reach back")), "a hole: {logged:?}");
    let logged = read(&mut b, &request("a", 9, 0, 1 << 20)).await;
    assert!(matches!(&logged.end, LogEnd::Gone(why) if why.contains("nothing")), "no such feed: {logged:?}");
    let logged = read(&mut b, &request("nobody", 7, 0, 1 << 20)).await;
    assert!(matches!(&logged.end, LogEnd::Gone(why) if why.contains("nobody")), "no such node: {logged:?}");

    // What was trimmed is not there, whatever the sequence numbers are.
    let client = a_site.look_inside().await;
    let purged = api(&client, "$JS.API.STREAM.PURGE.LM_a", json!({ "keep": 2 })).await;
    assert!(purged.is_some_and(|answer| answer["success"] == true));
    let logged = read(&mut b, &request("a", 7, 0, 1 << 20)).await;
    assert!(matches!(&logged.end, LogEnd::Gone(why) if why.contains("reach back")), "trimmed: {logged:?}");
    assert_eq!(starts(&read(&mut b, &request("a", 7, 6, 1 << 20)).await), [7, 8]);

    // A stream that was made anew counts from 1.
    let deleted = api(&client, "$JS.API.STREAM.DELETE.LM_a", json!({})).await;
    assert!(deleted.is_some_and(|answer| answer["success"] == true));
    let mut stale = request("a", 7, 6, 1 << 20);
    stale.position = Some(5);
    let logged = read(&mut b, &stale).await;
    assert!(logged.pieces.is_empty() && matches!(logged.end, LogEnd::Gone(_)), "no stream: {logged:?}");
    a.fabric.shutdown().await;

    let logged = read(&mut b, &request("a", 7, 0, 1 << 20)).await;
    assert!(matches!(logged.end, LogEnd::Gone(_)), "its node is down: {logged:?}");
    b.fabric.shutdown().await;
}
