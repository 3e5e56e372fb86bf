//! One nats-server with its configuration file and its supervisor. Invariant: the file on disk is the configuration
//! that the server was started or told to reload with, and its owner alone can read it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nats_launcher::{Backoff, Exit, ExitCause, READY, ROUTES_READY, ServerEvent, ServerSpec, Supervisor};
use rand::Rng;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

use super::address::Address;
use super::error::FabricError;
use super::private_file;
use super::state_lock::StateLock;

/// A server gets ready in a fraction of a second; with gigabytes of streams to look through it takes longer.
const READY_PATIENCE: Duration = Duration::from_secs(60);
/// A predecessor that was killed with its parent may hold the ports for a moment.
const PORT_PATIENCE: Duration = Duration::from_millis(1500);
/// A server that gives up this often before it was ever ready will not get ready.
const MAX_EARLY_EXITS: u32 = 5;
const GRACE: Duration = Duration::from_secs(5);

/// Warnings of what is meant to be so: passwords that live in a file of the owner's, a lone node's start, and the
/// dialling of a peer that is away, four lines a second: litemesh itself says once who is not heard of any more.
pub const AS_EXPECTED: [&str; 5] = [
    "Plaintext passwords detected",
    "Waiting for routing to be established",
    "JetStream has not established contact with a meta leader",
    "Metalayer blocking snapshot",
    "Error trying to connect to route",
];

/// What it writes, every second, of a hub that it cannot connect to: `hub` says that once, in words of ours.
const ABOUT_THE_HUB: [&str; 4] = [
    "Leafnode Error ",
    "TLS leafnode handshake error",
    "Error trying to connect as leafnode",
    "Credentials file",
];

/// What the server is doing.
#[derive(Debug, Clone)]
pub enum Health {
    /// Not ready yet.
    Starting,
    /// It takes connections.
    Ready,
    /// It ended; how often that happened since it was last ready.
    Down {
        /// Why.
        exit: Exit,
        /// Ends in a row.
        times: u32,
    },
}

/// A server that is kept running.
pub struct Server {
    supervisor: Supervisor,
    health: watch::Receiver<Health>,
    /// What it said last of the hub that it is connected to.
    hub: Arc<Mutex<Option<String>>>,
    conf_path: PathBuf,
    /// After the supervisor: fields are dropped in this order.
    _lock: Option<StateLock>,
}

/// What makes one server differ from another.
pub struct ServerSetup<'a> {
    /// Its name.
    pub name: &'a str,
    /// The program.
    pub binary: &'a Path,
    /// Where its configuration is to be.
    pub conf_path: PathBuf,
    /// Its configuration.
    pub conf: &'a str,
    /// The memory it should stay within.
    pub memory_limit_mib: Option<u64>,
    /// Lines of its log that are of no interest to an operator: their beginnings.
    pub hushed: Vec<&'static str>,
}

impl Server {
    /// Writes the configuration and starts the server. Does not wait for it. The lock is held until it has ended.
    pub(super) fn start(setup: ServerSetup<'_>, lock: Option<StateLock>) -> Result<Self, FabricError> {
        let ServerSetup { name, binary, conf_path, conf, memory_limit_mib, hushed } = setup;
        private_file::write(&conf_path, conf.as_bytes())?;
        let spec = ServerSpec {
            name: name.to_owned(),
            binary: binary.to_owned(),
            args: vec!["-c".into(), conf_path.clone().into()],
            memory_limit_mib,
            // A port that is taken is told before this, whichever it is.
            ready_when: vec![READY, ROUTES_READY],
            hushed,
            overheard: ABOUT_THE_HUB.to_vec(),
            grace: GRACE,
            backoff: Backoff::default(),
        };
        let (told, health) = watch::channel(Health::Starting);
        let hub = Arc::<Mutex<Option<String>>>::default();
        let said = hub.clone();
        let node = name.to_owned();
        let mut times = 0;
        let supervisor = Supervisor::start(spec, move |event| {
            let health = match event {
                ServerEvent::Started { pid } => {
                    debug!(node, pid, "nats-server started");
                    return;
                }
                ServerEvent::Said { text } => {
                    *said.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
                    return;
                }
                ServerEvent::Ready { .. } => {
                    times = 0;
                    Health::Ready
                }
                ServerEvent::Exited { exit, restart_in } => {
                    if exit.cause != ExitCause::Stopped {
                        let pause_ms = restart_in.map_or(0, |pause| pause.as_millis() as u64);
                        let how = how_it_ended(&exit, memory_limit_mib);
                        warn!(node, cause = ?exit.cause, "{how}: it is started again in {pause_ms} ms; nothing is lost");
                    }
                    times += 1;
                    Health::Down { exit, times }
                }
            };
            told.send_replace(health);
        })?;
        Ok(Self { supervisor, health, hub, conf_path, _lock: lock })
    }

    /// Until it takes connections. A taken port may be a predecessor's that is just dying: it gets a moment.
    pub async fn ready(&self, ports: &Ports) -> Result<(), FabricError> {
        let mut health = self.health.clone();
        let started = Instant::now();
        loop {
            let now = health.borrow_and_update().clone();
            match now {
                Health::Ready => return Ok(()),
                Health::Down { exit, times } => match exit.cause {
                    ExitCause::PortTaken { address } if started.elapsed() >= PORT_PATIENCE => {
                        return Err(ports.taken(&address));
                    }
                    ExitCause::PortTaken { .. } => {}
                    _ if times >= MAX_EARLY_EXITS => return Err(never_ready(&exit)),
                    _ => {}
                },
                Health::Starting => {}
            }
            match timeout_at(started + READY_PATIENCE, health.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(FabricError::Server { reason: "it was stopped".to_owned() }),
                Err(_) => {
                    let reason = format!("it is not ready after {} s", READY_PATIENCE.as_secs());
                    return Err(FabricError::Server { reason });
                }
            }
        }
    }

    /// Replaces the configuration by one that differs in routes only, and has it read.
    pub fn reload(&self, conf: &str) -> Result<(), FabricError> {
        private_file::write(&self.conf_path, conf.as_bytes())?;
        self.supervisor.reload();
        Ok(())
    }

    /// Ends a server that hangs; the supervisor starts the next one.
    pub fn replace_process(&self) {
        self.supervisor.kill_and_restart();
    }

    /// Why it cannot use what it has stored, when that is why it does not start.
    pub fn store_damage(&self) -> Option<String> {
        match &*self.health.borrow() {
            Health::Down { exit, times } if *times >= MAX_EARLY_EXITS => {
                exit.message.clone().filter(|message| is_damage(message))
            }
            _ => None,
        }
    }

    /// Whether it is ready, by its own account.
    pub fn is_ready(&self) -> bool {
        matches!(*self.health.borrow(), Health::Ready)
    }

    /// What it said of its hub since this was last asked.
    pub fn said_of_hub(&self) -> Option<String> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The process.
    pub fn pid(&self) -> Option<u32> {
        self.supervisor.pid()
    }

    /// How often it was started again.
    pub fn restarts(&self) -> u64 {
        self.supervisor.restarts()
    }

    /// SIGTERM, grace, SIGKILL.
    pub async fn stop(self) {
        let Self { supervisor, _lock, .. } = self;
        // A task that was cancelled has dropped the supervisor, which kills the server.
        let _ = tokio::task::spawn_blocking(move || supervisor.stop()).await;
    }
}

fn how_it_ended(exit: &Exit, memory_limit_mib: Option<u64>) -> String {
    use std::os::unix::process::ExitStatusExt;
    let budget = memory_limit_mib.map_or(String::new(), |mib| format!(" (its budget is {mib} MiB)"));
    match (&exit.cause, exit.status.and_then(|status| status.signal())) {
        (ExitCause::OutOfMemory, _) => format!("nats-server got no more memory{budget}"),
        (ExitCause::Died | ExitCause::NeverReady, Some(9)) => {
            format!("nats-server was killed by signal 9, perhaps by the system for want of memory{budget}")
        }
        (_, Some(signal)) => format!("nats-server was ended by signal {signal}"),
        (_, None) => "nats-server ended".to_owned(),
    }
}

/// Whether a server that said this cannot read what it has stored.
pub fn is_damage(message: &str) -> bool {
    message.starts_with("Can't start JetStream")
}

fn never_ready(exit: &Exit) -> FabricError {
    let reason = match (&exit.message, exit.status) {
        (Some(message), _) => message.clone(),
        (None, Some(status)) => format!("it ended with {status}"),
        (None, None) => "it cannot be run".to_owned(),
    };
    FabricError::Server { reason }
}

/// What a server listens on.
#[derive(Debug, Clone)]
pub struct Ports {
    /// For peers.
    pub cluster: SocketAddr,
    /// For programs.
    pub client: SocketAddr,
    /// For questions about its state.
    pub monitor: SocketAddr,
    /// For the gate.
    pub gate: SocketAddr,
}

impl Ports {
    /// The two that are told, and two of the system's choice on loopback.
    pub fn choose(cluster: SocketAddr, client: SocketAddr) -> Result<Self, FabricError> {
        let [monitor, gate] = free_loopback()?;
        Ok(Self { cluster, client, monitor, gate })
    }

    fn taken(&self, address: &str) -> FabricError {
        // The server prints a wildcard address in its own way: the port decides.
        let port = address.rsplit(':').next().and_then(|port| port.parse::<u16>().ok());
        if port == Some(self.cluster.port()) {
            FabricError::ClusterPortTaken { address: self.cluster.into() }
        } else if port == Some(self.client.port()) {
            FabricError::ClientPortTaken { address: self.client.into() }
        } else {
            FabricError::Server { reason: format!("{address} is taken by another process") }
        }
    }

    /// Where we ourselves connect.
    pub fn client_address(&self) -> Address {
        reachable(self.client).into()
    }
}

/// A wildcard address is listened on, not dialled.
pub fn reachable(listen: SocketAddr) -> SocketAddr {
    if listen.ip().is_unspecified() { (Ipv4Addr::LOCALHOST, listen.port()).into() } else { listen }
}

/// Below the ports that systems give to outgoing connections: one of those could hold ours while the server restarts.
const OWN_PORTS: std::ops::Range<u16> = 15_000..32_000;
const MAX_TRIES: u32 = 1_000;

/// Ports on loopback that nobody holds at this moment.
pub fn free_loopback<const N: usize>() -> Result<[SocketAddr; N], FabricError> {
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); N];
    // All are held until all are chosen: none is handed out twice.
    let mut held = Vec::with_capacity(N);
    for address in &mut addresses {
        let listener = bind_free()?;
        *address = listener
            .local_addr()
            .map_err(|source| FabricError::System { what: "no free port on loopback", source })?;
        held.push(listener);
    }
    Ok(addresses)
}

fn bind_free() -> Result<TcpListener, FabricError> {
    let mut tries = 0;
    loop {
        let port = rand::rng().random_range(OWN_PORTS);
        tries += 1;
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(listener) => return Ok(listener),
            Err(source) if tries >= MAX_TRIES => {
                return Err(FabricError::System { what: "no free port on loopback", source });
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_names_its_flag() {
        let ports = Ports::choose(
            "0.0.0.0:6222".parse().expect("an address"),
            "127.0.0.1:4222".parse().expect("an address"),
        )
        .expect("free ports");
        assert!(ports.taken("[::]:6222").to_string().contains("--cluster"));
        assert!(ports.taken("127.0.0.1:4222").to_string().contains("--client"));
        assert!(matches!(ports.taken(&ports.gate.to_string()), FabricError::Server { .. }));
        assert_ne!(ports.gate, ports.monitor);
    }
}
