//! The composition root: builds a node from its configuration, runs it, and drains it in order. Invariant: shutting
//! down goes from the files outwards: absorb, send, close, then stop the server.

pub mod arriving;
pub mod cdc;
pub mod control;
pub mod control_changes;
pub mod control_key;
pub mod control_members;
pub mod control_verify;
pub mod databases;
mod direct_file;
pub mod divergence;
pub mod joining;
pub mod leaving;
pub mod observe;
pub mod recovery;
pub mod repair;
pub mod restamp;
pub mod router;
pub mod serve_copy;
pub mod state_dir;
pub mod verify;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use control::{Contact, Control, DetachRequest, RestampRequest};
use databases::{Found, Running, Starter};
use leaving::LeaveRequest;
use observe::Observer;
use router::Router;
use state_dir::NodeState;

use crate::config::{Config, External};
use crate::core::message::Message;
use crate::core::names::DbName;
use crate::fabric::keys::MeshKey;
use crate::fabric::link::Outgoing;
use crate::fabric::{
    ExternalNats, Fabric, FabricError, FabricOptions, JoinToken, LeafHub, LogLimits, LogReplicas, StateDir,
};
use crate::replica::adopt;
use crate::sqlite;
use crate::status::http;

/// Messages that may wait for our own nats-server: of at most half a MiB each, and workers wait when it is full.
const OUTGOING: usize = 64;
/// How often files that were replaced are looked for, and after how many times it is written down as which
/// sites they go on.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const NOTE_TURNS: u64 = 10;
/// Messages that may wait to be looked at. The databases' own queues hold what is large.
const INCOMING: usize = 1_024;
/// What streams of the host's programs may take at least.
const OTHER_STREAMS_MIB: u64 = 1_024;

/// How long nodes that are there may take to say which databases they have; and where all were started at once with a
/// list of peers, for the one that founds the mesh to take its files in.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);
const FOUNDER_PATIENCE: Duration = Duration::from_secs(15);

/// How long `ready` waits for this node's log, which may answer some moments after everything else.
const LOG_PATIENCE: Duration = Duration::from_millis(500);

/// What `up` tells when the node runs.
pub struct Started {
    /// The node's name.
    pub node: String,
    /// The options with which others join.
    pub joining: String,
    /// Where the status page is.
    pub http: SocketAddr,
    /// The databases.
    pub databases: Vec<(DbName, std::path::PathBuf)>,
}

/// Runs a node until a signal ends it. `started` is called once, when replication runs.
pub async fn run(config: Config, started: impl FnOnce(&Started)) -> Result<()> {
    let state = NodeState::open(&config.state_dir)?;
    // Before anything is changed anywhere.
    let found: Vec<Found> = config.databases.iter().cloned().map(databases::find).collect::<Result<_>>()?;
    let listener = TcpListener::bind(config.http).await.with_context(|| {
        format!("{} is taken by another process: stop it, or choose another port with --http", config.http)
    })?;
    let page = listener.local_addr()?;
    let options = fabric_options(&config)?;
    let (joins, listed) = (options.join.is_some(), !options.peers.is_empty());
    let (fabric, incoming) = Fabric::start(options).await.map(|(f, i)| (Arc::new(f), i))?;
    // Of nodes that start together the founder's files come first: the others wait until it has taken them in.
    let (founds, follows) = (fabric.is_founder(), listed && !fabric.is_founder());
    let joining = fabric.joining_options()?;
    let (outgoing, to_send) = mpsc::channel(OUTGOING);
    let router = Router::new(config.name.clone(), outgoing.clone(), state.spool(), config.max_skew);
    let mut tasks = JoinSet::new();
    let sending = tokio::spawn(send_all(fabric.clone(), to_send));
    tasks.spawn(router.clone().run(incoming));
    tasks.spawn(router.clone().keep_saying_hello());
    let observer = Observer::new(&config, state.dir(), fabric.clone(), router.clone());
    tasks.spawn(observer.clone().run());
    keep_verifying(&config, &fabric, &router, &mut tasks);
    cdc::keep_publishing(&config, &state, &fabric, &router, &mut tasks);
    tasks.spawn(router.clone().keep_rechecking());
    tasks.spawn(recovery::keep_catching_up(router.clone(), state.spool()));
    let (detach, detaching) = mpsc::channel(4);
    let (restamp, restamping) = mpsc::channel(4);
    let (leave, leaving) = mpsc::channel(1);
    let contact = Contact::publish(state.dir(), page)?;
    let control = Control {
        router: router.clone(),
        detach,
        restamp,
        leave,
        fabric: Arc::downgrade(&fabric),
        secret: contact.secret.into(),
    };
    tasks.spawn(serve_page(
        listener,
        http::router(observer.handle()).merge(http::guard(control::routes(control))),
    ));
    let starter = Starter {
        state: &state,
        router: &router,
        outgoing,
        config: &config,
        has_members: !founds && !fabric.members().is_empty(),
        joins: joins || follows,
        fabric: &fabric,
        others_first: if follows { FOUNDER_PATIENCE } else { ANSWER_PATIENCE },
        mesh_id: fabric.mesh_id(),
    };
    let result =
        serve(&starter, found, &observer, &fabric, Requests { detaching, restamping, leaving }, || {
            let databases = config.databases.iter().map(|d| (d.name.clone(), d.path.clone())).collect();
            started(&Started { node: config.name.to_string(), joining, http: page, databases });
        })
        .await;
    drop(starter);
    router.broadcast(&Message::Bye).await;
    drop(observer);
    tasks.shutdown().await;
    drop(router);
    shut_down(fabric, sending).await;
    if result? == Ending::Left {
        state.forget_mesh()?;
    }
    Ok(())
}

/// When all that could add to what is to be sent is gone.
async fn shut_down(fabric: Arc<Fabric>, sending: tokio::task::JoinHandle<()>) {
    // Ends when everything that was to be sent is.
    if tokio::time::timeout(Duration::from_secs(5), sending).await.is_err() {
        warn!("not everything could be sent: peers fetch it when this node is back");
    }
    match Arc::into_inner(fabric) {
        Some(fabric) => fabric.shutdown().await,
        None => debug!("the fabric is still in use: its server ends with this process"),
    }
}

/// What other commands ask of the running node.
struct Requests {
    detaching: mpsc::Receiver<DetachRequest>,
    restamping: mpsc::Receiver<RestampRequest>,
    leaving: mpsc::Receiver<LeaveRequest>,
}

/// Why a node stops.
#[derive(Debug, PartialEq, Eq)]
enum Ending {
    /// It was told to.
    Stopped,
    /// It has left its mesh for good.
    Left,
}

async fn serve_page(listener: TcpListener, routes: axum::Router) {
    if let Err(e) = http::serve(listener, routes, std::future::pending()).await {
        warn!("the status page has ended: {e}");
    }
}

fn keep_verifying(config: &Config, fabric: &Arc<Fabric>, router: &Arc<Router>, tasks: &mut JoinSet<()>) {
    let members = fabric.clone();
    router.verifier.know_members(move || members.members());
    if let Some(every) = config.verify_every {
        tasks.spawn(router.clone().keep_verifying(every));
    }
}

fn fabric_options(config: &Config) -> Result<FabricOptions> {
    let dir = config.state_dir.clone();
    let mut options = FabricOptions::new(config.name.clone(), dir, config.cluster, config.client);
    options.advertise = config.advertise.as_ref().map(ToString::to_string);
    options.incoming_capacity = INCOMING;
    let replicas = match config.log_replicas {
        None => LogReplicas::Auto,
        Some(1) => LogReplicas::One,
        Some(_) => LogReplicas::Three,
    };
    options.log = LogLimits { max_bytes: config.log_max_bytes, max_age: config.log_max_age, replicas };
    // The server refuses a stream that may grow beyond this; the rest is for programs of the host.
    let with_log_mib = config.log_max_bytes.div_ceil(1 << 20) + OTHER_STREAMS_MIB;
    options.store_limit_mib = options.store_limit_mib.max(with_log_mib);
    options.leaf = config.leaf.clone().map(|l| LeafHub { url: l.url, credentials: l.credentials, ca: l.ca });
    options.memory_budget_mib = config.nats_memory_mib;
    options.external = config.external.clone().map(external_nats);
    options.peers = config.peers.iter().map(|p| p.to_string().parse()).collect::<Result<_, _>>()?;
    let belongs = StateDir::new(&config.state_dir).key().exists();
    options.key = match &config.key_file {
        Some(path) => Some(read_key(path)?),
        None => None,
    };
    options.join = match &config.join {
        // A node that belongs needs no token, and the file that held it may be gone; a token that can be read is
        // still compared, so that the wrong mesh is noticed.
        Some(join) if belongs => join.token().ok().and_then(|t| t.trim().parse().ok()),
        Some(join) => Some(join.token()?.trim().parse::<JoinToken>().context("--join")?),
        None => None,
    };
    Ok(options)
}

fn external_nats(e: External) -> ExternalNats {
    let External { servers, user, password, credentials, ca, certificate, mesh } = e;
    ExternalNats { servers, user, password, credentials, ca, certificate, mesh }
}

fn read_key(path: &std::path::Path) -> Result<MeshKey> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the key in {}", path.display()))?;
    let of_token = || text.parse::<JoinToken>().ok().map(|token| token.key().clone());
    MeshKey::parse(&text).or_else(of_token).with_context(|| {
        format!(
            "{} holds no key: make one with 'openssl rand -base64 32', the same for all nodes",
            path.display()
        )
    })
}

async fn send_all(fabric: Arc<Fabric>, mut to_send: mpsc::Receiver<Outgoing>) {
    while let Some(message) = to_send.recv().await {
        match fabric.send(message).await {
            Ok(()) => {}
            // Peers compare what they hold when the connection is back.
            Err(FabricError::NotConnected | FabricError::Stalled) => debug!("a message was not sent"),
            Err(e) => warn!("{e}"),
        }
    }
}

/// Starts the databases, runs until a signal or until the node has left, and stops them.
async fn serve(
    starter: &Starter<'_>,
    found: Vec<Found>,
    observer: &Observer,
    fabric: &Fabric,
    requests: Requests,
    started: impl FnOnce(),
) -> Result<Ending> {
    let mut running = BTreeMap::new();
    let mut signals = Signals::new()?;
    let starting = async {
        for found in found {
            let name = found.spec.name.clone();
            let report = observer.database(&name, &found.spec.path);
            running.insert(name, starter.start(found, report).await?);
        }
        Ok(())
    };
    let mut result = tokio::select! {
        result = starting => result.map(|()| Ending::Stopped),
        () = signals.wait() => Ok(Ending::Stopped),
    };
    if result.is_ok() && !signals.came {
        starter.router.say_hello().await;
        fabric.log_answers(LOG_PATIENCE).await;
        observer.ready().await;
        started();
        let working = work(starter, observer, fabric, &mut running, requests);
        result = tokio::select! {
            result = working => result,
            () = signals.wait() => Ok(Ending::Stopped),
        };
        info!("stopping: what was committed is sent first");
    }
    let ending = starter.router.clone();
    tokio::task::spawn_blocking(move || ending.verifier.end()).await?;
    for (name, database) in running {
        starter.router.remove(&name);
        tokio::task::spawn_blocking(move || database.stop()).await?;
        recovery::note_sites(starter, observer, [&name].into_iter());
    }
    result
}

/// Looks after the databases and does what is asked, until the node has left or this is dropped.
async fn work(
    starter: &Starter<'_>,
    observer: &Observer,
    fabric: &Fabric,
    running: &mut BTreeMap<DbName, Running>,
    mut requests: Requests,
) -> Result<Ending> {
    let (mut closed, mut look, mut turns) =
        (recovery::Closed::new(), tokio::time::interval(LOOK_EVERY), 0u64);
    loop {
        // Who asked may have gone when an answer is sent.
        tokio::select! {
            _ = look.tick() => {
                turns += 1;
                if turns.is_multiple_of(NOTE_TURNS) {
                    recovery::note_sites(starter, observer, running.keys());
                }
                starter.router.forget_gone(&fabric.gone());
                recovery::look_after(starter, observer, running, &mut closed).await?;
            }
            Some((ask, answer)) = requests.detaching.recv() => {
                let result = detach(starter, observer, running, &ask.path).map_err(|e| format!("{e:#}"));
                drop(answer.send(result));
            }
            Some((db, answer)) = requests.restamping.recv() => {
                let work = || restamp::restamp(starter, running, db.as_ref());
                let result = tokio::task::block_in_place(work).map_err(|e| format!("{e:#}"));
                drop(answer.send(result));
            }
            Some((ask, answer)) = requests.leaving.recv() => {
                let result = leaving::leave(starter, observer, fabric, running, &ask).await;
                let left = result.is_ok();
                drop(answer.send(result.map_err(|e| format!("{e:#}"))));
                if left {
                    return Ok(Ending::Left);
                }
            }
        }
    }
}

fn detach(
    starter: &Starter<'_>,
    observer: &Observer,
    running: &mut BTreeMap<DbName, Running>,
    path: &std::path::Path,
) -> Result<String> {
    let same = |r: &&Running| r.path == path || r.path.canonicalize().ok() == path.canonicalize().ok();
    let name = running.values().find(same).map(|r| r.name.clone());
    let name = name.with_context(|| format!("this node does not replicate {}", path.display()))?;
    starter.router.remove(&name);
    if let Some(database) = running.remove(&name) {
        tokio::task::block_in_place(|| database.stop());
    }
    observer.forget(&name);
    starter.state.forget(&name)?;
    adopt::detach(&sqlite::open_replica(path)?)?;
    Ok(format!("detached {}: its rows are as they were, nothing of litemesh is left in it\n", path.display()))
}

/// SIGTERM and Ctrl-C.
struct Signals {
    term: tokio::signal::unix::Signal,
    came: bool,
}

impl Signals {
    fn new() -> Result<Self> {
        let term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        Ok(Self { term, came: false })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        self.came = true;
    }
}
