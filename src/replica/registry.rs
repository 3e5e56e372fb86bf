//! The numbers of tables and columns in a file. Invariant: a number never comes to mean another table or column;
//! one that was dropped and made again gets a new one, one that was renamed keeps its own.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, OptionalExtension};

use super::Result;
use super::schema::{ObjectKey, Objects, Renames};
use crate::core::capture::{PREFIX, create_state_table, state_table};
use crate::core::ddl;
use crate::core::merge::ColumnId;
use crate::core::schema::Table;
use crate::core::sqltext::ident;

/// What became of a table when it was given its number.
pub struct Registration {
    /// Whether it had one, and the same key.
    pub known: bool,
    /// Columns that had none.
    pub new_columns: Vec<ColumnId>,
}

/// Gives a table, which is known to the mesh as `ident`, and its columns their numbers, and the table its states.
pub fn register(conn: &Connection, table: &mut Table, ident: &str) -> Result<Registration> {
    let mut found = table_id(conn, &table.name)?;
    if let Some(id) = found {
        table.id = id;
        if has_other_key(conn, table)? {
            forget_table(conn, id)?;
            found = None;
        }
    }
    if found.is_none() {
        conn.execute("INSERT INTO __litemesh_table(name, ident) VALUES(?1, ?2)", (&table.name, ident))?;
        table.id = conn.last_insert_rowid();
    }
    let sql = "UPDATE __litemesh_table SET ident = ?2 WHERE id = ?1 AND ident IS NOT ?2";
    conn.execute(sql, (table.id, ident))?;
    let new_columns = register_columns(conn, table)?;
    conn.execute_batch(&create_state_table(table))?;
    Ok(Registration { known: found.is_some(), new_columns })
}

/// The table with the numbers that it and its columns go by in this file; `None` if it has none.
pub(super) fn numbered(conn: &Connection, table: &Table) -> Result<Option<Table>> {
    let mut table = table.clone();
    let Some(id) = table_id(conn, &table.name)? else { return Ok(None) };
    table.id = id;
    for column in &mut table.columns {
        let find = "SELECT pos FROM __litemesh_column WHERE tbl = ?1 AND name = ?2 COLLATE NOCASE";
        let found = conn.query_row(find, (id, &column.name), |r| r.get(0)).optional()?;
        // A column that was added just now has been written by nobody.
        column.id = found.unwrap_or(ColumnId::MAX);
    }
    Ok(Some(table))
}

/// Whether the states that are kept under the table's number have another key.
fn has_other_key(conn: &Connection, table: &Table) -> Result<bool> {
    let sql = "SELECT sql FROM sqlite_schema WHERE type = 'table' AND name = ?1";
    let found: Option<String> = conn.query_row(sql, [state_table(table)], |r| r.get(0)).optional()?;
    let wanted = create_state_table(table);
    let wanted = wanted.split(";\n").next().unwrap_or_default().replacen("IF NOT EXISTS ", "", 1);
    Ok(found.is_some_and(|f| f != wanted))
}

fn register_columns(conn: &Connection, table: &mut Table) -> Result<Vec<ColumnId>> {
    let mut statement =
        conn.prepare_cached("SELECT pos, name FROM __litemesh_column WHERE tbl = ?1 ORDER BY pos")?;
    let rows = statement.query_map([table.id], |r| Ok((r.get::<_, u32>(0)?, r.get::<_, String>(1)?)))?;
    let all: Vec<(u32, String)> = rows.collect::<rusqlite::Result<_>>()?;
    let mut next = all.last().map_or(0, |(p, _)| p + 1);
    let mut known: BTreeMap<String, u32> = all.into_iter().map(|(p, n)| (n.to_lowercase(), p)).collect();
    known.remove("");
    let mut new = Vec::new();
    for column in &mut table.columns {
        column.id = known.remove(&column.name.to_lowercase()).unwrap_or(next);
        if column.id == next {
            next += 1;
            let add = "INSERT INTO __litemesh_column(tbl, pos, name) VALUES(?1, ?2, ?3)";
            conn.execute(add, (table.id, column.id, &column.name))?;
            new.push(column.id);
        }
    }
    // What is left was dropped: its number stays taken, its name becomes free.
    for gone in known.values() {
        let sql = "UPDATE __litemesh_column SET name = '' WHERE tbl = ?1 AND pos = ?2";
        conn.execute(sql, (table.id, gone))?;
    }
    Ok(new)
}

/// Forgets the tables that are not in the file any more, with all states of their rows.
pub fn forget_missing(conn: &Connection, present: &BTreeSet<String>) -> Result<()> {
    let mut statement = conn.prepare_cached("SELECT id, name FROM __litemesh_table")?;
    let rows = statement.query_map([], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, String>(1)?)))?;
    for (id, name) in rows.collect::<rusqlite::Result<Vec<_>>>()? {
        let is_app = !name.starts_with(PREFIX) && !name.is_empty() && !name.starts_with('\0');
        if is_app && !present.contains(&name.to_lowercase()) {
            forget_table(conn, id)?;
        }
    }
    Ok(())
}

/// Forgets a table, with all states of its rows.
pub fn forget_table(conn: &Connection, id: i64) -> Result<()> {
    // The row stays, under a name that no table can have: numbers are not given twice.
    let sql = "UPDATE __litemesh_table SET name = char(0) || id, ident = NULL, told = 0 WHERE id = ?1";
    conn.execute(sql, [id])?;
    for what in ["state", "moved", "refs"] {
        conn.execute_batch(&format!("DROP TABLE IF EXISTS {PREFIX}{what}_{id}"))?;
    }
    conn.execute("DELETE FROM __litemesh_column WHERE tbl = ?1", [id])?;
    let sql = "SELECT name FROM sqlite_schema WHERE type = 'trigger' AND substr(name, 1, length(?1)) = ?1";
    let mut statement = conn.prepare(sql)?;
    let names = statement.query_map([PREFIX], |r| r.get::<_, String>(0))?;
    let suffix = format!("_{id}");
    for name in names.collect::<rusqlite::Result<Vec<_>>>()?.iter().filter(|n| n.ends_with(&suffix)) {
        conn.execute_batch(&format!("DROP TRIGGER {}", ident(name)))?;
    }
    Ok(())
}

/// Finds the tables and columns that the application renamed, and gives their numbers the new names; tells which columns.
/// SQLite takes our triggers along, and rewrites their text.
pub fn follow_renames(conn: &Connection) -> Result<Renames> {
    let mut renames = Renames::default();
    let sql = "SELECT t.id, t.name, s.tbl_name, s.name, s.sql, t.ident FROM sqlite_schema AS s, __litemesh_table AS t
               WHERE s.type = 'trigger' AND s.name IN (?1 || 'i_' || t.id, ?1 || 'u_' || t.id) ORDER BY s.name";
    let mut statement = conn.prepare_cached(sql)?;
    let mut rows = statement.query([PREFIX])?;
    let mut updates = Vec::new();
    while let Some(r) = rows.next()? {
        let (id, old, now): (i64, String, String) = (r.get(0)?, r.get(1)?, r.get(2)?);
        let (trigger, sql, ident): (String, String, Option<String>) = (r.get(3)?, r.get(4)?, r.get(5)?);
        if !trigger.starts_with(&format!("{PREFIX}u_")) {
            if !old.eq_ignore_ascii_case(&now) {
                updates.push((id, now));
            }
            continue;
        }
        for (number, name) in ddl::numbered_columns(&sql) {
            let find = "SELECT name FROM __litemesh_column WHERE tbl = ?1 AND pos = ?2 AND name <> ''";
            let known: Option<String> = conn.query_row(find, (id, number), |r| r.get(0)).optional()?;
            if let Some(known) = known.filter(|k| !k.eq_ignore_ascii_case(&name)) {
                let sql = "UPDATE __litemesh_column SET name = ?3 WHERE tbl = ?1 AND pos = ?2";
                conn.execute(sql, (id, number, &name))?;
                let ident = ident.as_deref().unwrap_or(&old);
                renames.0.insert(ObjectKey::column(ident, &known), name.to_lowercase());
            }
        }
    }
    drop(rows);
    // Two tables may have exchanged their names.
    for (id, _) in &updates {
        conn.execute("UPDATE __litemesh_table SET name = char(0) || 'r' || id WHERE id = ?1", [id])?;
    }
    for (id, name) in updates {
        rename_table(conn, id, &name)?;
    }
    Ok(renames)
}

/// Gives a table's number another name.
pub fn rename_table(conn: &Connection, id: i64, name: &str) -> Result<()> {
    let taken = "SELECT id FROM __litemesh_table WHERE name = ?1 COLLATE NOCASE AND id <> ?2";
    if let Some(other) = conn.query_row(taken, (name, id), |r| r.get(0)).optional()? {
        forget_table(conn, other)?;
    }
    conn.execute("UPDATE __litemesh_table SET name = ?2 WHERE id = ?1", (id, name))?;
    Ok(())
}

/// Gives a column's number another name.
pub fn rename_column(conn: &Connection, table: i64, old: &str, new: &str) -> Result<()> {
    let sql = "UPDATE __litemesh_column SET name = ?3 WHERE tbl = ?1 AND name = ?2 COLLATE NOCASE";
    conn.execute(sql, (table, old, new))?;
    Ok(())
}

/// Frees a column's name: the column was dropped.
pub fn forget_column(conn: &Connection, table: &str, column: &str) -> Result<()> {
    let sql = "UPDATE __litemesh_column SET name = '' WHERE name = ?2 COLLATE NOCASE
               AND tbl = (SELECT id FROM __litemesh_table WHERE name = ?1 COLLATE NOCASE)";
    conn.execute(sql, (table, column))?;
    Ok(())
}

/// The number of a table.
pub fn table_id(conn: &Connection, name: &str) -> Result<Option<i64>> {
    let find = "SELECT id FROM __litemesh_table WHERE name = ?1 COLLATE NOCASE";
    Ok(conn.query_row(find, [name], |r| r.get(0)).optional()?)
}

/// A table of the application's as this file knows it.
pub struct Local {
    /// Its number.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// What the mesh knows it as.
    pub ident: String,
}

/// The application's tables that have numbers.
pub fn local_tables(conn: &Connection) -> Result<Vec<Local>> {
    let mut statement = conn
        .prepare_cached("SELECT id, name, coalesce(ident, lower(name)) FROM __litemesh_table ORDER BY id")?;
    let rows = statement.query_map([], |r| Ok(Local { id: r.get(0)?, name: r.get(1)?, ident: r.get(2)? }))?;
    let all = rows.collect::<rusqlite::Result<Vec<_>>>()?;
    Ok(all.into_iter().filter(|t| !t.name.starts_with(PREFIX) && !t.name.starts_with('\0')).collect())
}

/// What a table's columns are called on the wire: the name, and behind a NUL the incarnation, if it is not the first.
/// The table itself goes by what the mesh knows it as.
pub fn wire_columns(objects: &Objects, ident: &str, table: &Table) -> Vec<String> {
    let wire = |name: &str| {
        with_incarnation(name, objects.get(&ObjectKey::column(ident, name)).map_or(0, |o| o.incarnation))
    };
    table.columns.iter().map(|c| wire(&c.name)).collect()
}

/// A name with its incarnation.
pub fn with_incarnation(name: &str, incarnation: i64) -> String {
    match incarnation {
        0 => name.to_owned(),
        n => format!("{name}\0{n}"),
    }
}

/// A name from the wire and its incarnation.
pub fn from_wire(name: &str) -> (&str, i64) {
    match name.split_once('\0') {
        Some((name, n)) => (name, n.parse().unwrap_or(0)),
        None => (name, 0),
    }
}
