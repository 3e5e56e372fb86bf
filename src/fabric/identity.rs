//! Who this node is and how its server is set up: everything of a start that comes before the server. Invariant: a
//! node that joined or founded a mesh stays in it, whatever token it is started with later.

use std::path::PathBuf;

use super::accounts::Accounts;
use super::address::Address;
use super::certs::{CertFiles, NodeCerts};
use super::conf::{self, ServerConf};
use super::error::FabricError;
use super::keys::MeshKey;
use super::members::Members;
use super::options::{FabricOptions, StateDir};
use super::server::Ports;
use super::{bootstrap, preflight};
use crate::core::names::NodeName;
use tracing::info;

/// What was loaded, made or received.
pub(super) struct Identity {
    pub(super) node: NodeName,
    pub(super) key: MeshKey,
    pub(super) mesh_id: String,
    pub(super) own: Vec<Address>,
    pub(super) advertise: Option<Address>,
    pub(super) certs: NodeCerts,
    pub(super) cert_files: CertFiles,
    pub(super) accounts: Accounts,
    pub(super) ports: Ports,
    pub(super) state: StateDir,
    store: PathBuf,
    store_limit_mib: u64,
}

impl Identity {
    /// Loads it; at the first start makes it, or takes it from the token after a look at the mesh.
    pub(super) async fn establish(options: &FabricOptions) -> Result<(Self, Members), FabricError> {
        let state = StateDir::new(&options.state_dir);
        let own = options.own_addresses()?;
        let stored = MeshKey::load(&state.key())?;
        let key = match (&stored, &options.join) {
            (Some(stored), Some(token)) if stored != token.key() => {
                return Err(FabricError::BelongsElsewhere);
            }
            (Some(stored), _) => stored.clone(),
            (None, Some(token)) => token.key().clone(),
            (None, None) => MeshKey::generate()?,
        };
        let hosts: Vec<String> = own.iter().map(|address| address.host().to_owned()).collect();
        let certs = NodeCerts::mint(&key, options.node.as_str(), &hosts)?;
        // A list without a key is left of a join that did not come to its end: it says nothing.
        let known = if stored.is_some() {
            Members::load(&state.members())?.unwrap_or_default()
        } else {
            Members::default()
        };
        let members = match &options.join {
            Some(token) if token_is_ours(token.addresses(), &own) => known,
            Some(token) if stored.is_none() => join(token.addresses(), &options.node, &certs, &state).await?,
            // It belongs, and has lost the list: what it dials need not be there at this moment.
            Some(token) if known.routes(&own).is_empty() => Members::from_seeds(token.addresses().to_vec()),
            _ => known,
        };
        if stored.is_none() {
            key.save(&state.key())?;
        }
        if !members.routes(&own).is_empty() {
            bootstrap::mark_done(state.path())?;
        }
        let identity = Self {
            node: options.node.clone(),
            mesh_id: key.mesh_id(),
            advertise: options.advertise.as_ref().map(|_| own[0].clone()),
            cert_files: certs.save(&state.tls())?,
            accounts: Accounts::load_or_create(&state.accounts())?,
            ports: Ports::choose(options.cluster, options.client)?,
            store: state.store(),
            store_limit_mib: options.store_limit_mib,
            key,
            own,
            certs,
            state,
        };
        Ok((identity, members))
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
            store_dir: &self.store,
            store_limit_mib: self.store_limit_mib,
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
        let config =
            self.certs.client_config().map_err(|e| FabricError::Connect { reason: e.to_string() })?;
        Ok(options.require_tls(true).tls_client_config(config))
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
) -> Result<Members, FabricError> {
    let peer = preflight::any(addresses, certs).await?;
    if peer.name == node.as_str() {
        return Err(FabricError::NameTaken { address: peer.address, node: node.clone() });
    }
    info!(peer = peer.name, address = %peer.address, "joining");
    let members = Members::from_seeds(addresses.to_vec());
    members.save(&state.members())?;
    Ok(members)
}
