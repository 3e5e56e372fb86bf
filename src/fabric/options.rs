//! What a fabric is started with, and where it keeps what it knows. Invariant: every path of the state directory is
//! made here.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};

use super::address::{Address, AddressError};
use super::certs::CA_FILE;
use super::keys::MeshKey;
use super::log_stream::LogLimits;
use super::token::JoinToken;
use crate::core::names::{MeshName, NodeName};

/// Another NATS system that the host's programs are connected to.
#[derive(Clone, PartialEq, Eq)]
pub struct LeafHub {
    /// Its leafnode port; may hold a user and a password.
    pub url: String,
    /// A file with credentials for it.
    pub credentials: Option<PathBuf>,
    /// A file with the CA that its certificate is checked against.
    pub ca: Option<PathBuf>,
}

impl fmt::Debug for LeafHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeafHub").field("credentials", &self.credentials).finish_non_exhaustive()
    }
}

/// A NATS system that the nodes meet on instead of servers of their own.
#[derive(Clone, PartialEq, Eq)]
pub struct ExternalNats {
    /// Its client ports, as `nats://host:port` or `tls://host:port`, without what lets us in.
    pub servers: Vec<String>,
    /// A user's name; without a password, a token.
    pub user: Option<String>,
    /// The user's password.
    pub password: Option<String>,
    /// A file with credentials.
    pub credentials: Option<PathBuf>,
    /// A file with the CA that its certificates are checked against.
    pub ca: Option<PathBuf>,
    /// Files with a certificate of ours and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// The mesh's name: several may share an account.
    pub mesh: MeshName,
}

impl ExternalNats {
    /// Where it is, for people.
    pub fn url(&self) -> String {
        self.servers.join(",")
    }
}

impl fmt::Debug for ExternalNats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExternalNats")
            .field("servers", &self.servers)
            .field("mesh", &self.mesh)
            .finish_non_exhaustive()
    }
}

/// How a node's fabric is started.
#[derive(Debug, Clone)]
pub struct FabricOptions {
    /// The node's name, unique in its mesh.
    pub node: NodeName,
    /// Where keys, certificates, streams and the server itself are kept.
    pub state_dir: PathBuf,
    /// Where peers connect.
    pub cluster: SocketAddr,
    /// Under which `host:port` peers reach that; guessed when it is not given.
    pub advertise: Option<String>,
    /// Where the host's own programs connect; encrypted unless it is loopback.
    pub client: SocketAddr,
    /// The mesh to join; a node that belongs to it already needs none.
    pub join: Option<JoinToken>,
    /// Where the nodes of the mesh listen, this one included: all are started with the same list, and no token.
    pub peers: Vec<Address>,
    /// The mesh's secret, if it is not in the state directory yet.
    pub key: Option<MeshKey>,
    /// What the programs' account is connected to, besides the mesh.
    pub leaf: Option<LeafHub>,
    /// The NATS system that is used instead of a server of this node's own.
    pub external: Option<ExternalNats>,
    /// The memory nats-server should stay within.
    pub memory_budget_mib: u64,
    /// What this node's log keeps.
    pub log: LogLimits,
    /// The most all streams of this server may take on disk, those of the host's programs included.
    pub store_limit_mib: u64,
    /// Messages that may wait to be taken by the replica. Commits come in pieces of about 1 MiB: this is what bounds
    /// the memory they take.
    pub incoming_capacity: usize,
}

impl FabricOptions {
    /// With everything that has a default at it.
    pub fn new(node: NodeName, state_dir: PathBuf, cluster: SocketAddr, client: SocketAddr) -> Self {
        Self {
            node,
            state_dir,
            cluster,
            advertise: None,
            client,
            join: None,
            peers: Vec::new(),
            leaf: None,
            external: None,
            key: None,
            memory_budget_mib: 64,
            log: LogLimits::default(),
            store_limit_mib: 8 * 1024,
            incoming_capacity: 256,
        }
    }

    /// The addresses that others are told.
    pub(super) fn own_addresses(&self) -> Result<Vec<Address>, AddressError> {
        if let Some(text) = &self.advertise {
            return Ok(vec![text.parse()?]);
        }
        if !self.cluster.ip().is_unspecified() {
            return Ok(vec![self.cluster.into()]);
        }
        let ip = outward_ip().unwrap_or(Ipv4Addr::LOCALHOST.into());
        Ok(vec![SocketAddr::new(ip, self.cluster.port()).into()])
    }
}

/// The address this host has towards others: that of its default route, or of its first interface if it has none.
fn outward_ip() -> Option<IpAddr> {
    routed_ip().or_else(|| {
        let interfaces = if_addrs::get_if_addrs().ok()?;
        let mut ips: Vec<IpAddr> =
            interfaces.iter().filter(|i| !i.is_loopback() && !i.is_link_local()).map(|i| i.ip()).collect();
        // IPv4 first: it needs no brackets and no scope.
        ips.sort_by_key(|ip| ip.is_ipv6());
        ips.first().copied()
    })
}

/// Nothing is sent: a connected UDP socket only asks the routing table.
fn routed_ip() -> Option<IpAddr> {
    let towards_v4 = (Ipv4Addr::UNSPECIFIED.into(), SocketAddr::from((Ipv4Addr::new(198, 51, 100, 1), 9)));
    let documentation_v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    let towards_v6 = (Ipv6Addr::UNSPECIFIED.into(), SocketAddr::from((documentation_v6, 9)));
    [towards_v4, towards_v6].into_iter().find_map(|(any, towards): (IpAddr, _)| {
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(towards).ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified())
    })
}

/// The files of a state directory that are the fabric's.
#[derive(Debug, Clone)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// The files in `dir`.
    pub fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The mesh key.
    pub fn key(&self) -> PathBuf {
        self.0.join("mesh.key")
    }

    /// The passwords of our own server's accounts.
    pub fn accounts(&self) -> PathBuf {
        self.0.join("accounts.json")
    }

    /// The other nodes' addresses.
    pub fn members(&self) -> PathBuf {
        self.0.join("members.json")
    }

    /// The mesh's CA: what a program needs to trust a client port that is encrypted.
    pub fn ca(&self) -> PathBuf {
        self.tls().join(CA_FILE)
    }

    /// All that makes this node a member of its mesh, the secret first.
    pub fn of_the_mesh(&self) -> [PathBuf; 8] {
        let founded = self.0.join("founded");
        [
            self.key(),
            self.tls(),
            self.accounts(),
            self.members(),
            self.conf(),
            self.store(),
            founded,
            self.external(),
        ]
    }

    /// Says that the node's mesh meets on a NATS system of its operator's.
    pub(super) fn external(&self) -> PathBuf {
        self.0.join("external.json")
    }

    pub(super) fn tls(&self) -> PathBuf {
        self.0.join("tls")
    }

    pub(super) fn conf(&self) -> PathBuf {
        self.0.join("nats.conf")
    }

    pub(super) fn store(&self) -> PathBuf {
        self.0.join("jetstream")
    }

    pub(super) fn bin(&self) -> PathBuf {
        self.0.join("bin")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_told_what_they_can_dial() {
        let node: NodeName = "a".parse().expect("a name");
        let wildcard = "0.0.0.0:6222".parse().expect("an address");
        let client = "127.0.0.1:4222".parse().expect("an address");
        let mut options = FabricOptions::new(node, "/nowhere".into(), wildcard, client);
        let guessed = options.own_addresses().expect("an address");
        assert!(guessed[0].ip().is_some_and(|ip| !ip.is_unspecified()) && guessed[0].port() == 6222);
        options.cluster = "10.0.0.1:7".parse().expect("an address");
        assert_eq!(options.own_addresses().expect("an address")[0].to_string(), "10.0.0.1:7");
        options.advertise = Some("a.example:8".to_owned());
        assert_eq!(options.own_addresses().expect("an address")[0].to_string(), "a.example:8");
        options.advertise = Some("a.example".to_owned());
        assert!(options.own_addresses().is_err());
    }
}
