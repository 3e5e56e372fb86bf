//! This node's JetStream stream: the log of its own commits. Invariant: nothing ever waits for it; it is made when
//! the cluster lets it, and what it takes is only counted.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::hello::Roster;
use super::log_copies::{LogCopies, LogReplicas, Seen, Step, Wanted, at_home, next_step, place};
use super::monitor;
use super::subjects::{STREAMS, Subjects};
use crate::core::names::NodeName;

/// There is no such stream.
const NOT_FOUND: u64 = 10059;
/// The least a server takes.
const DUPLICATE_WINDOW_NS: u64 = 100_000_000;
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(4);
/// Without a leader nobody answers at all, and asking again once there is one is what helps.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);
/// Somebody may delete the stream: it is looked after.
const LOOK_AFTER: Duration = Duration::from_secs(300);
/// How often to look whether it answers, and how long an answer may take before it is asked.
const GLANCE: Duration = Duration::from_secs(1);
const OVERDUE: Duration = Duration::from_secs(5);
const PROBE_PATIENCE: Duration = Duration::from_secs(5);
/// A log with copies elsewhere may wait for these.
const OVERDUE_COPIED: Duration = Duration::from_secs(30);
/// So many times nothing is to be done and copies are missing: then their places are given out anew.
const SHORT_TIMES: u32 = 30;
/// How often to look where the copies are, while they move and when they do not.
const TEND: Duration = Duration::from_secs(1);
const TEND_SETTLED: Duration = Duration::from_secs(10);
/// With less there is no sense in a new stream.
const ROOM_BYTES: u64 = 16 * 1024 * 1024;

/// How answers are addressed to messages that are sent before the stream is known to be there; else it is a number.
const UNAWAITED: &str = "unawaited";

/// How much a log keeps.
#[derive(Debug, Clone, Copy)]
pub struct LogLimits {
    /// The most it takes on disk.
    pub max_bytes: u64,
    /// The longest it keeps a commit.
    pub max_age: Duration,
    /// How many copies of it there are.
    pub replicas: LogReplicas,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self {
            max_bytes: 1024 * 1024 * 1024,
            max_age: Duration::from_secs(72 * 3600),
            replicas: LogReplicas::Auto,
        }
    }
}

/// What is known of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogState {
    /// The stream exists.
    pub exists: bool,
    /// Messages sent to it since this process started.
    pub published: u64,
    /// Of them, those that it said it has.
    pub acked: u64,
    /// Of them, those that it refused.
    pub refused: u64,
    /// Of them, those that it has yet to answer. What was sent before it was known to be there may never be
    /// answered, and is not awaited: peers have it all the same. A stream answers in order, and says nothing of what
    /// it could not write: once it answers to a later one, those before are not awaited any more.
    pub awaited: u64,
    /// Why it was last not made, or refused a message.
    pub last_error: Option<String>,
    /// Where its copies are; empty until that is known.
    pub copies: LogCopies,
    /// How many logs this node's server leads, and of how many it has a copy.
    pub leads: u64,
    /// See above.
    pub holds: u64,
}

impl LogState {
    /// Messages that it said nothing of yet.
    pub fn unacked(&self) -> u64 {
        self.awaited
    }
}

/// Counts what happens to the log.
#[derive(Debug, Default)]
pub(super) struct LogCounters {
    exists: AtomicBool,
    published: AtomicU64,
    acked: AtomicU64,
    refused: AtomicU64,
    /// Sent while the stream was known to be there, and the number among these of the last that was answered.
    awaited: AtomicU64,
    answered: AtomicU64,
    last_error: Mutex<Option<String>>,
    /// The node leaves: the stream is not made.
    unwanted: AtomicBool,
    copies: Mutex<LogCopies>,
    leads: AtomicU64,
    holds: AtomicU64,
}

impl LogCounters {
    pub(super) fn set_unwanted(&self, unwanted: bool) {
        self.unwanted.store(unwanted, Ordering::Relaxed);
        self.exists.store(false, Ordering::Relaxed);
    }

    /// Where the answer to a message that is sent now is to go, below the subject for answers.
    pub(super) fn answer_token(&self) -> String {
        if !self.exists.load(Ordering::Relaxed) {
            return UNAWAITED.to_owned();
        }
        (self.awaited.fetch_add(1, Ordering::Relaxed) + 1).to_string()
    }

    pub(super) fn published(&self) {
        self.published.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts the stream's answer to one message.
    pub(super) fn answered(&self, message: &async_nats::Message) {
        if let Some(number) = message.subject.rsplit('.').next().and_then(|token| token.parse().ok()) {
            self.answered.fetch_max(number, Ordering::Relaxed);
        }
        match error_of(message) {
            None => {
                self.acked.fetch_add(1, Ordering::Relaxed);
                // A lone survivor's stream takes messages though nobody answers when it is to be made.
                self.exists.store(true, Ordering::Relaxed);
            }
            Some((_, reason)) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                self.failed(reason);
            }
        }
    }

    fn failed(&self, reason: String) {
        *self.last_error.lock().expect("nothing panics while it is held") = Some(reason);
    }

    pub(super) fn state(&self) -> LogState {
        LogState {
            exists: self.exists.load(Ordering::Relaxed),
            published: self.published.load(Ordering::Relaxed),
            acked: self.acked.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            awaited: self
                .awaited
                .load(Ordering::Relaxed)
                .saturating_sub(self.answered.load(Ordering::Relaxed)),
            last_error: self.last_error.lock().expect("nothing panics while it is held").clone(),
            copies: self.copies.lock().expect("nothing panics while it is held").clone(),
            leads: self.leads.load(Ordering::Relaxed),
            holds: self.holds.load(Ordering::Relaxed),
        }
    }
}

/// Makes the stream, tries until it succeeds, and looks after it from then on.
pub(super) struct Keeper {
    pub(super) client: async_nats::Client,
    pub(super) node: NodeName,
    pub(super) limits: LogLimits,
    pub(super) state_dir: PathBuf,
    pub(super) counters: Arc<LogCounters>,
    pub(super) roster: Arc<Roster>,
    pub(super) subjects: Subjects,
    /// Where our own server tells what it holds; none where the servers are not ours to place anything on.
    pub(super) monitor: Option<SocketAddr>,
}

impl Keeper {
    /// Ends when it is aborted.
    pub(super) async fn run(self) {
        let Self { node, counters, .. } = &self;
        let (mut delay, mut told) = (FIRST_RETRY, false);
        loop {
            if counters.unwanted.load(Ordering::Relaxed) {
                sleep(GLANCE).await;
                continue;
            }
            match self.ensure().await {
                Ok(()) => {
                    if !counters.exists.swap(true, Ordering::Relaxed) {
                        info!(%node, "the log's stream is there");
                    }
                    (delay, told) = (FIRST_RETRY, false);
                    self.watch().await;
                }
                Err(reason) => {
                    debug!(%node, reason, "the log's stream is not there yet");
                    // What our own servers lack comes by itself; what another system's lack is its operator's to give.
                    if self.monitor.is_none() && self.is_connected() && delay == LAST_RETRY && !told {
                        told = true;
                        warn!(
                            "this node has no log in JetStream ({reason}): commits are sent live, and what a node misses it \
                             fetches from the others' rows; it is tried again"
                        );
                    }
                    counters.failed(reason);
                    sleep(delay).await;
                    delay = (delay * 2).min(LAST_RETRY);
                }
            }
        }
    }

    /// Watches whether the stream answers and where its copies are, and removes it if it cannot write any more, until it is
    /// time to look after it. A server whose disk was full never writes to the stream again; a new one it does write to.
    /// What the old one held peers find in the rows, as they would have to for what it missed.
    async fn watch(&self) {
        let Self { node, counters, .. } = self;
        let began = Instant::now();
        let (mut awaited, mut since) = (counters.awaited.load(Ordering::Relaxed), Instant::now());
        let (mut tend_at, mut members, mut short) = (Instant::now(), Vec::new(), 0);
        while began.elapsed() < LOOK_AFTER && !counters.unwanted.load(Ordering::Relaxed) {
            sleep(GLANCE).await;
            let known = self.roster.names();
            if Instant::now() >= tend_at || known != members {
                let settled = self.tend(&known, &mut short).await;
                tend_at = Instant::now() + if settled { TEND_SETTLED } else { TEND };
                members = known;
            }
            let sent = counters.awaited.load(Ordering::Relaxed);
            let is_copied = counters.copies.lock().expect("nothing panics while it is held").copies.len() > 1;
            let overdue = if is_copied { OVERDUE_COPIED } else { OVERDUE };
            if counters.answered.load(Ordering::Relaxed) >= awaited {
                (awaited, since) = (sent, Instant::now());
            } else if since.elapsed() >= overdue {
                since = Instant::now();
                if self.takes_messages().await {
                    // It answers in order: what it did not answer to was lost on the way, or not written.
                    counters.answered.fetch_max(sent, Ordering::Relaxed);
                } else if self.monitor.is_none() {
                    // A disk that is not ours: its operator makes room, or the system is away. A stream that is gone is made
                    // anew.
                    if self.is_connected() && matches!(self.look().await, Ok(None)) {
                        counters.exists.store(false, Ordering::Relaxed);
                        return;
                    }
                } else if has_room(&self.state_dir) && self.remove().await {
                    warn!(%node, "the log's stream could not be written any more: it is made anew");
                    counters.exists.store(false, Ordering::Relaxed);
                    counters.answered.fetch_max(sent, Ordering::Relaxed);
                    return;
                }
            }
        }
    }

    /// Takes one step towards where the copies should be; whether they are there.
    async fn tend(&self, members: &[NodeName], short: &mut u32) -> bool {
        let Self { node, counters, .. } = self;
        let Some(monitor) = self.monitor else {
            if let Ok(Some(seen)) = self.look().await {
                *counters.copies.lock().expect("nothing panics while it is held") = LogCopies::as_seen(&seen);
            }
            return true;
        };
        if let Ok(hosted) = monitor::hosted(monitor).await {
            let logs: Vec<_> = hosted.iter().filter(|s| s.name.starts_with(STREAMS)).collect();
            let led = logs.iter().filter(|s| s.leader.as_deref() == Some(node.as_str())).count();
            counters.leads.store(led as u64, Ordering::Relaxed);
            counters.holds.store(logs.len() as u64, Ordering::Relaxed);
        }
        let Ok(Some(seen)) = self.look().await else { return false };
        let wanted = Wanted::of(node, members, self.limits.replicas);
        let mut step = next_step(node, &wanted, &seen);
        *short = if step == Step::Wait && seen.is_short() { *short + 1 } else { 0 };
        if *short > SHORT_TIMES {
            // A copy that was taken away stays away until the stream is placed anew, which the next step does.
            (*short, step) = (0, Step::Update(seen.replicas, Vec::new()));
        }
        let told = LogCopies::describe(&wanted, &seen, &step);
        let before = std::mem::replace(
            &mut *counters.copies.lock().expect("nothing panics while it is held"),
            told.clone(),
        );
        if before.moving && !told.moving {
            info!(%node, copies = told.copies.join(", "), "the log's copies are where they should be");
        }
        let done = match &step {
            Step::Settled => return true,
            Step::Wait => Ok(()),
            Step::Update(replicas, tags) => self.update(*replicas, tags).await,
            Step::Lead => {
                let request = json!({ "placement": { "preferred": node.as_str() } });
                self.ask("STREAM.LEADER.STEPDOWN", &request).await.and_then(refused)
            }
        };
        debug!(%node, ?step, ?done, "the log's copies");
        if let Err(why) = done {
            counters.failed(why);
        }
        false
    }

    async fn ask(&self, verb: &str, request: &Value) -> Result<async_nats::Message, String> {
        let subject = format!("$JS.API.{verb}.{}", self.subjects.stream(&self.node));
        match timeout(ANSWER_PATIENCE, self.client.request(subject, request.to_string().into())).await {
            Ok(answer) => answer.map_err(|e| e.to_string()),
            Err(_) if self.monitor.is_none() => Err("JetStream does not answer".to_owned()),
            Err(_) => Err("nobody answers: the cluster has no leader".to_owned()),
        }
    }

    /// The stream as it is; `None` if there is none.
    async fn look(&self) -> Result<Option<Seen>, String> {
        let answer = self.ask("STREAM.INFO", &json!({})).await?;
        match error_of(&answer) {
            Some((NOT_FOUND, _)) => Ok(None),
            Some((_, reason)) => Err(reason),
            None => Ok(Some(Seen::read(&serde_json::from_slice(&answer.payload).unwrap_or_default()))),
        }
    }

    async fn update(&self, replicas: usize, tags: &[String]) -> Result<(), String> {
        let mut config = self.config();
        place(&mut config, replicas, tags);
        refused(self.ask("STREAM.UPDATE", &config).await?)
    }

    async fn ensure(&self) -> Result<(), String> {
        let is_ours = self.monitor.is_some();
        let elsewhere = if self.limits.replicas == LogReplicas::Three { 3 } else { 1 };
        if let Some(seen) = self.look().await? {
            let replicas = if is_ours { seen.replicas } else { elsewhere };
            return self.update(replicas, &seen.tags).await;
        }
        let mut config = self.config();
        match is_ours {
            true => place(&mut config, 1, &at_home(&self.node)),
            // Its servers have no tags of ours: it places the stream as it does any.
            false => place(&mut config, elsewhere, &[]),
        }
        refused(self.ask("STREAM.CREATE", &config).await?)
    }

    fn is_connected(&self) -> bool {
        self.client.connection_state() == async_nats::connection::State::Connected
    }

    /// Whether the stream stores a message; one that is nobody's.
    async fn takes_messages(&self) -> bool {
        let asked = self.client.request(self.subjects.probe(&self.node), "".into());
        matches!(timeout(PROBE_PATIENCE, asked).await, Ok(Ok(answer)) if error_of(&answer).is_none())
    }

    async fn remove(&self) -> bool {
        let subject = format!("$JS.API.STREAM.DELETE.{}", self.subjects.stream(&self.node));
        let request = self.client.request(subject, "".into());
        matches!(timeout(PROBE_PATIENCE, request).await, Ok(Ok(answer)) if error_of(&answer).is_none())
    }

    fn config(&self) -> Value {
        let Self { node, limits, subjects, .. } = self;
        json!({
            "name": subjects.stream(node),
            "subjects": [subjects.all_commits_of(node)],
            "retention": "limits",
            "storage": "file",
            "discard": "old",
            "compression": "s2",
            "max_bytes": limits.max_bytes,
            "max_age": u64::try_from(limits.max_age.as_nanos()).unwrap_or(u64::MAX),
            // Nothing carries a message id; but a server that starts reads all that is younger than this.
            "duplicate_window": DUPLICATE_WINDOW_NS,
            "max_consumers": -1,
            "max_msgs": -1,
            "allow_direct": true,
        })
    }
}

fn refused(answer: async_nats::Message) -> Result<(), String> {
    error_of(&answer).map_or(Ok(()), |(_, reason)| Err(reason))
}

fn has_room(state_dir: &Path) -> bool {
    rustix::fs::statvfs(state_dir).is_ok_and(|d| d.f_bavail.saturating_mul(d.f_frsize) >= ROOM_BYTES)
}

/// The name of a node's stream on bundled servers.
pub fn stream_name(node: &NodeName) -> String {
    Subjects::bundled().stream(node)
}

/// The error in an answer of JetStream: its code and text.
fn error_of(message: &async_nats::Message) -> Option<(u64, String)> {
    if let Some(status) = message.status.filter(|status| !status.is_success()) {
        return Some((status.as_u16().into(), format!("status {status}")));
    }
    let Ok(answer) = serde_json::from_slice::<Value>(&message.payload) else {
        return Some((0, "an answer that is not JSON".to_owned()));
    };
    let error = answer.get("error")?;
    let text = error["description"].as_str().unwrap_or("an error without a text");
    Some((error["err_code"].as_u64().unwrap_or_default(), text.to_owned()))
}
