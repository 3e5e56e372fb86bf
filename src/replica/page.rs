//! Peer sync: the rows that a peer lacks, page by page, and taking such pages in. Invariant: a page is read in a
//! transaction that has absorbed everything; what the sender holds is told with the page that reaches its head.

use bytes::Bytes;

use super::absorb::OwnCommit;
use super::apply::PeerCommit;
use super::body::Body;
use super::rows::RowWriter;
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::{PREFIX, state_table};
use crate::core::merge::RowState;
use crate::core::message::{Holding, SyncPage, SyncRequest};
use crate::core::names::DbName;
use crate::core::vector::Vector;
use crate::core::version::{SiteId, Version};

/// How many row states of one table a page looks at; fewer when the rows are large.
const PAGE_ROWS: [i64; 5] = [4_000, 500, 60, 8, 0];
/// A page is read again with fewer rows when it grows beyond this.
const PAGE_BYTES: u64 = 4 * 1024 * 1024;

/// What became of a batch of commits.
#[derive(Default)]
pub struct Applied {
    /// The commit that absorbing made first.
    pub own: Option<OwnCommit>,
    /// How many commits were applied.
    pub count: usize,
    /// Why the commit at place `count` could not be.
    pub stopped: Option<ReplicaError>,
}

impl Store {
    /// Absorbs, then applies commits in order, in one transaction, perhaps not all of them. The first that cannot be
    /// applied ends the batch and leaves no trace.
    pub fn apply(&mut self, commits: &mut [PeerCommit]) -> Result<Applied> {
        let (failed, error) = match self.apply_all(commits) {
            Ok(applied) => return Ok(applied),
            Err((_, e)) if e.is_passing() => return Err(e),
            Err(failure) => failure,
        };
        // All was rolled back: what came before the failure is done again without it. A savepoint for each commit
        // would spare that, and cost every statement of a large commit a walk through its journal.
        let mut applied = self.apply_all(&mut commits[..failed]).map_err(|(_, e)| e)?;
        if applied.count == failed {
            applied.stopped = Some(error);
        }
        Ok(applied)
    }

    fn apply_all(&mut self, commits: &mut [PeerCommit]) -> Result<Applied, (usize, ReplicaError)> {
        let mut at = 0;
        self.write(|store| {
            let mut applied = Applied { own: store.absorb_pending()?, ..Applied::default() };
            for commit in commits {
                at = applied.count;
                store.apply_commit(commit)?;
                applied.count += 1;
                // A unique conflict was settled by a write of ours: it is absorbed before anything else meets the
                // rows it changed.
                if store.unsettled {
                    break;
                }
            }
            Ok(applied)
        })
        .map_err(|e| (at, e))
    }

    /// Absorbs, then applies a peer's pages and takes over what it held, in one transaction.
    pub fn take_over(
        &mut self,
        peer: SiteId,
        lsn: i64,
        pages: &mut Body,
        held: &Vector,
    ) -> Result<Option<OwnCommit>> {
        self.write(|store| {
            let own = store.absorb_pending()?;
            store.apply_pages(pages, held)?;
            store.save_peer_lsn(peer, lsn)?;
            Ok(own)
        })
    }

    /// Absorbs, then reads the page that answers a request.
    pub fn page(&mut self, db: &DbName, ask: &SyncRequest) -> Result<(Option<OwnCommit>, SyncPage)> {
        self.write(|store| {
            let own = store.absorb_pending()?;
            Ok((own, store.read_page(db, ask)?))
        })
    }

    fn read_page(&mut self, db: &DbName, ask: &SyncRequest) -> Result<SyncPage> {
        let after = ask.after_lsn as i64;
        let mut last = None;
        for rows in PAGE_ROWS {
            let upto = self.page_end(after, rows)?;
            let (body, whole) = self.read_range(ask, (after, upto), rows > 0)?;
            last = Some((upto, body));
            if whole {
                break;
            }
        }
        let (upto, mut body) = last.expect("at least one size was tried");
        body.rewind()?;
        let mut frames = Vec::new();
        while let Some(frame) = body.next_block()? {
            frames.push(Bytes::from(frame));
        }
        let complete = (upto == self.head.lsn).then(|| self.head.vector.clone());
        let (request, site, next_lsn) = (ask.request, self.head.site, upto as u64);
        Ok(SyncPage { db: db.clone(), request, site, frames, next_lsn, complete })
    }

    /// The lsn up to which a page goes that looks at this many rows of each table after the first.
    fn page_end(&self, after: i64, rows: i64) -> Result<i64> {
        let mut upto = self.head.lsn;
        for plan in &self.plans {
            let sql = format!(
                "SELECT lsn FROM {0} INDEXED BY {0}_lsn WHERE lsn > ?1 ORDER BY lsn LIMIT 1 OFFSET ?2",
                state_table(&plan.table)
            );
            let mut statement = self.conn.prepare_cached(&sql)?;
            let mut found = statement.query([after, rows])?;
            if let Some(row) = found.next()? {
                upto = upto.min(row.get(0)?);
            }
        }
        Ok(upto)
    }

    /// Reads the rows in a range of lsn that the asker lacks; with `bounded`, gives up when they are too many bytes.
    pub(super) fn read_range(
        &mut self,
        ask: &SyncRequest,
        range: (i64, i64),
        bounded: bool,
    ) -> Result<(Body, bool)> {
        let mut body = Body::new(&self.spool_dir);
        let mut writer = RowWriter::new(Version::ZERO, &self.links);
        let mut whole = true;
        for plan in self.plans.clone() {
            let told_whole = self.is_told_whole(&plan)?;
            let Self { conn, sites, .. } = self;
            writer.each_changed(conn, sites, &plan, range, |writer, row| {
                let has = |row: &RowState| !told_whole && row.versions().all(|v| ask.vector.covers(v));
                if !whole || has(&row.state) {
                    return Ok(());
                }
                writer.push(row);
                writer.flush_if_full(&mut body)?;
                whole = !bounded || body.len() <= PAGE_BYTES;
                Ok(())
            })?;
            writer.end_table(&plan, &mut body)?;
        }
        writer.flush(&mut body)?;
        Ok((body, whole))
    }

    /// What this file holds, for the others to know. Everything in it is on the disk.
    pub fn holding(&self, db: &DbName, answer: bool) -> Holding {
        let head = &self.head;
        let (lineage, site, vector) = (head.lineage, head.site, head.vector.clone());
        let (db, lsn, collected) = (db.clone(), head.lsn as u64, head.collected.clone());
        let left = self.left_sites().unwrap_or_default();
        let joining = self.joining.iter().map(|(node, (vector, _))| (node.clone(), vector.clone())).collect();
        Holding { db, lineage, site, vector, lsn, answer, collected, joining, left }
    }

    /// Notes that this file has everything of a peer's file up to an lsn, when it holds all that the peer held then.
    pub fn note_peer(&mut self, peer: &Holding) -> Result<()> {
        let known = self.peer_lsn(peer.site)? as u64;
        if peer.lsn > known && self.head.vector.includes(&peer.vector) {
            self.save_peer_lsn(peer.site, peer.lsn as i64)?;
        }
        Ok(())
    }

    /// Row states kept, living and dead, for status.
    pub fn state_count(&self) -> Result<u64> {
        let mut total = 0;
        for plan in &self.plans {
            let sql = format!("SELECT count(*) FROM {PREFIX}state_{}", plan.table.id);
            total += self.conn.prepare_cached(&sql)?.query_row([], |r| r.get::<_, i64>(0))? as u64;
        }
        Ok(total)
    }
}
