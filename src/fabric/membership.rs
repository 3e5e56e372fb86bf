//! Who belongs to the mesh, and by which key. Invariant: what only a mesh of bundled servers has is refused elsewhere, with
//! what to do instead.

use std::time::Duration;

use super::departure;
use super::error::FabricError;
use super::hello::{Exchange, Meeting};
use super::monitor;
use super::nats::{Fabric, System};
use super::rotation::Rotation;
use super::token::JoinToken;
use crate::core::names::NodeName;

const NO_TOKEN: &str = "it has no key and no token; another node joins with the same --fabric-url and --fabric-mesh, and what \
                        lets it in there";
const NO_RESCUE: &str = "which of its servers decide is for its operator to say; take a node that is gone out with 'litemesh \
                         remove'";

impl Fabric {
    /// What lets another node join: the key, and where this node and those it knows listen.
    pub fn join_token(&self) -> Result<JoinToken, FabricError> {
        let bundled = match &self.system {
            System::Bundled(bundled) => bundled,
            System::External(external) => return Err(external.not_ours(NO_TOKEN)),
        };
        let mut addresses = bundled.identity.own.clone();
        addresses.extend(self.roster.routes(&bundled.identity.own));
        Ok(JoinToken::new(bundled.identity.ring().current().clone(), addresses)?)
    }

    /// The options of `up` with which another node joins.
    pub fn joining_options(&self) -> Result<String, FabricError> {
        match &self.system {
            System::Bundled(_) => Ok(format!("--join {}", self.join_token()?.reveal())),
            System::External(external) => {
                Ok(format!("--fabric-url {} --fabric-mesh {}", external.url, external.mesh))
            }
        }
    }

    /// Names the mesh, for ever.
    pub fn mesh_id(&self) -> String {
        match &self.system {
            System::Bundled(bundled) => bundled.identity.mesh_id.clone(),
            System::External(external) => format!("fabric-{}", external.mesh),
        }
    }

    /// Makes a new key for the mesh. The old one is accepted until every member has the new one.
    pub fn change_key(&self) -> Result<(), FabricError> {
        self.rotation()?.change()
    }

    /// Has all nodes accept the key from before the last change no more, whoever has no other.
    pub fn drop_old_key(&self) -> Result<(), FabricError> {
        self.rotation()?.drop_old()
    }

    /// The members that are not known to have the mesh's new key; none unless it is being changed.
    pub fn without_new_key(&self) -> Vec<NodeName> {
        self.rotation().map(|rotation| rotation.waiting_for()).unwrap_or_default()
    }

    /// What an operator has to look at.
    pub fn notices(&self) -> Vec<String> {
        match &self.system {
            System::Bundled(bundled) => {
                let hub = bundled.hub.as_ref().and_then(|hub| hub.notice());
                bundled.keys.notice().into_iter().chain(hub).collect()
            }
            System::External(external) => external.notices(&self.node),
        }
    }

    /// Whether two keys are accepted.
    pub fn is_key_changing(&self) -> bool {
        matches!(&self.system, System::Bundled(b) if b.identity.ring().previous().is_some())
    }

    /// Whether this start has founded the mesh for a list of peers that wait for it.
    pub fn is_founder(&self) -> bool {
        matches!(&self.system, System::Bundled(bundled) if bundled.is_founder)
    }

    /// Whether whoever reaches the system belongs: nobody says which node comes first.
    pub fn is_external(&self) -> bool {
        matches!(&self.system, System::External(_))
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
        if !members.contains(node) && *node != self.node {
            return Err(FabricError::NoMember { node: node.clone(), members });
        }
        match &self.system {
            System::Bundled(bundled) => {
                departure::remove(&bundled.identity, node, &self.roster.addresses(node)).await?;
            }
            System::External(external) => {
                if !self.connected() {
                    let reason = "the NATS system is away: nobody can say whether it is gone".to_owned();
                    return Err(FabricError::Remove { node: node.clone(), reason });
                }
                if *node == self.node || external.is_there(&self.client, &self.subjects, node).await {
                    return Err(FabricError::StillRunning { node: node.clone() });
                }
                external.delete_log(&self.client, &self.subjects, node).await;
            }
        }
        self.exchange().forget(node).await;
        Ok(())
    }

    /// Streams of the host's programs of which nobody answers now.
    pub async fn unanswered_streams(&self) -> Result<Vec<String>, FabricError> {
        match &self.system {
            System::Bundled(bundled) => departure::unanswered_streams(&bundled.identity).await,
            System::External(_) => Ok(Vec::new()),
        }
    }

    /// Streams that are bound to this node by a tag, other than its log.
    pub async fn bound_streams(&self) -> Result<Vec<String>, FabricError> {
        match &self.system {
            System::Bundled(bundled) => departure::bound_streams(&bundled.identity).await,
            System::External(_) => Ok(Vec::new()),
        }
    }

    /// An error says why this node cannot leave now.
    pub async fn may_leave(&self) -> Result<(), FabricError> {
        match &self.system {
            System::Bundled(bundled) => departure::may_leave(&bundled.identity).await,
            System::External(_) if self.connected() => Ok(()),
            System::External(_) => Err(FabricError::Leave { reason: "the NATS system is away".to_owned() }),
        }
    }

    /// Gives the streams on this node to others. It stays a member.
    pub async fn evacuate(&self, patience: Duration) -> Result<(), FabricError> {
        // It would be brought back to where it should be.
        self.log.set_unwanted(true);
        match &self.system {
            System::Bundled(bundled) => departure::evacuate(&bundled.identity, patience)
                .await
                .inspect_err(|_| self.log.set_unwanted(false)),
            System::External(_) => Ok(()),
        }
    }

    /// After [`Fabric::evacuate`]: the node does not leave after all.
    pub fn stay(&self) {
        self.set_leaving(false);
    }

    /// Takes this node out of the mesh. Afterwards it has to be shut down, at once.
    pub async fn leave(&self) -> Result<(), FabricError> {
        self.set_leaving(true);
        let left = match &self.system {
            System::Bundled(bundled) => departure::leave(&bundled.identity).await,
            System::External(external) => {
                let left = self.may_leave().await;
                if left.is_ok() {
                    external.delete_log(&self.client, &self.subjects, &self.node).await;
                }
                left
            }
        };
        if let Err(e) = left {
            self.set_leaving(false);
            return Err(e);
        }
        self.exchange().say_farewell().await;
        // It is on its way to the peers when the server has read it.
        self.flush().await
    }

    /// A node that leaves does not say that it is there, and does not make its log anew.
    fn set_leaving(&self, leaving: bool) {
        self.roster.set_leaving(leaving);
        self.log.set_unwanted(leaving);
    }

    /// Whether the cluster can decide anything at all: more than half of its servers are connected.
    pub async fn can_decide(&self) -> bool {
        match &self.system {
            System::Bundled(bundled) => departure::has_leader(&bundled.identity).await,
            System::External(_) => true,
        }
    }

    /// The members whose servers are not connected to ours.
    pub async fn absent(&self) -> Result<Vec<NodeName>, FabricError> {
        let bundled = match &self.system {
            System::Bundled(bundled) => bundled,
            System::External(external) => return Err(external.not_ours(NO_RESCUE)),
        };
        let failed = |source| FabricError::System { what: "our own nats-server does not answer", source };
        let connected = monitor::route_names(bundled.identity.ports.monitor).await.map_err(failed)?;
        let is_absent = |node: &NodeName| !connected.iter().any(|name| name == node.as_str());
        Ok(self.members().into_iter().filter(is_absent).collect())
    }

    /// Has the cluster go on without the members that are gone, though they were too many for it to decide that.
    pub async fn rescue(&self, gone: &[NodeName]) -> Result<(), FabricError> {
        let bundled = match &self.system {
            System::Bundled(bundled) => bundled,
            System::External(external) => return Err(external.not_ours(NO_RESCUE)),
        };
        let with_addresses = |node: &NodeName| (node.clone(), self.roster.addresses(node));
        let gone: Vec<_> = gone.iter().map(with_addresses).collect();
        departure::rescue(&bundled.identity, &gone).await?;
        for (node, _) in &gone {
            self.exchange().forget(node).await;
        }
        Ok(())
    }

    pub(super) fn exchange(&self) -> Exchange {
        let meeting = match &self.system {
            System::Bundled(bundled) => Meeting::Routes(bundled.identity.clone(), bundled.server.clone()),
            System::External(external) => Meeting::External(external.clone()),
        };
        Exchange {
            client: self.client.clone(),
            node: self.node.clone(),
            subjects: self.subjects.clone(),
            meeting,
            roster: self.roster.clone(),
        }
    }

    pub(super) fn rotation(&self) -> Result<Rotation, FabricError> {
        match &self.system {
            System::Bundled(bundled) => Ok(Rotation {
                client: self.client.clone(),
                identity: bundled.identity.clone(),
                server: bundled.server.clone(),
                roster: self.roster.clone(),
                told: bundled.keys.clone(),
            }),
            System::External(external) => Err(external.not_ours(NO_TOKEN)),
        }
    }
}
