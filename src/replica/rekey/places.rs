//! Rows taken in by incarnation: each to its place, whoever has to make room to another. Invariant: a place's state,
//! its origin, its references and its row in the table change together.

use std::sync::Arc;

use rusqlite::Connection;

use super::links::Link;
use crate::core::capture::OP_TWIN;
use crate::core::conflict::losses;
use crate::core::merge::Row;
use crate::core::rekey::{
    Homes, Incarnation, LinkedRow, Occupant, Places, merge, resolve, successor, take_in,
};
use crate::core::value::{Value, ValueRef};
use crate::core::version::Version;
use crate::replica::apply::{Deferred, is_unique_violation};

use crate::replica::plan::Plan;
use crate::replica::shadow::Sites;
use crate::replica::store::Store;
use crate::replica::{ReplicaError, Result};

/// The places of a table, to look at.
pub(super) struct Looking<'s> {
    pub conn: &'s Connection,
    pub sites: &'s Sites,
    pub plan: &'s Plan,
    pub link: &'s Link,
}

impl Places for Looking<'_> {
    type Error = ReplicaError;

    /// A row without a state was there at adoption, ranks below all others and never moves: nobody has to meet it.
    fn occupant(&mut self, place: i64) -> Result<Option<Occupant>> {
        let Some(state) = self.sites.get(self.conn, self.plan, &[ValueRef::Int(place)])? else {
            return Ok(None);
        };
        let origin = self.link.origin(self.conn, place)?;
        let incarnation = Incarnation { origin, birth: state.birth };
        Ok(Some(Occupant { incarnation, successor: successor(&state) }))
    }
}

/// The places of a table, to take rows in.
struct Taking<'s> {
    store: &'s mut Store,
    plan: &'s Arc<Plan>,
    link: &'s Arc<Link>,
    they_saw: &'s dyn Fn(Version) -> bool,
    deferred: &'s mut Vec<Deferred>,
}

impl Places for Taking<'_> {
    type Error = ReplicaError;

    fn occupant(&mut self, place: i64) -> Result<Option<Occupant>> {
        self.store.looking(self.plan, self.link).occupant(place)
    }
}

impl Homes for Taking<'_> {
    type Row = LinkedRow;

    fn merge_at(&mut self, place: i64, row: LinkedRow) -> Result<()> {
        let key = [ValueRef::Int(place)];
        self.store.merge_linked(self.plan, self.link, &key, &row, self.they_saw, self.deferred)
    }

    fn exchange(
        &mut self,
        place: i64,
        incarnation: Incarnation,
        row: LinkedRow,
    ) -> Result<Option<(Incarnation, LinkedRow)>> {
        let Self { store, plan, link, deferred, they_saw } = self;
        let key = [ValueRef::Int(place)];
        let old = store.local_linked(plan, link, &key, deferred)?;
        let mut displaced = None;
        if let Some(old) = old {
            let origin = link.origin(&store.conn, place)?;
            let its = Incarnation { origin, birth: old.linked.row.state.birth };
            store.touch(plan, link, its)?;
            if old.present {
                store.conn.prepare_cached(&plan.delete_row)?.execute([place])?;
            }
            if link.is_fixed(its.birth) {
                let vector = &store.head.vector;
                for loss in losses(&old.linked.row, &row.row, they_saw, &|v| vector.covers(v)) {
                    store.keep_conflict(plan, &key, &loss)?;
                }
            } else {
                displaced = Some((its, old.linked));
            }
        }
        link.set_origin(&store.conn, place, incarnation.origin)?;
        let twin =
            place != incarnation.origin && store.is_twin(plan, link, incarnation.origin, &row, deferred)?;
        store.put_linked(plan, link, &key, &row, None, if twin { None } else { Some(deferred) })?;
        if twin {
            // The next absorb makes it dead, and leads what refers to it to the other.
            store.log_own(plan, &[Value::Int(place)], OP_TWIN, &[])?;
        }
        Ok(displaced)
    }
}

/// A row of this file: as it is merged, and as it is shown.
pub(super) struct Local {
    pub linked: LinkedRow,
    shown: Row,
    pub present: bool,
}

impl Store {
    pub(super) fn looking<'s>(&'s self, plan: &'s Plan, link: &'s Link) -> Looking<'s> {
        Looking { conn: &self.conn, sites: &self.sites, plan, link }
    }

    /// Takes in a row of a peer.
    pub(in crate::replica) fn take_linked(
        &mut self,
        (plan, link): (&Arc<Plan>, &Arc<Link>),
        key: &[ValueRef<'_>],
        theirs: LinkedRow,
        they_saw: &dyn Fn(Version) -> bool,
        deferred: &mut Vec<Deferred>,
    ) -> Result<()> {
        let birth = theirs.row.state.birth;
        match (link.keeps_both, key) {
            (false, _) => self.merge_linked(plan, link, key, &theirs, they_saw, deferred),
            (true, [ValueRef::Int(origin)]) if birth == Version::ZERO => {
                // It never moves: it is at home, or gone.
                let key = [ValueRef::Int(*origin)];
                match self.sites.get(&self.conn, plan, &key)? {
                    Some(state) if state.birth != birth => Ok(()),
                    _ => self.merge_linked(plan, link, &key, &theirs, they_saw, deferred),
                }
            }
            (true, [ValueRef::Int(origin)]) if link.is_fixed(birth) => {
                self.take_fixed((plan, link), *origin, theirs, they_saw, deferred)
            }
            (true, [ValueRef::Int(origin)]) => {
                let incarnation = Incarnation { origin: *origin, birth };
                self.take_incarnation((plan, link), incarnation, theirs, they_saw, deferred)
            }
            (true, _) => {
                let table = &plan.table.name;
                Err(ReplicaError::Unfit(format!(
                    "a row of table {table:?} came with a key that is no integer"
                )))
            }
        }
    }

    /// A row from before is at home, or gone: with rows of its kind it is merged as in any other table.
    fn take_fixed(
        &mut self,
        (plan, link): (&Arc<Plan>, &Arc<Link>),
        origin: i64,
        theirs: LinkedRow,
        they_saw: &dyn Fn(Version) -> bool,
        deferred: &mut Vec<Deferred>,
    ) -> Result<()> {
        let key = [ValueRef::Int(origin)];
        let incarnation = Incarnation { origin, birth: theirs.row.state.birth };
        let occupant = self.looking(plan, link).occupant(origin)?.map(|o| o.incarnation);
        match occupant.filter(|o| !link.is_fixed(o.birth)) {
            None => self.merge_linked(plan, link, &key, &theirs, they_saw, deferred),
            Some(other) if other.ranks_above(&incarnation) => {
                let Some(ours) = self.local_linked(plan, link, &key, deferred)? else { return Ok(()) };
                let vector = &self.head.vector;
                for loss in losses(&ours.linked.row, &theirs.row, they_saw, &|v| vector.covers(v)) {
                    self.keep_conflict(plan, &key, &loss)?;
                }
                Ok(())
            }
            Some(_) => self.take_incarnation((plan, link), incarnation, theirs, they_saw, deferred),
        }
    }

    pub(super) fn take_incarnation(
        &mut self,
        (plan, link): (&Arc<Plan>, &Arc<Link>),
        incarnation: Incarnation,
        row: LinkedRow,
        they_saw: &dyn Fn(Version) -> bool,
        deferred: &mut Vec<Deferred>,
    ) -> Result<()> {
        let mut homes = Taking { store: self, plan, link, they_saw, deferred };
        take_in(&mut homes, incarnation, row)
    }

    /// What this file holds of a row, one that waits for its turn included.
    fn local_linked(
        &mut self,
        plan: &Plan,
        link: &Link,
        key: &[ValueRef<'_>],
        deferred: &mut Vec<Deferred>,
    ) -> Result<Option<Local>> {
        let (row, present) = self.local_row(plan, key)?;
        let Some(mut shown) = row else { return Ok(None) };
        if !present {
            let own: Vec<Value> = key.iter().map(|k| k.to_value()).collect();
            let waits = deferred.iter().position(|d| d.plan.table.id == plan.table.id && d.key == own);
            if let Some(i) = waits {
                shown.values = deferred.swap_remove(i).row.values;
            }
        }
        let refs = link.read_refs(&self.conn, &self.sites, key)?;
        let mut row = shown.clone();
        for (column, parent) in &refs {
            if let Some(value @ Value::Int(_)) = row.values.get_mut(column) {
                *value = Value::Int(parent.origin);
            }
        }
        Ok(Some(Local { linked: LinkedRow { row, refs }, shown, present }))
    }

    fn merge_linked(
        &mut self,
        plan: &Arc<Plan>,
        link: &Link,
        key: &[ValueRef<'_>],
        theirs: &LinkedRow,
        they_saw: &dyn Fn(Version) -> bool,
        deferred: &mut Vec<Deferred>,
    ) -> Result<()> {
        let Some(ours) = self.local_linked(plan, link, key, deferred)? else {
            return self.put_linked(plan, link, key, theirs, None, Some(deferred));
        };
        let vector = &self.head.vector;
        for loss in losses(&ours.linked.row, &theirs.row, they_saw, &|v| vector.covers(v)) {
            self.keep_conflict(plan, key, &loss)?;
        }
        let merged = merge(&ours.linked, theirs);
        let (before, after) = (&ours.linked.row.state, &merged.row.state);
        if ours.linked == merged && ours.present == after.dead.is_none() {
            return Ok(());
        }
        if link.keeps_both
            && successor(before) != successor(after)
            && let [ValueRef::Int(place)] = *key
        {
            let origin = link.origin(&self.conn, place)?;
            self.touch(plan, link, Incarnation { origin, birth: before.birth })?;
        }
        let shown = ours.present.then_some(&ours.shown);
        self.put_linked(plan, link, key, &merged, shown, Some(deferred))
    }

    /// Writes state, references and row of a key; `ours` is the row that is there. Without a list for rows that have
    /// to wait the table itself is left alone.
    fn put_linked(
        &mut self,
        plan: &Arc<Plan>,
        link: &Link,
        key: &[ValueRef<'_>],
        linked: &LinkedRow,
        ours: Option<&Row>,
        deferred: Option<&mut Vec<Deferred>>,
    ) -> Result<()> {
        let lsn = self.next_lsn();
        self.sites.put(&self.conn, plan, key, &linked.row.state, lsn)?;
        link.write_refs(&self.conn, &mut self.sites, key, &linked.refs)?;
        let Some(deferred) = deferred else { return Ok(()) };
        let mut shown = linked.row.clone();
        for (column, parent) in &linked.refs {
            let id = self.shown_ref(link, *column, *parent)?;
            shown.values.insert(*column, Value::Int(id));
        }
        match self.write_row(plan, key, ours, &shown) {
            Err(ReplicaError::Sqlite(e)) if is_unique_violation(&e) => {
                if ours.is_some() {
                    // It waits for its turn: nothing is in the table meanwhile.
                    self.conn.prepare_cached(&plan.delete_row)?.execute(rusqlite::params_from_iter(key))?;
                }
                let key = key.iter().map(|k| k.to_value()).collect();
                deferred.push(Deferred { plan: plan.clone(), key, row: shown });
                Ok(())
            }
            result => result,
        }
    }

    /// The id to show for a reference. If the row is not here yet, it is noted that the id may change when it comes.
    pub(in crate::replica) fn shown_ref(
        &mut self,
        link: &Link,
        column: u32,
        parent: Incarnation,
    ) -> Result<i64> {
        let Some(reference) = link.refs.iter().find(|r| r.column == column) else {
            return Ok(parent.origin);
        };
        let plan = &reference.parent;
        let Some(its) = self.links.get(&plan.table.id).cloned() else { return Ok(parent.origin) };
        let target = resolve(&mut self.looking(plan, &its), parent)?;
        if !target.known {
            self.wait_for(plan, parent, target.id)?;
        }
        Ok(target.id)
    }

    /// Whether a row that has to give up its id is the same as the one that has it now, both as they were inserted:
    /// then they are one, the same migration run on two nodes.
    fn is_twin(
        &mut self,
        plan: &Plan,
        link: &Link,
        home: i64,
        row: &LinkedRow,
        deferred: &[Deferred],
    ) -> Result<bool> {
        let as_inserted = |r: &LinkedRow| r.row.state.dead.is_none() && r.row.state.columns.is_empty();
        if !as_inserted(row) || deferred.iter().any(|d| d.plan.table.id == plan.table.id) {
            return Ok(false);
        }
        let other = self.local_linked(plan, link, &[ValueRef::Int(home)], &mut Vec::new())?;
        Ok(other.is_some_and(|o| {
            as_inserted(&o.linked)
                && o.present
                && o.linked.row.state.birth != row.row.state.birth
                && o.linked.row.values == row.row.values
                && o.linked.refs == row.refs
        }))
    }
}
