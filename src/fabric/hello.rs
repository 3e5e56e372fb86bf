//! Nodes tell each other where they listen, so that each dials all by itself, after a restart too. Invariant: what is
//! heard only ever adds addresses to dial; whoever answers there still has to prove that it holds the key.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::address::Address;
use super::external::External;
use super::identity::Identity;
use super::members::Members;
use super::monitor;
use super::server::Server;
use super::subjects::Subjects;
use crate::core::names::NodeName;

/// The route to a peer is made a moment after we are ready: the first hellos come quickly.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    routes: Vec<Address>,
    /// Nodes that left or were removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    gone: Vec<NodeName>,
    /// Tells two processes of one name apart, where no server does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    run: Option<u64>,
}

/// The members, shared between who learns of them and who asks.
pub(super) struct Roster {
    members: Mutex<Members>,
    leaving: AtomicBool,
}

impl Roster {
    pub(super) fn new(members: Members) -> Self {
        Self { members: Mutex::new(members), leaving: AtomicBool::new(false) }
    }

    pub(super) fn gone(&self) -> Vec<NodeName> {
        self.lock().gone().cloned().collect()
    }

    /// The addresses of a member.
    pub(super) fn addresses(&self, node: &NodeName) -> Vec<Address> {
        self.lock().addresses(node).to_vec()
    }

    pub(super) fn routes(&self, own: &[Address]) -> Vec<Address> {
        self.lock().routes(own)
    }

    pub(super) fn members(&self) -> Members {
        self.lock().clone()
    }

    pub(super) fn names(&self) -> Vec<NodeName> {
        self.lock().names().cloned().collect()
    }

    /// The members, if something of this was news.
    fn update(&self, change: impl FnOnce(&mut Members) -> bool) -> Option<Members> {
        let mut members = self.lock();
        change(&mut members).then(|| members.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Members> {
        self.members.lock().expect("nothing panics while it is held")
    }

    pub(super) fn set_leaving(&self, leaving: bool) {
        self.leaving.store(leaving, Ordering::Relaxed);
    }
}

/// By which servers the nodes meet.
#[derive(Clone)]
pub(super) enum Meeting {
    /// Their own, which dial each other.
    Routes(Arc<Identity>, Arc<Server>),
    /// Those of another system.
    External(Arc<External>),
}

/// What it takes to say hello and to act upon one.
#[derive(Clone)]
pub(super) struct Exchange {
    pub(super) client: async_nats::Client,
    pub(super) node: NodeName,
    pub(super) subjects: Subjects,
    pub(super) meeting: Meeting,
    pub(super) roster: Arc<Roster>,
}

impl Exchange {
    /// Until it is aborted.
    pub(super) async fn run(self, mut hellos: async_nats::Subscriber) {
        let mut pause = FIRST_PAUSE;
        let mut next = Instant::now();
        loop {
            tokio::select! {
                () = sleep_until(next) => {
                    self.say_hello().await;
                    next = Instant::now() + pause;
                    pause = (pause * 2).min(LAST_PAUSE);
                }
                message = hellos.next() => {
                    let Some(message) = message else { return };
                    if self.hear(&message).await {
                        // It may not have heard of us yet.
                        next = Instant::now();
                    }
                }
            }
        }
    }

    /// Forgets a node that was removed, and tells the others.
    pub(super) async fn forget(&self, node: &NodeName) {
        if let Some(members) = self.roster.update(|members| members.forget(node)) {
            self.keep(&members);
        }
        self.say_hello().await;
    }

    /// Tells the others that this node itself goes for good.
    pub(super) async fn say_farewell(&self) {
        self.say(Vec::new(), vec![self.node.clone()]).await;
    }

    async fn say_hello(&self) {
        if self.roster.leaving.load(Ordering::Relaxed) {
            return;
        }
        let own = match &self.meeting {
            Meeting::Routes(identity, _) => identity.own.clone(),
            Meeting::External(_) => Vec::new(),
        };
        self.say(own, self.roster.gone()).await;
    }

    async fn say(&self, routes: Vec<Address>, gone: Vec<NodeName>) {
        if self.client.connection_state() != async_nats::connection::State::Connected {
            return;
        }
        let run = match &self.meeting {
            Meeting::Routes(..) => None,
            Meeting::External(external) => Some(external.run),
        };
        let hello = Hello { routes, gone, run };
        let text = serde_json::to_vec(&hello).expect("strings become JSON");
        // The next one comes soon.
        let _ = self.client.publish(self.subjects.hello(&self.node), text.into()).await;
    }

    /// Whether it was news.
    async fn hear(&self, message: &async_nats::Message) -> bool {
        let Some(from) = self.subjects.hello_from(&message.subject) else { return false };
        let Ok(hello) = serde_json::from_slice::<Hello>(&message.payload) else { return false };
        if from == self.node {
            if let Meeting::External(external) = &self.meeting {
                external.heard_own_name(&from, hello.run);
            }
            return false;
        }
        let leaves = hello.gone.contains(&from);
        // Whoever is connected is there, whoever says that it is gone: it came again under its name.
        let connected = match hello.gone.is_empty() {
            true => Vec::new(),
            false => self.connected(&hello.gone).await,
        };
        let is_there = |node: &NodeName| {
            *node == self.node || *node != from && connected.iter().any(|name| name == node.as_str())
        };
        let (mut comes, mut go) = (false, Vec::new());
        let news = self.roster.update(|members| {
            comes = !leaves && members.learn(&from, &hello.routes);
            go.extend(hello.gone.iter().filter(|node| !is_there(node) && members.forget(node)));
            comes || !go.is_empty()
        });
        let Some(members) = news else { return false };
        if comes {
            let addresses: Vec<_> = hello.routes.iter().map(ToString::to_string).collect();
            match &self.meeting {
                Meeting::Routes(..) => {
                    info!(node = %from, addresses = addresses.join(","), "a member, and where it is found");
                }
                Meeting::External(_) => info!(node = %from, "a member"),
            }
        }
        for gone in go {
            info!(node = %gone, "is no member any more");
        }
        self.keep(&members);
        comes
    }

    /// The nodes that are there; of those of another system, those of `asked`.
    async fn connected(&self, asked: &[NodeName]) -> Vec<String> {
        match &self.meeting {
            Meeting::Routes(identity, _) => {
                monitor::route_names(identity.ports.monitor).await.unwrap_or_default()
            }
            Meeting::External(external) => {
                let mut there = Vec::new();
                for node in asked {
                    if external.is_there(&self.client, &self.subjects, node).await {
                        there.push(node.to_string());
                    }
                }
                there
            }
        }
    }

    /// For the next start, and for the server that runs.
    fn keep(&self, members: &Members) {
        let result = match &self.meeting {
            Meeting::Routes(identity, server) => {
                let kept = members.save(&identity.state.members()).map_err(|e| e.to_string());
                let reloaded = server.reload(&identity.conf_text(members)).map_err(|e| e.to_string());
                kept.and(reloaded)
            }
            Meeting::External(external) => members.save(&external.state.members()).map_err(|e| e.to_string()),
        };
        if let Err(e) = result {
            warn!("the members' addresses are not kept: {e}");
        }
    }
}
