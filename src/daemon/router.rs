//! Between the fabric and the databases: hands what arrives to the right worker, keeps track of peers, serves copies.
//! Invariant: it never waits for a database; what a database cannot take now is dropped and repaired later.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::serve_copy::Copies;
use super::verify::Verifier;
use crate::core::frame::WireError;
use crate::core::message::{CopyPart, Fragment, Hello, Message, decode};
use crate::core::names::{DbName, NodeName};
use crate::core::skew::{Clocks, Judgement};
use crate::core::version::SiteId;
use crate::fabric::link::{Incoming, Outgoing};
use crate::replica::clock::{SharedClocks, steady_ms, wall_clock_ms};
use crate::replica::send::{MessageAssembler, message_pieces};
use crate::replica::worker::{Input, WorkerHandle};

/// How often a node says that it is there.
pub const HELLO_EVERY: Duration = Duration::from_secs(2);
/// A peer that was not heard for this long is not live.
pub const LIVE_MS: u64 = 7_000;

/// A peer as this node knows it.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// What it said last.
    pub hello: Hello,
    /// When, by our clock.
    pub heard_ms: u64,
    /// How far its clock was ahead of ours then.
    pub clock_offset_ms: i64,
    /// It said that it stops.
    pub left: bool,
    /// It was told in the log that nothing is heard of it.
    missed: bool,
}

impl PeerInfo {
    /// Whether it was heard lately.
    pub fn is_live(&self, now_ms: u64) -> bool {
        !self.left && now_ms < self.heard_ms + LIVE_MS
    }
}

/// What a request for a copy is answered with.
pub type CopyAnswer = Result<CopyPart, String>;

/// See the module.
pub struct Router {
    node: NodeName,
    workers: RwLock<BTreeMap<DbName, WorkerHandle>>,
    peers: Mutex<BTreeMap<NodeName, PeerInfo>>,
    waiting: Mutex<HashMap<u64, mpsc::Sender<CopyAnswer>>>,
    copies: Arc<Copies>,
    /// Comparing rows with peers.
    pub(super) verifier: Verifier,
    /// What peers say of their clocks, and what that means.
    heard_clocks: Mutex<Clocks>,
    clocks: SharedClocks,
    outgoing: mpsc::Sender<Outgoing>,
    /// Messages that could not be read.
    refused: AtomicU64,
    /// Nodes that left for good, as the databases were told.
    gone: Mutex<BTreeSet<NodeName>>,
}

pub(super) fn held<T>(lock: Result<T, PoisonError<T>>) -> T {
    lock.unwrap_or_else(PoisonError::into_inner)
}

impl Router {
    /// A router that sends through `outgoing` and puts copies into `spool`.
    pub fn new(
        node: NodeName,
        outgoing: mpsc::Sender<Outgoing>,
        spool: PathBuf,
        max_skew: Duration,
    ) -> Arc<Self> {
        Arc::new(Self {
            node,
            workers: RwLock::default(),
            peers: Mutex::default(),
            waiting: Mutex::default(),
            copies: Copies::new(spool),
            verifier: Verifier::default(),
            heard_clocks: Mutex::default(),
            clocks: SharedClocks::new(max_skew.as_millis() as u64),
            outgoing,
            refused: AtomicU64::new(0),
            gone: Mutex::default(),
        })
    }

    /// Messages that could not be read, and so belong to no database.
    pub fn messages_refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Counts what could not be read, and tells of it now and then: a peer of a later release says all in its own way.
    fn refuse(&self, from: &NodeName, what: &str, why: &WireError) {
        let count = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            warn!(node = %from, "refused {what}: {why} ({count} refused in all since the start)");
        }
    }

    /// Adds a database that replicates.
    pub fn add(&self, db: DbName, worker: WorkerHandle) {
        held(self.workers.write()).insert(db, worker);
    }

    /// Takes a database away.
    pub fn remove(&self, db: &DbName) -> Option<WorkerHandle> {
        self.verifier.forget(db);
        held(self.workers.write()).remove(db)
    }

    /// The worker of a database.
    pub fn worker(&self, db: &DbName) -> Option<WorkerHandle> {
        held(self.workers.read()).get(db).cloned()
    }

    /// All databases that replicate.
    pub fn databases(&self) -> Vec<DbName> {
        held(self.workers.read()).keys().cloned().collect()
    }

    /// The peers that were heard of since the start.
    pub fn peers(&self) -> BTreeMap<NodeName, PeerInfo> {
        held(self.peers.lock()).clone()
    }

    /// Sends a message to everybody.
    pub async fn broadcast(&self, message: &Message) {
        let mut pieces = Vec::new();
        message_pieces(message, |payload| pieces.push(Outgoing::Broadcast { payload }));
        for piece in pieces {
            // The receiver is gone only when the process is ending.
            drop(self.outgoing.send(piece).await);
        }
    }

    /// Sends a message to one node.
    pub async fn send(&self, to: &NodeName, message: &Message) {
        let mut pieces = Vec::new();
        message_pieces(message, |payload| pieces.push(Outgoing::Direct { to: to.clone(), payload }));
        for piece in pieces {
            drop(self.outgoing.send(piece).await);
        }
    }

    /// Where answers to a request for a copy go from now on.
    pub fn expect_copy(&self, request: u64, answers: mpsc::Sender<CopyAnswer>) {
        held(self.waiting.lock()).insert(request, answers);
    }

    /// Ends that.
    pub fn forget_copy(&self, request: u64) {
        held(self.waiting.lock()).remove(&request);
    }

    fn hello(&self) -> Message {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Message::Hello(Hello { version, now_ms: wall_clock_ms(), dbs: self.databases() })
    }

    /// Says hello to everybody now.
    pub async fn say_hello(&self) {
        self.broadcast(&self.hello()).await;
    }

    /// Says hello regularly, and throws away copies nobody fetches.
    pub async fn keep_saying_hello(self: Arc<Self>) {
        loop {
            self.say_hello().await;
            self.judge_clocks();
            self.tell_who_is_missed();
            self.copies.expire(&self.databases());
            self.verifier.expire();
            tokio::time::sleep(HELLO_EVERY).await;
        }
    }

    /// Says once of every peer that it is not heard of any more.
    fn tell_who_is_missed(&self) {
        let now_ms = steady_ms();
        for (node, peer) in held(self.peers.lock()).iter_mut() {
            if !peer.missed && !peer.left && !peer.is_live(now_ms) {
                peer.missed = true;
                let silent_s = now_ms.saturating_sub(peer.heard_ms) / 1_000;
                warn!(node = %node, "has not been heard of for {silent_s} s: what it misses is sent when it is back");
            }
        }
    }

    /// Takes in what arrives until the fabric is gone.
    pub async fn run(self: Arc<Self>, mut incoming: mpsc::Receiver<Incoming>) {
        let mut messages = MessageAssembler::default();
        while let Some(message) = incoming.recv().await {
            match message {
                Incoming::Commit { from, db, site, payload } => self.on_commit(&from, &db, site, &payload),
                Incoming::Message { from, payload } => match messages.push::<Message>(&from, &payload) {
                    Ok(Some(message)) => self.on_message(from, message).await,
                    Ok(None) => {}
                    Err(e) => self.refuse(&from, "a message", &e),
                },
                Incoming::Logged(logged) => {
                    if let Some(worker) = self.worker(&logged.asked.db) {
                        // What is not taken in is asked for again.
                        worker.offer(Input::Logged(logged));
                    }
                }
            }
        }
    }

    fn on_commit(&self, from: &NodeName, db: &DbName, site: u64, payload: &Bytes) {
        let Some(worker) = self.worker(db) else { return };
        match decode::<Fragment>(payload) {
            Ok(piece) => {
                if !worker.offer(Input::Fragment(SiteId(site), piece)) {
                    debug!(node = %from, db = %db, "too much is waiting: a commit is fetched later");
                }
            }
            Err(e) => self.refuse(from, &format!("a commit of {db}"), &e),
        }
    }

    async fn on_message(self: &Arc<Self>, from: NodeName, message: Message) {
        let db = match &message {
            Message::Hello(hello) => return self.on_hello(from, hello.clone()).await,
            Message::CopyRequest(request) => {
                let (router, request) = (self.clone(), request.clone());
                tokio::spawn(async move { router.copies.serve(&router, &from, request).await });
                return;
            }
            Message::CopyPart(part) => return self.on_copy(part.request, Ok(part.clone())).await,
            Message::Bye => return self.on_bye(&from),
            Message::Verify(message) => return self.on_verify(from, message.clone()),
            Message::Refused { request, why } => {
                self.on_copy(*request, Err(why.clone())).await;
                None
            }
            Message::Holding(holding) => Some(holding.db.clone()),
            Message::Ask { db } => Some(db.clone()),
            Message::SyncRequest(ask) => Some(ask.db.clone()),
            Message::SyncPage(page) => Some(page.db.clone()),
        };
        let workers = held(self.workers.read()).clone();
        for (name, worker) in workers {
            if db.as_ref().is_none_or(|db| *db == name) {
                worker.offer(Input::Message(from.clone(), message.clone()));
            }
        }
    }

    async fn on_copy(&self, request: u64, answer: CopyAnswer) {
        let waiting = held(self.waiting.lock()).get(&request).cloned();
        if let Some(waiting) = waiting {
            // Nobody waits any more when this fails.
            drop(waiting.send(answer).await);
        }
    }

    fn on_bye(&self, from: &NodeName) {
        info!(node = %from, "has left for now");
        held(self.heard_clocks.lock()).forget(from);
        if let Some(peer) = held(self.peers.lock()).get_mut(from) {
            peer.left = true;
        }
        for worker in held(self.workers.read()).values() {
            worker.offer(Input::Message(from.clone(), Message::Bye));
        }
    }

    async fn on_hello(&self, from: NodeName, hello: Hello) {
        let now_ms = steady_ms();
        let clock_offset_ms = hello.now_ms as i64 - wall_clock_ms() as i64;
        let known = held(self.peers.lock()).get(&from).cloned();
        let is_news = known.as_ref().is_none_or(|p| !p.is_live(now_ms) || p.hello.dbs != hello.dbs);
        held(self.heard_clocks.lock()).hear(&from, hello.now_ms, now_ms);
        self.judge_clocks();
        if known.is_some_and(|p| p.missed || p.left) {
            info!(node = %from, "is back");
        }
        let peer = PeerInfo { hello, heard_ms: now_ms, clock_offset_ms, left: false, missed: false };
        held(self.peers.lock()).insert(from.clone(), peer);
        if is_news {
            self.send(&from, &self.hello()).await;
            for worker in held(self.workers.read()).values() {
                worker.offer(Input::Greet(from.clone()));
            }
        }
    }

    /// What the live nodes' clocks mean.
    pub fn clocks(&self) -> SharedClocks {
        self.clocks.clone()
    }

    /// Compares the clocks; what changes for the worse is told once.
    fn judge_clocks(&self) {
        let max_skew_ms = self.clocks.get().max_skew_ms;
        let judged = held(self.heard_clocks.lock()).judge(wall_clock_ms(), steady_ms(), max_skew_ms);
        let wrong = |j: &Judgement| (j.is_own_wrong(), j.wrong.keys().cloned().collect::<Vec<_>>());
        let before = self.clocks.set(judged.clone());
        if wrong(&before) != wrong(&judged) {
            judged.alarms(&self.node).into_iter().for_each(|alarm| warn!("{alarm}"));
            if wrong(&judged) == (false, Vec::new()) {
                info!("the clocks agree again");
            }
        }
    }

    /// Nodes left the mesh for good: nothing of them is shown, and nobody waits for them any more.
    pub fn forget_gone(&self, gone: &[NodeName]) {
        let mut told = held(self.gone.lock());
        told.retain(|node| gone.contains(node));
        for node in gone {
            let was_there = held(self.peers.lock()).remove(node).is_some();
            if !told.insert(node.clone()) && !was_there {
                continue;
            }
            held(self.heard_clocks.lock()).forget(node);
            for worker in held(self.workers.read()).values() {
                let node = node.clone();
                worker.offer(Input::Do(Box::new(move |engine| engine.forget_member(&node))));
            }
        }
    }

    /// The node's own name.
    pub fn node(&self) -> &NodeName {
        &self.node
    }
}
