//! How far a file was, noted outside of it. Invariant: the mark is written after the COMMIT and before anything of it
//! is told, so that a file that is behind its mark went back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rusqlite::{Connection, OptionalExtension};

use crate::core::version::SiteId;

/// How far a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Which incarnation of the file.
    pub site: SiteId,
    /// The number of its last commit.
    pub n: u64,
    /// Its counter of changed row states.
    pub lsn: i64,
}

impl Position {
    /// Where an adopted file is.
    pub fn of(conn: &Connection, site: SiteId) -> rusqlite::Result<Self> {
        let n = "SELECT n FROM __litemesh_site WHERE site = ?1";
        let n: Option<i64> = conn.query_row(n, [site.0 as i64], |r| r.get(0)).optional()?;
        let lsn: Option<i64> =
            conn.query_row("SELECT lsn FROM __litemesh_clock", [], |r| r.get(0)).optional()?;
        Ok(Self { site, n: n.unwrap_or_default() as u64, lsn: lsn.unwrap_or_default() })
    }

    /// Whether a file that is here was once at `mark`.
    pub fn is_behind(&self, mark: &Self) -> bool {
        self.site == mark.site && (self.n < mark.n || self.lsn < mark.lsn)
    }

    fn bytes(self) -> [u8; 32] {
        let words = [self.site.0, self.n, self.lsn as u64];
        let mut bytes = [0; 32];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_be_bytes());
        }
        let check = blake3::hash(&bytes[..24]);
        bytes[24..].copy_from_slice(&check.as_bytes()[..8]);
        bytes
    }
}

/// The file that holds the mark of a database.
#[derive(Debug)]
pub struct Mark {
    file: File,
    last: Option<Position>,
}

impl Mark {
    /// Opens it for writing. It has its length from the beginning, so that a disk that is full later stops no mark.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        if file.metadata()?.len() != 32 {
            file.set_len(0)?;
            file.write_all_at(&[0; 32], 0)?;
        }
        Ok(Self { file, last: None })
    }

    /// What was noted there; `None` if nothing was, or not wholly.
    pub fn read(path: &Path) -> Option<Position> {
        let bytes: [u8; 32] = std::fs::read(path).ok()?.try_into().ok()?;
        let word = |i: usize| u64::from_be_bytes(bytes[i * 8..][..8].try_into().unwrap_or_default());
        let position = Position { site: SiteId(word(0)), n: word(1), lsn: word(2) as i64 };
        (position.bytes() == bytes).then_some(position)
    }

    /// Notes how far the file is. No fsync: it has to outlive this process, and after a power cut an earlier mark
    /// notices less, never too much.
    pub fn note(&mut self, position: Position) -> io::Result<()> {
        if self.last != Some(position) {
            self.file.write_all_at(&position.bytes(), 0)?;
            self.last = Some(position);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app");
        assert_eq!(Mark::read(&path), None);
        let mut mark = Mark::open(&path).unwrap();
        let first = Position { site: SiteId(7), n: 3, lsn: 90 };
        mark.note(first).unwrap();
        assert_eq!(Mark::read(&path), Some(first));
        let second = Position { n: 4, lsn: 95, ..first };
        Mark::open(&path).unwrap().note(second).unwrap();
        assert_eq!(Mark::read(&path), Some(second));
        assert!(first.is_behind(&second) && !second.is_behind(&first) && !second.is_behind(&second));
        assert!(!Position { site: SiteId(8), ..first }.is_behind(&second));
        let mut torn = second.bytes();
        torn[15] ^= 1;
        std::fs::write(&path, torn).unwrap();
        assert_eq!(Mark::read(&path), None);
        std::fs::write(&path, [1; 7]).unwrap();
        Mark::open(&path).unwrap();
        assert_eq!((Mark::read(&path), std::fs::read(&path).unwrap().len()), (None, 32));
    }
}
