//! Reading the logs of nodes: what a peer's stream holds after a commit. Invariant: commits are found by their numbers;
//! a place in a stream is only ever a hint, because a stream that was made anew counts from 1 again.

use std::time::Duration;

use async_nats::{Client, Message, StatusCode};
use bytes::Bytes;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::link::{Incoming, LogEnd, LogRequest, Logged};
use super::subjects::Subjects;
use crate::core::message::{Fragment, decode};

/// A server that has a message sends it at once.
const PATIENCE: Duration = Duration::from_secs(3);
/// Messages of one answer; bytes usually end it earlier.
const BATCH: usize = 4_096;
/// How many pieces of one commit are looked at for the next commit's beginning.
const STEPS: usize = 4_096;
/// Readings at once, and those that may wait.
const AT_ONCE: usize = 4;
/// See above.
pub(super) const QUEUE: usize = 64;

/// Reads what is asked for, until nobody can ask any more.
pub(super) async fn run(
    client: Client,
    subjects: Subjects,
    mut requests: mpsc::Receiver<LogRequest>,
    answers: mpsc::Sender<Incoming>,
) {
    let mut running = JoinSet::new();
    while let Some(asked) = requests.recv().await {
        while running.len() >= AT_ONCE {
            running.join_next().await;
        }
        let (client, subjects, answers) = (client.clone(), subjects.clone(), answers.clone());
        running.spawn(async move {
            let reader = Reader::new(&client, &subjects, &asked);
            let (pieces, end) = match reader.read(&asked).await {
                Ok(read) => read,
                Err(why) => (Vec::new(), LogEnd::Gone(why)),
            };
            // Nobody is there any more when this fails.
            drop(answers.send(Incoming::Logged(Logged { asked, pieces, end })).await);
        });
    }
}

/// A message of the stream.
struct Stored {
    sequence: u64,
    /// How many messages of the subject follow.
    left: u64,
    payload: Bytes,
}

struct Reader<'a> {
    client: &'a Client,
    /// Where the stream's messages are asked for.
    api: String,
    subject: String,
}

impl<'a> Reader<'a> {
    fn new(client: &'a Client, subjects: &Subjects, asked: &LogRequest) -> Self {
        Self {
            client,
            api: format!("$JS.API.DIRECT.GET.{}", subjects.stream(&asked.node)),
            subject: subjects.commits_of(&asked.node, &asked.db, asked.site),
        }
    }

    async fn read(&self, asked: &LogRequest) -> Result<(Vec<Bytes>, LogEnd), String> {
        let from = match asked.position {
            Some(position) => position,
            None => match self.locate(asked.after).await? {
                Some(sequence) => sequence,
                None => return Ok((Vec::new(), LogEnd::End)),
            },
        };
        self.batch(from, asked.max_bytes).await
    }

    /// The place of the commit that follows number `after`, `None` if there is none.
    async fn locate(&self, after: u64) -> Result<Option<u64>, String> {
        let Some(last) = self.one(json!({ "last_by_subj": self.subject })).await? else {
            return Err("its log holds nothing of this file".to_owned());
        };
        // The commit that is wanted begins at or after `low`, and the one at `found` is a later one or the wanted.
        let (mut low, mut high) = (1, last.sequence + 1);
        let mut found: Option<(u64, u64)> = None;
        while low < high {
            let middle = low + (high - low) / 2;
            match self.commit_at(middle, high).await? {
                None => high = middle,
                Some((sequence, from, to)) if to > after => {
                    found = Some((sequence, from));
                    high = middle.min(sequence);
                }
                Some((sequence, ..)) => low = sequence.max(middle) + 1,
            }
        }
        match found {
            None => Ok(None),
            Some((sequence, from)) if from <= after => Ok(Some(sequence)),
            Some(_) => Err("its log does not reach back that far".to_owned()),
        }
    }

    /// The first commit that begins at or after `sequence`, or the one that the message there is a piece of; `None` if
    /// none begins before `end`. Gives its place and numbers.
    async fn commit_at(&self, sequence: u64, end: u64) -> Result<Option<(u64, u64, u64)>, String> {
        let mut next = sequence;
        for step in 0..STEPS {
            let Some(stored) = self.from(next).await? else { return Ok(None) };
            if stored.sequence >= end {
                return Ok(None);
            }
            let piece: Fragment = decode(&stored.payload).map_err(|e| format!("in its log: {e}"))?;
            if let Some(header) = piece.begins() {
                return Ok(Some((stored.sequence, header.from, header.to)));
            }
            // Usually a commit's pieces are next to each other.
            let first = stored.sequence.saturating_sub(u64::from(piece.index)).max(1);
            if step == 0
                && let Some(stored) = self.from(first).await?
                && let Ok(begin) = decode::<Fragment>(&stored.payload)
                && begin.attempt == piece.attempt
                && let Some(header) = begin.begins()
            {
                return Ok(Some((stored.sequence, header.from, header.to)));
            }
            next = stored.sequence + 1;
        }
        Err("its log has no beginning of a commit within reach".to_owned())
    }

    async fn from(&self, sequence: u64) -> Result<Option<Stored>, String> {
        self.one(json!({ "seq": sequence, "next_by_subj": self.subject })).await
    }

    async fn one(&self, what: Value) -> Result<Option<Stored>, String> {
        let request = self.client.request(self.api.clone(), what.to_string().into());
        let answer = timeout(PATIENCE, request).await.map_err(|_| "its log does not answer".to_owned())?;
        let message = answer.map_err(|_| "nobody answers for its log".to_owned())?;
        stored(message)
    }

    /// Messages from a place on.
    async fn batch(&self, from: u64, max_bytes: usize) -> Result<(Vec<Bytes>, LogEnd), String> {
        let inbox = self.client.new_inbox();
        let mut answers = self.client.subscribe(inbox.clone()).await.map_err(|e| e.to_string())?;
        let what =
            json!({ "seq": from, "next_by_subj": self.subject, "batch": BATCH, "max_bytes": max_bytes });
        let sent = self.client.publish_with_reply(self.api.clone(), inbox, what.to_string().into());
        sent.await.map_err(|e| e.to_string())?;
        let (mut pieces, mut end) = (Vec::new(), LogEnd::End);
        loop {
            let next = timeout(PATIENCE, answers.next()).await;
            let message = next.ok().flatten().ok_or("its log does not answer")?;
            if message.status == Some(StatusCode::NO_RESPONDERS) {
                return Err("nobody answers for its log".to_owned());
            }
            match stored(message)? {
                Some(message) => {
                    end = match message.left {
                        0 => LogEnd::End,
                        _ => LogEnd::More(message.sequence + 1),
                    };
                    pieces.push(message.payload);
                }
                None => return Ok((pieces, end)),
            }
        }
    }
}

/// What a server says of a stored message; `None` if it says that there is none, or no more.
fn stored(message: Message) -> Result<Option<Stored>, String> {
    if let Some(status) = message.status {
        return match status.as_u16() {
            // No more, and none.
            204 | 404 => Ok(None),
            _ => Err(format!("its log says {status}")),
        };
    }
    let headers = message.headers.as_ref();
    let number = |name: &str| headers.and_then(|h| h.get(name)).and_then(|v| v.as_str().parse().ok());
    let sequence = number("Nats-Sequence").ok_or("its log answers without a sequence number")?;
    Ok(Some(Stored { sequence, left: number("Nats-Num-Pending").unwrap_or(0), payload: message.payload }))
}
