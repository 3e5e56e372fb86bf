//! This node's JetStream stream: the log of its own commits. Invariant: nothing ever waits for it; it is made when
//! the cluster lets it, and what it takes is only counted.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tracing::{debug, info};

use super::conf::placement_tag;
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
                sleep(LOOK_AFTER).await;
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
