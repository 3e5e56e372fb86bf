//! A model of `rekey` without SQL: the routing of `litemesh::core::rekey` over maps, under random histories of
//! colliding inserts, deletes, REPLACE, ids used again, edits and children on four levels, with a network that
//! loses, delays, doubles and reorders, and nodes that fall silent. Thousands of histories a second.
//!
//! An oracle that sees every write as it is made says what must be there in the end. Rules can be left out
//! ([`Flaw`]): that the oracle then complains proves that it looks, and that the rule is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use litemesh::core::merge::{Row, RowState};
use litemesh::core::rekey::{
    Homes, Incarnation, LinkedRow, Occupant, Places, locate, merge, resolve, succeeded, successor, take_in,
};
use litemesh::core::value::Value;
use litemesh::core::version::{Hlc, SiteId, Version};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Each table refers to the one before it.
const LEVELS: usize = 4;
/// Columns: who the row is, an edited value, the parent's id, and who the writer meant by it.
const UID: u32 = 0;
const VAL: u32 = 1;
const PARENT: u32 = 2;
const MEANT: u32 = 3;

/// A rule left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    None,
    /// REPLACE of a living row leaves no tombstone.
    ForgetReplaced,
    /// An id that is used again loses the tombstone that was there.
    ForgetOnReuse,
    /// A tombstone that has to make room for a peer's later row is dropped: nothing is shown that would have to move.
    ForgetOnArrival,
    /// A dead state that arrives where a later row is known already is dropped.
    DropDeadLosers,
    /// A living row that has to make room is dropped: plain "the later birth wins".
    DropLosers,
}

type Cells = BTreeMap<u32, i64>;

/// One table of one node: the states by place, and the rows as the application sees them.
struct Table {
    entries: BTreeMap<i64, (Incarnation, LinkedRow)>,
    shown: BTreeMap<i64, Cells>,
    flaw: Flaw,
}

impl Places for Table {
    type Error = Infallible;

    fn occupant(&mut self, place: i64) -> Result<Option<Occupant>, Infallible> {
        Ok(self.entries.get(&place).map(|(incarnation, row)| Occupant {
            incarnation: *incarnation,
            successor: successor(&row.row.state),
        }))
    }
}

impl Homes for Table {
    type Row = LinkedRow;

    fn merge_at(&mut self, place: i64, theirs: LinkedRow) -> Result<(), Infallible> {
        let entry = self.entries.get_mut(&place).expect("held");
        entry.1 = merge(&entry.1, &theirs);
        Ok(())
    }

    fn exchange(
        &mut self,
        place: i64,
        incarnation: Incarnation,
        row: LinkedRow,
    ) -> Result<Option<(Incarnation, LinkedRow)>, Infallible> {
        let dead = |r: &LinkedRow| r.row.state.dead.is_some();
        if self.flaw == Flaw::DropDeadLosers && dead(&row) && place != incarnation.origin {
            return Ok(None);
        }
        let old = self.entries.insert(place, (incarnation, row));
        Ok(old.filter(|(i, r)| match self.flaw {
            Flaw::ForgetOnArrival => !i.is_adopted() && !dead(r),
            Flaw::DropLosers => !i.is_adopted() && dead(r),
            _ => !i.is_adopted(),
        }))
    }
}

/// How far a node has a site's commits: number and clock.
type Vector = BTreeMap<u64, (u64, u64)>;

#[derive(Clone)]
struct Commit {
    site: u64,
    n: u64,
    hlc: u64,
    seen: Vector,
    rows: Vec<(usize, Incarnation, LinkedRow)>,
}

#[derive(Clone)]
enum Message {
    Commit(Commit),
    Ask { from: usize, vector: Vector },
    Page { rows: Vec<(usize, Incarnation, LinkedRow)>, vector: Vector },
}

#[derive(Clone, Copy)]
enum Op {
    Insert,
    Update(u32),
    Delete,
}

struct Node {
    site: u64,
    hlc: u64,
    tables: Vec<Table>,
    log: Vec<(usize, i64, Op)>,
    vector: Vector,
    pending: BTreeMap<(u64, u64), Commit>,
    silent: bool,
}

fn covers(vector: &Vector, v: Version) -> bool {
    v == Version::ZERO || vector.get(&v.site.0).is_some_and(|(_, hlc)| v.hlc.0 <= *hlc)
}

impl Node {
    fn new(site: u64, flaw: Flaw) -> Self {
        let empty = || Table { entries: BTreeMap::new(), shown: BTreeMap::new(), flaw };
        let mut tables: Vec<Table> = (0..LEVELS).map(|_| empty()).collect();
        for (level, table) in tables.iter_mut().enumerate() {
            // Rows that were there at adoption: no entry in a file, an entry of version zero here.
            for id in 1..3 {
                let uid = -(level as i64 * 10 + id);
                let cells = Cells::from([(UID, uid), (VAL, 0), (PARENT, 0), (MEANT, 0)]);
                let values = cells.iter().map(|(c, v)| (*c, Value::Int(*v))).collect();
                let row = Row { state: RowState::ADOPTED, values };
                let origin = Incarnation { origin: id, birth: Version::ZERO };
                table.entries.insert(id, (origin, LinkedRow { row, refs: BTreeMap::new() }));
                table.shown.insert(id, cells);
            }
        }
        let (log, vector, pending) = (Vec::new(), Vector::new(), BTreeMap::new());
        Self { site, hlc: 0, tables, log, vector, pending, silent: false }
    }

    /// The log becomes row states; what changed is one commit.
    fn absorb(&mut self, flaw: Flaw) -> Option<Commit> {
        if self.log.is_empty() {
            return None;
        }
        self.hlc += 1;
        let version = Version { hlc: Hlc(self.hlc), site: SiteId(self.site) };
        let mut touched = BTreeSet::new();
        for (t, id, op) in std::mem::take(&mut self.log) {
            self.step(t, id, op, version, &mut touched, flaw);
        }
        // Values and parents are read when all of the log is states.
        for &(t, incarnation) in &touched {
            self.read_values(t, incarnation, version);
        }
        let mut rows = Vec::new();
        for (t, incarnation) in touched {
            let spot = locate(&mut self.tables[t], incarnation).unwrap();
            if spot.held.is_some() {
                rows.push((t, incarnation, self.tables[t].entries[&spot.place].1.clone()));
            }
        }
        let n = self.vector.get(&self.site).map_or(0, |v| v.0) + 1;
        let seen = self.vector.clone();
        self.vector.insert(self.site, (n, self.hlc));
        Some(Commit { site: self.site, n, hlc: self.hlc, seen, rows })
    }

    fn step(
        &mut self,
        t: usize,
        id: i64,
        op: Op,
        version: Version,
        touched: &mut BTreeSet<(usize, Incarnation)>,
        flaw: Flaw,
    ) {
        let table = &mut self.tables[t];
        let before = table.entries.get(&id).cloned();
        let old = before.as_ref().map(|(i, r)| (*i, r.row.state.clone()));
        match (op, old) {
            (Op::Insert, Some((i, _))) if i.birth == version => {
                let (_, row) = table.entries.get_mut(&id).unwrap();
                row.row.state = RowState::born(version);
            }
            (Op::Insert, old) => {
                let new = Incarnation { origin: id, birth: version };
                let row = Row { state: RowState::born(version), values: BTreeMap::new() };
                table.entries.insert(id, (new, LinkedRow { row, refs: BTreeMap::new() }));
                touched.insert((t, new));
                let Some((incarnation, state)) = old.filter(|(i, _)| !i.is_adopted()) else { return };
                let forgets = if state.dead.is_some() { Flaw::ForgetOnReuse } else { Flaw::ForgetReplaced };
                if flaw == forgets {
                    return;
                }
                let row = Row { state: succeeded(&state, version), values: BTreeMap::new() };
                take_in(table, incarnation, LinkedRow { row, refs: BTreeMap::new() }).unwrap();
                touched.insert((t, incarnation));
            }
            (Op::Update(column), Some((i, state))) if state.dead.is_none() => {
                let (_, row) = table.entries.get_mut(&id).unwrap();
                if state.birth != version {
                    row.row.state.columns.insert(column, version);
                }
                touched.insert((t, i));
            }
            (Op::Delete, Some((i, state))) if state.dead.is_none() => {
                let (_, row) = table.entries.get_mut(&id).unwrap();
                row.row = Row {
                    state: RowState { dead: Some(version), ..RowState::born(state.birth) },
                    values: BTreeMap::new(),
                };
                row.refs.clear();
                touched.insert((t, i));
            }
            _ => {}
        }
    }

    fn read_values(&mut self, t: usize, incarnation: Incarnation, version: Version) {
        let spot = locate(&mut self.tables[t], incarnation).unwrap();
        let place = spot.place;
        let Some((_, row)) = self.tables[t].entries.get(&place).cloned().filter(|_| spot.held.is_some())
        else {
            return;
        };
        let mut row = row;
        if row.row.state.dead.is_none() {
            let cells = &self.tables[t].shown[&place];
            for (column, value) in cells.clone() {
                if column != PARENT {
                    row.row.values.insert(column, Value::Int(value));
                } else if row.row.state.column(PARENT) == version {
                    let parent = t.checked_sub(1).and_then(|p| self.tables[p].entries.get(&value));
                    let parent = parent.map(|(i, _)| *i).filter(|i| !i.is_adopted());
                    row.refs = parent.map(|p| (PARENT, p)).into_iter().collect();
                    let origin = parent.map_or(value, |p| p.origin);
                    row.row.values.insert(PARENT, Value::Int(origin));
                }
            }
        }
        self.tables[t].entries.get_mut(&place).unwrap().1 = row;
    }

    fn take(&mut self, rows: Vec<(usize, Incarnation, LinkedRow)>) {
        for (t, incarnation, row) in rows {
            take_in(&mut self.tables[t], incarnation, row).unwrap();
        }
        self.show();
    }

    /// What the application sees, made of the states: in a file only what changed is written.
    fn show(&mut self) {
        for t in 0..LEVELS {
            let (above, rest) = self.tables.split_at_mut(t);
            let table = &mut rest[0];
            table.shown.clear();
            for (place, (_, row)) in &table.entries {
                if row.row.state.dead.is_some() {
                    continue;
                }
                let int = |v: &Value| if let Value::Int(i) = v { *i } else { unreachable!() };
                let mut cells: Cells = row.row.values.iter().map(|(c, v)| (*c, int(v))).collect();
                if let Some(parent) = row.refs.get(&PARENT) {
                    cells.insert(PARENT, resolve(&mut above[t - 1], *parent).unwrap().id);
                }
                table.shown.insert(*place, cells);
            }
        }
    }

    fn apply_ready(&mut self) {
        loop {
            let ready = self.pending.iter().find(|((site, n), c)| {
                *n == self.vector.get(site).map_or(0, |v| v.0) + 1
                    && c.seen.iter().all(|(s, (n, _))| self.vector.get(s).is_some_and(|v| v.0 >= *n))
            });
            let Some(key) = ready.map(|(k, _)| *k) else { break };
            let commit = self.pending.remove(&key).unwrap();
            self.hlc = self.hlc.max(commit.hlc);
            self.vector.insert(commit.site, (commit.n, commit.hlc));
            self.take(commit.rows);
        }
        let vector = &self.vector;
        self.pending.retain(|(site, n), _| *n > vector.get(site).map_or(0, |v| v.0));
    }

    fn page(&self, vector: &Vector) -> Vec<(usize, Incarnation, LinkedRow)> {
        let all = self
            .tables
            .iter()
            .enumerate()
            .flat_map(|(t, table)| table.entries.values().map(move |(i, row)| (t, *i, row.clone())));
        all.filter(|(_, _, r)| !r.row.state.versions().all(|v| covers(vector, v))).collect()
    }
}

/// What a run is like.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub nodes: usize,
    pub steps: usize,
    pub drop: f64,
    pub flaw: Flaw,
}

pub struct Model {
    random: StdRng,
    options: Options,
    nodes: Vec<Node>,
    flying: Vec<(usize, usize, Message)>,
    now: usize,
    next_uid: i64,
    /// Rows that some application deleted or replaced, of all that were made.
    dead: BTreeSet<i64>,
    made: BTreeSet<(usize, i64)>,
}

impl Model {
    pub fn new(seed: u64, options: Options) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            options,
            nodes: (0..options.nodes).map(|i| Node::new(i as u64 + 1, options.flaw)).collect(),
            flying: Vec::new(),
            now: 0,
            next_uid: 0,
            dead: BTreeSet::new(),
            made: (0..LEVELS).flat_map(|t| (1..3).map(move |i| (t, -(t as i64 * 10 + i)))).collect(),
        }
    }

    /// Runs a history; says what is wrong in the end.
    pub fn run(mut self) -> Result<(), String> {
        for _ in 0..self.options.steps {
            self.now += 1;
            let i = self.random.random_range(0..self.nodes.len());
            if self.random.random_bool(0.05) {
                self.nodes[i].silent = !self.nodes[i].silent;
                // What was received and not applied is lost in a crash.
                if self.random.random_bool(0.5) {
                    self.nodes[i].pending.clear();
                }
            }
            for _ in 0..self.random.random_range(1..4) {
                self.write(i);
            }
            if self.random.random_bool(0.8) {
                self.absorb(i);
            }
            if self.random.random_bool(0.15) {
                self.ask(i);
            }
            self.deliver();
        }
        self.settle()?;
        self.check()
    }

    fn absorb(&mut self, i: usize) {
        let Some(commit) = self.nodes[i].absorb(self.options.flaw) else { return };
        for to in (0..self.nodes.len()).filter(|to| *to != i) {
            self.send(i, to, Message::Commit(commit.clone()));
        }
    }

    fn send(&mut self, from: usize, to: usize, message: Message) {
        if self.nodes[from].silent || self.nodes[to].silent || self.random.random_bool(self.options.drop) {
            return;
        }
        let copies = if self.random.random_bool(0.1) { 2 } else { 1 };
        for _ in 0..copies {
            let due = self.now + self.random.random_range(0..12);
            self.flying.push((due, to, message.clone()));
        }
    }

    fn ask(&mut self, i: usize) {
        let peer = self.random.random_range(0..self.nodes.len());
        let vector = self.nodes[i].vector.clone();
        if peer != i {
            self.send(i, peer, Message::Ask { from: i, vector });
        }
    }

    fn deliver(&mut self) {
        let due: Vec<usize> = (0..self.flying.len()).filter(|i| self.flying[*i].0 <= self.now).collect();
        let mut arrived: Vec<_> = due.into_iter().rev().map(|i| self.flying.swap_remove(i)).collect();
        for i in (1..arrived.len()).rev() {
            arrived.swap(i, self.random.random_range(0..=i));
        }
        for (_, to, message) in arrived {
            match message {
                Message::Commit(commit) => {
                    self.nodes[to].pending.insert((commit.site, commit.n), commit);
                    self.absorb(to);
                    self.nodes[to].apply_ready();
                }
                Message::Ask { from, vector } => {
                    self.absorb(to);
                    let mut rows = self.nodes[to].page(&vector);
                    for i in (1..rows.len()).rev() {
                        rows.swap(i, self.random.random_range(0..=i));
                    }
                    let vector = self.nodes[to].vector.clone();
                    self.send(to, from, Message::Page { rows, vector });
                }
                Message::Page { rows, vector } => {
                    self.absorb(to);
                    let node = &mut self.nodes[to];
                    node.take(rows);
                    for (site, point) in vector {
                        let held = node.vector.entry(site).or_insert(point);
                        *held = point.max(*held);
                        node.hlc = node.hlc.max(point.1);
                    }
                    node.apply_ready();
                }
            }
        }
    }

    /// One statement of an application.
    fn write(&mut self, i: usize) {
        let t = self.random.random_range(0..LEVELS);
        let shown: Vec<i64> = self.nodes[i].tables[t].shown.keys().copied().collect();
        let any = |r: &mut StdRng| (!shown.is_empty()).then(|| shown[r.random_range(0..shown.len())]);
        match self.random.random_range(0..12) {
            0..5 => {
                // What SQLite would hand out: ids of deleted last rows are used again.
                let id = shown.last().map_or(1, |last| last + 1);
                self.insert(i, t, id);
            }
            5 => {
                let id = self.random.random_range(1..6);
                if !shown.contains(&id) {
                    self.insert(i, t, id);
                }
            }
            6 => {
                // REPLACE, of moved rows too.
                let Some(id) = any(&mut self.random) else { return };
                self.bury(i, t, id);
                self.insert(i, t, id);
            }
            7 => {
                let Some(id) = any(&mut self.random) else { return };
                self.remove(i, t, id);
            }
            8 => {
                let Some(id) = any(&mut self.random) else { return };
                let to = self.random.random_range(1..6);
                if !shown.contains(&to) {
                    // A change of the key is a delete and an insert: a new row as far as the oracle goes.
                    self.remove(i, t, id);
                    self.insert(i, t, to);
                }
            }
            9 => {
                let Some(id) = any(&mut self.random) else { return };
                self.refer(i, t, id);
            }
            _ => {
                let Some(id) = any(&mut self.random) else { return };
                let value = self.random.random_range(0..1_000);
                self.nodes[i].tables[t].shown.get_mut(&id).unwrap().insert(VAL, value);
                self.nodes[i].log.push((t, id, Op::Update(VAL)));
            }
        }
    }

    fn bury(&mut self, i: usize, t: usize, id: i64) {
        self.dead.insert(self.nodes[i].tables[t].shown[&id][&UID]);
    }

    fn remove(&mut self, i: usize, t: usize, id: i64) {
        self.bury(i, t, id);
        self.nodes[i].tables[t].shown.remove(&id);
        self.nodes[i].log.push((t, id, Op::Delete));
    }

    /// A parent that the application sees: its id and who it is.
    fn parent(&mut self, i: usize, t: usize) -> (i64, i64) {
        let Some(above) = t.checked_sub(1) else { return (0, 0) };
        let rows: Vec<(i64, i64)> =
            self.nodes[i].tables[above].shown.iter().map(|(id, cells)| (*id, cells[&UID])).collect();
        if rows.is_empty() { (0, 0) } else { rows[self.random.random_range(0..rows.len())] }
    }

    fn insert(&mut self, i: usize, t: usize, id: i64) {
        self.next_uid += 1;
        let uid = self.next_uid;
        let (parent, meant) = self.parent(i, t);
        self.made.insert((t, uid));
        let cells = Cells::from([(UID, uid), (VAL, 0), (PARENT, parent), (MEANT, meant)]);
        self.nodes[i].tables[t].shown.insert(id, cells);
        self.nodes[i].log.push((t, id, Op::Insert));
    }

    fn refer(&mut self, i: usize, t: usize, id: i64) {
        let (parent, meant) = self.parent(i, t);
        let cells = self.nodes[i].tables[t].shown.get_mut(&id).unwrap();
        cells.extend([(PARENT, parent), (MEANT, meant)]);
        self.nodes[i].log.extend([(t, id, Op::Update(PARENT)), (t, id, Op::Update(MEANT))]);
    }

    /// Nobody writes, nothing is lost: everybody gets everything.
    fn settle(&mut self) -> Result<(), String> {
        self.options.drop = 0.0;
        self.nodes.iter_mut().for_each(|n| n.silent = false);
        for _ in 0..60 {
            for i in 0..self.nodes.len() {
                self.absorb(i);
                for peer in 0..self.nodes.len() {
                    let vector = self.nodes[i].vector.clone();
                    if peer != i {
                        self.send(i, peer, Message::Ask { from: i, vector });
                    }
                }
            }
            self.now += 13;
            self.deliver();
            self.now += 13;
            self.deliver();
            let same = self.nodes.iter().all(|n| n.vector == self.nodes[0].vector && n.log.is_empty());
            if same && self.flying.is_empty() {
                return Ok(());
            }
        }
        Err("the nodes do not come to agree".to_owned())
    }

    fn check(&self) -> Result<(), String> {
        for t in 0..LEVELS {
            let first = &self.nodes[0].tables[t].shown;
            for (i, node) in self.nodes.iter().enumerate() {
                if node.tables[t].shown != *first {
                    let other = &node.tables[t].shown;
                    return Err(format!("table {t} differs on node {i}: {first:?} and {other:?}"));
                }
            }
            let uids: Vec<i64> = first.values().map(|c| c[&UID]).collect();
            if let Some(back) = uids.iter().find(|u| self.dead.contains(u)) {
                return Err(format!("row {back} of table {t} was deleted and is back"));
            }
            let made = self.made.iter().filter(|(of, uid)| *of == t && !self.dead.contains(uid));
            for (_, uid) in made {
                let count = uids.iter().filter(|u| *u == uid).count();
                if count != 1 {
                    return Err(format!("row {uid} of table {t} is there {count} times"));
                }
            }
            let Some(above) = t.checked_sub(1).map(|p| &self.nodes[0].tables[p].shown) else { continue };
            for cells in first.values() {
                let (parent, meant) = (cells[&PARENT], cells[&MEANT]);
                if meant != 0
                    && !self.dead.contains(&meant)
                    && above.get(&parent).map(|p| p[&UID]) != Some(meant)
                {
                    return Err(format!(
                        "row {} of table {t} refers to {parent}, not to row {meant}",
                        cells[&UID]
                    ));
                }
            }
        }
        Ok(())
    }
}
