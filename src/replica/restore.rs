//! Bringing back what lost, as an ordinary write of an application: the triggers capture it, whether a node runs or
//! not. Invariant: all of it in one transaction, with the mark that says so, or none of it.

use rusqlite::{Connection, OptionalExtension, ffi, params_from_iter};
use serde_json::json;

use super::entry::{Entry, EntryId, RESTORED, to_json};
use super::plan::Plan;
use super::review::{Child, Conflict, Kept, conflicts};
use super::shadow::Sites;
use super::{ReplicaError, registry};
use crate::core::capture::{CONFLICTS, OP_INSERT};
use crate::core::schema::{KeyKind, Table};
use crate::core::sqltext::{ident, list};
use crate::core::value::{Value, ValueRef};
use crate::sqlite::introspect;

/// What was done.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The table.
    pub table: String,
    /// The key under which the row is now.
    pub key: Vec<Value>,
    /// Whether the row was put in; else columns of one that is there were written.
    pub inserted: bool,
    /// The columns written.
    pub columns: usize,
    /// Children that refer to the new key now.
    pub moved: usize,
    /// Children that were given another parent, or deleted, since.
    pub left: usize,
}

/// Why a conflict cannot be restored. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No such conflict any more.
    #[error("the conflict is not kept any more")]
    Gone,
    /// All of it was restored before.
    #[error("it was restored before, and nothing more of it was lost since")]
    Nothing,
    /// The table was dropped.
    #[error(
        "table {0:?} does not exist any more: create it again, or look at the values with 'conflicts show'"
    )]
    NoTable(String),
    /// The column was dropped.
    #[error("table {table:?} has no column {column:?} any more: its value is shown by 'conflicts show'")]
    NoColumn {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
    /// The row whose columns lost was deleted.
    #[error("the row with the key {key} of table {table:?} was deleted since: insert it first, then restore")]
    NoRow {
        /// The table.
        table: String,
        /// Its key.
        key: String,
    },
    /// The table keeps both rows of an id collision, and another row has the id.
    #[error("another row has the id {0} now: restore this one under a new id, with --new-id")]
    Taken(String),
    /// A new id is for rows with integer ids that lost whole.
    #[error(
        "--new-id is for a row that lost to another row of the same integer key; restore this one without it"
    )]
    NoNewId,
    /// Another row has the unique value.
    #[error("another row stands in the way ({0}): change that row first, or write the values by hand")]
    Unique(String),
    /// A constraint of the application's.
    #[error("the table does not accept the values ({0}): see 'conflicts show' and write them by hand")]
    Constraint(String),
    /// Reading what is kept.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// SQLite refused.
    #[error("SQLite: {0}")]
    Sqlite(rusqlite::Error),
}

impl From<rusqlite::Error> for RestoreError {
    fn from(error: rusqlite::Error) -> Self {
        let Some(code) = error.sqlite_error().map(|e| e.extended_code) else { return Self::Sqlite(error) };
        let text = match &error {
            rusqlite::Error::SqliteFailure(_, Some(text)) => text.clone(),
            other => other.to_string(),
        };
        match code {
            ffi::SQLITE_CONSTRAINT_UNIQUE
            | ffi::SQLITE_CONSTRAINT_PRIMARYKEY
            | ffi::SQLITE_CONSTRAINT_ROWID => Self::Unique(text),
            code if code & 0xff == ffi::SQLITE_CONSTRAINT => Self::Constraint(text),
            _ => Self::Sqlite(error),
        }
    }
}

/// Restores a conflict: under its own key, or with `new_id` under one that SQLite assigns, together with the children of
/// the row that lost. The connection is an application's: with triggers, and with foreign keys as it likes them.
pub fn restore(conn: &Connection, id: EntryId, new_id: bool, now_ms: u64) -> Result<Outcome, RestoreError> {
    conn.execute_batch("BEGIN IMMEDIATE")?;
    let result = within(conn, id, new_id, now_ms).and_then(|outcome| {
        conn.execute_batch("COMMIT")?;
        Ok(outcome)
    });
    if result.is_err() && !conn.is_autocommit() {
        conn.execute_batch("ROLLBACK")?;
    }
    result
}

fn within(conn: &Connection, id: EntryId, new_id: bool, now_ms: u64) -> Result<Outcome, RestoreError> {
    let conflict = conflicts(conn)?.into_iter().find(|c| c.id == id).ok_or(RestoreError::Gone)?;
    if !conflict.is_open() {
        return Err(RestoreError::Nothing);
    }
    let schema = introspect::read(conn)?;
    let find = |name: &str| schema.tables.iter().find(|t| t.name.eq_ignore_ascii_case(name));
    let table = find(&conflict.table).ok_or_else(|| RestoreError::NoTable(conflict.table.clone()))?;
    for (column, _) in conflict.columns.iter().filter(|(_, k)| k.lost) {
        if table.column(column).is_none() {
            return Err(RestoreError::NoColumn { table: table.name.clone(), column: column.clone() });
        }
    }
    let mut outcome = match new_id {
        true => under_new_id(conn, table, &conflict)?,
        false => under_its_key(conn, table, &conflict)?,
    };
    if new_id {
        let key = outcome.key[0].clone();
        for child in conflict.children.iter().filter(|c| !c.restored) {
            match find(&child.table) {
                Some(t) if move_child(conn, t, child, &conflict.key[0], &key)? => outcome.moved += 1,
                _ => outcome.left += 1,
            }
        }
    }
    mark(conn, &conflict, &outcome, now_ms)?;
    Ok(outcome)
}

/// What is to be written: the writes that lost, or, for a row that has to be put in, all that is kept of it.
fn values<'c>(table: &Table, conflict: &'c Conflict, all: bool) -> Vec<(&'c String, &'c Kept)> {
    let wanted = |k: &Kept| all || (k.lost && !k.restored);
    conflict.columns.iter().filter(|(name, k)| wanted(k) && table.column(name).is_some()).collect()
}

fn under_its_key(conn: &Connection, table: &Table, conflict: &Conflict) -> Result<Outcome, RestoreError> {
    let key = &conflict.key;
    let there = exists(conn, table, key)?;
    if there && !conflict.gone {
        return update(conn, table, conflict, key);
    }
    // Restored before, and more of it came later: that goes where the rest went.
    if let Some((key, _)) = conflict.restored.as_ref().filter(|_| conflict.gone)
        && exists(conn, table, key)?
    {
        return update(conn, table, conflict, key);
    }
    if there && conflict.whole_row {
        return Err(RestoreError::Taken(conflict.key_text.clone()));
    }
    if !conflict.whole_row {
        let key = conflict.key_text.clone();
        return Err(RestoreError::NoRow { table: table.name.clone(), key });
    }
    let columns = insert(conn, table, conflict, Some(key))?;
    Ok(Outcome { table: table.name.clone(), key: key.clone(), inserted: true, columns, moved: 0, left: 0 })
}

fn under_new_id(conn: &Connection, table: &Table, conflict: &Conflict) -> Result<Outcome, RestoreError> {
    let gone = conflict.gone && conflict.whole_row;
    // Both kinds of numbers SQLite assigns.
    let assigned = matches!(table.key_kind, KeyKind::Integer | KeyKind::Rowid);
    if !assigned || !(conflict.is_collision() || gone) {
        return Err(RestoreError::NoNewId);
    }
    // Restored before, and more of it came later: that goes where the rest went.
    if let Some((key, _)) = conflict.restored.as_ref().filter(|(key, _)| *key != conflict.key)
        && exists(conn, table, key)?
    {
        return update(conn, table, conflict, key);
    }
    let columns = insert(conn, table, conflict, None)?;
    let key = vec![Value::Int(conn.last_insert_rowid())];
    Ok(Outcome { table: table.name.clone(), key, inserted: true, columns, moved: 0, left: 0 })
}

fn condition(table: &Table) -> String {
    let terms = table.key.iter().enumerate().map(|(i, k)| format!("{} = ?{}", k.sql, i + 1));
    terms.collect::<Vec<_>>().join(" AND ")
}

fn exists(conn: &Connection, table: &Table, key: &[Value]) -> Result<bool, RestoreError> {
    let sql = format!("SELECT 1 FROM {} WHERE {}", ident(&table.name), condition(table));
    Ok(conn.prepare(&sql)?.exists(params_from_iter(key))?)
}

fn update(
    conn: &Connection,
    table: &Table,
    conflict: &Conflict,
    key: &[Value],
) -> Result<Outcome, RestoreError> {
    let lost = values(table, conflict, false);
    if !lost.is_empty() {
        let set = list(lost.iter().enumerate(), |(i, (name, _))| {
            format!("{} = ?{}", ident(name), table.key.len() + i + 1)
        });
        let sql = format!("UPDATE {} SET {set} WHERE {}", ident(&table.name), condition(table));
        conn.execute(&sql, params_from_iter(key.iter().chain(lost.iter().map(|(_, k)| &k.value))))?;
    }
    let (table, key) = (table.name.clone(), key.to_vec());
    Ok(Outcome { table, key, inserted: false, columns: lost.len(), moved: 0, left: 0 })
}

fn insert(
    conn: &Connection,
    table: &Table,
    conflict: &Conflict,
    key: Option<&[Value]>,
) -> Result<usize, RestoreError> {
    let kept = values(table, conflict, true);
    let key = key.unwrap_or_default();
    let names = table.key.iter().take(key.len()).map(|k| k.sql.clone());
    let names: Vec<String> = names.chain(kept.iter().map(|(name, _)| ident(name))).collect();
    let sql = match names.is_empty() {
        true => format!("INSERT INTO {} DEFAULT VALUES", ident(&table.name)),
        false => format!(
            "INSERT INTO {}({}) VALUES({})",
            ident(&table.name),
            names.join(", "),
            list(1..=names.len(), |i| format!("?{i}"))
        ),
    };
    conn.execute(&sql, params_from_iter(key.iter().chain(kept.iter().map(|(_, k)| &k.value))))?;
    Ok(kept.len())
}

/// Lets a child refer to the new key; returns false if it refers to something else since, or is gone.
fn move_child(
    conn: &Connection,
    table: &Table,
    child: &Child,
    from: &Value,
    to: &Value,
) -> Result<bool, RestoreError> {
    if child.key.len() != table.key.len() || !refers_still(conn, table, child)? {
        return Ok(false);
    }
    let column = ident(&child.column);
    let (old, new) = (table.key.len() + 1, table.key.len() + 2);
    let sql = format!(
        "UPDATE {} SET {column} = ?{new} WHERE {} AND {column} = ?{old}",
        ident(&table.name),
        condition(table)
    );
    Ok(conn.execute(&sql, params_from_iter(child.key.iter().chain([from, to])))? > 0)
}

/// Whether the child's column was not written again after it was noted whose child it is.
fn refers_still(conn: &Connection, table: &Table, child: &Child) -> Result<bool, RestoreError> {
    let Some(table) = registry::numbered(conn, table)? else { return Ok(false) };
    let column = table.column(&child.column).map(|c| c.id);
    let plan = Plan::new(table, String::new(), Vec::new());
    let key: Vec<ValueRef<'_>> = child.key.iter().map(Value::as_ref).collect();
    let state = Sites::load(conn)?.get(conn, &plan, &key)?;
    Ok(state.is_some_and(|s| column.map_or(s.birth, |c| s.column(c)) == child.version))
}

/// Says what was restored, for all nodes.
fn mark(conn: &Connection, conflict: &Conflict, outcome: &Outcome, now_ms: u64) -> Result<(), RestoreError> {
    let key: Vec<_> = outcome.key.iter().map(|v| to_json(v.as_ref())).collect();
    let entry = Entry {
        id: [0; 16],
        conflict: conflict.id,
        table: conflict.table.clone(),
        key: conflict.key_text.clone(),
        kind: RESTORED.to_owned(),
        birth: conflict.birth,
        content: json!({ "covers": conflict.marks(), "key": key }),
        winner: conflict.winner,
        at_ms: i64::try_from(now_ms).unwrap_or(i64::MAX),
    }
    .numbered();
    entry.insert(conn)?;
    let table = "SELECT id FROM __litemesh_table WHERE name = ?1";
    let table: Option<i64> = conn.query_row(table, [CONFLICTS], |r| r.get(0)).optional()?;
    if let Some(table) = table {
        let sql = "INSERT INTO __litemesh_log(tbl, op, ms, k0) VALUES(?1, ?2, julianday('now'), ?3)";
        conn.execute(sql, (table, OP_INSERT, &entry.id[..]))?;
    }
    Ok(())
}
