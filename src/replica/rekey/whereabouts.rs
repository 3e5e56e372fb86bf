//! Where the row of a conflict is now, for who only reads the file. Invariant: a row that is kept of is found under the
//! id that its writer gave it, whatever id it is shown under, and is never taken for the one that has that id now.

use std::collections::BTreeMap;

use rusqlite::Connection;

use super::links::Link;
use super::places::Looking;
use crate::core::rekey::{Incarnation, locate};
use crate::core::value::{Value, ValueRef};
use crate::core::version::Version;
use crate::replica::plan::Plan;
use crate::replica::shadow::Sites;
use crate::replica::{Result, registry};
use crate::sqlite::introspect::{self, Schema};

/// Where a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::replica) enum Whereabouts {
    /// Its table has nothing to do with it: the row is under its key, if it is there.
    Plain,
    /// It is shown under this id.
    Shown(i64),
    /// It is not there: who has its id is another.
    Gone,
}

/// Finds rows of tables that keep both.
pub(in crate::replica) struct Finder<'c> {
    conn: &'c Connection,
    /// None while no table keeps both.
    schema: Option<(Schema, Sites)>,
    tables: BTreeMap<String, Option<(Plan, Link)>>,
}

impl<'c> Finder<'c> {
    /// One for this file.
    pub fn new(conn: &'c Connection) -> Result<Self> {
        let begun = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = '__litemesh_rekey'";
        let schema = match conn.prepare(begun)?.exists([])? {
            true => Some((introspect::read(conn)?, Sites::load(conn)?)),
            false => None,
        };
        Ok(Self { conn, schema, tables: BTreeMap::new() })
    }

    /// Where the row born at `birth` under this key is.
    pub fn find(&mut self, table: &str, key: &[Value], birth: Version) -> Result<Whereabouts> {
        let (Some((schema, sites)), [Value::Int(origin)]) = (&self.schema, key) else {
            return Ok(Whereabouts::Plain);
        };
        let name = table.to_lowercase();
        if !self.tables.contains_key(&name) {
            let found = keeping(self.conn, schema, table)?;
            self.tables.insert(name.clone(), found);
        }
        let Some((plan, link)) = &self.tables[&name] else { return Ok(Whereabouts::Plain) };
        let row = Incarnation { origin: *origin, birth };
        let spot = locate(&mut Looking { conn: self.conn, sites, plan, link }, row)?;
        let state = sites.get(self.conn, plan, &[ValueRef::Int(spot.place)])?;
        Ok(match state {
            Some(state) if state.birth == birth && state.dead.is_none() => Whereabouts::Shown(spot.place),
            // Untouched since adoption.
            None if row.is_adopted() => Whereabouts::Shown(spot.place),
            _ => Whereabouts::Gone,
        })
    }
}

fn keeping(conn: &Connection, schema: &Schema, table: &str) -> Result<Option<(Plan, Link)>> {
    let found = schema.tables.iter().find(|t| t.name.eq_ignore_ascii_case(table));
    let Some(table) = found.map(|t| registry::numbered(conn, t)).transpose()?.flatten() else {
        return Ok(None);
    };
    let keeps = conn.prepare_cached("SELECT 1 FROM __litemesh_rekey WHERE tbl = ?1")?.exists([table.id])?;
    Ok(keeps.then(|| {
        let link = Link::new(&table, true, Vec::new(), Vec::new());
        (Plan::new(table, String::new(), Vec::new()), link)
    }))
}
