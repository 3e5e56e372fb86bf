//! Row states in the file. Invariant: what is read back is what was written; a state that cannot be read is an
//! error, never a guess.

use std::collections::{BTreeMap, HashMap};

use rusqlite::{Connection, ToSql};

use super::Result;
use super::plan::Plan;
use crate::core::merge::RowState;
use crate::core::value::ValueRef;
use crate::core::version::{Hlc, SiteId, Version};

/// The sites a file knows, by the small numbers that stand for them in row states.
#[derive(Debug, Default, Clone)]
pub struct Sites {
    by_index: HashMap<i64, SiteId>,
    by_site: HashMap<SiteId, i64>,
}

impl Sites {
    /// Reads them.
    pub fn load(conn: &Connection) -> Result<Self> {
        let mut sites = Self::default();
        sites.note(0, Version::ZERO.site);
        let mut statement = conn.prepare_cached("SELECT idx, site FROM __litemesh_site")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            sites.note(row.get(0)?, SiteId(row.get::<_, i64>(1)? as u64));
        }
        Ok(sites)
    }

    fn note(&mut self, index: i64, site: SiteId) {
        self.by_index.insert(index, site);
        self.by_site.insert(site, index);
    }

    /// The number of a site, which is given one if it has none yet.
    pub fn index(&mut self, conn: &Connection, site: SiteId) -> Result<i64> {
        if let Some(index) = self.by_site.get(&site) {
            return Ok(*index);
        }
        let add = "INSERT INTO __litemesh_site(site, n, hlc, id) VALUES(?1, 0, 0, 0)";
        conn.prepare_cached(add)?.execute([site.0 as i64])?;
        let index = conn.last_insert_rowid();
        self.note(index, site);
        Ok(index)
    }

    pub(super) fn site(&self, index: i64) -> rusqlite::Result<SiteId> {
        let unknown = || rusqlite::Error::IntegralValueOutOfRange(0, index);
        self.by_index.get(&index).copied().ok_or_else(unknown)
    }

    /// Reads `bh, bs, dh, ds, cols` from a result row, starting at column `at`.
    pub fn read_state(&self, row: &rusqlite::Row<'_>, at: usize) -> rusqlite::Result<RowState> {
        let version = |hlc: i64, index: i64| -> rusqlite::Result<Version> {
            Ok(Version { hlc: Hlc(hlc as u64), site: self.site(index)? })
        };
        let birth = version(row.get(at)?, row.get(at + 1)?)?;
        let dead = match row.get::<_, Option<i64>>(at + 2)? {
            Some(hlc) => Some(version(hlc, row.get(at + 3)?)?),
            None => None,
        };
        let columns = match row.get_ref(at + 4)?.as_blob_or_null()? {
            Some(bytes) => self.unpack(bytes).ok_or(rusqlite::Error::InvalidQuery)?,
            None => BTreeMap::new(),
        };
        Ok(RowState { birth, dead, columns })
    }

    fn unpack(&self, mut bytes: &[u8]) -> Option<BTreeMap<u32, Version>> {
        let mut columns = BTreeMap::new();
        while !bytes.is_empty() {
            let column = read_varint(&mut bytes)?;
            let site = self.site(read_varint(&mut bytes)? as i64).ok()?;
            let (hlc, rest) = bytes.split_first_chunk::<8>()?;
            bytes = rest;
            columns.insert(u32::try_from(column).ok()?, Version { hlc: Hlc(u64::from_be_bytes(*hlc)), site });
        }
        Some(columns)
    }

    fn pack(&mut self, conn: &Connection, state: &RowState) -> Result<Option<Vec<u8>>> {
        if state.columns.is_empty() {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(state.columns.len() * 10);
        for (column, version) in &state.columns {
            write_varint(&mut bytes, u64::from(*column));
            write_varint(&mut bytes, self.index(conn, version.site)? as u64);
            bytes.extend_from_slice(&version.hlc.0.to_be_bytes());
        }
        Ok(Some(bytes))
    }

    /// The state of a key, if it has one.
    pub fn get(&self, conn: &Connection, plan: &Plan, key: &[ValueRef<'_>]) -> Result<Option<RowState>> {
        let mut statement = conn.prepare_cached(&plan.select_state)?;
        let mut rows = statement.query(rusqlite::params_from_iter(key))?;
        Ok(match rows.next()? {
            Some(row) => Some(self.read_state(row, 0)?),
            None => None,
        })
    }

    /// Writes the state of a key.
    pub fn put(
        &mut self,
        conn: &Connection,
        plan: &Plan,
        key: &[ValueRef<'_>],
        state: &RowState,
        lsn: i64,
    ) -> Result<()> {
        let columns = self.pack(conn, state)?;
        let birth_site = self.index(conn, state.birth.site)?;
        let dead_site = state.dead.map(|d| self.index(conn, d.site)).transpose()?;
        let (birth, dead) = (state.birth.hlc.0 as i64, state.dead.map(|d| d.hlc.0 as i64));
        let rest: [&dyn ToSql; 6] = [&birth, &birth_site, &dead, &dead_site, &columns, &lsn];
        let params = key.iter().map(|k| k as &dyn ToSql).chain(rest);
        conn.prepare_cached(&plan.put_state)?.execute(rusqlite::params_from_iter(params))?;
        Ok(())
    }
}

pub(super) fn write_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

pub(super) fn read_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut n = 0u64;
    for shift in (0..63).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        n |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(n);
        }
    }
    None
}
