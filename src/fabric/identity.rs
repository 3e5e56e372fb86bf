//! Who this node is and how its server is set up: everything of a start that comes before the server. Invariant: a
//! node that joined or founded a mesh stays in it, whatever token it is started with later.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use super::accounts::Accounts;
use super::address::Address;
use super::certs::{CertFiles, NodeCerts};
use super::conf::{self, ServerConf};
use super::error::FabricError;
use super::keyring::KeyRing;
use super::keys::MeshKey;
use super::members::Members;
use super::options::{FabricOptions, LeafHub, StateDir};
use super::preflight::{Peer, PreflightError};
use super::rendezvous::{self, Door, Met};
use super::server::{Ports, free_loopback};
use super::token::JoinToken;
use super::{bootstrap, preflight};
use crate::core::names::NodeName;
use tracing::info;

/// What was loaded, made or received.
pub(super) struct Identity {
    pub(super) node: NodeName,
    pub(super) mesh_id: String,
    pub(super) own: Vec<Address>,
    pub(super) advertise: Option<Address>,
    secrets: Mutex<Secrets>,
    /// Under which names and addresses peers may dial it.
    hosts: Vec<String>,
    pub(super) cert_files: CertFiles,
    pub(super) accounts: Accounts,
    pub(super) ports: Ports,
    pub(super) state: StateDir,
    /// It came into its mesh with this start.
    joins: bool,
    store: PathBuf,
    store_limit_mib: u64,
    leaf: Option<LeafHub>,
}

/// What changes when the mesh's key does.
#[derive(Clone)]
struct Secrets {
    ring: KeyRing,
    certs: Arc<NodeCerts>,
}

impl Identity {
    /// Loads it; at the first start makes it, or takes it from the token after a look at the mesh.
    pub(super) async fn establish(
        options: &FabricOptions,
    ) -> Result<(Self, Members, Option<Door>), FabricError> {
        let state = StateDir::new(&options.state_dir);
        let own = options.own_addresses()?;
        let stored = KeyRing::load(&state.key())?;
        // A node may be reached by any name of the list: whoever has the key can say so of itself.
        let listed = own.iter().chain(&options.peers);
        let hosts: Vec<String> = listed.map(|address| address.host().to_owned()).collect();
        let mut ring = keys_to_begin_with(stored.as_ref(), options, &hosts).await?;
        let certs = Arc::new(NodeCerts::mint(&ring, options.node.as_str(), &hosts)?);
        // A list without a key is left of a join that did not come to its end: it says nothing.
        let known = stored.as_ref().map(|_| Members::load(&state.members())).transpose()?.flatten();
        let known = known.unwrap_or_default();
        let mut founder = None;
        let mut members = match &options.join {
            None if !options.peers.is_empty() && !bootstrap::is_done(state.path()) => {
                let met = rendezvous::meet(&options.node, options.cluster, &options.peers, &certs).await?;
                match met {
                    Met::Founder(door) => founder = Some(door),
                    Met::Member(mesh_id) => {
                        if let Some(mesh_id) = mesh_id.filter(|_| stored.is_none()) {
                            ring = KeyRing::joined(ring.current().clone(), mesh_id);
                        }
                        bootstrap::mark_done(state.path())?;
                    }
                }
                known
            }
            Some(token) if token_is_ours(token.addresses(), &own) => known,
            Some(token) if stored.is_none() => {
                let (members, mesh_id) = join(token.addresses(), &options.node, &certs, &state).await?;
                if let Some(mesh_id) = mesh_id {
                    ring = KeyRing::joined(token.key().clone(), mesh_id);
                }
                members
            }
            // It belongs, and has lost the list: what it dials need not be there at this moment.
            Some(token) if known.routes(&own).is_empty() => Members::from_seeds(token.addresses().to_vec()),
            _ => known,
        };
        if stored.as_ref() != Some(&ring) {
            ring.save(&state.key())?;
        }
        if founder.is_none() && !members.routes(&own).is_empty() {
            bootstrap::mark_done(state.path())?;
        }
        if !options.peers.is_empty() {
            members.seed(&options.peers);
            members.save(&state.members())?;
        }
        let identity = Self {
            node: options.node.clone(),
            mesh_id: ring.mesh_id().to_owned(),
            advertise: options.advertise.as_ref().map(|_| own[0].clone()),
            cert_files: certs.save(&state.tls())?,
            accounts: Accounts::load_or_create(&state.accounts())?,
            ports: Ports::choose(options.cluster, options.client)?,
            joins: stored.is_none() && founder.is_none() && !members.routes(&own).is_empty(),
            store: state.store(),
            store_limit_mib: options.store_limit_mib,
            leaf: options.leaf.clone(),
            secrets: Mutex::new(Secrets { ring, certs }),
            hosts,
            own,
            state,
        };
        Ok((identity, members, founder))
    }

    /// The same node on ports of its own on loopback, where no peer finds it.
    pub(super) fn aside(&self) -> Result<Self, FabricError> {
        let [cluster, client] = free_loopback()?;
        Ok(Self {
            node: self.node.clone(),
            mesh_id: self.mesh_id.clone(),
            hosts: self.hosts.clone(),
            own: self.own.clone(),
            advertise: None,
            secrets: Mutex::new(self.secrets().clone()),
            cert_files: self.cert_files.clone(),
            accounts: self.accounts.clone(),
            ports: Ports::choose(cluster, client)?,
            state: self.state.clone(),
            store: self.store.clone(),
            store_limit_mib: self.store_limit_mib,
            leaf: None,
            joins: false,
        })
    }

    fn secrets(&self) -> MutexGuard<'_, Secrets> {
        self.secrets.lock().expect("nothing panics while it is held")
    }

    /// The keys of now.
    pub(super) fn ring(&self) -> KeyRing {
        self.secrets().ring.clone()
    }

    /// Goes over to other keys, if they are made from what is here by `change`: in the key file first, then in the files
    /// that the server reads when it is told to. Whether there was something to change.
    pub(super) fn change_ring(
        &self,
        change: impl FnOnce(&KeyRing) -> Result<Option<KeyRing>, FabricError>,
    ) -> Result<bool, FabricError> {
        let mut secrets = self.secrets();
        let Some(ring) = change(&secrets.ring)? else { return Ok(false) };
        let certs = Arc::new(NodeCerts::mint(&ring, self.node.as_str(), &self.hosts)?);
        ring.save(&self.state.key())?;
        certs.save(&self.state.tls())?;
        *secrets = Secrets { ring, certs };
        Ok(true)
    }

    /// Who is at one of these addresses, and whether we are a member to it.
    pub(super) async fn look_at(&self, at: &[Address]) -> Result<Peer, PreflightError> {
        if at.is_empty() {
            let reason = "no address is known".to_owned();
            return Err(PreflightError::NoSuchHost { address: self.own[0].clone(), reason });
        }
        let certs = self.secrets().certs.clone();
        preflight::any(at, &certs).await
    }

    /// The server's configuration.
    pub(super) fn conf<'a>(&'a self, routes: &'a [Address]) -> ServerConf<'a> {
        ServerConf {
            name: self.node.as_str(),
            mesh_id: &self.mesh_id,
            client: self.ports.client,
            monitor: self.ports.monitor,
            gate: Some(self.ports.gate),
            cluster: self.ports.cluster,
            advertise: self.advertise.as_ref(),
            routes,
            joins: self.joins,
            store_dir: &self.store,
            store_limit_mib: self.store_limit_mib,
            leaf: self.leaf.as_ref(),
            certs: &self.cert_files,
            accounts: &self.accounts,
        }
    }

    /// The server's configuration file, with routes to all members known.
    pub(super) fn conf_text(&self, members: &Members) -> String {
        conf::render(&self.conf(&members.routes(&self.own)))
    }

    /// Options for a connection to our own server.
    pub(super) fn client_options(
        &self,
        options: async_nats::ConnectOptions,
    ) -> Result<async_nats::ConnectOptions, FabricError> {
        if self.ports.client.ip().is_loopback() {
            return Ok(options);
        }
        let config = self
            .secrets()
            .certs
            .client_config()
            .map_err(|e| FabricError::Connect { reason: e.to_string() })?;
        Ok(options.require_tls(true).tls_client_config(config))
    }
}

/// Those of the key file; at the first start those that were given, or new ones.
async fn keys_to_begin_with(
    stored: Option<&KeyRing>,
    options: &FabricOptions,
    hosts: &[String],
) -> Result<KeyRing, FabricError> {
    match (stored, &options.join) {
        (Some(stored), Some(token)) if !stored.knows(token.key()) => {
            return_with(stored, token, &options.node, hosts).await
        }
        (Some(stored), _) if options.key.as_ref().is_some_and(|given| !stored.knows(given)) => {
            Err(FabricError::BelongsElsewhere)
        }
        (Some(stored), _) => Ok(stored.clone()),
        (None, Some(token)) => Ok(KeyRing::founded(token.key().clone())),
        (None, None) => Ok(KeyRing::founded(match &options.key {
            Some(given) => given.clone(),
            None if !options.peers.is_empty() => return Err(FabricError::NoKey),
            None => MeshKey::generate()?,
        })),
    }
}

/// The token has another key than this node: the mesh's, if it was changed while the node was away, or another mesh's.
async fn return_with(
    stored: &KeyRing,
    token: &JoinToken,
    node: &NodeName,
    hosts: &[String],
) -> Result<KeyRing, FabricError> {
    let ring = stored.replaced_by(token.key());
    let certs = NodeCerts::mint(&ring, node.as_str(), hosts)?;
    match preflight::any(token.addresses(), &certs).await {
        Ok(peer) if peer.mesh_id.as_deref() == Some(stored.mesh_id()) => {
            info!(peer = peer.name, "the mesh's key was changed: this node has the new one now");
            Ok(ring)
        }
        Ok(_) | Err(PreflightError::OtherMesh { .. }) => Err(FabricError::BelongsElsewhere),
        Err(reason) => Err(FabricError::OtherKey { reason }),
    }
}

/// The first node may be started with its own token, like all the others.
fn token_is_ours(addresses: &[Address], own: &[Address]) -> bool {
    addresses.iter().all(|address| own.contains(address))
}

/// Looks at the mesh first: nothing is kept of a token that is no good. The key is saved later, it says that this node
/// belongs; a crash before leaves a node that can be started with the token once more.
async fn join(
    addresses: &[Address],
    node: &NodeName,
    certs: &NodeCerts,
    state: &StateDir,
) -> Result<(Members, Option<String>), FabricError> {
    let peer = preflight::any(addresses, certs).await?;
    if peer.name == node.as_str() {
        return Err(FabricError::NameTaken { address: peer.address, node: node.clone() });
    }
    info!(peer = peer.name, address = %peer.address, "joining");
    let members = Members::from_seeds(addresses.to_vec());
    members.save(&state.members())?;
    Ok((members, peer.mesh_id))
}
