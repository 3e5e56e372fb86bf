//! Forgetting: tombstones that every member has applied are removed some time later. Invariant: what was forgotten is
//! covered by `collected`, which is written in the same transaction and only grows; whoever holds less gets no rows from
//! this file, by vector and never by time, and a row that is not here and was born below it was deleted: it is dropped.
//! So who the members are decides only how soon something is forgotten, never whether that is sound.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::Connection;
use serde::{Deserialize, Serialize};

use super::Result;
use super::absorb::OwnCommit;
use super::engine::Engine;
use super::held::Snapshot;
use super::plan::Plan;
use super::store::Store;
use crate::core::capture::{SCHEMA, state_table};
use crate::core::conflict::{Kind, Loss};
use crate::core::merge::Row;
use crate::core::message::{Holding, SyncRequest, decode, encode};
use crate::core::names::NodeName;
use crate::core::sqltext::list;
use crate::core::value::{Value, ValueRef};
use crate::core::vector::Vector;
use crate::core::version::{SiteId, Version};
use crate::sqlite::value::get;

/// How many tombstones one transaction looks at.
const AT_ONCE: i64 = 500;
/// How often to look whether something is to be forgotten, at most.
const LOOK_MS: u64 = 60_000;
/// How long a node that has just started waits for others before it takes them to be away.
const PATIENCE_MS: u64 = 600_000;
/// A member that was away for so many times as long as members may be is no member any more.
const GONE: u64 = 4;
/// How long a node that got a copy may take to say something.
const JOINING_MS: u64 = 3_600_000;
/// How long no peer may have been able to send what is missing before a copy is taken.
const BEHIND_MS: u64 = 3_000;

/// The key of what was forgotten, in the file.
const COLLECTED: &str = "collected_up_to";
/// The key of what all members have, and since when.
const RIPENING: &str = "ripening";

/// How long deletes are remembered.
#[derive(Debug, Clone)]
pub struct Forgetting {
    /// The node's own name.
    pub me: Option<NodeName>,
    /// How long after all members have applied them.
    pub age_ms: u64,
    /// A member that was not heard for so long holds nobody up.
    pub absent_ms: u64,
}

impl Default for Forgetting {
    fn default() -> Self {
        Self { me: None, age_ms: 24 * 3_600_000, absent_ms: 7 * 24 * 3_600_000 }
    }
}

/// Nodes that got a copy: what it held, and when.
pub type Joining = BTreeMap<NodeName, (Vector, u64)>;

/// A node that replicates the database.
#[derive(Debug, Clone, PartialEq)]
struct Member {
    vector: Vector,
    heard_ms: u64,
}

/// What is forgotten next.
#[derive(Serialize, Deserialize)]
struct Ripening {
    /// What all members had.
    bound: Vector,
    /// What any member had then.
    known: Vector,
    since_ms: u64,
}

/// A walk over the tombstones.
struct Walk {
    bound: Vector,
    /// Place of the table, and the lsn up to which it was looked at.
    at: (usize, i64),
}

/// The members, and how far forgetting is.
#[derive(Default)]
pub(super) struct Members {
    rule: Forgetting,
    known: BTreeMap<NodeName, Member>,
    /// As they are in the file.
    saved: BTreeMap<NodeName, Member>,
    started_ms: Option<u64>,
    looked_ms: u64,
    walk: Option<Walk>,
    walked: Option<Vector>,
    collected_rows: u64,
    behind: Option<(NodeName, u64)>,
    /// Nodes that left the mesh for good and were not heard since.
    gone: BTreeSet<NodeName>,
}

impl Members {
    /// Notes that only this peer, or none, has what is missing here and cannot send it.
    pub(super) fn note_behind(&mut self, peer: Option<NodeName>, now_ms: u64) {
        let since_ms = self.behind.as_ref().map_or(now_ms, |(_, since_ms)| *since_ms);
        self.behind = peer.map(|p| (p, since_ms));
    }

    /// What all members have that count, and what any of them has; `None` if too many of them are away to tell.
    fn stable(&self, own: &Vector, joining: &Joining, now_ms: u64) -> Option<(Vector, Vector)> {
        let running_ms = now_ms.saturating_sub(self.started_ms.unwrap_or(now_ms));
        let absent_ms = self.rule.absent_ms;
        let counts = |m: &&Member| {
            now_ms < m.heard_ms.saturating_add(absent_ms) || running_ms < absent_ms.min(PATIENCE_MS)
        };
        let counted: Vec<&Member> = self.known.values().filter(counts).collect();
        // A node that is cut off from most others would forget what they have never heard of.
        if (counted.len() + 1) * 2 < self.known.len() + 1 {
            return None;
        }
        let (mut stable, mut known) = (own.clone(), own.clone());
        for vector in counted.iter().map(|m| &m.vector).chain(joining.values().map(|(v, _)| v)) {
            stable.limit(vector);
            known.merge(vector);
        }
        Some((stable, known))
    }
}

/// What was forgotten in a file.
pub(super) fn load_collected(conn: &Connection) -> Result<Vector> {
    let kept: Option<Vec<u8>> = Store::meta(conn, COLLECTED)?;
    Ok(kept.map_or_else(|| Ok(Vector::default()), |bytes| decode(&bytes))?)
}

impl Engine {
    /// Says how long deletes are remembered.
    pub fn remember(&mut self, rule: Forgetting) {
        self.members.rule = rule;
    }

    /// How many tombstones were forgotten since the start.
    pub fn collected_rows(&self) -> u64 {
        self.members.collected_rows
    }

    /// The members that are known, with the seconds since each was heard.
    pub fn members(&self, now_ms: u64) -> impl Iterator<Item = (&NodeName, u64)> {
        self.members.known.iter().map(move |(n, m)| (n, now_ms.saturating_sub(m.heard_ms) / 1_000))
    }

    /// A peer that has what is missing here and has forgotten deletes that were never heard of here, so that only a copy
    /// of its file helps: no other peer can send what is missing, for some time now.
    pub fn needs_copy(&self, now_ms: u64) -> Option<NodeName> {
        let (peer, since_ms) = self.members.behind.as_ref()?;
        (now_ms >= since_ms + BEHIND_MS).then(|| peer.clone())
    }

    /// A snapshot for a node that joins: from now on it is a member.
    pub fn snapshot_for(&mut self, node: &NodeName, now_ms: u64) -> Result<Snapshot> {
        let (own, snapshot) = self.store_mut().file_snapshot()?;
        own.into_iter().for_each(|o| self.publish(Some(o)));
        self.note_joining(node, now_ms);
        Ok(snapshot)
    }

    /// A node has got all that this file holds now: from now on it is a member.
    pub fn note_joining(&mut self, node: &NodeName, now_ms: u64) {
        let vector = self.store().head().vector.clone();
        let joining = &mut self.store_mut().joining;
        let (kept, since_ms) = joining.entry(node.clone()).or_insert((vector.clone(), now_ms));
        kept.limit(&vector);
        *since_ms = now_ms;
    }

    /// A node left the mesh for good: nobody waits for it any more.
    pub fn forget_member(&mut self, node: &NodeName) {
        self.members.known.remove(node);
        self.members.gone.insert(node.clone());
        self.store_mut().joining.remove(node);
        self.peers.remove(node);
    }

    pub(super) fn hear_member(&mut self, from: &NodeName, holding: &Holding, now_ms: u64) {
        self.store_mut().joining.remove(from);
        self.members.gone.remove(from);
        for (node, vector) in &holding.joining {
            if self.members.rule.me.as_ref() != Some(node) && !self.members.known.contains_key(node) {
                let member = Member { vector: vector.clone(), heard_ms: now_ms };
                self.members.known.insert(node.clone(), member);
            }
        }
        let member = Member { vector: holding.vector.clone(), heard_ms: now_ms };
        self.members.known.insert(from.clone(), member);
    }

    /// Whether a peer may be sent the rows it lacks: it must have applied all deletes that were forgotten here.
    pub(super) fn may_ask(&self, ask: &SyncRequest) -> Result<(), String> {
        if ask.vector.includes(&self.store().head().collected) {
            return Ok(());
        }
        Err("it has forgotten deletes that this node has never heard of: a copy of its file is needed"
            .to_owned())
    }

    /// Looks now and then whether tombstones are to be forgotten; each call takes one short transaction at most.
    pub(super) fn forget(&mut self, now_ms: u64) -> Result<()> {
        if let Some(walk) = self.members.walk.take() {
            return self.walk(walk);
        }
        if self.members.started_ms.is_none() {
            self.members.started_ms = Some(now_ms);
            self.members.saved = self.store().load_members()?;
            for (node, mut member) in self.members.saved.clone() {
                member.heard_ms = member.heard_ms.min(now_ms);
                if !self.members.gone.contains(&node) {
                    self.members.known.entry(node).or_insert(member);
                }
            }
        }
        let every_ms = LOOK_MS.min(self.members.rule.age_ms / 4);
        if now_ms < self.members.looked_ms + every_ms {
            return Ok(());
        }
        self.members.looked_ms = now_ms;
        self.store_mut().joining.retain(|_, (_, since_ms)| now_ms < *since_ms + JOINING_MS);
        self.save_members(now_ms)?;
        let head = self.store().head();
        let Some((stable, known)) = self.members.stable(&head.vector, &self.store().joining, now_ms) else {
            return Ok(());
        };
        let age_ms = self.members.rule.age_ms;
        let Some(Ripening { mut bound, known: known_then, since_ms }) = self.store().ripening()? else {
            return self.store_mut().set_ripening(Ripening { bound: stable, known, since_ms: now_ms });
        };
        // Rows that lost to a deleted one, or to the delete, are in
        // commits that were there when all had the delete: they must be here, and with all others, before it is forgotten.
        if now_ms.saturating_sub(since_ms) < age_ms || !stable.includes(&known_then) {
            return Ok(());
        }
        if bound != stable {
            let next = Ripening { bound: stable.clone(), known, since_ms: now_ms };
            self.store_mut().set_ripening(next)?;
        }
        // Who went back since has less than it had.
        bound.limit(&stable);
        if self.members.walked.as_ref() != Some(&bound) {
            self.members.walked = Some(bound.clone());
            self.members.walk = Some(Walk { bound, at: (0, -1) });
        }
        Ok(())
    }

    fn walk(&mut self, walk: Walk) -> Result<()> {
        let Walk { bound, at } = walk;
        let (own, step) = self.store_mut().forget_some(&bound, at)?;
        own.into_iter().for_each(|own| self.publish(Some(own)));
        self.members.collected_rows += step.forgotten;
        self.members.walk = step.next.map(|at| Walk { bound, at });
        Ok(())
    }

    /// Writes the members down, when they have changed.
    fn save_members(&mut self, now_ms: u64) -> Result<()> {
        let Members { rule, known, saved, .. } = &mut self.members;
        let gone_ms = rule.absent_ms.saturating_mul(GONE);
        known.retain(|node, m| Some(node) != rule.me.as_ref() && now_ms < m.heard_ms.saturating_add(gone_ms));
        // When a member was heard need not be exact.
        let same = |m: &Member, s: &Member| {
            m.vector == s.vector && m.heard_ms.abs_diff(s.heard_ms) < rule.absent_ms / 16
        };
        let is_same = known.len() == saved.len()
            && known.iter().all(|(node, m)| saved.get(node).is_some_and(|s| same(m, s)));
        if is_same {
            return Ok(());
        }
        let now = known.clone();
        self.store_mut().save_members(&now)?;
        self.members.saved = now;
        Ok(())
    }
}

/// What became of some tombstones.
struct Step {
    forgotten: u64,
    /// Where to go on, if it was not the end.
    next: Option<(usize, i64)>,
}

impl Store {
    fn load_members(&self) -> Result<BTreeMap<NodeName, Member>> {
        let sql = "SELECT node, vector, heard_ms FROM __litemesh_member";
        let mut statement = self.conn.prepare_cached(sql)?;
        let mut rows = statement.query([])?;
        let mut members = BTreeMap::new();
        while let Some(row) = rows.next()? {
            let Ok(node) = row.get::<_, String>(0)?.parse::<NodeName>() else { continue };
            let vector = decode(row.get_ref(1)?.as_blob().unwrap_or_default())?;
            members.insert(node, Member { vector, heard_ms: row.get::<_, i64>(2)? as u64 });
        }
        Ok(members)
    }

    fn save_members(&mut self, members: &BTreeMap<NodeName, Member>) -> Result<()> {
        self.write(|store| {
            store.conn.prepare_cached("DELETE FROM __litemesh_member")?.execute([])?;
            let sql = "INSERT INTO __litemesh_member(node, vector, heard_ms) VALUES(?1, ?2, ?3)";
            for (node, member) in members {
                let vector = encode(&member.vector).to_vec();
                let params = (node.as_str(), vector, member.heard_ms as i64);
                store.conn.prepare_cached(sql)?.execute(params)?;
            }
            Ok(())
        })
    }

    fn ripening(&self) -> Result<Option<Ripening>> {
        let kept: Option<Vec<u8>> = Self::meta(&self.conn, RIPENING)?;
        Ok(kept.map(|bytes| decode(&bytes)).transpose()?)
    }

    fn set_ripening(&mut self, ripening: Ripening) -> Result<()> {
        let bytes = encode(&ripening).to_vec();
        self.write(|store| Ok(Self::set_meta(&store.conn, RIPENING, bytes)?))
    }

    pub(super) fn set_collected(&mut self, collected: Vector) -> Result<()> {
        Self::set_meta(&self.conn, COLLECTED, encode(&collected).to_vec())?;
        self.head.collected = collected;
        Ok(())
    }

    /// Whether tombstones of a table are never forgotten anywhere. Records of the schema say more than that something is
    /// gone, and where rows of a table that keeps both stand depends on its tombstones.
    pub(super) fn keeps_tombstones(&self, plan: &Plan) -> bool {
        plan.table.name == SCHEMA || self.links.contains_key(&plan.table.id)
    }

    /// Whether this file forgets tombstones of a table. To one that was gone here and came back, rows are told again under
    /// births that this file has long had: what is not known there was not forgotten.
    pub(super) fn is_forgetful(&self, plan: &Plan) -> Result<bool> {
        Ok(!self.keeps_tombstones(plan) && !self.is_told_whole(plan)?)
    }

    /// Looks at some tombstones, and forgets those that are below the bound, in a transaction of its own.
    fn forget_some(
        &mut self,
        bound: &Vector,
        (at, after): (usize, i64),
    ) -> Result<(Option<OwnCommit>, Step)> {
        let Some(plan) = self.plans.get(at).cloned() else {
            return Ok((None, Step { forgotten: 0, next: None }));
        };
        let next_table = Some((at + 1, -1));
        if !self.is_forgetful(&plan)? {
            return Ok((None, Step { forgotten: 0, next: next_table }));
        }
        let (found, last) = self.tombstones(&plan, bound, after)?;
        let next = last.map_or(next_table, |lsn| Some((at, lsn)));
        if found.is_empty() {
            return Ok((None, Step { forgotten: 0, next }));
        }
        let keys = plan.table.key.len();
        let sql = format!("{} AND dh IS NOT NULL AND lsn = ?{}", plan.remove_state(), keys + 1);
        self.write(|store| {
            let own = store.absorb_pending()?;
            let mut collected = store.head.collected.clone();
            let mut forgotten = 0;
            for (key, lsn, sites) in &found {
                let params = key.iter().cloned().chain([Value::Int(*lsn)]);
                // What was written again meanwhile has another lsn.
                if store.conn.prepare_cached(&sql)?.execute(rusqlite::params_from_iter(params))? > 0 {
                    forgotten += 1;
                    for site in sites {
                        if let Some(point) = bound.0.get(site) {
                            collected.raise(*site, *point);
                        }
                    }
                }
            }
            store.set_collected(collected)?;
            Ok((own, Step { forgotten, next }))
        })
    }

    /// Some tombstones that the bound covers: key, lsn, sites; and where looking ended, if that is not the end.
    #[allow(clippy::type_complexity)]
    fn tombstones(
        &self,
        plan: &Plan,
        bound: &Vector,
        after: i64,
    ) -> Result<(Vec<(Vec<Value>, i64, Vec<SiteId>)>, Option<i64>)> {
        let keys = plan.table.key.len();
        let sql = format!(
            "SELECT {}, bh, bs, dh, ds, cols, lsn FROM {1} INDEXED BY {1}_dead WHERE dh IS NOT NULL AND lsn > ?1 \
             ORDER BY lsn LIMIT {AT_ONCE}",
            list(0..keys, |i| format!("k{i}")),
            state_table(&plan.table)
        );
        let mut statement = self.conn.prepare_cached(&sql)?;
        let mut rows = statement.query([after])?;
        let (mut found, mut looked, mut last) = (Vec::new(), 0, after);
        while let Some(row) = rows.next()? {
            looked += 1;
            last = row.get(keys + 5)?;
            let state = self.sites.read_state(row, keys)?;
            if state.versions().all(|v| bound.covers(v)) {
                let key = (0..keys).map(|i| Ok(get(row, i)?.to_value()));
                let sites = state.versions().map(|v| v.site).collect();
                found.push((key.collect::<rusqlite::Result<Vec<Value>>>()?, last, sites));
            }
        }
        Ok((found, (looked == AT_ONCE).then_some(last)))
    }

    /// Whether a row of which nothing is known here was deleted, and that was forgotten.
    pub(super) fn is_forgotten(&self, plan: &Plan, row: &Row) -> Result<bool> {
        let known = !self.head.collected.0.is_empty() && self.head.vector.covers(row.state.birth);
        Ok(known && self.is_forgetful(plan)?)
    }

    /// Whether a row that was inserted at `birth`, and of which nothing is known here, may have been displaced by a later
    /// one whose delete is forgotten here and remembered elsewhere. No member's is: this one comes from a node that was
    /// away. It is written again by this node, so that it stays everywhere.
    pub(super) fn is_late(&self, plan: &Plan, row: &Row) -> Result<bool> {
        let late = row.state.birth.hlc <= self.head.collected.latest();
        Ok(late && row.state.dead.is_none() && !plan.table.is_ours() && self.is_forgetful(plan)?)
    }

    /// A row that was deleted, and that was forgotten: what was written to it unseen is kept.
    pub(super) fn drop_forgotten(&mut self, plan: &Plan, key: &[ValueRef<'_>], row: &Row) -> Result<()> {
        let vector = self.head.vector.clone();
        let unseen = |v: &Version| !vector.covers(*v);
        self.keep_unseen(plan, key, row, &unseen)
    }

    /// Keeps what was written to a row that was deleted by somebody who had not seen that. By whom is forgotten.
    pub(super) fn keep_unseen(
        &mut self,
        plan: &Plan,
        key: &[ValueRef<'_>],
        row: &Row,
        unseen: &dyn Fn(&Version) -> bool,
    ) -> Result<()> {
        if row.state.dead.is_some() || plan.table.is_ours() {
            return Ok(());
        }
        let lost: BTreeMap<_, _> =
            row.state.columns.iter().filter(|(_, v)| unseen(v)).map(|(c, v)| (*c, *v)).collect();
        let Some(latest) = lost.values().max() else { return Ok(()) };
        let winner = Version { hlc: latest.hlc, site: Version::ZERO.site };
        self.keep_conflict(plan, key, &Loss::of_row(Kind::Delete, row, lost, winner))
    }
}
