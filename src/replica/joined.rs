//! A file with rows of its own joins a mesh: its rows are laid aside while it takes the mesh's, and put on top of them.
//! Invariant: they stay laid aside, in the file, until one transaction has made each of them a row of the mesh or a
//! conflict that is kept.

use rusqlite::Connection;

use super::ReplicaError;
use super::Result;
use super::apply::is_unique_violation;
use super::plan::Plan;
use super::store::Store;
use crate::core::capture::{OP_INSERT, PREFIX};
use crate::core::conflict::{Kind, Loss, all_versions};
use crate::core::merge::{Row, RowState};
use crate::core::schema::Table;
use crate::core::sqltext::{ident, list};
use crate::core::value::{Value, ValueRef};
use crate::core::version::Version;
use crate::sqlite::value::get;

/// The key of the tables whose rows are laid aside, in their order from 1 on.
pub(super) const OURS: &str = "laid_aside";

/// What uniting came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Joined {
    /// Rows that are rows of the mesh now.
    pub rows: u64,
    /// Rows that are kept as conflicts.
    pub conflicts: u64,
}

/// Lays the rows of a table aside and empties it. Within a transaction.
pub(super) fn keep_rows(conn: &Connection, table: &Table, number: usize) -> Result<()> {
    let keys = table.key.iter().enumerate().map(|(i, k)| format!("{} AS k{i}", k.sql));
    let columns = table.columns.iter().enumerate().map(|(i, c)| format!("{} AS c{i}", ident(&c.name)));
    let all = list(keys.chain(columns), |c| c);
    let name = ident(&table.name);
    conn.execute_batch(&format!(
        "CREATE TABLE main.{PREFIX}ours_{number} AS SELECT {all} FROM main.{name}; DELETE FROM main.{name}"
    ))?;
    Ok(())
}

impl Store {
    /// Puts the rows that were laid aside when the file joined on top of the mesh's, if there are any.
    pub fn unite_kept(&mut self) -> Result<Joined> {
        let kept: Option<String> = Self::meta(&self.conn, OURS)?;
        let tables: Vec<String> = kept.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
        let mut joined = Joined::default();
        if tables.is_empty() {
            return Ok(joined);
        }
        self.write(|store| {
            store.absorb_pending()?;
            let hlc = store.head.hlc.tick(0);
            store.head.hlc = hlc;
            store.save_clock()?;
            let version = Version { hlc, site: store.head.site };
            for (i, table) in tables.iter().enumerate() {
                let plan = store.plan(table).ok_or_else(|| ReplicaError::NoTable(table.clone()))?;
                let name = format!("{PREFIX}ours_{}", i + 1);
                store.unite_table(&plan, &name, version, &mut joined)?;
                store.conn.execute_batch(&format!("DROP TABLE {name}"))?;
            }
            store.conn.execute("DELETE FROM __litemesh_meta WHERE key = ?1", [OURS])?;
            Ok(joined)
        })
    }

    fn unite_table(&mut self, plan: &Plan, from: &str, version: Version, joined: &mut Joined) -> Result<()> {
        let (keys, columns) = (plan.table.key.len(), plan.table.columns.len());
        let sql = format!("SELECT * FROM {from} WHERE rowid > ?1 ORDER BY rowid LIMIT 1000");
        let mut after = 0;
        loop {
            let mut batch = Vec::new();
            let mut statement = self.conn.prepare(&sql)?;
            let mut rows = statement.query([after])?;
            while let Some(row) = rows.next()? {
                let all = (0..keys + columns).map(|i| Ok(get(row, i)?.to_value()));
                batch.push(all.collect::<rusqlite::Result<Vec<Value>>>()?);
            }
            drop(rows);
            drop(statement);
            if batch.is_empty() {
                return Ok(());
            }
            // Numbered by SQLite from 1 on, without gaps.
            after += batch.len() as i64;
            for mut all in batch {
                let values = all.split_off(keys);
                let values = plan.table.columns.iter().map(|c| c.id).zip(values).collect();
                self.unite_row(plan, &all, Row { state: RowState::born(version), values }, joined)?;
            }
        }
    }

    fn unite_row(&mut self, plan: &Plan, key: &[Value], row: Row, joined: &mut Joined) -> Result<()> {
        let refs: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
        let (kind, winner) = match self.local_row(plan, &refs)? {
            (Some(there), true) if there.values == row.values => return Ok(()),
            (Some(there), true) => (Kind::Row, there.state.birth),
            _ => match self.insert_row(plan, &refs, &row) {
                Ok(()) => {
                    joined.rows += 1;
                    return self.log_own(plan, key, OP_INSERT, &[]);
                }
                Err(ReplicaError::Sqlite(e)) if is_unique_violation(&e) => (Kind::Unique, Version::ZERO),
                Err(e) => return Err(e),
            },
        };
        joined.conflicts += 1;
        self.keep_conflict(plan, &refs, &Loss::of_row(kind, &row, all_versions(&row), winner))
    }
}
