//! Which tables keep both rows, and since when. Invariant: a table that keeps both does so for ever, and on all nodes:
//! its states cannot be read otherwise. Of a row it does not matter who takes it in when, only whether its writer's
//! node kept both when it was written: a row from before is fixed, which means that it is merged as in any other table.
//!
//! One node says it. It replicates as a row of a table of ours, and with each section of rows of such a table, so that
//! nobody takes in a row that may move without knowing that it may. Rows from before are known by their births: those
//! that a file held when it began, those that come from a node that has not begun, and those that are said to be.

use std::collections::BTreeMap;
use std::sync::Arc;

use rusqlite::Connection;

use super::links::{Link, Links, Ref, create_moved, create_refs, foreign_keys, refs_table};
use crate::core::capture::{OP_INSERT, OP_UPDATE, OPTIONS, state_table};
use crate::core::schema::KeyKind;
use crate::core::value::Value;
use crate::core::version::{Hlc, SiteId, Version};
use crate::replica::adopt::Cause;
use crate::replica::plan::Plan;
use crate::replica::store::{Store, TableFilter};
use crate::replica::{ReplicaError, Result};

/// What a file needs whose tables keep both, besides a table of its own for each.
pub const TABLES: &str = "
CREATE TABLE IF NOT EXISTS __litemesh_rekey(tbl INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS __litemesh_fixed(tbl INTEGER NOT NULL, site INTEGER NOT NULL, hlc INTEGER NOT NULL,
  PRIMARY KEY(tbl, site)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS __litemesh_waiting(tbl INTEGER NOT NULL, origin INTEGER NOT NULL, bh INTEGER NOT NULL,
  bs INTEGER NOT NULL, shown INTEGER NOT NULL, PRIMARY KEY(tbl, origin, bh, bs, shown)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS __litemesh_reference(child INTEGER NOT NULL, col INTEGER NOT NULL, parent INTEGER NOT NULL,
  PRIMARY KEY(child, col)) WITHOUT ROWID;
";

/// What is kept of tables that are not there any more.
const FORGET: &str = "
DELETE FROM __litemesh_rekey WHERE tbl IN (SELECT id FROM __litemesh_table WHERE substr(name, 1, 1) = char(0));
DELETE FROM __litemesh_fixed WHERE tbl NOT IN (SELECT tbl FROM __litemesh_rekey);
DELETE FROM __litemesh_waiting WHERE tbl NOT IN (SELECT tbl FROM __litemesh_rekey);
";

/// A reference that can be followed: the child, its column's name, the parent.
type Key = (Arc<Plan>, String, Arc<Plan>);

impl Store {
    /// Has the tables that `which` names keep both rows of an id collision, on all nodes, from now on and for ever.
    pub fn keep_both(&mut self, which: TableFilter) -> Result<()> {
        self.keep_both = Some(which);
        self.write(|store| refresh(store, Cause::Application))
    }

    /// A peer's rows say that the table keeps both.
    pub(in crate::replica) fn follow_keeping(&mut self, plan: &Plan) -> Result<()> {
        if plan.table.key_kind != KeyKind::Integer || plan.table.is_ours() {
            return Err(ReplicaError::OtherRekey(plan.table.name.clone()));
        }
        self.conn.execute_batch(TABLES)?;
        self.begin_keeping(plan)?;
        refresh(self, Cause::Peer)
    }

    /// From now on the table keeps both. What is in it now was written before.
    fn begin_keeping(&mut self, plan: &Plan) -> Result<()> {
        let id = plan.table.id;
        self.conn.execute("INSERT OR IGNORE INTO __litemesh_rekey(tbl) VALUES(?1)", [id])?;
        let any = format!("SELECT 1 FROM {} LIMIT 1", state_table(&plan.table));
        if self.conn.prepare(&any)?.exists([])? {
            let here = (self.head.site, self.head.hlc);
            let others = self.head.vector.0.iter().map(|(site, point)| (*site, point.hlc));
            for (site, hlc) in others.chain([here]).collect::<Vec<_>>() {
                self.note_fixed(id, site, hlc)?;
            }
        }
        Ok(())
    }

    fn note_fixed(&self, table: i64, site: SiteId, hlc: Hlc) -> Result<()> {
        let sql = "INSERT INTO __litemesh_fixed(tbl, site, hlc) VALUES(?1, ?2, ?3)
                   ON CONFLICT(tbl, site) DO UPDATE SET hlc = max(hlc, excluded.hlc)";
        self.conn.prepare_cached(sql)?.execute((table, site.0 as i64, hlc.0 as i64))?;
        Ok(())
    }

    /// A row came of which it is known that its writer's node did not keep both yet; then neither did it before.
    pub(in crate::replica) fn fix(&mut self, plan: &Plan, birth: Version) -> Result<()> {
        let Some(link) = self.links.get(&plan.table.id).filter(|l| !l.is_fixed(birth)) else {
            return Ok(());
        };
        self.note_fixed(plan.table.id, birth.site, birth.hlc)?;
        let mut link = Link::clone(link);
        link.fixed.insert(birth.site, birth.hlc);
        Arc::make_mut(&mut self.links).insert(plan.table.id, Arc::new(link));
        Ok(())
    }

    /// Whether some node said that the table keeps both.
    fn is_said_to_keep(&self, table: &str) -> Result<bool> {
        let sql = "SELECT 1 FROM __litemesh_option WHERE tbl = ?1 AND what = 'rekey'";
        Ok(self.conn.prepare_cached(sql)?.exists([table.to_lowercase()])?)
    }

    /// Tells all nodes that the table keeps both.
    fn say_keeping(&mut self, table: &str) -> Result<()> {
        if let (Some(options), false) = (self.plan(OPTIONS), self.is_said_to_keep(table)?) {
            let sql = "INSERT INTO __litemesh_option(tbl, what, value) VALUES(?1, 'rekey', 'both')";
            self.conn.prepare_cached(sql)?.execute([table.to_lowercase()])?;
            let key = [table.to_lowercase().into_bytes(), b"rekey".to_vec()].map(Value::Text);
            self.log_own(&options, &key, OP_INSERT, &[])?;
        }
        Ok(())
    }

    /// The tables that keep both rows of an id collision, and how many rows of each are shown under another id than
    /// their writer's.
    pub fn kept_both(&self) -> Result<Vec<(String, u64)>> {
        let mut tables = Vec::new();
        for plan in self.plans() {
            if let Some(link) = self.links.get(&plan.table.id).filter(|l| l.keeps_both) {
                tables.push((plan.table.name.clone(), link.count_moved(&self.conn, plan)?));
            }
        }
        tables.sort();
        Ok(tables)
    }
}

/// Reads anew what has to do with keeping both rows, after the schema was read or somebody said that a table does.
pub(in crate::replica) fn refresh(store: &mut Store, cause: Cause) -> Result<()> {
    let exists = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = '__litemesh_rekey'";
    let begun = store.conn.prepare_cached(exists)?.exists([])?;
    let said = "SELECT 1 FROM __litemesh_option WHERE what = 'rekey'";
    store.links = Arc::new(Links::new());
    if !begun && store.keep_both.is_none() && !store.conn.prepare_cached(said)?.exists([])? {
        return Ok(());
    }
    store.conn.execute_batch(TABLES)?;
    store.conn.execute_batch(FORGET)?;
    let plans = store.plans.clone();
    let mut keys = keys(&store.conn, &plans)?;
    let mut keeping = Vec::new();
    for plan in &plans {
        let in_key = keys
            .iter()
            .find(|(child, from, parent)| Arc::ptr_eq(parent, plan) && child.table.column(from).is_none());
        if keeps_both(store, plan, in_key.map(|(child, ..)| child.table.name.as_str()))? {
            keeping.push(plan.clone());
        }
    }
    keys.retain(|(.., parent)| keeping.iter().any(|k| Arc::ptr_eq(k, parent)));
    let mut links = Links::new();
    for plan in &plans {
        let keeps_both = keeping.iter().any(|k| Arc::ptr_eq(k, plan));
        if let Some(link) = link(&store.conn, plan, keeps_both, &keys)? {
            links.insert(plan.table.id, Arc::new(link));
        }
    }
    store.links = Arc::new(links);
    store.note_references(cause)
}

/// The references that can be followed, whether their parents keep both or not.
fn keys(conn: &Connection, plans: &[Arc<Plan>]) -> Result<Vec<Key>> {
    let mut keys = Vec::new();
    for plan in plans {
        for (from, parent, to) in foreign_keys(conn, &plan.table.name)? {
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
    Ok(keys)
}

/// What keeping both has to do with a table; its tables are made if they are not there.
fn link(conn: &Connection, plan: &Arc<Plan>, keeps_both: bool, keys: &[Key]) -> Result<Option<Link>> {
    let at =
        |child: &Plan, from: &str| child.table.columns.iter().position(|c| c.name.eq_ignore_ascii_case(from));
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
        return Ok(None);
    }
    if keeps_both {
        conn.execute_batch(&create_moved(&plan.table))?;
    }
    let exists = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?1";
    if !refs.is_empty() && !conn.prepare_cached(exists)?.exists([refs_table(&plan.table)])? {
        conn.execute_batch(&create_refs(&plan.table))?;
    }
    let mut link = Link::new(&plan.table, keeps_both, refs, children);
    let mut statement = conn.prepare_cached("SELECT site, hlc FROM __litemesh_fixed WHERE tbl = ?1")?;
    let rows = statement.query_map([plan.table.id], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, i64>(1)?)))?;
    link.fixed = rows
        .map(|r| r.map(|(site, hlc)| (SiteId(site as u64), Hlc(hlc as u64))))
        .collect::<rusqlite::Result<BTreeMap<_, _>>>()?;
    Ok(Some(link))
}

/// Whether a table keeps both rows: because it did before, or because somebody says so and it can.
fn keeps_both(store: &mut Store, plan: &Plan, in_key_of: Option<&str>) -> Result<bool> {
    let table = &plan.table;
    if table.is_ours() {
        return Ok(false);
    }
    let named = store.keep_both.as_ref().is_some_and(|which| which(&table.name));
    if table.key_kind != KeyKind::Integer {
        if named {
            let name = &table.name;
            store.notes.push(format!(
                "table {name:?} cannot keep both rows of an id collision: that takes an INTEGER PRIMARY KEY; rows of \
                 it are merged as without 'rekey'"
            ));
        }
        return Ok(false);
    }
    let known =
        store.conn.prepare_cached("SELECT 1 FROM __litemesh_rekey WHERE tbl = ?1")?.exists([table.id])?;
    let wanted = named || store.is_said_to_keep(&table.name)?;
    if let Some(child) = in_key_of.filter(|_| known || wanted) {
        let name = &table.name;
        store.notes.push(format!(
            "table {name:?} cannot keep both rows of an id collision: the key of table {child:?} holds references to \
             it, which cannot follow a row that gets another id"
        ));
    }
    let begins = wanted && !known && in_key_of.is_none();
    if begins {
        store.begin_keeping(plan)?;
    }
    if named && (known || begins) {
        store.say_keeping(&plan.table.name)?;
    }
    Ok(known || begins)
}

impl Store {
    /// Notes which references there are. Of those that came to be, or are to another table now, the rows that are here
    /// refer to what they show: for all nodes that is a write of the one whose application declared it.
    fn note_references(&mut self, cause: Cause) -> Result<()> {
        let links = self.links.clone();
        let now = links
            .iter()
            .flat_map(|(child, link)| link.refs.iter().map(move |r| ((*child, r.column), r.parent.table.id)));
        let now: BTreeMap<(i64, u32), i64> = now.collect();
        let mut statement =
            self.conn.prepare_cached("SELECT child, col, parent FROM __litemesh_reference")?;
        let rows = statement.query_map([], |r| Ok(((r.get(0)?, r.get(1)?), r.get(2)?)))?;
        let before = rows.collect::<rusqlite::Result<BTreeMap<(i64, u32), i64>>>()?;
        drop(statement);
        if now == before {
            return Ok(());
        }
        self.conn.execute("DELETE FROM __litemesh_reference", [])?;
        for ((child, column), parent) in &now {
            let sql = "INSERT INTO __litemesh_reference(child, col, parent) VALUES(?1, ?2, ?3)";
            self.conn.execute(sql, (child, column, parent))?;
        }
        for plan in self.plans.clone() {
            let id = plan.table.id;
            let of_it = now.iter().filter(|((child, _), _)| *child == id);
            let new = of_it.filter(|(key, parent)| before.get(key) != Some(parent));
            let new: Vec<u32> = new.map(|((_, column), _)| *column).collect();
            if new.is_empty() {
                continue;
            }
            self.forget_refs(&plan, &new)?;
            if cause == Cause::Application {
                for (key, columns) in self.shown_refs(&plan, &new)? {
                    self.log_own(&plan, &key, OP_UPDATE, &columns)?;
                }
            }
        }
        Ok(())
    }
}
