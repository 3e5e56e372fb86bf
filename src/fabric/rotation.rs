//! A change of the mesh's key without a moment in which anybody is locked out. Invariant: a node gives up the old key
//! only when every member has said that it has the new one, or when an operator says so.
//!
//! Nodes say how new their key is; who hears of an older one sends its own, over the mesh: whoever is connected has a key
//! that is accepted. A node that was away meanwhile is accepted with the old key, and accepts the others (see
//! [`certs`](super::certs)).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::error::FabricError;
use super::hello::Roster;
use super::identity::Identity;
use super::keyring::parse_key;
use super::preflight::PreflightError;
use super::server::Server;
use super::{monitor, subjects};
use crate::core::names::NodeName;

const FIRST_PAUSE: Duration = Duration::from_millis(300);
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// While not all have the new key, and while nobody is connected.
const BUSY_PAUSE: Duration = Duration::from_secs(5);

/// How new a key is, and which.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Has {
    generation: u64,
    id: String,
}

#[derive(Serialize, Deserialize)]
struct Handed {
    generation: u64,
    key: String,
}

/// Keeps this node's key the mesh's.
#[derive(Clone)]
pub(super) struct Rotation {
    pub(super) client: async_nats::Client,
    pub(super) identity: Arc<Identity>,
    pub(super) server: Arc<Server>,
    pub(super) roster: Arc<Roster>,
    pub(super) told: Arc<Told>,
}

/// What others said of their keys since this node started.
#[derive(Default)]
pub(super) struct Told {
    has: Mutex<BTreeMap<NodeName, Has>>,
    changed: Notify,
}

impl Told {
    fn has(&self) -> MutexGuard<'_, BTreeMap<NodeName, Has>> {
        self.has.lock().expect("nothing panics while it is held")
    }
}

impl Rotation {
    /// Until it is aborted.
    pub(super) async fn run(self, mut said: async_nats::Subscriber, mut handed: async_nats::Subscriber) {
        let mut pause = FIRST_PAUSE;
        let mut next = Instant::now();
        let mut locked_out = false;
        loop {
            tokio::select! {
                () = sleep_until(next) => {
                    self.say().await;
                    let alone = self.look_whether_locked_out(&mut locked_out).await;
                    pause = (pause * 2).min(if alone || !self.waiting_for().is_empty() { BUSY_PAUSE } else { LAST_PAUSE });
                    next = Instant::now() + pause;
                }
                () = self.told.changed.notified() => {
                    (pause, next) = (FIRST_PAUSE, Instant::now());
                }
                message = said.next() => {
                    let Some(message) = message else { return };
                    if self.hear(&message).await {
                        (pause, next) = (FIRST_PAUSE, Instant::now());
                    }
                }
                message = handed.next() => {
                    let Some(message) = message else { return };
                    self.take(&message);
                }
            }
            self.end_if_all_have_it();
        }
    }

    /// Makes a new key and tells the others. The old one is accepted until all have it.
    pub(super) fn change(&self) -> Result<(), FabricError> {
        if self.identity.ring().previous().is_some() {
            return Err(FabricError::KeyChanging { waiting_for: self.waiting_for() });
        }
        self.go_over(|ring| Ok(Some(ring.changed()?)))?;
        info!("the mesh has a new key; the old one is accepted until all nodes have it");
        Ok(())
    }

    /// Accepts the old key no more, whoever has no other.
    pub(super) fn drop_old(&self) -> Result<(), FabricError> {
        self.go_over(|ring| Ok(ring.previous().map(|_| ring.without_previous()))).map(drop)
    }

    /// The members that are not known to have the new key; none unless it is being changed.
    pub(super) fn waiting_for(&self) -> Vec<NodeName> {
        let ring = self.identity.ring();
        if ring.previous().is_none() {
            return Vec::new();
        }
        let ours = Has { generation: ring.generation(), id: ring.current().id() };
        let told = self.told.has();
        self.roster.names().into_iter().filter(|node| told.get(node) != Some(&ours)).collect()
    }

    fn go_over(
        &self,
        change: impl FnOnce(&super::keyring::KeyRing) -> Result<Option<super::keyring::KeyRing>, FabricError>,
    ) -> Result<bool, FabricError> {
        let done = self.identity.change_ring(change)?;
        if done {
            self.server.reload(&self.identity.conf_text(&self.roster.members()))?;
            self.told.changed.notify_one();
        }
        Ok(done)
    }

    async fn say(&self) {
        let ring = self.identity.ring();
        let has = Has { generation: ring.generation(), id: ring.current().id() };
        self.publish(subjects::key_of(&self.identity.node), &has).await;
    }

    async fn publish(&self, subject: String, message: &impl Serialize) {
        if self.client.connection_state() == async_nats::connection::State::Connected {
            let text = serde_json::to_vec(message).expect("strings become JSON");
            // The next one comes soon.
            let _ = self.client.publish(subject, text.into()).await;
        }
    }

    /// Whether the other one should hear of our key at once.
    async fn hear(&self, message: &async_nats::Message) -> bool {
        let Some(from) = subjects::key_from(&message.subject) else { return false };
        let Ok(theirs) = serde_json::from_slice::<Has>(&message.payload) else { return false };
        if from == self.identity.node {
            return false;
        }
        let ring = self.identity.ring();
        let ours = (ring.generation(), ring.current().id());
        let older = (theirs.generation, &theirs.id) < (ours.0, &ours.1);
        let differs = (theirs.generation, &theirs.id) != (ours.0, &ours.1);
        self.told.has().insert(from.clone(), theirs);
        if older {
            let key = URL_SAFE_NO_PAD.encode(ring.current().to_bytes());
            let handed = Handed { generation: ring.generation(), key };
            self.publish(subjects::key_for(&self.identity.node, &from), &handed).await;
        }
        differs && !older
    }

    fn take(&self, message: &async_nats::Message) {
        let Ok(handed) = serde_json::from_slice::<Handed>(&message.payload) else { return };
        let Some(key) = parse_key(&handed.key) else { return };
        let was = self.identity.ring();
        match self.go_over(|ring| Ok(ring.with(handed.generation, &key))) {
            Ok(true) if *was.current() != key => {
                let from = subjects::key_giver(&message.subject).map(|n| n.to_string()).unwrap_or_default();
                info!(from, "the mesh has a new key: this node has it now");
            }
            Ok(_) => {}
            Err(e) => warn!("the mesh has a new key, and this node cannot go over to it: {e}"),
        }
    }

    fn end_if_all_have_it(&self) {
        if self.identity.ring().previous().is_none() || !self.waiting_for().is_empty() {
            return;
        }
        match self.drop_old() {
            Ok(()) => info!("all nodes have the mesh's new key: the old one is accepted no more"),
            Err(e) => warn!("the mesh's old key is still accepted: {e}"),
        }
    }

    /// Whether no peer is connected; if it is because our key is not the mesh's any more, that is said once.
    async fn look_whether_locked_out(&self, told: &mut bool) -> bool {
        let routes = self.roster.routes(&self.identity.own);
        let connected = monitor::route_names(self.identity.ports.monitor).await.unwrap_or_default();
        if routes.is_empty() || !connected.is_empty() {
            *told = false;
            return false;
        }
        if let Err(PreflightError::OtherMesh { address }) = self.identity.look_at(&routes).await
            && !std::mem::replace(told, true)
        {
            warn!(
                "the node at {address} does not accept this node's key: if the mesh's key was changed while this node was \
                 away, start it once with --join and what 'litemesh token' prints there"
            );
        }
        true
    }
}
