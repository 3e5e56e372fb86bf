//! UNIQUE constraints that merging would break. Invariant: of rows that cannot be together, the one with the earlier
//! (birth, key) stays, on every node; the other keeps its row without the value where it may, else it is deleted,
//! and is kept as a conflict either way.
//!
//! Rows of one commit that swap values are taken out and put in. What is done to a loser is an ordinary write of
//! this node: it goes into the log, and the next absorb tells the others.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::apply::{Deferred, is_unique_violation};
use super::plan::Plan;
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::{OP_DELETE, OP_UPDATE};
use crate::core::conflict::{Kind, Loss, all_versions};
use crate::core::merge::{ColumnId, Row};
use crate::core::schema::Column;
use crate::core::sqltext::{ident, list, tokens};
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
        let mut row = d.row.clone();
        let (mut without, mut seen) = (Vec::new(), BTreeMap::new());
        // Each round takes a row or a value out of the way, so it ends; a bound keeps a bug from spinning.
        for _ in 0..10_000 {
            let error = match self.insert_row(&d.plan, &refs(&d.key), &row) {
                Err(ReplicaError::Sqlite(e)) if is_unique_violation(&e) => e,
                Ok(()) if !without.is_empty() => return self.log_own(&d.plan, &d.key, OP_UPDATE, &without),
                result => return result,
            };
            let ours = (row.state.birth, &d.key);
            let mut blockers = Vec::new();
            for key in self.blockers(d, &row)? {
                if let (Some(row), _) = self.local_row(&d.plan, &refs(&key))? {
                    // One that gave way in one column before is kept as it was.
                    let as_it_was: &Row = seen.entry(key.clone()).or_insert_with(|| row.clone());
                    blockers.push((key, row, as_it_was.clone()));
                }
            }
            let earliest =
                blockers.iter().min_by(|a, b| (a.1.state.birth, &a.0).cmp(&(b.1.state.birth, &b.0)));
            let Some((_, winner, _)) = earliest.filter(|(key, row, _)| (row.state.birth, key) < ours) else {
                for (key, row, as_it_was) in &blockers {
                    self.conn.prepare_cached(&d.plan.delete_row)?.execute(rusqlite::params_from_iter(key))?;
                    self.give_way(&d.plan, key, (row, as_it_was), d.row.state.birth, &error)?;
                }
                continue;
            };
            let winner = winner.state.birth;
            match blamed(&d.plan, &row, &error) {
                Some(column) => {
                    self.keep_value(&d.plan, &d.key, &d.row, column, winner)?;
                    row.values.insert(column, Value::Null);
                    without.push(column);
                }
                None => return self.keep_row(&d.plan, &d.key, &d.row, winner),
            }
        }
        Err(ReplicaError::Unfit(format!("rows of table {:?} cannot be put in", d.plan.table.name)))
    }

    /// The keys of the rows that stand in the way: those that REPLACE would remove, in a savepoint that is undone.
    fn blockers(&mut self, d: &Deferred, row: &Row) -> Result<Vec<Vec<Value>>> {
        let keys = list(0..d.key.len(), |i| format!("k{i}"));
        let old = list(&d.plan.table.key, |k| format!("OLD.{}", k.sql));
        self.conn.execute_batch(&format!(
            "SAVEPOINT blockers; CREATE TEMP TABLE __litemesh_displaced({keys});
             CREATE TEMP TRIGGER __litemesh_displace AFTER DELETE ON main.{}
               BEGIN INSERT INTO __litemesh_displaced VALUES({old}); END;",
            ident(&d.plan.table.name)
        ))?;
        let found = self.displaced(d, row, &keys);
        self.conn.execute_batch("ROLLBACK TO blockers; RELEASE blockers; PRAGMA recursive_triggers = OFF")?;
        found
    }

    fn displaced(&self, d: &Deferred, row: &Row, keys: &str) -> Result<Vec<Vec<Value>>> {
        // Only with this setting do delete triggers fire for what REPLACE removes.
        self.conn.pragma_update(None, "recursive_triggers", true)?;
        let known = d.plan.table.columns.iter().enumerate();
        let known: Vec<(usize, &Value)> =
            known.filter_map(|(i, c)| Some((i, row.values.get(&c.id)?))).collect();
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

    /// A row that is taken out of the way comes back without a value, if that can be; else it is gone.
    fn give_way(
        &mut self,
        plan: &Arc<Plan>,
        key: &[Value],
        (row, as_it_was): (&Row, &Row),
        winner: Version,
        error: &rusqlite::Error,
    ) -> Result<()> {
        let Some(column) = blamed(plan, row, error) else {
            return self.keep_row(plan, key, as_it_was, winner);
        };
        let mut without = row.clone();
        without.values.insert(column, Value::Null);
        match self.insert_row(plan, &refs(key), &without) {
            Ok(()) => {
                self.keep_value(plan, key, as_it_was, column, winner)?;
                self.log_own(plan, key, OP_UPDATE, &[column])
            }
            // Without the value another index takes it in.
            Err(ReplicaError::Sqlite(e)) if is_unique_violation(&e) => {
                self.keep_row(plan, key, as_it_was, winner)
            }
            Err(e) => Err(e),
        }
    }

    fn keep_value(
        &mut self,
        plan: &Plan,
        key: &[Value],
        row: &Row,
        column: ColumnId,
        winner: Version,
    ) -> Result<()> {
        let mut loss = Loss::of_columns(Kind::Unique, row.state.birth, winner);
        loss.add(column, row.state.column(column), row.values.get(&column).unwrap_or(&Value::Null));
        self.keep_conflict(plan, &refs(key), &loss)
    }

    /// The row is not in the table any more.
    fn keep_row(&mut self, plan: &Plan, key: &[Value], row: &Row, winner: Version) -> Result<()> {
        self.keep_conflict(plan, &refs(key), &Loss::of_row(Kind::Unique, row, all_versions(row), winner))?;
        self.log_own(plan, key, OP_DELETE, &[])
    }
}

/// The column that may become NULL so that the row fits: the first of the index that SQLite names, as in
/// `UNIQUE constraint failed: t.a, t.b`, or `index 'i'` for one on expressions.
fn blamed(plan: &Plan, row: &Row, error: &rusqlite::Error) -> Option<ColumnId> {
    let text = error.to_string();
    let text = text.split_once("failed: ").map_or("", |(_, names)| names);
    let prefix = format!("{}.", plan.table.name);
    let index = text.strip_prefix("index '").and_then(|t| t.strip_suffix('\''));
    let index = index.and_then(|name| plan.table.uniques.iter().find(|u| u.name == name));
    let named = |c: &&Column| match index {
        Some(index) => index.terms.iter().any(|term| mentions(term, &c.name)),
        None => text.split(", ").any(|n| n.strip_prefix(&prefix) == Some(&c.name)),
    };
    let filled = |c: &&Column| row.values.get(&c.id).is_some_and(|v| *v != Value::Null);
    plan.table.columns.iter().filter(|c| !c.not_null).filter(filled).find(named).map(|c| c.id)
}

/// Whether an expression has the column's name in it.
fn mentions(term: &str, column: &str) -> bool {
    tokens(term).iter().any(|t| t.name().eq_ignore_ascii_case(column))
}
