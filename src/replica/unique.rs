//! UNIQUE constraints that merging would break. Invariant: of rows that cannot be together, the one with the earlier
//! (birth, key) stays, on every node; the other keeps its row without the value where it may, else it is deleted,
//! and is kept as a conflict either way.
//!
//! Rows of one commit that swap values are taken out and put in. What is done to a loser is an ordinary write of
//! this node: it goes into the log, and the next absorb tells the others.

use std::sync::Arc;

use super::apply::{Deferred, is_unique_violation};
use super::plan::Plan;
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::{OP_DELETE, OP_UPDATE};
use crate::core::conflict::{Kind, Loss, all_versions};
use crate::core::merge::Row;
use crate::core::schema::Column;
use crate::core::sqltext::{ident, list};
use crate::core::value::{Value, ValueRef};
use crate::core::version::Version;

fn refs(key: &[Value]) -> Vec<ValueRef<'_>> {
    key.iter().map(Value::as_ref).collect()
}

impl Store {
    /// Puts in the rows that did not go in one by one.
    pub(super) fn place_deferred(&mut self, mut deferred: Vec<Deferred>) -> Result<()> {
        for d in &deferred {
            let params = rusqlite::params_from_iter(&d.key);
            self.conn.prepare_cached(&d.plan.delete_row)?.execute(params)?;
        }
        deferred.sort_by(|a, b| (a.row.state.birth, &a.key).cmp(&(b.row.state.birth, &b.key)));
        for d in &deferred {
            self.place(d)?;
        }
        Ok(())
    }

    fn place(&mut self, d: &Deferred) -> Result<()> {
        // Each round takes one row out of the way, so it ends; a bound keeps a bug from spinning.
        for _ in 0..10_000 {
            let error = match self.insert_row(&d.plan, &refs(&d.key), &d.row) {
                Err(ReplicaError::Sqlite(e)) if is_unique_violation(&e) => e,
                result => return result,
            };
            let ours = (d.row.state.birth, &d.key);
            let mut blockers = Vec::new();
            for key in self.blockers(d)? {
                if let (Some(row), _) = self.local_row(&d.plan, &refs(&key))? {
                    blockers.push((key, row));
                }
            }
            let earliest =
                blockers.iter().min_by(|a, b| (a.1.state.birth, &a.0).cmp(&(b.1.state.birth, &b.0)));
            let Some((_, winner)) = earliest.filter(|(key, row)| (row.state.birth, key) < ours) else {
                for (key, row) in &blockers {
                    self.conn.prepare_cached(&d.plan.delete_row)?.execute(rusqlite::params_from_iter(key))?;
                    self.keep_loser(&d.plan, key, row, d.row.state.birth, &error)?;
                }
                continue;
            };
            return self.keep_loser(&d.plan, &d.key, &d.row, winner.state.birth, &error);
        }
        Err(ReplicaError::Unfit(format!("rows of table {:?} cannot be put in", d.plan.table.name)))
    }

    /// The keys of the rows that stand in the way: those that REPLACE would remove, in a savepoint that is undone.
    fn blockers(&mut self, d: &Deferred) -> Result<Vec<Vec<Value>>> {
        let keys = list(0..d.key.len(), |i| format!("k{i}"));
        let old = list(&d.plan.table.key, |k| format!("OLD.{}", k.sql));
        self.conn.execute_batch(&format!(
            "SAVEPOINT blockers; CREATE TEMP TABLE __litemesh_displaced({keys});
             CREATE TEMP TRIGGER __litemesh_displace AFTER DELETE ON main.{}
               BEGIN INSERT INTO __litemesh_displaced VALUES({old}); END;",
            ident(&d.plan.table.name)
        ))?;
        let found = self.displaced(d, &keys);
        self.conn.execute_batch("ROLLBACK TO blockers; RELEASE blockers; PRAGMA recursive_triggers = OFF")?;
        found
    }

    fn displaced(&self, d: &Deferred, keys: &str) -> Result<Vec<Vec<Value>>> {
        // Only with this setting do delete triggers fire for what REPLACE removes.
        self.conn.pragma_update(None, "recursive_triggers", true)?;
        let known = d.plan.table.columns.iter().enumerate();
        let known: Vec<(usize, &Value)> =
            known.filter_map(|(i, c)| Some((i, d.row.values.get(&c.id)?))).collect();
        let places: Vec<usize> = known.iter().map(|(i, _)| *i).collect();
        let insert = d.plan.insert_row(&places).replacen("INSERT INTO", "INSERT OR REPLACE INTO", 1);
        let params = rusqlite::params_from_iter(d.key.iter().chain(known.iter().map(|(_, v)| *v)));
        self.conn.execute(&insert, params)?;
        let mut statement = self.conn.prepare(&format!("SELECT {keys} FROM temp.__litemesh_displaced"))?;
        let rows = statement.query_map([], |r| {
            (0..d.key.len()).map(|i| crate::sqlite::value::get(r, i).map(|v| v.to_value())).collect()
        })?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Keeps a row that lost: without the value if the column may be NULL, else as a conflict only.
    fn keep_loser(
        &mut self,
        plan: &Arc<Plan>,
        key: &[Value],
        row: &Row,
        winner: Version,
        error: &rusqlite::Error,
    ) -> Result<()> {
        for column in blamed(plan, error).filter(|c| !c.not_null) {
            let mut without = row.clone();
            without.values.insert(column.id, Value::Null);
            match self.insert_row(plan, &refs(key), &without) {
                Ok(()) => {
                    let mut loss = Loss::of_columns(Kind::Unique, row.state.birth, winner);
                    let value = row.values.get(&column.id).unwrap_or(&Value::Null);
                    loss.add(column.id, row.state.column(column.id), value);
                    self.keep_conflict(plan, &refs(key), &loss)?;
                    return self.log_own(plan, key, OP_UPDATE, &[column.id]);
                }
                Err(ReplicaError::Sqlite(e)) if is_unique_violation(&e) => {}
                Err(e) => return Err(e),
            }
        }
        self.keep_conflict(plan, &refs(key), &Loss::of_row(Kind::Unique, row, all_versions(row), winner))?;
        self.log_own(plan, key, OP_DELETE, &[])
    }
}

/// The columns that SQLite names in `UNIQUE constraint failed: t.a, t.b`; none for an index on expressions.
fn blamed<'p>(plan: &'p Plan, error: &rusqlite::Error) -> impl Iterator<Item = &'p Column> {
    let text = error.to_string();
    let text = text.split_once("failed: ").map_or(String::new(), |(_, names)| names.to_owned());
    let prefix = format!("{}.", plan.table.name);
    plan.table
        .columns
        .iter()
        .filter(move |c| text.split(", ").any(|n| n.strip_prefix(&prefix) == Some(&c.name)))
}
