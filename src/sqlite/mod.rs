//! Connections to SQLite files. Invariant: what is opened here for replication never fires an application's triggers
//! and never checkpoints in a way that waits for, or stops, an application.

pub mod durable;
pub mod introspect;
pub mod raw;
pub mod value;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

/// How long one of our transactions waits for an application's.
pub const BUSY_TIMEOUT: Duration = Duration::from_secs(30);
/// How many prepared statements a connection keeps.
const STATEMENT_CACHE: usize = 512;
/// The page cache of a connection of ours, in KiB.
const CACHE_KIB: i64 = 8 * 1024;

/// Why a file cannot be used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("{0}: no such file")]
    Missing(PathBuf),
    /// A directory or a device.
    #[error("{0} is not a regular file: name the SQLite file itself")]
    NotAFile(PathBuf),
    /// Bytes that are no SQLite file.
    #[error("{0} is not a SQLite database (or is encrypted); nothing was changed")]
    NotADatabase(PathBuf),
    /// No permission.
    #[error("{path}: {why}: litemesh must be able to read and write the file and its directory")]
    Permission {
        /// The file.
        path: PathBuf,
        /// What the system said.
        why: String,
    },
    /// The file system is full.
    #[error("{0}: the disk is full; make room and start again")]
    Full(PathBuf),
    /// Anything else.
    #[error("{path}: {source}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
}

impl OpenError {
    /// The error that SQLite's answer about this file means.
    pub fn of(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::NotADatabase) => Self::NotADatabase(path),
            Some(ErrorCode::DiskFull) => Self::Full(path),
            Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::CannotOpen) => {
                Self::Permission { path, why: source.to_string() }
            }
            _ => Self::Sqlite { path, source },
        }
    }
}

/// What is known of a path before it is opened.
fn inspect(path: &Path) -> Result<(), OpenError> {
    match std::fs::metadata(path) {
        Ok(m) if m.is_file() => Ok(()),
        Ok(_) => Err(OpenError::NotAFile(path.to_owned())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(OpenError::Missing(path.to_owned())),
        Err(e) => Err(OpenError::Permission { path: path.to_owned(), why: e.to_string() }),
    }
}

/// Opens an existing file for reading only.
pub fn open_read_only(path: &Path) -> Result<Connection, OpenError> {
    inspect(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open = || {
        let conn = Connection::open_with_flags(path, flags)?;
        conn.busy_timeout(BUSY_TIMEOUT)?;
        conn.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        Ok(conn)
    };
    open().map_err(|e| OpenError::of(path, e))
}

/// Opens an existing file as an application would: triggers fire, ours too, and foreign keys are kept.
pub fn open_application(path: &Path) -> Result<Connection, OpenError> {
    inspect(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open = || {
        let conn = Connection::open_with_flags(path, flags)?;
        conn.busy_timeout(BUSY_TIMEOUT)?;
        conn.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        conn.pragma_update(None, "foreign_keys", true)?;
        conn.pragma_update(None, "synchronous", "FULL")?;
        if conn.is_readonly("main")? {
            return Ok(Err(OpenError::Permission { path: path.to_owned(), why: "read-only".to_owned() }));
        }
        Ok(Ok(conn))
    };
    open().unwrap_or_else(|e| Err(OpenError::of(path, e)))
}

/// Opens an existing file for replication. Nothing in it is changed by opening.
pub fn open_replica(path: &Path) -> Result<Connection, OpenError> {
    inspect(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open = || {
        let conn = Connection::open_with_flags(path, flags)?;
        configure(&conn)?;
        if conn.is_readonly("main")? {
            return Ok(Err(OpenError::Permission { path: path.to_owned(), why: "read-only".to_owned() }));
        }
        Ok(Ok(conn))
    };
    open().unwrap_or_else(|e| Err(OpenError::of(path, e)))
}

/// Waits for an application's transaction: often and shortly at first, because most of them are short.
fn wait_for_writer(tries: i32) -> bool {
    let pause = match tries {
        0..20 => Duration::from_micros(200),
        20..100 => Duration::from_millis(1),
        _ => Duration::from_millis(5),
    };
    std::thread::sleep(pause);
    pause * u32::try_from(tries).unwrap_or(u32::MAX) < BUSY_TIMEOUT
}

/// Lets a connection wait for applications' transactions.
pub fn wait_for_writers(conn: &Connection) -> rusqlite::Result<()> {
    conn.busy_handler(Some(wait_for_writer))
}

/// Makes a connection fit for replication: no triggers but TEMP ones, no enforcement that the origin has done,
/// every commit of ours on the disk before it is sent.
pub fn configure(conn: &Connection) -> rusqlite::Result<()> {
    wait_for_writers(conn)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, false)?;
    conn.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
    conn.pragma_update(None, "foreign_keys", false)?;
    conn.pragma_update(None, "ignore_check_constraints", true)?;
    conn.pragma_update(None, "recursive_triggers", false)?;
    conn.pragma_update(None, "synchronous", "FULL")?;
    conn.pragma_update(None, "cache_size", -CACHE_KIB)?;
    conn.pragma_update(None, "temp_store", "MEMORY")?;
    conn.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
    Ok(())
}

/// Creates an empty database where there is no file.
pub fn create(path: &Path) -> Result<(), OpenError> {
    let create = || -> rusqlite::Result<()> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
        let conn = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        conn.pragma_update(None, "journal_mode", "WAL")?;
        conn.execute_batch("BEGIN IMMEDIATE; PRAGMA application_id = 0; COMMIT")
    };
    create().map_err(|e| OpenError::of(path, e))
}

/// Puts the file into WAL mode, which lasts; returns whether that was a change.
pub fn ensure_wal(conn: &Connection) -> rusqlite::Result<bool> {
    let mode: String = conn.pragma_query_value(None, "journal_mode", |r| r.get(0))?;
    if mode == "wal" || mode == "memory" {
        return Ok(false);
    }
    let now: String = conn.pragma_update_and_check(None, "journal_mode", "WAL", |r| r.get(0))?;
    Ok(now == "wal")
}
