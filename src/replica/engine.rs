//! One database's part of the protocol: what to do with what arrives, and when to ask. Invariant: nothing depends on
//! a next message coming; every hole is found by comparing what nodes hold.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

use super::absorb::OwnCommit;
use super::apply::PeerCommit;
use super::assemble::Assembler;
use super::body::Body;
use super::conflict::Retention;
use super::courtesy::Courtesy;
use super::forget::Members;
use super::log_reading::LogReading;
use super::progress::CatchUp;
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::message::{CommitHeader, Fragment, Holding, Message, SyncPage, SyncRequest};
use crate::core::names::{DbName, NodeName};
use crate::core::skew::Judgement;
use crate::core::vector::{Point, Vector};
use crate::core::version::SiteId;
use crate::fabric::link::LogRequest;

/// How far a clock may be ahead of the mesh's before its writes wait, if nothing else is said.
pub const MAX_SKEW_MS: u64 = 60_000;
/// How long a hole may be one because messages are still under way.
const HOLE_GRACE_MS: u64 = 150;
/// How long a peer may take for a page before another is asked.
const PAGE_TIMEOUT_MS: u64 = 10_000;
/// How long to wait after a peer's rows could not be taken in.
pub(super) const RETRY_MS: u64 = 2_000;
/// How often to say what we hold while it changes, and when nothing does.
const ANNOUNCE_MS: u64 = 1_000;
const ANNOUNCE_IDLE_MS: u64 = 20_000;
/// What may wait in memory or spool for its turn, a feed; more is dropped and asked for again.
const PENDING_BYTES: u64 = 64 * 1024 * 1024;
const PENDING_COMMITS: usize = 20_000;
/// And of all feeds together.
const ALL_PENDING_BYTES: u64 = 256 * 1024 * 1024;
/// Feeds of which nothing was ever applied that may wait: a mesh has as many files of a database as it has nodes.
const MAX_UNKNOWN_FEEDS: usize = 1_000;
/// How often to look for conflicts that are to go.
const PRUNE_MS: u64 = 60_000;

/// What the engine wants done.
pub enum Action {
    /// Publish a commit of ours: it is on the disk.
    Publish(OwnCommit),
    /// Tell everybody.
    Broadcast(Message),
    /// Tell one node.
    Send(NodeName, Message),
    /// Read a node's log.
    ReadLog(LogRequest),
    /// Tell the operator.
    Warn(String),
}

/// What arrived of one site's feed and is not applied.
#[derive(Default)]
pub(super) struct Feed {
    /// By the number they start from.
    pub(super) pending: BTreeMap<u64, PeerCommit>,
    pub(super) bytes: u64,
    /// Why it stands still, and since when.
    pub(super) stopped: Option<(String, u64)>,
    /// Whether the schema is why: then what the peer holds by now may fit.
    pub(super) schema_stopped: bool,
    /// Since when its first pending commit cannot be applied.
    pub(super) waiting_since_ms: Option<u64>,
}

/// A peer as this database sees it.
#[derive(Debug, Clone)]
pub struct Peer {
    /// What it said last.
    pub holding: Holding,
    /// When.
    pub heard_ms: u64,
}

/// Rows that are being fetched from a peer.
pub(super) struct Sync {
    peer: NodeName,
    /// The incarnation of its file that was asked: the cursor is in that file's numbers.
    site: SiteId,
    request: SyncRequest,
    pages: Body,
    asked_ms: u64,
}

/// Counters for status and metrics.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Counters {
    /// Commits of ours.
    pub commits_published: u64,
    /// Rows in them.
    pub rows_published: u64,
    /// Commits of peers.
    pub commits_applied: u64,
    /// Times rows were fetched from a peer because of a hole.
    pub peer_syncs: u64,
    /// Pieces of commits that were read from peers' logs because of a hole.
    pub logged_pieces: u64,
    /// Messages that could not be read.
    pub messages_refused: u64,
    /// Commits applied before their cause, because its feed stands still.
    pub causal_overruns: u64,
    /// Conflicts removed because they were too old or too many.
    pub conflicts_pruned: u64,
}

/// The protocol of one database on one node.
pub struct Engine {
    pub(super) db: DbName,
    pub(super) store: Store,
    pub(super) feeds: BTreeMap<SiteId, Feed>,
    assembler: Assembler,
    pub(super) peers: BTreeMap<NodeName, Peer>,
    pub(super) sync: Option<Sync>,
    pub(super) logs: LogReading,
    pub(super) sync_error: Option<(String, u64)>,
    pub(super) hole_since_ms: Option<u64>,
    pub(super) catch_up: Option<CatchUp>,
    announced: (Vector, u64),
    /// Counts on from a random number: an answer has what was left out because its asker had it.
    pub(super) next_request: u64,
    pub(super) counters: Counters,
    pub(super) actions: Vec<Action>,
    pub(super) clocks: Judgement,
    retention: Retention,
    pruned_ms: u64,
    pub(super) members: Members,
    pub(super) courtesy: Courtesy,
}

impl Engine {
    /// The engine of a file that is open.
    pub fn new(db: DbName, store: Store, spool_dir: &Path) -> Self {
        Self {
            db,
            store,
            feeds: BTreeMap::new(),
            assembler: Assembler::new(spool_dir),
            peers: BTreeMap::new(),
            sync: None,
            logs: LogReading::new(spool_dir),
            sync_error: None,
            hole_since_ms: None,
            catch_up: None,
            announced: (Vector::default(), 0),
            // What answers a process of before, or another of this node's name, is none of ours.
            next_request: rand::random::<u64>() >> 1,
            counters: Counters::default(),
            actions: Vec::new(),
            clocks: Judgement::alone(MAX_SKEW_MS),
            retention: Retention::default(),
            pruned_ms: 0,
            members: Members::default(),
            courtesy: Courtesy::default(),
        }
    }

    /// Gives way to programs that write, from now on.
    pub fn give_way(&mut self) {
        self.courtesy.give();
    }

    /// Whether there are programs to give way to: one has written lately.
    pub fn gives_way(&self) -> bool {
        self.courtesy.is_due()
    }

    /// Says how long conflicts are kept.
    pub fn keep_conflicts(&mut self, retention: Retention) {
        self.retention = retention;
    }

    /// The file.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The file, to do something with it that is none of the protocol's business.
    pub fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    /// Peers that replicate this database, as last heard.
    pub fn peers(&self) -> &BTreeMap<NodeName, Peer> {
        &self.peers
    }

    /// Counters since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Commits waiting for their turn.
    pub fn pending(&self) -> usize {
        self.feeds.values().map(|f| f.pending.len()).sum()
    }

    /// Whether what was missed is being fetched.
    pub fn is_syncing(&self) -> bool {
        self.sync.is_some() || self.logs.is_reading()
    }

    /// Why anything stands still, for people.
    pub fn stopped(&self) -> Vec<String> {
        let feeds = self.feeds.iter().filter_map(|(site, f)| Some((site, f.stopped.as_ref()?)));
        let feeds = feeds.map(|(site, (why, _))| format!("feed of {}: {why}", self.site_name(*site)));
        feeds.chain(self.sync_error.iter().map(|(why, _)| why.clone())).collect()
    }

    pub(super) fn site_name(&self, site: SiteId) -> String {
        let node = self.peers.iter().find(|(_, p)| p.holding.site == site);
        node.map_or_else(|| format!("site {site}"), |(name, _)| format!("node {name}"))
    }

    /// What is to be done; empties the list.
    pub fn take_actions(&mut self) -> Vec<Action> {
        let notes = self.store.take_notes();
        self.actions.extend(notes.into_iter().map(Action::Warn));
        std::mem::take(&mut self.actions)
    }

    /// Absorbs what the application wrote.
    pub fn absorb(&mut self) -> Result<()> {
        if self.store.has_news()? {
            let own = self.store.absorb_all()?;
            own.into_iter().for_each(|own| self.publish(Some(own)));
        }
        Ok(())
    }

    /// Absorbs, then says what this file holds: whoever holds the same has everything written here until now.
    pub fn barrier(&mut self) -> Result<Vector> {
        self.absorb()?;
        Ok(self.store.head().vector.clone())
    }

    /// A connection to a state of the file that is wholly absorbed, for a copy.
    pub fn snapshot(&mut self) -> Result<rusqlite::Connection> {
        let (own, reader) = self.store.snapshot()?;
        own.into_iter().for_each(|o| self.publish(Some(o)));
        Ok(reader)
    }

    pub(super) fn publish(&mut self, own: Option<OwnCommit>) {
        if let Some(own) = own {
            self.courtesy.note_write();
            self.counters.commits_published += 1;
            self.counters.rows_published += own.header.rows;
            self.actions.push(Action::Publish(own));
        }
    }

    /// Takes a piece of a peer's commit. [`Engine::settle`] applies what is whole.
    pub fn on_fragment(&mut self, site: SiteId, piece: &Fragment) -> Result<()> {
        if site == self.store.head().site {
            return Ok(());
        }
        match self.assembler.push(site, piece) {
            Ok(Some(commit)) => self.add_pending(commit),
            Ok(None) => {}
            Err(ReplicaError::Wire(e)) => self.refuse(&format!("a commit of {}: {e}", self.site_name(site))),
            Err(e) => return Err(e),
        }
        Ok(())
    }

    pub(super) fn refuse(&mut self, what: &str) {
        self.counters.messages_refused += 1;
        if self.counters.messages_refused.is_power_of_two() {
            self.actions.push(Action::Warn(format!("refused {what}")));
        }
    }

    pub(super) fn add_pending(&mut self, commit: PeerCommit) {
        if commit.header.to <= self.store.head().vector.n(commit.site) {
            return;
        }
        let size = commit.body.len();
        if !self.feeds.contains_key(&commit.site) && self.feeds.len() >= MAX_UNKNOWN_FEEDS {
            let vector = &self.store.head().vector;
            self.feeds.retain(|site, _| vector.n(*site) > 0);
        }
        let all: u64 = self.feeds.values().map(|f| f.bytes).sum();
        let feed = self.feeds.entry(commit.site).or_default();
        // Whose turn it is finds room however much waits for something else.
        let is_next = commit.header.from <= self.store.head().vector.n(commit.site);
        let is_much = feed.bytes + size > PENDING_BYTES || feed.pending.len() >= PENDING_COMMITS;
        if is_much || !is_next && all + size > ALL_PENDING_BYTES {
            return;
        }
        feed.bytes += commit.body.len();
        if let Some(old) = feed.pending.insert(commit.header.from, commit) {
            feed.bytes -= old.body.len();
        }
    }

    /// Takes any other message about this database.
    pub fn on_message(&mut self, from: &NodeName, message: Message, now_ms: u64) -> Result<()> {
        match message {
            Message::Holding(holding) => self.on_holding(from, holding, now_ms),
            Message::Ask { .. } => {
                self.absorb()?;
                let holding = self.store.holding(&self.db, false);
                self.actions.push(Action::Send(from.clone(), Message::Holding(holding)));
                Ok(())
            }
            Message::SyncRequest(ask) => self.on_sync_request(from, &ask),
            Message::SyncPage(page) => self.on_sync_page(from, page, now_ms),
            Message::Refused { request, why } => {
                if self.sync.as_ref().is_some_and(|s| s.request.request == request && s.peer == *from) {
                    self.sync = None;
                    self.sync_error = Some((format!("node {from} refused to send rows: {why}"), now_ms));
                }
                Ok(())
            }
            Message::Bye => {
                self.peers.remove(from);
                Ok(())
            }
            Message::Hello(_) | Message::CopyRequest(_) | Message::CopyPart(_) | Message::Verify(_) => Ok(()),
        }
    }

    fn on_holding(&mut self, from: &NodeName, holding: Holding, now_ms: u64) -> Result<()> {
        let head = self.store.head();
        if holding.lineage != head.lineage {
            let what = format!(
                "what node {from} says of database {}: its file is another database of the same name; detach one of them, \
                 or give it another name",
                self.db
            );
            self.refuse(&what);
            return Ok(());
        }
        self.check_own_feed(from, &holding, now_ms)?;
        let head = self.store.head();
        if let Some(site) = head.vector.fork_with(&holding.vector) {
            let what = format!(
                "node {from} has another history of site {site}: a file of it was copied or went back"
            );
            self.refuse(&what);
        }
        self.drop_redated(&holding.vector);
        if holding.answer {
            let ours = self.store.holding(&self.db, false);
            self.actions.push(Action::Send(from.clone(), Message::Holding(ours)));
        }
        self.store.note_peer(&holding)?;
        self.store.name_site(holding.site, from.as_str())?;
        self.hear_member(from, &holding, now_ms);
        self.peers.insert(from.clone(), Peer { holding, heard_ms: now_ms });
        Ok(())
    }

    fn on_sync_request(&mut self, from: &NodeName, ask: &SyncRequest) -> Result<()> {
        let request = ask.request;
        if ask.lineage != self.store.head().lineage {
            let why = "this node's file is another database of the same name".to_owned();
            self.actions.push(Action::Send(from.clone(), Message::Refused { request, why }));
            return Ok(());
        }
        if let Err(why) = self.may_ask(ask) {
            self.actions.push(Action::Send(from.clone(), Message::Refused { request, why }));
            return Ok(());
        }
        let (own, page) = self.store.page(&self.db, ask)?;
        self.publish(own);
        self.actions.push(Action::Send(from.clone(), Message::SyncPage(page)));
        Ok(())
    }

    fn on_sync_page(&mut self, from: &NodeName, page: SyncPage, now_ms: u64) -> Result<()> {
        let Some(sync) = self.sync.as_mut() else { return Ok(()) };
        if sync.request.request != page.request || sync.peer != *from {
            return Ok(());
        }
        if page.site != sync.site {
            // Its file was restored in the meantime: what it sent starts from a number of the file that was there.
            self.sync = None;
            return Ok(());
        }
        if page.complete.is_none() && page.next_lsn <= sync.request.after_lsn {
            // It would never come to an end.
            self.sync = None;
            self.stop_sync(format!("node {from} sends a page of rows that leads nowhere"), now_ms);
            return Ok(());
        }
        for frame in &page.frames {
            if let Err(e) = sync.pages.append_block(frame) {
                // Meanwhile others need the room that it took.
                self.sync = None;
                let why = ReplicaError::from(e);
                self.stop_sync(format!("rows of node {from} cannot be taken in: {why}"), now_ms);
                return Ok(());
            }
        }
        sync.asked_ms = now_ms;
        let Some(held) = page.complete else {
            self.next_request += 1;
            sync.request.request = self.next_request;
            sync.request.after_lsn = page.next_lsn;
            let ask = Message::SyncRequest(sync.request.clone());
            self.actions.push(Action::Send(from.clone(), ask));
            self.caught_up(page.frames.iter().map(bytes::Bytes::len).sum());
            return Ok(());
        };
        let Some(mut sync) = self.sync.take() else { return Ok(()) };
        if let Some(why) = self.too_far_ahead(&held, now_ms) {
            self.stop_sync(format!("rows of node {from} wait: {why}"), now_ms);
            return Ok(());
        }
        match self.store.take_over(page.site, page.next_lsn as i64, &mut sync.pages, &held) {
            Ok(own) => {
                self.took_over(own);
                Ok(())
            }
            Err(e) if e.is_passing() => Err(e),
            Err(e) => {
                self.stop_sync(format!("rows of node {from} cannot be taken in: {e}"), now_ms);
                Ok(())
            }
        }
    }

    pub(super) fn stop_sync(&mut self, why: String, now_ms: u64) {
        if self.sync_error.as_ref().is_none_or(|(old, _)| *old != why) {
            self.actions.push(Action::Warn(why.clone()));
        }
        self.sync_error = Some((why, now_ms));
    }

    /// Applies everything whose turn has come, absorbs, and asks for what is missing.
    pub fn settle(&mut self, now_ms: u64) -> Result<()> {
        if self.store.closed {
            return Ok(());
        }
        loop {
            let mut batch = self.ready(now_ms);
            if batch.is_empty() {
                break;
            }
            let started = Instant::now();
            let applied = match self.store.apply(&mut batch) {
                Ok(applied) => applied,
                Err(e) => {
                    batch.into_iter().for_each(|c| self.add_pending(c));
                    return Err(e);
                }
            };
            let took = started.elapsed();
            self.publish(applied.own);
            self.counters.commits_applied += applied.count as u64;
            for commit in &batch[..applied.count] {
                if let Some(feed) = self.feeds.get_mut(&commit.site) {
                    feed.stopped = None;
                    feed.schema_stopped = false;
                }
            }
            let mut rest = batch.into_iter().skip(applied.count);
            if let Some(error) = applied.stopped
                && let Some(stopped) = rest.next()
            {
                self.stop_feed(stopped, &error, now_ms);
            }
            rest.for_each(|c| self.add_pending(c));
            self.courtesy.pause(applied.count, took);
        }
        self.absorb()?;
        self.prune(now_ms)?;
        self.forget(now_ms)?;
        self.look_for_holes(now_ms)
    }

    /// Looks now and then whether conflicts are to go.
    fn prune(&mut self, now_ms: u64) -> Result<()> {
        if self.pruned_ms != 0 && now_ms < self.pruned_ms + PRUNE_MS {
            return Ok(());
        }
        self.pruned_ms = now_ms;
        let pruned = self.store.prune(now_ms, self.retention)?;
        self.counters.conflicts_pruned += pruned;
        if pruned > 0 { self.absorb() } else { Ok(()) }
    }

    fn stop_feed(&mut self, commit: PeerCommit, error: &ReplicaError, now_ms: u64) {
        let (site, why) = (commit.site, error.to_string());
        let name = self.site_name(site);
        if let ReplicaError::Wire(why) = error {
            // It never will be applied. If it is a peer's, the hole that it leaves is found and repaired like any other.
            self.refuse(&format!("a commit of {name}: {why}"));
            return;
        }
        self.add_pending(commit);
        let feed = self.feeds.entry(site).or_default();
        if feed.stopped.as_ref().is_none_or(|(old, _)| *old != why) {
            self.actions.push(Action::Warn(format!("{}: the feed of {name} stands still: {why}", self.db)));
        }
        feed.stopped = Some((why, now_ms));
        feed.schema_stopped = error.is_of_schema();
    }

    /// Whether a peer has what is neither here nor on its way.
    fn look_for_holes(&mut self, now_ms: u64) -> Result<()> {
        if let Some(sync) = &self.sync {
            if now_ms < sync.asked_ms + PAGE_TIMEOUT_MS {
                return Ok(());
            }
            let peer = sync.peer.clone();
            self.sync = None;
            self.peers.remove(&peer);
            self.stop_sync(format!("node {peer} does not answer a request for rows"), now_ms);
        }
        if self.sync_error.as_ref().is_some_and(|(_, at)| now_ms < at + RETRY_MS) {
            return Ok(());
        }
        let mut reach = self.store.head().vector.clone();
        for feed in self.feeds.values().filter(|f| f.stopped.is_none()) {
            for commit in feed.pending.values() {
                if commit.header.from <= reach.n(commit.site) {
                    let CommitHeader { to, hlc, id, .. } = commit.header;
                    reach.raise(commit.site, Point { n: to, hlc, id });
                }
            }
        }
        let is_stuck = |f: &Feed| f.stopped.is_some() && !f.schema_stopped;
        let stuck = self.feeds.iter().filter(|(_, f)| is_stuck(f)).map(|(s, _)| *s);
        let stuck: Vec<SiteId> = stuck.collect();
        let is_missing = |(s, point): &(&SiteId, &Point)| reach.n(**s) < point.n && !stuck.contains(s);
        let missing: BTreeSet<SiteId> = (self.peers.values())
            .flat_map(|p| p.holding.vector.0.iter().filter(is_missing).map(|(s, _)| *s))
            .collect();
        self.logs.expire(&missing, now_ms);
        if missing.is_empty() {
            self.members.note_behind(None, now_ms);
            self.hole_since_ms = None;
            self.catch_up = None;
            // What could not be fetched has come by another way.
            self.sync_error = None;
            return Ok(());
        }
        let since = *self.hole_since_ms.get_or_insert(now_ms);
        if now_ms < since + HOLE_GRACE_MS || self.reads_logs(&missing, now_ms)? {
            return Ok(());
        }
        let lacks = |p: &Peer| p.holding.vector.0.iter().any(|entry| is_missing(&entry));
        let lacking: Vec<_> = self.peers.iter().filter(|(_, p)| lacks(p)).collect();
        let vector = &self.store.head().vector;
        let able = lacking.iter().filter(|(_, p)| vector.includes(&p.holding.collected));
        let candidate = able.max_by_key(|(_, p)| p.heard_ms).map(|(n, p)| ((*n).clone(), p.holding.site));
        let unable = lacking.iter().max_by_key(|(_, p)| p.heard_ms).map(|(n, _)| (*n).clone());
        self.members.note_behind(unable.filter(|_| candidate.is_none()), now_ms);
        let Some((name, peer)) = candidate else { return Ok(()) };
        self.start_sync(name, peer, now_ms)
    }

    fn start_sync(&mut self, peer: NodeName, site: SiteId, now_ms: u64) -> Result<()> {
        self.next_request += 1;
        self.catches_up("rows", &peer, now_ms);
        let head = self.store.head();
        let request = SyncRequest {
            db: self.db.clone(),
            lineage: head.lineage,
            request: self.next_request,
            vector: head.vector.clone(),
            after_lsn: self.store.peer_lsn(site)? as u64,
        };
        self.actions.push(Action::Send(peer.clone(), Message::SyncRequest(request.clone())));
        let pages = Body::new(&self.store.spool_dir);
        self.sync = Some(Sync { peer, site, request, pages, asked_ms: now_ms });
        Ok(())
    }

    /// Says what this file holds, when it is time to.
    pub fn announce(&mut self, now_ms: u64) {
        let head = self.store.head();
        let (said, at) = &self.announced;
        let pause = if *said == head.vector { ANNOUNCE_IDLE_MS } else { ANNOUNCE_MS };
        if *at != 0 && now_ms < at + pause {
            return;
        }
        let answer = *at == 0;
        self.announced = (head.vector.clone(), now_ms);
        let holding = self.store.holding(&self.db, answer);
        self.actions.push(Action::Broadcast(Message::Holding(holding)));
    }

    /// A peer has come (back): tells it what this file holds and asks the same of it.
    pub fn greet(&mut self, peer: &NodeName) {
        let holding = self.store.holding(&self.db, true);
        self.actions.push(Action::Send(peer.clone(), Message::Holding(holding)));
    }
}
