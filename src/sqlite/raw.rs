//! Reading the bytes of files that connections of this process are open on. Invariant: such a file is opened once and
//! stays open while it exists: POSIX takes all of a process's locks on a file away when it closes any descriptor of it,
//! SQLite's among them.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

static OPEN: Mutex<Vec<Arc<File>>> = Mutex::new(Vec::new());

fn identity(file: &std::fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// The file at `path`, for reading at given places only.
pub fn open_file(path: &Path) -> io::Result<Arc<File>> {
    let wanted = identity(&std::fs::metadata(path)?);
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    // Of a file that has no name any more nobody else can have a connection to share.
    open.retain(|f| Arc::strong_count(f) > 1 || f.metadata().is_ok_and(|m| m.nlink() > 0));
    if let Some(file) = open.iter().find(|f| f.metadata().is_ok_and(|m| identity(&m) == wanted)) {
        return Ok(file.clone());
    }
    let file = Arc::new(File::open(path)?);
    open.push(file.clone());
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rusqlite::Connection;

    use super::*;

    /// What another process gets when it asks for the file for itself, which it may have when nobody else uses it.
    fn take_for_itself(path: &Path) -> String {
        let sql = ["PRAGMA journal_mode = DELETE"];
        let out = Command::new("sqlite3").arg(path).args(sql).output().expect("sqlite3");
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    #[test]
    fn reading_a_files_bytes_does_not_give_its_locks_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.db");
        let conn = Connection::open(&path).unwrap();
        conn.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t(x); BEGIN; SELECT * FROM t").unwrap();
        drop(open_file(&path).unwrap());
        drop(open_file(&path).unwrap());
        assert_ne!(take_for_itself(&path), "delete", "the connection's lock is still there");
        // That is what it is for.
        drop(File::open(&path).unwrap());
        assert_eq!(take_for_itself(&path), "delete");
    }

    #[test]
    fn a_file_is_opened_once_and_another_of_its_name_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "one").unwrap();
        let first = open_file(&path).unwrap();
        assert!(Arc::ptr_eq(&first, &open_file(&path).unwrap()));
        std::fs::write(dir.path().join("new"), "two").unwrap();
        std::fs::rename(dir.path().join("new"), &path).unwrap();
        let second = open_file(&path).unwrap();
        assert_eq!(std::io::read_to_string(&*second).unwrap(), "two");
        assert_eq!(std::io::read_to_string(&*first).unwrap(), "one");
    }
}
