//! Whose turn it is: which commits can be applied now. Invariant: a commit is taken after everything that its writer had
//! seen, but for the bounded wait for a cause whose feed is stopped.

use super::apply::PeerCommit;
use super::dates::dated_ahead;
use super::engine::{Action, Engine, RETRY_MS};
use crate::core::message::CommitHeader;
use crate::core::vector::{Point, Vector};
use crate::core::version::SiteId;

/// How long a commit waits for a cause whose feed is stopped.
const CAUSAL_WAIT_MS: u64 = 10_000;

impl Engine {
    /// Takes out the commits that can be applied now, in an order that is causal.
    pub(super) fn ready(&mut self, now_ms: u64) -> Vec<PeerCommit> {
        let mut vector = self.store.head().vector.clone();
        let mut batch = Vec::new();
        let (mut bytes, mut rows) = (0, 0);
        let most = self.courtesy.batch();
        loop {
            let before = batch.len();
            let sites: Vec<SiteId> = self.feeds.keys().copied().collect();
            for site in sites {
                while batch.len() < most.commits && rows < most.rows && bytes < most.bytes {
                    let Some(commit) = self.next_of(site, &vector, now_ms) else { break };
                    bytes += commit.body.len();
                    rows += commit.header.rows;
                    let CommitHeader { to, hlc, id, .. } = commit.header;
                    vector.raise(site, Point { n: to, hlc, id });
                    batch.push(commit);
                }
            }
            if batch.len() == before {
                return batch;
            }
        }
    }

    /// A commit of another history than the one that is here. Its rows come from a file that has them, and whose site
    /// that is leaves it once it hears of the other history.
    fn refuse_fork(&mut self, site: SiteId, name: &str, n: u64, now_ms: u64) {
        self.refuse(&format!(
            "a commit of {name}: it follows another commit {n} than the one that is here, because a file of site {site} \
             was copied or went back"
        ));
        self.logs.leave(site, now_ms);
    }

    fn next_of(&mut self, site: SiteId, vector: &Vector, now_ms: u64) -> Option<PeerCommit> {
        let stopped: Vec<SiteId> =
            self.feeds.iter().filter(|(_, f)| f.stopped.is_some()).map(|(s, _)| *s).collect();
        let name = self.site_name(site);
        let latest_ms = self.clocks.latest_ms(now_ms, self.store.head().hlc.ms());
        let feed = self.feeds.get_mut(&site)?;
        if feed.stopped.as_ref().is_some_and(|(_, since)| now_ms < since + RETRY_MS) {
            return None;
        }
        let n = vector.n(site);
        while let Some(entry) = feed.pending.first_entry() {
            if entry.get().header.to > n {
                break;
            }
            feed.bytes -= entry.remove().body.len();
        }
        let first = feed.pending.first_key_value().map(|(_, c)| &c.header)?;
        if first.from > n {
            return None;
        }
        let held_id = vector.0.get(&site).map_or(0, |p| p.id);
        if first.from == n && first.prev != held_id {
            let (_, commit) = feed.pending.pop_first()?;
            feed.bytes -= commit.body.len();
            self.refuse_fork(site, &name, n, now_ms);
            return None;
        }
        if first.hlc.ms() > latest_ms {
            let why = dated_ahead(&self.clocks, &name, first.hlc.ms());
            if feed.stopped.is_none() {
                self.actions.push(Action::Warn(format!("{}: the feed of {name} waits: {why}", self.db)));
            }
            feed.stopped = Some((why, now_ms));
            return None;
        }
        let lacks = |held: &Vector| first.seen.iter().find(|(s, n, _)| held.n(*s) < *n).map(|(s, ..)| *s);
        if let Some(cause) = lacks(vector) {
            let since = *feed.waiting_since_ms.get_or_insert(now_ms);
            if !stopped.contains(&cause) || now_ms < since + CAUSAL_WAIT_MS {
                return None;
            }
            self.counters.causal_overruns += 1;
        }
        // A cause that is in the same batch may turn out to be one that still cannot be applied: then it waited all along.
        if lacks(&self.store.head().vector).is_none() {
            feed.waiting_since_ms = None;
        }
        let (_, commit) = feed.pending.pop_first()?;
        feed.bytes -= commit.body.len();
        Some(commit)
    }
}
