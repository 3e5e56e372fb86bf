//! Comparing this node's rows with its peers', on demand and regularly, and answering peers that compare. Invariant:
//! one comparison at a time, in a thread of its own, which ends when the node does; what peers ask is answered by a
//! bounded number of threads.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rand::Rng;
use tokio::sync::Semaphore;
use tracing::{info, warn};

use super::divergence::{Divergent, Tally};
use super::router::{Router, held};
use crate::core::message::Message;
use crate::core::names::{DbName, NodeName};
use crate::core::verify::{Outcome, Question, Reply, VerifyMessage};
use crate::replica::clock::{steady_ms, wall_clock_ms};
use crate::replica::compare::{CompareError, Comparison, Pace, Peer};
use crate::replica::verify::{Owner, Reader};
use crate::replica::worker::WorkerHandle;

/// How long to wait for an answer before asking again, and how often to ask.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
const ASK_TIMES: u32 = 3;
/// How often a waiting thread looks whether the node is ending.
const GLANCE: Duration = Duration::from_millis(100);
/// A reader that nobody asks for is closed after this time.
const KEEP_READER: Duration = Duration::from_secs(30);
/// How long rows may take to settle.
const SETTLE_PATIENCE: Duration = Duration::from_secs(20);
/// How often to look whether a regular comparison is due.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Questions of peers that are answered at once.
const SERVING: usize = 2;

/// The share of its time that a comparison works; for the rest it sleeps.
#[derive(Debug, Clone, Copy)]
pub enum Speed {
    /// Somebody waits for it: half of the time.
    OnDemand,
    /// Nobody does: a tenth.
    Regular,
}

type SharedReader = Arc<Mutex<Reader>>;

/// What the router keeps for comparing.
pub struct Verifier {
    readers: Mutex<HashMap<DbName, (SharedReader, Instant)>>,
    waiting: Mutex<HashMap<u64, SyncSender<VerifyMessage>>>,
    /// What came of the latest comparisons, and when that was noted.
    outcomes: Mutex<BTreeMap<DbName, (Outcome, u64)>>,
    /// Held by the thread that compares.
    running: Mutex<()>,
    ending: AtomicBool,
    serving: Arc<Semaphore>,
    members: OnceLock<Box<dyn Fn() -> Vec<NodeName> + Send + Sync>>,
}

impl Default for Verifier {
    fn default() -> Self {
        Self {
            readers: Mutex::default(),
            waiting: Mutex::default(),
            outcomes: Mutex::default(),
            running: Mutex::default(),
            ending: AtomicBool::new(false),
            serving: Arc::new(Semaphore::new(SERVING)),
            members: OnceLock::new(),
        }
    }
}

impl Verifier {
    /// Says how to learn which nodes belong to the mesh.
    pub fn know_members(&self, members: impl Fn() -> Vec<NodeName> + Send + Sync + 'static) {
        // Said once, at the start.
        drop(self.members.set(Box::new(members)));
    }

    /// The node is ending: whoever compares ends soon.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
        drop(held(self.running.lock()));
    }

    /// What came of the latest comparisons, and when that was noted by the clock that never jumps.
    pub fn outcomes(&self) -> BTreeMap<DbName, (Outcome, u64)> {
        held(self.outcomes.lock()).clone()
    }

    /// Closes readers that nobody uses.
    pub fn expire(&self) {
        held(self.readers.lock()).retain(|_, (_, used)| used.elapsed() < KEEP_READER);
    }

    /// A database is gone.
    pub fn forget(&self, db: &DbName) {
        held(self.readers.lock()).remove(db);
        held(self.outcomes.lock()).remove(db);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    pub(super) fn alone(&self) -> std::sync::MutexGuard<'_, ()> {
        held(self.running.lock())
    }

    /// Answers to this request go to the receiver from now on.
    pub(super) fn expect(&self) -> (u64, Receiver<VerifyMessage>) {
        let request = rand::random::<u64>() >> 1;
        // Whoever asks takes each answer before it asks again.
        let (sender, answers) = sync_channel(8);
        held(self.waiting.lock()).insert(request, sender);
        (request, answers)
    }

    pub(super) fn unexpect(&self, request: u64) {
        held(self.waiting.lock()).remove(&request);
    }

    fn hand_over(&self, request: u64, message: VerifyMessage) {
        if let Some(waiting) = held(self.waiting.lock()).get(&request) {
            // Nobody waits any more, or has an answer already.
            drop(waiting.try_send(message));
        }
    }

    fn reader(&self, db: &DbName, worker: &WorkerHandle) -> Result<SharedReader, String> {
        let mut readers = held(self.readers.lock());
        if let Some((reader, used)) = readers.get_mut(db) {
            *used = Instant::now();
            return Ok(reader.clone());
        }
        let reader = Arc::new(Mutex::new(open_reader(worker)?));
        readers.insert(db.clone(), (reader.clone(), Instant::now()));
        Ok(reader)
    }

    fn note(&self, db: &DbName, outcome: Outcome) {
        let nodes = outcome.nodes.iter().chain([&outcome.by]).map(ToString::to_string).collect::<Vec<_>>();
        let (nodes, rows) = (nodes.join(", "), outcome.divergent_rows);
        if rows > 0 {
            warn!(
                db = %db,
                "{rows} rows are not the same on {nodes}: 'litemesh verify {db}' lists them, 'litemesh repair {db} --from NODE' \
                 makes them those of NODE everywhere"
            );
        } else if held(self.outcomes.lock()).get(db).is_some_and(|(o, _)| o.divergent_rows > 0) {
            info!(db = %db, "all rows are the same again on {nodes}");
        }
        held(self.outcomes.lock()).insert(db.clone(), (outcome, steady_ms()));
    }
}

/// A reader of the file that a worker replicates.
pub(super) fn open_reader(worker: &WorkerHandle) -> Result<Reader, String> {
    let path = worker.call(|engine| engine.store().path().to_owned()).ok_or("it is being detached")?;
    Reader::open(path.as_ref()).map_err(|e| e.to_string())
}

/// A peer, asked by messages.
pub(super) struct RemotePeer {
    pub router: Arc<Router>,
    pub node: NodeName,
    pub db: DbName,
    pub lineage: u64,
}

impl Peer for RemotePeer {
    fn ask(&mut self, question: Question) -> Result<Reply, CompareError> {
        let verifier = &self.router.verifier;
        let (request, answers) = verifier.expect();
        let (db, lineage) = (self.db.clone(), self.lineage);
        let message = Message::Verify(VerifyMessage::Ask { db, lineage, request, question });
        let mut result = Err(CompareError::Silent);
        for _ in 0..ASK_TIMES {
            tokio::runtime::Handle::current().block_on(self.router.send(&self.node, &message));
            result = self.wait(&answers);
            if !matches!(result, Err(CompareError::Silent)) || !self.router.is_live(&self.node) {
                break;
            }
        }
        verifier.unexpect(request);
        result
    }
}

impl RemotePeer {
    fn wait(&self, answers: &Receiver<VerifyMessage>) -> Result<Reply, CompareError> {
        let asked = Instant::now();
        while asked.elapsed() < ANSWER_PATIENCE {
            if self.router.verifier.is_ending() {
                return Err(CompareError::Ending);
            }
            match answers.recv_timeout(GLANCE) {
                Ok(VerifyMessage::Reply { reply: Reply::Refused(why), .. }) => {
                    return Err(CompareError::There(why));
                }
                Ok(VerifyMessage::Reply { reply, .. }) => return Ok(reply),
                Ok(_) => return Err(CompareError::Nonsense),
                Err(_) => {}
            }
        }
        Err(CompareError::Silent)
    }
}

/// Works for a share of the time.
pub(super) struct Duty<'a> {
    pub verifier: &'a Verifier,
    pub speed: Speed,
}

impl Pace for Duty<'_> {
    fn worked(&mut self, took: Duration) -> Result<(), CompareError> {
        let rest = match self.speed {
            Speed::OnDemand => took,
            Speed::Regular => took * 9,
        };
        self.pause(rest.min(Duration::from_secs(1)))
    }

    fn pause(&mut self, time: Duration) -> Result<(), CompareError> {
        let until = Instant::now() + time;
        loop {
            if self.verifier.is_ending() {
                return Err(CompareError::Ending);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(GLANCE));
        }
    }

    fn patience(&self) -> Duration {
        SETTLE_PATIENCE
    }
}

/// Whom a database can be compared with now, and whom not and why.
pub(super) struct Partners {
    pub live: Vec<NodeName>,
    pub away: Vec<String>,
}

impl Router {
    /// Whether a peer was heard lately.
    pub fn is_live(&self, node: &NodeName) -> bool {
        self.peers().get(node).is_some_and(|p| p.is_live(steady_ms()))
    }

    pub(super) fn partners(&self, db: &DbName) -> Partners {
        let (now_ms, peers) = (steady_ms(), self.peers());
        let members = self.verifier.members.get().map(|m| m()).unwrap_or_default();
        let mut partners = Partners { live: Vec::new(), away: Vec::new() };
        for (node, peer) in peers.iter().filter(|(_, p)| p.hello.dbs.contains(db)) {
            match peer.is_live(now_ms) {
                true => partners.live.push(node.clone()),
                false => partners.away.push(format!("node {node} is not there")),
            }
        }
        for node in members.iter().filter(|m| !peers.contains_key(*m) && **m != *self.node()) {
            partners.away.push(format!("node {node} has not been heard of since this node's start"));
        }
        partners
    }

    /// Takes in what is said about comparing.
    pub(super) fn on_verify(self: &Arc<Self>, from: NodeName, message: VerifyMessage) {
        match message {
            VerifyMessage::Ask { db, lineage, request, question } => {
                let router = self.clone();
                tokio::spawn(async move {
                    let Ok(_turn) = router.verifier.serving.clone().acquire_owned().await else { return };
                    let asked = router.clone();
                    let answer = move || asked.answer(&db, lineage, &question);
                    let reply = match tokio::task::spawn_blocking(answer).await {
                        Ok(Ok(reply)) => reply,
                        Ok(Err(why)) => Reply::Refused(why),
                        Err(_) => return,
                    };
                    router.send(&from, &Message::Verify(VerifyMessage::Reply { request, reply })).await;
                });
            }
            VerifyMessage::Outcome { db, lineage, outcome } => {
                let router = self.clone();
                tokio::task::spawn_blocking(move || {
                    if router.worker(&db).and_then(|w| w.lineage().ok()) == Some(lineage) {
                        router.verifier.note(&db, outcome);
                    }
                });
            }
            VerifyMessage::Repair { db, lineage, request, table, dry_run } => {
                self.on_repair(from, request, db, lineage, table, dry_run);
            }
            VerifyMessage::Reply { request, .. }
            | VerifyMessage::Repairing { request }
            | VerifyMessage::Repaired { request, .. } => self.verifier.hand_over(request, message),
        }
    }

    fn answer(&self, db: &DbName, lineage: u64, question: &Question) -> Result<Reply, String> {
        let worker = self.worker(db).ok_or("this node does not have that database")?;
        if worker.lineage().map_err(|e| e.to_string())? != lineage {
            return Err("this node's file is another database of the same name".to_owned());
        }
        let reader = self.verifier.reader(db, &worker)?;
        let answer = held(reader.lock()).answer(&worker, question);
        answer.map_err(|e| e.to_string())
    }

    /// Compares a database with every live peer that has it. Blocks: call it from a thread that may.
    pub fn verify(self: &Arc<Self>, db: &DbName, speed: Speed) -> Result<(Outcome, Vec<Divergent>), String> {
        let _alone = self.verifier.alone();
        let started = Instant::now();
        let worker = self.worker(db).ok_or("this node does not replicate it")?;
        let lineage = worker.lineage().map_err(|e| e.to_string())?;
        let mut reader = open_reader(&worker)?;
        let partners = self.partners(db);
        let mut not_compared = partners.away;
        let (mut tally, mut nodes) = (Tally::new(self.node().clone()), Vec::new());
        let (mut rows, mut unsettled) = (0, 0);
        for node in partners.live {
            let mut peer = RemotePeer { router: self.clone(), node: node.clone(), db: db.clone(), lineage };
            let mut pace = Duty { verifier: &self.verifier, speed };
            let mut comparison = Comparison::new(&worker, &mut reader, &mut peer, &mut pace);
            let result = comparison.run(None, &mut |found| {
                tally.add(&node, found);
                Ok(())
            });
            rows = rows.max(comparison.compared.rows);
            unsettled += comparison.compared.unsettled;
            let left_out = comparison.compared.left_out.into_iter();
            not_compared.extend(left_out.map(|why| format!("with node {node}: {why}")));
            match result {
                Ok(()) => nodes.push(node),
                Err(e @ CompareError::Ending) => return Err(e.to_string()),
                Err(CompareError::Here(e)) => return Err(e.to_string()),
                Err(e) => not_compared.push(format!("node {node}: {e}")),
            }
        }
        let outcome = Outcome {
            at_ms: wall_clock_ms(),
            took_ms: started.elapsed().as_millis() as u64,
            rows,
            by: self.node().clone(),
            nodes,
            not_compared,
            divergent_rows: tally.count(),
            unsettled_rows: unsettled,
        };
        self.tell_outcome(db, lineage, &outcome);
        let rows = tally.rows(&outcome.nodes);
        Ok((outcome, rows))
    }

    fn tell_outcome(&self, db: &DbName, lineage: u64, outcome: &Outcome) {
        let handle = tokio::runtime::Handle::current();
        for node in &outcome.nodes {
            let (db, outcome) = (db.clone(), outcome.clone());
            let message = Message::Verify(VerifyMessage::Outcome { db, lineage, outcome });
            handle.block_on(self.send(node, &message));
        }
        self.verifier.note(db, outcome.clone());
    }

    /// Compares every database once in a while. The first node whose turn it is does it for all that take part.
    pub async fn keep_verifying(self: Arc<Self>, every: Duration) {
        let mut due: HashMap<DbName, (u64, u64)> = HashMap::new();
        let every_ms = every.as_millis() as u64;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let (now_ms, outcomes) = (steady_ms(), self.verifier.outcomes());
            let mut next = None;
            for db in self.databases() {
                let last = outcomes.get(&db).map_or(0, |(_, at_ms)| *at_ms);
                let (of, at) = due.entry(db.clone()).or_insert((0, 0));
                if *of != last || *at == 0 {
                    // After the first start not all at once; later a little apart, so that one is first.
                    let spread = if last == 0 { every_ms } else { every_ms / 8 };
                    let pause = if last == 0 { 0 } else { every_ms };
                    (*of, *at) = (last, now_ms + pause + rand::rng().random_range(0..=spread));
                }
                if now_ms >= *at {
                    *at = 0;
                    next = Some(db);
                }
            }
            let Some(db) = next else { continue };
            let router = self.clone();
            let compared = tokio::task::spawn_blocking(move || {
                router.verify(&db, Speed::Regular).map_err(|why| (db, why))
            });
            if let Ok(Err((db, why))) = compared.await {
                warn!(db = %db, "its rows could not be compared with the peers': {why}");
            }
        }
    }
}
