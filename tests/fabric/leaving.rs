//! Nodes that go for good: by their own will, taken out by the others, or with too many at once.

use litemesh::core::names::NodeName;
use litemesh::fabric::FabricError;
use serde_json::json;

use crate::support::{Node, PATIENCE, Site, api, commit, eventually, pair, until_heard, within};

/// A stream of the host's programs with this many messages.
async fn app_stream(site: &Site, name: &str, tag: Option<&str>, messages: usize) -> async_nats::Client {
    let client = site.app().await;
    let mut config = json!({ "name": name, "subjects": [format!("{name}.>")], "storage": "file" });
    if let Some(tag) = tag {
        config["placement"] = json!({ "tags": [tag] });
    }
    let create = format!("$JS.API.STREAM.CREATE.{name}");
    let made = async || api(&client, &create, config.clone()).await.is_some_and(|a| a.get("error").is_none());
    eventually("the stream is made", made).await;
    for i in 0..messages {
        let stored =
            async || api(&client, &format!("{name}.{i}"), json!(i)).await.is_some_and(|a| a["seq"] == i + 1);
        eventually("the message is stored", stored).await;
    }
    client
}

async fn messages(client: &async_nats::Client, stream: &str) -> Option<u64> {
    api(client, &format!("$JS.API.STREAM.INFO.{stream}"), json!({})).await?["state"]["messages"].as_u64()
}

fn knows(node: &Node, name: &NodeName) -> bool {
    node.fabric.members().contains(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_one_leaves_and_the_other_decides_alone() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let (a, b) = pair(&a_site, &b_site).await;
    a.log_exists().await;
    b.log_exists().await;
    app_stream(&b_site, "moves", None, 20).await;
    app_stream(&b_site, "bound", Some("node:b"), 1).await;
    assert_eq!(b.fabric.bound_streams().await.expect("told"), ["bound"]);
    let on_a = a_site.app().await;
    b.fabric.evacuate(PATIENCE).await.expect("what can be given away is");
    // Whoever leads, this is the one who goes.
    b.fabric.leave().await.expect("it leaves");
    b.fabric.shutdown().await;

    eventually("a forgets b", async || !knows(&a, &b_site.name)).await;
    assert_eq!(a.fabric.gone(), std::slice::from_ref(&b_site.name));
    app_stream(&a_site, "alone", None, 3).await;
    eventually("nothing was lost", async || messages(&on_a, "moves").await == Some(20)).await;
    let acked = a.fabric.server_info().await.log.acked;
    a.fabric.send(commit(b"x")).await.expect("sent");
    eventually("its log goes on", async || a.fabric.server_info().await.log.acked > acked).await;
    a.fabric.shutdown().await;

    let a = a_site.start(None).await;
    app_stream(&a_site, "later", None, 1).await;
    eventually("it is there after a restart", async || {
        messages(&a_site.app().await, "moves").await == Some(20)
    })
    .await;
    a.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_server_nobody_remembers_is_removed_by_its_name() {
    let (a_site, b_site, c_site) = (Site::new("a"), Site::new("b"), Site::new("c"));
    let (a, b) = pair(&a_site, &b_site).await;
    let c = c_site.start(Some(a.fabric.join_token().expect("a token"))).await;
    for node in [&a, &b, &c] {
        node.log_exists().await;
    }
    eventually("both know c", async || knows(&a, &c_site.name) && knows(&b, &c_site.name)).await;
    c.kill_9().await;
    // Those that stay are started again: their servers have never heard of c's.
    a.fabric.shutdown().await;
    b.fabric.shutdown().await;
    let mut a = a_site.start(None).await;
    let b = b_site.start(None).await;
    until_heard(&b, &mut a, "both are there").await;
    eventually("they decide", async || a.fabric.can_decide().await).await;
    let stranger: NodeName = "z".parse().expect("a name");
    let error = a.fabric.remove_member(&stranger).await.expect_err("it never was there");
    assert!(matches!(error, FabricError::NoMember { .. }), "{error}");
    assert_eq!(a.fabric.absent().await.expect("told"), std::slice::from_ref(&c_site.name));
    a.fabric.remove_member(&c_site.name).await.expect("it is removed");
    eventually("both forget it", async || !knows(&a, &c_site.name) && !knows(&b, &c_site.name)).await;
    // Two of two decide; with c among them one more would have to be there.
    b.fabric.leave().await.expect("of two one leaves");
    b.fabric.shutdown().await;
    app_stream(&a_site, "alone", None, 1).await;
    a.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_survivor_of_two_is_rescued_by_its_operators_word() {
    let (a_site, b_site, c_site) = (Site::new("a"), Site::new("b"), Site::new("c"));
    let (a, b) = pair(&a_site, &b_site).await;
    a.log_exists().await;
    b.log_exists().await;
    let join = a.fabric.join_token().expect("a token");
    let gone = [b_site.name.clone()];
    let error = a.fabric.rescue(&gone).await.expect_err("it runs");
    assert!(matches!(error, FabricError::StillRunning { .. }), "{error}");
    b.kill_9().await;
    eventually("nobody leads", async || !a.fabric.can_decide().await).await;
    let error = a.fabric.remove_member(&b_site.name).await.expect_err("one of two decides nothing");
    assert!(error.to_string().contains("litemesh rescue"), "{error}");

    // Its replacement has another name, and comes too early.
    let mut c = c_site.start(Some(join)).await;
    until_heard(&a, &mut c, "not yet").await;
    let error = a.fabric.rescue(&gone).await.expect_err("it would never have streams").to_string();
    assert!(error.contains("stop c, run this again, then start c"), "{error}");
    c.fabric.shutdown().await;
    eventually("c is gone", async || a.fabric.server_info().await.routes.is_empty()).await;
    a.fabric.rescue(&gone).await.expect("rescued");
    eventually("it decides alone", async || a.fabric.can_decide().await).await;
    let mut c = c_site.start(None).await;
    until_heard(&a, &mut c, "welcome").await;
    let made = async || c.fabric.server_info().await.log.exists;
    within(4 * PATIENCE, "the new one has its log", made).await;
    eventually("b is forgotten", async || !knows(&a, &b_site.name) && !knows(&c, &b_site.name)).await;
    app_stream(&c_site, "new", None, 1).await;
    a.fabric.shutdown().await;
    c.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_away_hears_that_a_node_left_and_who_comes_again_is_a_member() {
    let (a_site, b_site, c_site) = (Site::new("a"), Site::new("b"), Site::new("c"));
    let d_site = Site::new("d");
    let (a, b) = pair(&a_site, &b_site).await;
    let c = c_site.start(Some(a.fabric.join_token().expect("a token"))).await;
    for node in [&a, &b, &c] {
        node.log_exists().await;
    }
    eventually("b knows c", async || knows(&b, &c_site.name) && knows(&a, &c_site.name)).await;
    b.fabric.shutdown().await;
    // Of the two that would stay one is there. What is asked of a cluster that cannot decide is done later all the same.
    let error = c.fabric.leave().await.expect_err("one of two is no majority");
    assert!(error.to_string().contains("of the 2 nodes that would stay 1"), "{error}");
    c.fabric.send(commit(b"x")).await.expect("it goes on");
    let d = d_site.start(Some(a.fabric.join_token().expect("a token"))).await;
    d.log_exists().await;
    let leave = async || c.fabric.leave().await.is_ok();
    eventually("with one more it leaves", leave).await;
    c.fabric.shutdown().await;
    eventually("a forgets c", async || !knows(&a, &c_site.name)).await;
    let b = b_site.start(None).await;
    eventually("b hears of it", async || !knows(&b, &c_site.name)).await;

    let mut again = Site::new("c");
    (again.cluster, again.client) = (c_site.cluster, c_site.client);
    let mut c = again.start(Some(a.fabric.join_token().expect("a token"))).await;
    until_heard(&a, &mut c, "hello again").await;
    let back = async || knows(&a, &c_site.name) && knows(&b, &c_site.name);
    eventually("it is a member again", back).await;
    let none = async || a.fabric.gone().is_empty() && b.fabric.gone().is_empty();
    eventually("nobody says that it is gone", none).await;
    for node in [a, b, c, d] {
        node.fabric.shutdown().await;
    }
}
