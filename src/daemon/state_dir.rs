//! The node's state directory: one process at a time, one format, and which incarnation of each file was here last.
//! Invariant: a file that is not the one that was here last gets a new site before anything of it is told to others.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::core::names::DbName;
use crate::core::version::SiteId;
use crate::fabric::StateDir;
use crate::replica::adopt;
use crate::replica::mark::{Mark, Position};
use crate::replica::store::Store;

/// The format of the state directory.
const FORMAT: &str = "litemesh state 1\n";
/// Locked by the litemesh that uses the directory.
const LOCK: &str = "litemesh.lock";

/// A state directory in use by this process.
pub struct NodeState {
    dir: PathBuf,
    _lock: File,
}

/// What is remembered of a database.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Remembered {
    path: PathBuf,
    site: u64,
    /// The newest token; during a start the one before as well: the file has one of them, whenever we are killed.
    tokens: Vec<u64>,
}

impl NodeState {
    /// Takes the directory, which is made if it is missing.
    pub fn open(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| {
            format!("cannot make the state directory {}: choose another with --state-dir", dir.display())
        })?;
        set_private(dir)?;
        let lock_path = dir.join(LOCK);
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.with_context(|| format!("cannot write in the state directory {}", dir.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!(
                    "another litemesh runs with the state directory {}: stop it, or choose another with --state-dir",
                    dir.display()
                )
            }
            Err(TryLockError::Error(e)) => {
                return Err(e).context(format!("cannot lock {}", lock_path.display()));
            }
        }
        let format = dir.join("format");
        match std::fs::read_to_string(&format) {
            Ok(text) if text == FORMAT => {}
            Ok(text) => bail!(
                "the state directory {} has the format {:?}, this litemesh knows {:?}: use the litemesh that made it, or an \
                 empty directory",
                dir.display(),
                text.trim(),
                FORMAT.trim()
            ),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => write_durably(&format, FORMAT.as_bytes())?,
            Err(e) => return Err(e).context(format!("cannot read {}", format.display())),
        }
        let state = Self { dir: dir.to_owned(), _lock: lock };
        if let Ok(text) = std::fs::read_to_string(state.left()) {
            bail!(
                "{}; to start it all the same, as a new member or alone, remove {} first",
                text.trim(),
                state.left().display()
            );
        }
        let spool = state.spool();
        // What is left there belongs to a process that is gone.
        if spool.exists() {
            std::fs::remove_dir_all(&spool).with_context(|| format!("cannot empty {}", spool.display()))?;
        }
        std::fs::create_dir_all(&spool)?;
        std::fs::create_dir_all(dir.join("marks"))?;
        std::fs::create_dir_all(dir.join("cdc"))?;
        Ok(state)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Says that this node left its mesh: whatever starts it again by habit is not to bring it back.
    fn left(&self) -> PathBuf {
        self.dir.join("left")
    }

    /// Writes down that this node left its mesh.
    pub fn note_left(&self, mesh_id: &str) -> Result<()> {
        let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        let text = format!("this node left the mesh {mesh_id} on {now}\n");
        write_durably(&self.left(), text.as_bytes())
    }

    /// Removes what makes this node a member of its mesh, when its server has ended.
    pub fn forget_mesh(&self) -> Result<()> {
        let mesh = StateDir::new(&self.dir);
        for path in mesh.of_the_mesh() {
            let removed = match path.is_dir() {
                true => std::fs::remove_dir_all(&path),
                false => std::fs::remove_file(&path),
            };
            match removed {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(e).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Where temporary files go.
    pub fn spool(&self) -> PathBuf {
        self.dir.join("spool")
    }

    fn load(&self) -> Result<BTreeMap<DbName, Remembered>> {
        let path = self.dir.join("databases.json");
        match std::fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    fn save(&self, all: &BTreeMap<DbName, Remembered>) -> Result<()> {
        write_durably(&self.dir.join("databases.json"), &serde_json::to_vec_pretty(all)?)
    }

    /// Where it is noted how far the host's programs were told of a file's changes.
    pub fn told(&self, name: &DbName) -> PathBuf {
        self.dir.join("cdc").join(format!("{name}.json"))
    }

    /// Where it is noted how far a file was.
    pub fn mark(&self, name: &DbName) -> PathBuf {
        self.dir.join("marks").join(name.as_str())
    }

    /// Makes sure that an adopted file is the one that was here last, else makes it a new incarnation; returns
    /// whether that was needed. Rotates the token either way.
    pub fn claim(&self, name: &DbName, path: &Path, conn: &Connection) -> Result<bool> {
        let mut all = self.load()?;
        let site = Store::meta::<i64>(conn, "site")?.unwrap_or_default() as u64;
        let token = Store::meta::<i64>(conn, "token")?.map(|t| t as u64);
        let known = all.get(name);
        let same = known.is_some_and(|k| k.site == site && token.is_some_and(|t| k.tokens.contains(&t)));
        // The token of a copy made since the last start is the newest: it is behind what the file was.
        let here = Position::of(conn, SiteId(site))?;
        let same = same && !Mark::read(&self.mark(name)).is_some_and(|mark| here.is_behind(&mark));
        // A file that has never been started has no token: it was made here just now.
        let fresh = token.is_none();
        if !same && !fresh {
            check_whole(path, conn)?;
        }
        let site = if same || fresh { site } else { new_site().0 };
        let next = rand::random::<u64>() >> 1;
        // Both until the file has the new one, so that a process that is killed in between finds its own file again;
        // then only that: a copy made since the last start has the old one.
        let mut remember = |tokens| {
            all.insert(name.clone(), Remembered { path: path.to_owned(), site, tokens });
            self.save(&all)
        };
        remember(token.into_iter().chain([next]).collect())?;
        conn.execute_batch("BEGIN IMMEDIATE")?;
        adopt::become_site(conn, SiteId(site))?;
        Store::set_meta(conn, "token", next as i64)?;
        conn.execute_batch("COMMIT")?;
        remember(vec![next])?;
        Ok(!same && !fresh)
    }

    /// The file that is found there next is another one, whatever it says.
    pub fn distrust(&self, name: &DbName) -> Result<()> {
        let mut all = self.load()?;
        if let Some(known) = all.get_mut(name) {
            known.tokens.clear();
        }
        self.save(&all)
    }

    /// Notes that a file goes on as another site. Without that it would become yet another at the next start.
    pub fn note_site(&self, name: &DbName, site: SiteId) -> Result<()> {
        let mut all = self.load()?;
        match all.get_mut(name) {
            Some(known) if known.site != site.0 => known.site = site.0,
            _ => return Ok(()),
        }
        self.save(&all)
    }

    /// Forgets a database that was detached.
    pub fn forget(&self, name: &DbName) -> Result<()> {
        let mut all = self.load()?;
        all.remove(name);
        if let Err(e) = std::fs::remove_file(self.mark(name))
            && e.kind() != std::io::ErrorKind::NotFound
        {
            return Err(e).with_context(|| format!("cannot remove {}", self.mark(name).display()));
        }
        self.save(&all)
    }
}

/// Refuses a file that is damaged. Asked of files that were put in place by somebody: a copy made while a program wrote
/// is a mixture of pages.
fn check_whole(path: &Path, conn: &Connection) -> Result<()> {
    let ask = || -> rusqlite::Result<Option<String>> {
        let mut statement = conn.prepare("PRAGMA integrity_check")?;
        let found = statement.query_map([], |r| r.get::<_, String>(0))?;
        // Rows that an application wrote with its constraints off are its own affair.
        let of_rows =
            |t: &str| t.starts_with("NULL value in ") || t.starts_with("CHECK constraint failed in ");
        for text in found {
            let text = text?;
            if text != "ok" && !of_rows(&text) {
                return Ok(Some(text));
            }
        }
        Ok(None)
    };
    let what = match ask() {
        Ok(None) => return Ok(()),
        Ok(Some(what)) => what,
        Err(e) if is_damage(&e) => e.to_string(),
        Err(e) => return Err(e.into()),
    };
    let first = what.lines().next().unwrap_or_default();
    bail!(
        "{} is damaged ({first}): a copy made with cp while it was written, without its -wal, is not whole; put a copy made by \
         SQLite's .backup or VACUUM INTO in its place, or move it away with its -wal and -shm and start again: then this \
         node fetches one from a peer; nothing was changed",
        path.display()
    )
}

fn is_damage(e: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(e.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
}

/// Whether a litemesh runs with this state directory, be it only to end.
pub fn is_in_use(dir: &Path) -> bool {
    let lock = File::open(dir.join(LOCK));
    lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// A site id that no other file has.
pub fn new_site() -> SiteId {
    SiteId((rand::random::<u64>() >> 1).max(1))
}

/// Holds a database file for this process, so that no second litemesh uses it.
pub fn lock_database(path: &Path) -> Result<File> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "another litemesh replicates {}: stop it first, or talk to it with its --state-dir",
            path.display()
        ),
        Err(TryLockError::Error(e)) => Err(e).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Writes a file so that it is there whole, or as before.
pub fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        std::io::Write::write_all(&mut file, bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)?;
        File::open(directory)?.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

fn set_private(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("cannot make {} private", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adopted(path: &Path) -> Connection {
        let conn = Connection::open(path).unwrap();
        adopt::install(&conn, 1, SiteId(5)).unwrap();
        conn
    }

    #[test]
    fn a_restored_copy_gets_a_new_site() {
        let dir = tempfile::tempdir().unwrap();
        let state = NodeState::open(&dir.path().join("state")).unwrap();
        let (name, path) = ("app".parse().unwrap(), dir.path().join("app.db"));
        assert!(!state.claim(&name, &path, &adopted(&path)).unwrap());
        std::fs::copy(&path, dir.path().join("yesterday.db")).unwrap();
        let conn = Connection::open(&path).unwrap();
        assert!(!state.claim(&name, &path, &conn).unwrap());
        assert!(!state.claim(&name, &path, &conn).unwrap());
        drop(conn);
        std::fs::copy(dir.path().join("yesterday.db"), &path).unwrap();
        let conn = Connection::open(&path).unwrap();
        assert!(state.claim(&name, &path, &conn).unwrap());
        assert_ne!(Store::meta::<i64>(&conn, "site").unwrap(), Some(5));
    }

    #[test]
    fn a_copy_made_since_the_start_before_gets_a_new_site() {
        let dir = tempfile::tempdir().unwrap();
        let state = NodeState::open(&dir.path().join("state")).unwrap();
        let (name, path) = ("app".parse().unwrap(), dir.path().join("app.db"));
        assert!(!state.claim(&name, &path, &adopted(&path)).unwrap());
        std::fs::copy(&path, dir.path().join("copy.db")).unwrap();
        assert!(!state.claim(&name, &path, &Connection::open(&path).unwrap()).unwrap(), "a restart");
        std::fs::copy(dir.path().join("copy.db"), &path).unwrap();
        assert!(state.claim(&name, &path, &Connection::open(&path).unwrap()).unwrap(), "the copy");
    }

    #[test]
    fn a_copy_made_since_the_last_start_gets_a_new_site() {
        let dir = tempfile::tempdir().unwrap();
        let state = NodeState::open(&dir.path().join("state")).unwrap();
        let (name, path) = ("app".parse().unwrap(), dir.path().join("app.db"));
        let conn = adopted(&path);
        assert!(!state.claim(&name, &path, &conn).unwrap());
        std::fs::copy(&path, dir.path().join("copy.db")).unwrap();
        conn.execute_batch("UPDATE __litemesh_clock SET lsn = lsn + 1").unwrap();
        let went_on = Position::of(&conn, SiteId(5)).unwrap();
        Mark::open(&state.mark(&name)).unwrap().note(went_on).unwrap();
        drop(conn);
        std::fs::copy(dir.path().join("copy.db"), &path).unwrap();
        let conn = Connection::open(&path).unwrap();
        assert!(state.claim(&name, &path, &conn).unwrap(), "the copy");
        assert!(!state.claim(&name, &path, &conn).unwrap(), "and then it is the file");
    }

    #[test]
    fn a_start_that_was_killed_before_the_file_had_its_token_changes_no_site() {
        let dir = tempfile::tempdir().unwrap();
        let state = NodeState::open(&dir.path().join("state")).unwrap();
        let (name, path) = ("app".parse().unwrap(), dir.path().join("app.db"));
        let conn = adopted(&path);
        assert!(!state.claim(&name, &path, &conn).unwrap());
        // What is written of a claim before the file changes.
        conn.execute_batch("BEGIN IMMEDIATE").unwrap();
        let other = Connection::open(&path).unwrap();
        assert!(state.claim(&name, &path, &other).is_err(), "the file is locked");
        conn.execute_batch("ROLLBACK").unwrap();
        assert!(!state.claim(&name, &path, &conn).unwrap());
    }

    #[test]
    fn a_directory_in_use_or_of_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = NodeState::open(dir.path()).unwrap();
        assert!(NodeState::open(dir.path()).is_err_and(|e| e.to_string().contains("another litemesh")));
        drop(first);
        std::fs::write(dir.path().join("format"), "litemesh state 99\n").unwrap();
        assert!(NodeState::open(dir.path()).is_err_and(|e| e.to_string().contains("format")));
    }
}
