//! Which tables keep both rows, and which columns refer to them. Invariant: a table that keeps both does so for ever:
//! its states cannot be read otherwise.

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
use crate::core::version::{Hlc, Version};
use crate::replica::Result;
use crate::replica::plan::Plan;
use crate::replica::rows::ChangedRow;
use crate::replica::shadow::{Sites, read_varint, write_varint};
use crate::replica::store::{Store, TableFilter};

/// A column that refers to a table that keeps both rows.
pub(in crate::replica) struct Ref {
    /// The column.
    pub column: ColumnId,
    /// Its place in the table's columns.
    pub at: usize,
    /// The table it refers to.
    pub parent: Arc<Plan>,
}

/// What keeping both rows has to do with one table.
pub(in crate::replica) struct Link {
    /// Whether it keeps both rows of an id collision itself.
    pub keeps_both: bool,
    /// Its columns that refer to tables that do.
    pub refs: Vec<Ref>,
    /// Columns that refer to it: table and place.
    pub children: Vec<(Arc<Plan>, usize)>,
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
    fn new(table: &Table, keeps_both: bool, refs: Vec<Ref>, children: Vec<(Arc<Plan>, usize)>) -> Self {
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

fn refs_table(table: &Table) -> String {
    format!("{PREFIX}refs_{}", table.id)
}

fn create_moved(table: &Table) -> String {
    let name = moved_table(table);
    format!("CREATE TABLE IF NOT EXISTS {name}(id INTEGER PRIMARY KEY, origin INTEGER NOT NULL)")
}

fn create_refs(table: &Table) -> String {
    let name = refs_table(table);
    if table.key_kind != KeyKind::Declared {
        return format!("CREATE TABLE {name}(k0 INTEGER PRIMARY KEY, refs BLOB NOT NULL)");
    }
    let key = table.key.iter().enumerate();
    let columns = list(key, |(i, k)| format!("k{i} {} COLLATE {}", k.affinity.sql(), ident(&k.collation)));
    let keys = list(0..table.key.len(), |i| format!("k{i}"));
    format!("CREATE TABLE {name}({columns}, refs BLOB NOT NULL, PRIMARY KEY({keys})) WITHOUT ROWID")
}

const TABLES: &str = "
CREATE TABLE IF NOT EXISTS __litemesh_rekey(tbl INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS __litemesh_waiting(tbl INTEGER NOT NULL, origin INTEGER NOT NULL, bh INTEGER NOT NULL,
  bs INTEGER NOT NULL, shown INTEGER NOT NULL, PRIMARY KEY(tbl, origin, bh, bs, shown)) WITHOUT ROWID;
";

/// A single-column foreign key: the child's column, the parent's name and, if named, its column.
type ForeignKey = (String, String, Option<String>);

fn foreign_keys(conn: &Connection, table: &str) -> Result<Vec<ForeignKey>> {
    let sql =
        "SELECT \"from\", \"table\", \"to\" FROM pragma_foreign_key_list(?1) GROUP BY id HAVING count(*) = 1";
    let mut statement = conn.prepare_cached(sql)?;
    let rows = statement.query_map([table], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

impl Store {
    /// Has the tables that `which` names keep both rows of an id collision, from now on and for ever. All nodes must
    /// say the same: rows of a node that says otherwise are not taken in.
    pub fn keep_both(&mut self, which: TableFilter) -> Result<()> {
        self.keep_both = Some(which);
        self.schema_version = -1;
        self.write(Self::refresh_schema)
    }
}

/// Reads anew what has to do with keeping both rows, after the schema was read.
pub(in crate::replica) fn refresh(store: &mut Store) -> Result<()> {
    let exists = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = '__litemesh_rekey'";
    let begun = store.conn.prepare_cached(exists)?.exists([])?;
    store.links = Arc::new(Links::new());
    if !begun && store.keep_both.is_none() {
        return Ok(());
    }
    store.conn.execute_batch(TABLES)?;
    let plans = store.plans.clone();
    let mut keys = Vec::new();
    for plan in plans.iter() {
        for (from, parent, to) in foreign_keys(&store.conn, &plan.table.name)? {
            let parent = plans.iter().find(|p| p.table.name.eq_ignore_ascii_case(&parent));
            let to_key = |p: &&Arc<Plan>| {
                p.table.key_kind == KeyKind::Integer
                    && to.as_ref().is_none_or(|to| to.eq_ignore_ascii_case(&p.table.key[0].name))
            };
            if let Some(parent) = parent.filter(to_key) {
                keys.push((plan.clone(), from, parent.clone()));
            }
        }
    }
    let mut keeping = Vec::new();
    for plan in plans.iter() {
        let in_key = keys
            .iter()
            .find(|(child, from, parent)| Arc::ptr_eq(parent, plan) && child.table.column(from).is_none());
        if keeps_both(store, plan, in_key.map(|(child, ..)| child.table.name.as_str()))? {
            keeping.push(plan.clone());
        }
    }
    keys.retain(|(.., parent)| keeping.iter().any(|k| Arc::ptr_eq(k, parent)));
    let mut links = Links::new();
    let mut new = Vec::new();
    for plan in plans.iter() {
        let keeps_both = keeping.iter().any(|k| Arc::ptr_eq(k, plan));
        let at = |child: &Plan, from: &str| {
            child.table.columns.iter().position(|c| c.name.eq_ignore_ascii_case(from))
        };
        let refs =
            keys.iter().filter(|(child, ..)| Arc::ptr_eq(child, plan)).filter_map(|(child, from, parent)| {
                let at = at(child, from)?;
                Some(Ref { column: child.table.columns[at].id, at, parent: parent.clone() })
            });
        let refs: Vec<Ref> = refs.collect();
        let children = keys.iter().filter(|(.., parent)| Arc::ptr_eq(parent, plan));
        let children = children.filter_map(|(child, from, _)| Some((child.clone(), at(child, from)?)));
        let children: Vec<_> = children.collect();
        if !keeps_both && refs.is_empty() {
            continue;
        }
        if keeps_both {
            store.conn.execute_batch(&create_moved(&plan.table))?;
        }
        let refs_name = refs_table(&plan.table);
        let exists = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?1";
        if !refs.is_empty() && !store.conn.prepare_cached(exists)?.exists([&refs_name])? {
            store.conn.execute_batch(&create_refs(&plan.table))?;
            new.push(plan.clone());
        }
        links.insert(plan.table.id, Arc::new(Link::new(&plan.table, keeps_both, refs, children)));
    }
    store.links = Arc::new(links);
    // References of rows that were here before; of those that are in the log absorb makes them.
    new.iter().try_for_each(|plan| store.note_old_refs(plan))
}

/// Whether a table keeps both rows: because it did before, or because the configuration says so and it can.
fn keeps_both(store: &mut Store, plan: &Plan, in_key_of: Option<&str>) -> Result<bool> {
    let table = &plan.table;
    if table.key_kind != KeyKind::Integer || table.is_ours() {
        return Ok(false);
    }
    let known =
        store.conn.prepare_cached("SELECT 1 FROM __litemesh_rekey WHERE tbl = ?1")?.exists([table.id])?;
    let wanted = store.keep_both.as_ref().is_some_and(|which| which(&table.name));
    if let Some(child) = in_key_of.filter(|_| known || wanted) {
        let name = &table.name;
        store.notes.push(format!(
            "table {name:?} cannot keep both rows of an id collision: the key of table {child:?} holds references to \
             it, which cannot follow a row that gets another id"
        ));
    }
    if wanted && !known && in_key_of.is_none() {
        store.conn.execute("INSERT INTO __litemesh_rekey(tbl) VALUES(?1)", [table.id])?;
    }
    Ok(known || (wanted && in_key_of.is_none()))
}
