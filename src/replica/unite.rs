//! Coming back after a long time: a peer's whole file is taken in where its changes alone cannot be had any more.
//! Invariant: one transaction of the file that is there, which stays the same site; what was written here and the peer
//! has not seen stays as it was written, and of a row that is not in the peer's file only the peer's forgetting may be
//! the reason to remove it.

use std::path::Path;

use super::absorb::OwnCommit;
use super::engine::Engine;
use super::events;
use super::forget::load_collected;
use super::plan::Plan;
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::{OPTIONS, state_table};
use crate::core::merge::RowState;
use crate::core::message::SyncRequest;
use crate::core::names::DbName;
use crate::core::schema::SchemaMode;
use crate::core::sqltext::{ident, list};
use crate::core::value::{Value, ValueRef};
use crate::core::vector::Vector;
use crate::core::version::Version;
use crate::sqlite;
use crate::sqlite::value::get;

/// A copy of a peer's file.
pub struct PeerFile {
    store: Store,
}

impl PeerFile {
    /// Opens a copy, which is this process's own.
    pub fn open(path: &Path, spool_dir: &Path) -> Result<Self> {
        Self::with_connection(sqlite::open_replica(path)?, spool_dir)
    }

    /// Takes over a connection to a copy.
    pub fn with_connection(conn: rusqlite::Connection, spool_dir: &Path) -> Result<Self> {
        // A table that the peer does not replicate may be there all the same.
        let replicated = {
            let sql = "SELECT lower(s.tbl_name) FROM sqlite_schema AS s, __litemesh_table AS t
                       WHERE s.type = 'trigger' AND s.name = '__litemesh_i_' || t.id";
            let mut statement = conn.prepare(sql)?;
            let names = statement.query_map([], |r| r.get::<_, String>(0))?;
            names.collect::<rusqlite::Result<std::collections::BTreeSet<_>>>()?
        };
        let covers = move |table: &str| replicated.contains(&table.to_lowercase());
        let store = Store::with_connection(conn, spool_dir, Box::new(covers), SchemaMode::Manual)?;
        Ok(Self { store })
    }
}

/// What taking in a peer's file came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct United {
    /// Rows that were deleted while this node was away.
    pub removed: u64,
}

impl Engine {
    /// Rows of a peer are here, with all that it held.
    pub(super) fn took_over(&mut self, own: Option<OwnCommit>) {
        self.counters.peer_syncs += 1;
        self.sync_error = None;
        self.hole_since_ms = None;
        let vector = &self.store.head().vector;
        for (site, feed) in &mut self.feeds {
            if feed.pending.values().all(|c| c.header.to <= vector.n(*site)) {
                feed.stopped = None;
                feed.schema_stopped = false;
            }
        }
        self.publish(own);
    }

    /// Takes in a peer's file; what was written here stays, and goes to the others as ever. `told` is what to write down
    /// of it.
    pub fn unite(&mut self, mut file: PeerFile, told: &str, wall_ms: u64, now_ms: u64) -> Result<United> {
        if file.store.head.lineage != self.store().head().lineage {
            let why = "the peer's file is another database of the same name";
            return Err(ReplicaError::Unfit(why.to_owned()));
        }
        if let Some(why) = self.too_far_ahead(&file.store.head.vector, now_ms) {
            return Err(ReplicaError::Unfit(format!("the peer's rows wait: {why}")));
        }
        let db = self.db.clone();
        let (own, united) = self.store_mut().unite(&db, &mut file.store, told, wall_ms)?;
        self.members.note_behind(None, now_ms);
        self.took_over(own);
        Ok(united)
    }
}

impl Store {
    fn unite(
        &mut self,
        db: &DbName,
        file: &mut Store,
        told: &str,
        now_ms: u64,
    ) -> Result<(Option<OwnCommit>, United)> {
        let (lineage, vector) = (self.head.lineage, self.head.vector.clone());
        let ask = SyncRequest { db: db.clone(), lineage, request: 0, vector, after_lsn: 0 };
        let upto = file.head.lsn;
        let (mut rows, _) = file.read_range(&ask, (0, upto), false)?;
        let (held, site) = (file.head.vector.clone(), file.head.site);
        self.write(|store| {
            let own = store.absorb_pending()?;
            let mut united = United::default();
            store.apply_file(&mut rows, &held, |store| {
                united.removed = store.remove_collected(file, &held)?;
                Ok(())
            })?;
            store.save_peer_lsn(site, upto)?;
            let mut collected = store.head.collected.clone();
            collected.merge(&load_collected(&file.conn)?);
            store.set_collected(collected)?;
            events::note(&store.conn, now_ms, told.to_owned())?;
            Ok((own, united))
        })
    }

    /// Removes the rows that the peer's file does not have because they were deleted, which it has forgotten.
    fn remove_collected(&mut self, file: &Store, held: &Vector) -> Result<u64> {
        if file.head.collected.0.is_empty() {
            return Ok(0);
        }
        let mut removed = 0;
        for plan in self.plans.clone() {
            let there = file.plans.iter().find(|p| p.wire_name.eq_ignore_ascii_case(&plan.wire_name));
            let Some(there) = there.filter(|_| !self.keeps_tombstones(&plan) && plan.table.name != OPTIONS)
            else {
                continue;
            };
            for key in self.lacking(&plan, file, there)? {
                let key: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
                if let (Some(row), _) = self.local_row(&plan, &key)? {
                    self.keep_unseen(&plan, &key, &row, &|v: &Version| !held.covers(*v))?;
                }
                self.conn.prepare_cached(&plan.delete_row)?.execute(rusqlite::params_from_iter(&key))?;
                let remove = plan.remove_state();
                self.conn.prepare_cached(&remove)?.execute(rusqlite::params_from_iter(&key))?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// The keys of living rows of which the peer has forgotten that they were deleted.
    fn lacking(&self, plan: &Plan, file: &Store, there: &Plan) -> Result<Vec<Vec<Value>>> {
        let keys = plan.table.key.len();
        let on = plan.table.key.iter().enumerate().map(|(i, k)| format!("t.{} = s.k{i}", k.sql));
        let sql = format!(
            "SELECT {}, s.bh, s.bs, s.dh, s.ds, s.cols FROM {} AS t LEFT JOIN {} AS s ON {}",
            list(&plan.table.key, |k| format!("t.{}", k.sql)),
            ident(&plan.table.name),
            state_table(&plan.table),
            on.collect::<Vec<_>>().join(" AND ")
        );
        let mut statement = self.conn.prepare(&sql)?;
        let mut rows = statement.query([])?;
        let mut found = Vec::new();
        while let Some(row) = rows.next()? {
            let state = match row.get_ref(keys)? {
                rusqlite::types::ValueRef::Null => RowState::ADOPTED,
                _ => self.sites.read_state(row, keys)?,
            };
            let key = (0..keys).map(|i| get(row, i)).collect::<rusqlite::Result<Vec<_>>>()?;
            // Rows whose key is NULL are this node's own.
            let replicates = !key.iter().any(|k| matches!(k, ValueRef::Null));
            if replicates && file.head.vector.covers(state.birth) && !file.knows(there, &key)? {
                found.push(key.iter().map(|k| k.to_value()).collect());
            }
        }
        Ok(found)
    }

    /// Whether anything is known of a key.
    fn knows(&self, plan: &Plan, key: &[ValueRef<'_>]) -> Result<bool> {
        Ok(self.sites.get(&self.conn, plan, key)?.is_some()
            || self.conn.prepare_cached(&plan.select_row)?.exists(rusqlite::params_from_iter(key))?)
    }
}
