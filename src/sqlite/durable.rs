//! Commits of ours brought to the disk. Invariant: what a commit wrote is on the disk once [`Durability::sync`] has
//! returned; until then it is visible to programs of this host, and nothing that was read may be sent.
//!
//! With `synchronous = FULL` SQLite synchronises a commit while it still holds the lock that writers wait for, so that a
//! busy disk holds them up. In WAL mode the log may be synchronised after that lock was given back: a checkpoint in
//! between synchronises the log before it copies from it, and the file before the log is begun anew.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use rusqlite::Connection;

/// How commits of a connection get to the disk.
#[derive(Debug)]
pub struct Durability {
    /// The write-ahead log; without one SQLite does it itself, within the commit.
    log: Option<PathBuf>,
}

impl Durability {
    /// Takes a connection that writes over from SQLite, if its file is in WAL mode.
    pub fn of_writer(conn: &Connection) -> rusqlite::Result<Self> {
        let durability = Self::of_reader(conn)?;
        if durability.log.is_some() {
            conn.pragma_update(None, "synchronous", "NORMAL")?;
        }
        Ok(durability)
    }

    /// For a connection that reads what others wrote.
    pub fn of_reader(conn: &Connection) -> rusqlite::Result<Self> {
        let mode: String = conn.pragma_query_value(None, "journal_mode", |r| r.get(0))?;
        let path = conn.path().filter(|path| mode == "wal" && !path.is_empty());
        Ok(Self { log: path.map(|path| PathBuf::from(format!("{path}-wal"))) })
    }

    /// Returns when everything that was committed before is on the disk, whoever wrote it.
    pub fn sync(&self) -> io::Result<()> {
        // SQLite keeps no locks on this file, so that closing it gives none away.
        self.log.as_ref().map_or(Ok(()), |log| File::open(log)?.sync_data())
    }
}
