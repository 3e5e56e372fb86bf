//! Snapshots of a file that are read from the file itself, without a copy. Invariant: while one is held nothing is
//! written to the pages it consists of: its read transaction stands at the last frame that was copied into the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::Result;
use super::absorb::OwnCommit;
use super::copy::begin_absorbed;
use super::store::Store;
use crate::sqlite;
use crate::sqlite::raw::open_file;

/// How often a moment is looked for at which nobody writes, and then made by holding writers up.
const QUIET_TRIES: u32 = 3;
const LOCKED_TRIES: u32 = 10;
/// The write-ahead log grows as long as a snapshot is held: for so long, and by so much, it may.
const HOLD: Duration = Duration::from_secs(20);
const HOLD_LOG_BYTES: u64 = 64 << 20;
/// What is copied at once.
const CHUNK: usize = 1 << 20;

/// A snapshot whose pages are in the file.
pub struct HeldPages {
    file: Arc<File>,
    size: u64,
    since: Instant,
    log: PathBuf,
    log_bytes: u64,
    /// The read transaction.
    _reader: Mutex<Connection>,
}

/// A wholly absorbed state of a file.
pub enum Snapshot {
    /// To be read from the file.
    Held(Box<HeldPages>),
    /// To be read by SQLite: a part of it is in the log.
    Reader(Connection),
}

impl HeldPages {
    fn new(reader: Connection, path: &Path) -> Result<Self> {
        let number = |pragma: &str| reader.pragma_query_value(None, pragma, |r| r.get::<_, i64>(0));
        let size = number("page_count")? as u64 * number("page_size")? as u64;
        let log = PathBuf::from(format!("{}-wal", path.display()));
        let log_bytes = std::fs::metadata(&log)?.len();
        let (file, since) = (open_file(path)?, Instant::now());
        Ok(Self { file, size, since, log, log_bytes, _reader: Mutex::new(reader) })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads at an offset.
    pub fn read_exact_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    /// Whether it has been held for long enough: it is to be copied, and let go.
    pub fn is_long(&self) -> bool {
        let grown = || std::fs::metadata(&self.log).map_or(0, |m| m.len()).saturating_sub(self.log_bytes);
        self.since.elapsed() > HOLD || grown() > HOLD_LOG_BYTES
    }

    /// Copies it into an empty file.
    pub fn copy_to(&self, dest: &File) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        for offset in (0..self.size).step_by(CHUNK) {
            let part = &mut buffer[..(self.size - offset).min(CHUNK as u64) as usize];
            self.read_exact_at(part, offset)?;
            dest.write_all_at(part, offset)?;
        }
        Ok(())
    }
}

/// Brings the log into the file, as far as nobody needs it as it is; whether that was all of it. Waits for nobody.
fn checkpoint(conn: &Connection) -> rusqlite::Result<bool> {
    conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |r| {
        let (frames, copied): (i64, i64) = (r.get(1)?, r.get(2)?);
        Ok(frames >= 0 && frames == copied)
    })
}

impl Store {
    /// A snapshot for a copy: one that is read from the file itself, if a moment for it is found.
    pub fn file_snapshot(&mut self) -> Result<(Vec<OwnCommit>, Snapshot)> {
        let path = PathBuf::from(self.path());
        let mut own = Vec::new();
        for attempt in 0..QUIET_TRIES + LOCKED_TRIES {
            checkpoint(&self.conn)?;
            let reader = if attempt < QUIET_TRIES {
                let (commits, reader) = self.snapshot()?;
                own.extend(commits);
                // If there is nothing in the log by now that is not in the file, that holds for what the reader sees:
                // it keeps what was written after it began from being copied.
                checkpoint(&self.conn)?.then_some(reader)
            } else {
                own.extend(self.absorb()?);
                self.snapshot_while_nobody_writes(&path)?
            };
            if let Some(reader) = reader {
                return Ok((own, Snapshot::Held(Box::new(HeldPages::new(reader, &path)?))));
            }
        }
        let (commits, reader) = self.snapshot()?;
        own.extend(commits);
        Ok((own, Snapshot::Reader(reader)))
    }

    fn snapshot_while_nobody_writes(&mut self, path: &Path) -> Result<Option<Connection>> {
        let (reader, beside) = (sqlite::open_read_only(path)?, sqlite::open_replica(path)?);
        self.conn.execute_batch("BEGIN IMMEDIATE")?;
        let found = begin_absorbed(&reader).and_then(|absorbed| Ok(absorbed && checkpoint(&beside)?));
        self.conn.execute_batch("ROLLBACK")?;
        Ok(found?.then_some(reader))
    }
}
