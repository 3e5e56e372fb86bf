//! This node's JetStream stream: the log of its own commits. Invariant: nothing ever waits for it; it is made when
//! the cluster lets it, and what it takes is only counted.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::conf::placement_tag;
use super::subjects;
use crate::core::names::NodeName;

/// A stream of that name exists and is not configured so.
const NAME_IN_USE: u64 = 10058;
/// The least a server takes.
const DUPLICATE_WINDOW_NS: u64 = 100_000_000;
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(30);
/// Without a leader nobody answers at all, and asking again once there is one is what helps.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);
/// Somebody may delete the stream: it is looked after.
const LOOK_AFTER: Duration = Duration::from_secs(300);
/// How often to look whether it answers, and how long an answer may take before it is asked.
const GLANCE: Duration = Duration::from_secs(1);
const OVERDUE: Duration = Duration::from_secs(5);
const PROBE_PATIENCE: Duration = Duration::from_secs(5);
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
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { max_bytes: 1024 * 1024 * 1024, max_age: Duration::from_secs(72 * 3600) }
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
}

impl LogCounters {
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
        }
    }
}

/// Makes the stream, tries until it succeeds, and looks after it from then on. Ends when it is aborted.
pub(super) async fn keep(
    client: async_nats::Client,
    node: NodeName,
    limits: LogLimits,
    state_dir: PathBuf,
    counters: Arc<LogCounters>,
) {
    let mut delay = FIRST_RETRY;
    loop {
        match ensure(&client, &node, limits).await {
            Ok(()) => {
                if !counters.exists.swap(true, Ordering::Relaxed) {
                    info!(%node, "the log's stream is there");
                }
                delay = FIRST_RETRY;
                watch(&client, &node, &state_dir, &counters).await;
            }
            Err(reason) => {
                debug!(%node, reason, "the log's stream is not there yet");
                counters.failed(reason);
                sleep(delay).await;
                delay = (delay * 2).min(LAST_RETRY);
            }
        }
    }
}

/// Watches whether the stream answers, and removes it if it cannot write any more, until it is time to look after it. A
/// server whose disk was full never writes to the stream again; a new one it does write to. What the old one held
/// peers find in the rows, as they would have to for what it missed.
async fn watch(client: &async_nats::Client, node: &NodeName, state_dir: &Path, counters: &LogCounters) {
    let began = Instant::now();
    let (mut awaited, mut since) = (counters.awaited.load(Ordering::Relaxed), Instant::now());
    while began.elapsed() < LOOK_AFTER {
        sleep(GLANCE).await;
        let sent = counters.awaited.load(Ordering::Relaxed);
        if counters.answered.load(Ordering::Relaxed) >= awaited {
            (awaited, since) = (sent, Instant::now());
        } else if since.elapsed() >= OVERDUE {
            since = Instant::now();
            if takes_messages(client, node).await {
                // It answers in order: what it did not answer to was lost on the way, or not written.
                counters.answered.fetch_max(sent, Ordering::Relaxed);
            } else if has_room(state_dir) && remove(client, node).await {
                warn!(%node, "the log's stream could not be written any more: it is made anew");
                counters.exists.store(false, Ordering::Relaxed);
                counters.answered.fetch_max(sent, Ordering::Relaxed);
                return;
            }
        }
    }
}

/// Whether the stream stores a message; one that is nobody's.
async fn takes_messages(client: &async_nats::Client, node: &NodeName) -> bool {
    let asked = timeout(PROBE_PATIENCE, client.request(subjects::probe(node), "".into())).await;
    matches!(asked, Ok(Ok(answer)) if error_of(&answer).is_none())
}

async fn remove(client: &async_nats::Client, node: &NodeName) -> bool {
    let request = client.request(format!("$JS.API.STREAM.DELETE.{}", stream_name(node)), "".into());
    matches!(timeout(PROBE_PATIENCE, request).await, Ok(Ok(answer)) if error_of(&answer).is_none())
}

fn has_room(state_dir: &Path) -> bool {
    rustix::fs::statvfs(state_dir).is_ok_and(|d| d.f_bavail.saturating_mul(d.f_frsize) >= ROOM_BYTES)
}

/// The name of a node's stream.
pub fn stream_name(node: &NodeName) -> String {
    format!("LM_{node}")
}

fn stream_config(node: &NodeName, limits: LogLimits) -> Value {
    json!({
        "name": stream_name(node),
        "subjects": [format!("lm.c.{node}.>")],
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "compression": "s2",
        "num_replicas": 1,
        "max_bytes": limits.max_bytes,
        "max_age": u64::try_from(limits.max_age.as_nanos()).unwrap_or(u64::MAX),
        // Nothing carries a message id; but a server that starts reads all that is younger than this.
        "duplicate_window": DUPLICATE_WINDOW_NS,
        "max_consumers": -1,
        "max_msgs": -1,
        "allow_direct": true,
        // A mirror elsewhere must not answer for what is at its origin.
        "mirror_direct": false,
        "placement": { "tags": [placement_tag(node.as_str())] },
    })
}

async fn ensure(client: &async_nats::Client, node: &NodeName, limits: LogLimits) -> Result<(), String> {
    let name = stream_name(node);
    let config = stream_config(node, limits).to_string();
    let ask = async |verb: &str| {
        let request = client.request(format!("$JS.API.STREAM.{verb}.{name}"), config.clone().into());
        match timeout(ANSWER_PATIENCE, request).await {
            Ok(answer) => answer.map_err(|e| e.to_string()),
            Err(_) => Err("nobody answers: the cluster has no leader".to_owned()),
        }
    };
    let created = ask("CREATE").await?;
    match error_of(&created) {
        None => Ok(()),
        Some((NAME_IN_USE, _)) => {
            let updated = ask("UPDATE").await?;
            error_of(&updated).map_or(Ok(()), |(_, reason)| Err(reason))
        }
        Some((_, reason)) => Err(reason),
    }
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
