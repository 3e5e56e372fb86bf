//! Reading rows to compare them with another node's. Invariant: what is read was absorbed, and on the disk by a commit
//! of ours, before it is told to anybody; no read transaction of a range lasts longer than the range.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;

use super::absorb::OwnCommit;
use super::adopt::place_triggers;
use super::clock::steady_ms;
use super::copy::begin_absorbed;
use super::engine::Engine;
use super::plan::Plan;
use super::repair::{Fate, REPAIR_AHEAD_MS, Restamp};
use super::shadow::Sites;
use super::store::Store;
use super::worker::WorkerHandle;
use super::{ReplicaError, Result};
use crate::core::capture::{state_table, triggers};
use crate::core::digest::{Digest, Hash, Layout, RowHasher, Seen, SeenState};
use crate::core::merge::RowState;
use crate::core::sqltext::{ident, list};
use crate::core::value::{Value, ValueRef};
use crate::core::verify::{
    Cell, Held, Key, LOOKUP_BYTES, LOOKUP_KEYS, Lookup, Question, RANGE_BYTES, RANGE_ROWS, Range, Reply,
    key_size,
};
use crate::core::version::Hlc;
use crate::sqlite::{self, durable::Durability, value::get};

/// How often a moment without a pending log is tried for.
const QUIET_TRIES: u32 = 50;
/// How long to wait before the next try.
const QUIET_PAUSE: Duration = Duration::from_millis(2);

/// Where a file keeps the tables that are to be compared.
const REBUILT: &str = "rebuilt";

/// The file's owner, as a reader of it sees it: the only one who writes.
pub trait Owner {
    /// The replicated tables, and the schema's version when they were read.
    fn plans(&self) -> Result<(Vec<Arc<Plan>>, i64)>;
    /// Absorbs what the application wrote.
    fn absorb(&self) -> Result<()>;
    /// Puts back triggers that were taken away without a change of the schema's version.
    fn put_back_triggers(&self) -> Result<()>;
    /// Reads single rows, in a transaction that has absorbed everything.
    fn look_up(&self, lookup: &Lookup) -> Result<(Vec<Seen>, Held)>;
    /// What the file holds.
    fn held(&self) -> Result<Held>;
    /// A connection in a read transaction that stands at a state which is wholly absorbed.
    fn snapshot(&self) -> Result<Connection>;
    /// What all files of the database share.
    fn lineage(&self) -> Result<u64>;
    /// The date for rows to be written again: later than all in the file, and some time ahead of the mesh's clock.
    fn repair_date_ms(&self) -> Result<u64>;
    /// Writes rows again where they differ from the peers'.
    fn restamp(&self, order: Restamp) -> Result<Vec<Fate>>;
}

/// Part of a table.
#[derive(Debug, Clone, Default)]
pub struct Part {
    /// The rows' digest.
    pub digest: Digest,
    /// The last row's key, if there may be more in the range.
    pub end: Option<Key>,
}

/// Rows by key, and where they end if there may be more in the range.
pub type Listed = (Vec<(Key, Hash)>, Option<Key>);

/// Reads ranges of tables, through a connection of its own.
pub struct Reader {
    pub(super) conn: Connection,
    pub(super) sites: Sites,
    pub(super) plans: Vec<Arc<Plan>>,
    schema_version: i64,
}

impl Reader {
    /// A reader of the file.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self::with_connection(sqlite::open_read_only(path)?))
    }

    /// A reader that uses a connection of its own, in-memory databases included.
    pub fn with_connection(conn: Connection) -> Self {
        Self { conn, sites: Sites::default(), plans: Vec::new(), schema_version: -1 }
    }

    /// The layouts of the replicated tables.
    pub fn layouts(&mut self, owner: &dyn Owner) -> Result<Vec<Layout>> {
        owner.put_back_triggers()?;
        Ok(owner.plans()?.0.iter().map(|p| Layout::of(&p.table).0).collect())
    }

    /// Answers a peer's question.
    pub fn answer(&mut self, owner: &dyn Owner, question: &Question) -> Result<Reply> {
        match question {
            Question::Layouts => Ok(Reply::Layouts(self.layouts(owner)?, owner.held()?)),
            Question::Range(range, theirs) => {
                let limit = RANGE_ROWS * 2;
                let part = self.digest(owner, range, limit)?;
                if part.digest == *theirs && part.end.is_none() {
                    return Ok(Reply::Same);
                }
                let (rows, end) = self.list(owner, range, limit)?;
                Ok(Reply::Rows(rows, end))
            }
            Question::Lookup(lookup) => {
                let (seen, held) = owner.look_up(lookup)?;
                Ok(Reply::Seen(seen, held))
            }
        }
    }

    /// The digest of the first rows of a range.
    pub fn digest(&mut self, owner: &dyn Owner, range: &Range, limit: usize) -> Result<Part> {
        let mut part = Part::default();
        part.end = self.read(owner, range, limit, |_, hash| part.digest.add(hash))?;
        Ok(part)
    }

    /// The first rows of a range, and where they end if that is not the range's own end.
    pub fn list(&mut self, owner: &dyn Owner, range: &Range, limit: usize) -> Result<Listed> {
        let mut rows = Vec::new();
        let end = self.read(owner, range, limit, |key, hash| {
            rows.push((key.iter().map(|k| Cell::from(*k)).collect(), hash));
        })?;
        Ok((rows, end))
    }

    fn read(
        &mut self,
        owner: &dyn Owner,
        range: &Range,
        limit: usize,
        visit: impl FnMut(&[ValueRef<'_>], Hash),
    ) -> Result<Option<Key>> {
        self.begin(owner)?;
        let result = self.read_rows(range, limit, visit);
        self.conn.execute_batch("COMMIT")?;
        result
    }

    /// Begins a read transaction at a moment when everything is absorbed.
    pub(super) fn begin(&mut self, owner: &dyn Owner) -> Result<()> {
        for attempt in 0..QUIET_TRIES {
            if begin_absorbed(&self.conn)? {
                let version: i64 =
                    self.conn.prepare_cached("PRAGMA schema_version")?.query_row([], |r| r.get(0))?;
                if version == self.schema_version {
                    // What was absorbed a moment ago may be on its way to the disk.
                    Durability::of_reader(&self.conn)?.sync()?;
                    self.sites = Sites::load(&self.conn)?;
                    return Ok(());
                }
                self.conn.execute_batch("COMMIT")?;
            }
            if attempt > 3 {
                std::thread::sleep(QUIET_PAUSE);
            }
            owner.absorb()?;
            (self.plans, self.schema_version) = owner.plans()?;
        }
        // It is written without a pause: its owner holds up writers for a moment.
        self.conn = owner.snapshot()?;
        let version: i64 = self.conn.query_row("PRAGMA schema_version", [], |r| r.get(0))?;
        if version == self.schema_version {
            self.sites = Sites::load(&self.conn)?;
            return Ok(());
        }
        self.conn.execute_batch("COMMIT")?;
        Err(ReplicaError::Restless)
    }

    fn read_rows(
        &mut self,
        range: &Range,
        limit: usize,
        mut visit: impl FnMut(&[ValueRef<'_>], Hash),
    ) -> Result<Option<Key>> {
        let (plan, order) = find(&self.plans, &range.layout)?;
        let keys = plan.table.key.len();
        let mut statement = self.conn.prepare_cached(&range_sql(&plan, &order, range))?;
        let bounds = [&range.after, &range.upto].into_iter().flatten().flatten();
        let bounds: Vec<Value> = bounds.map(Cell::to_value).collect();
        let mut rows = statement.query(rusqlite::params_from_iter(&bounds))?;
        let mut hasher = RowHasher::default();
        let (mut count, mut bytes) = (0, 0);
        while let Some(row) = rows.next()? {
            let key = (0..keys).map(|i| get(row, i)).collect::<rusqlite::Result<Vec<_>>>()?;
            for value in &key {
                bytes += size(*value);
                hasher.value(*value);
            }
            let state = match row.get_ref(keys)? {
                rusqlite::types::ValueRef::Null => SeenState::adopted(),
                _ => SeenState::of(&self.sites.read_state(row, keys)?, &plan.table, &order),
            };
            hasher.state(&state);
            for i in 0..order.len() {
                let value = get(row, keys + 5 + i)?;
                bytes += size(value);
                hasher.value(value);
            }
            visit(&key, hasher.finish());
            count += 1;
            if count >= limit || bytes >= RANGE_BYTES {
                return Ok(Some(key.iter().map(|k| Cell::from(*k)).collect()));
            }
        }
        Ok(None)
    }
}

fn size(value: ValueRef<'_>) -> usize {
    match value {
        ValueRef::Text(b) | ValueRef::Blob(b) => b.len(),
        _ => 8,
    }
}

/// The table with this layout.
fn find(plans: &[Arc<Plan>], layout: &Layout) -> Result<(Arc<Plan>, Vec<usize>)> {
    for plan in plans.iter().filter(|p| p.table.name.eq_ignore_ascii_case(&layout.table)) {
        let (here, order) = Layout::of(&plan.table);
        if here == *layout {
            return Ok((plan.clone(), order));
        }
    }
    Err(ReplicaError::OtherLayout(layout.table.clone()))
}

/// `after key…, up to key…` -> key, state, columns in the layout's order. Keys of which a part is NULL stay on their
/// node and are left out.
fn range_sql(plan: &Plan, order: &[usize], range: &Range) -> String {
    let table = &plan.table;
    let keys = list(&table.key, |k| format!("t.{}", k.sql));
    let columns: String = order.iter().map(|i| format!(", t.{}", ident(&table.columns[*i].name))).collect();
    let on = table.key.iter().enumerate().map(|(i, k)| format!("t.{} = s.k{i}", k.sql));
    let on = on.collect::<Vec<_>>().join(" AND ");
    let mut conditions: Vec<String> =
        table.key.iter().filter(|k| k.nullable).map(|k| format!("t.{} IS NOT NULL", k.sql)).collect();
    let mut next = 1;
    for (bound, operator) in [(&range.after, ">"), (&range.upto, "<=")] {
        if bound.is_some() {
            let params = list(next..next + table.key.len(), |i| format!("?{i}"));
            conditions.push(match table.key.len() {
                1 => format!("{keys} {operator} {params}"),
                _ => format!("({keys}) {operator} ({params})"),
            });
            next += table.key.len();
        }
    }
    let conditions = if conditions.is_empty() { "1".to_owned() } else { conditions.join(" AND ") };
    format!(
        "SELECT {keys}, s.bh, s.bs, s.dh, s.ds, s.cols{columns} FROM {} AS t LEFT JOIN {} AS s ON {on} \
         WHERE {conditions} ORDER BY {keys}",
        ident(&table.name),
        state_table(table)
    )
}

impl Engine {
    /// Reads single rows; see [`Store::look_up`].
    pub fn look_up(&mut self, lookup: &Lookup, now_ms: u64) -> Result<(Vec<Seen>, Held)> {
        let latest_ms = self.clocks().latest_ms(now_ms, self.store().head().hlc.ms());
        let (own, seen, held) = self.store_mut().look_up(lookup, latest_ms)?;
        self.publish(own);
        Ok((seen, held))
    }

    /// Puts back triggers that are missing; see [`Store::put_back_triggers`].
    pub fn put_back_triggers(&mut self) -> Result<()> {
        let own = self.store_mut().put_back_triggers()?;
        self.publish(own);
        Ok(())
    }

    /// See [`Owner::repair_date_ms`].
    pub fn repair_date_ms(&self, now_ms: u64) -> u64 {
        // Not ahead of the last repair's date by as much again: many of them would carry the clock away.
        (self.clocks().mesh_ms(now_ms) + REPAIR_AHEAD_MS).max(self.store().head().hlc.ms() + 1)
    }

    /// Writes rows again; see [`Store::restamp`].
    pub fn restamp(&mut self, order: &Restamp) -> Result<Vec<Fate>> {
        let (own, fates) = self.store_mut().restamp(order)?;
        own.into_iter().for_each(|o| self.publish(Some(o)));
        Ok(fates)
    }
}

impl Owner for WorkerHandle {
    fn plans(&self) -> Result<(Vec<Arc<Plan>>, i64)> {
        self.call(|e| (e.store().plans().cloned().collect::<Vec<_>>(), e.store().schema_version()))
            .ok_or(ReplicaError::Ended)
    }

    fn absorb(&self) -> Result<()> {
        self.call(Engine::absorb).ok_or(ReplicaError::Ended)?
    }

    fn put_back_triggers(&self) -> Result<()> {
        self.call(Engine::put_back_triggers).ok_or(ReplicaError::Ended)?
    }

    fn look_up(&self, lookup: &Lookup) -> Result<(Vec<Seen>, Held)> {
        let lookup = lookup.clone();
        self.call(move |e| e.look_up(&lookup, steady_ms())).ok_or(ReplicaError::Ended)?
    }

    fn held(&self) -> Result<Held> {
        self.call(|e| e.store().held()).ok_or(ReplicaError::Ended)
    }

    fn snapshot(&self) -> Result<Connection> {
        self.call(Engine::snapshot).ok_or(ReplicaError::Ended)?
    }

    fn lineage(&self) -> Result<u64> {
        self.call(|e| e.store().head().lineage).ok_or(ReplicaError::Ended)
    }

    fn repair_date_ms(&self) -> Result<u64> {
        self.call(|e| e.repair_date_ms(steady_ms())).ok_or(ReplicaError::Ended)
    }

    fn restamp(&self, order: Restamp) -> Result<Vec<Fate>> {
        self.call(move |e| e.restamp(&order)).ok_or(ReplicaError::Ended)?
    }
}

impl Store {
    /// What the file holds.
    pub fn held(&self) -> Held {
        Held { vector: self.head.vector.clone(), collected: self.head.collected.clone() }
    }

    /// The schema's version when the tables were read last.
    pub fn schema_version(&self) -> i64 {
        self.schema_version
    }

    /// Tables that were without triggers for a while, and have not been compared with a peer since.
    pub fn rebuilt_tables(&self) -> Result<Vec<String>> {
        let kept = self.rebuilt_ids()?;
        let tables = self.plans().map(|p| &p.table).filter(|t| kept.contains(&t.id));
        Ok(tables.map(|t| t.name.clone()).collect())
    }

    /// Their numbers: such a table may be renamed, and another get its name, before it is compared.
    fn rebuilt_ids(&self) -> Result<BTreeSet<i64>> {
        let kept: Option<String> = Self::meta(&self.conn, REBUILT)?;
        Ok(kept.and_then(|k| serde_json::from_str(&k).ok()).unwrap_or_default())
    }

    /// A table was without triggers for a while. Within a transaction.
    pub(super) fn note_rebuilt(&self, table: i64) -> Result<()> {
        let mut ids = self.rebuilt_ids()?;
        if ids.insert(table) {
            Self::set_meta(&self.conn, REBUILT, serde_json::json!(ids).to_string())?;
        }
        Ok(())
    }

    /// A table was compared, and what had changed in it was told.
    pub fn forget_rebuilt(&mut self, table: &str) -> Result<()> {
        self.write(|store| {
            let mut ids = store.rebuilt_ids()?;
            if let Some(plan) = store.plan(table) {
                ids.remove(&plan.table.id);
            }
            Ok(Self::set_meta(&store.conn, REBUILT, serde_json::json!(ids).to_string())?)
        })
    }

    /// Puts back triggers that were taken away in a way that leaves the schema's version as it was
    /// (`writable_schema`): what the application wrote meanwhile is not taken for its will, but found by comparing.
    pub fn put_back_triggers(&mut self) -> Result<Option<OwnCommit>> {
        if self.closed || self.robbed()?.is_empty() {
            return Ok(None);
        }
        // The connection goes by the version, and still believes them to be there.
        self.conn.execute_batch("PRAGMA writable_schema = RESET")?;
        self.write(|store| {
            let own = store.absorb_pending()?;
            for plan in store.robbed()? {
                place_triggers(&store.conn, &plan.table)?;
                store.notes.push(format!(
                    "table {:?} had lost litemesh's triggers: they are back; what was written without them is told by \
                     'litemesh verify'",
                    plan.table.name
                ));
            }
            Ok(own)
        })
    }

    /// The tables that lack a trigger of ours.
    fn robbed(&self) -> Result<Vec<Arc<Plan>>> {
        let sql = "SELECT 1 FROM sqlite_schema WHERE type = 'trigger' AND name = ?1 AND sql = ?2";
        let mut ask = self.conn.prepare_cached(sql)?;
        let mut robbed = Vec::new();
        for plan in self.plans() {
            for trigger in triggers(&plan.table) {
                if !ask.exists(trigger)? {
                    robbed.push(plan.clone());
                    break;
                }
            }
        }
        Ok(robbed)
    }

    /// Reads single rows in a write transaction that has absorbed everything, and that is on the disk afterwards:
    /// whatever the application wrote before it is then, too. The file's clock is raised at most to `latest_ms`.
    pub fn look_up(
        &mut self,
        lookup: &Lookup,
        latest_ms: u64,
    ) -> Result<(Option<OwnCommit>, Vec<Seen>, Held)> {
        let bytes: usize = lookup.keys.iter().map(key_size).sum();
        if lookup.keys.len() > LOOKUP_KEYS || bytes > LOOKUP_BYTES && lookup.keys.len() > 1 {
            return Err(ReplicaError::TooMuch);
        }
        if lookup.later_than_ms.is_some_and(|ms| ms > latest_ms) {
            return Err(ReplicaError::ClockAhead);
        }
        self.write(|store| {
            let own = store.absorb_pending()?;
            if let Some(ms) = lookup.later_than_ms {
                store.head.hlc = store.head.hlc.max(Hlc::from_ms(ms));
            }
            store.save_clock()?;
            let seen = store.see(&lookup.layout, &lookup.keys)?;
            Ok((own, seen, store.held()))
        })
    }

    /// What is seen of single rows, within the transaction at hand.
    pub(super) fn see(&self, layout: &Layout, keys: &[Key]) -> Result<Vec<Seen>> {
        let (plan, order) = find(&self.plans, layout)?;
        keys.iter().map(|key| self.see_row(&plan, &order, key)).collect()
    }

    fn see_row(&self, plan: &Plan, order: &[usize], key: &Key) -> Result<Seen> {
        let values: Vec<Value> = key.iter().map(Cell::to_value).collect();
        let refs: Vec<ValueRef<'_>> = values.iter().map(Value::as_ref).collect();
        if refs.len() != plan.table.key.len() {
            return Err(ReplicaError::OtherLayout(plan.table.name.clone()));
        }
        let state: Option<RowState> = self.sites.get(&self.conn, plan, &refs)?;
        let state = state.map(|s| SeenState::of(&s, &plan.table, order));
        let mut statement = self.conn.prepare_cached(&row_sql(plan, order))?;
        let mut rows = statement.query(rusqlite::params_from_iter(&refs))?;
        let placed = self.keeps_both(plan);
        let Some(row) = rows.next()? else { return Ok(Seen { state, placed, ..Seen::NOTHING }) };
        let meant = self.meant(plan, &refs)?;
        let mut hasher = RowHasher::default();
        for i in 0..refs.len() {
            hasher.value(get(row, i)?);
        }
        let key = hasher.finish().0;
        let mut columns = Vec::with_capacity(order.len());
        for (i, place) in order.iter().enumerate() {
            let value = get(row, refs.len() + i)?;
            // Under which id the row that it means is shown depends on other rows.
            match meant.get(place).filter(|m| matches!(value, ValueRef::Int(id) if id == m.shown)) {
                Some(m) => hasher.incarnation(&m.incarnation),
                None => hasher.value(value),
            }
            columns.push(hasher.finish().0);
        }
        Ok(Seen { present: true, state, key, columns, placed })
    }
}

/// `k…` -> key, columns in the layout's order.
fn row_sql(plan: &Plan, order: &[usize]) -> String {
    let table = &plan.table;
    let columns = table.key.iter().map(|k| k.sql.clone());
    let columns = columns.chain(order.iter().map(|i| ident(&table.columns[*i].name)));
    let on = table.key.iter().enumerate().map(|(i, k)| format!("{} = ?{}", k.sql, i + 1));
    let on = on.collect::<Vec<_>>().join(" AND ");
    format!("SELECT {} FROM {} WHERE {on}", list(columns, |c| c), ident(&table.name))
}
