//! Who may join, who may not, and what an operator is told.

use litemesh::core::names::NodeName;
use litemesh::fabric::keys::MeshKey;
use litemesh::fabric::preflight::PreflightError;
use litemesh::fabric::{Address, FabricError, JoinToken};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{PATIENCE, Site, eventually, free_address, pair, until_heard};

fn token(key: &MeshKey, addresses: &[Address]) -> JoinToken {
    JoinToken::new(key.clone(), addresses.to_vec()).expect("has an address")
}

async fn refusal(join: JoinToken) -> FabricError {
    let site = Site::new("stranger");
    let error = site.try_start(Some(join)).await.err().expect("refused");
    assert!(!site.state().key().exists(), "nothing is kept of a token that is no good");
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_is_told_apart_from_a_wrong_address() {
    let site = Site::new("a");
    let node = site.start(None).await;
    let key = node.fabric.join_token().expect("a token").key().clone();
    let other = MeshKey::generate().expect("randomness");
    let (cluster, client) = (Address::from(site.cluster), Address::from(site.client));
    let closed = Address::from(free_address());
    let nowhere: Address = "no-such-host.invalid:6222".parse().expect("an address");

    let error = refusal(token(&other, &[closed.clone(), cluster.clone()])).await;
    assert!(
        matches!(&error, FabricError::Join(PreflightError::OtherMesh { address }) if *address == cluster)
    );
    assert!(error.to_string().contains("another mesh"));
    let error = refusal(token(&key, &[closed])).await;
    assert!(matches!(error, FabricError::Join(PreflightError::Refused { .. })), "{error}");
    let error = refusal(token(&key, &[client])).await;
    assert!(matches!(error, FabricError::Join(PreflightError::NotAPeer { .. })), "{error}");
    let namesake = Site::new("a");
    let error = namesake.try_start(Some(token(&key, &[cluster]))).await.err().expect("refused");
    assert!(matches!(error, FabricError::NameTaken { .. }), "{error}");
    let error = refusal(token(&key, &[nowhere])).await;
    assert!(matches!(error, FabricError::Join(PreflightError::NoSuchHost { .. })), "{error}");
    node.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_at_the_cluster_port_gets_nothing() {
    let site = Site::new("a");
    let node = site.start(None).await;
    let mut stream = TcpStream::connect(site.cluster).await.expect("it listens");
    let talk = b"CONNECT {\"verbose\":true}\r\nSUB > 1\r\nRS+ MESH >\r\nPING\r\n";
    stream.write_all(talk).await.expect("sent");
    let mut heard = Vec::new();
    // It is closed from the other side, which may well be a reset.
    let closed = timeout(PATIENCE, stream.read_to_end(&mut heard)).await;
    assert!(closed.is_ok(), "the stranger is thrown out");
    let heard = String::from_utf8_lossy(&heard).into_owned();
    assert!(!["PONG", "+OK", "MSG"].iter().any(|word| heard.contains(word)), "{heard}");
    assert!(node.fabric.server_info().await.routes.is_empty());
    node.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_another_mesh_is_never_a_peer() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let a = a_site.start(None).await;
    b_site.start(None).await.fabric.shutdown().await;
    let seeds = format!("{{\"seeds\": [\"{}\"]}}", a_site.cluster);
    std::fs::write(b_site.state().members(), seeds).expect("writable");
    let (b, tries) = {
        let (relay, tries) = crate::support::Relay::start(a_site.cluster).await;
        let seeds = format!("{{\"seeds\": [\"{relay}\"]}}");
        std::fs::write(b_site.state().members(), seeds).expect("writable");
        (b_site.start(None).await, tries)
    };
    eventually("b's server has tried more than once", async || tries.count() >= 2).await;
    assert!(a.fabric.server_info().await.routes.is_empty());
    assert!(b.fabric.server_info().await.routes.is_empty());
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_stays_one() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let (mut a, b) = pair(&a_site, &b_site).await;
    let join = a.fabric.join_token().expect("a token");
    b.fabric.shutdown().await;

    let b = b_site.start(None).await;
    until_heard(&b, &mut a, "without a token").await;
    b.fabric.shutdown().await;
    let b = b_site.start(Some(join)).await;
    until_heard(&b, &mut a, "with the token once more").await;
    b.fabric.shutdown().await;

    let foreign = token(&MeshKey::generate().expect("randomness"), &[a_site.cluster.into()]);
    let error = b_site.try_start(Some(foreign)).await.err().expect("it is in a mesh");
    assert!(matches!(error, FabricError::BelongsElsewhere));
    a.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_members_learn_of_each_other() {
    let (a_site, b_site, c_site) = (Site::new("a"), Site::new("b"), Site::new("c"));
    let (a, mut b) = pair(&a_site, &b_site).await;
    let join = a.fabric.join_token().expect("a token");
    let mut c = c_site.start(Some(token(join.key(), &[a_site.cluster.into()]))).await;
    c.connected_to("b").await;
    let names =
        |text: &[&str]| -> Vec<NodeName> { text.iter().map(|name| name.parse().expect("a name")).collect() };
    eventually("b knows c", async || b.fabric.members() == names(&["a", "c"])).await;
    eventually("c knows b", async || c.fabric.members() == names(&["a", "b"])).await;
    assert_eq!(c.fabric.join_token().expect("a token").addresses().len(), 3);
    // The one that both joined by is gone; they find each other without it, after a restart too.
    a.fabric.shutdown().await;
    c.fabric.shutdown().await;
    c = c_site.start(None).await;
    until_heard(&b, &mut c, "hello c").await;
    until_heard(&c, &mut b, "hello b").await;
    b.fabric.shutdown().await;
    c.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_node_is_forgotten_by_all() {
    let (a_site, b_site, c_site) = (Site::new("a"), Site::new("b"), Site::new("c"));
    let (a, b) = pair(&a_site, &b_site).await;
    let c = c_site.start(Some(a.fabric.join_token().expect("a token"))).await;
    // All three must be in the cluster's metadata before one can be taken out of it.
    for node in [&a, &b, &c] {
        node.log_exists().await;
    }
    let knows_c = |node: &crate::support::Node| node.fabric.members().contains(&c_site.name);
    eventually("both know c", async || knows_c(&a) && knows_c(&b)).await;
    let error = a.fabric.remove_member(&c_site.name).await.expect_err("it runs");
    assert!(matches!(error, FabricError::StillRunning { .. }), "{error}");
    c.fabric.shutdown().await;
    let removed = async || a.fabric.remove_member(&c_site.name).await.is_ok();
    eventually("the cluster lets it go", removed).await;
    eventually("both forget c", async || !knows_c(&a) && !knows_c(&b)).await;
    let members = std::fs::read_to_string(b_site.state().members()).expect("readable");
    assert!(!members.contains(&c_site.cluster.to_string()), "{members}");
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
}

/// Servers with empty disks that come at once must not take each other for the cluster, and elect one over the first node.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_join_at_once_join_the_one_that_is_there() {
    for _ in 0..4 {
        let (a_site, b_site, c_site) = (Site::new("a"), Site::new("b"), Site::new("c"));
        let a = a_site.start(None).await;
        a.log_exists().await;
        a.fabric.send(crate::support::commit(b"before")).await.expect("sent");
        eventually("the log has it", async || a.fabric.server_info().await.log.acked > 0).await;
        let join = a.fabric.join_token().expect("a token");
        let (b, c) = tokio::join!(b_site.start(Some(join.clone())), c_site.start(Some(join)));
        for node in [&a, &b, &c] {
            let whole = async || {
                let info = node.fabric.server_info().await;
                (info.leader.as_deref(), info.servers) == (Some("a"), 3)
            };
            eventually("one cluster, led by the first", whole).await;
        }
        for node in [b, c, a] {
            node.fabric.shutdown().await;
        }
    }
}
