//! The triggers and tables that litemesh puts into an application's file. Invariant: they work in any connection:
//! no extension, `trusted_schema=OFF`, and nothing newer than SQLite 3.8.2.

use super::schema::{Affinity, KeyKind, MASK_BITS, Table, UniqueIndex};
use super::sqltext::{ident, list, with_row};

/// What everything of ours in a file is called.
pub const PREFIX: &str = "__litemesh_";
/// The format of our tables in a file.
pub const FILE_FORMAT: i64 = 1;

/// A row was inserted.
pub const OP_INSERT: i64 = 1;
/// Columns of a row were changed: those in the mask.
pub const OP_UPDATE: i64 = 2;
/// A row was deleted.
pub const OP_DELETE: i64 = 3;
/// A row may have been displaced by REPLACE, for which no trigger fires.
pub const OP_SUSPECT: i64 = 4;
/// A row was taken out because another is the same (`core::rekey`); only litemesh itself logs it.
pub const OP_TWIN: i64 = 5;
/// A row is told again as it is, for a node that lacks it; only litemesh itself logs it.
pub const OP_TELL: i64 = 6;

/// Our tables that do not depend on the application's.
pub const TABLES: &str = "
CREATE TABLE IF NOT EXISTS __litemesh_meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS __litemesh_clock(id INTEGER PRIMARY KEY, hlc INTEGER NOT NULL, lsn INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS __litemesh_site(idx INTEGER PRIMARY KEY, site INTEGER NOT NULL UNIQUE,
  n INTEGER NOT NULL, hlc INTEGER NOT NULL, id INTEGER NOT NULL, node TEXT);
CREATE TABLE IF NOT EXISTS __litemesh_peer(site INTEGER PRIMARY KEY, lsn INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS __litemesh_table(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, ident TEXT,
  told INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS __litemesh_column(tbl INTEGER NOT NULL, pos INTEGER NOT NULL, name TEXT NOT NULL,
  PRIMARY KEY(tbl, pos)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS __litemesh_log(seq INTEGER PRIMARY KEY, tbl, op, ms, m0, k0);
CREATE TABLE IF NOT EXISTS __litemesh_conflicts(id BLOB PRIMARY KEY, conflict BLOB NOT NULL, tbl TEXT NOT NULL,
  key TEXT NOT NULL, kind TEXT NOT NULL, birth TEXT NOT NULL, loser TEXT NOT NULL, winner TEXT NOT NULL,
  at_ms INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS __litemesh_option(tbl TEXT NOT NULL, what TEXT NOT NULL, value TEXT NOT NULL,
  PRIMARY KEY(tbl, what)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS __litemesh_schema(kind TEXT NOT NULL, tbl TEXT NOT NULL, name TEXT NOT NULL,
  gen INTEGER NOT NULL, gone INTEGER NOT NULL, pos INTEGER NOT NULL, def TEXT NOT NULL, moved TEXT, owner TEXT,
  PRIMARY KEY(kind, tbl, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS __litemesh_member(node TEXT PRIMARY KEY NOT NULL, vector BLOB NOT NULL,
  heard_ms INTEGER NOT NULL) WITHOUT ROWID;
";
/// Indexes of those.
pub const INDEXES: &str = "
CREATE INDEX IF NOT EXISTS __litemesh_conflicts_of ON __litemesh_conflicts(tbl COLLATE NOCASE, kind, key);
";

/// Tables of ours that replicate like the application's, without triggers: what writes them logs it.
pub const REPLICATED: [&str; 3] = [SCHEMA, OPTIONS, CONFLICTS];
/// What the application's tables, columns, indexes, views and triggers are: the schema as it replicates.
pub const SCHEMA: &str = "__litemesh_schema";
/// What all nodes do alike with a table.
pub const OPTIONS: &str = "__litemesh_option";
/// Where the writes that lost are kept.
pub const CONFLICTS: &str = "__litemesh_conflicts";

/// The name of the table that holds the row states of `table`.
pub fn state_table(table: &Table) -> String {
    format!("{PREFIX}state_{}", table.id)
}

/// The table of row states, and its index by lsn.
pub fn create_state_table(table: &Table) -> String {
    let name = state_table(table);
    let rest =
        "bh INTEGER NOT NULL, bs INTEGER NOT NULL, dh INTEGER, ds INTEGER, cols BLOB, lsn INTEGER NOT NULL";
    let body = if table.key_kind == KeyKind::Declared {
        let key = table.key.iter().enumerate();
        let columns =
            list(key.clone(), |(i, k)| format!("k{i} {} COLLATE {}", k.affinity.sql(), ident(&k.collation)));
        format!("({columns}, {rest}, PRIMARY KEY({})) WITHOUT ROWID", list(key, |(i, _)| format!("k{i}")))
    } else {
        format!("(k0 INTEGER PRIMARY KEY, {rest})")
    };
    format!(
        "CREATE TABLE IF NOT EXISTS {name}{body};\nCREATE INDEX IF NOT EXISTS {name}_lsn ON {name}(lsn);\n\
         CREATE INDEX IF NOT EXISTS {name}_dead ON {name}(lsn) WHERE dh IS NOT NULL;"
    )
}

/// The triggers of one table: name and text.
pub fn triggers(table: &Table) -> Vec<(String, String)> {
    let mut out = vec![insert_trigger(table), delete_trigger(table), key_trigger(table)];
    if !table.columns.is_empty() {
        out.push(update_trigger(table));
    }
    if !table.uniques.is_empty() {
        out.extend(displace_triggers(table));
    }
    out
}

fn trigger_name(table: &Table, what: &str) -> String {
    format!("{PREFIX}{what}_{}", table.id)
}

/// `julianday` is in every SQLite and cheap; absorb makes milliseconds of it.
const NOW: &str = "julianday('now')";

fn append(table: &Table, op: i64, row: &str) -> String {
    let columns = list(0..table.key.len(), |i| format!("k{i}"));
    let values = list(&table.key, |k| format!("{row}.{}", k.sql));
    format!("INSERT INTO {PREFIX}log(tbl, op, ms, {columns}) VALUES({}, {op}, {NOW}, {values});", table.id)
}

fn insert_trigger(table: &Table) -> (String, String) {
    let name = trigger_name(table, "i");
    let sql = format!(
        "CREATE TRIGGER {name} AFTER INSERT ON {} BEGIN {} END",
        ident(&table.name),
        append(table, OP_INSERT, "NEW")
    );
    (name, sql)
}

fn delete_trigger(table: &Table) -> (String, String) {
    let name = trigger_name(table, "d");
    let sql = format!(
        "CREATE TRIGGER {name} AFTER DELETE ON {} BEGIN {} END",
        ident(&table.name),
        append(table, OP_DELETE, "OLD")
    );
    (name, sql)
}

/// A change of the key: the old row is gone, the new one was inserted. It costs other updates nothing.
fn key_trigger(table: &Table) -> (String, String) {
    let name = trigger_name(table, "k");
    let mut columns: Vec<String> = table.key.iter().map(|k| k.sql.clone()).collect();
    if table.key_kind != KeyKind::Declared {
        columns.extend(["rowid", "_rowid_", "oid"].map(str::to_owned));
        columns.dedup();
    }
    let changed: Vec<_> =
        table.key.iter().map(|k| format!("OLD.{0} IS NOT NEW.{0} COLLATE BINARY", k.sql)).collect();
    let sql = format!(
        "CREATE TRIGGER {name} AFTER UPDATE OF {} ON {} WHEN {} BEGIN {} {} END",
        columns.join(", "),
        ident(&table.name),
        changed.join(" OR "),
        append(table, OP_DELETE, "OLD"),
        append(table, OP_INSERT, "NEW")
    );
    (name, sql)
}

/// Whether a column's value changed. `IS NOT` follows collations and calls 1 and 1.0 the same, so the comparison is
/// made binary, and types are compared where the column can hold different ones.
fn column_changed(name: &str, affinity: Affinity) -> String {
    let c = ident(name);
    let differs = format!("OLD.{c} IS NOT NEW.{c} COLLATE BINARY");
    let zero = format!("(NEW.{c} = 0 AND typeof(NEW.{c}) = 'real')");
    match affinity {
        Affinity::Blob => format!("({differs} OR typeof(OLD.{c}) IS NOT typeof(NEW.{c}) OR {zero})"),
        _ => format!("({differs})"),
    }
}

/// Sources of NULL under the names of columns that an ALTER TABLE may take away, for `rows` such as OLD and NEW. SQLite
/// looks a name up from the inside out: while the column is there, an expression in a subquery of its own finds it in
/// the row; when it is gone, it finds the NULL here. Without this, SQLite refuses DROP COLUMN because of our triggers,
/// and one that got by would fail each later write. `__litemesh_clock` always has exactly one row.
fn fallback(columns: &[&str], rows: &[&str]) -> String {
    let nulls = if columns.is_empty() {
        "NULL".to_owned()
    } else {
        list(columns, |c| format!("NULL AS {}", ident(c)))
    };
    list(rows, |r| format!("(SELECT {nulls} FROM {PREFIX}clock) AS {r}"))
}

fn update_trigger(table: &Table) -> (String, String) {
    let name = trigger_name(table, "u");
    let mut masks = vec![Vec::new(); table.mask_count()];
    for c in &table.columns {
        let (word, bit) = (c.id as usize / MASK_BITS, c.id as usize % MASK_BITS);
        // The number in the comment stays when SQLite rewrites the names: so a column that was renamed is known again.
        let changed = format!("/*{}*/ {}", c.id, column_changed(&c.name, c.affinity));
        let text = if bit == 0 { changed } else { format!("({changed} << {bit})") };
        masks[word].push((c.name.as_str(), text));
    }
    let mask_columns = list(0..masks.len(), |i| format!("m{i}"));
    let mask_values = list(&masks, |m| {
        let (names, texts): (Vec<&str>, Vec<&str>) = m.iter().map(|(n, t)| (*n, t.as_str())).unzip();
        match names.is_empty() {
            true => "0".to_owned(),
            false => {
                format!("(SELECT (SELECT {}) FROM {})", texts.join(" | "), fallback(&names, &["old", "new"]))
            }
        }
    });
    let key_columns = list(0..table.key.len(), |i| format!("k{i}"));
    let key_values = list(&table.key, |k| format!("NEW.{}", k.sql));
    let sql = format!(
        "CREATE TRIGGER {name} AFTER UPDATE ON {} BEGIN INSERT INTO {PREFIX}log(tbl, op, ms, {mask_columns}, \
         {key_columns}) VALUES({}, {OP_UPDATE}, {NOW}, {mask_values}, {key_values}); END",
        ident(&table.name),
        table.id
    );
    (name, sql)
}

/// REPLACE removes rows that hold a unique value without firing a delete trigger: note them before it does.
fn displace_triggers(table: &Table) -> Vec<(String, String)> {
    let columns: Vec<&str> = (table.columns.iter().map(|c| c.name.as_str()))
        .chain(table.key.iter().map(|k| k.name.as_str()))
        .chain(table.generated.iter().map(String::as_str))
        .collect();
    let on = ident(&table.name);
    let missing: Vec<&str> = (table.columns.iter().map(|c| c.name.as_str()))
        .chain(table.generated.iter().map(String::as_str))
        .collect();
    let equal = |unique: &UniqueIndex| {
        let terms = (unique.terms.iter())
            .map(|t| format!("{} = {}", with_row(t, &columns, "t"), with_row(t, &columns, "NEW")));
        terms.collect::<Vec<_>>().join(" AND ")
    };
    let key_columns = list(0..table.key.len(), |i| format!("k{i}"));
    let notes: String = (table.uniques.iter())
        .map(|unique| {
            let conditions = (unique.condition.iter())
                .flat_map(|c| ["t", "NEW"].map(|row| format!(" AND ({})", with_row(c, &columns, row))));
            let found = format!("{}{}", equal(unique), conditions.collect::<String>());
            // At most one row has the unique value; without one the key is NULL, and absorb passes over it.
            let keys = list(&table.key, |k| format!("(SELECT t.{} FROM {on} AS t WHERE {found})", k.sql));
            format!(
                "INSERT INTO {PREFIX}log(tbl, op, ms, {key_columns}) SELECT {}, {OP_SUSPECT}, {NOW}, {keys} FROM {};",
                table.id,
                fallback(&missing, &["t", "new"])
            )
        })
        .collect();
    let exists = |row: &str| {
        let same = table.key.iter().map(|k| format!("t.{0} IS {row}.{0}", k.sql)).collect::<Vec<_>>();
        let same = same.join(" AND ");
        let any = (table.uniques.iter())
            .map(|u| format!("EXISTS(SELECT 1 FROM {on} AS t WHERE {} AND NOT ({same}))", equal(u)));
        let any = any.collect::<Vec<_>>().join(" OR ");
        format!("(SELECT (SELECT {any}) FROM {})", fallback(&missing, &["t", "old", "new"]))
    };
    let (before_insert, before_update) = (trigger_name(table, "ri"), trigger_name(table, "ru"));
    // Plain indexes can only be met by an update that names their columns.
    let plain = table.uniques.iter().map(|u| u.columns.as_ref().filter(|_| u.condition.is_none()));
    let of = match plain.collect::<Option<Vec<_>>>() {
        Some(columns) => format!(" OF {}", list(columns.into_iter().flatten(), |c| ident(c))),
        None => String::new(),
    };
    vec![
        (
            before_insert.clone(),
            format!(
                "CREATE TRIGGER {before_insert} BEFORE INSERT ON {on} WHEN {} BEGIN {notes} END",
                exists("NEW")
            ),
        ),
        (
            before_update.clone(),
            format!(
                "CREATE TRIGGER {before_update} BEFORE UPDATE{of} ON {on} WHEN {} BEGIN {notes} END",
                exists("OLD")
            ),
        ),
    ]
}
