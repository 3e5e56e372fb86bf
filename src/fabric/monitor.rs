//! Asks our own server about its state, over its monitoring port. Invariant: it only ever talks to loopback, and an
//! answer that does not come is an error in bounded time.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Most answers are smaller.
const USUAL_ANSWER: usize = 8 * 1024;
/// A status of hundreds of nodes is far smaller.
const MAX_ANSWER: u64 = 8 * 1024 * 1024;

/// The consensus group of the cluster's metadata, as one server sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MetaGroup {
    /// The name of the server that leads it.
    pub leader: Option<String>,
    /// How many servers it has.
    pub size: u64,
    /// The names of the others.
    pub others: Vec<String>,
}

/// The answer to a request for `path`.
pub async fn get(monitor: SocketAddr, path: &str) -> io::Result<Value> {
    let (status, body) = fetch(monitor, path).await?;
    if status != 200 {
        return Err(io::Error::other(format!("{path} answers {status}")));
    }
    serde_json::from_slice(&body).map_err(io::Error::other)
}

/// Whether the server works, leaders or not.
pub async fn is_healthy(monitor: SocketAddr) -> bool {
    matches!(fetch(monitor, "/healthz?js-enabled-only=true").await, Ok((200, _)))
}

/// The cluster's metadata group.
pub async fn meta_group(monitor: SocketAddr) -> io::Result<MetaGroup> {
    let answer = get(monitor, "/jsz").await?;
    let meta = &answer["meta_cluster"];
    let name = |value: &Value| value.as_str().filter(|name| !name.is_empty()).map(str::to_owned);
    Ok(MetaGroup {
        leader: name(&meta["leader"]),
        size: meta["cluster_size"].as_u64().unwrap_or_default(),
        others: list(&meta["replicas"]).filter_map(|peer| name(&peer["name"])).collect(),
    })
}

/// A consensus group, as one server of it sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RaftGroup {
    /// Its name.
    pub name: String,
    /// A server that leads it is known.
    pub has_leader: bool,
    /// Which election was the last, by this server's knowledge.
    pub term: u64,
    /// Where this server's log ends.
    pub last_index: u64,
    /// How many servers must agree.
    pub quorum: u64,
    /// The ids of the others.
    pub peers: Vec<String>,
}

/// The groups of an account that the server is part of.
pub async fn raft_groups(monitor: SocketAddr, account: &str) -> io::Result<Vec<RaftGroup>> {
    let answer = get(monitor, &format!("/raftz?acc={account}")).await?;
    let groups = answer[account].as_object().into_iter().flatten();
    let group = |(name, group): (&String, &Value)| RaftGroup {
        name: name.clone(),
        has_leader: group["leader"].as_str().is_some_and(|id| !id.is_empty()),
        term: group["term"].as_u64().unwrap_or_default(),
        last_index: group["pindex"].as_u64().unwrap_or_default(),
        quorum: group["quorum_needed"].as_u64().unwrap_or(u64::MAX),
        peers: group["peers"].as_object().into_iter().flatten().map(|(id, _)| id.clone()).collect(),
    };
    Ok(groups.map(group).collect())
}

/// A stream of which a server holds a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hosted {
    /// The account it belongs to.
    pub account: String,
    /// Its name.
    pub name: String,
    /// The server that leads it, as far as is known.
    pub leader: Option<String>,
    /// The other servers that hold a copy.
    pub others: Vec<String>,
    /// The tags of servers that it is bound to.
    pub tags: Vec<String>,
}

/// The streams of which the server holds a copy.
pub async fn hosted(monitor: SocketAddr) -> io::Result<Vec<Hosted>> {
    let answer = get(monitor, "/jsz?accounts=true&streams=true&config=true").await?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut found = Vec::new();
    for account in list(&answer["account_details"]) {
        for stream in list(&account["stream_detail"]) {
            let cluster = &stream["cluster"];
            found.push(Hosted {
                account: text(&account["name"]),
                name: text(&stream["name"]),
                leader: cluster["leader"].as_str().filter(|l| !l.is_empty()).map(str::to_owned),
                others: list(&cluster["replicas"]).map(|r| text(&r["name"])).collect(),
                tags: list(&stream["config"]["placement"]["tags"]).map(text).collect(),
            });
        }
    }
    Ok(found)
}

/// The names of the servers that are connected by route, each once.
pub async fn route_names(monitor: SocketAddr) -> io::Result<Vec<String>> {
    let mut names: Vec<String> = routes(monitor).await?.into_values().collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// The connections by route, by number, and the names of the servers at their other ends. A connection that was made anew has
/// another number.
pub async fn routes(monitor: SocketAddr) -> io::Result<BTreeMap<u64, String>> {
    let answer = get(monitor, "/routez").await?;
    let route = |route: &Value| Some((route["rid"].as_u64()?, route["remote_name"].as_str()?.to_owned()));
    Ok(list(&answer["routes"]).filter_map(route).collect())
}

/// More programs than this that subscribe on one host are taken for listeners without a look.
const MOST_SUBSCRIPTIONS: u64 = 1024;

/// Whether somebody here subscribes in `account` to subjects that begin so.
pub async fn has_subscriber(monitor: SocketAddr, account: &str, beginning: &str) -> io::Result<bool> {
    let path = format!("/subsz?subs=1&acc={account}&limit={MOST_SUBSCRIPTIONS}");
    let answer = get(monitor, &path).await?;
    let begins = |sub: &Value| sub["subject"].as_str().is_some_and(|subject| subject.starts_with(beginning));
    let is_whole = answer["total"].as_u64().is_some_and(|total| total <= MOST_SUBSCRIPTIONS);
    Ok(!is_whole || list(&answer["subscriptions_list"]).any(begins))
}

/// Whether an account is connected to another system, as far as can be seen.
pub async fn has_leaf(monitor: SocketAddr, account: &str) -> bool {
    let answer = get(monitor, "/leafz").await.unwrap_or_default();
    list(&answer["leafs"]).any(|leaf| leaf["account"] == account)
}

/// Whether a peer's server connects before the time is over.
pub async fn peer_within(monitor: SocketAddr, patience: Duration) -> bool {
    let connected = async {
        while route_names(monitor).await.unwrap_or_default().is_empty() {
            sleep(LOOK_AGAIN).await;
        }
    };
    timeout(patience, connected).await.is_ok()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

async fn fetch(monitor: SocketAddr, path: &str) -> io::Result<(u16, Vec<u8>)> {
    let exchange = async {
        let mut stream = TcpStream::connect(monitor).await?;
        // Version 1.0: the answer comes in one piece and ends with the connection.
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
        let mut answer = Vec::with_capacity(USUAL_ANSWER);
        stream.take(MAX_ANSWER).read_to_end(&mut answer).await?;
        io::Result::Ok(answer)
    };
    let answer = timeout(PATIENCE, exchange).await.map_err(|_| io::ErrorKind::TimedOut)??;
    split(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn split(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let status = std::str::from_utf8(&answer[..end]).ok()?.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer[end + 4..].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_status_and_a_body() {
        assert_eq!(split(b"HTTP/1.0 503 No\r\nA: b\r\n\r\n{}"), Some((503, b"{}".to_vec())));
        for bad in [&b""[..], b"HTTP/1.0 200 OK\r\n", b"x\r\n\r\n"] {
            assert_eq!(split(bad), None);
        }
    }
}
