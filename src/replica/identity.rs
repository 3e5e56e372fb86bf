//! Which tables there are. A table keeps for its life what it was called when it was made (its identity: the name, and
//! how many of that name were made before); what it is called now is recorded as any other property. Two living tables
//! that two nodes gave one name are one table from then on. Invariant: that two are one is a row that is never taken
//! back; so all nodes come to the same classes, and the rows of a class are whatever was ever written to one of it.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::Connection;

use super::materialize::moved_to;
use super::registry::{from_wire, local_tables, with_incarnation};
use super::schema::{Kind, ObjectKey, Objects, Recorded, TableDef, column_order, recorded, shape};
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::{OP_INSERT, SCHEMA};
use crate::core::ddl::on_table;
use crate::core::schema::SchemaMode;
use crate::core::value::Value;

/// The kind of a row that says that two tables are one.
const SAME: &str = "same";

/// The tables that are one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Classes(BTreeMap<String, String>);

impl Classes {
    /// Reads what is recorded.
    pub fn read(conn: &Connection) -> Result<Self> {
        let mut statement = conn.prepare_cached("SELECT tbl, name FROM __litemesh_schema WHERE kind = ?1")?;
        let mut rows = statement.query([SAME])?;
        let mut classes = Self::default();
        while let Some(r) = rows.next()? {
            classes.join(&r.get::<_, String>(0)?, &r.get::<_, String>(1)?);
        }
        Ok(classes)
    }

    /// The first of the class that a table belongs to.
    pub fn of<'a>(&'a self, ident: &'a str) -> &'a str {
        self.0.get(ident).map_or(ident, String::as_str)
    }

    fn join(&mut self, a: &str, b: &str) {
        let (a, b) = (self.of(a).to_owned(), self.of(b).to_owned());
        let (first, other) = if a < b { (a, b) } else { (b, a) };
        if first == other {
            return;
        }
        self.0.values_mut().filter(|c| **c == other).for_each(|c| c.clone_from(&first));
        self.0.insert(other, first);
    }
}

/// What is recorded, one object for each class: what its first living table says of it; dropped only if all of it is.
/// Columns, indexes and triggers of a table that is dropped are so too, and those of one that was renamed follow it.
pub fn view(all: &Objects, classes: &Classes) -> Objects {
    let mut view = Objects::new();
    let is_alive = |ident: &str| all.get(&ObjectKey::new(Kind::Table, ident)).is_some_and(|t| !t.gone);
    let class_of = |key: &ObjectKey| match key.kind {
        Kind::Table => ObjectKey { name: classes.of(&key.name).to_owned(), ..key.clone() },
        Kind::Column => ObjectKey { table: classes.of(&key.table).to_owned(), ..key.clone() },
        _ => key.clone(),
    };
    for (key, object) in all {
        let mut object = object.clone();
        object.gone |= key.kind == Kind::Column && !is_alive(&key.table);
        match view.get_mut(&class_of(key)) {
            Some(first) if first.gone && !object.gone => *first = object,
            Some(_) => {}
            None => drop(view.insert(class_of(key), object)),
        }
    }
    let tables: BTreeMap<String, Option<String>> = view
        .iter()
        .filter(|(k, _)| k.kind == Kind::Table)
        .map(|(k, t)| (k.name.clone(), Some(t).filter(|t| !t.gone).and_then(name_of)))
        .collect();
    let views: BTreeSet<String> = view
        .iter()
        .filter(|(k, o)| matches!(k.kind, Kind::View | Kind::Virtual) && !o.gone)
        .map(|(k, _)| k.name.clone())
        .collect();
    let names: BTreeSet<String> = tables.values().flatten().map(|n| n.to_lowercase()).collect();
    let attached = view.iter_mut().filter(|(k, o)| matches!(k.kind, Kind::Index | Kind::Trigger) && !o.gone);
    for (_, object) in attached {
        let named = on_table(&object.definition).unwrap_or_default().to_lowercase();
        match object.owner.as_deref().map(|o| tables.get(classes.of(o)).cloned().flatten()) {
            Some(Some(name)) if !name.eq_ignore_ascii_case(&named) => {
                object.definition = moved_to(&object.definition, &name);
            }
            Some(Some(_)) => {}
            Some(None) => object.gone = true,
            None => object.gone = !views.contains(&named) && !names.contains(&named),
        }
    }
    view
}

/// What a recorded table is called now.
pub fn name_of(table: &Recorded) -> Option<String> {
    TableDef::parse(&table.definition).ok().map(|d| d.name)
}

/// What a table of this file is, or is to be, known as: by its number, by what is recorded under its name, or as a new
/// one.
pub struct Idents {
    numbered: BTreeMap<String, String>,
    recorded: BTreeMap<String, String>,
    made: BTreeMap<String, i64>,
}

impl Idents {
    /// Reads them; `view` as of now.
    pub fn read(conn: &Connection, view: &Objects, classes: &Classes) -> Result<Self> {
        let tables = || view.iter().filter(|(k, _)| k.kind == Kind::Table);
        let is_gone = |ident: &str| view.get(&ObjectKey::new(Kind::Table, ident)).is_some_and(|t| t.gone);
        let numbered = local_tables(conn)?.into_iter().filter_map(|t| {
            let ident = classes.of(&t.ident).to_owned();
            (!is_gone(&ident)).then(|| (t.name.to_lowercase(), ident))
        });
        let numbered: BTreeMap<String, String> = numbered.collect();
        // A table that has just been renamed here is still recorded under the name that may be another's now.
        let here: BTreeSet<&String> = numbered.values().collect();
        let named = tables()
            .filter(|(k, t)| !t.gone && !here.contains(&k.name))
            .filter_map(|(k, t)| Some((name_of(t)?.to_lowercase(), k.name.clone())));
        let mut made = BTreeMap::new();
        for ident in recorded(conn)?.keys().filter(|k| k.kind == Kind::Table) {
            let (name, incarnation) = from_wire(&ident.name);
            let last = made.entry(name.to_owned()).or_insert(incarnation);
            *last = incarnation.max(*last);
        }
        let recorded = named.collect();
        Ok(Self { numbered, recorded, made })
    }

    /// What the table of this name is known as.
    pub fn of(&self, name: &str) -> String {
        let name = name.to_lowercase();
        let known = self.numbered.get(&name).or_else(|| self.recorded.get(&name));
        known.cloned().unwrap_or_else(|| {
            let incarnation = self.made.get(&name).map_or(0, |last| last + 1);
            with_incarnation(&name, incarnation)
        })
    }
}

impl Store {
    /// The schema as it is to be, and which tables are one.
    pub(super) fn view(&self) -> Result<(Objects, Classes)> {
        let classes = Classes::read(&self.conn)?;
        Ok((view(&recorded(&self.conn)?, &classes), classes))
    }

    /// What the tables of this file are known as.
    pub(super) fn idents(&self) -> Result<Idents> {
        let (view, classes) = self.view()?;
        Idents::read(&self.conn, &view, &classes)
    }

    /// Makes living tables of one name one, and says so to the others.
    pub(super) fn unify(&mut self) -> Result<()> {
        let mut named: BTreeMap<String, ObjectKey> = BTreeMap::new();
        let mut again = true;
        while std::mem::take(&mut again) {
            named.clear();
            let (view, _) = self.view()?;
            for (key, table) in view.iter().filter(|(k, o)| k.kind == Kind::Table && !o.gone) {
                let Some(name) = name_of(table).filter(|n| (self.covers)(n)) else { continue };
                if let Some(first) = named.insert(name.to_lowercase(), key.clone()) {
                    self.may_be_one(&view, &first, key)?;
                    self.join(&first.name, &key.name)?;
                    again = true;
                    break;
                }
            }
        }
        self.check_classes()
    }

    fn may_be_one(&self, view: &Objects, a: &ObjectKey, b: &ObjectKey) -> Result<()> {
        let contradiction = |object: &ObjectKey, here: &str, there: &str| {
            let (object, here, there) = (object.to_string(), here.to_owned(), there.to_owned());
            Err(ReplicaError::Contradiction { object, here, there })
        };
        if let (Some(x), Some(y)) = (view.get(a), view.get(b))
            && shape(Kind::Table, &x.definition) != shape(Kind::Table, &y.definition)
        {
            return contradiction(a, &x.definition, &y.definition);
        }
        for name in column_order(view, &a.name) {
            let (x, y) = (ObjectKey::column(&a.name, &name), ObjectKey::column(&b.name, &name));
            if let (Some(x), Some(y)) = (view.get(&x), view.get(&y).filter(|y| !y.gone))
                && shape(Kind::Column, &x.definition) != shape(Kind::Column, &y.definition)
            {
                return contradiction(&ObjectKey::column(&a.name, &name), &x.definition, &y.definition);
            }
        }
        let plans = [a, b].map(|k| self.plans().find(|p| p.wire_name == k.name));
        if let Some(plan) = plans.iter().flatten().find(|p| self.links.contains_key(&p.table.id)) {
            let here = format!("{:?}, which keeps both rows of an id collision", plan.table.name);
            return contradiction(a, &here, "another table of that name");
        }
        Ok(())
    }

    fn join(&mut self, a: &str, b: &str) -> Result<()> {
        let sql = "INSERT INTO __litemesh_schema(kind, tbl, name, gen, gone, pos, def) VALUES(?1, ?2, ?3, 0, 0, 0, '')";
        self.conn.prepare_cached(sql)?.execute((SAME, a, b))?;
        let plan = self.plan(SCHEMA).expect("our own tables have plans before anything is recorded");
        self.log_own(&plan, &[SAME, a, b].map(|t| Value::Text(t.as_bytes().to_vec())), OP_INSERT, &[])
    }

    /// Tables that are one must not contradict each other.
    fn check_classes(&self) -> Result<()> {
        let (all, classes) = (recorded(&self.conn)?, Classes::read(&self.conn)?);
        let view = view(&all, &classes);
        let is_alive = |ident: &str| all.get(&ObjectKey::new(Kind::Table, ident)).is_some_and(|t| !t.gone);
        for (key, object) in all.iter().filter(|(_, o)| !o.gone) {
            let of_class = match key.kind {
                Kind::Table => ObjectKey { name: classes.of(&key.name).to_owned(), ..key.clone() },
                Kind::Column if is_alive(&key.table) => {
                    ObjectKey { table: classes.of(&key.table).to_owned(), ..key.clone() }
                }
                _ => continue,
            };
            let Some(first) = view.get(&of_class) else { continue };
            if shape(key.kind, &first.definition) != shape(key.kind, &object.definition) {
                return Err(ReplicaError::Contradiction {
                    object: key.to_string(),
                    here: first.definition.clone(),
                    there: object.definition.clone(),
                });
            }
        }
        Ok(())
    }

    /// The tables that are recorded as dropped.
    pub(super) fn dead_tables(&self) -> Result<BTreeSet<String>> {
        if self.schema_mode == SchemaMode::Manual {
            return Ok(BTreeSet::new());
        }
        let (all, classes) = (recorded(&self.conn)?, Classes::read(&self.conn)?);
        let view = view(&all, &classes);
        let is_dead =
            |ident: &str| view.get(&ObjectKey::new(Kind::Table, classes.of(ident))).is_none_or(|t| t.gone);
        let tables = all.into_keys().filter(|k| k.kind == Kind::Table).map(|k| k.name);
        Ok(tables.filter(|ident| is_dead(ident)).collect())
    }
}
