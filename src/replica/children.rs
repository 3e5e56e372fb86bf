//! Children of rows that lost: which row was meant by who refers to a key that two nodes gave out at once. Invariant:
//! a child is written down with the incarnation that its writer knew, by the first node that knows both incarnations
//! and the child; from then on that entry travels with them.
//!
//! A writer that had seen the winner meant the winner. So when an incarnation loses, whoever referred to the key in this
//! file before the winner came is a child of the loser; and who arrives later is, if what it arrives with had not seen
//! the winner.

use std::sync::Arc;

use serde_json::json;

use super::Result;
use super::entry::{CHILD, Entry, OTHER, conflict_id, key_text, parse_version, version_text};
use super::plan::Plan;
use super::store::Store;
use crate::core::schema::{Reference, Table};
use crate::core::sqltext::{ident, list};
use crate::core::value::{Value, ValueRef};
use crate::core::version::Version;
use crate::sqlite::value::get;

/// A row that refers to a key for which more than one row was inserted.
pub(super) struct Touched {
    child: Arc<Plan>,
    key: Vec<Value>,
    column: String,
    parent: Arc<Plan>,
    id: i64,
}

/// A reference whose parents' keys were given out twice, and where its value is in a row.
pub(super) struct Watched {
    column: String,
    parent: Arc<Plan>,
    at: Place,
}

/// Where a column is.
#[derive(Debug, Clone, Copy)]
enum Place {
    Key(usize),
    Column(usize),
}

fn place(table: &Table, column: &str) -> Option<Place> {
    let same = |name: &str| name.eq_ignore_ascii_case(column);
    let key = table.key.iter().position(|k| same(&k.name)).map(Place::Key);
    key.or_else(|| table.columns.iter().position(|c| same(&c.name)).map(Place::Column))
}

impl Store {
    /// The references of a table that rows arriving for it have to be looked at for.
    pub(super) fn watched(&self, child: &Plan) -> Result<Vec<Watched>> {
        let mut found = Vec::new();
        for reference in &child.table.references {
            let Some(parent) = self.plan(&reference.parent) else { continue };
            let Some(at) = place(&child.table, &reference.column) else { continue };
            let by_key = child.table.references_to(&parent.table).any(|r| r == reference);
            if by_key && self.has_collision(&parent.table.name, None)? {
                found.push(Watched { column: reference.column.clone(), parent, at });
            }
        }
        Ok(found)
    }

    /// Whether rows of other tables refer to those of this one by an integer that is their key.
    pub(super) fn is_parent(&self, parent: &Plan) -> bool {
        self.plans.iter().any(|child| child.table.references_to(&parent.table).next().is_some())
    }

    /// Notes that a parent's key has another row now, and which row had to go unseen, if one had.
    pub(super) fn note_displaced(
        &mut self,
        parent: &Plan,
        key: &[ValueRef<'_>],
        gone: Option<Version>,
    ) -> Result<()> {
        let [ValueRef::Int(id)] = key else { return Ok(()) };
        self.collided.push((parent.table.id, *id));
        let Some(birth) = gone else { return Ok(()) };
        let (table, key) = (parent.table.name.clone(), key_text(key.iter().copied()));
        let conflict = conflict_id(&table, &key, birth, None);
        let (kind, content, at_ms) = (OTHER.to_owned(), json!({}), birth.hlc.ms() as i64);
        let entry = Entry { id: [0; 16], conflict, table, key, kind, birth, content, winner: birth, at_ms };
        self.keep_entry(&entry.numbered())
    }

    fn has_collision(&self, table: &str, id: Option<i64>) -> Result<bool> {
        let key = id.map(|id| key_text([ValueRef::Int(id)].into_iter()));
        let sql = "SELECT 1 FROM __litemesh_conflicts INDEXED BY __litemesh_conflicts_of
                   WHERE tbl = ?1 COLLATE NOCASE AND kind = ?2 AND key >= ?3 AND (?4 OR key = ?3) LIMIT 1";
        let params = (table, OTHER, key.as_deref().unwrap_or(""), key.is_none());
        Ok(self.conn.prepare_cached(sql)?.exists(params)?)
    }

    /// Notes a row that arrives, if it refers to a key that was given out twice. `value` finds a column by its place in
    /// the table.
    pub(super) fn touch_child(
        &mut self,
        child: &Arc<Plan>,
        watched: &[Watched],
        key: &[ValueRef<'_>],
        value: impl Fn(usize) -> Option<Value>,
    ) -> Result<()> {
        for w in watched {
            let found = match w.at {
                Place::Key(i) => key.get(i).map(|v| v.to_value()),
                Place::Column(i) => value(i),
            };
            let Some(Value::Int(id)) = found else { continue };
            if self.has_collision(&w.parent.table.name, Some(id))? {
                self.touched.push(Touched {
                    child: child.clone(),
                    key: key.iter().map(|k| k.to_value()).collect(),
                    column: w.column.clone(),
                    parent: w.parent.clone(),
                    id,
                });
            }
        }
        Ok(())
    }

    /// Writes down whose children the rows are that came, or were here when another row took their parent's key. Called
    /// before the vector is raised.
    pub(super) fn link_children(&mut self, they_saw: &dyn Fn(Version) -> bool) -> Result<()> {
        let mut candidates = std::mem::take(&mut self.touched);
        for (table, id) in std::mem::take(&mut self.collided) {
            let Some(parent) = self.plans.iter().find(|p| p.table.id == table).cloned() else { continue };
            if !self.has_collision(&parent.table.name, Some(id))? {
                continue;
            }
            for child in self.plans.clone() {
                for reference in child.table.references_to(&parent.table) {
                    for key in self.referring(&child, reference, id)? {
                        let (child, parent) = (child.clone(), parent.clone());
                        let column = reference.column.clone();
                        candidates.push(Touched { child, key, column, parent, id });
                    }
                }
            }
        }
        candidates.iter().try_for_each(|c| self.link(c, they_saw))
    }

    /// The keys of the rows whose column refers to a key.
    fn referring(&self, child: &Plan, reference: &Reference, id: i64) -> Result<Vec<Vec<Value>>> {
        let keys = child.table.key.len();
        let sql = format!(
            "SELECT {} FROM {} WHERE {} = ?1",
            list(&child.table.key, |k| k.sql.clone()),
            ident(&child.table.name),
            ident(&reference.column)
        );
        let mut statement = self.conn.prepare_cached(&sql)?;
        let rows =
            statement.query_map([id], |r| (0..keys).map(|i| get(r, i).map(ValueRef::to_value)).collect())?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    fn link(&mut self, t: &Touched, they_saw: &dyn Fn(Version) -> bool) -> Result<()> {
        let key: Vec<ValueRef<'_>> = t.key.iter().map(Value::as_ref).collect();
        let (Some(child), true) = self.local_row(&t.child, &key)? else { return Ok(()) };
        // Another write may have given it another parent in the meantime.
        let version = match place(&t.child.table, &t.column) {
            Some(Place::Key(_)) => child.state.birth,
            Some(Place::Column(i)) => {
                let id = t.child.table.columns[i].id;
                if child.values.get(&id) != Some(&Value::Int(t.id)) {
                    return Ok(());
                }
                child.state.column(id)
            }
            None => return Ok(()),
        };
        let parent_key = key_text([ValueRef::Int(t.id)].into_iter());
        let losers = self.losing_births(&t.parent.table.name, &parent_key)?;
        let (winner, _) = self.local_row(&t.parent, &[ValueRef::Int(t.id)])?;
        let winner = winner.map(|w| w.state.birth);
        let vector = &self.head.vector;
        let was_here = vector.covers(version);
        let saw = |v: &Version| if was_here { vector.covers(*v) } else { they_saw(*v) };
        let known = losers.iter().copied().chain(winner).filter(|b| *b <= version && saw(b));
        let Some(meant) = known.max().filter(|m| Some(*m) != winner) else { return Ok(()) };
        let entry = |birth: &Version| child_entry(t, &parent_key, *birth, version);
        for other in &losers {
            let exists = "SELECT 1 FROM __litemesh_conflicts WHERE id = ?1";
            if self.conn.prepare_cached(exists)?.exists([&entry(other).id[..]])? {
                return Ok(());
            }
        }
        self.keep_entry(&entry(&meant))
    }

    /// The incarnations of a key that had to go unseen.
    fn losing_births(&self, table: &str, key: &str) -> Result<Vec<Version>> {
        let sql = "SELECT DISTINCT birth FROM __litemesh_conflicts INDEXED BY __litemesh_conflicts_of
                   WHERE tbl = ?1 COLLATE NOCASE AND kind = ?2 AND key = ?3";
        let mut statement = self.conn.prepare_cached(sql)?;
        let rows = statement.query_map((table, OTHER, key), |r| r.get::<_, String>(0))?;
        let births = rows.map(|r| r.map(|text| parse_version(&text)));
        Ok(births.collect::<rusqlite::Result<Vec<_>>>()?.into_iter().flatten().collect())
    }
}

fn child_entry(t: &Touched, parent_key: &str, birth: Version, version: Version) -> Entry {
    let table = t.parent.table.name.clone();
    let key: Vec<_> = t.key.iter().map(|k| super::entry::to_json(k.as_ref())).collect();
    let content = json!({
        "table": t.child.table.name, "key": key, "column": t.column, "version": version_text(version),
    });
    Entry {
        id: [0; 16],
        conflict: conflict_id(&table, parent_key, birth, None),
        table,
        key: parent_key.to_owned(),
        kind: CHILD.to_owned(),
        birth,
        content,
        winner: version,
        at_ms: version.hlc.ms() as i64,
    }
    .numbered()
}
