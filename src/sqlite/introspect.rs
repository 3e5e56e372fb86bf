//! Reads what a file's schema is. Invariant: it asks SQLite (pragmas), and reads DDL text only for what no pragma
//! tells: the terms of expression indexes, conditions of partial ones, AUTOINCREMENT.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::config::DbConfig;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::{Connection, Result};

use crate::core::capture::PREFIX;
use crate::core::schema::{Affinity, Column, KeyColumn, KeyKind, ROWID_KEY, Reference, Table, UniqueIndex};
use crate::core::sqltext::{ident, index_parts, list, tokens};

/// Something in a file that is not replicated as rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualTable {
    /// Its name.
    pub name: String,
}

/// A trigger of the application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppTrigger {
    /// Its name.
    pub name: String,
    /// The table or view it is on.
    pub table: String,
    /// Its text.
    pub sql: String,
}

/// A file's schema. The numbers of tables and columns are only places in lists until a replica gives its own.
#[derive(Debug, Clone, Default)]
pub struct Schema {
    /// Ordinary tables.
    pub tables: Vec<Table>,
    /// Virtual tables.
    pub virtual_tables: Vec<VirtualTable>,
    /// Triggers of the application.
    pub triggers: Vec<AppTrigger>,
}

/// Reads the schema of a connection's main database, without our own tables and triggers.
pub fn read(conn: &Connection) -> Result<Schema> {
    let mut schema = Schema::default();
    let mut list = conn.prepare(
        "SELECT name, type, wr, strict FROM pragma_table_list WHERE schema = 'main' ORDER BY name",
    )?;
    let rows = list.query_map([], |r| {
        Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?, r.get::<_, bool>(2)?, r.get::<_, bool>(3)?))
    })?;
    for row in rows {
        let (name, kind, without_rowid, strict) = row?;
        if name.starts_with("sqlite_") || name.starts_with(PREFIX) {
            continue;
        }
        match kind.as_str() {
            "table" => schema.tables.push(read_table(conn, name, without_rowid, strict)?),
            "virtual" => schema.virtual_tables.push(VirtualTable { name }),
            _ => {}
        }
    }
    let mut list = conn.prepare(
        "SELECT name, tbl_name, sql FROM sqlite_schema WHERE type = 'trigger' AND substr(name, 1, ?2) <> ?1 ORDER BY rowid",
    )?;
    let rows = list.query_map((PREFIX, PREFIX.len() as i64), |r| {
        Ok(AppTrigger { name: r.get(0)?, table: r.get(1)?, sql: r.get(2)? })
    })?;
    schema.triggers = rows.collect::<Result<_>>()?;
    Ok(schema)
}

/// Reads one ordinary table, whosever it is.
pub fn read_table_named(conn: &Connection, name: &str) -> Result<Table> {
    let sql =
        "SELECT name, wr, strict FROM pragma_table_list WHERE schema = 'main' AND name = ?1 COLLATE NOCASE";
    let (name, without_rowid, strict) =
        conn.query_row(sql, [name], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))?;
    read_table(conn, name, without_rowid, strict)
}

/// What triggers write, as seen so far: trigger -> tables in lower case.
pub type TriggerSink = Arc<Mutex<BTreeMap<String, BTreeSet<String>>>>;

/// Runs `compile` with triggers on and an authorizer that notes, of every statement compiled, which trigger writes
/// which table. Nothing may be executed meanwhile.
pub fn with_trigger_writes<T>(conn: &Connection, compile: impl FnOnce(&TriggerSink) -> T) -> Result<T> {
    let sink = TriggerSink::default();
    let seen = Arc::clone(&sink);
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, true)?;
    conn.authorizer(Some(move |ctx: AuthContext<'_>| {
        let table = match ctx.action {
            AuthAction::Insert { table_name } | AuthAction::Delete { table_name } => Some(table_name),
            AuthAction::Update { table_name, .. } => Some(table_name),
            _ => None,
        };
        if let (Some(table), Some(trigger)) = (table, ctx.accessor) {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.entry(trigger.to_owned()).or_default().insert(table.to_lowercase());
        }
        Authorization::Allow
    }));
    let result = compile(&sink);
    conn.authorizer(None::<fn(AuthContext<'_>) -> Authorization>);
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    Ok(result)
}

/// Statements that together fire every trigger of a table when they are compiled.
pub fn firing_statements(table: &Table) -> [String; 3] {
    let name = ident(&table.name);
    let key = if table.key_kind == KeyKind::Rowid { &[][..] } else { &table.key[..] };
    let all = (table.columns.iter().map(|c| ident(&c.name))).chain(key.iter().map(|k| k.sql.clone()));
    let set = list(all, |c| format!("{c} = {c}"));
    [
        format!("INSERT INTO {name} DEFAULT VALUES"),
        format!("UPDATE {name} SET {set}"),
        format!("DELETE FROM {name}"),
    ]
}

struct RawColumn {
    name: String,
    declared: String,
    not_null: bool,
    key_place: i64,
    hidden: i64,
    has_default: bool,
}

fn read_table(conn: &Connection, name: String, without_rowid: bool, strict: bool) -> Result<Table> {
    let mut statement = conn.prepare_cached(
        "SELECT name, type, \"notnull\", pk, hidden, dflt_value IS NOT NULL FROM pragma_table_xinfo(?1)",
    )?;
    let raw = statement.query_map([&name], |r| {
        let (declared, key_place) = (r.get::<_, Option<String>>(1)?.unwrap_or_default(), r.get(3)?);
        let (hidden, has_default) = (r.get(4)?, r.get(5)?);
        Ok(RawColumn { name: r.get(0)?, declared, not_null: r.get(2)?, key_place, hidden, has_default })
    })?;
    let raw: Vec<RawColumn> = raw.collect::<Result<_>>()?;
    let indexes = read_indexes(conn, &name)?;
    let sql: String =
        conn.query_row("SELECT sql FROM sqlite_schema WHERE type = 'table' AND name = ?1", [&name], |r| {
            r.get(0)
        })?;
    let key_index = indexes.iter().find(|i| i.origin == "pk");
    let mut in_key: Vec<&RawColumn> = raw.iter().filter(|c| c.key_place > 0).collect();
    in_key.sort_by_key(|c| c.key_place);
    let key_kind = match (in_key.len(), key_index) {
        (0, _) => KeyKind::Rowid,
        (1, None) if !without_rowid => KeyKind::Integer,
        _ => KeyKind::Declared,
    };
    let key = match key_kind {
        KeyKind::Rowid => vec![rowid_column(&raw)],
        _ => in_key.iter().map(|c| key_column(c, key_index, key_kind, strict, without_rowid)).collect(),
    };
    let plain = raw.iter().filter(|c| c.key_place == 0 && c.hidden == 0).enumerate();
    let columns = plain.map(|(i, c)| Column {
        id: i as u32,
        name: c.name.clone(),
        affinity: Affinity::of(&c.declared, strict),
        not_null: c.not_null,
        has_default: c.has_default,
    });
    let columns = columns.collect();
    let generated = raw.iter().filter(|c| c.hidden > 1).map(|c| c.name.clone()).collect();
    let uniques = indexes.iter().filter(|i| i.unique && i.origin != "pk").map(Index::to_unique).collect();
    let autoincrement = tokens(&sql).iter().any(|t| t.is_keyword("AUTOINCREMENT"));
    let references = read_references(conn, &name)?;
    Ok(Table {
        id: 0,
        name,
        key_kind,
        autoincrement,
        without_rowid,
        key,
        columns,
        generated,
        uniques,
        references,
    })
}

fn read_references(conn: &Connection, table: &str) -> Result<Vec<Reference>> {
    let sql = "SELECT min(\"from\"), \"table\", min(\"to\") FROM pragma_foreign_key_list(?1)
               GROUP BY id HAVING count(*) = 1 ORDER BY id";
    let mut statement = conn.prepare_cached(sql)?;
    let rows = statement
        .query_map([table], |r| Ok(Reference { column: r.get(0)?, parent: r.get(1)?, to: r.get(2)? }))?;
    rows.collect()
}

fn rowid_column(columns: &[RawColumn]) -> KeyColumn {
    let free = |alias: &&str| !columns.iter().any(|c| c.name.eq_ignore_ascii_case(alias));
    let sql = ["_rowid_", "rowid", "oid"].into_iter().find(free).unwrap_or("_rowid_").to_owned();
    let (affinity, collation) = (Affinity::Integer, "BINARY".to_owned());
    KeyColumn { name: ROWID_KEY.to_owned(), sql, affinity, collation, nullable: false }
}

fn key_column(
    c: &RawColumn,
    index: Option<&Index>,
    kind: KeyKind,
    strict: bool,
    without_rowid: bool,
) -> KeyColumn {
    let collation = index.and_then(|i| i.columns.iter().find(|k| k.name.as_deref() == Some(&c.name)));
    KeyColumn {
        name: c.name.clone(),
        sql: ident(&c.name),
        affinity: Affinity::of(&c.declared, strict),
        collation: collation.map_or_else(|| "BINARY".to_owned(), |k| k.collation.clone()),
        nullable: kind == KeyKind::Declared && !c.not_null && !without_rowid,
    }
}

struct IndexColumn {
    /// `None` for an expression.
    name: Option<String>,
    collation: String,
}

struct Index {
    name: String,
    unique: bool,
    origin: String,
    columns: Vec<IndexColumn>,
    sql: Option<String>,
}

impl Index {
    fn to_unique(&self) -> UniqueIndex {
        let columns: Option<Vec<String>> = self.columns.iter().map(|c| c.name.clone()).collect();
        let parts = self.sql.as_deref().and_then(index_parts);
        let condition = parts.as_ref().and_then(|(_, condition)| condition.clone());
        let terms = match (&columns, parts) {
            (None, Some((terms, _))) => terms,
            _ => {
                let term = |c: &IndexColumn| {
                    let name = ident(c.name.as_deref().unwrap_or_default());
                    format!("{name} COLLATE {}", ident(&c.collation))
                };
                self.columns.iter().map(term).collect()
            }
        };
        UniqueIndex { name: self.name.clone(), terms, condition, columns }
    }
}

fn read_indexes(conn: &Connection, table: &str) -> Result<Vec<Index>> {
    let mut list = conn.prepare_cached(
        "SELECT l.name, l.\"unique\", l.origin, s.sql FROM pragma_index_list(?1) AS l
         LEFT JOIN sqlite_schema AS s ON s.type = 'index' AND s.name = l.name",
    )?;
    let mut columns =
        conn.prepare_cached("SELECT name, coll FROM pragma_index_xinfo(?1) WHERE key = 1 ORDER BY seqno")?;
    let rows = list.query_map([table], |r| {
        let name: String = r.get(0)?;
        let found =
            columns.query_map([&name], |c| Ok(IndexColumn { name: c.get(0)?, collation: c.get(1)? }))?;
        let columns = found.collect::<Result<_>>()?;
        Ok(Index { name, unique: r.get(1)?, origin: r.get(2)?, sql: r.get(3)?, columns })
    })?;
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(ddl: &str) -> Table {
        let conn = Connection::open_in_memory().unwrap();
        conn.execute_batch(ddl).unwrap();
        read(&conn).unwrap().tables.remove(0)
    }

    #[test]
    fn keys_are_recognised() {
        let kind = |ddl| table(ddl).key_kind;
        assert_eq!(kind("CREATE TABLE t(id INTEGER PRIMARY KEY, x)"), KeyKind::Integer);
        assert_eq!(kind("CREATE TABLE t(id INTEGER PRIMARY KEY DESC, x)"), KeyKind::Declared);
        assert_eq!(kind("CREATE TABLE t(id INT PRIMARY KEY, x)"), KeyKind::Declared);
        assert_eq!(kind("CREATE TABLE t(id INTEGER PRIMARY KEY, x) WITHOUT ROWID"), KeyKind::Declared);
        assert_eq!(kind("CREATE TABLE t(x, y)"), KeyKind::Rowid);
        let t = table("CREATE TABLE t(a TEXT COLLATE NOCASE, b, c, PRIMARY KEY(b, a))");
        let key: Vec<_> = t.key.iter().map(|k| (k.name.as_str(), k.collation.as_str(), k.nullable)).collect();
        assert_eq!(key, [("b", "BINARY", true), ("a", "NOCASE", true)]);
    }

    #[test]
    fn rowid_goes_by_a_name_that_no_column_has() {
        assert_eq!(table("CREATE TABLE t(_rowid_, rowid)").key[0].sql, "oid");
    }

    #[test]
    fn unique_indexes_and_generated_columns_are_read() {
        let t = table(
            "CREATE TABLE t(id INTEGER PRIMARY KEY AUTOINCREMENT, a UNIQUE, b, g AS (a || b));
             CREATE UNIQUE INDEX e ON t(lower(b)) WHERE b IS NOT NULL; CREATE INDEX plain ON t(b)",
        );
        assert!(t.autoincrement);
        assert_eq!(t.generated, ["g"]);
        let names: Vec<_> = t.uniques.iter().map(|u| (u.terms.clone(), u.columns.is_none())).collect();
        assert_eq!(names.len(), 2);
        assert!(names.contains(&(vec!["lower(b)".to_owned()], true)));
        assert!(names.contains(&(vec!["\"a\" COLLATE \"BINARY\"".to_owned()], false)));
    }
}
