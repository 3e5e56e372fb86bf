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
use super::keyring::{KeyRing, parse_key};
use super::monitor;
use super::preflight::PreflightError;
use super::server::Server;
use super::subjects::{self, Subjects};
use crate::core::names::NodeName;

const FIRST_PAUSE: Duration = Duration::from_millis(300);
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// While not all have the new key, and while nobody is connected.
const BUSY_PAUSE: Duration = Duration::from_secs(5);

/// How new a key is, and which.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Has {
    generation: u64,
    id: String,
}

impl Has {
    fn of(ring: &KeyRing) -> Self {
        Self { generation: ring.generation(), id: ring.current().id() }
    }
}

/// What a node says of its key.
#[derive(Serialize, Deserialize)]
struct Said {
    #[serde(flatten)]
    has: Has,
    /// An operator said that the one before is accepted no more, whoever has no other.
    #[serde(default)]
    dropped: bool,
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
    /// The key besides which an operator wants no other.
    alone: Mutex<Option<Has>>,
    /// Why nobody lets this node in.
    locked_out: Mutex<Option<String>>,
}

impl Told {
    fn has(&self) -> MutexGuard<'_, BTreeMap<NodeName, Has>> {
        self.has.lock().expect("nothing panics while it is held")
    }

    fn alone(&self) -> MutexGuard<'_, Option<Has>> {
        self.alone.lock().expect("nothing panics while it is held")
    }

    fn locked_out(&self) -> MutexGuard<'_, Option<String>> {
        self.locked_out.lock().expect("nothing panics while it is held")
    }

    /// Why nobody lets this node in, if it is because of its key.
    pub(super) fn notice(&self) -> Option<String> {
        self.locked_out().clone()
    }
}

impl Rotation {
    /// Until it is aborted.
    pub(super) async fn run(self, mut said: async_nats::Subscriber, mut handed: async_nats::Subscriber) {
        let mut pause = FIRST_PAUSE;
        let mut next = Instant::now();
        loop {
            tokio::select! {
                () = sleep_until(next) => {
                    self.say().await;
                    let alone = self.look_whether_locked_out().await;
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

    /// Accepts the old key no more, whoever has no other, and tells the others.
    pub(super) fn drop_old(&self) -> Result<(), FabricError> {
        *self.told.alone() = Some(Has::of(&self.identity.ring()));
        self.told.changed.notify_one();
        self.end()
    }

    fn end(&self) -> Result<(), FabricError> {
        self.go_over(|ring| Ok(ring.previous().map(|_| ring.without_previous()))).map(drop)
    }

    /// The members that are not known to have the new key; none unless it is being changed.
    pub(super) fn waiting_for(&self) -> Vec<NodeName> {
        let ring = self.identity.ring();
        if ring.previous().is_none() {
            return Vec::new();
        }
        let ours = Has::of(&ring);
        let told = self.told.has();
        self.roster.names().into_iter().filter(|node| told.get(node) != Some(&ours)).collect()
    }

    fn go_over(
        &self,
        change: impl FnOnce(&KeyRing) -> Result<Option<KeyRing>, FabricError>,
    ) -> Result<bool, FabricError> {
        let done = self.identity.change_ring(change)?;
        if done {
            self.server.reload(&self.identity.conf_text(&self.roster.members()))?;
            self.told.changed.notify_one();
        }
        Ok(done)
    }

    async fn say(&self) {
        let has = Has::of(&self.identity.ring());
        let dropped = self.told.alone().as_ref() == Some(&has);
        self.publish(Subjects::bundled().key_of(&self.identity.node), &Said { has, dropped }).await;
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
        let Some(from) = Subjects::bundled().key_from(&message.subject) else { return false };
        let Ok(Said { has: theirs, dropped }) = serde_json::from_slice(&message.payload) else {
            return false;
        };
        if from == self.identity.node {
            return false;
        }
        let ring = self.identity.ring();
        let ours = Has::of(&ring);
        self.told.has().insert(from.clone(), theirs.clone());
        if theirs < ours {
            let key = URL_SAFE_NO_PAD.encode(ring.current().to_bytes());
            let handed = Handed { generation: ring.generation(), key };
            self.publish(Subjects::bundled().key_for(&self.identity.node, &from), &handed).await;
        }
        if theirs == ours && dropped && self.told.alone().as_ref() != Some(&ours) {
            info!(%from, "the mesh's old key is accepted no more");
            self.drop_old().unwrap_or_else(|e| warn!("the mesh's old key is still accepted: {e}"));
        }
        theirs > ours
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
        match self.end() {
            Ok(()) => info!("all nodes have the mesh's new key: the old one is accepted no more"),
            Err(e) => warn!("the mesh's old key is still accepted: {e}"),
        }
    }

    /// Whether no peer is connected; if it is because our key is not the mesh's any more, that is said once.
    async fn look_whether_locked_out(&self) -> bool {
        let routes = self.roster.routes(&self.identity.own);
        let connected = monitor::route_names(self.identity.ports.monitor).await.unwrap_or_default();
        if routes.is_empty() || !connected.is_empty() {
            *self.told.locked_out() = None;
            return false;
        }
        if let Err(PreflightError::OtherMesh { address }) = self.identity.look_at(&routes).await {
            let text = format!(
                "the node at {address} does not accept this node's key: if the mesh's key was changed while this node was \
                 away, start it once with --join and what 'litemesh token' prints there"
            );
            if self.told.locked_out().replace(text.clone()).is_none() {
                warn!("{text}");
            }
        }
        true
    }
}
