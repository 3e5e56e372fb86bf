//! What the application did to rows of tables that keep both, and to references to them. Invariant: an id that is
//! used again leaves the tombstone of the row that had it, and a reference is to the row that the application saw.

use std::sync::Arc;

use rusqlite::params_from_iter;

use super::links::{Link, Ref, Refs};
use crate::core::capture::{PREFIX, state_table};
use crate::core::merge::{Row, RowState};
use crate::core::rekey::{Incarnation, LinkedRow, Places, succeeded};
use crate::core::value::{Value, ValueRef};
use crate::core::version::Version;
use crate::replica::Result;
use crate::replica::plan::Plan;
use crate::replica::store::Store;
use crate::sqlite::value::get;

/// How many changed rows are looked at before what was found is written.
const CHUNK: i64 = 20_000;

impl Store {
    /// The states of the ids that the log uses again, if the table keeps both rows; before they are overwritten.
    pub(in crate::replica) fn used_again(&mut self, plan: &Plan) -> Result<Vec<(i64, RowState)>> {
        if !self.links.get(&plan.table.id).is_some_and(|l| l.keeps_both) {
            return Ok(Vec::new());
        }
        let sql = format!(
            "SELECT DISTINCT s.k0, bh, bs, dh, ds, cols FROM {PREFIX}log AS l CROSS JOIN {} AS s ON s.k0 = l.k0 \
             WHERE l.tbl = ?1",
            state_table(&plan.table)
        );
        let mut statement = self.conn.prepare_cached(&sql)?;
        let sites = &self.sites;
        let rows = statement.query_map([plan.table.id], |r| Ok((r.get(0)?, sites.read_state(r, 1)?)))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Gives those who had an id before it was used again, by rows born at `version`, their places as dead.
    pub(in crate::replica) fn bury(
        &mut self,
        plan: &Arc<Plan>,
        before: Vec<(i64, RowState)>,
        version: Version,
    ) -> Result<()> {
        let Some(link) = self.links.get(&plan.table.id).filter(|l| l.keeps_both).cloned() else {
            return Ok(());
        };
        for (place, state) in before {
            let origin = link.origin(&self.conn, place)?;
            link.set_origin(&self.conn, place, place)?;
            link.write_refs(&self.conn, &mut self.sites, &[ValueRef::Int(place)], &Refs::new())?;
            let incarnation = Incarnation { origin, birth: state.birth };
            if link.is_fixed(incarnation.birth) || state.birth == version {
                continue;
            }
            let row = Row { state: succeeded(&state, version), values: Default::default() };
            let row = LinkedRow { row, refs: Refs::new() };
            // References show the id where it was, and that is where its successor is.
            let mut deferred = Vec::new();
            self.take_incarnation((plan, &link), incarnation, row, &|_| true, &mut deferred)?;
            self.place_deferred(deferred)?;
        }
        Ok(())
    }

    /// After the log has become states changed after `base`: what they refer to.
    pub(in crate::replica) fn absorb_links(&mut self, version: Version, base: i64) -> Result<()> {
        if self.links.is_empty() {
            return Ok(());
        }
        for plan in self.plans.clone() {
            let Some(link) = self.links.get(&plan.table.id).cloned() else { continue };
            if !link.refs.is_empty() {
                self.absorb_refs(&plan, &link, version, base)?;
            }
        }
        let mut deferred = Vec::new();
        self.follow_moves(&mut deferred)?;
        self.place_deferred(deferred)
    }

    /// The values decide: a row that is there is alive, whatever the log says last.
    pub(in crate::replica) fn revive(&mut self, plan: &Arc<Plan>, version: Version, base: i64) -> Result<()> {
        let Some(link) = self.links.get(&plan.table.id).cloned() else { return Ok(()) };
        let keys = plan.table.key.len();
        let mut statement = self.conn.prepare_cached(&link.revived)?;
        let rows =
            statement.query_map([base], |r| (0..keys).map(|i| get(r, i).map(|v| v.to_value())).collect())?;
        let rows = rows.collect::<rusqlite::Result<Vec<Vec<Value>>>>()?;
        drop(statement);
        for key in rows {
            let refs: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
            let Some(before) = self.sites.get(&self.conn, plan, &refs)? else { continue };
            let lsn = self.next_lsn();
            self.sites.put(&self.conn, plan, &refs, &RowState::born(version), lsn)?;
            if let [Value::Int(place)] = key[..] {
                self.bury(plan, vec![(place, before)], version)?;
            }
        }
        Ok(())
    }

    /// Rows that were taken out because another is the same, as the log has it.
    pub(in crate::replica) fn absorb_twins(
        &mut self,
        plan: &Arc<Plan>,
        places: &[i64],
        version: Version,
    ) -> Result<()> {
        let Some(link) = self.links.get(&plan.table.id).filter(|l| l.keeps_both).cloned() else {
            return Ok(());
        };
        for &place in places {
            let key = [ValueRef::Int(place)];
            let there = self.conn.prepare_cached(&plan.select_row)?.exists(params_from_iter(key))?;
            let state = self.sites.get(&self.conn, plan, &key)?;
            // Somebody wrote to it meanwhile: it is a row of its own.
            let Some(state) = state.filter(|s| s.dead.is_none() && !there) else { continue };
            let origin = link.origin(&self.conn, place)?;
            let Some(other) = self.looking(plan, &link).occupant(origin)? else { continue };
            self.touch(plan, &link, Incarnation { origin, birth: state.birth })?;
            let mut dead = succeeded(&state, other.incarnation.birth);
            dead.dead = Some(version);
            let lsn = self.next_lsn();
            self.sites.put(&self.conn, plan, &key, &dead, lsn)?;
            link.write_refs(&self.conn, &mut self.sites, &key, &Refs::new())?;
        }
        Ok(())
    }

    /// Notes which rows the columns refer to that were written now.
    fn absorb_refs(&mut self, plan: &Plan, link: &Link, version: Version, base: i64) -> Result<()> {
        let (mut from, head) = (base, self.head.lsn);
        while from < head {
            let upto = head.min(from + CHUNK);
            for (key, state, values) in self.changed_refs(plan, link, (from, upto))? {
                let refs: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
                let mut parents = Refs::new();
                if let Some(values) = values.filter(|_| state.dead.is_none()) {
                    let known = link.read_refs(&self.conn, &self.sites, &refs)?;
                    for (reference, value) in link.refs.iter().zip(&values) {
                        let parent = match state.column(reference.column) == version {
                            true => self.parent_shown_as(reference, value.as_ref())?,
                            false => known.get(&reference.column).copied(),
                        };
                        parents.extend(parent.map(|p| (reference.column, p)));
                    }
                }
                link.write_refs(&self.conn, &mut self.sites, &refs, &parents)?;
            }
            from = upto;
        }
        Ok(())
    }

    /// The rows changed in a range of lsn: key, state and, of a row that is there, the columns that refer.
    fn changed_refs(&self, plan: &Plan, link: &Link, range: (i64, i64)) -> Result<Vec<ChangedRefs>> {
        let keys = plan.table.key.len();
        let mut statement = self.conn.prepare_cached(&link.changed_refs)?;
        let rows = statement.query_map(range, |r| {
            let read = |from: usize, count: usize| -> rusqlite::Result<Vec<Value>> {
                (from..from + count).map(|i| get(r, i).map(|v| v.to_value())).collect()
            };
            let present: bool = r.get(keys + 5)?;
            let values = if present { Some(read(keys + 6, link.refs.len())?) } else { None };
            Ok((read(0, keys)?, self.sites.read_state(r, keys)?, values))
        })?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Which row a value refers to; `None` if none that could ever be shown under another id.
    pub(super) fn parent_shown_as(
        &self,
        reference: &Ref,
        value: ValueRef<'_>,
    ) -> Result<Option<Incarnation>> {
        let ValueRef::Int(id) = value else { return Ok(None) };
        let plan = &reference.parent;
        let Some(link) = self.links.get(&plan.table.id) else { return Ok(None) };
        let occupant = self.looking(plan, link).occupant(id)?;
        Ok(occupant.map(|o| o.incarnation).filter(|i| !link.is_fixed(i.birth)))
    }
}

/// A changed row: its key, its state, and the columns that refer if it is there.
type ChangedRefs = (Vec<Value>, RowState, Option<Vec<Value>>);
