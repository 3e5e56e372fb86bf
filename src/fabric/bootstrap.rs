//! Founds a cluster of one. A nats-server cannot: its metadata group wants at least two servers to begin with, and a
//! standalone server that is clustered later deletes its streams. So a second one is started for the moment, leads
//! or votes, and is removed again. Invariant: each step looks at what is, so that a start after a crash in the middle
//! goes on; the mark that it is done is written last.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use super::accounts::{Accounts, SYS_USER};
use super::conf::{self, ServerConf};
use super::error::FabricError;
use super::monitor::{self, MetaGroup};
use super::private_file;
use super::server::{self, Ports, Server, ServerSetup, free_loopback};

const PATIENCE: Duration = Duration::from_secs(20);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);

/// What the founding needs to know.
pub struct Founding<'a> {
    /// The real server's configuration.
    pub conf: ServerConf<'a>,
    /// What the real server listens on.
    pub ports: &'a Ports,
    /// The program.
    pub binary: &'a Path,
    /// The node's state directory.
    pub state_dir: &'a Path,
    /// How to reach the real server as the system account.
    pub connect: async_nats::ConnectOptions,
}

/// Whether this node's cluster exists.
pub fn is_done(state_dir: &Path) -> bool {
    mark(state_dir).exists()
}

/// From now on this node's cluster exists: it was founded here, or the node joined one.
pub fn mark_done(state_dir: &Path) -> Result<(), FabricError> {
    if is_done(state_dir) {
        return Ok(());
    }
    Ok(private_file::write(&mark(state_dir), b"The cluster exists: nothing is left to found.\n")?)
}

fn mark(state_dir: &Path) -> PathBuf {
    state_dir.join("founded")
}

/// The options of a connection as the system account.
pub fn sys_options(accounts: &Accounts) -> async_nats::ConnectOptions {
    async_nats::ConnectOptions::with_user_and_password(SYS_USER.to_owned(), accounts.sys.reveal().to_owned())
        .name("litemesh-founding")
        .request_timeout(Some(ANSWER_PATIENCE))
}

/// Founds the cluster, around a real server that is ready.
pub async fn found(founding: Founding<'_>) -> Result<(), FabricError> {
    let helper_name = format!("{}.founding", founding.conf.name);
    let dir = founding.state_dir.join("founding");
    let helper = start_helper(&founding, &helper_name, &dir)?;
    let monitor = founding.ports.monitor;
    let result = async {
        let address = format!("nats://{}", founding.ports.client_address());
        let sys = founding
            .connect
            .connect(address)
            .await
            .map_err(|e| FabricError::Connect { reason: e.to_string() })?;
        lead_alone(&sys, monitor, founding.conf.name, &helper_name).await
    }
    .await;
    // Stopped before anything else: a removed server that goes on running votes again some minutes later.
    helper.stop().await;
    result?;
    // It holds nothing of value. What cannot be removed stays: it is never looked at again.
    let _ = std::fs::remove_dir_all(&dir);
    mark_done(founding.state_dir)
}

fn start_helper(founding: &Founding<'_>, name: &str, dir: &Path) -> Result<Server, FabricError> {
    let [client, monitor, cluster] = free_loopback()?;
    let routes = [founding.conf_route()];
    let store_dir = dir.join("jetstream");
    let conf = ServerConf {
        name,
        client,
        monitor,
        gate: None,
        leaf: None,
        cluster,
        advertise: None,
        routes: &routes,
        joins: false,
        store_dir: &store_dir,
        ..founding.conf
    };
    let setup = ServerSetup {
        name,
        binary: founding.binary,
        conf_path: dir.join("nats.conf"),
        conf: &conf::render(&conf),
        memory_limit_mib: None,
        // Its end looks like a disaster in its log.
        hushed: vec![""],
    };
    Server::start(setup, None)
}

impl Founding<'_> {
    /// Where the helper finds the real server.
    fn conf_route(&self) -> super::address::Address {
        server::reachable(self.ports.cluster).into()
    }
}

/// Until `name` leads the metadata group and is the only one in it.
async fn lead_alone(
    sys: &async_nats::Client,
    monitor: SocketAddr,
    name: &str,
    helper: &str,
) -> Result<(), FabricError> {
    let until = Instant::now() + PATIENCE;
    let mut last = String::from("no answer from the server");
    while Instant::now() < until {
        let group = monitor::meta_group(monitor).await.unwrap_or_default();
        match next_step(&group, name, helper) {
            Step::Done => {
                info!(node = name, "the cluster is founded");
                return Ok(());
            }
            Step::Wait(why) => last = why.to_owned(),
            Step::Ask(subject, request) => last = ask(sys, subject, request).await,
        }
        sleep(LOOK_AGAIN).await;
    }
    Err(FabricError::Bootstrap { waited_s: PATIENCE.as_secs(), reason: last })
}

#[derive(Debug, PartialEq)]
enum Step {
    Done,
    Wait(&'static str),
    Ask(&'static str, Value),
}

fn next_step(group: &MetaGroup, name: &str, helper: &str) -> Step {
    match group.leader.as_deref() {
        None => Step::Wait("no server leads the metadata group"),
        Some(leader) if leader != name => {
            Step::Ask("$JS.API.META.LEADER.STEPDOWN", json!({ "placement": { "preferred": name } }))
        }
        Some(_) if group.size == 1 => Step::Done,
        Some(_) if group.others.iter().any(|other| other == helper) => {
            Step::Ask("$JS.API.SERVER.REMOVE", json!({ "peer": helper }))
        }
        Some(_) => Step::Wait("the second server is not in the metadata group"),
    }
}

/// Asks once; what comes of it is seen in the group's state, the answer is only told when nothing does.
async fn ask(sys: &async_nats::Client, subject: &'static str, request: Value) -> String {
    let answer = timeout(ANSWER_PATIENCE, sys.request(subject, request.to_string().into())).await;
    let told = match answer {
        Ok(Ok(message)) => String::from_utf8_lossy(&message.payload).into_owned(),
        Ok(Err(e)) => e.to_string(),
        Err(_) => "no answer".to_owned(),
    };
    debug!(subject, answer = told, "founding");
    format!("{subject}: {told}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(leader: Option<&str>, size: u64, others: &[&str]) -> MetaGroup {
        MetaGroup {
            leader: leader.map(str::to_owned),
            size,
            others: others.iter().map(|other| (*other).to_owned()).collect(),
        }
    }

    #[test]
    fn every_state_has_its_step() {
        let step = |group| next_step(&group, "a", "h");
        assert!(matches!(step(group(None, 2, &[])), Step::Wait(_)));
        assert!(matches!(step(group(Some("h"), 2, &["h"])), Step::Ask("$JS.API.META.LEADER.STEPDOWN", _)));
        assert!(matches!(step(group(Some("a"), 2, &["h"])), Step::Ask("$JS.API.SERVER.REMOVE", _)));
        assert!(matches!(step(group(Some("a"), 2, &[])), Step::Wait(_)));
        assert_eq!(step(group(Some("a"), 1, &[])), Step::Done);
    }
}
