//! The schema as it replicates: each table, column, index, view, trigger and the user version is a row of
//! `__litemesh_schema`. Invariant: a row is written whole, so that of two writers one wins whole; two concurrent
//! writes of one object that mean different things are refused, not merged.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, OptionalExtension};
use serde::{Deserialize, Serialize};

use super::identity::{Classes, Idents, name_of};
use super::materialize::moved_to;
use super::plan::Plan;
use super::recall::recalled;
use super::registry::from_wire;
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::{OP_INSERT, OP_UPDATE, PREFIX, SCHEMA};
use crate::core::ddl;
use crate::core::merge::{Row, merge};
use crate::core::schema::SchemaMode;
use crate::core::value::{Value, ValueRef};
use crate::core::version::Version;

/// What kind of thing an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// An ordinary table, without its columns.
    Table,
    /// A column.
    Column,
    /// A virtual table.
    Virtual,
    /// A view.
    View,
    /// An index.
    Index,
    /// A trigger.
    Trigger,
    /// `PRAGMA user_version`.
    UserVersion,
}

const KINDS: [(Kind, &str); 7] = [
    (Kind::Table, "table"),
    (Kind::Column, "column"),
    (Kind::Virtual, "virtual table"),
    (Kind::View, "view"),
    (Kind::Index, "index"),
    (Kind::Trigger, "trigger"),
    (Kind::UserVersion, "user_version"),
];

impl Kind {
    /// The word stored and shown.
    pub fn word(self) -> &'static str {
        KINDS.iter().find(|(k, _)| *k == self).map_or("", |(_, word)| word)
    }

    fn of(word: &str) -> Option<Self> {
        KINDS.iter().find(|(_, w)| *w == word).map(|(k, _)| *k)
    }
}

/// What an object is called: names in lower case, the table of a column only. A table goes by its identity, for its
/// columns, too.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// The table that a column is of, else empty.
    pub table: String,
    /// Its name.
    pub name: String,
}

impl ObjectKey {
    /// The key of anything but a column.
    pub fn new(kind: Kind, name: &str) -> Self {
        Self { kind, table: String::new(), name: name.to_lowercase() }
    }

    /// The key of a column.
    pub fn column(table: &str, name: &str) -> Self {
        Self { kind: Kind::Column, table: table.to_lowercase(), name: name.to_lowercase() }
    }

    /// The table that it is, or is a column of.
    pub fn table_name(&self) -> &str {
        if self.kind == Kind::Column { &self.table } else { &self.name }
    }

    fn values(&self) -> [Value; 3] {
        [self.kind.word(), &self.table, &self.name].map(|t| Value::Text(t.as_bytes().to_vec()))
    }
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            Kind::Column => write!(f, "column {:?} of table {:?}", self.name, from_wire(&self.table).0),
            kind => write!(f, "{} {:?}", kind.word(), from_wire(&self.name).0),
        }
    }
}

/// An object as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// How often it had been dropped before it was made: rows written for an earlier one do not concern this one.
    pub incarnation: i64,
    /// Whether it is dropped.
    pub gone: bool,
    /// The place of a column in its table.
    pub place: i64,
    /// Its definition: a [`TableDef`] as JSON, a column's text, else the `CREATE` text; a number for the user version.
    pub definition: String,
    /// The name it has now, if it is a column that was renamed.
    pub moved: Option<String>,
    /// The identity of the table that an index or trigger is on.
    pub owner: Option<String>,
}

/// Recorded objects.
pub type Objects = BTreeMap<ObjectKey, Recorded>;

/// What is recorded of a table besides its columns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableDef {
    /// Its name as written.
    pub name: String,
    /// Its constraints.
    pub constraints: Vec<String>,
    /// STRICT, WITHOUT ROWID.
    pub options: String,
}

impl TableDef {
    /// Reads what [`Recorded::definition`] holds of a table.
    pub fn parse(definition: &str) -> Result<Self> {
        serde_json::from_str(definition)
            .map_err(|e| ReplicaError::Unfit(format!("a table's recorded definition cannot be read: {e}")))
    }
}

/// What a definition means: with equal shapes two objects agree.
pub fn shape(kind: Kind, definition: &str) -> String {
    match kind {
        Kind::Column => ddl::column_shape(definition),
        Kind::Table => TableDef::parse(definition)
            .map_or_else(|_| definition.to_owned(), |t| ddl::table_shape(&t.constraints, &t.options)),
        _ => ddl::normal(definition),
    }
}

/// The objects that are in the file and replicate, tables by what they are known as.
pub fn actual(conn: &Connection, covers: &dyn Fn(&str) -> bool, idents: &Idents) -> Result<Objects> {
    let mut objects = Objects::new();
    let mut tables = BTreeSet::new();
    let mut add = |key: ObjectKey, place: usize, definition: String| {
        let place = place as i64;
        let made = Recorded { incarnation: 0, gone: false, place, definition, moved: None, owner: None };
        objects.insert(key, made);
    };
    let mut statement = conn.prepare_cached(
        "SELECT s.type, s.name, s.sql, l.type, s.tbl_name FROM sqlite_schema AS s
           LEFT JOIN pragma_table_list AS l ON l.schema = 'main' AND l.name = s.name AND s.type = 'table'
         WHERE s.sql IS NOT NULL AND s.name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND substr(s.name, 1, ?2) <> ?1",
    )?;
    let mut rows = statement.query((PREFIX, PREFIX.len() as i64))?;
    while let Some(row) = rows.next()? {
        let (kind, name, sql): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let listed: Option<String> = row.get(3)?;
        let on: String = row.get(4)?;
        match (kind.as_str(), listed.as_deref()) {
            ("table", Some("virtual")) if covers(&name) => add(ObjectKey::new(Kind::Virtual, &name), 0, sql),
            ("table", Some("table")) if covers(&name) => {
                let Some(parts) = ddl::parse_table(&sql) else { continue };
                let ident = idents.of(&name);
                for (place, (column, text)) in parts.columns.into_iter().enumerate() {
                    add(ObjectKey::column(&ident, &column), place, text);
                }
                tables.insert(name.to_lowercase());
                let key = ObjectKey::new(Kind::Table, &ident);
                let def = TableDef { name, constraints: parts.constraints, options: parts.options };
                let text = serde_json::to_string(&def).map_err(|e| ReplicaError::Unfit(e.to_string()))?;
                add(key, 0, text);
            }
            ("view", _) => add(ObjectKey::new(Kind::View, &name), 0, sql),
            ("index", _) if covers(&on) => add(ObjectKey::new(Kind::Index, &name), 0, sql),
            ("trigger", _) if covers(&on) => add(ObjectKey::new(Kind::Trigger, &name), 0, sql),
            _ => {}
        }
    }
    let version: i64 = conn.pragma_query_value(None, "user_version", |r| r.get(0))?;
    add(ObjectKey::new(Kind::UserVersion, ""), 0, version.to_string());
    for (_, object) in objects.iter_mut().filter(|(k, _)| matches!(k.kind, Kind::Index | Kind::Trigger)) {
        let on = ddl::on_table(&object.definition).map(|t| t.to_lowercase());
        object.owner = on.filter(|t| tables.contains(t)).map(|t| idents.of(&t));
    }
    Ok(objects)
}

/// The objects that are recorded, dropped ones included.
pub fn recorded(conn: &Connection) -> Result<Objects> {
    let mut statement = conn
        .prepare_cached("SELECT kind, tbl, name, gen, gone, pos, def, moved, owner FROM __litemesh_schema")?;
    let mut rows = statement.query([])?;
    let mut objects = Objects::new();
    while let Some(r) = rows.next()? {
        // A kind that a later release knows is none of ours to judge.
        let Some(kind) = Kind::of(&r.get::<_, String>(0)?) else { continue };
        let key = ObjectKey { kind, table: r.get(1)?, name: r.get(2)? };
        let (incarnation, gone, place) = (r.get(3)?, r.get(4)?, r.get(5)?);
        let (definition, moved, owner) = (r.get(6)?, r.get(7)?, r.get(8)?);
        let object = Recorded { incarnation, gone, place, definition, moved, owner };
        objects.insert(key, object);
    }
    Ok(objects)
}

/// What is recorded of one object.
pub fn recorded_one(conn: &Connection, key: &ObjectKey) -> Result<Option<Recorded>> {
    let sql = "SELECT gen, gone, pos, def, moved, owner FROM __litemesh_schema WHERE kind = ?1 AND tbl = ?2 AND name = ?3";
    let mut statement = conn.prepare_cached(sql)?;
    let found = statement.query_row((key.kind.word(), &key.table, &key.name), |r| {
        let (incarnation, gone, place) = (r.get(0)?, r.get(1)?, r.get(2)?);
        let (definition, moved, owner) = (r.get(3)?, r.get(4)?, r.get(5)?);
        Ok(Recorded { incarnation, gone, place, definition, moved, owner })
    });
    Ok(found.optional()?)
}

/// Whether an object of a view of the schema concerns a table that this node replicates.
pub fn is_covered(key: &ObjectKey, view: &Objects, covers: &dyn Fn(&str) -> bool) -> bool {
    let table = |ident: &str| view.get(&ObjectKey::new(Kind::Table, ident)).and_then(name_of);
    match key.kind {
        Kind::Table | Kind::Column => table(key.table_name()).is_none_or(|t| covers(&t)),
        Kind::Virtual => covers(&key.name),
        Kind::Index | Kind::Trigger => {
            view.get(key).and_then(|o| ddl::on_table(&o.definition)).is_none_or(|t| covers(&t))
        }
        Kind::View | Kind::UserVersion => true,
    }
}

/// Names that the application gave columns: old -> new, in lower case.
#[derive(Debug, Default)]
pub struct Renames(pub BTreeMap<ObjectKey, String>);

impl Renames {
    /// Whether what went by this name made way for what goes by it now.
    fn displaced(&self, key: &ObjectKey) -> bool {
        self.0.iter().any(|(old, new)| *new == key.name && old.kind == key.kind && old.table == key.table)
    }
}

impl Store {
    /// Records what the application did to its schema since the last look, and logs it for the others.
    pub(super) fn record_schema(&mut self, renames: &Renames) -> Result<()> {
        if self.schema_mode == SchemaMode::Manual {
            return Ok(());
        }
        let (known, classes) = self.view()?;
        let idents = Idents::read(&self.conn, &known, &classes)?;
        let mut actual = actual(&self.conn, &*self.covers, &idents)?;
        place_columns(&known, &mut actual);
        for (key, object) in &actual {
            let mut new = object.clone();
            let mut again = false;
            match known.get(key) {
                Some(old) if old.gone || renames.displaced(key) => again = true,
                Some(old) => {
                    let same = shape(key.kind, &old.definition) == shape(key.kind, &new.definition);
                    if same && old.place == new.place && is_called_the_same(key, old, &new) {
                        continue;
                    }
                    new.owner = new.owner.or_else(|| old.owner.clone());
                }
                // A version of 0 is what every file has.
                None if key.kind == Kind::UserVersion && new.definition == "0" => continue,
                None => {}
            }
            self.write_of_class(key, &new, again, &classes)?;
        }
        // What goes with its table is not recorded as dropped: if the table turns out to live on, it is there with it.
        let goes_along = |key: &ObjectKey, object: &Recorded| {
            let table = if key.kind == Kind::Column { Some(&key.table) } else { object.owner.as_ref() };
            table.is_some_and(|t| !actual.contains_key(&ObjectKey::new(Kind::Table, classes.of(t))))
        };
        for (key, old) in known.iter().filter(|(k, o)| !o.gone && !goes_along(k, o)) {
            if !actual.contains_key(key) && is_covered(key, &known, &*self.covers) {
                let gone = Recorded { gone: true, moved: renames.0.get(key).cloned(), ..old.clone() };
                self.write_of_class(key, &gone, false, &classes)?;
            }
        }
        Ok(())
    }

    /// Writes what became of an object; of one that is of several tables that are one, to the records of all that live.
    fn write_of_class(
        &mut self,
        key: &ObjectKey,
        new: &Recorded,
        again: bool,
        classes: &Classes,
    ) -> Result<()> {
        let all = recorded(&self.conn)?;
        let is_of_it = |k: &ObjectKey| {
            k.kind == key.kind
                && match k.kind {
                    Kind::Table => classes.of(&k.name) == key.name,
                    Kind::Column => classes.of(&k.table) == key.table && k.name == key.name,
                    _ => k == key,
                }
        };
        let of_it: Vec<(&ObjectKey, &Recorded)> = all.iter().filter(|(k, _)| is_of_it(k)).collect();
        let living: Vec<_> = of_it.iter().filter(|(_, o)| !o.gone).collect();
        for (key, old) in &living {
            let incarnation = old.incarnation + i64::from(again);
            self.write_object(key, &Recorded { incarnation, ..new.clone() }, true)?;
        }
        if living.is_empty() && !new.gone {
            // A column belongs to a table that lives.
            let holder = all.iter().find(|(k, o)| {
                k.kind == Kind::Table
                    && !o.gone
                    && classes.of(&k.name) == key.table
                    && key.kind == Kind::Column
            });
            let key = match holder {
                Some((table, _)) => ObjectKey { table: table.name.clone(), ..key.clone() },
                None => key.clone(),
            };
            let last = of_it.iter().map(|(_, o)| o.incarnation).max();
            let incarnation = last.map_or(0, |n| n + 1);
            let is_known = all.contains_key(&key);
            self.write_object(&key, &Recorded { incarnation, ..new.clone() }, is_known)?;
        }
        Ok(())
    }

    pub(super) fn write_object(&mut self, key: &ObjectKey, object: &Recorded, is_known: bool) -> Result<()> {
        let sql =
            "INSERT OR REPLACE INTO __litemesh_schema(kind, tbl, name, gen, gone, pos, def, moved, owner)
                   VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)";
        let Recorded { incarnation, gone, place, definition, moved, owner } = object;
        let names = (key.kind.word(), &key.table, &key.name);
        self.conn.prepare_cached(sql)?.execute(rusqlite::params![
            names.0,
            names.1,
            names.2,
            incarnation,
            gone,
            place,
            definition,
            moved,
            owner
        ])?;
        let plan = self.plan(SCHEMA).expect("our own tables have plans before anything is recorded");
        let columns: Vec<u32> = plan.table.columns.iter().map(|c| c.id).collect();
        let op = if is_known { OP_UPDATE } else { OP_INSERT };
        self.log_own(&plan, &key.values(), op, &columns)
    }

    /// Merges a peer's record of an object; returns whether what is recorded here has changed.
    pub(super) fn merge_object(
        &mut self,
        plan: &Plan,
        key: &[ValueRef<'_>],
        theirs: &Row,
        they_saw: &dyn Fn(Version) -> bool,
    ) -> Result<bool> {
        let (ours, _) = self.local_row(plan, key)?;
        if let Some(lacking) = recalled(key).filter(|_| ours.as_ref() != Some(theirs)) {
            self.doubtful.insert(lacking);
        }
        let mut merged = ours.as_ref().map_or_else(|| theirs.clone(), |ours| merge(ours, theirs));
        let mut assert_again = false;
        if let (Some(ours), Some(name)) = (&ours, object_key(key)) {
            self.note_doubt(plan, &name, ours, theirs, they_saw)?;
            let winner = self.check_concurrent(plan, &name, ours, theirs, they_saw)?;
            if let Some(winner) = winner.filter(|w| w.values != merged.values) {
                // The versions alone would let the other one win: this one is written once more, later than both.
                merged.values = winner.values.clone();
                assert_again = true;
            }
        }
        if ours.as_ref() == Some(&merged) {
            return Ok(false);
        }
        if let (Some(ours), Some(name)) = (&ours, object_key(key))
            && let (Some(before), Some(after)) = (Object::of(plan, ours), Object::of(plan, &merged))
            && before.gone
            && !after.gone
            && before.incarnation == after.incarnation
            && name.kind == Kind::Column
        {
            self.revived.insert(name);
        }
        let lsn = self.next_lsn();
        self.sites.put(&self.conn, plan, key, &merged.state, lsn)?;
        self.conn.prepare_cached(&plan.delete_row)?.execute(rusqlite::params_from_iter(key))?;
        self.insert_row(plan, key, &merged)?;
        if assert_again {
            let key: Vec<Value> = key.iter().map(|k| k.to_value()).collect();
            let columns: Vec<u32> = plan.table.columns.iter().map(|c| c.id).collect();
            self.log_own(plan, &key, OP_UPDATE, &columns)?;
            self.unsettled = true;
        }
        Ok(true)
    }

    /// Of a column that was dropped, renamed or made again on two nodes at once, one may have the values and the other
    /// not: whoever has them will tell them again.
    fn note_doubt(
        &mut self,
        plan: &Plan,
        key: &ObjectKey,
        ours: &Row,
        theirs: &Row,
        they_saw: &dyn Fn(Version) -> bool,
    ) -> Result<()> {
        let (Some(o), Some(t)) = (Object::of(plan, ours), Object::of(plan, theirs)) else { return Ok(()) };
        let fate = |o: &Object| (o.gone, o.moved.clone(), o.incarnation);
        if key.kind != Kind::Column || !self.is_concurrent(ours, theirs, they_saw) {
            return Ok(());
        }
        let is_target = "SELECT 1 FROM __litemesh_schema WHERE kind = ?1 AND moved = ?2";
        let is_target = self.conn.prepare_cached(is_target)?.exists((key.kind.word(), &key.name))?;
        if fate(&o) != fate(&t) || is_target {
            let targets = [o.moved, t.moved].into_iter().flatten();
            let targets = targets.map(|name| ObjectKey { name, ..key.clone() });
            self.doubtful.extend([key.clone()].into_iter().chain(targets));
        }
        Ok(())
    }

    fn is_concurrent(&self, ours: &Row, theirs: &Row, they_saw: &dyn Fn(Version) -> bool) -> bool {
        let (a, b) = (newest(ours), newest(theirs));
        a != b && !they_saw(a) && !self.head.vector.covers(b)
    }

    /// Of two records neither of whose writers had seen the other: an error if they contradict each other; else the
    /// one that must win, if that is not for the versions to decide.
    fn check_concurrent<'r>(
        &self,
        plan: &Plan,
        key: &ObjectKey,
        ours: &'r Row,
        theirs: &'r Row,
        they_saw: &dyn Fn(Version) -> bool,
    ) -> Result<Option<&'r Row>> {
        if !self.is_concurrent(ours, theirs, they_saw) {
            return Ok(None);
        }
        let (Some(o), Some(t)) = (Object::of(plan, ours), Object::of(plan, theirs)) else { return Ok(None) };
        match (o.gone, t.gone) {
            // What was made again does not become the earlier one, whatever happened to that meanwhile.
            _ if o.incarnation != t.incarnation => {
                Ok(Some(if o.incarnation > t.incarnation { ours } else { theirs }))
            }
            (true, true) => Ok(None),
            // Who changed it did not know that it was dropped: it stays.
            (false, true) => Ok(Some(ours)),
            (true, false) => Ok(Some(theirs)),
            (false, false) if key.kind == Kind::UserVersion => {
                let number = |o: &Object| o.definition.parse::<i64>().unwrap_or(0);
                Ok(Some(if number(&o) >= number(&t) { ours } else { theirs }))
            }
            // Of indexes and triggers on different tables one has the name: nothing is lost with the other.
            (false, false) if o.owner.is_some() && t.owner.is_some() && o.owner != t.owner => Ok(None),
            (false, false) if o.meaning(key.kind) == t.meaning(key.kind) => Ok(None),
            (false, false) => Err(ReplicaError::Contradiction {
                object: key.to_string(),
                here: o.definition,
                there: t.definition,
            }),
        }
    }
}

/// The fields of a schema row that decide.
struct Object {
    gone: bool,
    definition: String,
    moved: Option<String>,
    owner: Option<String>,
    incarnation: i64,
}

impl Object {
    /// What it means, whatever the table that it is on is called.
    fn meaning(&self, kind: Kind) -> String {
        match &self.owner {
            Some(owner) => shape(kind, &moved_to(&self.definition, owner)),
            None => shape(kind, &self.definition),
        }
    }

    fn of(plan: &Plan, row: &Row) -> Option<Self> {
        let value = |name: &str| row.values.get(&plan.table.column(name)?.id);
        let gone = matches!(value("gone")?, Value::Int(n) if *n != 0);
        let text = |value: &Value| match value {
            Value::Text(t) => Some(String::from_utf8_lossy(t).into_owned()),
            _ => None,
        };
        let incarnation = if let Value::Int(n) = value("gen")? { *n } else { 0 };
        let (moved, owner) = (text(value("moved")?), text(value("owner")?));
        Some(Self { gone, definition: text(value("def")?)?, moved, owner, incarnation })
    }
}

fn object_key(key: &[ValueRef<'_>]) -> Option<ObjectKey> {
    let text = |i: usize| match key.get(i) {
        Some(ValueRef::Text(t)) => std::str::from_utf8(t).ok().map(str::to_owned),
        _ => None,
    };
    Some(ObjectKey { kind: Kind::of(&text(0)?)?, table: text(1)?, name: text(2)? })
}

fn newest(row: &Row) -> Version {
    row.state.versions().max().unwrap_or(Version::ZERO)
}

/// Whether a table has the name that it had; of anything else, or another spelling of it, nothing hangs on that.
fn is_called_the_same(key: &ObjectKey, old: &Recorded, new: &Recorded) -> bool {
    let name = |o: &Recorded| name_of(o).map(|n| n.to_lowercase());
    key.kind != Kind::Table || name(old) == name(new)
}

/// A table's recorded columns in their order. Columns that two nodes added at once have one place: the name decides.
pub fn column_order(objects: &Objects, table: &str) -> Vec<String> {
    let columns = objects.iter().filter(|(k, o)| k.kind == Kind::Column && k.table == table && !o.gone);
    let mut order: Vec<(i64, &str)> = columns.map(|(k, o)| (o.place, k.name.as_str())).collect();
    order.sort_unstable();
    order.into_iter().map(|(_, name)| name.to_owned()).collect()
}

/// Gives the columns of a file places that keep their order and, where they can, the recorded places.
fn place_columns(known: &Objects, actual: &mut Objects) {
    let tables: Vec<String> =
        actual.keys().filter(|k| k.kind == Kind::Table).map(|k| k.name.clone()).collect();
    for table in tables {
        let mut last: Option<(i64, String)> = None;
        for name in column_order(actual, &table) {
            let key = ObjectKey::column(&table, &name);
            let recorded = known.get(&key).filter(|o| !o.gone).map(|o| (o.place, name.clone()));
            let next = (last.as_ref().map_or(0, |(place, _)| place + 1), name.clone());
            let place = recorded.filter(|r| last.as_ref().is_none_or(|l| r > l)).unwrap_or(next);
            if let Some(object) = actual.get_mut(&key) {
                object.place = place.0;
            }
            last = Some(place);
        }
    }
}
