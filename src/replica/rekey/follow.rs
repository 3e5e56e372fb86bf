//! References follow the rows they mean. Invariant: when a transaction of ours ends, every column that refers to a
//! table that keeps both rows shows the id under which the row it means is shown.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use rusqlite::params_from_iter;

use super::links::{Link, Ref, refs_table};
use crate::core::rekey::{Incarnation, follow, resolve};
use crate::core::sqltext::{ident, list};
use crate::core::value::{Value, ValueRef};
use crate::core::version::{Hlc, Version};
use crate::replica::Result;
use crate::replica::apply::{Deferred, is_unique_violation};
use crate::replica::plan::Plan;
use crate::replica::store::Store;
use crate::sqlite::value::get;

/// Rows whose references may have to be shown differently, by table; with the ids that references have shown since
/// the transaction began.
pub(in crate::replica) type Moves = HashMap<(i64, Incarnation), BTreeSet<i64>>;

/// A row that a column refers to.
pub(in crate::replica) struct Meant {
    /// Which one.
    pub incarnation: Incarnation,
    /// The id under which it is shown.
    pub shown: i64,
}

const SCRATCH: &str = "CREATE TEMP TABLE IF NOT EXISTS __litemesh_moves(id INTEGER PRIMARY KEY);
    DELETE FROM temp.__litemesh_moves";

impl Store {
    /// Notes under which ids references to a row are shown, before it moves or gets a successor. One that leads by
    /// a row that did so in this transaction may still be shown as it was before.
    pub(super) fn touch(&mut self, plan: &Plan, link: &Link, incarnation: Incarnation) -> Result<()> {
        if link.children.is_empty() || link.is_fixed(incarnation.birth) {
            return Ok(());
        }
        let mut path = Vec::new();
        let target = follow(&mut self.looking(plan, link), incarnation, |i| path.push(i))?;
        let before = path.iter().filter_map(|i| self.moves.get(&(plan.table.id, *i))).flatten();
        let shown: BTreeSet<i64> = before.copied().chain([target.id]).collect();
        self.moves.entry((plan.table.id, incarnation)).or_default().extend(shown);
        Ok(())
    }

    /// Notes that something here refers to a row that is not.
    pub(super) fn wait_for(&mut self, plan: &Plan, parent: Incarnation, shown: i64) -> Result<()> {
        let site = self.sites.index(&self.conn, parent.birth.site)?;
        let sql =
            "INSERT OR IGNORE INTO __litemesh_waiting(tbl, origin, bh, bs, shown) VALUES(?1, ?2, ?3, ?4, ?5)";
        let birth = parent.birth.hlc.0 as i64;
        self.conn.prepare_cached(sql)?.execute([plan.table.id, parent.origin, birth, site, shown])?;
        Ok(())
    }

    /// Has every reference show the right id again.
    pub(in crate::replica) fn follow_moves(&mut self, deferred: &mut Vec<Deferred>) -> Result<()> {
        if self.links.is_empty() {
            return Ok(());
        }
        let mut stale: BTreeMap<i64, BTreeSet<i64>> = BTreeMap::new();
        for ((table, incarnation), shown) in std::mem::take(&mut self.moves) {
            let Some((plan, link)) = self.linked(table) else { continue };
            let now = resolve(&mut self.looking(&plan, &link), incarnation)?.id;
            stale.entry(table).or_default().extend(shown.into_iter().filter(|id| *id != now));
        }
        self.look_at_waiting(&mut stale)?;
        for (table, ids) in stale {
            if let Some((_, link)) = self.linked(table).filter(|_| !ids.is_empty()) {
                self.repoint(table, &link, &ids, deferred)?;
            }
        }
        for d in deferred {
            if let Some((_, link)) = self.linked(d.plan.table.id) {
                let key: Vec<ValueRef<'_>> = d.key.iter().map(Value::as_ref).collect();
                for (column, parent) in link.read_refs(&self.conn, &self.sites, &key)? {
                    let id = self.shown_ref(&link, column, parent)?;
                    d.row.values.insert(column, Value::Int(id));
                }
            }
        }
        Ok(())
    }

    fn linked(&self, table: i64) -> Option<(Arc<Plan>, Arc<Link>)> {
        let plan = self.plans.iter().find(|p| p.table.id == table)?;
        Some((plan.clone(), self.links.get(&table)?.clone()))
    }

    /// Rows that something refers to and that were not here: those that have come, and those whose place would be
    /// another one now.
    fn look_at_waiting(&mut self, stale: &mut BTreeMap<i64, BTreeSet<i64>>) -> Result<()> {
        for (table, parent, shown) in self.waiting()? {
            let Some((plan, link)) = self.linked(table) else { continue };
            let now = resolve(&mut self.looking(&plan, &link), parent)?;
            if now.id != shown {
                stale.entry(table).or_default().insert(shown);
            }
            let site = self.sites.index(&self.conn, parent.birth.site)?;
            let key = [table, parent.origin, parent.birth.hlc.0 as i64, site, shown];
            let sql = "DELETE FROM __litemesh_waiting
                       WHERE tbl = ?1 AND origin = ?2 AND bh = ?3 AND bs = ?4 AND shown = ?5";
            self.conn.prepare_cached(sql)?.execute(key)?;
            if !now.known {
                self.wait_for(&plan, parent, now.id)?;
            }
        }
        Ok(())
    }

    fn waiting(&self) -> Result<Vec<(i64, Incarnation, i64)>> {
        let mut statement =
            self.conn.prepare_cached("SELECT tbl, origin, bh, bs, shown FROM __litemesh_waiting")?;
        let rows = statement.query_map([], |r| {
            let birth = Version { hlc: Hlc(r.get::<_, i64>(2)? as u64), site: self.sites.site(r.get(3)?)? };
            Ok((r.get(0)?, Incarnation { origin: r.get(1)?, birth }, r.get(4)?))
        })?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Looks at all references that show one of these ids. There may be no index for it, and there are as many ids as
    /// a commit or a peer's pages bring: one look through each table that refers.
    fn repoint(
        &mut self,
        parent: i64,
        link: &Link,
        ids: &BTreeSet<i64>,
        deferred: &mut Vec<Deferred>,
    ) -> Result<()> {
        self.conn.execute_batch(SCRATCH)?;
        let mut add = self.conn.prepare_cached("INSERT INTO temp.__litemesh_moves(id) VALUES(?1)")?;
        ids.iter().try_for_each(|id| add.execute([id]).map(|_| ()))?;
        drop(add);
        for (child, at) in &link.children {
            let Some(its) = self.links.get(&child.table.id).cloned() else { continue };
            let column = &child.table.columns[*at];
            debug_assert!(its.refs.iter().any(|r| r.column == column.id && r.parent.table.id == parent));
            let sql = format!(
                "SELECT {}, {name} FROM {} WHERE {name} IN (SELECT id FROM temp.__litemesh_moves)",
                list(&child.table.key, |k| k.sql.clone()),
                ident(&child.table.name),
                name = ident(&column.name),
            );
            let keys = child.table.key.len();
            let mut rows = self.read_all(&sql, keys + 1)?;
            for row in &mut rows {
                let shown = row.pop();
                let key: Vec<ValueRef<'_>> = row.iter().map(Value::as_ref).collect();
                let refs = its.read_refs(&self.conn, &self.sites, &key)?;
                let Some(meant) = refs.get(&column.id) else { continue };
                let id = Value::Int(self.shown_ref(&its, column.id, *meant)?);
                if shown.as_ref() != Some(&id) {
                    self.show_ref(child, *at, row, &id, deferred)?;
                }
            }
        }
        Ok(())
    }

    fn read_all(&self, sql: &str, width: usize) -> Result<Vec<Vec<Value>>> {
        let mut statement = self.conn.prepare_cached(sql)?;
        let rows =
            statement.query_map([], |r| (0..width).map(|i| get(r, i).map(|v| v.to_value())).collect())?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    fn show_ref(
        &mut self,
        child: &Arc<Plan>,
        at: usize,
        key: &[Value],
        id: &Value,
        deferred: &mut Vec<Deferred>,
    ) -> Result<()> {
        let params = params_from_iter(key.iter().chain([id]));
        match self.conn.prepare_cached(&child.update_row(&[at]))?.execute(params) {
            Err(e) if is_unique_violation(&e) => {}
            result => return Ok(result.map(|_| ())?),
        }
        let refs: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
        if let (Some(mut row), true) = self.local_row(child, &refs)? {
            self.conn.prepare_cached(&child.delete_row)?.execute(params_from_iter(key))?;
            row.values.insert(child.table.columns[at].id, id.clone());
            deferred.push(Deferred { plan: child.clone(), key: key.to_vec(), row });
        }
        Ok(())
    }

    /// What a row's columns refer to, by their places in the table.
    pub(in crate::replica) fn meant(
        &self,
        plan: &Plan,
        key: &[ValueRef<'_>],
    ) -> Result<BTreeMap<usize, Meant>> {
        let mut meant = BTreeMap::new();
        let Some(link) = self.links.get(&plan.table.id) else { return Ok(meant) };
        for (column, incarnation) in link.read_refs(&self.conn, &self.sites, key)? {
            let Some(reference) = link.refs.iter().find(|r| r.column == column) else { continue };
            let Some(its) = self.links.get(&reference.parent.table.id) else { continue };
            let shown = resolve(&mut self.looking(&reference.parent, its), incarnation)?.id;
            meant.insert(reference.at, Meant { incarnation, shown });
        }
        Ok(meant)
    }

    /// Whether a table keeps both rows of an id collision.
    pub(in crate::replica) fn keeps_both(&self, plan: &Plan) -> bool {
        self.links.get(&plan.table.id).is_some_and(|l| l.keeps_both)
    }

    /// References that do not show the id of the row they mean, each for people; there must be none after any
    /// transaction of ours.
    pub fn stale_references(&mut self) -> Result<Vec<String>> {
        let mut stale = Vec::new();
        for plan in self.plans.clone() {
            let Some(link) = self.links.get(&plan.table.id).filter(|l| !l.refs.is_empty()).cloned() else {
                continue;
            };
            let keys = plan.table.key.len();
            let sql = format!(
                "SELECT {}, {} FROM {}",
                list(&plan.table.key, |k| k.sql.clone()),
                list(&link.refs, |r| ident(&plan.table.columns[r.at].name)),
                ident(&plan.table.name),
            );
            for row in self.read_all(&sql, keys + link.refs.len())? {
                let key: Vec<ValueRef<'_>> = row[..keys].iter().map(Value::as_ref).collect();
                let refs = link.read_refs(&self.conn, &self.sites, &key)?;
                for (reference, shown) in link.refs.iter().zip(&row[keys..]) {
                    let Some(meant) = refs.get(&reference.column) else { continue };
                    let id = self.shown_ref(&link, reference.column, *meant)?;
                    if *shown != Value::Int(id) {
                        let table = &plan.table.name;
                        stale.push(format!(
                            "{table} {:?}: {meant:?} is {id}, shown is {shown:?}",
                            &row[..keys]
                        ));
                    }
                }
            }
        }
        Ok(stale)
    }

    /// The rows that refer, by these columns, to rows that may be shown under another id some day.
    pub(super) fn shown_refs(&self, plan: &Plan, columns: &[u32]) -> Result<Vec<(Vec<Value>, Vec<u32>)>> {
        let Some(link) = self.links.get(&plan.table.id) else { return Ok(Vec::new()) };
        let keys = plan.table.key.len();
        let refs: Vec<&Ref> = link.refs.iter().filter(|r| columns.contains(&r.column)).collect();
        let sql = format!(
            "SELECT {}, {} FROM {}",
            list(&plan.table.key, |k| k.sql.clone()),
            list(&refs, |r| ident(&plan.table.columns[r.at].name)),
            ident(&plan.table.name),
        );
        let mut found = Vec::new();
        for mut row in self.read_all(&sql, keys + refs.len())? {
            let mut of_it = Vec::new();
            for (reference, value) in refs.iter().zip(&row[keys..]) {
                if self.parent_shown_as(reference, value.as_ref())?.is_some() {
                    of_it.push(reference.column);
                }
            }
            if !of_it.is_empty() {
                row.truncate(keys);
                found.push((row, of_it));
            }
        }
        Ok(found)
    }

    /// Forgets what these columns of a table referred to.
    pub(super) fn forget_refs(&mut self, plan: &Plan, columns: &[u32]) -> Result<()> {
        let Some(link) = self.links.get(&plan.table.id).cloned() else { return Ok(()) };
        let keys = plan.table.key.len();
        let sql = format!("SELECT {} FROM {}", list(0..keys, |i| format!("k{i}")), refs_table(&plan.table));
        for key in self.read_all(&sql, keys)? {
            let key: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
            let mut refs = link.read_refs(&self.conn, &self.sites, &key)?;
            refs.retain(|column, _| !columns.contains(column));
            link.write_refs(&self.conn, &mut self.sites, &key, &refs)?;
        }
        Ok(())
    }
}
