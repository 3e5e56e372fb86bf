//! Takes nodes out of the mesh for good: this one, or one that is gone. Invariant: a node that others can still reach is
//! never taken out by them, and one that takes itself out is stopped right afterwards, because a server that was removed
//! and runs on, or is started again, votes again.

use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use super::accounts::{APP_USER, MESH_USER};
use super::address::Address;
use super::bootstrap;
use super::conf::placement_tag;
use super::error::FabricError;
use super::identity::Identity;
use super::log_stream::stream_name;
use super::monitor::{self, Hosted, MetaGroup};
use crate::core::names::NodeName;

/// A change of the cluster's members needs a majority of its servers, which may be far away.
const PATIENCE: Duration = Duration::from_secs(20);
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// JetStream does not know the server.
const NOT_A_MEMBER: u64 = 10044;
/// Another change of the members is under way.
const CHANGE_UNDER_WAY: u64 = 10202;

/// The system account of our own server.
pub(super) struct Sys<'a> {
    identity: &'a Identity,
    client: async_nats::Client,
}

/// By which id JetStream knows a server: a function of its name, so that one that nobody has heard of since the leader's
/// start can be named all the same.
pub(super) fn peer_id(name: &str) -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let hash = Sha256::digest(name.as_bytes());
    hash[..8].iter().map(|byte| char::from(DIGITS[usize::from(*byte) % DIGITS.len()])).collect()
}

impl<'a> Sys<'a> {
    pub(super) async fn connect(identity: &'a Identity) -> Result<Self, FabricError> {
        let options = identity.client_options(bootstrap::sys_options(&identity.accounts))?;
        let client = options
            .request_timeout(Some(ANSWER_PATIENCE))
            .connect(format!("nats://{}", identity.ports.client_address()))
            .await
            .map_err(|e| FabricError::Connect { reason: e.to_string() })?;
        Ok(Self { identity, client })
    }

    async fn ask(&self, subject: &str, request: Value) -> Option<Value> {
        let sent = self.client.request(subject.to_owned(), request.to_string().into());
        let answer = timeout(ANSWER_PATIENCE, sent).await.ok()?.ok()?;
        let answer = serde_json::from_slice(&answer.payload).unwrap_or_default();
        debug!(subject, %answer, "asked the cluster");
        Some(answer)
    }

    async fn meta_group(&self) -> MetaGroup {
        monitor::meta_group(self.identity.ports.monitor).await.unwrap_or_default()
    }

    /// Refuses a removal that would not come to its end: those that stay have to agree to it, and what was once asked of
    /// the cluster is done when they are back, whatever was said meanwhile.
    async fn expect_majority_without(&self, node: &NodeName) -> Result<(), String> {
        let until = Instant::now() + ANSWER_PATIENCE;
        loop {
            // Who was removed just now may be counted here for a moment longer.
            match self.majority_without(node).await {
                Err(_) if Instant::now() < until => sleep(LOOK_AGAIN).await,
                result => return result,
            }
        }
    }

    async fn majority_without(&self, node: &NodeName) -> Result<(), String> {
        let group = self.meta_group().await;
        let connected = monitor::route_names(self.identity.ports.monitor).await.unwrap_or_default();
        let own = self.identity.node.as_str();
        let all = group.others.iter().map(String::as_str).chain([own]);
        let staying: Vec<&str> = all.filter(|name| *name != node.as_str()).collect();
        let there = staying.iter().filter(|n| **n == own || connected.iter().any(|c| c == **n)).count();
        if group.leader.is_some() && there * 2 > staying.len() {
            return Ok(());
        }
        Err(format!(
            "of the {} nodes that would stay {there} can be reached from here, and more than half have to agree: start the \
             others first; if they are gone for ever, see 'litemesh rescue'",
            staying.len()
        ))
    }

    async fn hosted(&self) -> Result<Vec<Hosted>, FabricError> {
        let failed =
            |e| FabricError::System { what: "our own nats-server does not say what it holds", source: e };
        monitor::hosted(self.identity.ports.monitor).await.map_err(failed)
    }

    /// Has the cluster forget the server of `node`. It needs a leader: a majority of the servers it knows.
    async fn remove(&self, node: &NodeName) -> Result<(), FabricError> {
        let failed = |reason: String| FabricError::Remove { node: node.clone(), reason };
        let until = Instant::now() + PATIENCE;
        loop {
            let request = json!({ "peer": node.as_str(), "peer_id": peer_id(node.as_str()) });
            let answer = self.ask("$JS.API.SERVER.REMOVE", request).await;
            let why = match &answer {
                None => "the cluster does not answer: is more than half of its nodes running?".to_owned(),
                Some(answer) => match (answer["success"].as_bool(), answer["error"]["err_code"].as_u64()) {
                    (Some(true), _) | (_, Some(NOT_A_MEMBER)) => return Ok(()),
                    (_, Some(CHANGE_UNDER_WAY)) => "another node is being added or removed".to_owned(),
                    _ => {
                        let reason = answer["error"]["description"].as_str().unwrap_or("no reason given");
                        return Err(failed(reason.to_owned()));
                    }
                },
            };
            if Instant::now() >= until {
                return Err(failed(why));
            }
            sleep(LOOK_AGAIN).await;
        }
    }
}

/// Has the cluster forget a node that is gone for good.
pub(super) async fn remove(
    identity: &Identity,
    node: &NodeName,
    known_at: &[Address],
) -> Result<(), FabricError> {
    expect_gone(identity, node, known_at).await?;
    let sys = Sys::connect(identity).await?;
    let refused = |reason| FabricError::Remove { node: node.clone(), reason };
    sys.expect_majority_without(node).await.map_err(refused)?;
    sys.remove(node).await?;
    // Nobody writes to its log any more. With its only copy gone, the cluster forgets it at once.
    delete_log(identity, node).await;
    Ok(())
}

/// Refuses what would take out a node that is there.
async fn expect_gone(identity: &Identity, node: &NodeName, known_at: &[Address]) -> Result<(), FabricError> {
    let connected = monitor::route_names(identity.ports.monitor).await.map_err(|e| FabricError::Remove {
        node: node.clone(),
        reason: format!("our own nats-server does not answer: {e}"),
    })?;
    if *node == identity.node || connected.iter().any(|name| name == node.as_str()) {
        return Err(FabricError::StillRunning { node: node.clone() });
    }
    // At its address there may be another node by now.
    match identity.look_at(known_at).await {
        Ok(peer) if peer.name == node.as_str() => {
            Err(FabricError::StillReachable { node: node.clone(), address: peer.address })
        }
        _ => Ok(()),
    }
}

async fn delete_log(identity: &Identity, node: &NodeName) {
    let Ok(client) = account(identity, MESH_USER).await else { return };
    let subject = format!("$JS.API.STREAM.DELETE.{}", stream_name(node));
    // What cannot be deleted now takes no room anywhere, and goes when a node of the name comes again.
    let answer = timeout(ANSWER_PATIENCE, client.request(subject, "".into())).await;
    debug!(%node, deleted = matches!(answer, Ok(Ok(_))), "its log");
}

async fn account(identity: &Identity, user: &str) -> Result<async_nats::Client, FabricError> {
    let password = if user == APP_USER { &identity.accounts.app } else { &identity.accounts.mesh };
    let options =
        async_nats::ConnectOptions::with_user_and_password(user.to_owned(), password.reveal().to_owned());
    let options = identity.client_options(options.request_timeout(Some(ANSWER_PATIENCE)))?;
    let refused = |e: async_nats::ConnectError| FabricError::Connect { reason: e.to_string() };
    options.connect(format!("nats://{}", identity.ports.client_address())).await.map_err(refused)
}

/// The host's programs' streams of which nobody answers now: their copies are on nodes that are away.
pub(super) async fn unanswered_streams(identity: &Identity) -> Result<Vec<String>, FabricError> {
    let client = account(identity, APP_USER).await?;
    let answer = timeout(ANSWER_PATIENCE, client.request("$JS.API.STREAM.LIST", "".into())).await;
    let Ok(Ok(answer)) = answer else { return Ok(Vec::new()) };
    let answer: Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
    let mut names: Vec<String> = Vec::new();
    for key in ["missing", "offline"] {
        match &answer[key] {
            Value::Array(found) => names.extend(found.iter().filter_map(|n| n.as_str().map(str::to_owned))),
            Value::Object(found) => names.extend(found.keys().cloned()),
            _ => {}
        }
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// The streams on this server that are bound to it: they cannot be given to another.
pub(super) async fn bound_streams(identity: &Identity) -> Result<Vec<String>, FabricError> {
    let (tag, own) = (placement_tag(identity.node.as_str()), stream_name(&identity.node));
    let hosted = Sys::connect(identity).await?.hosted().await?;
    let bound = hosted.into_iter().filter(|s| s.name != own && s.tags.contains(&tag));
    Ok(bound.map(|s| s.name).collect())
}

/// Whether this node could leave now.
pub(super) async fn may_leave(identity: &Identity) -> Result<(), FabricError> {
    let sys = Sys::connect(identity).await?;
    sys.expect_majority_without(&identity.node).await.map_err(|reason| FabricError::Leave { reason })
}

/// Gives the streams on this server to others; ends when it holds none any more that can be given away.
pub(super) async fn evacuate(identity: &Identity, patience: Duration) -> Result<(), FabricError> {
    let node = &identity.node;
    let sys = Sys::connect(identity).await?;
    let (tag, own, until) = (placement_tag(node.as_str()), stream_name(node), Instant::now() + patience);
    let mut asked: Option<Instant> = None;
    loop {
        let left: Vec<Hosted> =
            sys.hosted().await?.into_iter().filter(|s| s.name != own && !s.tags.contains(&tag)).collect();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            let names: Vec<_> = left.iter().map(|s| s.name.as_str()).collect();
            let reason =
                format!("after {} s it still has these streams: {}", patience.as_secs(), names.join(", "));
            return Err(FabricError::Leave { reason });
        }
        // Asking again does no harm: what is on its way goes on.
        if asked.is_none_or(|at| at.elapsed() > ANSWER_PATIENCE) {
            let names: Vec<_> = left.iter().map(|s| s.name.as_str()).collect();
            info!(%node, streams = names.join(", "), "gives its streams to other nodes");
            sys.ask("$JS.API.SERVER.EVACUATE", json!({ "peer_id": peer_id(node.as_str()) })).await;
            asked = Some(Instant::now());
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Takes this node's server out of the cluster. Nothing works on it afterwards: stop it at once.
pub(super) async fn leave(identity: &Identity) -> Result<(), FabricError> {
    let node = &identity.node;
    let sys = Sys::connect(identity).await?;
    sys.expect_majority_without(node).await.map_err(|reason| FabricError::Leave { reason })?;
    delete_log(identity, node).await;
    let until = Instant::now() + PATIENCE;
    loop {
        let group = sys.meta_group().await;
        match group.leader.as_deref() {
            Some(leader) if leader != node.as_str() => break,
            _ if Instant::now() >= until => {
                let reason =
                    "no other node takes the lead of the cluster: is more than half of its nodes running?";
                return Err(FabricError::Leave { reason: reason.to_owned() });
            }
            Some(_) => {
                sys.ask("$JS.API.META.LEADER.STEPDOWN", json!({})).await;
            }
            None => {}
        }
        sleep(LOOK_AGAIN).await;
    }
    sys.remove(node).await
}

/// Lets the nodes that are connected decide without those that are not, and takes these out. An operator's word, and never
/// on two sides of a cut: they would be two clusters, and one of them loses its streams when they meet.
pub(super) async fn rescue(
    identity: &Identity,
    gone: &[(NodeName, Vec<Address>)],
) -> Result<(), FabricError> {
    let failed = |reason: &str| FabricError::Rescue { reason: reason.to_owned() };
    for (node, addresses) in gone {
        expect_gone(identity, node, addresses).await?;
    }
    let sys = Sys::connect(identity).await?;
    let group = sys.meta_group().await;
    if group.leader.is_none() {
        let connected = monitor::route_names(identity.ports.monitor).await.unwrap_or_default();
        // One that was started meanwhile has no vote, and counts on a cluster that is about to change under it: its
        // streams were never made.
        let strangers = connected.iter().filter(|name| {
            *name != identity.node.as_str() && !group.others.iter().any(|other| other == *name)
        });
        let strangers: Vec<&str> = strangers.map(String::as_str).collect();
        if !strangers.is_empty() {
            let names = strangers.join(", ");
            return Err(failed(&format!(
                "{names} was started after the others had died: stop {names}, run this again, then start {names}"
            )));
        }
        let needed = group.others.iter().filter(|other| connected.contains(other)).count() + 1;
        let answer = sys.ask("$JS.API.META.RESCUE", json!({ "quorum_needed": needed })).await;
        let answer = answer.ok_or_else(|| failed("our own nats-server does not answer"))?;
        if let Some(why) = answer["error"]["description"].as_str() {
            return Err(failed(why));
        }
        info!(node = %identity.node, votes = needed, "the cluster decides without those that are gone");
    }
    let until = Instant::now() + PATIENCE;
    while sys.meta_group().await.leader.is_none() {
        if Instant::now() >= until {
            return Err(failed("no node takes the lead of the cluster: run it again"));
        }
        sleep(LOOK_AGAIN).await;
    }
    for (node, _) in gone {
        sys.remove(node).await?;
        delete_log(identity, node).await;
    }
    Ok(())
}

/// Whether the cluster can decide anything at all.
pub(super) async fn has_leader(identity: &Identity) -> bool {
    monitor::meta_group(identity.ports.monitor).await.is_ok_and(|group| group.leader.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_id_is_that_of_nats_server() {
        // As /jsz of nats-server tells it.
        assert_eq!(peer_id("a"), "GR5IGR3G");
    }
}
