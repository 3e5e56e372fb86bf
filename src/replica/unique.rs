//! UNIQUE constraints that merging would break. Invariant: of rows that cannot be together, the one with the earlier
//! (birth, key) stays, on every node; the other keeps its row without the value where it may, else it is deleted,
//! and is kept as a conflict either way.
//!
//! Rows of one commit that swap values are taken out and put in. What is done to a loser is an ordinary write of
//! this node: it goes into the log, and the next absorb tells the others.

use std::collections::{BTreeMap, VecDeque};
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

/// A row that is to be put in.
struct Placing {
    plan: Arc<Plan>,
    key: Vec<Value>,
    /// As it is to be put in.
    row: Row,
    /// As it was before it gave way in any column.
    as_it_was: Row,
    /// The columns in which it did.
    without: Vec<ColumnId>,
}

/// Rows that gave way in this transaction, as they were: number of the table and key.
type Originals = BTreeMap<(i64, Vec<Value>), Row>;

impl Store {
    /// Puts in the rows that did not go in one by one.
    pub(super) fn place_deferred(&mut self, mut deferred: Vec<Deferred>) -> Result<()> {
        for d in &deferred {
            let params = rusqlite::params_from_iter(&d.key);
            self.conn.prepare_cached(&d.plan.delete_row)?.execute(params)?;
        }
        deferred.sort_by(|a, b| (a.row.state.birth, &a.key).cmp(&(b.row.state.birth, &b.key)));
        let placing = |Deferred { plan, key, row }| Placing {
            plan,
            key,
            as_it_was: row.clone(),
            row,
            without: Vec::new(),
        };
        let mut queue: VecDeque<Placing> = deferred.into_iter().map(placing).collect();
        let mut originals = Originals::new();
        while let Some(next) = queue.pop_front() {
            self.place(next, &mut queue, &mut originals)?;
        }
        Ok(())
    }

    fn place(
        &mut self,
        mut p: Placing,
        queue: &mut VecDeque<Placing>,
        originals: &mut Originals,
    ) -> Result<()> {
        // Each round takes a row or a value out of the way, so it ends; a bound keeps a bug from spinning.
        for _ in 0..10_000 {
            let error = match self.insert_row(&p.plan, &refs(&p.key), &p.row) {
                Err(ReplicaError::Sqlite(e)) if is_unique_violation(&e) => e,
                Ok(()) if !p.without.is_empty() => {
                    return self.log_own(&p.plan, &p.key, OP_UPDATE, &p.without);
                }
                result => return result,
            };
            let ours = (p.row.state.birth, &p.key);
            let mut blockers = Vec::new();
            for key in self.blockers(&p)? {
                if let (Some(row), _) = self.local_row(&p.plan, &refs(&key))? {
                    blockers.push((key, row));
                }
            }
            let earliest =
                blockers.iter().min_by(|a, b| (a.1.state.birth, &a.0).cmp(&(b.1.state.birth, &b.0)));
            if let Some((_, winner)) = earliest.filter(|(key, row)| (row.state.birth, key) < ours) {
                if !self.give_way(&mut p, winner.state.birth, &error)? {
                    return Ok(());
                }
                continue;
            }
            for (key, row) in blockers {
                self.conn.prepare_cached(&p.plan.delete_row)?.execute(rusqlite::params_from_iter(&key))?;
                // One that gave way in a column before is kept as it was then.
                let of = (p.plan.table.id, key.clone());
                let as_it_was = originals.entry(of).or_insert_with(|| row.clone()).clone();
                let mut loser = Placing { plan: p.plan.clone(), key, row, as_it_was, without: Vec::new() };
                if self.give_way(&mut loser, p.row.state.birth, &error)? {
                    queue.push_back(loser);
                }
            }
        }
        Err(ReplicaError::Unfit(format!("rows of table {:?} cannot be put in", p.plan.table.name)))
    }

    /// A row that lost, and is not in the table: without a value it may try again; if it has none to give, it is gone.
    fn give_way(&mut self, p: &mut Placing, winner: Version, error: &rusqlite::Error) -> Result<bool> {
        let birth = p.row.state.birth;
        if let Some(column) = blamed(&p.plan, &p.row, error) {
            let mut loss = Loss::of_columns(Kind::Unique, birth, winner);
            let value = p.as_it_was.values.get(&column).unwrap_or(&Value::Null);
            loss.add(column, p.as_it_was.state.column(column), value);
            self.keep_conflict(&p.plan, &refs(&p.key), &loss)?;
            p.row.values.insert(column, Value::Null);
            p.without.push(column);
            return Ok(true);
        }
        let loss = Loss::of_row(Kind::Unique, &p.as_it_was, all_versions(&p.as_it_was), winner);
        self.keep_conflict(&p.plan, &refs(&p.key), &loss)?;
        self.log_own(&p.plan, &p.key, OP_DELETE, &[])?;
        Ok(false)
    }

    /// The keys of the rows that stand in the way: those that REPLACE would remove, in a savepoint that is undone.
    fn blockers(&mut self, d: &Placing) -> Result<Vec<Vec<Value>>> {
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

    fn displaced(&self, d: &Placing, keys: &str) -> Result<Vec<Vec<Value>>> {
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
