//! Adopting a file: our tables and triggers in it, kept right while the application changes its schema, and removed
//! without a trace. Invariant: nothing of the application's is touched.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};

use rusqlite::{Connection, OptionalExtension};

use super::identity::Idents;
use super::plan::Plan;
use super::schema::Objects;
use super::store::Store;
use super::{ReplicaError, Result, registry};
use crate::core::capture::{
    FILE_FORMAT, INDEXES, OP_DELETE, OP_INSERT, OP_UPDATE, PREFIX, REPLICATED, TABLES, state_table, triggers,
};
use crate::core::ddl::is_constant;
use crate::core::merge::ColumnId;
use crate::core::schema::{MASK_BITS, SchemaMode, Table};
use crate::core::sqltext::{ident, list, trigger_body};
use crate::core::version::SiteId;
use crate::sqlite::introspect::{self, AppTrigger, Schema};

/// The prefix of TEMP triggers that stand in for the application's on our connection.
const TEMP_PREFIX: &str = "__litemesh_temp_";

/// Under this key: the tables that had rows when the file was adopted.
const UNTOUCHED: &str = "untouched";

/// Whether the file has litemesh's tables.
pub fn is_adopted(conn: &Connection) -> rusqlite::Result<bool> {
    let sql = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = '__litemesh_meta'";
    Ok(conn.query_row(sql, [], |_| Ok(())).optional()?.is_some())
}

/// Puts our tables into a file that has none, as the site `site` of the lineage `lineage`. Rows that are there get
/// the zero version. The caller has begun a write transaction; triggers follow when the file is opened as a
/// [`Store`].
pub fn install(conn: &Connection, lineage: u64, site: SiteId) -> rusqlite::Result<()> {
    conn.execute_batch(TABLES)?;
    Store::set_meta(conn, "format", FILE_FORMAT)?;
    Store::set_meta(conn, "lineage", lineage as i64)?;
    conn.execute("INSERT OR IGNORE INTO __litemesh_clock(id, hlc, lsn) VALUES(1, 0, 0)", [])?;
    become_site(conn, site)
}

/// Makes the file a new incarnation.
pub fn become_site(conn: &Connection, site: SiteId) -> rusqlite::Result<()> {
    Store::set_meta(conn, "site", site.0 as i64)?;
    let sql = "INSERT OR IGNORE INTO __litemesh_site(site, n, hlc, id) VALUES(?1, 0, 0, 0)";
    conn.execute(sql, [site.0 as i64]).map(|_| ())
}

/// Removes every trace of litemesh from a file.
pub fn detach(conn: &Connection) -> rusqlite::Result<()> {
    conn.execute_batch("BEGIN IMMEDIATE")?;
    let names = |kind: &str| -> rusqlite::Result<Vec<String>> {
        let sql = "SELECT name FROM sqlite_schema WHERE type = ?1 AND substr(name, 1, ?3) = ?2";
        let mut statement = conn.prepare(sql)?;
        let rows = statement.query_map((kind, PREFIX, PREFIX.len() as i64), |r| r.get(0))?;
        rows.collect()
    };
    for (kind, sql) in [("trigger", "DROP TRIGGER"), ("table", "DROP TABLE")] {
        for name in names(kind)? {
            conn.execute_batch(&format!("{sql} {}", ident(&name)))?;
        }
    }
    conn.execute_batch("COMMIT")
}

/// Whose doing it is that the schema is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// The application's, or nobody's.
    Application,
    /// Ours: it was brought to what a peer recorded.
    Peer,
}

/// Reads the schema, records what the application changed, registers what is new, puts back triggers that are missing.
pub(super) fn refresh(store: &mut Store, cause: Cause) -> Result<()> {
    store.plans = our_plans(&store.conn)?;
    // Absent: the first look at a new file. 0: taken in from a copy, whose tables are known but have no triggers yet.
    let adopted = Store::meta::<i64>(&store.conn, "adopted")?;
    if cause == Cause::Application {
        let renames = registry::follow_renames(&store.conn)?;
        if adopted != Some(1)
            && let Some(index) = store.materialize()?.first()
        {
            let what = "rows of the file stand in the way of a UNIQUE index of the mesh";
            return Err(ReplicaError::Unfit(format!("{what}: {index}")));
        }
        store.record_schema(&renames)?;
    }
    let schema = introspect::read(&store.conn)?;
    let (view, classes) = store.view()?;
    let idents = Idents::read(&store.conn, &view, &classes)?;
    for mut table in schema.tables.clone() {
        if !(store.covers)(&table.name) {
            remove_triggers(&store.conn, &table.name)?;
            continue;
        }
        if let Some(why) = unfit(&store.conn, &table)? {
            store.notes.push(format!("table {:?} is not replicated: {why}", table.name));
            continue;
        }
        let known_as = match store.schema_mode {
            SchemaMode::Replicate => idents.of(&table.name),
            SchemaMode::Manual => table.name.to_lowercase(),
        };
        let registration = registry::register(&store.conn, &mut table, &known_as)?;
        widen_log(&store.conn, &table)?;
        let had_triggers = place_triggers(&store.conn, &table)?;
        if adopted.is_some() && !registration.known {
            log_all_rows(&store.conn, &table)?;
        } else if adopted == Some(1) && cause == Cause::Application {
            log_new_columns(&store.conn, &table, &registration.new_columns)?;
            if !had_triggers {
                log_difference(&store.conn, &table)?;
                if !tables_with_untouched_rows(&store.conn)?.is_none_or(|ids| ids.contains(&table.id)) {
                    log_unknown_rows(&store.conn, &table)?;
                }
                store.note_rebuilt(table.id)?;
                store.notes.push(rebuilt(&table));
            }
        }
        let wire_columns = registry::wire_columns(&view, &known_as, &table);
        store.plans.push(Arc::new(Plan::new(table, known_as, wire_columns)));
    }
    let present = schema.tables.iter().map(|t| t.name.to_lowercase()).collect();
    registry::forget_missing(&store.conn, &present)?;
    if adopted.is_none() {
        note_untouched_rows(store)?;
    }
    if adopted != Some(1) {
        Store::set_meta(&store.conn, "adopted", 1)?;
    }
    store.decide_merging()?;
    let replicated = store.plans().map(|p| p.table.name.to_lowercase()).collect();
    let notes = place_temp_triggers(&store.conn, &schema, &replicated)?;
    store.notes.extend(notes);
    Ok(())
}

fn rebuilt(table: &Table) -> String {
    format!(
        "table {:?} was rebuilt by the application: capture is back; what was changed in between is found by comparing \
         it with a peer",
        table.name
    )
}

/// The plans of our own tables that replicate; what an earlier litemesh did not have yet is made.
fn our_plans(conn: &Connection) -> Result<Vec<Arc<Plan>>> {
    conn.execute_batch(TABLES)?;
    conn.execute_batch(INDEXES)?;
    let plan = |name: &&str| {
        let mut table = introspect::read_table_named(conn, name)?;
        registry::register(conn, &mut table, name)?;
        widen_log(conn, &table)?;
        let columns = registry::wire_columns(&Objects::new(), name, &table);
        Ok(Arc::new(Plan::new(table, (*name).to_owned(), columns)))
    };
    REPLICATED.iter().map(plan).collect()
}

/// A table that the configuration leaves out now may have been replicated before.
fn remove_triggers(conn: &Connection, table: &str) -> Result<()> {
    let sql = "SELECT name FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = ?1 AND substr(name, 1, ?3) = ?2";
    let mut statement = conn.prepare(sql)?;
    let names = statement.query_map((table, PREFIX, PREFIX.len() as i64), |r| r.get::<_, String>(0))?;
    for name in names.collect::<rusqlite::Result<Vec<_>>>()? {
        conn.execute_batch(&format!("DROP TRIGGER {}", ident(&name)))?;
    }
    Ok(())
}

/// Why a table cannot be replicated at all: without the application's collations its indexes cannot be written.
fn unfit(conn: &Connection, table: &Table) -> rusqlite::Result<Option<String>> {
    let sql = "SELECT DISTINCT x.coll FROM pragma_index_list(?1) AS l, pragma_index_xinfo(l.name) AS x
               WHERE x.key = 1 AND upper(x.coll) NOT IN ('BINARY', 'NOCASE', 'RTRIM')";
    let unknown: Option<String> = conn.query_row(sql, [&table.name], |r| r.get(0)).optional()?;
    Ok(unknown.map(|c| format!("an index of it uses the collation {c}, which only the application has")))
}

/// Gives the log a column for every key column and mask of the table.
fn widen_log(conn: &Connection, table: &Table) -> Result<()> {
    let mut statement = conn.prepare_cached("SELECT name FROM pragma_table_info('__litemesh_log')")?;
    let have: BTreeSet<String> = statement.query_map([], |r| r.get(0))?.collect::<rusqlite::Result<_>>()?;
    let keys = (0..table.key.len()).map(|i| format!("k{i}"));
    let masks = (0..table.mask_count()).map(|i| format!("m{i}"));
    for column in keys.chain(masks).filter(|c| !have.contains(c)) {
        conn.execute_batch(&format!("ALTER TABLE __litemesh_log ADD COLUMN {column}"))?;
    }
    Ok(())
}

/// Creates the triggers that are missing or out of date; returns whether the essential one was there.
pub(super) fn place_triggers(conn: &Connection, table: &Table) -> Result<bool> {
    let wanted: BTreeMap<String, String> = triggers(table).into_iter().collect();
    let suffix = format!("_{}", table.id);
    let mut statement = conn.prepare_cached(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND substr(name, 1, ?2) = ?1",
    )?;
    let rows = statement.query_map((PREFIX, PREFIX.len() as i64), |r| Ok((r.get(0)?, r.get(1)?)))?;
    let all: BTreeMap<String, String> = rows.collect::<rusqlite::Result<_>>()?;
    let ours = all.iter().filter(|(n, _)| n.ends_with(&suffix));
    let stale: Vec<&String> = ours.filter(|(n, sql)| wanted.get(*n) != Some(sql)).map(|(n, _)| n).collect();
    for name in &stale {
        conn.execute_batch(&format!("DROP TRIGGER {}", ident(name)))?;
    }
    for (name, sql) in &wanted {
        if all.get(name) != Some(sql) {
            // One that was taken out of the schema table by hand is still known to this connection.
            conn.execute_batch(&format!("DROP TRIGGER IF EXISTS main.{}", ident(name)))?;
            conn.execute_batch(sql)?;
        }
    }
    Ok(all.contains_key(&format!("{PREFIX}i{suffix}")))
}

/// A table made after adoption: its rows are writes of this node.
pub(super) fn log_all_rows(conn: &Connection, table: &Table) -> Result<()> {
    let keys = list(0..table.key.len(), |i| format!("k{i}"));
    conn.execute_batch(&format!(
        "INSERT INTO {PREFIX}log(tbl, op, ms, {keys}) SELECT {}, {OP_INSERT}, julianday('now'), {} FROM {}",
        table.id,
        list(&table.key, |k| k.sql.clone()),
        ident(&table.name)
    ))?;
    Ok(())
}

/// Columns that the application added: rows that have another value there than the one every node gives them are
/// writes of this node.
pub(super) fn log_new_columns(conn: &Connection, table: &Table, new: &[ColumnId]) -> Result<()> {
    let keys = list(0..table.key.len(), |i| format!("k{i}"));
    for column in table.columns.iter().filter(|c| new.contains(&c.id)) {
        let sql = "SELECT dflt_value FROM pragma_table_xinfo(?1) WHERE name = ?2";
        let default: Option<String> = conn.query_row(sql, (&table.name, &column.name), |r| r.get(0))?;
        let default = default.filter(|d| is_constant(d)).unwrap_or_else(|| "NULL".to_owned());
        let (word, bit) = (column.id as usize / MASK_BITS, column.id as usize % MASK_BITS);
        conn.execute_batch(&format!(
            "INSERT INTO {PREFIX}log(tbl, op, ms, m{word}, {keys})
               SELECT {}, {OP_UPDATE}, julianday('now'), {}, {} FROM {} WHERE {} IS NOT ({default})",
            table.id,
            1i64 << bit,
            list(&table.key, |k| k.sql.clone()),
            ident(&table.name),
            ident(&column.name),
        ))?;
    }
    Ok(())
}

/// A table that lost its triggers for a while: rows that came and went meanwhile.
fn log_difference(conn: &Connection, table: &Table) -> Result<()> {
    let keys = list(0..table.key.len(), |i| format!("k{i}"));
    let state_keys = list(0..table.key.len(), |i| format!("s.k{i}"));
    let same = (0..table.key.len()).map(|i| format!("t.{} = s.k{i}", table.key[i].sql));
    let same = same.collect::<Vec<_>>().join(" AND ");
    let (state, name, id) = (state_table(table), ident(&table.name), table.id);
    let into = format!("INSERT INTO {PREFIX}log(tbl, op, ms, {keys}) SELECT {id}");
    conn.execute_batch(&format!(
        "{into}, {OP_DELETE}, julianday('now'), {state_keys} FROM {state} AS s
           WHERE s.dh IS NULL AND NOT EXISTS(SELECT 1 FROM {name} AS t WHERE {same});
         {into}, {OP_INSERT}, julianday('now'), {} FROM {name} AS t
           WHERE EXISTS(SELECT 1 FROM {state} AS s WHERE s.dh IS NOT NULL AND {same});",
        list(&table.key, |k| format!("t.{}", k.sql)),
    ))?;
    Ok(())
}

/// Keeps which tables have rows that were there at adoption, of which nothing is known until they are written.
fn note_untouched_rows(store: &Store) -> Result<()> {
    let mut ids = Vec::new();
    for plan in &store.plans {
        let (table, any) = (&plan.table, format!("SELECT 1 FROM {} LIMIT 1", ident(&plan.table.name)));
        if store.conn.prepare(&any)?.exists([])? {
            ids.push(table.id);
        }
    }
    Ok(Store::set_meta(&store.conn, UNTOUCHED, serde_json::json!(ids).to_string())?)
}

fn tables_with_untouched_rows(conn: &Connection) -> Result<Option<Vec<i64>>> {
    let kept: Option<String> = Store::meta(conn, UNTOUCHED)?;
    Ok(kept.and_then(|k| serde_json::from_str(&k).ok()))
}

/// Of a table without untouched rows: one of which nothing is known came while nobody looked.
fn log_unknown_rows(conn: &Connection, table: &Table) -> Result<()> {
    let same = (0..table.key.len()).map(|i| format!("t.{} = s.k{i}", table.key[i].sql));
    conn.execute_batch(&format!(
        "INSERT INTO {PREFIX}log(tbl, op, ms, {}) SELECT {}, {OP_INSERT}, julianday('now'), {} FROM {} AS t
           WHERE NOT EXISTS(SELECT 1 FROM {} AS s WHERE {});",
        list(0..table.key.len(), |i| format!("k{i}")),
        table.id,
        list(&table.key, |k| format!("t.{}", k.sql)),
        ident(&table.name),
        state_table(table),
        same.collect::<Vec<_>>().join(" AND "),
    ))?;
    Ok(())
}

/// What each trigger of the application writes: trigger -> tables.
fn trigger_writes(conn: &Connection, schema: &Schema) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let writes = introspect::with_trigger_writes(conn, |sink| {
        let mut writes: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for sql in schema.tables.iter().flat_map(introspect::firing_statements) {
            sink.lock().unwrap_or_else(PoisonError::into_inner).clear();
            // A trigger that needs a function or module only the application has cannot be compiled here, nor run.
            if conn.prepare(&sql).is_ok() {
                let seen = sink.lock().unwrap_or_else(PoisonError::into_inner);
                for (trigger, tables) in seen.iter() {
                    writes.entry(trigger.clone()).or_default().extend(tables.iter().cloned());
                }
            }
        }
        writes
    })?;
    Ok(writes)
}

/// Triggers that only keep unreplicated tables (full-text indexes) up to date run on every node, as TEMP triggers of
/// our connection. The others' effects arrive as rows. Returns what an operator should know.
pub(super) fn place_temp_triggers(
    conn: &Connection,
    schema: &Schema,
    replicated: &BTreeSet<String>,
) -> Result<Vec<String>> {
    let mut old =
        conn.prepare("SELECT name FROM temp.sqlite_schema WHERE type = 'trigger' AND name LIKE ?1")?;
    let names = old.query_map([format!("{TEMP_PREFIX}%")], |r| r.get::<_, String>(0))?;
    let names = names.collect::<rusqlite::Result<Vec<_>>>()?;
    drop(old);
    for name in names {
        conn.execute_batch(&format!("DROP TRIGGER temp.{}", ident(&name)))?;
    }
    let mut notes = Vec::new();
    if schema.triggers.is_empty() {
        return Ok(notes);
    }
    let writes = trigger_writes(conn, schema)?;
    for (i, trigger) in schema.triggers.iter().enumerate() {
        if !replicated.contains(&trigger.table.to_lowercase()) {
            continue;
        }
        let Some(written) = writes.get(&trigger.name) else { continue };
        let local = written.iter().filter(|t| !replicated.contains(*t)).count();
        if local == written.len() {
            let body = trigger_body(&trigger.sql).unwrap_or_default();
            conn.execute_batch(&format!("CREATE TEMP TRIGGER {TEMP_PREFIX}{i} {body}"))?;
        } else if local > 0 {
            notes.push(mixed_trigger(trigger));
        }
    }
    Ok(notes)
}

fn mixed_trigger(trigger: &AppTrigger) -> String {
    format!(
        "trigger {:?} writes replicated and unreplicated tables at once: what it does to the unreplicated ones does \
         not happen for rows that arrive from peers; split it in two",
        trigger.name
    )
}

#[cfg(test)]
mod tests {
    use rusqlite::config::DbConfig;

    use super::*;
    use crate::sqlite::introspect;

    #[test]
    fn triggers_that_were_taken_out_of_the_schema_table_are_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Connection::open(dir.path().join("app.db")).unwrap();
        let conn = open();
        conn.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v)").unwrap();
        install(&conn, 1, SiteId(5)).unwrap();
        let mut tables = introspect::read(&conn).unwrap().tables;
        let mut table = tables.remove(tables.iter().position(|t| t.name == "t").unwrap());
        registry::register(&conn, &mut table, "t").unwrap();
        place_triggers(&conn, &table).unwrap();
        let other = open();
        other.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, false).unwrap();
        other
            .execute_batch("PRAGMA writable_schema = ON; DELETE FROM sqlite_schema WHERE type = 'trigger'")
            .unwrap();
        place_triggers(&conn, &table).unwrap();
        open().execute_batch("INSERT INTO t VALUES(1, 2)").unwrap();
        let logged: i64 = conn.query_row("SELECT count(*) FROM __litemesh_log", [], |r| r.get(0)).unwrap();
        assert_eq!(logged, 1);
    }
}
