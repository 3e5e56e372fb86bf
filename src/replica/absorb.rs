//! Absorb: the log becomes row states and one numbered commit. Invariant: all of the log in one transaction, values
//! read in the same one; so a commit is whole transactions, as they are in the file at that moment.

use std::sync::Arc;

use super::body::Body;
use super::plan::Plan;
use super::rows::RowWriter;
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::{OP_DELETE, OP_INSERT, OP_SUSPECT, OP_TELL, OP_TWIN, OP_UPDATE, PREFIX};
use crate::core::merge::{ColumnId, RowState};
use crate::core::message::CommitHeader;
use crate::core::schema::MASK_BITS;
use crate::core::sqltext::list;
use crate::core::value::{Value, ValueRef};
use crate::core::vector::Point;
use crate::core::version::{SiteId, Version};
use crate::sqlite::value::get;

/// A commit of this file: on the disk when its transaction is, and ready to be sent then.
pub struct OwnCommit {
    /// The site whose feed it continues.
    pub site: SiteId,
    /// What stands before the rows.
    pub header: CommitHeader,
    /// Blocks: frames of rows.
    pub body: Body,
}

/// Rows that were read, and which of them are not as their state says.
pub(super) struct Gathered {
    pub body: Body,
    pub rows: u64,
    pub misfits: Vec<Misfit>,
}

/// A row that is there or gone against its state, its key, and the state that it has to get.
pub(super) type Misfit = (Arc<Plan>, Vec<Value>, RowState);

/// A julian day's milliseconds since 1970.
pub(super) fn julian_ms(day: f64) -> Option<u64> {
    let ms = (day - 2_440_587.5) * 86_400_000.0;
    (ms.is_finite() && ms >= 0.0).then(|| ms.round() as u64)
}

impl Store {
    /// Absorbs what the application wrote, in a transaction of its own; `None` if there was nothing to tell.
    pub fn absorb(&mut self) -> Result<Option<OwnCommit>> {
        self.write(Self::absorb_pending)
    }

    /// Absorbs within the transaction at hand: every transaction of ours begins with this.
    pub(super) fn absorb_pending(&mut self) -> Result<Option<OwnCommit>> {
        self.refresh_schema()?;
        let last = "SELECT seq, ms FROM __litemesh_log ORDER BY seq DESC LIMIT 1";
        let mut statement = self.conn.prepare_cached(last)?;
        let mut rows = statement.query([])?;
        let Some(row) = rows.next()? else {
            return Ok(None);
        };
        let (max_seq, day) = (row.get::<_, i64>(0)?, row.get::<_, f64>(1).ok());
        drop(rows);
        drop(statement);
        let hlc = self.head.hlc.tick(self.date_ms(day.and_then(julian_ms).unwrap_or(0)));
        let version = Version { hlc, site: self.head.site };
        let base = self.head.lsn;
        for (plan, only_inserts) in self.logged_tables()? {
            if only_inserts {
                self.absorb_inserts(&plan, version, max_seq)?;
            } else {
                self.absorb_mixed(&plan, version)?;
            }
        }
        self.absorb_links(version, base)?;
        self.empty_log()?;
        let (body, rows) = self.gather(version, base)?;
        if rows == 0 {
            self.save_clock()?;
            return Ok(None);
        }
        self.head.hlc = hlc;
        self.save_clock()?;
        self.number(version, body, rows).map(Some)
    }

    /// What is in the log is absorbed.
    pub(super) fn empty_log(&mut self) -> Result<()> {
        self.conn.prepare_cached("DELETE FROM __litemesh_log")?.execute([])?;
        self.unsettled = false;
        self.ends.get_mut().clear();
        Ok(())
    }

    /// The tables in the log, and whether all they have there is inserts.
    pub(super) fn logged_tables(&mut self) -> Result<Vec<(Arc<Plan>, bool)>> {
        // Mostly it is one; to sort the log by its tables would take longer than all the rest of this.
        let one = "SELECT min(tbl) = max(tbl) FROM __litemesh_log";
        let one: bool = self.conn.prepare_cached(one)?.query_row([], |r| r.get(0))?;
        let by = if one { "" } else { " GROUP BY tbl" };
        let sql = format!("SELECT min(tbl), min(op) = 1 AND max(op) = 1 FROM __litemesh_log{by}");
        let mut statement = self.conn.prepare_cached(&sql)?;
        let rows = statement.query_map([], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, bool>(1)?)))?;
        let mut tables = Vec::new();
        for row in rows {
            let (id, only_inserts) = row?;
            // Rows of a table that is gone have nothing left to say.
            if let Some(plan) = self.plans.iter().find(|p| p.table.id == id) {
                tables.push((plan.clone(), only_inserts));
            }
        }
        Ok(tables)
    }

    fn absorb_inserts(&mut self, plan: &Arc<Plan>, version: Version, max_seq: i64) -> Result<()> {
        let used_again = self.used_again(plan)?;
        self.insert_states(plan, version, (0, max_seq))?;
        self.bury(plan, used_again, version)?;
        if plan.table.key.iter().any(|k| k.nullable) {
            self.count_null_keys(plan)?;
        }
        Ok(())
    }

    /// Gives the rows that were inserted, by what the log has after one entry and up to another, their states; returns how
    /// many entries that were.
    pub(super) fn insert_states(
        &mut self,
        plan: &Plan,
        version: Version,
        (after, upto): (i64, i64),
    ) -> Result<u64> {
        let site = self.sites.index(&self.conn, version.site)?;
        let params = (version.hlc.0 as i64, site, self.head.lsn, plan.table.id, after, upto);
        let entries = self.conn.prepare_cached(&plan.absorb_inserts)?.execute(params)?;
        self.head.lsn += upto - after;
        Ok(entries as u64)
    }

    fn count_null_keys(&mut self, plan: &Plan) -> Result<()> {
        let nulls =
            (0..plan.table.key.len()).map(|i| format!("k{i} IS NULL")).collect::<Vec<_>>().join(" OR ");
        let sql = format!("SELECT count(*) FROM __litemesh_log WHERE tbl = ?1 AND ({nulls})");
        let count: i64 = self.conn.prepare_cached(&sql)?.query_row([plan.table.id], |r| r.get(0))?;
        self.null_keys += count as u64;
        Ok(())
    }

    fn absorb_mixed(&mut self, plan: &Arc<Plan>, version: Version) -> Result<()> {
        let whole = self.is_whole(plan)?;
        let Self { conn, sites, head, .. } = self;
        let mut statement = conn.prepare_cached(&plan.log)?;
        let mut rows = statement.query([plan.table.id])?;
        let keys = plan.table.key.len();
        let (base, mut used_again, mut twins) = (head.lsn, Vec::new(), Vec::new());
        while let Some(row) = rows.next()? {
            let key = (1..=keys).map(|i| get(row, i)).collect::<rusqlite::Result<Vec<_>>>()?;
            let op: i64 = row.get(0)?;
            if key.iter().any(|k| matches!(k, ValueRef::Null)) {
                self.null_keys += u64::from(op != OP_SUSPECT);
                continue;
            }
            let columns = || -> rusqlite::Result<Vec<u32>> {
                let masks = (0..plan.table.mask_count()).map(|i| row.get::<_, Option<i64>>(1 + keys + i));
                let masks = masks.collect::<rusqlite::Result<Vec<_>>>()?;
                let changed = |c: &u32| {
                    let mask = masks.get(*c as usize / MASK_BITS).copied().flatten().unwrap_or(0);
                    mask & (1 << (*c as usize % MASK_BITS)) != 0
                };
                let all = plan.table.columns.iter().map(|c| c.id);
                // Of a row that is merged as a whole an update writes all.
                let all_of_it = whole && all.clone().any(|c| changed(&c));
                Ok(all.filter(|c| all_of_it || changed(c)).collect())
            };
            if op == OP_SUSPECT && row_exists(conn, plan, &key)? {
                continue;
            }
            let before = sites.get(conn, plan, &key)?;
            if let (OP_TWIN, [ValueRef::Int(place)]) = (op, &key[..]) {
                twins.push(*place);
            }
            let after = step(before.as_ref(), op, version, &columns()?);
            if let Some(after) = after.filter(|a| op == OP_TELL || Some(a) != before.as_ref()) {
                head.lsn += 1;
                sites.put(conn, plan, &key, &after, head.lsn)?;
                let before = before.filter(|b| b.birth != after.birth);
                if let (Some(before), [ValueRef::Int(place)]) = (before, &key[..]) {
                    used_again.push((*place, before));
                }
            }
        }
        drop(rows);
        drop(statement);
        self.bury(plan, used_again, version)?;
        self.revive(plan, version, base)?;
        self.absorb_twins(plan, &twins, version)
    }

    /// Reads every row whose state changed after `base` into a body. Within the transaction that changed them.
    pub(super) fn gather(&mut self, version: Version, base: i64) -> Result<(Body, u64)> {
        let Gathered { body, rows, misfits } = self.read_changed(version, (base, self.head.lsn))?;
        self.put_right(&misfits)?;
        Ok((body, rows))
    }

    /// Reads every row whose state changed in the range of lsn (after, up to), as of a commit at `version`.
    pub(super) fn read_changed(&self, version: Version, range: (i64, i64)) -> Result<Gathered> {
        let mut body = Body::new(&self.spool_dir);
        let mut writer = RowWriter::new(version, &self.links);
        let mut misfits = Vec::new();
        for plan in &self.plans {
            writer.each_changed(&self.conn, &self.sites, plan, range, |writer, row| {
                // The values decide: a row that REPLACE displaced is gone whatever the log says.
                if row.present == row.state.dead.is_some() {
                    row.state = match row.present {
                        true => RowState::born(version),
                        false => RowState { dead: Some(version), ..RowState::born(row.state.birth) },
                    };
                    let key = row.key.iter().map(|k| k.to_value()).collect();
                    misfits.push((plan.clone(), key, row.state.clone()));
                }
                writer.push(row);
                writer.flush_if_full(&mut body)
            })?;
            writer.end_table(plan, &mut body)?;
        }
        let rows = writer.rows();
        writer.flush(&mut body)?;
        Ok(Gathered { body, rows, misfits })
    }

    /// Gives rows the states that they were told with.
    pub(super) fn put_right(&mut self, misfits: &[Misfit]) -> Result<()> {
        for (plan, key, state) in misfits {
            let key: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
            let lsn = self.next_lsn();
            self.sites.put(&self.conn, plan, &key, state, lsn)?;
        }
        Ok(())
    }

    /// Logs a write of ours as if the application had made it: the next absorb tells the others. Of an update it says
    /// which columns.
    pub(super) fn log_own(
        &mut self,
        plan: &Plan,
        key: &[Value],
        op: i64,
        columns: &[ColumnId],
    ) -> Result<()> {
        let mut masks = vec![0i64; plan.table.mask_count()];
        columns.iter().for_each(|c| masks[*c as usize / MASK_BITS] |= 1 << (*c as usize % MASK_BITS));
        let sql = format!(
            "INSERT INTO {PREFIX}log(tbl, op, ms, {}, {}) VALUES({}, {op}, julianday('now'), {}, {})",
            list(0..masks.len(), |i| format!("m{i}")),
            list(0..key.len(), |i| format!("k{i}")),
            plan.table.id,
            list(&masks, i64::to_string),
            list(1..=key.len(), |i| format!("?{i}")),
        );
        self.conn.prepare_cached(&sql)?.execute(rusqlite::params_from_iter(key))?;
        self.unsettled |= !plan.table.is_ours();
        Ok(())
    }

    /// Gives the commit its number.
    pub(super) fn number(&mut self, version: Version, body: Body, rows: u64) -> Result<OwnCommit> {
        let header = self.next_header(version, rows)?;
        Ok(OwnCommit { site: version.site, header, body })
    }

    /// What stands before the rows of the next commit.
    pub(super) fn next_header(&mut self, version: Version, rows: u64) -> Result<CommitHeader> {
        let site = self.head.site;
        let before = self.head.vector.0.get(&site).copied();
        let (from, prev) = before.map_or((0, 0), |p| (p.n, p.id));
        let id = rand::random::<u64>() >> 1;
        let others = self.head.vector.0.iter().filter(|(s, _)| **s != site);
        let seen = others.map(|(s, p)| (*s, p.n, p.hlc)).collect();
        self.raise(site, Point { n: from + 1, hlc: version.hlc, id })?;
        Ok(CommitHeader { from, to: from + 1, id, prev, hlc: version.hlc, seen, rows })
    }
}

/// What one entry of the log makes of a row's state; `None` if nothing.
fn step(before: Option<&RowState>, op: i64, version: Version, columns: &[u32]) -> Option<RowState> {
    match op {
        OP_INSERT => Some(RowState::born(version)),
        OP_UPDATE if columns.is_empty() => None,
        OP_UPDATE => {
            let mut state = before.cloned().unwrap_or(RowState::ADOPTED);
            if state.dead.is_some() {
                return Some(RowState::born(version));
            }
            if state.birth != version {
                state.columns.extend(columns.iter().map(|c| (*c, version)));
            }
            Some(state)
        }
        OP_DELETE | OP_SUSPECT => {
            let birth = before.map_or(Version::ZERO, |s| s.birth);
            let dead = before.and_then(|s| s.dead).unwrap_or(version);
            Some(RowState { dead: Some(dead), ..RowState::born(birth) })
        }
        OP_TELL => Some(before.cloned().unwrap_or(RowState::ADOPTED)),
        // Another release's entry: nothing is known of the row but that something happened to it.
        _ => None,
    }
}

fn row_exists(conn: &rusqlite::Connection, plan: &Plan, key: &[ValueRef<'_>]) -> Result<bool, ReplicaError> {
    Ok(conn.prepare_cached(&plan.select_row)?.exists(rusqlite::params_from_iter(key))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::version::Hlc;

    fn at(h: u64) -> Version {
        Version { hlc: Hlc(h), site: SiteId(1) }
    }

    #[test]
    fn a_days_milliseconds_are_exact() {
        assert_eq!(julian_ms(2_440_587.5), Some(0));
        assert_eq!(julian_ms(2_461_367.126_417_88), Some(1_795_359_722_505));
        assert_eq!(julian_ms(f64::NAN), None);
        assert_eq!(julian_ms(-5.0), None);
    }

    #[test]
    fn an_update_in_the_commit_that_inserted_the_row_says_nothing_new() {
        let born = step(None, OP_INSERT, at(5), &[]).unwrap();
        assert_eq!(step(Some(&born), OP_UPDATE, at(5), &[1]), Some(born));
    }

    #[test]
    fn a_row_deleted_and_inserted_again_is_a_new_incarnation() {
        let old = RowState::born(at(1));
        let dead = step(Some(&old), OP_DELETE, at(5), &[]).unwrap();
        assert_eq!(dead.dead, Some(at(5)));
        assert_eq!(step(Some(&dead), OP_INSERT, at(5), &[]), Some(RowState::born(at(5))));
    }
}
