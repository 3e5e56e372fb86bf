//! Apply: rows of a peer become rows of this file. Invariant: one transaction per commit or set of pages, together
//! with the cursor; the merge itself is `core::merge`.

use std::collections::BTreeMap;
use std::sync::Arc;

use rusqlite::{CachedStatement, Connection, ErrorCode, ffi};

use super::adopt::Cause;
use super::body::Body;
use super::identity::name_of;
use super::plan::Plan;
use super::registry::from_wire;
use super::rekey::{self, Link};
use super::schema::{Kind as ObjectKind, ObjectKey, Recorded, recorded_one};
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::{OP_INSERT, OPTIONS, PREFIX, SCHEMA};
use crate::core::conflict::{displaced, losses};
use crate::core::frame::{Frame, RowBuffer, Section, WireError};
use crate::core::merge::{Row, RowState, merge};
use crate::core::message::CommitHeader;
use crate::core::schema::SchemaMode;
use crate::core::value::{Value, ValueRef};
use crate::core::vector::{Point, Vector};
use crate::core::version::{Hlc, SiteId, Version};
use crate::sqlite::value::get;

/// Where rows come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// A commit: the schema's frames are its first.
    Commit,
    /// Several pages, one after the other.
    Pages,
}

/// How many renames of one table or column are followed.
pub(super) const MAX_RENAMES: usize = 64;

/// A row that a UNIQUE constraint kept out for now.
pub(super) struct Deferred {
    pub plan: Arc<Plan>,
    pub key: Vec<Value>,
    pub row: Row,
}

/// A commit of a peer, whole.
pub struct PeerCommit {
    /// The site whose feed it continues.
    pub site: SiteId,
    /// What stands before the rows.
    pub header: CommitHeader,
    /// The rows; reading stands behind the header's block.
    pub body: Body,
}

/// How the rows of one section meet the table here.
struct Target {
    plan: Arc<Plan>,
    /// Section column -> place in the table's columns; none for a column that was dropped here.
    places: Vec<Option<usize>>,
    insert: String,
    link: Option<Arc<Link>>,
    /// Whether they come from a node that does not know yet that the table keeps both rows of an id collision.
    unaware: bool,
    /// Whether rows of other tables refer to its rows by an integer.
    is_parent: bool,
}

impl Target {
    /// Whether a row may be one that nobody here knows. What was deleted here before `collected` and forgotten is not
    /// known here, and is not fresh.
    fn may_be_fresh(
        &self,
        (birth, dead): (Version, Option<Version>),
        row: &RowBuffer<'_>,
        collected: Hlc,
    ) -> bool {
        let plain = dead.is_none() && row.columns.is_empty() && row.refs.is_empty();
        plain && birth.hlc > collected && self.places.iter().all(Option::is_some)
    }
}

/// Inserts rows that nobody here knows.
struct Fresh<'c> {
    conn: &'c Connection,
    plan: &'c Plan,
    add: CachedStatement<'c>,
    insert: CachedStatement<'c>,
}

impl<'c> Fresh<'c> {
    fn new(conn: &'c Connection, target: &'c Target) -> Result<Self> {
        let plan = target.plan.as_ref();
        let (add, insert) = (conn.prepare_cached(&plan.add_state)?, conn.prepare_cached(&target.insert)?);
        Ok(Self { conn, plan, add, insert })
    }

    /// Returns false if it is not that simple; then nothing was done.
    fn insert(&mut self, (hlc, site): (Hlc, i64), lsn: i64, row: &RowBuffer<'_>) -> Result<bool> {
        let (keys, add) = (row.key.len(), &mut self.add);
        for (i, key) in row.key.iter().enumerate() {
            add.raw_bind_parameter(i + 1, key)?;
        }
        add.raw_bind_parameter(keys + 1, hlc.0 as i64)?;
        add.raw_bind_parameter(keys + 2, site)?;
        add.raw_bind_parameter(keys + 3, lsn)?;
        if add.raw_execute()? == 0 {
            return Ok(false);
        }
        for (i, value) in row.key.iter().chain(&row.values).enumerate() {
            self.insert.raw_bind_parameter(i + 1, value)?;
        }
        match self.insert.raw_execute() {
            Ok(_) => Ok(true),
            Err(e) if e.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {
                let params = rusqlite::params_from_iter(row.key.iter());
                self.conn.prepare_cached(&self.plan.remove_state())?.execute(params)?;
                Ok(false)
            }
            Err(e) => Err(e.into()),
        }
    }
}

impl Store {
    /// Applies one commit within the transaction at hand. A feed's next commit only; the caller has checked.
    pub(super) fn apply_commit(&mut self, commit: &mut PeerCommit) -> Result<()> {
        let CommitHeader { from, to, id, hlc, .. } = commit.header;
        assert!(self.head.vector.n(commit.site) >= from, "a commit was applied over a hole");
        let seen: BTreeMap<SiteId, _> = commit.header.seen.iter().map(|(s, _, h)| (*s, *h)).collect();
        let site = commit.site;
        let they_saw = move |v: Version| {
            v == Version::ZERO || v.site == site || seen.get(&v.site).is_some_and(|h| v.hlc <= *h)
        };
        commit.body.rewind()?;
        commit.body.next_block()?;
        if self.apply_blocks(&mut commit.body, Source::Commit, &they_saw)? != commit.header.rows {
            return Err(WireError::Malformed("a commit with other rows than it says").into());
        }
        self.head.hlc = self.head.hlc.max(hlc);
        self.save_clock()?;
        self.raise(site, Point { n: to, hlc, id })
    }

    /// Applies the rows that a peer sent for the asking, and takes over what it held, within the transaction at
    /// hand.
    pub(super) fn apply_pages(&mut self, pages: &mut Body, held: &Vector) -> Result<()> {
        pages.rewind()?;
        self.apply_blocks(pages, Source::Pages, &|v| held.covers(v))?;
        self.hold_all(held)
    }

    /// The same with a whole file's rows; `before_rows` is called when the schema is as it is there.
    pub(super) fn apply_file(
        &mut self,
        rows: &mut Body,
        held: &Vector,
        before_rows: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        rows.rewind()?;
        let they_saw = |v| held.covers(v);
        self.apply_schema_blocks(rows, Source::Pages, &they_saw)?;
        before_rows(self)?;
        rows.rewind()?;
        self.apply_row_blocks(rows, &they_saw)?;
        self.hold_all(held)
    }

    fn hold_all(&mut self, held: &Vector) -> Result<()> {
        for (site, point) in &held.0 {
            self.head.hlc = self.head.hlc.max(point.hlc);
            self.raise(*site, *point)?;
        }
        self.save_clock()
    }

    /// Applies the rows from where reading stands: first those of the schema, so that the others find their tables.
    fn apply_blocks(
        &mut self,
        body: &mut Body,
        source: Source,
        they_saw: &dyn Fn(Version) -> bool,
    ) -> Result<u64> {
        let start = body.position()?;
        let rows = self.apply_schema_blocks(body, source, they_saw)?;
        body.seek(start)?;
        Ok(rows + self.apply_row_blocks(body, they_saw)?)
    }

    fn apply_schema_blocks(
        &mut self,
        body: &mut Body,
        source: Source,
        they_saw: &dyn Fn(Version) -> bool,
    ) -> Result<u64> {
        let (mut rows, mut changed, mut dead) = (0, false, None);
        while let Some(block) = body.next_block()? {
            if Frame::is_of_schema(&block) {
                if dead.is_none() {
                    dead = Some(self.dead_tables()?);
                }
                for section in Frame::open(&block)?.sections()? {
                    rows += self.apply_schema(section, they_saw, &mut changed)?;
                }
            } else if source == Source::Commit {
                break;
            }
        }
        if changed {
            self.follow_schema()?;
            self.recall_revived(&dead.unwrap_or_default())?;
        }
        Ok(rows)
    }

    fn apply_row_blocks(&mut self, body: &mut Body, they_saw: &dyn Fn(Version) -> bool) -> Result<u64> {
        let (mut deferred, mut rows) = (Vec::new(), 0);
        while let Some(block) = body.next_block()? {
            if !Frame::is_of_schema(&block) {
                for section in Frame::open(&block)?.sections()? {
                    rows += self.apply_section(section, they_saw, &mut deferred)?;
                }
            }
        }
        self.follow_moves(&mut deferred)?;
        self.place_deferred(deferred)?;
        self.link_children(they_saw)?;
        self.tell_doubtful()?;
        Ok(rows)
    }

    fn apply_schema(
        &mut self,
        mut section: Section<'_>,
        they_saw: &dyn Fn(Version) -> bool,
        changed: &mut bool,
    ) -> Result<u64> {
        let Target { plan, places, .. } = match self.target(&section)? {
            Some(target) if section.table == SCHEMA => target,
            _ => return Err(WireError::Malformed("rows that are not the schema's among it").into()),
        };
        let (mut row, mut rows) = (RowBuffer::default(), 0);
        while let Some(versions) = section.next_row(&mut row)? {
            rows += 1;
            if self.schema_mode == SchemaMode::Replicate {
                let theirs = incoming(&plan, &places, versions, &row);
                *changed |= self.merge_object(&plan, &row.key, &theirs, they_saw)?;
            }
        }
        Ok(rows)
    }

    /// How a section's rows meet the table here; `None` if they are of a table that was dropped.
    fn target(&mut self, section: &Section<'_>) -> Result<Option<Target>> {
        let Some(plan) = self.find_table(section.table)? else { return Ok(None) };
        let here = || plan.table.key.iter().map(|k| k.name.as_str());
        let same = |(a, b): (&str, &&str)| a.eq_ignore_ascii_case(b);
        if here().count() != section.keys.len() || !here().zip(&section.keys).all(same) {
            let (here, there) = (here().collect::<Vec<_>>().join(", "), section.keys.join(", "));
            return Err(ReplicaError::OtherKey { table: plan.table.name.clone(), here, there });
        }
        let mut link = self.links.get(&plan.table.id).cloned();
        let keeps_both = link.as_ref().is_some_and(|l| l.keeps_both);
        if section.keeps_both && !keeps_both {
            self.follow_keeping(&plan)?;
            link = self.links.get(&plan.table.id).cloned();
        }
        let unaware = keeps_both && !section.keeps_both;
        let place = |column: &&str| self.find_column(&plan, section.table, column);
        let places = section.columns.iter().map(place).collect::<Result<Vec<_>>>()?;
        let known: Vec<usize> = places.iter().copied().flatten().collect();
        let insert = plan.insert_row(&known);
        let is_parent = self.is_parent(&plan);
        Ok(Some(Target { plan, places, insert, link, unaware, is_parent }))
    }

    /// The table that a peer knows as this; `None` if it was dropped.
    fn find_table(&self, ident: &str) -> Result<Option<Arc<Plan>>> {
        let ident = ident.to_lowercase();
        if let Some(plan) = self.plan_of(&ident) {
            return Ok(Some(plan));
        }
        let name = from_wire(&ident).0;
        let by_name = || self.plan(name).map(Some).ok_or_else(|| ReplicaError::NoTable(name.to_owned()));
        let (view, classes) = self.view()?;
        if let Some(plan) = self.plan_of(classes.of(&ident)) {
            return Ok(Some(plan));
        }
        match view.get(&ObjectKey::new(ObjectKind::Table, classes.of(&ident))) {
            // Where changes of the schema do not replicate, the name is all there is to go by.
            Some(t) if self.schema_mode == SchemaMode::Replicate => match name_of(t) {
                Some(now) if !t.gone && (self.covers)(&now) => Err(ReplicaError::NoTable(now)),
                _ => Ok(None),
            },
            _ if name.starts_with(PREFIX) || (self.covers)(name) => by_name(),
            _ => Ok(None),
        }
    }

    /// Where a peer's column stands in the table here; `None` if it was dropped. It may have been renamed here since.
    fn find_column(&self, plan: &Plan, ident: &str, wire: &str) -> Result<Option<usize>> {
        if ident == plan.wire_name
            && let Some(place) = plan.wire_columns.iter().position(|c| c.eq_ignore_ascii_case(wire))
        {
            return Ok(Some(place));
        }
        let (name, incarnation) = from_wire(wire);
        let (ident, mut name) = (ident.to_lowercase(), name.to_lowercase());
        let place = |name: &str| plan.table.columns.iter().position(|c| c.name.eq_ignore_ascii_case(name));
        for step in 0..MAX_RENAMES {
            let column = match recorded_one(&self.conn, &ObjectKey::column(&ident, &name))? {
                Some(column) => Some(column),
                None => self.view()?.0.remove(&ObjectKey::column(&plan.wire_name, &name)),
            };
            match column {
                Some(c) if step == 0 && c.incarnation > incarnation => return Ok(None),
                Some(Recorded { gone: true, moved: Some(new), .. }) => name = new,
                Some(c) if c.gone => return Ok(None),
                None if step == 0 => break,
                _ => return Ok(place(&name)),
            }
        }
        Err(ReplicaError::NoColumn { table: plan.table.name.clone(), column: name })
    }

    fn apply_section(
        &mut self,
        mut section: Section<'_>,
        they_saw: &dyn Fn(Version) -> bool,
        deferred: &mut Vec<Deferred>,
    ) -> Result<u64> {
        let mut target = self.target(&section)?;
        if target.as_ref().is_some_and(|t| t.plan.table.name == SCHEMA) {
            return Err(WireError::Malformed("the schema's rows among others").into());
        }
        let watched = target.as_ref().map_or(Ok(Vec::new()), |t| self.watched(&t.plan))?;
        let (mut row, mut rows) = (RowBuffer::default(), 0);
        loop {
            let simple = watched.is_empty() && target.as_ref().is_some_and(|t| !t.unaware);
            let next = match &target {
                Some(target) if simple => self.take_fresh(target, &mut section, &mut row, &mut rows)?,
                _ => section.next_row(&mut row)?.inspect(|_| rows += 1),
            };
            let Some(versions) = next else { break };
            let Some(target) = &mut target else { continue };
            if (target.unaware || row.fixed) && versions.0 != Version::ZERO {
                self.fix(&target.plan, versions.0)?;
                target.link = self.links.get(&target.plan.table.id).cloned();
            }
            if !watched.is_empty() && versions.1.is_none() {
                let value = |at: usize| {
                    let i = target.places.iter().position(|p| *p == Some(at))?;
                    row.values.get(i).map(|v| v.to_value())
                };
                self.touch_child(&target.plan, &watched, &row.key, value)?;
            }
            // Otherwise that was tried.
            if (!simple || row.fixed) && target.may_be_fresh(versions, &row, self.head.collected.latest()) {
                let site = self.sites.index(&self.conn, versions.0.site)?;
                let lsn = self.head.lsn + 1;
                if Fresh::new(&self.conn, target)?.insert((versions.0.hlc, site), lsn, &row)? {
                    self.head.lsn = lsn;
                    continue;
                }
            }
            let theirs = incoming(&target.plan, &target.places, versions, &row);
            if let Some(link) = &target.link {
                let theirs = link.incoming(theirs, &target.places, &row);
                self.take_linked((&target.plan, link), &row.key, theirs, they_saw, deferred)?;
                continue;
            }
            self.merge_row(target, &row.key, &theirs, they_saw, deferred)?;
        }
        if target.is_some_and(|t| t.plan.table.name == OPTIONS) && rows > 0 {
            rekey::refresh(self, Cause::Peer)?;
        }
        Ok(rows)
    }

    /// The fast path: inserts rows as long as nobody here knows them. Returns the versions of the first one that is not
    /// that simple, with which nothing was done; `None` at the section's end.
    fn take_fresh<'a>(
        &mut self,
        target: &Target,
        section: &mut Section<'a>,
        row: &mut RowBuffer<'a>,
        rows: &mut u64,
    ) -> Result<Option<(Version, Option<Version>)>> {
        let collected = self.head.collected.latest();
        let mut fresh = Fresh::new(&self.conn, target)?;
        while let Some(versions) = section.next_row(row)? {
            *rows += 1;
            if row.fixed || !target.may_be_fresh(versions, row, collected) {
                return Ok(Some(versions));
            }
            let site = self.sites.index(&self.conn, versions.0.site)?;
            if !fresh.insert((versions.0.hlc, site), self.head.lsn + 1, row)? {
                return Ok(Some(versions));
            }
            self.head.lsn += 1;
        }
        Ok(None)
    }

    /// What this file holds of a row: its state (that of an adopted row, if it has none) and its values.
    pub(super) fn local_row(&self, plan: &Plan, key: &[ValueRef<'_>]) -> Result<(Option<Row>, bool)> {
        let state = self.sites.get(&self.conn, plan, key)?;
        let mut statement = self.conn.prepare_cached(&plan.select_row)?;
        let mut rows = statement.query(rusqlite::params_from_iter(key))?;
        let mut values = BTreeMap::new();
        let present = match rows.next()? {
            Some(row) => {
                for (i, column) in plan.table.columns.iter().enumerate() {
                    values.insert(column.id, get(row, i)?.to_value());
                }
                true
            }
            None => false,
        };
        let state = match state {
            None if present => Some(RowState::ADOPTED),
            state => state,
        };
        Ok((state.map(|state| Row { state, values }), present))
    }

    fn merge_row(
        &mut self,
        target: &Target,
        key: &[ValueRef<'_>],
        theirs: &Row,
        they_saw: &dyn Fn(Version) -> bool,
        deferred: &mut Vec<Deferred>,
    ) -> Result<()> {
        let plan = &target.plan;
        let (ours, present) = self.local_row(plan, key)?;
        let merged = match &ours {
            // What is kept of a conflict, and the like, is no conflict.
            Some(ours) if plan.table.is_ours() => merge(ours, theirs),
            Some(ours) => {
                let vector = &self.head.vector;
                let we_saw = |v| vector.covers(v);
                let lost = losses(ours, theirs, they_saw, &we_saw);
                if target.is_parent && ours.state.birth != theirs.state.birth {
                    let gone = displaced(ours, theirs, they_saw, &we_saw);
                    self.note_displaced(plan, key, gone)?;
                }
                for loss in &lost {
                    self.keep_conflict(plan, key, loss)?;
                }
                merge(ours, theirs)
            }
            None if self.is_forgotten(plan, theirs)? => return self.drop_forgotten(plan, key, theirs),
            None => theirs.clone(),
        };
        if ours.as_ref() == Some(&merged) && present == merged.state.dead.is_none() {
            return Ok(());
        }
        let lsn = self.next_lsn();
        self.sites.put(&self.conn, plan, key, &merged.state, lsn)?;
        if ours.is_none() && self.is_late(plan, theirs)? {
            let key: Vec<Value> = key.iter().map(|k| k.to_value()).collect();
            self.log_own(plan, &key, OP_INSERT, &[])?;
        }
        let ours = ours.as_ref().filter(|_| present);
        match self.write_row(plan, key, ours, &merged) {
            Err(ReplicaError::Sqlite(e)) if is_unique_violation(&e) => {
                let key = key.iter().map(|k| k.to_value()).collect();
                deferred.push(Deferred { plan: plan.clone(), key, row: merged });
                Ok(())
            }
            result => result,
        }
    }

    /// Brings the table's row from `ours` (what is there) to `merged`.
    pub(super) fn write_row(
        &self,
        plan: &Plan,
        key: &[ValueRef<'_>],
        ours: Option<&Row>,
        merged: &Row,
    ) -> Result<()> {
        let dead = merged.state.dead.is_some();
        if let Some(ours) = ours
            && ours.state.birth == merged.state.birth
            && !dead
        {
            return self.update_row(plan, key, ours, merged);
        }
        if ours.is_some() {
            self.conn.prepare_cached(&plan.delete_row)?.execute(rusqlite::params_from_iter(key))?;
        }
        if dead { Ok(()) } else { self.insert_row(plan, key, merged) }
    }

    fn update_row(&self, plan: &Plan, key: &[ValueRef<'_>], ours: &Row, merged: &Row) -> Result<()> {
        let all = plan.table.columns.iter().enumerate();
        let changed = all.filter(|(_, c)| {
            let new = merged.values.get(&c.id);
            new.is_some() && new != ours.values.get(&c.id)
        });
        let (places, ids): (Vec<usize>, Vec<u32>) = changed.map(|(i, c)| (i, c.id)).unzip();
        if places.is_empty() {
            return Ok(());
        }
        let values = ids.iter().filter_map(|id| merged.values.get(id).map(Value::as_ref));
        let params = rusqlite::params_from_iter(key.iter().copied().chain(values));
        self.conn.prepare_cached(&plan.update_row(&places))?.execute(params)?;
        Ok(())
    }

    pub(super) fn insert_row(&self, plan: &Plan, key: &[ValueRef<'_>], row: &Row) -> Result<()> {
        let known = plan.table.columns.iter().enumerate();
        let known: Vec<(usize, ValueRef<'_>)> =
            known.filter_map(|(i, c)| Some((i, row.values.get(&c.id)?.as_ref()))).collect();
        let places: Vec<usize> = known.iter().map(|(i, _)| *i).collect();
        let params = rusqlite::params_from_iter(key.iter().copied().chain(known.iter().map(|(_, v)| *v)));
        self.conn.prepare_cached(&plan.insert_row(&places))?.execute(params)?;
        Ok(())
    }
}

/// A row as a peer sent it, with the numbers that columns have here.
fn incoming(
    plan: &Plan,
    places: &[Option<usize>],
    (birth, dead): (Version, Option<Version>),
    row: &RowBuffer<'_>,
) -> Row {
    let id = |place: usize| Some(plan.table.columns[places[place]?].id);
    let columns = row.columns.iter().filter_map(|(place, v)| Some((id(*place as usize)?, *v))).collect();
    let values = row.values.iter().enumerate().filter_map(|(i, v)| Some((id(i)?, v.to_value()))).collect();
    Row { state: RowState { birth, dead, columns }, values }
}

/// Whether a statement failed because of a UNIQUE constraint (the key's own included).
pub(super) fn is_unique_violation(error: &rusqlite::Error) -> bool {
    let codes =
        [ffi::SQLITE_CONSTRAINT_UNIQUE, ffi::SQLITE_CONSTRAINT_PRIMARYKEY, ffi::SQLITE_CONSTRAINT_ROWID];
    error.sqlite_error().is_some_and(|e| codes.contains(&e.extended_code))
}
