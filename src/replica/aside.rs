//! Tables of this file that go by other names now, or have become one with another. Invariant: what a table's rows and
//! what is known of them were before, they are after, under the new name or in the other table.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::apply::{Deferred, is_unique_violation};
use super::identity::name_of;
use super::plan::Plan;
use super::registry::{self, Local};
use super::schema::{Kind, ObjectKey, Objects};
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::state_table;
use crate::core::merge::{Row, merge};
use crate::core::sqltext::{ident, list};
use crate::core::value::{Value, ValueRef};
use crate::sqlite::introspect;
use crate::sqlite::value::get;

/// What a table is called whose rows another is to take, and a number behind.
const ASIDE: &str = "__litemesh_aside_";
/// What a table is called on the way to another name, and a number behind.
const RENAMING: &str = "__litemesh_renaming_";

impl Store {
    /// Drops the tables that are recorded as dropped, sets aside what has become one with another, and gives the rest
    /// their names.
    pub(super) fn settle_tables(&mut self, wanted: &Objects) -> Result<()> {
        let classes = self.view()?.1;
        let here = self.tables_here()?;
        let mut kept: BTreeMap<&str, &Local> = BTreeMap::new();
        for local in &here {
            let class = classes.of(&local.ident);
            match wanted.get(&ObjectKey::new(Kind::Table, class)) {
                None => {}
                Some(record) if record.gone => self.drop_table(&local.name)?,
                Some(_) => match kept.get(class) {
                    Some(first) if first.ident == class => self.set_aside(local)?,
                    first => {
                        first.map_or(Ok(()), |f| self.set_aside(f))?;
                        kept.insert(class, local);
                    }
                },
            }
        }
        let mut renames = Vec::new();
        for (class, local) in kept {
            let name = wanted.get(&ObjectKey::new(Kind::Table, class)).and_then(name_of);
            if let Some(name) = name.filter(|n| !n.eq_ignore_ascii_case(&local.name)) {
                let between = format!("{RENAMING}{}", local.id);
                self.rename(&local.name, &between)?;
                registry::rename_table(&self.conn, local.id, &between)?;
                renames.push((local.id, name));
            }
            self.conn.execute("UPDATE __litemesh_table SET ident = ?2 WHERE id = ?1", (local.id, class))?;
        }
        for (id, name) in renames {
            self.rename(&format!("{RENAMING}{id}"), &name)?;
            registry::rename_table(&self.conn, id, &name)?;
        }
        Ok(())
    }

    fn drop_table(&self, name: &str) -> Result<()> {
        self.ddl(&format!("DROP TABLE {}", ident(name)))?;
        match registry::table_id(&self.conn, name)? {
            Some(id) => registry::forget_table(&self.conn, id),
            None => Ok(()),
        }
    }

    /// The application's tables that have numbers and are in the file.
    fn tables_here(&self) -> Result<Vec<Local>> {
        let mut is_here = self
            .conn
            .prepare_cached("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND lower(name) = lower(?1)")?;
        let mut here = Vec::new();
        for local in registry::local_tables(&self.conn)? {
            if is_here.exists([&local.name])? {
                here.push(local);
            }
        }
        Ok(here)
    }

    /// Views and triggers are rewritten by SQLite; where one of them does not even compile they are left as they are,
    /// and brought to what is recorded later.
    fn rename(&self, old: &str, new: &str) -> Result<()> {
        let sql = format!("ALTER TABLE {} RENAME TO {}", ident(old), ident(new));
        if self.conn.execute_batch(&sql).is_ok() {
            return Ok(());
        }
        self.rename_alone(&sql)
    }

    fn rename_alone(&self, sql: &str) -> Result<()> {
        self.conn.pragma_update(None, "legacy_alter_table", true)?;
        let done = self.ddl(sql);
        self.conn.pragma_update(None, "legacy_alter_table", false)?;
        done
    }

    /// Takes a table out of the way, with its rows; whoever refers to it by its name means the other table now.
    fn set_aside(&self, local: &Local) -> Result<()> {
        let aside = format!("{ASIDE}{}", local.id);
        let sql = "SELECT type, name FROM sqlite_schema
                   WHERE type IN ('index', 'trigger') AND sql IS NOT NULL AND lower(tbl_name) = lower(?1)";
        let attached: Vec<(String, String)> = {
            let mut statement = self.conn.prepare_cached(sql)?;
            let rows = statement.query_map([&local.name], |r| Ok((r.get(0)?, r.get(1)?)))?;
            rows.collect::<rusqlite::Result<_>>()?
        };
        for (kind, name) in attached {
            self.ddl(&format!("DROP {kind} {}", ident(&name)))?;
        }
        self.rename_alone(&format!("ALTER TABLE {} RENAME TO {aside}", ident(&local.name)))?;
        self.conn.execute("UPDATE __litemesh_table SET name = ?2 WHERE id = ?1", (local.id, &aside))?;
        Ok(())
    }

    /// Merges the rows of tables that were set aside into those that they have become one with.
    pub(super) fn merge_aside(&mut self) -> Result<()> {
        let sql = "SELECT id, name, ident, told FROM __litemesh_table WHERE substr(name, 1, length(?1)) = ?1";
        let found: Vec<(i64, String, String, bool)> = {
            let mut statement = self.conn.prepare_cached(sql)?;
            let rows = statement.query_map([ASIDE], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?)))?;
            rows.collect::<rusqlite::Result<_>>()?
        };
        let classes = self.view()?.1;
        let gone = self.columns_gone_in_part()?;
        for (id, name, known_as, told) in found {
            let class = classes.of(&known_as);
            if gone.iter().any(|column| column.table == class) {
                self.recall(&ObjectKey::new(Kind::Table, class))?;
            }
            let into = self.plan_of(class);
            let into = into.ok_or_else(|| ReplicaError::NoTable(known_as.clone()))?;
            self.merge_table(&name, &into)?;
            if told {
                self.tell_whole(&into)?;
            }
            registry::forget_table(&self.conn, id)?;
            self.ddl(&format!("DROP TABLE {name}"))?;
        }
        Ok(())
    }

    fn merge_table(&mut self, name: &str, into: &Arc<Plan>) -> Result<()> {
        let table = introspect::read_table_named(&self.conn, name)?;
        let Some(table) = registry::numbered(&self.conn, &table)? else { return Ok(()) };
        let key = |p: &crate::core::schema::Table| {
            p.key.iter().map(|k| k.name.to_lowercase()).collect::<Vec<_>>().join(", ")
        };
        let (here, there) = (key(&into.table), key(&table));
        if here != there {
            return Err(ReplicaError::OtherKey { table: into.table.name.clone(), here, there });
        }
        let columns: BTreeMap<u32, u32> =
            table.columns.iter().filter_map(|c| Some((c.id, into.table.column(&c.name)?.id))).collect();
        let from = Plan::new(table, String::new(), Vec::new());
        let mut deferred = Vec::new();
        for key in self.all_keys(&from)? {
            let refs: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
            let Some(mut row) = self.local_row(&from, &refs)?.0 else { continue };
            let renumbered = |id: &u32| columns.get(id).copied();
            row.state.columns =
                row.state.columns.iter().filter_map(|(id, v)| Some((renumbered(id)?, *v))).collect();
            row.values = row.values.into_iter().filter_map(|(id, v)| Some((renumbered(&id)?, v))).collect();
            self.merge_local(into, &key, &row, &mut deferred)?;
        }
        self.place_deferred(deferred)
    }

    /// The keys that a table has or had.
    fn all_keys(&self, plan: &Plan) -> Result<BTreeSet<Vec<Value>>> {
        let count = plan.table.key.len();
        let sql = format!(
            "SELECT {} FROM {} UNION ALL SELECT {} FROM {}",
            list(0..count, |i| format!("k{i}")),
            state_table(&plan.table),
            list(&plan.table.key, |k| k.sql.clone()),
            ident(&plan.table.name)
        );
        let mut statement = self.conn.prepare(&sql)?;
        let rows =
            statement.query_map([], |r| (0..count).map(|i| get(r, i).map(|v| v.to_value())).collect())?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    fn merge_local(
        &mut self,
        plan: &Arc<Plan>,
        key: &[Value],
        row: &Row,
        deferred: &mut Vec<Deferred>,
    ) -> Result<()> {
        let refs: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
        if refs.iter().any(|k| matches!(k, ValueRef::Null)) {
            return Ok(());
        }
        let (ours, present) = self.local_row(plan, &refs)?;
        let merged = ours.as_ref().map_or_else(|| row.clone(), |ours| merge(ours, row));
        if ours.as_ref() == Some(&merged) && present == merged.state.dead.is_none() {
            return Ok(());
        }
        let lsn = self.next_lsn();
        self.sites.put(&self.conn, plan, &refs, &merged.state, lsn)?;
        match self.write_row(plan, &refs, ours.as_ref().filter(|_| present), &merged) {
            Err(ReplicaError::Sqlite(e)) if is_unique_violation(&e) => {
                deferred.push(Deferred { plan: plan.clone(), key: key.to_vec(), row: merged });
                Ok(())
            }
            result => result,
        }
    }
}
