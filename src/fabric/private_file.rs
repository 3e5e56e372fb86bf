//! Files of the state directory. Invariant: nobody but the owner can read one at any moment, and a crash leaves the
//! old content or the new, never a part.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Why a file of the state directory could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub struct StateFileError {
    /// "read" or "write".
    pub action: &'static str,
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

/// Replaces the file's content. The directory is made when it is missing.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), StateFileError> {
    replace(path, bytes).map_err(|source| StateFileError { action: "write", path: path.to_owned(), source })
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_dir(dir)?;
    // A temporary file is made with mode 0600.
    let mut partial = tempfile::Builder::new().prefix(".partial-").tempfile_in(dir)?;
    partial.write_all(bytes)?;
    partial.as_file().sync_all()?;
    partial.persist(path).map_err(|e| e.error)?;
    File::open(dir)?.sync_all()
}

/// Makes a directory, and those above it, that only the owner can enter.
pub fn make_dir(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// The file's content; `None` when there is no such file.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, StateFileError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StateFileError { action: "read", path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_the_owner_can_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("deeper/secret");
        assert!(read(&path).expect("readable").is_none());
        write(&path, b"one").expect("writable");
        write(&path, b"two").expect("writable");
        assert_eq!(read(&path).expect("readable").as_deref(), Some(b"two".as_slice()));
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().expect("has one")), 0o700);
        assert_eq!(fs::read_dir(dir.path().join("deeper")).expect("readable").count(), 1);
    }
}
