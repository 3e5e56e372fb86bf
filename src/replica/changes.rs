//! What became of a file's rows after a cursor, for programs that follow them. Invariant: a page is read at a moment when
//! all is absorbed, and its cursor goes on behind what it tells: nothing is skipped, whenever a reader is killed.
//!
//! The row states are what is read, by the counter that each change of one gets, so nothing has to be kept for readers: a
//! row that has changed several times since the cursor is told once, as it is.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension};
use serde_json::{Map, Value as Json};

use super::plan::Plan;
use super::shadow::Sites;
use super::store::{Head, load_head};
use super::verify::{Owner, Reader};
use super::{ReplicaError, Result, entry};
use crate::core::capture::{PREFIX, state_table};
use crate::core::change::{Change, Cursor, Operation, id, latest, to_json};
use crate::core::value::ValueRef;
use crate::core::version::Version;
use crate::sqlite::value::get;

/// How many changes a page tells at most, and about how many bytes of rows.
const PAGE_ROWS: usize = 500;
const PAGE_BYTES: usize = 2 * 1024 * 1024;
/// A larger row is named only: a message may have 8 MiB, and blobs grow by a third.
const ROW_BYTES: usize = 4 * 1024 * 1024;

/// Changes in the order in which they became visible in the file.
#[derive(Debug, Clone)]
pub struct ChangesPage {
    /// The changes.
    pub changes: Vec<Change>,
    /// Where to go on.
    pub next: Cursor,
    /// Whether this page reached all that there is.
    pub is_last: bool,
    /// Deletes may have been forgotten that the cursor's reader was never told of.
    pub gap: bool,
}

/// What is read within one transaction.
struct Reading<'r> {
    db: &'r str,
    conn: &'r Connection,
    sites: &'r Sites,
    head: Head,
    cursor: Cursor,
}

impl Reader {
    /// Where a reader begins that wants only what happens from now on.
    pub fn newest(&mut self, owner: &dyn Owner) -> Result<Cursor> {
        self.begin(owner)?;
        let head = load_head(&self.conn);
        self.conn.execute_batch("COMMIT")?;
        let Head { site, lsn, vector, .. } = head?;
        Ok(Cursor { site: Some(site), lsn, vector, again_upto: 0 })
    }

    /// The next changes after a cursor, of one table or of all.
    pub fn changes(
        &mut self,
        owner: &dyn Owner,
        db: &str,
        after: &Cursor,
        table: Option<&str>,
    ) -> Result<ChangesPage> {
        self.begin(owner)?;
        let result = self.read_changes(db, after, table);
        self.conn.execute_batch("COMMIT")?;
        result
    }

    fn read_changes(&self, db: &str, after: &Cursor, table: Option<&str>) -> Result<ChangesPage> {
        let Self { conn, sites, plans, .. } = self;
        let head = load_head(conn)?;
        let first = *after == Cursor::default();
        // A cursor written by hand says nothing of feeds.
        let gap = !first && !after.vector.0.is_empty() && !after.vector.includes(&head.collected);
        let mut cursor = after.clone();
        if cursor.site != Some(head.site) || cursor.lsn > head.lsn {
            // The file is another one, or went back: what the reader was told already is known by its versions.
            (cursor.site, cursor.lsn, cursor.again_upto) = (Some(head.site), 0, head.lsn);
        }
        let wanted =
            |p: &&Arc<Plan>| !p.table.is_ours() && table.is_none_or(|t| p.table.name.eq_ignore_ascii_case(t));
        if let Some(name) = table.filter(|_| !plans.iter().any(|p| wanted(&p))) {
            return Err(ReplicaError::Unfit(format!("no table {name:?} is replicated in {db}")));
        }
        let mut next: Vec<(i64, &Arc<Plan>)> = Vec::new();
        for plan in plans.iter().filter(wanted) {
            for lsn in changed_after(conn, plan, cursor.lsn)? {
                next.push((lsn, plan));
            }
        }
        next.sort_by_key(|(lsn, _)| *lsn);
        let more = next.len() > PAGE_ROWS;
        next.truncate(PAGE_ROWS);
        let mut reading = Reading { db, conn, sites, head, cursor };
        let (mut changes, mut bytes, mut cut) = (Vec::new(), 0, false);
        for (lsn, plan) in next {
            if bytes > PAGE_BYTES {
                cut = true;
                break;
            }
            changes.extend(reading.change(plan, lsn, &mut bytes)?);
            reading.cursor.lsn = lsn;
        }
        let is_last = !more && !cut;
        let mut next = reading.cursor;
        if is_last {
            next = Cursor {
                site: Some(reading.head.site),
                lsn: reading.head.lsn,
                vector: reading.head.vector,
                again_upto: 0,
            };
        }
        Ok(ChangesPage { changes, next, is_last, gap })
    }
}

/// The numbers of the next changes of a table: one more than a page has room for.
fn changed_after(conn: &Connection, plan: &Plan, lsn: i64) -> Result<Vec<i64>> {
    let sql = format!(
        "SELECT lsn FROM {0} INDEXED BY {0}_lsn WHERE lsn > ?1 ORDER BY lsn LIMIT {1}",
        state_table(&plan.table),
        PAGE_ROWS + 1
    );
    let mut statement = conn.prepare_cached(&sql)?;
    let rows = statement.query_map([lsn], |r| r.get(0))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

impl Reading<'_> {
    /// The change of one number; `None` if it says nothing that the reader does not know.
    fn change(&mut self, plan: &Plan, lsn: i64, bytes: &mut usize) -> Result<Option<Change>> {
        let mut statement = self.conn.prepare_cached(&plan.changed)?;
        let mut rows = statement.query((lsn - 1, lsn))?;
        let Some(row) = rows.next()? else { return Ok(None) };
        let (keys, columns) = (plan.table.key.len(), plan.table.columns.len());
        let state = self.sites.read_state(row, keys)?;
        let present: bool = row.get(keys + 5)?;
        // A row that merging is not done with is told when it is.
        if present == state.dead.is_some() {
            return Ok(None);
        }
        let told = |v: Version| self.cursor.vector.covers(v);
        if lsn <= self.cursor.again_upto && state.versions().all(told) && !self.moves(plan)? {
            return Ok(None);
        }
        let key_at = if present { keys + 6 } else { 0 };
        let key: Vec<ValueRef<'_>> =
            (key_at..key_at + keys).map(|i| get(row, i)).collect::<rusqlite::Result<_>>()?;
        let from = keys * 2 + 6;
        let values: Vec<ValueRef<'_>> = match present {
            true => (from..from + columns).map(|i| get(row, i)).collect::<rusqlite::Result<_>>()?,
            false => Vec::new(),
        };
        let size: usize = key.iter().chain(&values).map(|v| weight(*v)).sum();
        *bytes += size;
        let op = Operation::of(&state);
        let version = latest(&state);
        let place = |c: u32| plan.table.columns.iter().position(|p| p.id == c);
        let named = |c: u32| place(c).map(|i| plan.table.columns[i].name.clone());
        let written = state.columns.iter().filter(|(_, v)| op == Operation::Update && **v == version);
        let id = id(self.db, &plan.wire_name, &key, &state, |c| Some(plan.wire_columns[place(c)?].clone()));
        let key_names = plan.table.key.iter().map(|k| k.name.clone());
        let key: Map<String, Json> = key_names.zip(key.iter().map(|v| to_json(*v))).collect();
        let fits = size <= ROW_BYTES;
        let row = || {
            let names = plan.table.columns.iter().map(|c| c.name.clone());
            let rest = names.zip(values.iter().map(|v| to_json(*v)));
            key.clone().into_iter().chain(rest).collect()
        };
        Ok(Some(Change {
            id,
            db: self.db.to_owned(),
            table: plan.table.name.clone(),
            op,
            new: (present && fits).then(row),
            changed: written.filter_map(|(c, _)| named(*c)).collect(),
            too_large: present && !fits,
            version: entry::version_text(version),
            at_ms: version.hlc.ms(),
            node: self.node_of(version)?,
            cursor: Cursor::text(self.head.site, lsn),
            key,
        }))
    }

    /// Whether rows of the table move to other keys without a write.
    fn moves(&self, plan: &Plan) -> Result<bool> {
        let sql = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?1";
        let name = format!("{PREFIX}moved_{}", plan.table.id);
        Ok(self.conn.prepare_cached(sql)?.exists([name])?)
    }

    fn node_of(&self, version: Version) -> Result<Option<String>> {
        let mut ask = self.conn.prepare_cached("SELECT node FROM __litemesh_site WHERE site = ?1")?;
        let found = ask.query_row([version.site.0 as i64], |r| r.get::<_, Option<String>>(0)).optional();
        Ok(found.map_err(ReplicaError::from)?.flatten())
    }
}

fn weight(value: ValueRef<'_>) -> usize {
    match value {
        ValueRef::Text(b) | ValueRef::Blob(b) => b.len() + 8,
        _ => 16,
    }
}
