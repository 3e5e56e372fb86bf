//! What keeping both rows has to do with each table: ids, and references to them. Invariant: what is told to others
//! goes by ids that writers gave, never by those under which rows are shown.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, params_from_iter};

use crate::core::capture::{PREFIX, state_table};
use crate::core::frame::RowBuffer;
use crate::core::merge::{ColumnId, Row};
use crate::core::rekey::{Incarnation, LinkedRow, SUCCESSOR, may_be_moved, successor};
use crate::core::schema::{KeyKind, Table};
use crate::core::sqltext::{ident, list};
use crate::core::value::ValueRef;
use crate::core::version::{Hlc, SiteId, Version};
use crate::replica::Result;
use crate::replica::plan::Plan;
use crate::replica::rows::ChangedRow;
use crate::replica::shadow::{Sites, read_varint, write_varint};

/// A column that refers to a table that keeps both rows.
#[derive(Clone)]
pub(in crate::replica) struct Ref {
    /// The column.
    pub column: ColumnId,
    /// Its place in the table's columns.
    pub at: usize,
    /// The table it refers to.
    pub parent: Arc<Plan>,
}

/// What keeping both rows has to do with one table.
#[derive(Clone)]
pub(in crate::replica) struct Link {
    /// Whether it keeps both rows of an id collision itself.
    pub keeps_both: bool,
    /// Its columns that refer to tables that do.
    pub refs: Vec<Ref>,
    /// Columns that refer to it: table and place.
    pub children: Vec<(Arc<Plan>, usize)>,
    /// Rows born at these sites until then never move: their nodes did not keep both yet.
    pub fixed: BTreeMap<SiteId, Hlc>,
    select_origin: String,
    put_origin: String,
    remove_origin: String,
    select_refs: String,
    put_refs: String,
    remove_refs: String,
    /// `after lsn, up to lsn` -> `k…, bh, bs, dh, ds, cols, present, columns that refer…`.
    pub changed_refs: String,
    /// `after lsn` -> `k…` of rows that are there though their state says dead.
    pub revived: String,
}

/// By the table's number; a table that has nothing to do with it is absent.
pub(in crate::replica) type Links = HashMap<i64, Arc<Link>>;

/// The rows that a row's columns refer to.
pub(in crate::replica) type Refs = BTreeMap<ColumnId, Incarnation>;

impl Link {
    pub(super) fn new(
        table: &Table,
        keeps_both: bool,
        refs: Vec<Ref>,
        children: Vec<(Arc<Plan>, usize)>,
    ) -> Self {
        let (state, on) = (state_table(table), ident(&table.name));
        let (moved, refs_table) = (moved_table(table), refs_table(table));
        let keys = table.key.len();
        let k = list(0..keys, |i| format!("k{i}"));
        let s_k = list(0..keys, |i| format!("s.k{i}"));
        let and = |f: &dyn Fn(usize) -> String| (0..keys).map(f).collect::<Vec<_>>().join(" AND ");
        let by_key = and(&|i| format!("k{i} = ?{}", i + 1));
        let joined = and(&|i| format!("t.{} = s.k{i}", table.key[i].sql));
        let shown: String =
            refs.iter().map(|r| format!(", t.{}", ident(&table.columns[r.at].name))).collect();
        Self {
            keeps_both,
            fixed: BTreeMap::new(),
            select_origin: format!("SELECT origin FROM {moved} WHERE id = ?1"),
            put_origin: format!("INSERT OR REPLACE INTO {moved}(id, origin) VALUES(?1, ?2)"),
            remove_origin: format!("DELETE FROM {moved} WHERE id = ?1"),
            select_refs: format!("SELECT refs FROM {refs_table} WHERE {by_key}"),
            put_refs: format!(
                "INSERT OR REPLACE INTO {refs_table}({k}, refs) VALUES({})",
                list(1..keys + 2, |i| format!("?{i}"))
            ),
            remove_refs: format!("DELETE FROM {refs_table} WHERE {by_key}"),
            changed_refs: format!(
                "SELECT {s_k}, bh, bs, dh, ds, cols, t.{} IS NOT NULL{shown} FROM {state} AS s INDEXED BY {state}_lsn \
                 LEFT JOIN {on} AS t ON {joined} WHERE s.lsn > ?1 AND s.lsn <= ?2",
                table.key[0].sql
            ),
            revived: format!(
                "SELECT {s_k} FROM {state} AS s INDEXED BY {state}_lsn CROSS JOIN {on} AS t ON {joined} \
                 WHERE s.lsn > ?1 AND s.dh IS NOT NULL"
            ),
            refs,
            children,
        }
    }

    /// Whether a row never moves: it was there at adoption, or written where the table did not keep both yet.
    pub fn is_fixed(&self, birth: Version) -> bool {
        birth == Version::ZERO || self.fixed.get(&birth.site).is_some_and(|until| birth.hlc <= *until)
    }

    /// How many rows are shown under another id than their writer's.
    pub fn count_moved(&self, conn: &Connection, plan: &Plan) -> Result<u64> {
        let (moved, on) = (moved_table(&plan.table), ident(&plan.table.name));
        let key = &plan.table.key[0].sql;
        let sql = format!("SELECT count(*) FROM {moved} AS m CROSS JOIN {on} AS t ON t.{key} = m.id");
        Ok(conn.prepare_cached(&sql)?.query_row([], |r| r.get::<_, i64>(0))? as u64)
    }

    /// The id that a row's writer gave it.
    pub fn origin(&self, conn: &Connection, place: i64) -> Result<i64> {
        if !self.keeps_both || !may_be_moved(place) {
            return Ok(place);
        }
        let mut ask = conn.prepare_cached(&self.select_origin)?;
        Ok(ask.query_row([place], |r| r.get(0)).optional()?.unwrap_or(place))
    }

    /// Notes whose place it is now.
    pub fn set_origin(&self, conn: &Connection, place: i64, origin: i64) -> Result<()> {
        if place != origin {
            conn.prepare_cached(&self.put_origin)?.execute([place, origin])?;
        } else if may_be_moved(place) {
            conn.prepare_cached(&self.remove_origin)?.execute([place])?;
        }
        Ok(())
    }

    /// The rows that a row refers to.
    pub fn read_refs(&self, conn: &Connection, sites: &Sites, key: &[ValueRef<'_>]) -> Result<Refs> {
        if self.refs.is_empty() {
            return Ok(Refs::new());
        }
        let mut ask = conn.prepare_cached(&self.select_refs)?;
        let packed: Option<Vec<u8>> = ask.query_row(params_from_iter(key), |r| r.get(0)).optional()?;
        let refs =
            packed.map(|bytes| unpack(sites, &bytes).ok_or(rusqlite::Error::InvalidQuery)).transpose()?;
        let mut refs = refs.unwrap_or_default();
        // A foreign key that the application took away binds nobody.
        refs.retain(|column, _| self.refs.iter().any(|r| r.column == *column));
        Ok(refs)
    }

    /// Notes the rows that a row refers to.
    pub fn write_refs(
        &self,
        conn: &Connection,
        sites: &mut Sites,
        key: &[ValueRef<'_>],
        refs: &Refs,
    ) -> Result<()> {
        if self.refs.is_empty() {
            return Ok(());
        }
        if refs.is_empty() {
            conn.prepare_cached(&self.remove_refs)?.execute(params_from_iter(key))?;
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(refs.len() * 14);
        for (column, parent) in refs {
            write_varint(&mut bytes, u64::from(*column));
            bytes.extend_from_slice(&parent.origin.to_be_bytes());
            write_varint(&mut bytes, sites.index(conn, parent.birth.site)? as u64);
            bytes.extend_from_slice(&parent.birth.hlc.0.to_be_bytes());
        }
        let params = key.iter().copied().chain([ValueRef::Blob(&bytes)]);
        conn.prepare_cached(&self.put_refs)?.execute(params_from_iter(params))?;
        Ok(())
    }

    /// A peer's row with what it refers to; `places` are those of the section's columns in the table's.
    pub fn incoming(&self, row: Row, places: &[Option<usize>], buffer: &RowBuffer<'_>) -> LinkedRow {
        let (mut row, mut refs) = (row, Refs::new());
        for (place, version) in &buffer.refs {
            if row.state.dead.is_some() {
                row.state.columns.insert(SUCCESSOR, *version);
                continue;
            }
            let at = places.get(*place as usize).copied().flatten();
            let reference = self.refs.iter().find(|r| Some(r.at) == at);
            if let (Some(r), Some(ValueRef::Int(origin))) = (reference, buffer.values.get(*place as usize)) {
                refs.insert(r.column, Incarnation { origin: *origin, birth: *version });
            }
        }
        LinkedRow { row, refs }
    }

    /// Makes of a row as it is shown one as it is told to others.
    pub fn tell(&self, conn: &Connection, sites: &Sites, row: &mut ChangedRow<'_>) -> Result<()> {
        if let [ValueRef::Int(place)] = row.key[..] {
            row.origin = Some(self.origin(conn, place)?).filter(|o| *o != place);
        }
        row.fixed = self.keeps_both && row.state.birth != Version::ZERO && self.is_fixed(row.state.birth);
        if let Some(birth) = successor(&row.state) {
            row.refs.push((0, birth));
        }
        if row.present && row.state.dead.is_none() {
            let refs = self.read_refs(conn, sites, &row.key)?;
            for (column, parent) in refs {
                let at = self.refs.iter().find(|r| r.column == column).map(|r| r.at);
                if let Some((at, ValueRef::Int(_))) = at.map(|at| (at, row.values[at])) {
                    row.values[at] = ValueRef::Int(parent.origin);
                    row.refs.push((at as u32, parent.birth));
                }
            }
        }
        Ok(())
    }
}

fn unpack(sites: &Sites, mut bytes: &[u8]) -> Option<Refs> {
    let mut refs = Refs::new();
    while !bytes.is_empty() {
        let column = u32::try_from(read_varint(&mut bytes)?).ok()?;
        let (origin, rest) = bytes.split_first_chunk::<8>()?;
        bytes = rest;
        let site = sites.site(read_varint(&mut bytes)? as i64).ok()?;
        let (hlc, rest) = bytes.split_first_chunk::<8>()?;
        bytes = rest;
        let birth = Version { hlc: Hlc(u64::from_be_bytes(*hlc)), site };
        refs.insert(column, Incarnation { origin: i64::from_be_bytes(*origin), birth });
    }
    Some(refs)
}

fn moved_table(table: &Table) -> String {
    format!("{PREFIX}moved_{}", table.id)
}

pub(super) fn refs_table(table: &Table) -> String {
    format!("{PREFIX}refs_{}", table.id)
}

pub(super) fn create_moved(table: &Table) -> String {
    let name = moved_table(table);
    format!("CREATE TABLE IF NOT EXISTS {name}(id INTEGER PRIMARY KEY, origin INTEGER NOT NULL)")
}

pub(super) fn create_refs(table: &Table) -> String {
    let name = refs_table(table);
    if table.key_kind != KeyKind::Declared {
        return format!("CREATE TABLE {name}(k0 INTEGER PRIMARY KEY, refs BLOB NOT NULL)");
    }
    let key = table.key.iter().enumerate();
    let columns = list(key, |(i, k)| format!("k{i} {} COLLATE {}", k.affinity.sql(), ident(&k.collation)));
    let keys = list(0..table.key.len(), |i| format!("k{i}"));
    format!("CREATE TABLE {name}({columns}, refs BLOB NOT NULL, PRIMARY KEY({keys})) WITHOUT ROWID")
}

/// A single-column foreign key: the child's column, the parent's name and, if named, its column.
pub(super) type ForeignKey = (String, String, Option<String>);

pub(super) fn foreign_keys(conn: &Connection, table: &str) -> Result<Vec<ForeignKey>> {
    let sql =
        "SELECT \"from\", \"table\", \"to\" FROM pragma_foreign_key_list(?1) GROUP BY id HAVING count(*) = 1";
    let mut statement = conn.prepare_cached(sql)?;
    let rows = statement.query_map([table], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}
