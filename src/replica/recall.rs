//! Rows that a file lacks because its table, or values because their column, was dropped or renamed here and turns out to
//! live on elsewhere: it asks for them, and whoever has the table tells all of it again. Invariant: who is asked holds by
//! then whatever the asker had ever been sent; rows are told as they are, tombstones included, so that to hear them twice
//! changes nothing.

use std::collections::BTreeSet;

use super::Result;
use super::identity::Classes;
use super::plan::Plan;
use super::schema::{Kind, ObjectKey, recorded};
use super::store::Store;
use crate::core::capture::{OP_INSERT, OP_TELL, OP_UPDATE, PREFIX, SCHEMA, state_table};
use crate::core::sqltext::{ident, list};
use crate::core::value::{Value, ValueRef};

/// The kind of a row that is no object: a node asks for rows.
const RECALL: &str = "recall";

impl Store {
    /// Asks the others to tell again what they have of a table or column that was made here without its rows.
    pub(super) fn recall(&mut self, lacking: &ObjectKey) -> Result<()> {
        let table = lacking.table_name();
        let column = if lacking.kind == Kind::Column { &lacking.name[..] } else { "" };
        let name = format!("{column}\0{}", self.head.site);
        let sql = "INSERT INTO __litemesh_schema(kind, tbl, name, gen, gone, pos, def) VALUES(?1, ?2, ?3, 0, 0, 1, '')
                   ON CONFLICT(kind, tbl, name) DO UPDATE SET pos = pos + 1";
        self.conn.prepare_cached(sql)?.execute((RECALL, table, &name))?;
        let plan = self.plan(SCHEMA).expect("our own tables have plans before anything is recorded");
        let columns: Vec<u32> = plan.table.columns.iter().map(|c| c.id).collect();
        let key = [RECALL, table, &name].map(|t| Value::Text(t.as_bytes().to_vec()));
        let op = if self.sites.get(&self.conn, &plan, &key.each_ref().map(Value::as_ref))?.is_some() {
            OP_UPDATE
        } else {
            OP_INSERT
        };
        self.log_own(&plan, &key, op, &columns)
    }

    /// Asks for the rows of tables that were dead before a peer's records came and live now: what came for them
    /// meanwhile was let go.
    pub(super) fn recall_revived(&mut self, dead: &BTreeSet<String>) -> Result<()> {
        let still = self.dead_tables()?;
        let classes = Classes::read(&self.conn)?;
        let revived = dead.difference(&still).map(|ident| classes.of(ident).to_owned());
        for ident in revived.collect::<BTreeSet<_>>() {
            if let Some(plan) = self.plan_of(&ident) {
                self.tell_whole(&plan)?;
                self.recall(&ObjectKey::new(Kind::Table, &ident))?;
            }
        }
        Ok(())
    }

    /// Columns that live in one of several tables that are one, and were dropped in another: where that was done their
    /// values are gone, elsewhere not.
    pub(super) fn columns_gone_in_part(&self) -> Result<BTreeSet<ObjectKey>> {
        let (all, classes) = (recorded(&self.conn)?, Classes::read(&self.conn)?);
        let columns = || all.iter().filter(|(k, _)| k.kind == Kind::Column);
        let of_class = |k: &ObjectKey| ObjectKey { table: classes.of(&k.table).to_owned(), ..k.clone() };
        let living: BTreeSet<ObjectKey> =
            columns().filter(|(_, o)| !o.gone).map(|(k, _)| of_class(k)).collect();
        let gone = columns().filter(|(_, o)| o.gone).map(|(k, _)| of_class(k));
        Ok(gone.filter(|k| living.contains(k)).collect())
    }

    /// From now on the table's rows are told to whoever has not got them from this file, whatever else it says to have:
    /// they came, or are told, under versions from before.
    pub(super) fn tell_whole(&self, plan: &Plan) -> Result<()> {
        let sql = "UPDATE __litemesh_table SET told = 1 WHERE id = ?1";
        self.conn.prepare_cached(sql)?.execute([plan.table.id])?;
        Ok(())
    }

    /// Whether rows of a table are told whatever the asker says to have.
    pub(super) fn is_told_whole(&self, plan: &Plan) -> Result<bool> {
        let sql = "SELECT 1 FROM __litemesh_table WHERE id = ?1 AND told = 1";
        Ok(self.conn.prepare_cached(sql)?.exists([plan.table.id])?)
    }

    /// Tells again all of the tables of which a peer lacks rows, or a column's values: as they are, because a value told as
    /// a new write would be later than what others have meanwhile, and an untouched one would not be told.
    pub(super) fn tell_doubtful(&mut self) -> Result<()> {
        if self.doubtful.is_empty() {
            return Ok(());
        }
        let classes = Classes::read(&self.conn)?;
        for key in std::mem::take(&mut self.doubtful) {
            let Some(plan) = self.plan_of(classes.of(key.table_name())) else { continue };
            self.tell_whole(&plan)?;
            self.log_told(&plan)?;
            self.unsettled = true;
        }
        Ok(())
    }

    /// Logs each row that is there or was, to be told as it is.
    fn log_told(&self, plan: &Plan) -> Result<()> {
        let table = &plan.table;
        let (state, name, id) = (state_table(table), ident(&table.name), table.id);
        let keys = list(0..table.key.len(), |i| format!("k{i}"));
        let same = (0..table.key.len()).map(|i| format!("t.{} = s.k{i}", table.key[i].sql));
        let same = same.collect::<Vec<_>>().join(" AND ");
        self.conn.execute_batch(&format!(
            "INSERT INTO {PREFIX}log(tbl, op, ms, {keys}) SELECT {id}, {OP_TELL}, julianday('now'), {keys} FROM {state};
             INSERT INTO {PREFIX}log(tbl, op, ms, {keys}) SELECT {id}, {OP_TELL}, julianday('now'), {} FROM {name} AS t
               WHERE NOT EXISTS(SELECT 1 FROM {state} AS s WHERE {same});",
            list(&table.key, |k| format!("t.{}", k.sql)),
        ))?;
        Ok(())
    }
}

/// The table or column that a peer asks for: it was made there without its rows.
pub(super) fn recalled(key: &[ValueRef<'_>]) -> Option<ObjectKey> {
    let text = |i: usize| match key.get(i) {
        Some(ValueRef::Text(t)) => std::str::from_utf8(t).ok(),
        _ => None,
    };
    let (column, _) = text(2)?.split_once('\0').filter(|_| text(0) == Some(RECALL))?;
    Some(if column.is_empty() {
        ObjectKey::new(Kind::Table, text(1)?)
    } else {
        ObjectKey::column(text(1)?, column)
    })
}
