//! The fabric of a real node. Invariant: nothing of NATS ever holds up its caller: what cannot be sent at once is
//! refused, what cannot be taken in at once is dropped and counted, and the peers repair it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::connection::State;
use futures::StreamExt;
use futures::stream::select_all;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use super::accounts::MESH_USER;
use super::bootstrap::{self, Founding};
use super::conf::MAX_PAYLOAD_BYTES;
use super::error::FabricError;
use super::events::{Answers, Events};
use super::hello::{Exchange, Roster};
use super::identity::Identity;
use super::link::{Incoming, LogRequest, Outgoing};
use super::log_read;
use super::log_stream::{Keeper, LogCounters, LogState};
use super::members::Members;
use super::options::FabricOptions;
use super::rotation::{Rotation, Told};
use super::server::{self, AS_EXPECTED, Server, ServerSetup};
use super::state_lock::StateLock;
use super::subjects::{self, Envelope};
use super::token::JoinToken;
use super::{departure, gate, monitor, private_file, watchdog};
use crate::core::names::NodeName;

/// A server on the same host that takes nothing for this long is not going to.
const SEND_PATIENCE: Duration = Duration::from_secs(1);
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// Servers dial a peer that is away once a second.
const PEERS_PATIENCE: Duration = Duration::from_secs(3);
const FIRST_RECONNECT: Duration = Duration::from_millis(20);
const LAST_RECONNECT: Duration = Duration::from_millis(500);
/// The largest message that may be sent: the server's limit, less what headers could take.
pub const MAX_MESSAGE_BYTES: usize = MAX_PAYLOAD_BYTES - 64 * 1024;
/// Any user may ask this of a server; the answer says that everything sent before has been read.
const WHO_AM_I: &str = "$SYS.REQ.USER.INFO";

/// The state of our own server and of what goes through it.
#[derive(Debug, Clone, Default)]
pub struct ServerInfo {
    /// The server's process.
    pub pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u64,
    /// It says that its storage works. One without peers or leader is well.
    pub healthy: bool,
    /// Its version.
    pub version: String,
    /// The peers whose servers are connected to it.
    pub routes: Vec<String>,
    /// Where the host's own programs connect.
    pub client_url: String,
    /// The node whose server leads the cluster, if it can decide anything, and how many servers decide.
    pub leader: Option<String>,
    /// See above.
    pub servers: u64,
    /// This node's log.
    pub log: LogState,
    /// Commits that were not taken in time and left to repair.
    pub dropped_commits: u64,
    /// Other messages that were not taken in time.
    pub dropped_messages: u64,
}

#[derive(Debug, Default)]
struct Drops {
    commits: AtomicU64,
    messages: AtomicU64,
}

/// A node's connection to its mesh, and the server it goes through.
pub struct Fabric {
    identity: Arc<Identity>,
    client: async_nats::Client,
    server: Arc<Server>,
    roster: Arc<Roster>,
    log: Arc<LogCounters>,
    drops: Arc<Drops>,
    answers: Arc<Answers>,
    keys: Arc<Told>,
    is_founder: bool,
    /// Where the log answers to commits.
    ack_subject: String,
    /// What is to be read of logs.
    readings: mpsc::Sender<LogRequest>,
    /// Ended when it is dropped.
    tasks: JoinSet<()>,
}

impl Fabric {
    /// Starts the server, founds or joins the mesh, connects. Returns when messages flow; the log may come later.
    pub async fn start(options: FabricOptions) -> Result<(Self, mpsc::Receiver<Incoming>), FabricError> {
        private_file::make_dir(&options.state_dir)
            .map_err(|source| FabricError::System { what: "cannot make the state directory", source })?;
        let lock = StateLock::take(&options.state_dir).await?;
        let (identity, members, founder) = Identity::establish(&options).await?;
        let bin = identity.state.bin();
        let binary = tokio::task::spawn_blocking(move || nats_launcher::Bundle::install(&bin))
            .await
            .map_err(|e| FabricError::System { what: "unpacking", source: std::io::Error::other(e) })??;
        let is_founder = founder.is_some();
        if let Some(door) = founder {
            found_aside(&identity, &binary).await?;
            // From now on the real server answers there: whoever waits is to join it.
            door.close().await;
        }
        let mut tasks = JoinSet::new();
        // Before the server is ready: it loads its streams as soon as the gate is open.
        tasks.spawn(gate::hold(identity.ports.gate, identity.accounts.gate.clone()));
        let conf = identity.conf_text(&members);
        let server = match start_server(&identity, &binary, &conf, &options, lock).await {
            Err(FabricError::Server { reason }) if server::is_damage(&reason) => {
                watchdog::set_aside(&identity.state.store(), &reason)?;
                let lock = StateLock::take(&options.state_dir).await?;
                start_server(&identity, &binary, &conf, &options, lock).await?
            }
            started => started?,
        };
        if !bootstrap::is_done(identity.state.path()) {
            found_or_return(&identity, &binary, options.join.is_some()).await?;
        }
        let client = connect(&identity).await?;
        let (server, identity) = (Arc::new(server), Arc::new(identity));
        let roster = Arc::new(Roster::new(members));
        let (readings, to_read) = mpsc::channel(log_read::QUEUE);
        let fabric = Self {
            ack_subject: client.new_inbox(),
            readings,
            log: Arc::default(),
            drops: Arc::default(),
            answers: Arc::default(),
            keys: Arc::default(),
            is_founder,
            identity,
            client,
            server,
            roster,
            tasks,
        };
        fabric.run(&options, to_read).await
    }

    /// Subscribes, and starts what goes on in the background.
    async fn run(
        mut self,
        options: &FabricOptions,
        to_read: mpsc::Receiver<LogRequest>,
    ) -> Result<(Self, mpsc::Receiver<Incoming>), FabricError> {
        let (to_replica, incoming) = mpsc::channel(options.incoming_capacity.max(1));
        let node = self.identity.node.clone();
        let mut subscribers = Vec::new();
        for subject in [subjects::ALL_COMMITS, subjects::ALL_BROADCASTS, subjects::all_direct(&node).as_str()]
        {
            subscribers.push(self.subscribe(subject).await?);
        }
        let mut acks = self.subscribe(&format!("{}.*", self.ack_subject)).await?;
        let hellos = self.subscribe(subjects::ALL_HELLOS).await?;
        let keys_said = self.subscribe(subjects::ALL_KEYS).await?;
        let keys_handed = self.subscribe(&subjects::keys_for(&node)).await?;
        let answers = self.subscribe(&subjects::all_answers(node.as_str())).await?;
        self.flush().await?;
        self.tasks.spawn(log_read::run(self.client.clone(), to_read, to_replica.clone()));
        let (drops, log) = (self.drops.clone(), self.log.clone());
        self.tasks.spawn(async move {
            let mut messages = select_all(subscribers);
            while let Some(message) = messages.next().await {
                if let Some(incoming) = subjects::open(&node, &message.subject, message.payload) {
                    hand_over(&to_replica, &drops, incoming);
                }
            }
        });
        self.tasks.spawn(async move {
            while let Some(message) = acks.next().await {
                log.answered(&message);
            }
        });
        let keeper = Keeper {
            client: self.client.clone(),
            node: self.identity.node.clone(),
            limits: options.log,
            state_dir: self.identity.state.path().to_owned(),
            counters: self.log.clone(),
            roster: self.roster.clone(),
            monitor: self.identity.ports.monitor,
        };
        self.tasks.spawn(keeper.run());
        self.tasks.spawn(self.exchange().run(hellos));
        self.tasks.spawn(self.rotation().run(keys_said, keys_handed));
        self.tasks.spawn(self.answers.clone().hear(answers));
        let (address, store) = (self.identity.ports.monitor, self.identity.state.store());
        self.tasks.spawn(watchdog::watch(self.server.clone(), address, store, watchdog::PERIOD));
        Ok((self, incoming))
    }

    fn exchange(&self) -> Exchange {
        Exchange {
            client: self.client.clone(),
            identity: self.identity.clone(),
            server: self.server.clone(),
            roster: self.roster.clone(),
        }
    }

    fn rotation(&self) -> Rotation {
        Rotation {
            client: self.client.clone(),
            identity: self.identity.clone(),
            server: self.server.clone(),
            roster: self.roster.clone(),
            told: self.keys.clone(),
        }
    }

    async fn subscribe(&self, subject: &str) -> Result<async_nats::Subscriber, FabricError> {
        self.client
            .subscribe(subject.to_owned())
            .await
            .map_err(|e| FabricError::Connect { reason: format!("subscribing {subject}: {e}") })
    }

    /// Sends a message. An error says that it was not sent, and nothing tries again; success promises nothing.
    pub async fn send(&self, out: Outgoing) -> Result<(), FabricError> {
        if let Outgoing::ReadLog(asked) = out {
            return self.readings.try_send(asked).map_err(|_| FabricError::Stalled);
        }
        let Some(Envelope { subject, payload, logged }) = Envelope::seal(&self.identity.node, out) else {
            return Ok(());
        };
        if payload.len() > MAX_MESSAGE_BYTES {
            return Err(FabricError::TooLarge { len: payload.len(), limit: MAX_MESSAGE_BYTES });
        }
        // The client would keep it, and its caller waiting, until the server is back.
        if !self.connected() {
            return Err(FabricError::NotConnected);
        }
        let publish = async {
            if logged {
                let reply = format!("{}.{}", self.ack_subject, self.log.answer_token());
                self.client.publish_with_reply(subject, reply, payload).await
            } else {
                self.client.publish(subject, payload).await
            }
        };
        match timeout(SEND_PATIENCE, publish).await {
            Err(_) => Err(FabricError::Stalled),
            Ok(Err(_)) => Err(FabricError::NotConnected),
            Ok(Ok(())) => {
                if logged {
                    self.log.published();
                }
                Ok(())
            }
        }
    }

    /// What tells the host's programs of changes of rows.
    pub fn events(&self) -> Events {
        Events::new(self.identity.node.clone(), self.client.clone(), self.answers.clone())
    }

    /// Until our own server has read everything that was sent before.
    pub async fn flush(&self) -> Result<(), FabricError> {
        match timeout(FLUSH_PATIENCE, self.client.request(WHO_AM_I, "".into())).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) if !self.connected() => Err(FabricError::NotConnected),
            Ok(Err(_)) | Err(_) => Err(FabricError::Stalled),
        }
    }

    /// Whether there is a connection to our own server.
    pub fn connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// What lets another node join: the key, and where this node and those it knows listen.
    pub fn join_token(&self) -> Result<JoinToken, FabricError> {
        let mut addresses = self.identity.own.clone();
        addresses.extend(self.roster.routes(&self.identity.own));
        Ok(JoinToken::new(self.identity.ring().current().clone(), addresses)?)
    }

    /// Names the mesh, for ever.
    pub fn mesh_id(&self) -> String {
        self.identity.mesh_id.clone()
    }

    /// Makes a new key for the mesh. The old one is accepted until every member has the new one.
    pub fn change_key(&self) -> Result<(), FabricError> {
        self.rotation().change()
    }

    /// Has all nodes accept the key from before the last change no more, whoever has no other.
    pub fn drop_old_key(&self) -> Result<(), FabricError> {
        self.rotation().drop_old()
    }

    /// The members that are not known to have the mesh's new key; none unless it is being changed.
    pub fn without_new_key(&self) -> Vec<NodeName> {
        self.rotation().waiting_for()
    }

    /// Why no peer lets this node in, if it is because of its key.
    pub fn key_notice(&self) -> Option<String> {
        self.keys.notice()
    }

    /// Whether two keys are accepted.
    pub fn is_key_changing(&self) -> bool {
        self.identity.ring().previous().is_some()
    }

    /// Whether this start has founded the mesh for a list of peers that wait for it.
    pub fn is_founder(&self) -> bool {
        self.is_founder
    }

    /// The other nodes that were ever heard of, connected or not.
    pub fn members(&self) -> Vec<NodeName> {
        self.roster.names()
    }

    /// The nodes that left or were removed, and did not come again.
    pub fn gone(&self) -> Vec<NodeName> {
        self.roster.gone()
    }

    /// Takes a node out of the mesh that is stopped and will not come back, on all nodes. Should it come back all the
    /// same, it is a member again.
    pub async fn remove_member(&self, node: &NodeName) -> Result<(), FabricError> {
        let members = self.members();
        if !members.contains(node) && *node != self.identity.node {
            return Err(FabricError::NoMember { node: node.clone(), members });
        }
        departure::remove(&self.identity, node, &self.roster.addresses(node)).await?;
        self.exchange().forget(node).await;
        Ok(())
    }

    /// Streams of the host's programs of which nobody answers now.
    pub async fn unanswered_streams(&self) -> Result<Vec<String>, FabricError> {
        departure::unanswered_streams(&self.identity).await
    }

    /// Streams that are bound to this node by a tag, other than its log.
    pub async fn bound_streams(&self) -> Result<Vec<String>, FabricError> {
        departure::bound_streams(&self.identity).await
    }

    /// An error says why this node cannot leave now.
    pub async fn may_leave(&self) -> Result<(), FabricError> {
        departure::may_leave(&self.identity).await
    }

    /// Gives the streams on this node to others. It stays a member.
    pub async fn evacuate(&self, patience: Duration) -> Result<(), FabricError> {
        // It would be brought back to where it should be.
        self.log.set_unwanted(true);
        departure::evacuate(&self.identity, patience).await.inspect_err(|_| self.log.set_unwanted(false))
    }

    /// After [`Fabric::evacuate`]: the node does not leave after all.
    pub fn stay(&self) {
        self.set_leaving(false);
    }

    /// Takes this node out of the mesh. Afterwards it has to be shut down, at once.
    pub async fn leave(&self) -> Result<(), FabricError> {
        self.set_leaving(true);
        if let Err(e) = departure::leave(&self.identity).await {
            self.set_leaving(false);
            return Err(e);
        }
        self.exchange().say_farewell().await;
        // It is on its way to the peers when our own server has read it.
        self.flush().await
    }

    /// A node that leaves does not say that it is there, and does not make its log anew.
    fn set_leaving(&self, leaving: bool) {
        self.roster.set_leaving(leaving);
        self.log.set_unwanted(leaving);
    }

    /// Whether the cluster can decide anything at all: more than half of its servers are connected.
    pub async fn can_decide(&self) -> bool {
        departure::has_leader(&self.identity).await
    }

    /// The members whose servers are not connected to ours.
    pub async fn absent(&self) -> Result<Vec<NodeName>, FabricError> {
        let failed = |source| FabricError::System { what: "our own nats-server does not answer", source };
        let connected = monitor::route_names(self.identity.ports.monitor).await.map_err(failed)?;
        let is_absent = |node: &NodeName| !connected.iter().any(|name| name == node.as_str());
        Ok(self.members().into_iter().filter(is_absent).collect())
    }

    /// Has the cluster go on without the members that are gone, though they were too many for it to decide that.
    pub async fn rescue(&self, gone: &[NodeName]) -> Result<(), FabricError> {
        let with_addresses = |node: &NodeName| (node.clone(), self.roster.addresses(node));
        let gone: Vec<_> = gone.iter().map(with_addresses).collect();
        departure::rescue(&self.identity, &gone).await?;
        for (node, _) in &gone {
            self.exchange().forget(node).await;
        }
        Ok(())
    }

    /// The state of our own server. What it does not tell within a moment is left empty.
    pub async fn server_info(&self) -> ServerInfo {
        let address = self.identity.ports.monitor;
        let routes = monitor::route_names(address).await.unwrap_or_default();
        let healthy = monitor::is_healthy(address).await;
        let group = monitor::meta_group(address).await.unwrap_or_default();
        ServerInfo {
            leader: group.leader,
            servers: group.size,
            pid: self.server.pid(),
            restarts: self.server.restarts(),
            healthy,
            version: self.client.server_info().version,
            routes,
            client_url: format!("nats://{}", self.identity.ports.client_address()),
            log: self.log.state(),
            dropped_commits: self.drops.commits.load(Ordering::Relaxed),
            dropped_messages: self.drops.messages.load(Ordering::Relaxed),
        }
    }

    /// Hands over what was sent, closes, and stops the server.
    pub async fn shutdown(self) {
        let Self { client, server, mut tasks, .. } = self;
        if client.connection_state() == State::Connected {
            // A server that no longer answers cannot be handed anything.
            let _ = timeout(FLUSH_PATIENCE, client.request(WHO_AM_I, "".into())).await;
        }
        tasks.shutdown().await;
        drop(client);
        match Arc::into_inner(server) {
            Some(server) => server.stop().await,
            None => debug!("the server is still in use: it ends with its last user"),
        }
    }
}

/// Starts the server, and waits until it is ready.
async fn start_server(
    identity: &Identity,
    binary: &std::path::Path,
    conf: &str,
    options: &FabricOptions,
    lock: StateLock,
) -> Result<Server, FabricError> {
    let setup = ServerSetup {
        name: identity.node.as_str(),
        binary,
        conf_path: identity.state.conf(),
        conf,
        memory_limit_mib: Some(options.memory_budget_mib),
        hushed: AS_EXPECTED.to_vec(),
    };
    let server = Server::start(setup, Some(lock))?;
    match server.ready(&identity.ports).await {
        Ok(()) => Ok(server),
        Err(e) => {
            server.stop().await;
            Err(e)
        }
    }
}

fn hand_over(to_replica: &mpsc::Sender<Incoming>, drops: &Drops, incoming: Incoming) {
    if let Err(TrySendError::Full(incoming)) = to_replica.try_send(incoming) {
        let counter = match incoming {
            Incoming::Commit { .. } => &drops.commits,
            Incoming::Message { .. } | Incoming::Logged(_) => &drops.messages,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A node that is started with its own token may be the first, or the first one that has lost its disk: then its peers
/// dial it, and there must not be a second cluster.
async fn found_or_return(
    identity: &Identity,
    binary: &std::path::Path,
    may_have_peers: bool,
) -> Result<(), FabricError> {
    if may_have_peers && monitor::peer_within(identity.ports.monitor, PEERS_PATIENCE).await {
        return bootstrap::mark_done(identity.state.path());
    }
    bootstrap::found(Founding {
        conf: identity.conf(&[]),
        ports: &identity.ports,
        binary,
        state_dir: identity.state.path(),
        connect: identity.client_options(bootstrap::sys_options(&identity.accounts))?,
    })
    .await
}

/// Founds the cluster where no peer can meet it half-founded.
async fn found_aside(identity: &Identity, binary: &std::path::Path) -> Result<(), FabricError> {
    let aside = identity.aside()?;
    let setup = ServerSetup {
        name: aside.node.as_str(),
        binary,
        conf_path: aside.state.conf(),
        conf: &aside.conf_text(&Members::default()),
        memory_limit_mib: None,
        hushed: AS_EXPECTED.to_vec(),
    };
    let server = Server::start(setup, None)?;
    let gate = tokio::spawn(gate::hold(aside.ports.gate, aside.accounts.gate.clone()));
    let result = async {
        server.ready(&aside.ports).await?;
        found_or_return(&aside, binary, false).await
    }
    .await;
    gate.abort();
    server.stop().await;
    result
}

async fn connect(identity: &Identity) -> Result<async_nats::Client, FabricError> {
    let options = async_nats::ConnectOptions::with_user_and_password(
        MESH_USER.to_owned(),
        identity.accounts.mesh.reveal().to_owned(),
    )
    .name("litemesh")
    .no_echo()
    // Only our own server: another node's has other passwords, and is not ours to depend on.
    .ignore_discovered_servers()
    .max_reconnects(None)
    .ping_interval(Duration::from_secs(5))
    .reconnect_delay_callback(|attempt| {
        let attempt = u32::try_from(attempt).unwrap_or(u32::MAX);
        FIRST_RECONNECT.saturating_mul(attempt).min(LAST_RECONNECT)
    })
    // Every subject is made of names that were checked.
    .skip_subject_validation(true)
    .event_callback(|event| async move { debug!("nats: {event}") });
    let options = identity.client_options(options)?;
    let address = format!("nats://{}", identity.ports.client_address());
    let refused = |reason: String| FabricError::Connect { reason };
    timeout(CONNECT_PATIENCE, options.connect(address))
        .await
        .map_err(|_| refused("no answer".to_owned()))?
        .map_err(|e| refused(e.to_string()))
}
