//! Nodes that find each other: by a list and a key, started at once and in any order; over IPv6; through a forwarded
//! port; and after their addresses have changed.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use litemesh::fabric::keys::MeshKey;
use litemesh::fabric::{Address, FabricError};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};

use crate::support::{Node, PATIENCE, Relay, Site, eventually, free_address};

fn key() -> MeshKey {
    MeshKey::generate().expect("randomness")
}

fn addresses(sites: &[&Site]) -> Vec<Address> {
    sites.iter().map(|site| Address::from(site.cluster)).collect()
}

async fn start(site: &Site, peers: &[Address], key: &MeshKey) -> Result<Node, FabricError> {
    let mut options = site.options(None);
    (options.peers, options.key) = (peers.to_vec(), Some(key.clone()));
    let (fabric, incoming) = litemesh::fabric::Fabric::start(options).await?;
    Ok(Node { fabric, incoming })
}

/// The streams that the cluster of a node knows of: of one cluster all nodes see the same.
async fn streams(site: &Site) -> BTreeSet<String> {
    let client = site.look_inside().await;
    let answer = timeout(Duration::from_secs(2), client.request("$JS.API.STREAM.NAMES", "".into())).await;
    let Ok(Ok(answer)) = answer else { return BTreeSet::new() };
    let answer: Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
    let names = answer["streams"].as_array().cloned().unwrap_or_default();
    names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

async fn one_mesh(sites: &[&Site]) {
    let wanted: BTreeSet<String> = sites.iter().map(|site| format!("LM_{}", site.name)).collect();
    for site in sites {
        eventually("every node sees the streams of all", async || streams(site).await == wanted).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_start_at_once_with_one_list_are_one_mesh() {
    // The first of the list comes first, in the middle, last.
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let sites = ["a", "b", "c"].map(Site::new);
        let all: Vec<&Site> = sites.iter().collect();
        let (peers, key) = (addresses(&all), key());
        let starting = order.iter().enumerate().map(|(place, which)| {
            let (site, peers, key) = (all[*which], &peers, &key);
            async move {
                sleep(Duration::from_millis(150 * place as u64)).await;
                start(site, peers, key).await.expect("it starts")
            }
        });
        let nodes = futures::future::join_all(starting).await;
        let founders: Vec<usize> = nodes
            .iter()
            .zip(order)
            .filter(|(node, _)| node.fabric.is_founder())
            .map(|(_, which)| which)
            .collect();
        assert_eq!(founders, [0]);
        one_mesh(&all).await;
        for node in nodes {
            node.fabric.shutdown().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minority_founds_nothing_and_who_lost_its_state_joins() {
    let sites = ["a", "b", "c"].map(Site::new);
    let all: Vec<&Site> = sites.iter().collect();
    let (peers, key) = (addresses(&all), key());
    let alone = timeout(Duration::from_secs(3), start(&sites[0], &peers, &key)).await;
    assert!(alone.is_err(), "one of three waits");
    assert!(!sites[0].state().key().exists(), "and has made nothing");
    // Two that are not the first wait, too.
    let two = async { tokio::join!(start(&sites[1], &peers, &key), start(&sites[2], &peers, &key)) };
    assert!(timeout(Duration::from_secs(3), two).await.is_err());
    let (a, b) = tokio::join!(start(&sites[0], &peers, &key), start(&sites[1], &peers, &key));
    let (a, b) = (a.expect("it founds"), b.expect("it joins"));
    assert!(a.fabric.is_founder() && !b.fabric.is_founder());
    a.log_exists().await;
    b.log_exists().await;
    // The founder loses its disk: with the same line it is a member of the mesh that is there.
    a.fabric.shutdown().await;
    let again = Site { dir: tempfile::tempdir().expect("a directory"), ..Site::new("a") };
    let again = Site { cluster: sites[0].cluster, ..again };
    let a = start(&again, &peers, &key).await.expect("it joins");
    assert!(!a.fabric.is_founder());
    a.connected_to("b").await;
    let c = start(&sites[2], &peers, &key).await.expect("it joins");
    one_mesh(&[&again, &sites[1], &sites[2]]).await;
    // The same line again, with everybody else away: nothing is waited for.
    c.fabric.shutdown().await;
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
    let c = timeout(PATIENCE, start(&sites[2], &peers, &key)).await.expect("at once").expect("it starts");
    c.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_nodes_from_meeting_is_told() {
    let sites = ["a", "b"].map(Site::new);
    let all: Vec<&Site> = sites.iter().collect();
    let (peers, key, other) = (addresses(&all), key(), key());
    let mut options = sites[0].options(None);
    options.peers = peers.clone();
    let error = litemesh::fabric::Fabric::start(options).await.err().expect("refused");
    assert!(matches!(error, FabricError::NoKey), "{error}");
    // Another key: they are strangers to each other.
    let both = async { tokio::join!(start(&sites[0], &peers, &key), start(&sites[1], &peers, &other)) };
    assert!(timeout(Duration::from_secs(4), both).await.is_err(), "each waits for the other");
    // Where there are more, one with another key is in nobody's way.
    let more = ["x", "y", "z"].map(Site::new);
    let listed = addresses(&[&more[0], &more[1], &more[2]]);
    let stranger = async { start(&more[2], &listed, &other).await };
    let two = async { tokio::join!(start(&more[0], &listed, &key), start(&more[1], &listed, &key)) };
    let (x, y) = tokio::select! {
        two = two => two,
        stranger = stranger => panic!("the stranger was let in: {}", stranger.is_ok()),
    };
    for node in [x, y] {
        node.expect("it starts").fabric.shutdown().await;
    }
    // Another list: neither founds.
    let reversed: Vec<Address> = peers.iter().rev().cloned().collect();
    let both = async { tokio::join!(start(&sites[0], &peers, &key), start(&sites[1], &reversed, &key)) };
    assert!(timeout(Duration::from_secs(4), both).await.is_err(), "there must not be two");
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_addresses_are_advertised_joined_and_listed() {
    let v6 = |site: Site| {
        let cluster: SocketAddr = format!("[::1]:{}", site.cluster.port()).parse().expect("an address");
        Site { cluster, ..site }
    };
    if TcpListener::bind("[::1]:0").await.is_err() {
        eprintln!("skipped: this host has no IPv6");
        return;
    }
    let (a, b, c) = (v6(Site::new("a")), v6(Site::new("b")), v6(Site::new("c")));
    let first = a.start(None).await;
    let token = first.fabric.join_token().expect("a token");
    assert!(token.reveal().ends_with(&format!("@[::1]:{}", a.cluster.port())));
    let second = b.start(Some(token.reveal().parse().expect("a token"))).await;
    second.connected_to("a").await;
    let third = start(&c, &addresses(&[&a, &b, &c]), token.key()).await.expect("it joins");
    third.connected_to("a").await;
    third.connected_to("b").await;
    for node in [first, second, third] {
        node.fabric.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_behind_a_forwarded_port_is_found_by_what_it_advertises() {
    let (a, b, c) = (Site::new("a"), Site::new("b"), Site::new("c"));
    // As a router with NAT forwards a port.
    let (outside, _relay) = Relay::start(a.cluster).await;
    let mut options = a.options(None);
    options.advertise = Some(format!("localhost:{}", outside.port()));
    let (fabric, incoming) = litemesh::fabric::Fabric::start(options).await.expect("it starts");
    let first = Node { fabric, incoming };
    let token = first.fabric.join_token().expect("a token");
    assert!(token.reveal().ends_with(&format!("@localhost:{}", outside.port())), "a name with two addresses");
    let second = b.start(Some(token.clone())).await;
    second.connected_to("a").await;
    // A third learns of it from the second alone.
    let through =
        litemesh::fabric::JoinToken::new(token.key().clone(), vec![b.cluster.into()]).expect("a token");
    let third = c.start(Some(through)).await;
    third.connected_to("a").await;
    let token = third.fabric.join_token().expect("a token").reveal();
    eventually("it passes the address on", async || {
        third
            .fabric
            .join_token()
            .expect("a token")
            .reveal()
            .contains(&format!("localhost:{}", outside.port()))
    })
    .await;
    assert!(!token.contains(&a.cluster.to_string()), "nobody is told where it listens inside: {token}");
    for node in [first, second, third] {
        node.fabric.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_address_has_changed_is_found_again() {
    let (a, b) = (Site::new("a"), Site::new("b"));
    let first = a.start(None).await;
    let second = b.start(Some(first.fabric.join_token().expect("a token"))).await;
    second.connected_to("a").await;
    eventually("each knows the other", async || {
        !first.fabric.members().is_empty() && !second.fabric.members().is_empty()
    })
    .await;
    first.fabric.shutdown().await;
    let before = a.cluster;
    let a = Site { cluster: free_address(), ..a };
    let first = a.start(None).await;
    first.connected_to("b").await;
    eventually("the other has learned it", async || {
        let token = second.fabric.join_token().expect("a token").reveal();
        token.contains(&a.cluster.to_string()) && !token.contains(&format!(",{before}"))
    })
    .await;
    // Now the other comes back and has only what it learned.
    second.fabric.shutdown().await;
    let second = b.start(None).await;
    second.connected_to("a").await;
    first.fabric.shutdown().await;
    second.fabric.shutdown().await;
}
