//! Where the copies of the nodes' logs are while nodes come and go.

use std::collections::BTreeMap;

use serde_json::json;

use crate::support::{Node, PATIENCE, Site, api, commit, eventually, log_messages};

/// How many logs each node's server leads, and of how many it has a copy, as JetStream tells it of each stream.
async fn spread(sites: &[&Site]) -> BTreeMap<String, (usize, usize)> {
    let client = sites[0].look_inside().await;
    let mut spread: BTreeMap<String, (usize, usize)> =
        sites.iter().map(|s| (s.name.to_string(), (0, 0))).collect();
    for site in sites {
        let info = api(&client, &format!("$JS.API.STREAM.INFO.LM_{}", site.name), json!({})).await;
        let cluster = info.unwrap_or_default()["cluster"].clone();
        let leader = cluster["leader"].as_str().unwrap_or_default().to_owned();
        spread.entry(leader.clone()).or_default().0 += 1;
        spread.entry(leader).or_default().1 += 1;
        for replica in cluster["replicas"].as_array().into_iter().flatten() {
            if replica["current"] == true {
                spread.entry(replica["name"].as_str().unwrap_or_default().to_owned()).or_default().1 += 1;
            }
        }
    }
    spread
}

/// Every node leads its own log and has as many copies as any other.
async fn even(sites: &[&Site], nodes: &[&Node], copies: usize) {
    let wanted: BTreeMap<String, (usize, usize)> =
        sites.iter().map(|s| (s.name.to_string(), (1, copies))).collect();
    println!("{} nodes, before: {:?}", sites.len(), spread(sites).await);
    let is_even = async || spread(sites).await == wanted;
    eventually(&format!("{} nodes with {copies} copies each", sites.len()), is_even).await;
    println!("{} nodes, after: {:?}", sites.len(), spread(sites).await);
    for (site, node) in sites.iter().zip(nodes) {
        let told = async || {
            let log = node.fabric.server_info().await.log;
            let home = log.copies.leader.as_deref() == Some(site.name.as_str());
            home && !log.copies.moving
                && log.copies.copies.len() == copies.min(3)
                && (log.leads, log.holds) == (1, copies as u64)
        };
        eventually("the node tells so", told).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_are_even_before_and_after_nodes_come_and_go() {
    let sites = ["a", "b", "c", "d", "e"].map(Site::new);
    let mut nodes = vec![sites[0].start(None).await];
    nodes[0].log_exists().await;
    for _ in 0..20 {
        nodes[0].fabric.send(commit(b"x")).await.expect("sent");
    }
    eventually("the log has them", async || nodes[0].fabric.server_info().await.log.acked == 20).await;
    for (count, copies) in [(2, 1), (3, 3), (5, 3)] {
        while nodes.len() < count {
            let join = nodes[0].fabric.join_token().expect("a token");
            let node = sites[nodes.len()].start(Some(join)).await;
            node.log_exists().await;
            nodes.push(node);
        }
        even(&sites.iter().take(count).collect::<Vec<_>>(), &nodes.iter().collect::<Vec<_>>(), copies).await;
    }
    for (count, copies) in [(4, 3), (3, 3), (2, 1)] {
        while nodes.len() > count {
            let node = nodes.pop().expect("it runs");
            node.fabric.evacuate(PATIENCE).await.expect("its copies go elsewhere");
            node.fabric.leave().await.expect("it leaves");
            node.fabric.shutdown().await;
        }
        even(&sites.iter().take(count).collect::<Vec<_>>(), &nodes.iter().collect::<Vec<_>>(), copies).await;
    }
    let client = sites[0].look_inside().await;
    assert_eq!(log_messages(&client, &sites[0].name).await, Some(20), "nothing was lost on the way");
    for node in nodes {
        node.fabric.shutdown().await;
    }
}
