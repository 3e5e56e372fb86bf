//! The simulated world for what histories do not know: changes of the schema, clocks that jump, tables that keep both
//! rows. Nodes, their applications, the network, and what must hold at the end.

use std::collections::{BTreeMap, BTreeSet};

use litemesh::core::message::{Fragment, Hello, Message, decode};
use litemesh::core::names::NodeName;
use litemesh::core::skew::Clocks;
use litemesh::core::version::SiteId;
use litemesh::fabric::link::{Incoming, Outgoing};
use litemesh::fabric::memory::{MemoryFabric, Weather};
use litemesh::replica::engine::{Action, Engine};
use litemesh::replica::send::{MessageAssembler, commit_pieces, message_pieces};
use litemesh::replica::store::Store;
use litemesh::replica::{adopt, copy};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::Connection;

use crate::compare::{File, write_again};
use crate::ddl_random::schema_statement;
use crate::history::plain_statement;
use crate::world::{SCHEMA, UNIQUE, copy_database, db, memory, spool};

/// A table that everybody renames and nobody drops.
const RENAMED: &str = "CREATE TABLE r0(id TEXT PRIMARY KEY NOT NULL, n)";

use super::rekey_oracle::{self, Oracle};

/// What a run is like.
#[derive(Clone, Copy)]
pub struct Options {
    pub nodes: usize,
    pub steps: u32,
    pub weather: Weather,
    pub cuts: f64,
    pub kills: f64,
    pub uniques: bool,
    pub ddl: bool,
    /// How far clocks are off at most, either way.
    pub skew_ms: i64,
    /// Probability, in each step, that a clock is set to something else.
    pub jumps: f64,
    /// Tables keep both rows of an id collision where they can.
    pub rekey: bool,
    /// Only one node says so, some time after all have begun to write.
    pub late: bool,
    /// Only such tables, watched by an oracle.
    pub oracle: bool,
    /// Probability, in each step, that a node joins with a copy of another's file, that one leaves for ever, and that
    /// a file is restored from an older copy.
    pub moves: f64,
}

impl Options {
    pub fn calm() -> Self {
        let weather = Weather { drop: 0.0, duplicate: 0.0, max_delay_ms: 5 };
        Self {
            nodes: 2,
            steps: 150,
            weather,
            cuts: 0.0,
            kills: 0.0,
            uniques: false,
            ddl: false,
            skew_ms: 20_000,
            jumps: 0.0,
            rekey: false,
            late: false,
            oracle: false,
            moves: 0.0,
        }
    }

    pub fn storm() -> Self {
        let weather = Weather { drop: 0.15, duplicate: 0.15, max_delay_ms: 400 };
        Self { steps: 250, weather, cuts: 0.03, kills: 0.03, ..Self::calm() }
    }
}

pub struct Node {
    name: NodeName,
    /// The application's connection; also what keeps the database in memory while litemesh is down.
    pub app: Connection,
    uri: String,
    engine: Option<Engine>,
    messages: MessageAssembler,
    /// How far its wall clock is off.
    skew_ms: i64,
    clocks: Clocks,
    /// Gone for ever.
    pub left: bool,
    backup: Option<Connection>,
}

pub struct World {
    pub seed: u64,
    random: StdRng,
    pub options: Options,
    net: MemoryFabric,
    pub nodes: Vec<Node>,
    next_site: u64,
    now_ms: u64,
    next_hello_ms: u64,
    next_id: u64,
    /// Keys that one node alone ever inserted and nobody deletes.
    pub acknowledged: BTreeSet<String>,
    pub oracle: Option<Oracle>,
    /// Whether the node that says it has.
    said: bool,
}

impl World {
    pub fn new(seed: u64, options: Options) -> Self {
        let mut world = Self {
            seed,
            random: StdRng::seed_from_u64(seed),
            options,
            net: MemoryFabric::new(seed, options.weather),
            nodes: Vec::new(),
            next_site: 1_000,
            // Beyond the clock of whoever runs it.
            now_ms: 4_000_000_000_000,
            next_hello_ms: 0,
            next_id: 0,
            acknowledged: BTreeSet::new(),
            oracle: options.oracle.then(Oracle::new),
            said: false,
        };
        for _ in 0..options.nodes {
            let (uri, app) = memory();
            app.execute_batch(if options.oracle { rekey_oracle::SCHEMA } else { SCHEMA }).unwrap();
            if options.uniques {
                app.execute_batch(UNIQUE).unwrap();
            }
            if options.ddl {
                app.execute_batch(RENAMED).unwrap();
            }
            let site = world.site();
            adopt::install(&app, 77, site).unwrap();
            world.add_node(uri, app);
        }
        world
    }

    fn site(&mut self) -> SiteId {
        self.next_site += 1;
        SiteId(self.next_site)
    }

    fn add_node(&mut self, uri: String, app: Connection) {
        let i = self.nodes.len();
        app.execute_batch("PRAGMA trusted_schema = OFF").unwrap();
        app.set_prepared_statement_cache_capacity(64);
        app.pragma_update(None, "foreign_keys", self.options.oracle && self.seed.is_multiple_of(4)).unwrap();
        let name: NodeName = format!("n{i}").parse().unwrap();
        let (skew_ms, clocks) = (self.skew(), Clocks::default());
        let messages = MessageAssembler::default();
        self.nodes.push(Node {
            name,
            app,
            uri,
            engine: None,
            messages,
            skew_ms,
            clocks,
            left: false,
            backup: None,
        });
        self.start(i);
    }

    fn skew(&mut self) -> i64 {
        let skew_ms = self.options.skew_ms;
        self.random.random_range(-skew_ms..skew_ms)
    }

    fn start(&mut self, i: usize) {
        if self.nodes[i].left || self.nodes[i].engine.is_some() {
            return;
        }
        let mut store = Store::with_connection(
            Connection::open(&self.nodes[i].uri).unwrap(),
            &spool(),
            Box::new(|_| true),
            Default::default(),
        )
        .unwrap();
        if self.options.rekey && (!self.options.late || i == 0 && self.said) {
            store.keep_both(Box::new(|_| true)).unwrap();
        }
        self.nodes[i].engine = Some(Engine::new(db(), store, &spool()));
        self.nodes[i].messages = MessageAssembler::default();
        let name = self.nodes[i].name.clone();
        self.net.up(&name);
    }

    fn kill(&mut self, i: usize) {
        self.nodes[i].engine = None;
        let name = self.nodes[i].name.clone();
        self.net.down(&name);
    }

    pub fn run(mut self) {
        for step in 0..self.options.steps {
            if self.options.late && step == self.options.steps / 3 {
                self.said = true;
                self.kill(0);
                self.start(0);
            }
            self.step();
        }
        self.settle_down();
        for node in self.nodes.iter_mut().filter(|n| !n.left) {
            let engine = node.engine.as_mut().unwrap();
            let stale = engine.store_mut().stale_references().unwrap();
            assert!(stale.is_empty(), "seed {} {}: {stale:?}", self.seed, node.name);
        }
        self.check();
    }

    /// Time goes on, something happens, somebody writes, everybody takes a turn.
    pub fn step(&mut self) {
        self.now_ms += self.random.random_range(1..120);
        self.misfortune();
        let i = self.random.random_range(0..self.nodes.len());
        if !self.nodes[i].left {
            self.write(i);
        }
        self.turn();
    }

    /// Time goes on without writes.
    pub fn wait(&mut self, ms: u64) {
        self.now_ms += ms;
        self.turn();
    }

    /// One more write on a node, of one row that all have; it comes after whatever the node has seen.
    pub fn last_word(&mut self, i: usize, word: &str) {
        let app = &self.nodes[i].app;
        let wall_ms = self.now_ms.saturating_add_signed(self.nodes[i].skew_ms);
        let day = wall_ms as f64 / 86_400_000.0 + 2_440_587.5;
        app.execute_batch(&format!(
            "BEGIN; INSERT INTO item VALUES(1, 'new', '{word}', 0) ON CONFLICT DO UPDATE SET b = excluded.b;
             UPDATE __litemesh_log SET ms = {day}; COMMIT"
        ))
        .unwrap();
    }

    /// The word that a node has.
    pub fn word(&self, i: usize) -> String {
        let sql = "SELECT b FROM item WHERE id = 1";
        self.nodes[i].app.query_row(sql, [], |r| r.get(0)).unwrap()
    }

    fn misfortune(&mut self) {
        let count = self.nodes.len();
        let (a, b) = (self.random.random_range(0..count), self.random.random_range(0..count));
        if self.random.random_bool(self.options.cuts) {
            let (a, b) = (self.nodes[a].name.clone(), self.nodes[b].name.clone());
            self.net.cut(&a, &b);
            if self.random.random_bool(0.7) {
                self.net.cut(&b, &a);
            }
        }
        if self.random.random_bool(self.options.cuts) {
            self.net.heal();
        }
        if self.random.random_bool(self.options.jumps) {
            self.nodes[a].skew_ms = self.skew();
        }
        if self.random.random_bool(self.options.kills) {
            // At rest, with transactions on the disk of which nothing is sent, or in the midst of sending.
            match self.random.random_range(0..4) {
                0 => {}
                1 => self.work(a, 0),
                _ => {
                    let messages = self.random.random_range(0..6);
                    self.work(a, messages);
                }
            }
            self.kill(a);
        }
        if self.nodes[b].engine.is_none() && self.random.random_bool(0.2) {
            self.start(b);
        }
        if self.random.random_bool(self.options.moves) {
            match self.random.random_range(0..5) {
                0 | 1 if count < 8 => self.join(a),
                2 if self.nodes.iter().filter(|n| !n.left).count() > 2 && self.is_spare(a) => {
                    self.kill(a);
                    self.nodes[a].left = true;
                }
                3 if self.is_spare(a) => self.restore(a),
                _ => self.back_up(a),
            }
        }
    }

    /// Whether another node has all that this one has, so that nothing is lost with it.
    fn is_spare(&self, i: usize) -> bool {
        let held = |n: &Node| -> BTreeMap<i64, i64> {
            let mut ask = n.app.prepare("SELECT site, n FROM __litemesh_site WHERE n > 0").unwrap();
            ask.query_map([], |r| Ok((r.get(0)?, r.get(1)?))).unwrap().map(Result::unwrap).collect()
        };
        let node = &self.nodes[i];
        let logged = node.app.prepare("SELECT 1 FROM __litemesh_log").unwrap().exists([]).unwrap();
        let ours = held(node);
        let others = self.nodes.iter().enumerate().filter(|(j, n)| *j != i && !n.left);
        let covers = |theirs: BTreeMap<i64, i64>| ours.iter().all(|(s, n)| theirs.get(s) >= Some(n));
        !node.left && !logged && others.map(|(_, n)| held(n)).any(covers)
    }

    /// A new node gets a copy, as the daemon makes one: of a state that is wholly absorbed, under a new site.
    fn join(&mut self, from: usize) {
        let Some(engine) = &mut self.nodes[from].engine else { return };
        engine.barrier().unwrap();
        let source = engine.store().head().site;
        let (uri, mut app) = memory();
        copy_database(&self.nodes[from].app, &mut app);
        let site = self.site();
        app.execute_batch("BEGIN IMMEDIATE").unwrap();
        copy::take_identity(&app, source, site).unwrap();
        app.execute_batch("COMMIT").unwrap();
        self.add_node(uri, app);
    }

    fn back_up(&mut self, i: usize) {
        let Some(engine) = &mut self.nodes[i].engine else { return };
        // What is logged would be written a second time by the restored file.
        engine.barrier().unwrap();
        let mut copy = Connection::open_in_memory().unwrap();
        copy_database(&self.nodes[i].app, &mut copy);
        self.nodes[i].backup = Some(copy);
    }

    /// Puts the copy in the place of the file. The daemon finds a token that it does not know: a new site.
    fn restore(&mut self, i: usize) {
        if self.nodes[i].backup.is_none() {
            return;
        }
        self.kill(i);
        let site = self.site();
        let node = &mut self.nodes[i];
        copy_database(node.backup.as_ref().unwrap(), &mut node.app);
        adopt::become_site(&node.app, site).unwrap();
        self.start(i);
    }

    /// One application transaction of a few statements, some of them rolled back.
    fn write(&mut self, i: usize) {
        // What the application's clock said: the same host's, so as wrong.
        let wall_ms = self.now_ms.saturating_add_signed(self.nodes[i].skew_ms);
        let day = wall_ms as f64 / 86_400_000.0 + 2_440_587.5;
        if let Some(oracle) = &mut self.oracle {
            return oracle.write(&mut self.random, &self.nodes[i].app, day);
        }
        let statements = self.random.random_range(1..5);
        let mut fresh = Vec::new();
        self.nodes[i].app.execute_batch("BEGIN").unwrap();
        let logged = "SELECT coalesce(max(seq), 0) FROM __litemesh_log";
        let before: i64 = self.nodes[i].app.query_row(logged, [], |r| r.get(0)).unwrap();
        for _ in 0..statements {
            let sql = self.statement(i, &mut fresh);
            // Constraint errors are the application's own affair.
            let done = self.nodes[i].app.execute_batch(&sql).is_ok();
            // What was written under a name that the table has here by chance counts only if it has.
            if let Some((_, key)) = sql.split_once("INTO r").filter(|_| done) {
                fresh.push(key.split('\'').nth(1).unwrap().to_owned());
            }
        }
        let date = "UPDATE __litemesh_log SET ms = ?1 WHERE seq > ?2";
        self.nodes[i].app.execute(date, (day, before)).unwrap();
        if self.random.random_bool(0.1) {
            self.nodes[i].app.execute_batch("ROLLBACK").unwrap();
        } else {
            self.nodes[i].app.execute_batch("COMMIT").unwrap();
            self.acknowledged.extend(fresh);
        }
    }

    fn statement(&mut self, i: usize, fresh: &mut Vec<String>) -> String {
        let r = &mut self.random;
        let (id, other, n) = (r.random_range(1..8), r.random_range(1..8), r.random_range(0..100));
        let or = ["", "", "OR REPLACE", "OR IGNORE"][r.random_range(0..4)];
        if self.options.uniques && r.random_bool(0.6) {
            let mail =
                ["NULL".to_owned(), format!("'m{}'", r.random_range(0..5))][r.random_range(0..2)].clone();
            let nick = format!("'{}{}'", ["N", "n"][r.random_range(0..2)], r.random_range(0..6));
            return match r.random_range(0..6) {
                0 | 1 => {
                    format!("INSERT {or} INTO person VALUES({id}, {mail}, {nick}, {}, {})", n % 2, n % 3)
                }
                2 => format!("UPDATE {or} person SET mail = {mail} WHERE id = {id}"),
                3 => format!("UPDATE {or} person SET nick = {nick}, seat = {} WHERE id = {id}", n % 3),
                4 => format!("UPDATE {or} person SET id = {other} WHERE id = {id}"),
                _ => format!("DELETE FROM person WHERE id = {id}"),
            };
        }
        if self.options.ddl && r.random_bool(0.4) {
            return schema_statement(r);
        }
        if self.options.ddl && r.random_bool(0.1) {
            self.next_id += 1;
            return format!("INSERT INTO r{} VALUES('{i}-{}', {n})", id % 3, self.next_id);
        }
        let which = r.random_range(0..14);
        plain_statement(which, (id, other, n), or).unwrap_or_else(|| {
            self.next_id += 1;
            let key = format!("{i}-{}", self.next_id);
            fresh.push(key.clone());
            format!("INSERT INTO mine VALUES('{key}', {n}); UPDATE mine SET n = n + 1 WHERE id = '{i}-{id}'")
        })
    }

    /// Everybody takes in what arrived and says what it has to say.
    pub fn turn(&mut self) {
        for (to, message) in self.net.deliver(self.now_ms) {
            let Some(i) = self.nodes.iter().position(|n| n.name == to) else { continue };
            let node = &mut self.nodes[i];
            let now = self.now_ms;
            let Some(engine) = &mut node.engine else { continue };
            match message {
                Incoming::Commit { site, payload, .. } => {
                    let piece: Fragment = decode(&payload).unwrap();
                    engine.on_fragment(SiteId(site), &piece).unwrap();
                }
                Incoming::Message { from, payload } => {
                    if let Some(message) = node.messages.push::<Message>(&from, &payload).unwrap() {
                        if let Message::Hello(hello) = &message {
                            node.clocks.hear(&from, hello.now_ms, now);
                        }
                        engine.on_message(&from, message, now).unwrap();
                    }
                }
                Incoming::Logged(logged) => engine.on_logged(&logged, now).unwrap(),
            }
        }
        let hello = self.now_ms >= self.next_hello_ms;
        if hello {
            self.next_hello_ms = self.now_ms + 2_000;
        }
        for i in 0..self.nodes.len() {
            if hello && self.nodes[i].engine.is_some() {
                let now_ms = self.now_ms.saturating_add_signed(self.nodes[i].skew_ms);
                let hello = Hello { version: String::new(), now_ms, dbs: vec![db()] };
                let name = self.nodes[i].name.clone();
                self.act(&name, Action::Broadcast(Message::Hello(hello)), &mut 1);
            }
            self.work(i, usize::MAX);
        }
    }

    /// A node's turn, of which only so many messages get out.
    fn work(&mut self, i: usize, mut messages: usize) {
        let now = self.now_ms;
        let node = &mut self.nodes[i];
        let wall_ms = now.saturating_add_signed(node.skew_ms);
        let clocks = node.clocks.judge(wall_ms, now, 60_000);
        let Some(engine) = &mut node.engine else { return };
        engine.set_clocks(clocks, now);
        engine.settle(now).unwrap();
        engine.announce(now);
        let (name, actions) = (node.name.clone(), engine.take_actions());
        actions.into_iter().for_each(|a| self.act(&name, a, &mut messages));
    }

    fn act(&mut self, from: &NodeName, action: Action, left: &mut usize) {
        let (net, now) = (&mut self.net, self.now_ms);
        let mut send = |out: Outgoing| {
            if *left > 0 {
                *left -= 1;
                net.send(from, out, now);
            }
        };
        match action {
            Action::Publish(mut own) => {
                let site = own.site.0;
                commit_pieces(&mut own, |payload| send(Outgoing::Commit { db: db(), site, payload }))
                    .unwrap();
            }
            Action::Broadcast(m) => message_pieces(&m, |payload| send(Outgoing::Broadcast { payload })),
            Action::Send(to, m) => {
                message_pieces(&m, |payload| send(Outgoing::Direct { to: to.clone(), payload }))
            }
            Action::ReadLog(asked) => send(Outgoing::ReadLog(asked)),
            Action::Warn(text) => println!("{from}: {text}"),
        }
    }

    /// The network is good again, everybody is there, nobody writes: how long until all is quiet is bounded.
    pub fn settle_down(&mut self) {
        self.net.heal();
        self.net.set_weather(Weather { drop: 0.0, duplicate: 0.0, max_delay_ms: 5 });
        for i in 0..self.nodes.len() {
            self.start(i);
        }
        loop {
            self.agree();
            if !self.compare_rebuilt() {
                return;
            }
        }
    }

    /// What the daemon does by itself when nodes meet: tables that an application rebuilt are compared with the peers'.
    fn compare_rebuilt(&mut self) -> bool {
        let found = self.nodes.iter().enumerate().find_map(|(i, n)| {
            let tables = n.engine.as_ref()?.store().rebuilt_tables().unwrap();
            Some((i, tables.into_iter().next()?))
        });
        let Some((i, table)) = found else { return false };
        let mut files: Vec<(usize, File<'_>)> = Vec::new();
        for (j, node) in self.nodes.iter_mut().enumerate() {
            let uri = node.uri.clone();
            files.extend(node.engine.as_mut().map(|engine| (j, File { engine, uri })));
        }
        let (here, others): (Vec<_>, Vec<_>) = files.into_iter().partition(|(j, _)| *j == i);
        let here = here.into_iter().next().unwrap().1;
        write_again(here, others.into_iter().map(|(_, f)| f).collect(), &table, self.now_ms);
        self.nodes[i].engine.as_mut().unwrap().store_mut().forget_rebuilt(&table).unwrap();
        true
    }

    fn agree(&mut self) {
        // What was dated ahead by a node that heard nobody may have to wait for its time.
        let pause_ms = if self.options.skew_ms > 60_000 { 3_000 } else { 50 };
        for round in 0..3_000 {
            self.now_ms += pause_ms;
            self.turn();
            let engines = || self.nodes.iter().filter_map(|n| n.engine.as_ref());
            let vectors = || engines().map(|e| &e.store().head().vector);
            let first = vectors().next().unwrap();
            // With pauses that long a hello is always under way.
            let quiet = self.net.is_quiet() || pause_ms > 2_000;
            if round % 10 == 0 && quiet && vectors().all(|v| v == first) {
                return;
            }
        }
        for node in &self.nodes {
            let Some(engine) = node.engine.as_ref() else { continue };
            println!("{}: {:?} {:?}", node.name, engine.store().head().vector, engine.stopped());
        }
        panic!("the nodes do not come to agree: seed {}", self.seed);
    }
}
