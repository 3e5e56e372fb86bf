//! Comparing and repairing in the simulated world: no false alarm whatever is written meanwhile; what was changed
//! behind litemesh's back is found, to the key, and nothing else; repaired, it is the same everywhere.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use litemesh::core::digest::{Layout, Seen};
use litemesh::core::value::Value;
use litemesh::core::verify::{Cell, Held, Key, Lookup, Question, Reply};
use litemesh::replica::compare::{Compared, Comparison, Finding, Pace, Peer, batches, look_there};
use litemesh::replica::engine::Engine;
use litemesh::replica::forget::Forgetting;
use litemesh::replica::plan::Plan;
use litemesh::replica::repair::{Fate, Restamp};
use litemesh::replica::unite::PeerFile;
use litemesh::replica::verify::{Owner, Reader};
use litemesh::replica::{ReplicaError, compare};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::Connection;
use rusqlite::config::DbConfig;

use crate::history::{History, Options, Tables, WORLDS};
use crate::rare::{copy_into, forget, meet};
use crate::seeds;
use crate::site::{SCHEMA, START_MS, Site, duo};
use crate::world::World;

type Shared = Rc<RefCell<World>>;

/// One node's file, and the world around it, which goes on with every question.
struct Member {
    world: Shared,
    node: usize,
}

impl Owner for Member {
    fn plans(&self) -> Result<(Vec<Arc<Plan>>, i64), ReplicaError> {
        let mut world = self.world.borrow_mut();
        let store = world.engine(self.node).store();
        Ok((store.plans().cloned().collect(), store.schema_version()))
    }

    fn absorb(&self) -> Result<(), ReplicaError> {
        self.world.borrow_mut().engine(self.node).absorb()
    }

    fn put_back_triggers(&self) -> Result<(), ReplicaError> {
        self.world.borrow_mut().engine(self.node).put_back_triggers()
    }

    fn look_up(&self, lookup: &Lookup) -> Result<(Vec<Seen>, Held), ReplicaError> {
        let mut world = self.world.borrow_mut();
        let now_ms = world.now_ms();
        world.engine(self.node).look_up(lookup, now_ms)
    }

    fn held(&self) -> Result<Held, ReplicaError> {
        Ok(self.world.borrow_mut().engine(self.node).store().held())
    }

    fn snapshot(&self) -> Result<Connection, ReplicaError> {
        panic!("a moment without a log is found at once here");
    }

    fn lineage(&self) -> Result<u64, ReplicaError> {
        Ok(self.world.borrow_mut().engine(self.node).store().head().lineage)
    }

    fn repair_date_ms(&self) -> Result<u64, ReplicaError> {
        let mut world = self.world.borrow_mut();
        let now_ms = world.now_ms();
        Ok(world.engine(self.node).repair_date_ms(now_ms))
    }

    fn restamp(&self, order: Restamp) -> Result<Vec<Fate>, ReplicaError> {
        self.world.borrow_mut().engine(self.node).restamp(&order)
    }
}

impl Member {
    fn reader(&self) -> Reader {
        Reader::with_connection(self.world.borrow().connect(self.node))
    }
}

struct Asked {
    member: Member,
    reader: Reader,
    busy: bool,
}

impl Asked {
    fn go_on(&self) {
        let mut world = self.member.world.borrow_mut();
        for _ in 0..3 {
            if self.busy { world.next_step() } else { world.wait(20) }
        }
    }
}

impl Peer for Asked {
    fn ask(&mut self, question: Question) -> compare::Result<Reply> {
        self.go_on();
        let reply = self.reader.answer(&self.member, &question)?;
        self.go_on();
        Ok(reply)
    }
}

struct Patient(Shared, bool);

impl Pace for Patient {
    fn worked(&mut self, _: Duration) -> compare::Result<()> {
        Ok(())
    }

    fn pause(&mut self, _: Duration) -> compare::Result<()> {
        let mut world = self.0.borrow_mut();
        for _ in 0..5 {
            if self.1 { world.next_step() } else { world.wait(100) }
        }
        Ok(())
    }

    fn patience(&self) -> Duration {
        Duration::ZERO
    }
}

fn asked(world: &Shared, node: usize, busy: bool) -> Asked {
    let member = Member { world: world.clone(), node };
    let reader = member.reader();
    Asked { member, reader, busy }
}

/// Compares two nodes; with `busy`, everybody writes all the time.
fn compare_two(
    world: &Shared,
    (a, b): (usize, usize),
    busy: bool,
    mut found: impl FnMut(&Member, Vec<Finding>),
) -> Compared {
    let member = Member { world: world.clone(), node: a };
    let (mut reader, mut peer) = (member.reader(), asked(world, b, busy));
    let mut comparison = Comparison {
        owner: &member,
        reader: &mut reader,
        peer: &mut peer,
        pace: &mut Patient(world.clone(), busy),
        compared: Compared::default(),
    };
    comparison
        .run(None, &mut |findings| {
            found(&member, findings);
            Ok(())
        })
        .unwrap();
    comparison.compared
}

/// A file with nobody at work on it but us, as its reader sees it.
struct Alone<'a> {
    engine: RefCell<&'a mut Engine>,
    now_ms: u64,
}

impl<'a> Alone<'a> {
    fn new(engine: &'a mut Engine, now_ms: u64) -> Self {
        Self { engine: RefCell::new(engine), now_ms }
    }
}

impl Owner for Alone<'_> {
    fn plans(&self) -> Result<(Vec<Arc<Plan>>, i64), ReplicaError> {
        let engine = self.engine.borrow();
        Ok((engine.store().plans().cloned().collect(), engine.store().schema_version()))
    }

    fn absorb(&self) -> Result<(), ReplicaError> {
        self.engine.borrow_mut().absorb()
    }

    fn put_back_triggers(&self) -> Result<(), ReplicaError> {
        self.engine.borrow_mut().put_back_triggers()
    }

    fn look_up(&self, lookup: &Lookup) -> Result<(Vec<Seen>, Held), ReplicaError> {
        self.engine.borrow_mut().look_up(lookup, self.now_ms)
    }

    fn held(&self) -> Result<Held, ReplicaError> {
        Ok(self.engine.borrow().store().held())
    }

    fn snapshot(&self) -> Result<Connection, ReplicaError> {
        panic!("nobody writes meanwhile");
    }

    fn lineage(&self) -> Result<u64, ReplicaError> {
        Ok(self.engine.borrow().store().head().lineage)
    }

    fn repair_date_ms(&self) -> Result<u64, ReplicaError> {
        Ok(self.engine.borrow().repair_date_ms(self.now_ms))
    }

    fn restamp(&self, order: Restamp) -> Result<Vec<Fate>, ReplicaError> {
        self.engine.borrow_mut().restamp(&order)
    }
}

/// The other of two such sites.
struct Answering<'a>(&'a Alone<'a>, Reader);

impl Peer for Answering<'_> {
    fn ask(&mut self, question: Question) -> compare::Result<Reply> {
        Ok(self.1.answer(self.0, &question)?)
    }
}

struct Hurried;

impl Pace for Hurried {
    fn worked(&mut self, _: Duration) -> compare::Result<()> {
        Ok(())
    }

    fn pause(&mut self, _: Duration) -> compare::Result<()> {
        Ok(())
    }

    fn patience(&self) -> Duration {
        Duration::ZERO
    }
}

/// What comparing two sites comes to: the findings, or why they are not compared.
fn compare_sites(a: &mut Site, b: &mut Site) -> Result<Vec<Finding>, String> {
    let reader = |s: &Site| Reader::with_connection(Connection::open(&s.uri).unwrap());
    let (mut here, there) = (reader(a), reader(b));
    let (a, b) = (Alone::new(&mut a.engine, START_MS), Alone::new(&mut b.engine, START_MS));
    let mut peer = Answering(&b, there);
    let mut found = Vec::new();
    let result = Comparison::new(&a, &mut here, &mut peer, &mut Hurried).run(None, &mut |f| {
        found.extend(f);
        Ok(())
    });
    result.map(|()| found).map_err(|e| e.to_string())
}

/// A file of a world and where it is.
pub struct File<'a> {
    pub engine: &'a mut Engine,
    pub uri: String,
}

/// Writes the rows of a table that differ from those of the others again, as a node does whose application rebuilt it.
pub fn write_again(here: File<'_>, others: Vec<File<'_>>, table: &str, now_ms: u64) {
    let reader = |uri: &str| Reader::with_connection(Connection::open(uri).unwrap());
    let (owner, mut own) = (Alone::new(here.engine, now_ms), reader(&here.uri));
    let others: Vec<_> = others.into_iter().map(|f| (Alone::new(f.engine, now_ms), f.uri)).collect();
    for (other, uri) in &others {
        let mut peer = Answering(other, reader(uri));
        let done =
            Comparison::new(&owner, &mut own, &mut peer, &mut Hurried).run(Some(table), &mut |findings| {
                let layout = findings[0].layout.clone();
                for batch in batches(findings.into_iter().map(|f| (f.key, ())).collect()) {
                    let keys: Vec<Key> = batch.into_iter().map(|(k, ())| k).collect();
                    let clock_ms = owner.repair_date_ms()?;
                    let lookup =
                        Lookup { layout: layout.clone(), keys: keys.clone(), later_than_ms: Some(clock_ms) };
                    let mut peers = Vec::new();
                    for (other, uri) in &others {
                        peers.push(look_there(&mut Answering(other, reader(uri)), lookup.clone())?);
                    }
                    owner.restamp(Restamp { layout: layout.clone(), keys, peers, clock_ms })?;
                }
                Ok(())
            });
        done.unwrap();
    }
}

#[test]
fn who_was_away_while_deletes_were_forgotten_is_not_compared_until_it_has_taken_a_copy() {
    let (mut a, mut b) = duo("compared");
    let mut c = Site::new("compared", "c", 3, 7, SCHEMA);
    for s in [&mut a, &mut b, &mut c] {
        s.engine.remember(Forgetting { me: Some(s.name.clone()), age_ms: 1_000, absent_ms: 100_000 });
    }
    a.write("INSERT INTO t VALUES(1, 'doomed'), (2, 'stays')");
    meet(&mut [&mut a, &mut b, &mut c], START_MS);
    assert!(compare_sites(&mut a, &mut c).unwrap().is_empty());
    a.write("DELETE FROM t WHERE id = 1");
    // Not forgotten yet: the tombstone tells.
    assert!(compare_sites(&mut a, &mut c).unwrap().is_empty());
    let now_ms = forget(&mut [&mut a, &mut b], START_MS + 300_000);
    assert!(a.engine.collected_rows() > 0 && b.engine.collected_rows() > 0);
    assert!(compare_sites(&mut a, &mut b).unwrap().is_empty());
    let why = |result: Result<Vec<Finding>, String>| result.expect_err("not compared");
    assert!(why(compare_sites(&mut a, &mut c)).contains("it was away"));
    assert!(why(compare_sites(&mut c, &mut b)).contains("this node, which was away"));
    // Asked all the same, it is not believed: its row is not deleted by a repair, nor does it come back by one.
    let layout = Layout::of(&a.engine.store().plans().next().unwrap().table).0;
    let keys = vec![vec![Cell::Int(1)]];
    for (right, other) in [(0, 2), (2, 1)] {
        let all = [&mut a, &mut b, &mut c];
        let clock_ms = all[right].engine.repair_date_ms(START_MS);
        let lookup = Lookup { layout: layout.clone(), keys: keys.clone(), later_than_ms: None };
        let seen = all[other].engine.look_up(&lookup, START_MS).unwrap();
        let order = Restamp { layout: layout.clone(), keys: keys.clone(), peers: vec![seen], clock_ms };
        assert_eq!(all[right].engine.restamp(&order).unwrap(), [Fate::Equal]);
    }
    let mut copy = Connection::open_in_memory().unwrap();
    copy_into(&a.app, &mut copy);
    let file = PeerFile::with_connection(copy, &std::env::temp_dir()).unwrap();
    c.engine.unite(file, "was away", now_ms, now_ms).unwrap();
    assert_eq!(c.rows(), "2=stays");
    for other in [&mut a, &mut b] {
        assert!(compare_sites(other, &mut c).unwrap().is_empty());
        assert!(compare_sites(&mut c, other).unwrap().is_empty());
    }
    // What was changed behind its back is found again.
    c.app.execute_batch("BEGIN; UPDATE t SET v = 'wrong'; DELETE FROM __litemesh_log; COMMIT").unwrap();
    assert_eq!(compare_sites(&mut a, &mut c).unwrap().len(), 1);
}

fn keys(findings: &[Finding]) -> BTreeSet<(String, String)> {
    let key = |k: &Key| {
        let text = |c: &Cell| match c.to_value() {
            Value::Int(i) => i.to_string(),
            Value::Text(t) => String::from_utf8(t).unwrap(),
            other => format!("{other:?}"),
        };
        k.iter().map(text).collect::<Vec<_>>().join("|")
    };
    findings.iter().map(|f| (f.layout.table.clone(), key(&f.key))).collect()
}

fn world(seed: u64, uniques: bool) -> Shared {
    let nodes = 2 + (seed % 2) as usize;
    let tables = if uniques { Tables::Uniques } else { Tables::Many };
    let storm = WORLDS.into_iter().find(|w| w.name == "bad-network").unwrap();
    let options = Options { nodes: (nodes, nodes), kills: 0.0, moves: 0.0, tables, steps: 300, ..storm };
    let mut world = World::new(&History::new(options, seed));
    for _ in 0..60 {
        world.next_step();
    }
    Rc::new(RefCell::new(world))
}

#[test]
fn nothing_is_found_while_everybody_writes() {
    for seed in seeds(40) {
        println!("compare, busy: LITEMESH_SIM_SEED={seed}");
        let world = world(seed, seed % 3 == 0);
        let mut rows = 0;
        for _ in 0..4 {
            let compared = compare_two(&world, (0, 1), true, |_, f| panic!("seed {seed}: {f:?}"));
            rows += compared.rows;
        }
        assert!(rows > 0);
        world.borrow_mut().settle_down();
        let compared = compare_two(&world, (1, 0), false, |_, f| panic!("seed {seed}: {f:?}"));
        assert_eq!((compared.unsettled, compared.left_out.len()), (0, 0));
        world.borrow().check();
    }
}

/// A tool that writes with triggers off.
fn behind_its_back(world: &Shared, node: usize, random: &mut StdRng) {
    let tool = world.borrow().connect(node);
    tool.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false).unwrap();
    for _ in 0..random.random_range(1..6) {
        let (id, n) = (random.random_range(1..8), random.random_range(100..200));
        let sql = match random.random_range(0..7) {
            0 => format!("INSERT OR REPLACE INTO item VALUES({id}, {n}, 'tool', 0)"),
            1 => format!("UPDATE item SET a = {n} WHERE id = {id}"),
            2 => format!("DELETE FROM item WHERE id = {id}"),
            3 => format!("INSERT OR REPLACE INTO pair VALUES('K', {id}, {n})"),
            4 => "UPDATE pair SET x = upper(x)".to_owned(),
            5 => format!("DELETE FROM pair WHERE y = {id}"),
            _ => format!("INSERT INTO nokey(rowid, v) VALUES({}, {n})", 10_000 + id),
        };
        // The same id twice is the tool's own affair.
        let _ = tool.execute_batch(&sql);
    }
}

/// The keys whose rows differ between two nodes, by the rows' own text.
fn different(world: &Shared, a: usize, b: usize) -> BTreeSet<(String, String)> {
    let row_keys = |node: usize| {
        let conn = world.borrow().connect(node);
        let mut out = BTreeSet::new();
        for (table, key, rest) in [
            ("item", "id", "quote(a), quote(b), quote(c)"),
            ("pair", "upper(x) || '|' || y", "quote(x), quote(v)"),
            ("nokey", "rowid", "quote(v)"),
            ("mine", "id", "n"),
        ] {
            let sql = format!("SELECT {key}, concat_ws(',', {rest}) FROM {table}");
            let mut rows = conn.prepare(&sql).unwrap();
            let found = rows.query_map([], |r| {
                let key = match r.get_ref(0)? {
                    rusqlite::types::ValueRef::Integer(i) => i.to_string(),
                    other => other.as_str()?.to_owned(),
                };
                Ok((table.to_owned(), key, r.get::<_, String>(1)?))
            });
            out.extend(found.unwrap().map(Result::unwrap));
        }
        out
    };
    let (a, b) = (row_keys(a), row_keys(b));
    a.symmetric_difference(&b).map(|(t, k, _)| (t.clone(), k.clone())).collect()
}

#[test]
fn what_was_changed_behind_its_back_is_found_to_the_key_and_repaired_either_way() {
    let mut found_any = 0;
    for seed in seeds(60) {
        println!("repair: LITEMESH_SIM_SEED={seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let world = world(seed, false);
        world.borrow_mut().settle_down();
        let nodes = 2 + (seed % 2) as usize;
        behind_its_back(&world, random.random_range(0..nodes), &mut random);
        let mut found = Vec::new();
        compare_two(&world, (0, 1), false, |_, f| found.extend(f));
        let upper = |(t, k): (String, String)| (t.clone(), if t == "pair" { k.to_uppercase() } else { k });
        let located: BTreeSet<_> = keys(&found).into_iter().map(upper).collect();
        assert_eq!(located, different(&world, 0, 1).into_iter().map(upper).collect(), "seed {seed}");
        found_any += located.len();
        let right = random.random_range(0..nodes);
        let busy = seed % 4 == 3;
        let wanted = world.borrow().dump(right);
        for other in (0..nodes).filter(|n| *n != right) {
            repair(&world, right, other, nodes, busy);
        }
        world.borrow_mut().settle_down();
        for other in (0..nodes).filter(|n| *n != right) {
            // What others changed meanwhile was left alone.
            repair(&world, right, other, nodes, false);
        }
        world.borrow_mut().settle_down();
        world.borrow().check();
        if !busy {
            assert_eq!(world.borrow().dump(right), wanted, "seed {seed}: the right node's rows are kept");
        }
        for other in (0..nodes).filter(|n| *n != right) {
            let compared = compare_two(&world, (other, right), false, |_, f| panic!("seed {seed}: {f:?}"));
            assert_eq!(compared.unsettled, 0);
        }
    }
    assert!(found_any > 60, "only {found_any} differences were made");
}

fn repair(world: &Shared, right: usize, other: usize, nodes: usize, busy: bool) {
    compare_two(world, (right, other), busy, |owner, findings| {
        let layout = findings[0].layout.clone();
        for batch in batches(findings.into_iter().map(|f| (f.key, ())).collect()) {
            let keys: Vec<Key> = batch.into_iter().map(|(k, ())| k).collect();
            let clock_ms = owner.repair_date_ms().unwrap();
            let mut peers = Vec::new();
            for peer in (0..nodes).filter(|n| *n != right) {
                let lookup =
                    Lookup { layout: layout.clone(), keys: keys.clone(), later_than_ms: Some(clock_ms) };
                peers.push(look_there(&mut asked(world, peer, busy), lookup).unwrap());
            }
            let order = Restamp { layout: layout.clone(), keys, peers, clock_ms };
            match owner.restamp(order) {
                Ok(fates) => assert!(busy || fates.iter().all(|f| *f != Fate::Left), "{fates:?}"),
                Err(ReplicaError::ClockPassed) => assert!(busy),
                Err(e) => panic!("{e}"),
            }
        }
    });
}
