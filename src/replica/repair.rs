//! Writing rows again because this node's content is right and others differ. Invariant: a row is written only if, in
//! the same transaction, no write is under way that it would undo; and with a clock that every later write of the
//! nodes asked goes beyond.

use super::absorb::OwnCommit;
use super::plan::Plan;
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::{OP_DELETE, OP_INSERT, OP_UPDATE, PREFIX};
use crate::core::digest::{Difference, Layout, Seen, Verdict, judge};
use crate::core::merge::RowState;
use crate::core::schema::MASK_BITS;
use crate::core::sqltext::list;
use crate::core::value::{Value, ValueRef};
use crate::core::vector::Vector;
use crate::core::verify::{Cell, Held, Key};
use crate::core::version::{Hlc, Version};

/// How far ahead rows that are written again are dated: peers write later ones from when they are asked, and all of
/// them have to be asked until then.
pub const REPAIR_AHEAD_MS: u64 = 5_000;

/// Rows to be written again.
pub struct Restamp {
    /// Their table.
    pub layout: Layout,
    /// Their keys.
    pub keys: Vec<Key>,
    /// What each peer saw of them, and held then. From then on it writes with later clocks than `clock_ms`.
    pub peers: Vec<(Vec<Seen>, Held)>,
    /// The clock to write them with, in milliseconds since 1970.
    pub clock_ms: u64,
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It does not differ any more.
    Equal,
    /// It was written meanwhile, or is being written: left alone.
    Left,
    /// It was written again, with these columns (all of them if the row was missing elsewhere).
    Written,
    /// It was deleted again.
    Deleted,
}

/// What to put into the log for a row.
enum Entry {
    /// The columns, by place in the table.
    Update(Vec<usize>),
    Insert,
    Delete(Version),
}

impl Store {
    /// Writes rows again where they differ from the peers', as the application would: by the log. Returns the commits
    /// made and what became of each row.
    pub fn restamp(&mut self, order: &Restamp) -> Result<(Vec<OwnCommit>, Vec<Fate>)> {
        self.write(|store| {
            let mut own: Vec<OwnCommit> = store.absorb_pending()?.into_iter().collect();
            if store.head.hlc >= Hlc::from_ms(order.clock_ms) {
                return Err(ReplicaError::ClockPassed);
            }
            let plan = store.plan(&order.layout.table);
            let plan = plan.ok_or_else(|| ReplicaError::NoTable(order.layout.table.clone()))?;
            let (_, places) = Layout::of(&plan.table);
            let seen = store.see(&order.layout, &order.keys)?;
            let held = store.held();
            // What only one of them has says nothing where deletes were forgotten that the other has never heard of.
            let comparable =
                |p: &&(Vec<Seen>, Held)| !p.1.misses_forgotten(&held) && !held.misses_forgotten(&p.1);
            let peers: Vec<_> = order.peers.iter().filter(comparable).collect();
            let mut fates = Vec::new();
            for (i, ours) in seen.iter().enumerate() {
                let theirs: Vec<_> =
                    peers.iter().filter_map(|(s, held)| Some((s.get(i)?, &held.vector))).collect();
                let fate = match decide(ours, &store.head.vector, &theirs, &places) {
                    Ok(entry) => {
                        store.log_entry(&plan, &order.keys[i], &entry, order.clock_ms)?;
                        if matches!(entry, Entry::Delete(_)) { Fate::Deleted } else { Fate::Written }
                    }
                    Err(fate) => fate,
                };
                fates.push(fate);
            }
            own.extend(store.absorb_pending()?);
            Ok((own, fates))
        })
    }

    fn log_entry(&mut self, plan: &Plan, key: &Key, entry: &Entry, clock_ms: u64) -> Result<()> {
        let keys = plan.table.key.len();
        let mut masks = vec![0i64; plan.table.mask_count()];
        let key: Vec<Value> = key.iter().map(Cell::to_value).collect();
        let op = match entry {
            Entry::Insert => OP_INSERT,
            Entry::Update(columns) => {
                for place in columns {
                    let id = plan.table.columns[*place].id as usize;
                    masks[id / MASK_BITS] |= 1 << (id % MASK_BITS);
                }
                OP_UPDATE
            }
            Entry::Delete(birth) => {
                // Absorb keeps a death that is known: this one is new.
                let refs: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
                let lsn = self.next_lsn();
                self.sites.put(&self.conn, plan, &refs, &RowState::born(*birth), lsn)?;
                OP_DELETE
            }
        };
        let sql = format!(
            "INSERT INTO {PREFIX}log(tbl, op, ms, {}, {}) VALUES({})",
            list(0..keys, |i| format!("k{i}")),
            list(0..masks.len(), |i| format!("m{i}")),
            list(1..=3 + keys + masks.len(), |i| format!("?{i}"))
        );
        // A julian day, as the triggers write it.
        let day = clock_ms as f64 / 86_400_000.0 + 2_440_587.5;
        let head = [Value::Int(plan.table.id), Value::Int(op), Value::Real(day)];
        let values = head.into_iter().chain(key).chain(masks.into_iter().map(Value::Int));
        self.conn.prepare_cached(&sql)?.execute(rusqlite::params_from_iter(values))?;
        Ok(())
    }
}

/// What a row needs to be everywhere as it is here.
fn decide(
    ours: &Seen,
    our_vector: &Vector,
    theirs: &[(&Seen, &Vector)],
    places: &[usize],
) -> Result<Entry, Fate> {
    let mut differs = false;
    let mut columns = Vec::new();
    let mut whole = false;
    for (seen, vector) in theirs {
        match judge(ours, our_vector, seen, vector) {
            Verdict::Equal => {}
            Verdict::Unsettled => return Err(Fate::Left),
            Verdict::Differs(difference) => {
                differs = true;
                match difference {
                    // It may know that there was such a row, and have forgotten when it was deleted: this is a new one.
                    Difference::MissingThere if seen.state.is_none() => whole = true,
                    Difference::Columns(c) if !c.is_empty() => columns.extend(c),
                    Difference::Columns(_) | Difference::Versions => whole = true,
                    Difference::MissingThere | Difference::MissingHere => {
                        columns.extend(0..places.len() as u32)
                    }
                }
            }
        }
    }
    if !differs {
        return Err(Fate::Equal);
    }
    let births = theirs.iter().filter_map(|(s, _)| Some(s.state.as_ref()?.birth));
    let birth = ours.state.as_ref().map_or(Version::ZERO, |s| s.birth);
    if !ours.present {
        return Ok(Entry::Delete(births.fold(birth, Version::max)));
    }
    let alive = |s: &Seen| s.state.as_ref().is_none_or(|s| s.dead.is_none() && s.birth == birth);
    let same_row = alive(ours) && theirs.iter().all(|(s, _)| alive(s));
    if whole || !same_row || columns.is_empty() {
        return Ok(Entry::Insert);
    }
    columns.sort_unstable();
    columns.dedup();
    Ok(Entry::Update(columns.into_iter().filter_map(|c| places.get(c as usize).copied()).collect()))
}
