//! Many inserts absorbed as several commits of a bounded size, so that whoever takes one in is not long about it, and
//! read after the lock was given back. Invariant: each commit is whole transactions, and what it tells is the file as it
//! was in the transaction that absorbed it.
//!
//! What a reader sees is whole transactions; so where the log ends for a reader, a transaction ends. Nothing else tells
//! where they do. Of inserts of rows that are written once it does not matter that their values are read later.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode};

use super::Result;
use super::absorb::{Misfit, OwnCommit, julian_ms};
use super::plan::Plan;
use super::store::Store;
use crate::core::message::CommitHeader;
use crate::core::schema::KeyKind;
use crate::core::version::Version;
use crate::sqlite;

/// From how many rows on a commit is ended where a transaction ends.
pub const PART_ROWS: i64 = 500;
/// Parts of more rows than this are read under the lock, like anything else: what cannot be written aside then is
/// absorbed again later.
const MOST_ROWS: i64 = 50_000;
/// Ends of transactions that are remembered.
const ENDS: usize = 4_096;
/// Looks for a moment at which nobody writes, before the usual waiting for it.
const LOOKS: i32 = 100;

/// Where transactions end in the log, in order.
#[derive(Debug, Default)]
pub(super) struct Ends(Vec<i64>);

impl Ends {
    fn note(&mut self, last: i64) {
        if self.0.last().is_some_and(|known| *known > last) {
            self.0.clear();
        }
        if self.0.len() < ENDS && self.0.last() != Some(&last) {
            self.0.push(last);
        }
    }

    /// The log is begun anew.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Where parts of the entries from `first` to `last` end that have at least `rows`, if transactions are no larger.
    fn parts(&self, first: i64, last: i64, rows: i64) -> Vec<i64> {
        let (mut parts, mut begin) = (Vec::new(), first);
        for end in self.0.iter().copied().filter(|end| *end < last) {
            if end - begin + 1 >= rows && last - end >= rows {
                parts.push(end);
                begin = end + 1;
            }
        }
        parts.push(last);
        parts
    }
}

/// A commit that has its number, and whose rows are still to be read.
struct Part {
    header: CommitHeader,
    version: Version,
    /// The range of lsn (after, up to).
    range: (i64, i64),
}

impl Store {
    /// Says from how many rows on a commit of inserts is ended where a transaction ends.
    pub fn set_part_rows(&mut self, rows: i64) {
        self.part_rows = rows;
    }

    /// Remembers where the log ends, which is where a transaction ends; returns about how many entries it has. Takes no
    /// lock that a writer waits for.
    pub fn note_end(&self) -> Result<i64> {
        let range = log_range(self.lookout.as_ref().unwrap_or(&self.conn))?;
        let Some((first, last)) = range else { return Ok(0) };
        self.ends.borrow_mut().note(last);
        Ok(last - first + 1)
    }

    /// Absorbs what the application wrote, in a transaction of its own, as one commit or, if it is many inserts, as some.
    pub fn absorb_all(&mut self) -> Result<Vec<OwnCommit>> {
        self.begin_and_note()?;
        let (own, misfits) = self.complete(|store| {
            if let Some(parts) = store.absorb_parts()? {
                return store.commit_and_read(parts);
            }
            let own = store.absorb_pending()?;
            store.commit()?;
            Ok((own.into_iter().collect(), Vec::new()))
        })?;
        if !misfits.is_empty() {
            self.write(|store| store.put_right(&misfits))?;
        }
        Ok(own)
    }

    /// Begins a transaction, and remembers where others ended while it waited for them.
    fn begin_and_note(&mut self) -> Result<()> {
        for look in 0..LOOKS {
            self.conn.busy_handler(None)?;
            let begun = self.conn.prepare_cached("BEGIN IMMEDIATE").and_then(|mut b| b.execute([]));
            sqlite::wait_for_writers(&self.conn)?;
            match begun {
                Ok(_) => return Ok(()),
                Err(e) if e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {}
                Err(e) => return Err(e.into()),
            }
            self.note_end()?;
            std::thread::sleep(Duration::from_micros(if look < 20 { 200 } else { 1_000 }));
        }
        self.begin()
    }

    /// Absorbs many inserts, and numbers their commits; `None` if that is not all there is, and nothing was done.
    fn absorb_parts(&mut self) -> Result<Option<Vec<Part>>> {
        let Some((first, last)) = log_range(&self.conn)? else { return Ok(None) };
        if last - first + 1 < self.part_rows || !self.links.is_empty() || self.has_other_schema()? {
            return Ok(None);
        }
        let tables = self.logged_tables()?;
        let simple = |(plan, inserts): &(Arc<Plan>, bool)| {
            *inserts && !plan.table.is_ours() && plan.table.key.iter().all(|k| !k.nullable)
        };
        if !tables.iter().all(simple) {
            return Ok(None);
        }
        // Keys in no order are put into theirs, over all of them: so each page is touched once.
        let ends = match tables.iter().any(|(plan, _)| plan.table.key_kind == KeyKind::Declared) {
            true => vec![last],
            false => self.ends.borrow().parts(first, last, self.part_rows),
        };
        let begins = std::iter::once(first).chain(ends.iter().map(|end| end + 1));
        if begins.zip(&ends).any(|(begin, end)| end - begin >= MOST_ROWS) {
            return Ok(None);
        }
        let before = self.head.clone();
        self.conn.execute_batch("SAVEPOINT parts")?;
        let parts = self.absorb_until(&tables, first, &ends)?;
        if self.lookout.is_none() && !self.path().is_empty() {
            // While rows are read, this connection does not see what others write.
            self.lookout = Some(sqlite::open_read_only(Path::new(self.path()))?);
        }
        if parts.is_none() {
            self.conn.execute_batch("ROLLBACK TO parts")?;
            self.head = before;
        }
        self.conn.execute_batch("RELEASE parts")?;
        Ok(parts)
    }

    /// `None` if a row was written more than once: then the parts are not what the transactions were.
    fn absorb_until(
        &mut self,
        tables: &[(Arc<Plan>, bool)],
        first: i64,
        ends: &[i64],
    ) -> Result<Option<Vec<Part>>> {
        let (base, mut begin, mut parts, mut all) = (self.head.lsn, first - 1, Vec::new(), 0);
        for end in ends {
            let day = "SELECT ms FROM __litemesh_log WHERE seq = ?1";
            let day: Option<f64> = self.conn.prepare_cached(day)?.query_row([end], |r| r.get(0)).ok();
            let hlc = self.head.hlc.tick(self.date_ms(day.and_then(julian_ms).unwrap_or(0)));
            let (version, from, mut rows) = (Version { hlc, site: self.head.site }, self.head.lsn, 0);
            for (plan, _) in tables {
                rows += self.insert_states(plan, version, (begin, *end))?;
            }
            begin = *end;
            if rows > 0 {
                self.head.hlc = hlc;
                let header = self.next_header(version, rows)?;
                parts.push(Part { header, version, range: (from, self.head.lsn) });
                all += rows;
            }
        }
        let mut kept = 0;
        for (plan, _) in tables {
            kept +=
                self.conn.prepare_cached(&plan.count_changed)?.query_row([base], |r| r.get::<_, u64>(0))?;
        }
        if kept != all {
            return Ok(None);
        }
        self.empty_log()?;
        self.save_clock()?;
        Ok(Some(parts))
    }

    /// Commits, and reads the rows of the parts as they were then: for as long as one of its statements has not ended, a
    /// connection goes on reading what it committed, whatever others write.
    fn commit_and_read(&self, parts: Vec<Part>) -> Result<(Vec<OwnCommit>, Vec<Misfit>)> {
        let mut pin = self.conn.prepare_cached("SELECT name FROM sqlite_schema")?;
        let mut pin = pin.query([])?;
        assert!(pin.next()?.is_some(), "a file with tables of ours has tables");
        self.commit()?;
        let (mut own, mut misfits) = (Vec::new(), Vec::new());
        for Part { header, version, range } in parts {
            let read = self.read_changed(version, range)?;
            assert_eq!(read.rows, header.rows, "a commit has other rows than were absorbed");
            misfits.extend(read.misfits);
            own.push(OwnCommit { site: version.site, header, body: read.body });
            self.note_end()?;
        }
        Ok((own, misfits))
    }
}

/// The first and the last entry of the log.
fn log_range(conn: &Connection) -> Result<Option<(i64, i64)>> {
    let sql = "SELECT (SELECT min(seq) FROM __litemesh_log), (SELECT max(seq) FROM __litemesh_log)";
    let (first, last): (Option<i64>, Option<i64>) =
        conn.prepare_cached(sql)?.query_row([], |r| Ok((r.get(0)?, r.get(1)?)))?;
    Ok(first.zip(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(all: impl IntoIterator<Item = i64>) -> Ends {
        let mut ends = Ends::default();
        all.into_iter().for_each(|end| ends.note(end));
        ends
    }

    #[test]
    fn parts_end_where_transactions_do() {
        let some = ends([10, 10, 20, 35, 90, 95]);
        assert_eq!(some.parts(1, 100, 20), [20, 100]);
        assert_eq!(some.parts(1, 120, 20), [20, 90, 120]);
        assert_eq!(some.parts(1, 100, 5), [10, 20, 35, 90, 95, 100]);
        assert_eq!(some.parts(1, 100, 200), [100]);
        assert_eq!(some.parts(15, 60, 10), [35, 60]);
    }
}
