//! Copies of a file for nodes that join, and taking one in. Invariant: an existing file is never overwritten; what
//! is in a copy was absorbed and on the disk, so that the copy's own vector tells what it stands for.

use std::collections::BTreeSet;
use std::path::Path;

use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};

use super::absorb::OwnCommit;
use super::adopt::{become_site, place_temp_triggers};
use super::joined::{OURS, keep_rows};
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::{PREFIX, TABLES};
use crate::core::schema::{KeyKind, Table};
use crate::core::sqltext::{ident, list};
use crate::core::version::SiteId;
use crate::sqlite::{self, introspect};

/// How often a snapshot without a pending log is tried for before writers are held up for a moment to get one.
const SNAPSHOT_TRIES: u32 = 5;

impl Store {
    /// A connection whose read transaction stands at a state of the file that is wholly absorbed.
    pub fn snapshot(&mut self) -> Result<(Vec<OwnCommit>, Connection)> {
        let path = std::path::PathBuf::from(self.path());
        let mut own = Vec::new();
        let reader = sqlite::open_read_only(&path)?;
        for _ in 0..SNAPSHOT_TRIES {
            own.extend(self.absorb()?);
            if begin_absorbed(&reader)? {
                return Ok((own, reader));
            }
        }
        loop {
            own.extend(self.absorb()?);
            // With the write lock held nobody can add to the log.
            self.conn.execute_batch("BEGIN IMMEDIATE")?;
            let found = begin_absorbed(&reader);
            self.conn.execute_batch("ROLLBACK")?;
            if found? {
                return Ok((own, reader));
            }
        }
    }
}

/// Begins a read transaction, if what it sees is wholly absorbed; whether it has.
pub(super) fn begin_absorbed(reader: &Connection) -> Result<bool> {
    reader.execute_batch("BEGIN")?;
    let logged = reader.prepare_cached("SELECT 1 FROM __litemesh_log LIMIT 1")?.exists([])?;
    if logged {
        reader.execute_batch("ROLLBACK")?;
    }
    Ok(!logged)
}

/// Writes what the reader's transaction sees into a new file. It is not synchronised: most copies are
/// deleted soon, and an fsync of a gibibyte keeps every writer of the disk waiting.
pub fn write_copy(reader: &Connection, dest: &Path) -> Result<()> {
    let mut target = Connection::open(dest)?;
    target.execute_batch("PRAGMA synchronous = OFF; PRAGMA journal_mode = OFF")?;
    let backup = Backup::new(reader, &mut target)?;
    while backup.step(-1)? != StepResult::Done {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(())
}

/// Makes a fetched copy the file at `dest`, which must not exist, under a new site.
pub fn install_copy(copy: &Path, dest: &Path, site: SiteId) -> Result<()> {
    let conn = sqlite::open_replica(copy)?;
    let source: i64 = Store::meta(&conn, "site")?.unwrap_or_default();
    conn.execute_batch("BEGIN IMMEDIATE")?;
    take_identity(&conn, SiteId(source as u64), site)?;
    conn.execute_batch("COMMIT")?;
    sqlite::ensure_wal(&conn)?;
    conn.close().map_err(|(_, e)| e)?;
    std::fs::File::open(copy)?.sync_all()?;
    // A hard link fails where a rename would overwrite.
    std::fs::hard_link(copy, dest)?;
    std::fs::remove_file(copy)?;
    synchronise(dest)?;
    Ok(())
}

/// Removes what SQLite keeps beside a file that is about to become another.
pub fn remove_side_files(file: &Path) -> std::io::Result<()> {
    for suffix in ["-wal", "-shm", "-journal"] {
        let mut name = file.to_owned().into_os_string();
        name.push(suffix);
        match std::fs::remove_file(&name) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Makes a file and its name durable.
pub fn synchronise(file: &Path) -> std::io::Result<()> {
    std::fs::File::open(file)?.sync_all()?;
    match file.parent().filter(|d| !d.as_os_str().is_empty()) {
        Some(directory) => std::fs::File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

/// What of a copy belongs to the file it was made of, not to this one: within a transaction.
pub fn take_identity(conn: &Connection, source: SiteId, site: SiteId) -> Result<()> {
    let lsn: i64 = conn.query_row("SELECT lsn FROM __litemesh_clock WHERE id = 1", [], |r| r.get(0))?;
    conn.execute_batch("DELETE FROM __litemesh_log; DELETE FROM __litemesh_peer")?;
    conn.execute("INSERT INTO __litemesh_peer(site, lsn) VALUES(?1, ?2)", (source.0 as i64, lsn))?;
    conn.execute("DELETE FROM __litemesh_meta WHERE key = 'token'", [])?;
    become_site(conn, site)?;
    Ok(())
}

/// Takes a fetched copy into an existing file that never belonged to a mesh: tables that are empty here get its rows,
/// tables that have the same rows stay as they are; of others the rows are laid aside, for `Store::unite_kept` to unite
/// them with the copy's, or the file is refused and is as before.
pub fn import_copy(conn: &Connection, copy: &Path, site: SiteId, merge: bool) -> Result<()> {
    conn.execute("ATTACH ?1 AS joined", [copy.to_string_lossy()])?;
    conn.execute_batch("BEGIN IMMEDIATE")?;
    let result = import(conn, site, merge);
    conn.execute_batch(if result.is_ok() { "COMMIT" } else { "ROLLBACK" })?;
    conn.execute_batch("DETACH joined")?;
    result
}

fn import(conn: &Connection, site: SiteId, merge: bool) -> Result<()> {
    let theirs = {
        let path: String =
            conn.query_row("SELECT file FROM pragma_database_list WHERE name = 'joined'", [], |r| r.get(0))?;
        introspect::read(&sqlite::open_read_only(Path::new(&path))?)?
    };
    let before = introspect::read(conn)?;
    create_missing(conn)?;
    let ours = introspect::read(conn)?;
    let replicated: BTreeSet<String> = theirs.tables.iter().map(|t| t.name.to_lowercase()).collect();
    place_temp_triggers(conn, &ours, &replicated)?;
    let mut kept = Vec::new();
    for table in &theirs.tables {
        let here = ours.tables.iter().find(|t| t.name.eq_ignore_ascii_case(&table.name));
        let here = here.ok_or_else(|| ReplicaError::NoTable(table.name.clone()))?;
        same_shape(here, table)?;
        let empty =
            !conn.prepare(&format!("SELECT 1 FROM main.{} LIMIT 1", ident(&table.name)))?.exists([])?;
        if empty {
            copy_rows(conn, table)?;
        } else if before.tables.iter().any(|t| t.name.eq_ignore_ascii_case(&table.name)) {
            match same_rows(conn, table) {
                Err(ReplicaError::Unfit(_)) if merge => {
                    kept.push(table.name.clone());
                    keep_rows(conn, here, kept.len())?;
                    copy_rows(conn, table)?;
                }
                result => result?,
            }
        }
    }
    copy_ours(conn)?;
    Store::set_meta(conn, OURS, serde_json::json!(kept).to_string())?;
    let source: i64 = Store::meta(conn, "site")?.unwrap_or_default();
    Store::set_meta(conn, "adopted", 0)?;
    take_identity(conn, SiteId(source as u64), site)
}

/// Creates the tables, indexes, views and triggers that only the copy has.
fn create_missing(conn: &Connection) -> Result<()> {
    let sql = "SELECT sql FROM joined.sqlite_schema AS j WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
               AND substr(name, 1, ?2) <> ?1
               AND name NOT IN (SELECT name FROM joined.pragma_table_list WHERE schema = 'joined' AND type = 'shadow')
               AND NOT EXISTS(SELECT 1 FROM main.sqlite_schema AS m WHERE m.name = j.name COLLATE NOCASE)
               ORDER BY type = 'table' DESC, type = 'view' DESC, rowid";
    let mut statement = conn.prepare(&sql.replace("joined.pragma_table_list", "pragma_table_list"))?;
    let rows = statement.query_map((PREFIX, PREFIX.len() as i64), |r| r.get::<_, String>(0))?;
    let all = rows.collect::<rusqlite::Result<Vec<_>>>()?;
    all.iter().try_for_each(|sql| conn.execute_batch(sql))?;
    Ok(())
}

fn same_shape(here: &Table, there: &Table) -> Result<()> {
    let key = |t: &Table| t.key.iter().map(|k| k.name.to_lowercase()).collect::<Vec<_>>();
    let columns = |t: &Table| t.columns.iter().map(|c| c.name.to_lowercase()).collect::<BTreeSet<_>>();
    if key(here) == key(there) && columns(here) == columns(there) {
        return Ok(());
    }
    Err(ReplicaError::Unfit(format!(
        "table {:?} has other columns here than in the mesh: run the same migrations here first, or move the file away \
         to get the mesh's; nothing was changed",
        here.name
    )))
}

fn all_columns(table: &Table) -> String {
    let key = table.key.iter().map(|k| k.sql.clone());
    list(key.chain(table.columns.iter().map(|c| ident(&c.name))), |c| c)
}

fn copy_rows(conn: &Connection, table: &Table) -> Result<()> {
    let (name, columns) = (ident(&table.name), all_columns(table));
    conn.execute_batch(&format!("INSERT INTO main.{name}({columns}) SELECT {columns} FROM joined.{name}"))?;
    Ok(())
}

fn same_rows(conn: &Connection, table: &Table) -> Result<()> {
    let name = ident(&table.name);
    let key = if table.key_kind == KeyKind::Rowid { &[][..] } else { &table.key[..] };
    let columns = key.iter().map(|k| k.sql.clone()).chain(table.columns.iter().map(|c| ident(&c.name)));
    let quoted = list(columns, |c| format!("typeof({c}), quote({c})"));
    let rows = |schema: &str| format!("SELECT {quoted} FROM {schema}.{name}");
    let count = |a: &str, b: &str| -> Result<i64> {
        let sql = format!("SELECT count(*) FROM ({} EXCEPT {})", rows(a), rows(b));
        Ok(conn.query_row(&sql, [], |r| r.get(0))?)
    };
    let (here, there) = (count("main", "joined")?, count("joined", "main")?);
    if here == 0 && there == 0 {
        return Ok(());
    }
    Err(ReplicaError::Unfit(format!(
        "the file has rows of its own: table {:?} has {here} rows that the mesh does not have, and lacks {there} of the \
         mesh's; start with --merge to unite them by key, or move the file away to get the mesh's copy, and put its rows back \
         as ordinary writes; nothing was changed",
        table.name
    )))
}

/// Copies our tables: row states and all that goes with them.
fn copy_ours(conn: &Connection) -> Result<()> {
    conn.execute_batch(TABLES)?;
    let sql = "SELECT name, sql FROM joined.sqlite_schema WHERE type = 'table' AND substr(name, 1, ?2) = ?1";
    let mut statement = conn.prepare(sql)?;
    let rows = statement
        .query_map((PREFIX, PREFIX.len() as i64), |r| Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?)))?;
    for row in rows {
        let (name, sql) = row?;
        if name == "__litemesh_log" {
            continue;
        }
        let exists = "SELECT 1 FROM main.sqlite_schema WHERE type = 'table' AND name = ?1";
        if !conn.prepare_cached(exists)?.exists([&name])? {
            conn.execute_batch(&sql)?;
        }
        let name = ident(&name);
        conn.execute_batch(&format!("INSERT OR REPLACE INTO main.{name} SELECT * FROM joined.{name}"))?;
    }
    Ok(())
}
