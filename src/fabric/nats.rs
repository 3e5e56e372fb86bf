//! The fabric of a real node. Invariant: nothing of NATS ever holds up its caller: what cannot be sent at once is
//! refused, what cannot be taken in at once is dropped and counted, and the peers repair it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::connection::State;
use futures::StreamExt;
use futures::stream::select_all;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::bundled::Bundled;
use super::conf::MAX_PAYLOAD_BYTES;
use super::error::FabricError;
use super::events::{Answers, Events};
use super::external::{self, External};
use super::hello::Roster;
use super::link::{Incoming, LogRequest, Outgoing};
use super::log_stream::{Keeper, LogCounters, LogState};
use super::options::{FabricOptions, StateDir};
use super::state_lock::StateLock;
use super::subjects::{Envelope, Subjects};
use super::{log_read, monitor, private_file};
use crate::core::names::NodeName;

/// A server on the same host that takes nothing for this long is not going to.
const SEND_PATIENCE: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);
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
    /// The server is not ours.
    pub external: bool,
}

#[derive(Debug, Default)]
struct Drops {
    commits: AtomicU64,
    messages: AtomicU64,
}

/// What carries the mesh.
pub(super) enum System {
    /// A server that this process runs.
    Bundled(Bundled),
    /// One that somebody else runs.
    External(Arc<External>),
}

/// A node's connection to its mesh, and the server it goes through.
pub struct Fabric {
    pub(super) node: NodeName,
    pub(super) system: System,
    pub(super) subjects: Subjects,
    pub(super) client: async_nats::Client,
    pub(super) roster: Arc<Roster>,
    pub(super) log: Arc<LogCounters>,
    drops: Arc<Drops>,
    answers: Arc<Answers>,
    /// Where the log answers to commits.
    ack_subject: String,
    /// What is to be read of logs.
    readings: mpsc::Sender<LogRequest>,
    /// Ended when it is dropped.
    tasks: JoinSet<()>,
    /// While no server of our own holds it.
    _lock: Option<StateLock>,
}

impl Fabric {
    /// Starts the server, founds or joins the mesh, connects. Returns when messages flow; the log may come later.
    pub async fn start(options: FabricOptions) -> Result<(Self, mpsc::Receiver<Incoming>), FabricError> {
        private_file::make_dir(&options.state_dir)
            .map_err(|source| FabricError::System { what: "cannot make the state directory", source })?;
        let lock = StateLock::take(&options.state_dir).await?;
        let mut tasks = JoinSet::new();
        let (system, subjects, client, members, lock) = match &options.external {
            None => {
                external::expect_none(&StateDir::new(&options.state_dir))?;
                let (bundled, client, members) = Bundled::start(&options, lock, &mut tasks).await?;
                (System::Bundled(bundled), Subjects::bundled(), client, members, None)
            }
            Some(nats) => {
                let (external, client, members) = External::start(nats, &options).await?;
                let subjects = Subjects::of_mesh(&nats.mesh);
                (System::External(external), subjects, client, members, Some(lock))
            }
        };
        let (readings, to_read) = mpsc::channel(log_read::QUEUE);
        let fabric = Self {
            node: options.node.clone(),
            system,
            subjects,
            ack_subject: client.new_inbox(),
            readings,
            roster: Arc::new(Roster::new(members)),
            log: Arc::default(),
            drops: Arc::default(),
            answers: Arc::default(),
            client,
            tasks,
            _lock: lock,
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
        let (node, ours) = (self.node.clone(), self.subjects.clone());
        let mut subscribers = Vec::new();
        for subject in [ours.all_commits(), ours.all_broadcasts(), ours.all_direct(&node)] {
            subscribers.push(self.subscribe(&subject).await?);
        }
        let mut acks = self.subscribe(&format!("{}.*", self.ack_subject)).await?;
        let hellos = self.subscribe(&ours.all_hellos()).await?;
        let answers = self.subscribe(&ours.all_answers(node.as_str())).await?;
        self.tasks.spawn(log_read::run(self.client.clone(), ours.clone(), to_read, to_replica.clone()));
        let (drops, log) = (self.drops.clone(), self.log.clone());
        let subjects = ours.clone();
        self.tasks.spawn(async move {
            let mut messages = select_all(subscribers);
            while let Some(message) = messages.next().await {
                if let Some(incoming) = subjects.open(&node, &message.subject, message.payload) {
                    hand_over(&to_replica, &drops, incoming);
                }
            }
        });
        self.tasks.spawn(async move {
            while let Some(message) = acks.next().await {
                log.answered(&message);
            }
        });
        self.tasks.spawn(self.answers.clone().hear(answers));
        let monitor = self.run_system().await?;
        let keeper = Keeper {
            client: self.client.clone(),
            node: self.node.clone(),
            limits: options.log,
            state_dir: options.state_dir.clone(),
            counters: self.log.clone(),
            roster: self.roster.clone(),
            subjects: ours,
            monitor,
        };
        self.tasks.spawn(keeper.run());
        self.tasks.spawn(self.exchange().run(hellos));
        Ok((self, incoming))
    }

    /// What goes on with a server of our own alone, or another's. Returns where our own is asked about its state.
    async fn run_system(&mut self) -> Result<Option<SocketAddr>, FabricError> {
        match &self.system {
            System::Bundled(bundled) => {
                let monitor = bundled.identity.ports.monitor;
                let said = self.subscribe(&self.subjects.all_keys()).await?;
                let handed = self.subscribe(&self.subjects.keys_for(&self.node)).await?;
                self.flush().await?;
                let rotation = self.rotation()?;
                self.tasks.spawn(rotation.run(said, handed));
                Ok(Some(monitor))
            }
            System::External(external) => {
                let asked = self.subscribe(&self.subjects.presence(&self.node)).await?;
                if self.connected() {
                    external.permits(&self.client).await?;
                }
                external.settle(&self.roster.members())?;
                self.tasks.spawn(External::be_there(self.client.clone(), asked));
                Ok(None)
            }
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
        let Some(Envelope { subject, payload, logged }) = self.subjects.seal(&self.node, out) else {
            return Ok(());
        };
        let limit = MAX_MESSAGE_BYTES.min(self.client.max_payload());
        if payload.len() > limit {
            return Err(FabricError::TooLarge { len: payload.len(), limit });
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

    /// Until this node's log answers, but not for long: where nobody leads it may not for a while, and nothing needs it.
    pub async fn log_answers(&self, patience: Duration) {
        let until = Instant::now() + patience;
        while !self.is_external() && !self.log.state().exists && Instant::now() < until {
            sleep(LOOK_AGAIN).await;
        }
    }

    /// What tells the host's programs of changes of rows.
    pub fn events(&self) -> Events {
        let monitor = match &self.system {
            // Nobody sees who listens at a hub.
            System::Bundled(bundled) if bundled.hub.is_none() => Some(bundled.identity.ports.monitor),
            System::Bundled(_) | System::External(_) => None,
        };
        let (node, subjects) = (self.node.clone(), self.subjects.clone());
        Events::new(node, subjects, self.client.clone(), self.answers.clone(), monitor)
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

    /// The state of our own server, or of the connection to another system. What is not told within a moment is left empty.
    pub async fn server_info(&self) -> ServerInfo {
        let info = ServerInfo {
            version: self.client.server_info().version,
            log: self.log.state(),
            dropped_commits: self.drops.commits.load(Ordering::Relaxed),
            dropped_messages: self.drops.messages.load(Ordering::Relaxed),
            ..ServerInfo::default()
        };
        let (identity, server) = match &self.system {
            System::Bundled(bundled) => (&bundled.identity, &bundled.server),
            System::External(external) => {
                return ServerInfo {
                    healthy: self.connected(),
                    client_url: external.url.clone(),
                    external: true,
                    ..info
                };
            }
        };
        let address = identity.ports.monitor;
        let routes = monitor::route_names(address).await.unwrap_or_default();
        let healthy = monitor::is_healthy(address).await;
        let group = monitor::meta_group(address).await.unwrap_or_default();
        ServerInfo {
            leader: group.leader,
            servers: group.size,
            pid: server.pid(),
            restarts: server.restarts(),
            healthy,
            routes,
            client_url: format!("nats://{}", identity.ports.client_address()),
            ..info
        }
    }

    /// Hands over what was sent, closes, and stops the server.
    pub async fn shutdown(self) {
        let Self { client, system, mut tasks, _lock, .. } = self;
        if client.connection_state() == State::Connected {
            // A server that no longer answers cannot be handed anything.
            let _ = timeout(FLUSH_PATIENCE, client.request(WHO_AM_I, "".into())).await;
        }
        tasks.shutdown().await;
        drop(client);
        let System::Bundled(Bundled { server, .. }) = system else { return };
        match Arc::into_inner(server) {
            Some(server) => server.stop().await,
            None => debug!("the server is still in use: it ends with its last user"),
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
