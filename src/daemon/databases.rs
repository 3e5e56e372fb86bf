//! Starting databases: looking at files before anything is changed, adopting them or getting them from the mesh, and
//! running them. Invariant: a file is changed only after the node is part of its mesh.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rusqlite::Connection;
use tracing::{info, warn};

use super::cdc;
use super::joining::{fetch_copy, peers_with};
use super::router::Router;
use super::state_dir::{NodeState, lock_database, new_site};
use crate::config::{Config, DatabaseSpec, Journal};
use crate::core::names::DbName;
use crate::core::sqltext::ident;
use crate::core::version::SiteId;
use crate::fabric::Fabric;
use crate::fabric::link::Outgoing;
use crate::replica::clock::{steady_ms, wall_clock_ms};
use crate::replica::conflict::Retention;
use crate::replica::engine::Engine;
use crate::replica::forget::Forgetting;
use crate::replica::joined::Joined;
use crate::replica::mark::Mark;
use crate::replica::merging::Merging;
use crate::replica::store::Store;
use crate::replica::watch::FileWatch;
use crate::replica::worker::{Report, Worker, WorkerHandle};
use crate::replica::{adopt, copy, events};
use crate::sqlite::{self, OpenError, introspect};

/// How long a node waits for others before it takes them to be away.
const PEER_PATIENCE: Duration = Duration::from_secs(8);

/// How long the first node on a NATS system that is there listens for others.
const STRANGER_PATIENCE: Duration = Duration::from_secs(3);
/// How long a node without rows waits there for one that has some.
const EMPTY_PATIENCE: Duration = Duration::from_secs(15);

/// A database file as it was found.
pub struct Found {
    /// What the operator said.
    pub spec: DatabaseSpec,
    /// Held while the database runs; `None` while there is no file.
    lock: Option<File>,
    adopted: bool,
    has_rows: bool,
}

/// A database that replicates.
pub struct Running {
    /// Its name.
    pub name: DbName,
    /// Its file.
    pub path: PathBuf,
    /// Its thread.
    pub worker: WorkerHandle,
    thread: JoinHandle<()>,
    _watch: FileWatch,
    _lock: File,
}

impl Running {
    /// Lets the thread absorb what there is, and waits for it to end.
    pub fn stop(self) {
        self.worker.stop();
        if self.thread.join().is_err() {
            warn!(db = %self.name, "its thread had failed");
        }
    }
}

/// What starting a database needs.
pub struct Starter<'a> {
    /// The node's state directory.
    pub state: &'a NodeState,
    /// Peers and messages.
    pub router: &'a Arc<Router>,
    /// Where workers send.
    pub outgoing: tokio::sync::mpsc::Sender<Outgoing>,
    /// The node's configuration.
    pub config: &'a Config,
    /// Whether other nodes belong to the mesh, up or not.
    pub has_members: bool,
    /// Whether the operator said to join.
    pub joins: bool,
    /// What the node reaches the others by.
    pub fabric: &'a Fabric,
    /// How long a database may take to appear on nodes that are there, before this file is taken to be the first.
    pub others_first: Duration,
    /// Tells this mesh from others; the same on every node.
    pub mesh_id: String,
}

/// Looks at a file without changing it.
pub fn find(spec: DatabaseSpec) -> Result<Found> {
    let directory = match spec.path.parent() {
        Some(d) if !d.as_os_str().is_empty() => d.to_owned(),
        _ => PathBuf::from("."),
    };
    if !directory.is_dir() {
        bail!("{}: its directory does not exist: make it, or correct the path", spec.path.display());
    }
    if rustix::fs::access(&directory, rustix::fs::Access::WRITE_OK).is_err() {
        bail!("{}: SQLite and litemesh must be able to write in its directory", spec.path.display());
    }
    let conn = match sqlite::open_replica(&spec.path) {
        Ok(conn) => conn,
        Err(OpenError::Missing(_)) => return Ok(Found { spec, lock: None, adopted: false, has_rows: false }),
        Err(e) => return Err(e.into()),
    };
    let lock = Some(lock_database(&spec.path)?);
    let adopted = adopt::is_adopted(&conn)?;
    let has_rows = !adopted && has_rows(&conn)?;
    Ok(Found { spec, lock, adopted, has_rows })
}

fn has_rows(conn: &Connection) -> Result<bool> {
    for table in introspect::read(conn)?.tables {
        if conn.prepare(&format!("SELECT 1 FROM {} LIMIT 1", ident(&table.name)))?.exists([])? {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Starter<'_> {
    /// Starts a database; returns when it replicates.
    pub async fn start(&self, mut found: Found, report: Report) -> Result<Running> {
        let (name, path) = (found.spec.name.clone(), found.spec.path.clone());
        if !found.adopted {
            match self.source(&found).await? {
                Some(peer) => self.join(&mut found, &peer).await?,
                None => self.adopt(&mut found)?,
            }
        }
        let lock = match found.lock {
            Some(lock) => lock,
            None => lock_database(&path)?,
        };
        let mut store = self.open(&name, &path)?;
        let joined = store.unite_kept()?;
        if joined != Joined::default() {
            let Joined { rows, conflicts } = joined;
            info!(db = %name, "{rows} rows of this file are rows of the mesh now, {conflicts} are kept as conflicts");
        }
        let (whole, columns) = (self.config.whole_row.clone(), self.config.by_column.clone());
        store.set_merging(Merging {
            whole_row: Box::new(move |t| whole.covers(t)),
            by_column: Box::new(move |t| columns.covers(t)),
        })?;
        store.name_site(store.head().site, self.config.name.as_str())?;
        let mut engine = Engine::new(name.clone(), store, &self.state.spool());
        engine.keep_conflicts(Retention {
            age_ms: u64::try_from(self.config.conflicts_age.as_millis()).unwrap_or(u64::MAX),
            count: self.config.conflicts_max,
        });
        let in_ms = |age: Duration| u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        engine.give_way();
        engine.remember(Forgetting {
            me: Some(self.config.name.clone()),
            age_ms: in_ms(self.config.tombstones_age),
            absent_ms: in_ms(self.config.absent_age),
        });
        let (mut worker, handle) =
            Worker::new(name.clone(), engine, self.outgoing.clone(), report, self.router.clocks());
        let mark = self.state.mark(&name);
        worker.keep_mark(Mark::open(&mark).with_context(|| format!("cannot write {}", mark.display()))?);
        let waker = handle.clone();
        let watch = FileWatch::new(&path, move || waker.wake())
            .with_context(|| format!("cannot watch {} for changes", path.display()))?;
        let thread = std::thread::Builder::new().name(format!("db-{name}")).spawn(move || worker.run());
        let thread = thread.context("cannot start a thread")?;
        tokio::task::block_in_place(|| cdc::begin(self.config, self.state, &name, &handle))?;
        self.router.add(name.clone(), handle.clone());
        Ok(Running { name, path, worker: handle, thread, _watch: watch, _lock: lock })
    }

    fn open(&self, name: &DbName, path: &Path) -> Result<Store> {
        let conn = sqlite::open_replica(path)?;
        if self.config.journal == Journal::Wal && sqlite::ensure_wal(&conn)? {
            info!(db = %name, "{} is in WAL mode now, so that readers and writers do not wait for each other", path.display());
        }
        if self.state.claim(name, path, &conn)? {
            warn!(
                db = %name,
                "{} is a copy, was restored, or was last used with another state directory: it goes on as a new site",
                path.display()
            );
            let told = "the file was restored, copied or replaced: it goes on as a new site; what the mesh has and it lacks \
                        comes back, and what only it has goes to the others";
            conn.execute_batch("BEGIN IMMEDIATE")?;
            events::note(&conn, wall_clock_ms(), told.to_owned())?;
            conn.execute_batch("COMMIT")?;
        }
        drop(conn);
        let tables = self.config.tables.clone();
        let covers = move |table: &str| tables.covers(table);
        let context = || format!("{}", path.display());
        let mut store = Store::open(path, &self.state.spool(), Box::new(covers), self.config.schema);
        if let (Ok(store), Some(rekey)) = (&mut store, self.config.rekey.clone()) {
            store.keep_both(Box::new(move |table| rekey.covers(table))).with_context(context)?;
        }
        store.with_context(context)
    }

    /// Whom to get the database from; `None` if this file is the first.
    async fn source(&self, found: &Found) -> Result<Option<crate::core::names::NodeName>> {
        let name = &found.spec.name;
        let is_first = !self.has_members && !self.joins;
        // Whoever reaches another NATS system belongs: nobody says who is the first there.
        let is_open = self.fabric.is_external();
        if is_first && !is_open {
            return Ok(None);
        }
        let mut reached = None;
        let asked = tokio::time::Instant::now();
        let mut warned = false;
        loop {
            let now_ms = steady_ms();
            if let Some(peer) = peers_with(self.router, name, now_ms).first() {
                self.check_clock(peer)?;
                return Ok(Some(peer.clone()));
            }
            let heard = self.router.peers().values().any(|p| p.is_live(now_ms));
            // Those who answered do not have it.
            if heard && asked.elapsed() > self.others_first(found) {
                return Ok(None);
            }
            reached = self.fabric.connected().then(|| reached.unwrap_or_else(tokio::time::Instant::now));
            if is_open && !heard {
                let alone = reached.is_some_and(|at| at.elapsed() > STRANGER_PATIENCE);
                if is_first && alone {
                    return Ok(None);
                }
                if reached.is_none() {
                    if asked.elapsed() > PEER_PATIENCE && !warned {
                        warn!(db = %name, "waits for the NATS system, to learn whether another node has this database");
                        warned = true;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            }
            if asked.elapsed() > PEER_PATIENCE && !heard {
                if self.joins {
                    bail!(
                        "no node of the mesh answers: is one running, and is its cluster port reachable from here?"
                    );
                }
                if !found.has_rows {
                    return Ok(None);
                }
                if !warned {
                    warn!(db = %name, "waits for another node of the mesh, to learn whether it has this database already");
                    warned = true;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Where nobody says who comes first, files with rows do, and of several nodes with such the first by name.
    fn others_first(&self, found: &Found) -> Duration {
        let comes_first = || {
            let now_ms = steady_ms();
            self.router.peers().iter().all(|(name, p)| !p.is_live(now_ms) || self.router.node() < name)
        };
        match (self.fabric.is_external(), found.has_rows) {
            (false, _) => self.others_first,
            (true, true) if comes_first() => self.others_first,
            (true, true) => PEER_PATIENCE,
            (true, false) => EMPTY_PATIENCE,
        }
    }

    fn check_clock(&self, peer: &crate::core::names::NodeName) -> Result<()> {
        let offset_ms = self.router.peers().get(peer).map_or(0, |p| p.clock_offset_ms);
        if offset_ms.unsigned_abs() <= self.router.clocks().get().max_skew_ms {
            return Ok(());
        }
        let direction = if offset_ms > 0 { "behind" } else { "ahead of" };
        bail!(
            "this host's clock is {} s {direction} node {peer}'s: set the clocks right, then start again; nothing was changed",
            offset_ms.unsigned_abs() / 1_000
        )
    }

    fn adopt(&self, found: &mut Found) -> Result<()> {
        let path = &found.spec.path;
        if found.lock.is_none() {
            sqlite::create(path)?;
            info!(db = %found.spec.name, "{} did not exist: made an empty database", path.display());
            found.lock = Some(lock_database(path)?);
        }
        let conn = sqlite::open_replica(path)?;
        // Files without rows are the same everywhere: nodes that adopt them at once need not agree on one first.
        let lineage = if found.has_rows {
            rand::random::<u64>() >> 1
        } else {
            let text = format!("{}/{}", self.mesh_id, found.spec.name);
            let hash = blake3::derive_key("litemesh lineage of an empty database", text.as_bytes());
            u64::from_be_bytes(hash[..8].try_into().unwrap_or_default()) >> 1
        };
        let install = || -> rusqlite::Result<()> {
            conn.execute_batch("BEGIN IMMEDIATE")?;
            adopt::install(&conn, lineage, new_site())?;
            conn.execute_batch("COMMIT")
        };
        install().map_err(|e| OpenError::of(path, e))?;
        info!(db = %found.spec.name, "adopted {}", path.display());
        Ok(())
    }

    async fn join(&self, found: &mut Found, peer: &crate::core::names::NodeName) -> Result<()> {
        let path = found.spec.path.clone();
        let mut copy = path.clone().into_os_string();
        copy.push(".litemesh-join");
        let copy = PathBuf::from(copy);
        let context = || format!("{}", path.display());
        // What was cut off stays: the next start goes on from it.
        fetch_copy(self.router, peer, &found.spec.name, &copy).await.with_context(context)?;
        let (fetched, exists) = (copy.clone(), found.lock.is_some());
        let (dest, merge) = (path.clone(), self.config.merge);
        let take = move || take_in(&fetched, &dest, exists, new_site(), merge);
        let taken = tokio::task::spawn_blocking(take).await;
        remove_copy(&copy);
        taken?.with_context(context)?;
        info!(db = %found.spec.name, node = %peer, "{} has the mesh's rows", path.display());
        Ok(())
    }
}

fn take_in(fetched: &Path, dest: &Path, exists: bool, site: SiteId, merge: bool) -> Result<()> {
    if exists {
        let conn = sqlite::open_replica(dest)?;
        copy::import_copy(&conn, fetched, site, merge)?;
    } else {
        copy::install_copy(fetched, dest, site)?;
    }
    Ok(())
}

/// Removes what is left of a fetched copy.
pub(super) fn remove_copy(copy: &Path) {
    for suffix in ["", "-wal", "-shm", "-journal"] {
        let mut name = copy.to_owned().into_os_string();
        name.push(suffix);
        // Usually there is nothing left; what cannot be removed is overwritten by the next try.
        drop(std::fs::remove_file(name));
    }
}
