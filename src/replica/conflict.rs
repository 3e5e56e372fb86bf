//! Keeping what lost, for as long as it is to be kept. Invariant: an entry is in the file before the transaction that
//! overwrote what it keeps is committed, and reaches the other nodes as a write of this one.

use super::Result;
use super::entry::Entry;
use super::plan::Plan;
use super::store::Store;
use crate::core::capture::{CONFLICTS, OP_DELETE, OP_INSERT, state_table};
use crate::core::conflict::Loss;
use crate::core::value::{Value, ValueRef};

/// How many conflicts one transaction of ours removes at most.
const PRUNE_AT_ONCE: i64 = 1_000;

/// How long conflicts are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Those that happened earlier than this are removed, restored or not.
    pub age_ms: u64,
    /// So many conflicts are kept at most, the newest.
    pub count: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self { age_ms: 90 * 24 * 3_600_000, count: 10_000 }
    }
}

/// What of the conflicts kept is not settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConflictCounts {
    /// Conflicts that were not restored.
    pub open: u64,
    /// Among them, rows inserted at once under an integer key.
    pub collisions: u64,
    /// Children of those: rows that refer to the row that lost.
    pub children: u64,
}

impl Store {
    /// Keeps a loser. The same loss, seen again or on another node, is the same entry.
    pub(super) fn keep_conflict(&mut self, plan: &Plan, key: &[ValueRef<'_>], loss: &Loss) -> Result<()> {
        // A row that was moved goes by the id that its writer gave it.
        if let (Some(link), [ValueRef::Int(place)]) = (self.links.get(&plan.table.id), key) {
            let origin = link.origin(&self.conn, *place)?;
            return self.keep_entry(&Entry::of_loss(plan, &[ValueRef::Int(origin)], loss));
        }
        self.keep_entry(&Entry::of_loss(plan, key, loss))
    }

    /// Keeps an entry, and tells the others, unless it is there.
    pub(super) fn keep_entry(&mut self, entry: &Entry) -> Result<()> {
        if entry.insert(&self.conn)?
            && let Some(conflicts) = self.plan(CONFLICTS)
        {
            self.log_own(&conflicts, &[Value::Blob(entry.id.to_vec())], OP_INSERT, &[])?;
        }
        Ok(())
    }

    /// How many conflicts are kept and not restored. Counted anew only when one came or went.
    pub fn conflict_counts(&self) -> Result<ConflictCounts> {
        let Some(plan) = self.plan(CONFLICTS) else { return Ok(ConflictCounts::default()) };
        let newest = format!("SELECT max(lsn) FROM {}", state_table(&plan.table));
        let lsn: Option<i64> = self.conn.prepare_cached(&newest)?.query_row([], |r| r.get(0))?;
        if let Some((at, counts)) = self.counted.get()
            && at == lsn
        {
            return Ok(counts);
        }
        let mut counts = ConflictCounts::default();
        for conflict in super::review::conflicts(&self.conn)?.iter().filter(|c| c.is_open()) {
            counts.open += 1;
            if conflict.is_collision() {
                counts.collisions += 1;
                counts.children += conflict.children.len() as u64;
            }
        }
        self.counted.set(Some((lsn, counts)));
        Ok(counts)
    }

    /// Removes conflicts that are too old or too many, in a transaction of its own; returns how many.
    pub fn prune(&mut self, now_ms: u64, keep: Retention) -> Result<u64> {
        if self.doomed(now_ms, keep)?.is_empty() {
            return Ok(0);
        }
        self.write(|store| {
            let doomed = store.doomed(now_ms, keep)?;
            let Some(plan) = store.plan(CONFLICTS) else { return Ok(0) };
            for conflict in &doomed {
                let sql = "DELETE FROM __litemesh_conflicts WHERE conflict = ?1 RETURNING id";
                let mut statement = store.conn.prepare_cached(sql)?;
                let rows = statement.query_map([conflict], |r| r.get::<_, Vec<u8>>(0))?;
                let ids = rows.collect::<rusqlite::Result<Vec<_>>>()?;
                drop(statement);
                for id in ids {
                    store.log_own(&plan, &[Value::Blob(id)], OP_DELETE, &[])?;
                }
            }
            Ok(doomed.len() as u64)
        })
    }

    /// The conflicts that are to go, in an order that is the same on every node.
    fn doomed(&self, now_ms: u64, keep: Retention) -> Result<Vec<Vec<u8>>> {
        let sql = "WITH last(conflict, at) AS
                     (SELECT conflict, max(at_ms) FROM __litemesh_conflicts GROUP BY conflict)
                   SELECT conflict FROM last WHERE at < ?1 UNION SELECT conflict FROM
                     (SELECT conflict FROM last ORDER BY at DESC, conflict LIMIT -1 OFFSET ?2) LIMIT ?3";
        let before = i64::try_from(now_ms.saturating_sub(keep.age_ms)).unwrap_or(i64::MAX);
        let count = i64::try_from(keep.count).unwrap_or(i64::MAX);
        let mut statement = self.conn.prepare_cached(sql)?;
        let rows = statement.query_map((before, count, PRUNE_AT_ONCE), |r| r.get(0))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }
}
