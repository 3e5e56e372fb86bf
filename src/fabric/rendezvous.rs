//! Nodes that are all started with the same list of peers, at once and in any order: who founds the mesh, and who joins.
//! Invariant: only the node at the list's first address founds, and only with the votes of most nodes of the list, its own
//! included, none of which belongs to a mesh yet; so there are never two meshes, whatever is cut off or was lost.
//!
//! A node that waits listens at its cluster port by itself, as nats-server does later: mutual TLS, then a line that says
//! who it is. A node that answers there without saying that it waits belongs to the mesh, and can be joined.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};

use super::address::Address;
use super::certs::NodeCerts;
use super::error::FabricError;
use super::preflight::{self, PreflightError, Tls};
use crate::core::names::NodeName;

/// How long a peer may take for one step.
const PATIENCE: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(300);
const PORT_PATIENCE: Duration = Duration::from_millis(1_500);
/// How often it is told what is waited for.
const TELL_EVERY: Duration = Duration::from_secs(15);
/// Longer than any line of a node that waits.
const MAX_LINE: u64 = 64 * 1024;
/// Who is talked to at once: a stranger's connection gets no further than the handshake.
const AT_ONCE: usize = 64;

/// What a node that waits says of itself, and what it is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Waiting {
    node: NodeName,
    /// Tells this process from an earlier one of the name, and a node from itself.
    run: u64,
    /// The list it was started with, sorted.
    peers: BTreeSet<Address>,
    /// The first of the list.
    first: Address,
}

/// What came of waiting.
pub(super) enum Met {
    /// There is a mesh, of this id: somebody of it answers.
    Member(Option<String>),
    /// This node is to found it. Others wait as long as this is held.
    Founder(Door),
}

/// Answers at the cluster port until it is dropped.
pub(super) struct Door {
    tasks: JoinSet<()>,
}

impl Door {
    /// Until the port is free again.
    pub(super) async fn close(mut self) {
        self.tasks.shutdown().await;
    }
}

/// What an address led to.
enum Seen {
    Member(preflight::Peer),
    Waits(Waiting, Box<BufReader<Tls>>),
    /// Nothing that could be met; for people to put right. The others go on without it.
    Stranger(&'static str),
}

/// Waits until there is a mesh to join, or this node is to found it.
pub(super) async fn meet(
    node: &NodeName,
    listen: SocketAddr,
    peers: &[Address],
    certs: &Arc<NodeCerts>,
) -> Result<Met, FabricError> {
    let me = Waiting {
        node: node.clone(),
        run: rand::random::<u64>() >> 1,
        peers: peers.iter().cloned().collect(),
        first: peers[0].clone(),
    };
    let vote = Arc::new(Mutex::new(None));
    let door = open(&me, listen, certs, vote.clone()).await?;
    let (mut told, mut why) = (None::<Instant>, String::new());
    loop {
        match look(&me, peers, certs, &vote).await {
            Look::Member(peer) if peer.name == node.as_str() => {
                return Err(FabricError::NameTaken { address: peer.address, node: node.clone() });
            }
            Look::Member(peer) => {
                door.close().await;
                info!(peer = peer.name, address = %peer.address, "the mesh is there: joining");
                return Ok(Met::Member(peer.mesh_id));
            }
            Look::Found => return Ok(Met::Founder(door)),
            Look::Wait(reason) => {
                if reason != why || told.is_none_or(|t| t.elapsed() >= TELL_EVERY) {
                    info!("waits for the mesh to be founded: {reason}");
                    (told, why) = (Some(Instant::now()), reason);
                }
            }
        }
        sleep(LOOK_AGAIN).await;
    }
}

enum Look {
    Member(preflight::Peer),
    Found,
    Wait(String),
}

/// Looks at every address of the list, whatever it leads to at this moment.
async fn look(
    me: &Waiting,
    peers: &[Address],
    certs: &NodeCerts,
    vote: &Mutex<Option<(NodeName, u64)>>,
) -> Look {
    let seen = join_all(peers.iter().map(|address| see(address, certs))).await;
    let mut waiting: BTreeMap<u64, (Waiting, Box<BufReader<Tls>>)> = BTreeMap::new();
    let mut first = BTreeSet::new();
    let (mut others, mut strangers) = (BTreeSet::new(), String::new());
    for (address, found) in peers.iter().zip(seen) {
        for found in found {
            match found {
                Seen::Stranger(what) => strangers += &format!("; {address} {what}"),
                Seen::Member(peer) => return Look::Member(peer),
                Seen::Waits(other, stream) => {
                    if *address == peers[0] {
                        first.insert(other.run);
                    }
                    if other.run != me.run && other.peers == me.peers && other.first == me.first {
                        waiting.insert(other.run, (other, stream));
                    } else if other.run != me.run {
                        others.insert(other.node);
                    }
                }
            }
        }
    }
    let names: BTreeSet<&NodeName> = waiting.values().map(|(w, _)| &w.node).collect();
    let needed = peers.len() / 2 + 1;
    let there = names.len() + 1;
    if !others.is_empty() {
        let others = others.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        return Look::Wait(format!("{others} has another list of peers: start all nodes with the same"));
    }
    if first != BTreeSet::from([me.run]) {
        let found = if first.is_empty() { "does not answer" } else { "is to found it" };
        let all = peers.len();
        return Look::Wait(format!("{} {found}; {there} of {all} nodes are here{strangers}", peers[0]));
    }
    if peers.len() < 2 || there < needed {
        let all = peers.len();
        let needs =
            format!("{there} of the {all} nodes of the list are here, {needed} are needed{strangers}");
        return Look::Wait(needs);
    }
    {
        // From here on this node votes for nobody else.
        let mut mine = vote.lock().expect("nothing panics while it is held");
        if mine.as_ref().is_some_and(|(of, _)| *of != me.node) {
            return Look::Wait("another node is founding it".to_owned());
        }
        *mine = Some((me.node.clone(), me.run));
    }
    let asked = waiting.into_values().map(|(_, stream)| ask(me, stream));
    let votes = 1 + join_all(asked).await.into_iter().filter(|granted| *granted).count();
    match votes >= needed {
        true => Look::Found,
        false => Look::Wait(format!("{votes} of {needed} votes are in")),
    }
}

/// All that an address leads to: a name may have many, and others the next time.
async fn see(address: &Address, certs: &NodeCerts) -> Vec<Seen> {
    let resolved = timeout(PATIENCE, lookup_host((address.host(), address.port()))).await;
    let sockets: BTreeSet<SocketAddr> = match resolved {
        Ok(Ok(sockets)) => sockets.collect(),
        _ => return Vec::new(),
    };
    let mut seen = Vec::new();
    for result in join_all(sockets.iter().map(|socket| see_one(address, *socket, certs))).await {
        match result {
            Ok(found) => seen.push(found),
            Err(PreflightError::OtherMesh { .. }) => seen.push(Seen::Stranger("has another mesh's key")),
            Err(PreflightError::NotItsName { .. }) => {
                seen.push(Seen::Stranger("does not know this name of itself: start it with the same list"));
            }
            Err(PreflightError::NotAPeer { what, .. }) => seen.push(Seen::Stranger(what)),
            Err(e) => debug!("{e}"),
        }
    }
    seen
}

async fn see_one(address: &Address, socket: SocketAddr, certs: &NodeCerts) -> Result<Seen, PreflightError> {
    let (info, stream) = preflight::look(address, socket, certs).await?;
    match serde_json::from_value::<Waiting>(info["litemesh"].clone()) {
        Ok(waiting) => Ok(Seen::Waits(waiting, Box::new(stream))),
        Err(_) => Ok(Seen::Member(preflight::Peer::introduced(&info, address))),
    }
}

/// Asks for a vote.
async fn ask(me: &Waiting, mut stream: Box<BufReader<Tls>>) -> bool {
    let asking = async {
        let mut line = serde_json::to_vec(me).expect("strings become JSON");
        line.push(b'\n');
        stream.write_all(&line).await?;
        stream.flush().await?;
        let mut answer = String::new();
        (&mut *stream).take(MAX_LINE).read_line(&mut answer).await?;
        io::Result::Ok(answer.trim() == "+OK")
    };
    matches!(timeout(PATIENCE, asking).await, Ok(Ok(true)))
}

/// Listens as a node that waits.
async fn open(
    me: &Waiting,
    listen: SocketAddr,
    certs: &Arc<NodeCerts>,
    vote: Arc<Mutex<Option<(NodeName, u64)>>>,
) -> Result<Door, FabricError> {
    let listener = bind(listen).await?;
    let config = certs.server_config().map_err(|e| FabricError::Connect { reason: e.to_string() })?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (me, room) = (me.clone(), Arc::new(Semaphore::new(AT_ONCE)));
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut talks = JoinSet::new();
        loop {
            while talks.try_join_next().is_some() {}
            let Ok(permit) = room.clone().acquire_owned().await else { return };
            let Ok((stream, _)) = listener.accept().await else {
                sleep(LOOK_AGAIN).await;
                continue;
            };
            let (acceptor, me, vote) = (acceptor.clone(), me.clone(), vote.clone());
            talks.spawn(async move {
                let talk = timeout(PATIENCE * 2, answer(acceptor, stream, &me, &vote)).await;
                if !matches!(talk, Ok(Ok(()))) {
                    debug!("a connection to a node that waits came to nothing");
                }
                drop(permit);
            });
        }
    });
    Ok(Door { tasks })
}

/// A predecessor that was killed may hold the port for a moment.
async fn bind(listen: SocketAddr) -> Result<TcpListener, FabricError> {
    let until = Instant::now() + PORT_PATIENCE;
    loop {
        match TcpListener::bind(listen).await {
            Ok(listener) => return Ok(listener),
            Err(e) if e.kind() != io::ErrorKind::AddrInUse => {
                return Err(FabricError::System { what: "cannot listen for peers", source: e });
            }
            Err(_) if Instant::now() >= until => {
                return Err(FabricError::ClusterPortTaken { address: listen.into() });
            }
            Err(_) => sleep(LOOK_AGAIN).await,
        }
    }
}

/// Says who waits here, and votes if that is asked for: once, until whoever got the vote is started anew.
async fn answer(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    me: &Waiting,
    vote: &Mutex<Option<(NodeName, u64)>>,
) -> io::Result<()> {
    let mut stream = BufReader::new(acceptor.accept(stream).await?);
    let info: Value = json!({ "server_name": me.node, "litemesh": me });
    stream.write_all(format!("INFO {info}\r\n").as_bytes()).await?;
    stream.flush().await?;
    let mut line = String::new();
    (&mut stream).take(MAX_LINE).read_line(&mut line).await?;
    let Ok(asks) = serde_json::from_str::<Waiting>(&line) else { return Ok(()) };
    let granted = asks.peers == me.peers && asks.first == me.first && {
        let mut given = vote.lock().expect("nothing panics while it is held");
        let free = given.as_ref().is_none_or(|(of, _)| *of == asks.node);
        if free {
            *given = Some((asks.node.clone(), asks.run));
        }
        free
    };
    if !granted {
        warn!(node = %asks.node, "would found the mesh, and gets no vote: another node has it");
    }
    stream.write_all(if granted { b"+OK\r\n" } else { b"-NO\r\n" }).await?;
    stream.flush().await
}
