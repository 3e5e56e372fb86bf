//! A file that is being replicated: its connection and what is kept of it in memory. Invariant: after a failed
//! transaction memory is read again from the file, so that the two never differ.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension};

use super::adopt::{self, Cause};
use super::children::Touched;
use super::conflict::ConflictCounts;
use super::forget::{self, Joining};
use super::merging::Merging;
use super::parts::{Ends, PART_ROWS};
use super::plan::Plan;
use super::rekey::{self, Links, Moves};
use super::schema::ObjectKey;
use super::shadow::Sites;
use super::{ReplicaError, Result, same_file};
use crate::core::capture::FILE_FORMAT;
use crate::core::schema::SchemaMode;
use crate::core::vector::{Point, Vector};
use crate::core::version::{Hlc, SiteId};
use crate::sqlite;
use crate::sqlite::durable::Durability;

/// A replicated file. One thread uses it.
pub struct Store {
    pub(super) conn: Connection,
    durability: Durability,
    /// How many changes the connection had made when it was synchronised last.
    synced: Cell<u64>,
    pub(super) spool_dir: PathBuf,
    pub(super) plans: Vec<Arc<Plan>>,
    pub(super) sites: Sites,
    pub(super) head: Head,
    pub(super) schema_version: i64,
    pub(super) notes: Vec<String>,
    pub(super) null_keys: u64,
    pub(super) covers: TableFilter,
    /// Tables and columns of which this file may have rows that others lack, and will tell them again.
    pub(super) doubtful: BTreeSet<ObjectKey>,
    /// Objects that a peer's record brought back after they had been dropped.
    pub(super) revived: BTreeSet<ObjectKey>,
    /// Whether changes of the schema replicate.
    pub(super) schema_mode: SchemaMode,
    /// The user version at the last look.
    pub(super) user_version: i64,
    /// Whether applying rows changed others by a write of ours, which must be absorbed before more rows meet them.
    pub(super) unsettled: bool,
    /// The mesh's clock, and how far beyond it a write may be dated.
    pub(super) dates: Option<(u64, u64)>,
    /// Which tables the configuration wants to keep both rows of an id collision.
    pub(super) keep_both: Option<TableFilter>,
    /// What that means for each table.
    pub(super) links: Arc<Links>,
    /// What moved in the transaction at hand.
    pub(super) moves: Moves,
    /// What this node's operator says about merging.
    pub(super) merging: Option<Merging>,
    /// Parents' keys that got another row in the transaction at hand, by number of the table.
    pub(super) collided: Vec<(i64, i64)>,
    /// Rows that came in the transaction at hand and refer to such a key.
    pub(super) touched: Vec<Touched>,
    /// The conflicts counted last, and the lsn of the newest change to them then.
    pub(super) counted: Cell<Option<(Option<i64>, ConflictCounts)>>,
    /// Where the file's own feed was when it was opened.
    pub(super) opened: Point,
    /// What tells the file from another of the same name, and what became of it.
    pub(super) identity: Option<(u64, u64)>,
    pub(super) replaced: Option<String>,
    /// Nodes that got a copy and were not heard since.
    pub(super) joining: Joining,
    /// Nothing is captured any more: the node leaves the mesh.
    pub(super) closed: bool,
    /// Where the application's transactions end in the log, as far as that was seen.
    pub(super) ends: RefCell<Ends>,
    /// Sees where they end while the connection reads.
    pub(super) lookout: Option<Connection>,
    /// From how many rows on a commit of inserts is ended where a transaction ends.
    pub(super) part_rows: i64,
}

/// Whether a table of this name is replicated.
pub type TableFilter = Box<dyn Fn(&str) -> bool + Send>;

/// The numbers that change with every commit.
#[derive(Debug, Clone)]
pub struct Head {
    /// What all files of this database in the mesh share.
    pub lineage: u64,
    /// This incarnation of the file.
    pub site: SiteId,
    /// The file's clock.
    pub hlc: Hlc,
    /// The counter of row states changed in this file.
    pub lsn: i64,
    /// What the file holds of every feed, its own included.
    pub vector: Vector,
    /// The file has forgotten deletes that this covers: a row that is not here and was born below it was deleted.
    pub collected: Vector,
}

impl Store {
    /// Opens a file that was adopted before.
    pub fn open(path: &Path, spool_dir: &Path, covers: TableFilter, schema: SchemaMode) -> Result<Self> {
        Self::with_connection(sqlite::open_replica(path)?, spool_dir, covers, schema)
    }

    /// Takes over a connection to a file that was adopted before, in-memory ones included.
    pub fn with_connection(
        conn: Connection,
        spool_dir: &Path,
        covers: TableFilter,
        schema_mode: SchemaMode,
    ) -> Result<Self> {
        sqlite::configure(&conn)?;
        let durability = Durability::of_writer(&conn)?;
        let head = load_head(&conn)?;
        let sites = Sites::load(&conn)?;
        let opened = head.vector.0.get(&head.site).copied().unwrap_or(Point { n: 0, hlc: Hlc(0), id: 0 });
        let identity = same_file::identity(conn.path().unwrap_or_default());
        let mut store = Self {
            conn,
            durability,
            synced: Cell::new(0),
            spool_dir: spool_dir.to_owned(),
            plans: Vec::new(),
            sites,
            head,
            schema_version: -1,
            notes: Vec::new(),
            null_keys: 0,
            covers,
            doubtful: BTreeSet::new(),
            revived: BTreeSet::new(),
            schema_mode,
            user_version: 0,
            unsettled: false,
            dates: None,
            keep_both: None,
            links: Arc::default(),
            moves: Moves::new(),
            merging: None,
            collided: Vec::new(),
            touched: Vec::new(),
            counted: Cell::new(None),
            opened,
            identity,
            replaced: None,
            joining: Joining::new(),
            closed: false,
            ends: RefCell::default(),
            lookout: None,
            part_rows: PART_ROWS,
        };
        store.write(Self::refresh_schema)?;
        Ok(store)
    }

    /// The numbers as of the last transaction.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The application's replicated tables.
    pub fn plans(&self) -> impl Iterator<Item = &Arc<Plan>> {
        self.plans.iter().filter(|p| !p.table.is_ours())
    }

    /// The file's path, as SQLite knows it.
    pub fn path(&self) -> &str {
        self.conn.path().unwrap_or_default()
    }

    /// What an operator should know, since the last time this was asked.
    pub fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// How many changes were left out because their key is NULL, since the file was opened.
    pub fn null_keys(&self) -> u64 {
        self.null_keys
    }

    /// Whether the application has written something that is not absorbed yet. Takes no lock that a writer waits for.
    pub fn has_log(&self) -> Result<bool> {
        let mut any = self.conn.prepare_cached("SELECT 1 FROM __litemesh_log LIMIT 1")?;
        Ok(any.exists([])?)
    }

    /// Whether there is anything to absorb: a log, or a schema that may hold new tables.
    pub fn has_news(&self) -> Result<bool> {
        Ok(!self.closed && (self.has_other_schema()? || self.has_log()?))
    }

    /// Whether the schema is another one than was read last.
    pub(super) fn has_other_schema(&self) -> Result<bool> {
        Ok(self.schema_numbers()? != (self.schema_version, self.user_version))
    }

    /// SQLite's schema version, which every change of the schema moves, and the application's user version.
    fn schema_numbers(&self) -> Result<(i64, i64)> {
        let ask = |sql: &str| self.conn.prepare_cached(sql)?.query_row([], |r| r.get(0));
        Ok((ask("PRAGMA schema_version")?, ask("PRAGMA user_version")?))
    }

    /// Runs `work` in one write transaction; commits with everything on the disk, or leaves the file as it was.
    pub fn write<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.begin()?;
        self.complete(|store| {
            let value = work(store)?;
            store.commit()?;
            Ok(value)
        })
    }

    /// Begins a write transaction, however long others write.
    pub(super) fn begin(&self) -> Result<()> {
        self.conn.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        Ok(())
    }

    /// Commits what was begun, and brings it to the disk.
    pub(super) fn commit(&self) -> Result<()> {
        self.conn.prepare_cached("COMMIT")?.execute([])?;
        let changes = self.conn.total_changes();
        if self.synced.get() != changes {
            self.durability.sync()?;
            self.synced.set(changes);
        }
        Ok(())
    }

    /// Runs `work`, which commits, in a transaction that was begun; leaves the file as it was if it does not come to that.
    pub(super) fn complete<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let result = self.look_at_file().and_then(|()| work(self));
        if result.is_err() {
            if !self.conn.is_autocommit() {
                self.conn.execute_batch("ROLLBACK")?;
            }
            self.head = load_head(&self.conn)?;
            self.sites = Sites::load(&self.conn)?;
            self.moves.clear();
            // The schema is read again by the next transaction.
            self.schema_version = -1;
            self.unsettled = false;
            self.doubtful.clear();
            self.revived.clear();
            self.collided.clear();
            self.touched.clear();
            self.counted.set(None);
        }
        result
    }

    /// Reads the schema again if the application changed it; puts back what of ours is missing. Within a transaction.
    pub(super) fn refresh_schema(&mut self) -> Result<()> {
        if self.closed || !self.has_other_schema()? {
            return Ok(());
        }
        adopt::refresh(self, Cause::Application)?;
        self.note_schema(Cause::Application)
    }

    /// Brings the file's schema to what a peer recorded, and reads it again. Within a transaction.
    pub(super) fn follow_schema(&mut self) -> Result<()> {
        let late = self.materialize()?;
        adopt::refresh(self, Cause::Peer)?;
        self.merge_aside()?;
        for index in &late {
            self.settle_duplicates(index)?;
        }
        if !late.is_empty() {
            adopt::refresh(self, Cause::Peer)?;
        }
        self.check_schema()?;
        self.note_schema(Cause::Peer)
    }

    fn note_schema(&mut self, cause: Cause) -> Result<()> {
        rekey::refresh(self, cause)?;
        (self.schema_version, self.user_version) = self.schema_numbers()?;
        Ok(())
    }

    pub(super) fn plan(&self, name: &str) -> Option<Arc<Plan>> {
        self.plans.iter().find(|p| p.table.name.eq_ignore_ascii_case(name)).cloned()
    }

    /// The table that the mesh knows as this, if it is here.
    pub(super) fn plan_of(&self, ident: &str) -> Option<Arc<Plan>> {
        self.plans.iter().find(|p| p.wire_name == ident).cloned()
    }

    pub(super) fn next_lsn(&mut self) -> i64 {
        self.head.lsn += 1;
        self.head.lsn
    }

    /// The date of what was logged at `logged_ms`: a clock that is far ahead of the mesh's dates nothing.
    pub(super) fn date_ms(&self, logged_ms: u64) -> u64 {
        match self.dates {
            Some((mesh_ms, skew_ms)) if logged_ms > mesh_ms + skew_ms => mesh_ms,
            _ => logged_ms,
        }
    }

    /// Writes clock and lsn.
    pub(super) fn save_clock(&self) -> Result<()> {
        let sql = "INSERT OR REPLACE INTO __litemesh_clock(id, hlc, lsn) VALUES(1, ?1, ?2)";
        self.conn.prepare_cached(sql)?.execute((self.head.hlc.0 as i64, self.head.lsn))?;
        Ok(())
    }

    /// Raises one feed's head, in the file and in memory.
    pub(super) fn raise(&mut self, site: SiteId, point: Point) -> Result<()> {
        let index = self.sites.index(&self.conn, site)?;
        let sql = "UPDATE __litemesh_site SET n = ?2, hlc = ?3, id = ?4 WHERE idx = ?1 AND n < ?2";
        let values = (index, point.n as i64, point.hlc.0 as i64, point.id as i64);
        self.conn.prepare_cached(sql)?.execute(values)?;
        self.head.vector.raise(site, point);
        Ok(())
    }

    /// The lsn of a peer's file up to which this file has everything.
    pub fn peer_lsn(&self, peer: SiteId) -> Result<i64> {
        let mut ask = self.conn.prepare_cached("SELECT lsn FROM __litemesh_peer WHERE site = ?1")?;
        Ok(ask.query_row([peer.0 as i64], |r| r.get(0)).optional()?.unwrap_or(0))
    }

    /// Notes that this file has everything of a peer's file up to `lsn`.
    pub(super) fn save_peer_lsn(&self, peer: SiteId, lsn: i64) -> Result<()> {
        let sql = "INSERT INTO __litemesh_peer(site, lsn) VALUES(?1, ?2)
                   ON CONFLICT(site) DO UPDATE SET lsn = excluded.lsn WHERE excluded.lsn > lsn";
        self.conn.prepare_cached(sql)?.execute((peer.0 as i64, lsn))?;
        Ok(())
    }

    /// Notes which node a site is, for people to read.
    pub fn name_site(&self, site: SiteId, node: &str) -> Result<()> {
        let sql = "UPDATE __litemesh_site SET node = ?2 WHERE site = ?1 AND node IS NOT ?2";
        let known = "SELECT 1 FROM __litemesh_site WHERE site = ?1 AND node IS ?2";
        if !self.conn.prepare_cached(known)?.exists((site.0 as i64, node))? {
            self.conn.prepare_cached(sql)?.execute((site.0 as i64, node))?;
        }
        Ok(())
    }

    /// Reads a value of ours from the file.
    pub fn meta<T: rusqlite::types::FromSql>(conn: &Connection, key: &str) -> rusqlite::Result<Option<T>> {
        conn.query_row("SELECT value FROM __litemesh_meta WHERE key = ?1", [key], |r| r.get(0)).optional()
    }

    /// Writes a value of ours into the file.
    pub fn set_meta(conn: &Connection, key: &str, value: impl rusqlite::ToSql) -> rusqlite::Result<()> {
        let sql = "INSERT OR REPLACE INTO __litemesh_meta(key, value) VALUES(?1, ?2)";
        conn.execute(sql, rusqlite::params![key, value]).map(|_| ())
    }
}

pub(super) fn load_head(conn: &Connection) -> Result<Head> {
    let format: Option<i64> = Store::meta(conn, "format")?;
    if format != Some(FILE_FORMAT) {
        let found = format.map_or_else(|| "none".to_owned(), |f| f.to_string());
        return Err(ReplicaError::Unfit(format!(
            "the file has litemesh tables of format {found}, this litemesh reads {FILE_FORMAT}: use the litemesh that \
             wrote it, or 'litemesh detach' the file and adopt it again"
        )));
    }
    let missing = |what: &str| ReplicaError::Unfit(format!("the file's litemesh tables lack the {what}"));
    let lineage: i64 = Store::meta(conn, "lineage")?.ok_or_else(|| missing("lineage"))?;
    let site: i64 = Store::meta(conn, "site")?.ok_or_else(|| missing("site"))?;
    let clock = "SELECT hlc, lsn FROM __litemesh_clock WHERE id = 1";
    let (hlc, lsn) = conn.query_row(clock, [], |r| Ok((r.get::<_, i64>(0)?, r.get(1)?)))?;
    let mut vector = Vector::default();
    let mut statement = conn.prepare("SELECT site, n, hlc, id FROM __litemesh_site WHERE n > 0")?;
    let mut rows = statement.query([])?;
    while let Some(r) = rows.next()? {
        let number = |i| r.get::<_, i64>(i).map(|v| v as u64);
        vector.raise(SiteId(number(0)?), Point { n: number(1)?, hlc: Hlc(number(2)?), id: number(3)? });
    }
    let collected = forget::load_collected(conn)?;
    let (lineage, site) = (lineage as u64, SiteId(site as u64));
    Ok(Head { lineage, site, hlc: Hlc(hlc as u64), lsn, vector, collected })
}
