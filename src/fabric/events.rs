//! Changes of rows for the programs of this host. Invariant: `publish` returns without an error only when our own server
//! has read all of it, and every stream that is known to take such changes has said that it has them.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::connection::State;
use bytes::Bytes;
use futures::StreamExt;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};

use super::error::FabricError;
use super::monitor;
use super::subjects::Subjects;
use crate::core::names::{DbName, NodeName};

/// How long a stream may take to answer before all is published again.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);
/// What headers of a change may take.
const HEADROOM_BYTES: usize = 1_024;
/// By this a stream knows a message that it has already.
const ID_HEADER: &str = "Nats-Msg-Id";
/// Any user may ask this of a server; the answer says that everything sent before has been read.
const WHO_AM_I: &str = "$SYS.REQ.USER.INFO";

/// One change.
#[derive(Debug, Clone)]
pub struct Event {
    /// The database.
    pub db: DbName,
    /// The table.
    pub table: String,
    /// `insert`, `update` or `delete`.
    pub op: &'static str,
    /// The same whenever the same change is published.
    pub id: String,
    /// What is told.
    pub body: Bytes,
}

/// What streams have answered.
#[derive(Default)]
pub(super) struct Answers {
    book: Mutex<Book>,
    news: Notify,
}

#[derive(Default)]
struct Book {
    next: u64,
    /// Messages whose answers are of interest, by number: their subjects.
    open: HashMap<u64, String>,
    /// Subjects that some stream takes.
    taken: BTreeSet<String>,
}

impl Answers {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("nothing panics while it is held")
    }

    /// Until it is aborted.
    pub(super) async fn hear(self: Arc<Self>, mut answers: async_nats::Subscriber) {
        while let Some(message) = answers.next().await {
            let number = message.subject.rsplit('.').next().and_then(|token| token.parse::<u64>().ok());
            let stored = serde_json::from_slice::<Value>(&message.payload)
                .is_ok_and(|answer| answer["seq"].is_u64() && answer["error"].is_null());
            if let Some(number) = number.filter(|_| stored) {
                let mut book = self.book();
                if let Some(subject) = book.open.remove(&number) {
                    book.taken.insert(subject);
                }
                drop(book);
                self.news.notify_waiters();
            }
        }
    }
}

/// Publishes changes, for one database after the other or at once.
pub struct Events {
    node: NodeName,
    subjects: Subjects,
    client: async_nats::Client,
    answers: Arc<Answers>,
    /// Tells this run's answers from an earlier one's.
    run: u32,
    /// Where it can be seen who listens; none where listeners are out of sight.
    monitor: Option<SocketAddr>,
}

impl Events {
    pub(super) fn new(
        node: NodeName,
        subjects: Subjects,
        client: async_nats::Client,
        answers: Arc<Answers>,
        monitor: Option<SocketAddr>,
    ) -> Self {
        Self { node, subjects, client, answers, run: rand::random(), monitor }
    }

    /// Whether changes may be wanted by somebody: a program that subscribes now, or a stream that took some before and may
    /// only be away. In doubt they are.
    pub async fn are_wanted(&self) -> bool {
        let Some(monitor) = self.monitor else { return true };
        if !self.answers.book().taken.is_empty() {
            return true;
        }
        let all = self.subjects.all_changes(self.node.as_str());
        let beginning = all.trim_end_matches('>');
        monitor::has_subscriber(monitor, "MESH", beginning).await.unwrap_or(true)
    }

    /// The largest body that can be published now.
    pub fn max_body_bytes(&self) -> usize {
        self.client.max_payload().saturating_sub(HEADROOM_BYTES)
    }

    /// Subjects that some stream takes: whoever publishes to them awaits its answer.
    pub fn taken(&self) -> BTreeSet<String> {
        self.answers.book().taken.clone()
    }

    /// Says which subjects were taken by streams in an earlier run.
    pub fn expect_taken(&self, subjects: impl IntoIterator<Item = String>) {
        self.answers.book().taken.extend(subjects);
    }

    /// No stream is expected to take this any more.
    pub fn give_up(&self, subject: &str) {
        self.answers.book().taken.remove(subject);
    }

    /// Publishes changes in their order. After an error all of them are to be published again.
    pub async fn publish(&self, events: &[Event]) -> Result<(), FabricError> {
        if self.client.connection_state() != State::Connected {
            return Err(FabricError::NotConnected);
        }
        let mut numbers = Vec::with_capacity(events.len());
        for event in events {
            let subject = self.subjects.change(&self.node, &event.db, &event.table, event.op);
            let number = {
                let mut book = self.answers.book();
                book.next += 1;
                let number = book.next;
                book.open.insert(number, subject.clone());
                number
            };
            numbers.push(number);
            let mut headers = HeaderMap::new();
            headers.insert(ID_HEADER, event.id.as_str());
            let reply = self.subjects.answer(&self.node, self.run, number);
            let sending =
                self.client.publish_with_reply_and_headers(subject, reply, headers, event.body.clone());
            timeout(FLUSH_PATIENCE, sending)
                .await
                .map_err(|_| FabricError::Stalled)?
                .map_err(|_| FabricError::NotConnected)?;
        }
        let result = match timeout(FLUSH_PATIENCE, self.client.request(WHO_AM_I, "".into())).await {
            Ok(Ok(_)) => self.answered(&numbers).await,
            Ok(Err(_)) => Err(FabricError::NotConnected),
            Err(_) => Err(FabricError::Stalled),
        };
        // A later answer is of no use: it only says that the subject is taken, which a next one will.
        let mut book = self.answers.book();
        if result.is_err() {
            numbers.iter().for_each(|n| drop(book.open.remove(n)));
        }
        let oldest = numbers.first().copied().unwrap_or(0);
        book.open.retain(|n, _| *n + KEEP_OPEN >= oldest);
        result
    }

    /// Until every message that a stream should have is answered.
    async fn answered(&self, numbers: &[u64]) -> Result<(), FabricError> {
        let until = Instant::now() + ANSWER_PATIENCE;
        loop {
            let news = self.answers.news.notified();
            let unanswered = {
                let book = self.answers.book();
                let subject = |n: &u64| book.open.get(n).filter(|s| book.taken.contains(*s)).cloned();
                numbers.iter().find_map(subject)
            };
            let Some(subject) = unanswered else { return Ok(()) };
            if timeout_at(until, news).await.is_err() {
                return Err(FabricError::Untaken { subject });
            }
        }
    }
}

/// Answers to so many messages before the latest are still heard: the first of a new stream may come late.
const KEEP_OPEN: u64 = 10_000;
