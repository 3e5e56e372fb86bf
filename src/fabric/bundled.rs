//! The server that this process runs itself, and the mesh that such servers make. Invariant: when it has started, our own
//! server is a member of the mesh's cluster, or of one of its own.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use super::accounts::MESH_USER;
use super::bootstrap::{self, Founding};
use super::error::FabricError;
use super::hub::Hub;
use super::identity::Identity;
use super::members::Members;
use super::options::FabricOptions;
use super::rotation::Told;
use super::server::{self, AS_EXPECTED, Server, ServerSetup};
use super::state_lock::StateLock;
use super::{election, gate, hub, monitor, watchdog};

const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// Servers dial a peer that is away once a second.
const PEERS_PATIENCE: Duration = Duration::from_secs(3);
const FIRST_RECONNECT: Duration = Duration::from_millis(20);
const LAST_RECONNECT: Duration = Duration::from_millis(500);

/// A server of our own.
pub(super) struct Bundled {
    pub(super) identity: Arc<Identity>,
    pub(super) server: Arc<Server>,
    pub(super) keys: Arc<Told>,
    pub(super) is_founder: bool,
    pub(super) hub: Option<Arc<Hub>>,
}

impl Bundled {
    /// Starts the server, founds or joins the mesh, connects. What is to go on in the background is among `tasks`.
    pub(super) async fn start(
        options: &FabricOptions,
        lock: StateLock,
        tasks: &mut JoinSet<()>,
    ) -> Result<(Self, async_nats::Client, Members), FabricError> {
        let hub = options.leaf.as_ref().map(Hub::new).transpose()?.map(Arc::new);
        let (identity, members, founder) = Identity::establish(options).await?;
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
        // Before the server is ready: it loads its streams as soon as the gate is open.
        tasks.spawn(gate::hold(identity.ports.gate, identity.accounts.gate.clone()));
        let conf = identity.conf_text(&members);
        let server = match start_server(&identity, &binary, &conf, options, lock).await {
            Err(FabricError::Server { reason }) if server::is_damage(&reason) => {
                watchdog::set_aside(&identity.state.store(), &reason)?;
                let lock = StateLock::take(&options.state_dir).await?;
                start_server(&identity, &binary, &conf, options, lock).await?
            }
            started => started?,
        };
        if !bootstrap::is_done(identity.state.path()) {
            found_or_return(&identity, &binary, options.join.is_some()).await?;
        }
        let client = connect(&identity).await?;
        let (identity, server) = (Arc::new(identity), Arc::new(server));
        let (address, store) = (identity.ports.monitor, identity.state.store());
        tasks.spawn(watchdog::watch(server.clone(), address, store, watchdog::PERIOD));
        tasks.spawn(election::watch(identity.clone()));
        if let Some(hub) = &hub {
            tasks.spawn(hub::watch(hub.clone(), server.clone(), identity.clone()));
        }
        Ok((Self { identity, server, keys: Arc::default(), is_founder, hub }, client, members))
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
