//! Brings a file's schema to what is recorded: what another node's application did with DDL is done here. Invariant:
//! it runs within the transaction that merged the records, changes only what means something else than recorded, and
//! loses no row.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension};

use super::apply::{Deferred, is_unique_violation};
use super::identity::name_of;
use super::registry;
use super::schema::{Kind, ObjectKey, Objects, Recorded, TableDef, actual, column_order, is_covered, shape};
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::ddl::{create_table, normal, on_table};
use crate::core::schema::{KeyKind, SchemaMode, Table};
use crate::core::sqltext::{Token, ident, index_parts, list, tokens};
use crate::core::value::Value;
use crate::sqlite::introspect;
use crate::sqlite::value::get;

/// What a table is called while it is built anew.
const BUILDING: &str = "__litemesh_building";

impl Store {
    /// Does what is recorded and not done. The caller reads the schema again. Returns the UNIQUE indexes that the rows
    /// here do not allow yet.
    pub(super) fn materialize(&mut self) -> Result<Vec<String>> {
        let mut late = Vec::new();
        if self.schema_mode == SchemaMode::Manual {
            return Ok(late);
        }
        self.unify()?;
        let wanted = self.wanted()?;
        self.settle_tables(&wanted)?;
        let renamed = self.rename_columns(&wanted)?;
        let have = self.actual()?;
        for kind in [Kind::Trigger, Kind::View, Kind::Index, Kind::Virtual] {
            self.drop_changed(kind, &wanted, &have)?;
        }
        let have = self.actual()?;
        self.recall_missing(&wanted, &have)?;
        for kind in [Kind::Table, Kind::Virtual] {
            self.create_missing(kind, &wanted, &have, &mut late)?;
        }
        for key in have.keys().filter(|k| k.kind == Kind::Table) {
            if wanted.get(key).is_some_and(|o| !o.gone) {
                self.alter_table(key, &wanted, &renamed)?;
            }
        }
        // Rebuilding a table took its indexes and triggers with it.
        let have = self.actual()?;
        for kind in [Kind::Index, Kind::View, Kind::Trigger] {
            self.create_missing(kind, &wanted, &have, &mut late)?;
        }
        if let Some(version) = wanted.get(&ObjectKey::new(Kind::UserVersion, "")) {
            let number: i64 = version.definition.parse().unwrap_or(0);
            self.conn.pragma_update(None, "user_version", number)?;
        }
        Ok(late)
    }

    /// What is recorded of what this node replicates.
    fn wanted(&self) -> Result<Objects> {
        let view = self.view()?.0;
        let covered = |(k, _): &(&ObjectKey, &Recorded)| is_covered(k, &view, &*self.covers);
        Ok(view.iter().filter(covered).map(|(k, o)| (k.clone(), o.clone())).collect())
    }

    fn actual(&self) -> Result<Objects> {
        actual(&self.conn, &*self.covers, &self.idents()?)
    }

    pub(super) fn ddl(&self, sql: &str) -> Result<()> {
        let failed = |source| ReplicaError::Ddl { what: sql.to_owned(), source };
        self.conn.execute_batch(sql).map_err(failed)
    }

    /// Columns that were renamed keep their values, their numbers and what is known of them.
    fn rename_columns(&mut self, wanted: &Objects) -> Result<BTreeSet<ObjectKey>> {
        let mut renamed = BTreeSet::new();
        let have = self.actual()?;
        for (old, object) in wanted.iter().filter(|(k, o)| k.kind == Kind::Column && o.gone) {
            let Some(name) = &object.moved else { continue };
            let new = ObjectKey { name: name.clone(), ..old.clone() };
            let Some(target) = wanted.get(&new).filter(|o| !o.gone) else { continue };
            let in_the_way = have.contains_key(&new);
            if !have.contains_key(old) || (in_the_way && !self.is_another(&new, target)) {
                continue;
            }
            self.rename_column(&table_name(wanted, &old.table)?, old, &new.name, in_the_way)?;
            renamed.insert(new);
        }
        Ok(renamed)
    }

    fn rename_column(&self, name: &str, old: &ObjectKey, new: &str, in_the_way: bool) -> Result<()> {
        let table = ident(name);
        if in_the_way {
            self.ddl(&format!("ALTER TABLE {table} DROP COLUMN {}", ident(new)))?;
            registry::forget_column(&self.conn, name, new)?;
        }
        self.ddl(&format!("ALTER TABLE {table} RENAME COLUMN {} TO {}", ident(&old.name), ident(new)))?;
        match registry::table_id(&self.conn, name)? {
            Some(id) => registry::rename_column(&self.conn, id, &old.name, new),
            None => Ok(()),
        }
    }

    /// A column that is about to be made here and is no new thing: it was dropped here before, of this table or of one that
    /// has become one with it, or renamed from what is not here. Its values are with others.
    fn recall_missing(&mut self, wanted: &Objects, have: &Objects) -> Result<()> {
        let revived = std::mem::take(&mut self.revived);
        let gone = self.columns_gone_in_part()?;
        let is_target = |key: &ObjectKey| {
            wanted.iter().any(|(k, o)| {
                k.kind == key.kind && k.table == key.table && o.gone && o.moved.as_deref() == Some(&key.name)
            })
        };
        let is_here = |key: &ObjectKey| have.contains_key(&ObjectKey::new(Kind::Table, &key.table));
        let made = wanted.iter().filter(|(k, o)| k.kind == Kind::Column && !o.gone && !have.contains_key(k));
        let lacking = made
            .map(|(k, _)| k)
            .filter(|k| is_here(k) && (revived.contains(k) || gone.contains(k) || is_target(k)));
        for key in lacking.cloned().collect::<Vec<_>>() {
            self.recall(&key)?;
        }
        Ok(())
    }

    /// Drops what is recorded as dropped, and what is recorded differently: it is made again.
    fn drop_changed(&mut self, kind: Kind, wanted: &Objects, have: &Objects) -> Result<()> {
        for (key, object) in have.iter().filter(|(k, _)| k.kind == kind) {
            let Some(record) = wanted.get(key) else { continue };
            if record.gone || shape(kind, &record.definition) != shape(kind, &object.definition) {
                let word = if kind == Kind::Virtual { "TABLE" } else { kind.word() };
                self.ddl(&format!("DROP {word} IF EXISTS {}", ident(&key.name)))?;
            }
        }
        Ok(())
    }

    /// Whether the column that is here is an earlier one of the name than recorded.
    fn is_another(&self, key: &ObjectKey, record: &Recorded) -> bool {
        let Some(plan) = self.plan_of(&key.table) else { return false };
        let mut here = plan.wire_columns.iter().map(|n| registry::from_wire(n));
        here.any(|(name, n)| name.eq_ignore_ascii_case(&key.name) && n < record.incarnation)
    }

    fn create_missing(
        &mut self,
        kind: Kind,
        wanted: &Objects,
        have: &Objects,
        late: &mut Vec<String>,
    ) -> Result<()> {
        for (key, record) in wanted.iter().filter(|(k, o)| k.kind == kind && !o.gone) {
            if have.contains_key(key) {
                continue;
            }
            match kind {
                Kind::Table => self.create_table(key, record, wanted)?,
                Kind::Virtual => self.create_virtual(&key.name, &record.definition)?,
                Kind::Index => late.extend(self.create_index(&record.definition)?),
                _ => self.ddl(&record.definition)?,
            }
        }
        Ok(())
    }

    fn create_table(&self, key: &ObjectKey, record: &Recorded, wanted: &Objects) -> Result<()> {
        let def = TableDef::parse(&record.definition)?;
        self.ddl(&table_text(&def.name, key, &def, wanted))
    }

    /// A full-text index over a table's rows is filled from them.
    fn create_virtual(&self, name: &str, sql: &str) -> Result<()> {
        self.ddl(sql)?;
        let text = normal(sql);
        let filled_elsewhere = text.contains("content = ") && !text.contains("content = ''");
        if text.contains("using fts5") && filled_elsewhere {
            self.ddl(&format!("INSERT INTO {0}({0}) VALUES('rebuild')", ident(name)))?;
        }
        Ok(())
    }

    /// Brings a table's columns and constraints to what is recorded: by ALTER TABLE where that can do it, else by
    /// building the table anew.
    fn alter_table(
        &mut self,
        key: &ObjectKey,
        wanted: &Objects,
        renamed: &BTreeSet<ObjectKey>,
    ) -> Result<()> {
        let have = self.actual()?;
        let (Some(record), Some(object)) = (wanted.get(key), have.get(key)) else { return Ok(()) };
        let (order, present) = (column_order(wanted, &key.name), column_order(&have, &key.name));
        let agrees = |name: &String| {
            let column = ObjectKey::column(&key.name, name);
            let (Some(w), Some(h)) = (wanted.get(&column), have.get(&column)) else { return true };
            shape(Kind::Column, &w.definition) == shape(Kind::Column, &h.definition)
        };
        let same_frame = shape(Kind::Table, &record.definition) == shape(Kind::Table, &object.definition);
        if same_frame && order == present && order.iter().all(agrees) {
            return Ok(());
        }
        let another = |name: &&String| {
            let column = ObjectKey::column(&key.name, name);
            wanted
                .get(&column)
                .is_some_and(|record| self.is_another(&column, record) && !renamed.contains(&column))
        };
        let gone: Vec<&String> = present.iter().filter(|n| !order.contains(n) || another(n)).collect();
        let kept: Vec<&String> = present.iter().filter(|n| !gone.contains(n)).collect();
        let new: Vec<&String> = order.iter().filter(|n| !kept.contains(n)).collect();
        let appended = order.iter().eq(kept.iter().chain(&new).copied());
        let simple = same_frame && appended && kept.iter().all(|n| agrees(n));
        let name = table_name(wanted, &key.name)?;
        if !(simple && self.alter_columns(&name, key, &gone, &new, wanted)?) {
            let kept: Vec<String> = kept.into_iter().cloned().collect();
            self.rebuild_table(key, &kept, wanted)?;
        }
        Ok(())
    }

    /// Tries ALTER TABLE; what it did is undone if it cannot do all.
    fn alter_columns(
        &self,
        name: &str,
        key: &ObjectKey,
        gone: &[&String],
        new: &[&String],
        wanted: &Objects,
    ) -> Result<bool> {
        let table = ident(name);
        let drops = gone.iter().map(|n| format!("ALTER TABLE {table} DROP COLUMN {};", ident(n)));
        let definition = |n: &&&String| Some(&wanted.get(&ObjectKey::column(&key.name, n))?.definition);
        let adds =
            new.iter().filter_map(|n| definition(&n)).map(|d| format!("ALTER TABLE {table} ADD COLUMN {d};"));
        let sql: String = drops.chain(adds).collect();
        self.conn.execute_batch("SAVEPOINT alter_columns")?;
        let done = self.conn.execute_batch(&sql);
        let end = if done.is_ok() {
            "RELEASE alter_columns"
        } else {
            "ROLLBACK TO alter_columns; RELEASE alter_columns"
        };
        self.conn.execute_batch(end)?;
        Ok(done.is_ok())
    }

    /// The way SQLite's documentation gives for changes that ALTER TABLE does not know: a new table, all rows, the old
    /// one away, the new one in its place.
    fn rebuild_table(&mut self, key: &ObjectKey, kept: &[String], wanted: &Objects) -> Result<()> {
        let Some(record) = wanted.get(key) else { return Ok(()) };
        let def = TableDef::parse(&record.definition)?;
        let old = introspect::read_table_named(&self.conn, &def.name)?;
        self.ddl(&table_text(BUILDING, key, &def, wanted))?;
        let new = introspect::read_table_named(&self.conn, BUILDING)?;
        let generated = |name: &&String| {
            [&old, &new].iter().any(|t| t.generated.iter().any(|g| g.eq_ignore_ascii_case(name)))
        };
        let (mut into, mut from) = (Vec::new(), Vec::new());
        for name in kept.iter().filter(|n| !generated(n)) {
            into.push(ident(name));
            from.push(or_default(&self.conn, &new, name)?);
        }
        for column in new.columns.iter().filter(|c| !kept.iter().any(|k| k.eq_ignore_ascii_case(&c.name))) {
            if let Some(blank) = column.blank() {
                into.push(ident(&column.name));
                from.push(blank.to_owned());
            }
        }
        if old.key_kind == KeyKind::Rowid && new.key_kind == KeyKind::Rowid {
            into.push(new.key[0].sql.clone());
            from.push(old.key[0].sql.clone());
        }
        let table = ident(&def.name);
        if !into.is_empty() {
            let (into, from) = (list(into, |n| n), list(from, |n| n));
            self.ddl(&format!("INSERT INTO {BUILDING}({into}) SELECT {from} FROM {table}"))?;
        }
        let last_id = self.last_id(&old)?;
        self.conn.pragma_update(None, "legacy_alter_table", true)?;
        let done =
            self.ddl(&format!("DROP TABLE {table}; ALTER TABLE {BUILDING} RENAME TO {}", ident(&def.name)));
        self.conn.pragma_update(None, "legacy_alter_table", false)?;
        done?;
        if let Some(last) = last_id.filter(|_| new.autoincrement) {
            let raise = "UPDATE sqlite_sequence SET seq = max(seq, ?2) WHERE name = ?1 COLLATE NOCASE";
            if self.conn.execute(raise, (&def.name, last))? == 0 {
                self.conn
                    .execute("INSERT INTO sqlite_sequence(name, seq) VALUES(?1, ?2)", (&def.name, last))?;
            }
        }
        Ok(())
    }

    /// The last id that AUTOINCREMENT gave.
    fn last_id(&self, table: &Table) -> Result<Option<i64>> {
        if !table.autoincrement {
            return Ok(None);
        }
        let sql = "SELECT seq FROM sqlite_sequence WHERE name = ?1 COLLATE NOCASE";
        Ok(self.conn.query_row(sql, [&table.name], |r| r.get(0)).optional()?)
    }

    /// Creates an index; gives back the text of one that must wait for rows to be settled.
    fn create_index(&self, sql: &str) -> Result<Option<String>> {
        match self.ddl(sql) {
            Err(ReplicaError::Ddl { source, .. }) if is_unique_violation(&source) => Ok(Some(sql.to_owned())),
            done => done.map(|()| None),
        }
    }

    /// Rows that a new UNIQUE index does not allow are settled like those that merging brings together.
    pub(super) fn settle_duplicates(&mut self, index: &str) -> Result<()> {
        let unfit = || ReplicaError::Unfit(format!("an index cannot be made: {index}"));
        let table = on_table(index).ok_or_else(unfit)?;
        let plan = self.plan(&table).ok_or_else(unfit)?;
        let (terms, condition) = index_parts(index).ok_or_else(unfit)?;
        let (terms, table) = (terms.join(", "), ident(&table));
        let condition = condition.map_or_else(|| "1".to_owned(), |c| format!("({c})"));
        let keys = list(&plan.table.key, |k| k.sql.clone());
        let found: Vec<Vec<Value>> = {
            let mut statement = self.conn.prepare(&format!(
                "SELECT {keys} FROM {table} WHERE {condition} AND ({terms}) IN
                   (SELECT {terms} FROM {table} WHERE {condition} GROUP BY {terms} HAVING count(*) > 1)"
            ))?;
            let count = plan.table.key.len();
            let rows =
                statement.query_map([], |r| (0..count).map(|i| get(r, i).map(|v| v.to_value())).collect())?;
            rows.collect::<rusqlite::Result<_>>()?
        };
        let mut deferred = Vec::new();
        for key in found {
            let refs: Vec<_> = key.iter().map(Value::as_ref).collect();
            if let (Some(row), true) = self.local_row(&plan, &refs)? {
                deferred.push(Deferred { plan: plan.clone(), key: key.clone(), row });
            }
            self.conn.prepare_cached(&plan.delete_row)?.execute(rusqlite::params_from_iter(&key))?;
        }
        self.ddl(index)?;
        self.place_deferred(deferred)
    }

    /// What could not be brought to what is recorded would be taken for the application's doing at the next look.
    pub(super) fn check_schema(&self) -> Result<()> {
        let (have, wanted) = (self.actual()?, self.wanted()?);
        let wrong = wanted.iter().find(|(key, record)| match have.get(key) {
            None => !record.gone && key.kind != Kind::UserVersion,
            Some(object) => {
                record.gone || shape(key.kind, &record.definition) != shape(key.kind, &object.definition)
            }
        });
        match wrong {
            None => Ok(()),
            Some((key, _)) => Err(ReplicaError::Unfit(format!(
                "{key} cannot be brought to what the peer has: change it here as it was changed there"
            ))),
        }
    }
}

/// What a recorded table is called.
fn table_name(wanted: &Objects, ident: &str) -> Result<String> {
    let table = wanted.get(&ObjectKey::new(Kind::Table, ident)).and_then(name_of);
    table.ok_or_else(|| ReplicaError::Unfit(format!("nothing is recorded of the table {ident:?}")))
}

/// The text of an index or trigger, on another table.
pub(super) fn moved_to(sql: &str, table: &str) -> String {
    let Some(old) = on_table(sql) else { return sql.to_owned() };
    let all = tokens(sql);
    let on = all.iter().position(|t| t.is_keyword("ON")).unwrap_or(all.len());
    let at = all.iter().enumerate().skip(on + 1).find(|(_, t)| t.name().eq_ignore_ascii_case(&old));
    let at = at.map(|(i, _)| i);
    let part = |(i, t): (usize, &Token<'_>)| if Some(i) == at { ident(table) } else { t.text.to_owned() };
    all.iter().enumerate().map(part).collect()
}

fn table_text(name: &str, key: &ObjectKey, def: &TableDef, wanted: &Objects) -> String {
    let order = column_order(wanted, &key.name);
    let text = |n: &String| Some(wanted.get(&ObjectKey::column(&key.name, n))?.definition.as_str());
    let columns: Vec<&str> = order.iter().filter_map(text).collect();
    create_table(name, &columns, &def.constraints, &def.options)
}

/// A column of the old table for the new one: where that does not take NULL, its default stands in, else a value of
/// its type that says nothing.
fn or_default(conn: &Connection, table: &Table, column: &str) -> Result<String> {
    let name = ident(column);
    let Some(found) = table.column(column).filter(|c| c.not_null) else { return Ok(name) };
    let sql = "SELECT dflt_value FROM pragma_table_xinfo(?1) WHERE name = ?2 COLLATE NOCASE";
    let default: Option<String> = conn.query_row(sql, (BUILDING, column), |r| r.get(0))?;
    Ok(match default.as_deref().or(found.blank()) {
        Some(value) => format!("coalesce({name}, {value})"),
        None => name,
    })
}
