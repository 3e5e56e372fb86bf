//! Holes filled from the logs of the nodes that wrote what is missing. Invariant: a log is one more way for commits to
//! arrive, and nothing depends on it: what it does not have, or not in time, is fetched from a peer's rows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::assemble::Assembler;
use super::engine::{Action, Engine};
use super::review::node_of;
use super::{ReplicaError, Result};
use crate::core::message::{Fragment, decode};
use crate::core::names::NodeName;
use crate::core::version::SiteId;
use crate::fabric::link::{LogEnd, LogRequest, Logged};

/// How long an answer may take.
const ANSWER_MS: u64 = 10_000;
/// How long a log that did not have what was missing is left alone.
const PAUSE_MS: u64 = 30_000;
/// How much is read at once: little for a single lost message, more when there is more.
const FIRST_BYTES: usize = 256 * 1024;
const MOST_BYTES: usize = 4 * 1024 * 1024;
/// What a feed may have waiting before its log is read further.
const AHEAD_BYTES: u64 = 16 * 1024 * 1024;

/// What is known of the logs.
pub(super) struct LogReading {
    /// What was asked for and is not answered, and when.
    asked: Option<(LogRequest, u64)>,
    /// Where to go on, and with how much.
    next: BTreeMap<SiteId, (u64, usize)>,
    /// Logs that do not help, and until when they are left alone.
    useless: BTreeMap<SiteId, u64>,
    assembler: Assembler,
}

impl LogReading {
    pub(super) fn new(spool_dir: &Path) -> Self {
        Self {
            asked: None,
            next: BTreeMap::new(),
            useless: BTreeMap::new(),
            assembler: Assembler::new(spool_dir),
        }
    }

    pub(super) fn is_reading(&self) -> bool {
        self.asked.is_some()
    }

    /// Gives up what is not answered, and forgets what is not needed any more.
    pub(super) fn expire(&mut self, missing: &BTreeSet<SiteId>, now_ms: u64) {
        self.next.retain(|site, _| missing.contains(site));
        self.useless.retain(|_, until_ms| now_ms < *until_ms);
        if let Some((asked, _)) = self.asked.take_if(|(_, at)| now_ms >= *at + ANSWER_MS) {
            self.leave(SiteId(asked.site), now_ms);
        }
    }

    /// This log does not help, for a while.
    pub(super) fn leave(&mut self, site: SiteId, now_ms: u64) {
        self.next.remove(&site);
        self.useless.insert(site, now_ms + PAUSE_MS);
    }
}

impl Engine {
    /// Reads logs for what is missing of these sites' feeds. Returns whether logs are enough: then nothing else is to be
    /// done about it now.
    pub(super) fn reads_logs(&mut self, missing: &BTreeSet<SiteId>, now_ms: u64) -> Result<bool> {
        if self.logs.is_reading() {
            return Ok(true);
        }
        let mut readable = Vec::new();
        for site in missing {
            let Some(node) = self.log_of(*site)? else { return Ok(false) };
            readable.push((self.store.head().vector.0.get(site).map(|p| p.hlc), *site, node));
        }
        // What is oldest first: the others' commits have probably seen it.
        readable.sort();
        let is_due =
            |(.., site, _): &&(_, SiteId, _)| self.feeds.get(site).is_none_or(|f| f.bytes < AHEAD_BYTES);
        if let Some((_, site, node)) = readable.iter().find(is_due) {
            self.read_log(*site, node.clone(), now_ms);
        }
        Ok(true)
    }

    /// The live node whose log may hold what is missing of a site's feed.
    fn log_of(&self, site: SiteId) -> Result<Option<NodeName>> {
        if self.logs.useless.contains_key(&site) || self.feeds.get(&site).is_some_and(|f| f.stopped.is_some())
        {
            return Ok(None);
        }
        if let Some((node, _)) = self.peers.iter().find(|(_, p)| p.holding.site == site) {
            return Ok(Some(node.clone()));
        }
        let node = node_of(&self.store.conn, site)?.and_then(|name| name.parse().ok());
        Ok(node.filter(|node| self.peers.contains_key(node)))
    }

    fn read_log(&mut self, site: SiteId, node: NodeName, now_ms: u64) {
        self.next_request += 1;
        self.catches_up("log", &node, now_ms);
        let next = self.logs.next.get(&site);
        let asked = LogRequest {
            node,
            db: self.db.clone(),
            site: site.0,
            after: self.store.head().vector.n(site),
            position: next.map(|(position, _)| *position),
            max_bytes: next.map_or(FIRST_BYTES, |(_, bytes)| *bytes),
            request: self.next_request,
        };
        self.actions.push(Action::ReadLog(asked.clone()));
        self.logs.asked = Some((asked, now_ms));
    }

    /// Takes what was read of a log.
    pub fn on_logged(&mut self, logged: &Logged, now_ms: u64) -> Result<()> {
        let asked = match &self.logs.asked {
            Some((asked, _)) if *asked == logged.asked => asked.clone(),
            _ => return Ok(()),
        };
        self.logs.asked = None;
        let site = SiteId(asked.site);
        if asked.position.is_none() {
            self.logs.assembler.forget(site);
        }
        for payload in &logged.pieces {
            let pushed = match decode::<Fragment>(payload) {
                Ok(piece) => self.logs.assembler.push(site, &piece),
                Err(e) => Err(e.into()),
            };
            match pushed {
                Ok(Some(commit)) => self.add_pending(commit),
                Ok(None) => {}
                Err(ReplicaError::Wire(e)) => {
                    let what = format!("a commit in the log of {}: {e}", self.site_name(site));
                    self.refuse(&what);
                    self.logs.leave(site, now_ms);
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
        self.counters.logged_pieces += logged.pieces.len() as u64;
        self.caught_up(logged.pieces.iter().map(bytes::Bytes::len).sum());
        match &logged.end {
            LogEnd::More(position) if !logged.pieces.is_empty() => {
                let bytes = (asked.max_bytes * 2).min(MOST_BYTES);
                self.logs.next.insert(site, (*position, bytes));
            }
            LogEnd::More(_) | LogEnd::End | LogEnd::Gone(_) => self.logs.leave(site, now_ms),
        }
        Ok(())
    }
}
