//! The simulated world: nodes, their applications, the network. It runs a history and looks whether all ends well.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use litemesh::core::message::{CommitHeader, Fragment, Message, decode};
use litemesh::core::names::{DbName, NodeName};
use litemesh::core::version::{SiteId, Version};
use litemesh::fabric::link::{Incoming, Outgoing};
use litemesh::fabric::memory::{MemoryFabric, Weather};
use litemesh::replica::engine::{Action, Engine};
use litemesh::replica::forget::Forgetting;
use litemesh::replica::merging::Merging;
use litemesh::replica::send::{MessageAssembler, commit_pieces, message_pieces};
use litemesh::replica::store::{Store, TableFilter};
use litemesh::replica::unite::PeerFile;
use litemesh::replica::{adopt, copy};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::Connection;
use rusqlite::backup::Backup;

use crate::history::{FORGET_MS, History, Moment, Op, Step, Tables, What};
use crate::truth::{Pending, Truth};

pub const SCHEMA: &str = "
    CREATE TABLE item(id INTEGER PRIMARY KEY, a, b TEXT, c REAL);
    CREATE TABLE pair(x TEXT COLLATE NOCASE, y INT, v, PRIMARY KEY(x, y)) WITHOUT ROWID;
    CREATE TABLE mine(id TEXT PRIMARY KEY NOT NULL, n INTEGER NOT NULL);
    CREATE TABLE nokey(v);
    INSERT INTO item VALUES(1, 'one', 'adopted', 1.5), (2, x'00ff', NULL, -0.0), (3, 3, 'x', 9e999);";
pub const UNIQUE: &str = "
    CREATE TABLE person(id INTEGER PRIMARY KEY, mail TEXT UNIQUE, nick TEXT NOT NULL UNIQUE, team, seat);
    CREATE UNIQUE INDEX seat ON person(team, seat) WHERE seat > 0;
    CREATE UNIQUE INDEX initial ON person(lower(nick));";
const FOLLOWED: &str = "
    CREATE TABLE cell(id INTEGER PRIMARY KEY, a, b);
    CREATE TABLE kid(id TEXT PRIMARY KEY NOT NULL, cell INTEGER REFERENCES cell(id), v);
    CREATE TABLE line(cell INTEGER REFERENCES cell, n INTEGER, v, PRIMARY KEY(cell, n)) WITHOUT ROWID;
    INSERT INTO cell VALUES(1, 0, 'adopted');";

/// So that no two databases in memory have one name.
static FILES: AtomicU64 = AtomicU64::new(0);

struct Node {
    name: NodeName,
    /// The application's connection; also what keeps the database in memory while litemesh is down.
    app: Connection,
    uri: String,
    engine: Option<Engine>,
    messages: MessageAssembler,
    skew_ms: i64,
    left: bool,
    backup: Option<Connection>,
    /// Keys of `mine` that were committed and are in no numbered commit yet.
    keys: Vec<String>,
    /// Those that were deleted.
    deleted: Vec<String>,
    /// The same of what the truth follows.
    pending: Vec<Pending>,
}

pub struct World {
    random: StdRng,
    tables: Tables,
    net: MemoryFabric,
    nodes: Vec<Node>,
    now_ms: u64,
    next_site: u64,
    /// Keys that one node alone ever inserted and nobody deletes, and the commits they are in.
    acknowledged: Vec<(String, SiteId, u64)>,
    /// Those that somebody deleted, and the commits that say so.
    deleted: Vec<(String, SiteId, u64)>,
    /// Those that somebody deleted, whatever became of that.
    touched: BTreeSet<String>,
    forgets: bool,
    /// Tombstones that were forgotten, and files that were taken in whole, by engines that have ended.
    pub forgotten: u64,
    pub united: u64,
    truth: Truth,
    steps: VecDeque<Step>,
}

/// What a run amounted to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    pub conflicts: usize,
    pub children: usize,
    pub required: usize,
    /// Tombstones that were forgotten.
    pub forgotten: u64,
    /// Files that were taken in whole.
    pub united: u64,
}

pub fn db() -> DbName {
    "app".parse().unwrap()
}

pub fn spool() -> PathBuf {
    std::env::temp_dir()
}

pub fn memory() -> (String, Connection) {
    let uri = format!("file:sim-{}?mode=memory&cache=shared", FILES.fetch_add(1, Ordering::Relaxed));
    let conn = Connection::open(&uri).unwrap();
    (uri, conn)
}

pub fn copy_database(from: &Connection, to: &mut Connection) {
    let backup = Backup::new(from, to).unwrap();
    assert_eq!(backup.step(-1).unwrap(), rusqlite::backup::StepResult::Done);
}

/// Runs a history; an error says what went wrong.
pub fn run(history: &History) -> Result<Counts, String> {
    let result = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(history);
        history.steps.iter().for_each(|s| world.step(s.wait_ms, &s.what));
        world.settle_down();
        let living = world.nodes.iter().filter_map(|n| n.engine.as_ref());
        let forgotten = world.forgotten + living.map(Engine::collected_rows).sum::<u64>();
        Counts { forgotten, united: world.united, ..world.check() }
    }));
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words").to_owned()
    })
}

impl World {
    /// A world at the beginning of a history.
    pub fn new(history: &History) -> Self {
        let mut world = Self {
            random: StdRng::seed_from_u64(history.seed),
            tables: history.options.tables,
            net: MemoryFabric::new(history.seed, history.options.weather),
            nodes: Vec::new(),
            // Beyond the clock of whoever runs it.
            now_ms: 4_000_000_000_000,
            next_site: 1_000,
            acknowledged: Vec::new(),
            deleted: Vec::new(),
            touched: BTreeSet::new(),
            forgets: history.options.sleeps > 0.0,
            forgotten: 0,
            united: 0,
            truth: Truth::default(),
            steps: history.steps.iter().cloned().collect(),
        };
        for _ in 0..history.nodes {
            let (uri, app) = memory();
            let schema: &[&str] = match world.tables {
                Tables::Many => &[SCHEMA],
                Tables::Uniques => &[SCHEMA, UNIQUE],
                Tables::Followed | Tables::FollowedWhole => &[FOLLOWED],
            };
            schema.iter().for_each(|s| app.execute_batch(s).unwrap());
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
        app.execute_batch("PRAGMA trusted_schema = OFF").unwrap();
        app.set_prepared_statement_cache_capacity(64);
        let i = self.nodes.len();
        let skew_ms = self.random.random_range(-20_000..20_000);
        self.nodes.push(Node {
            name: format!("n{i}").parse().unwrap(),
            app,
            uri,
            engine: None,
            messages: MessageAssembler::default(),
            skew_ms,
            left: false,
            backup: None,
            keys: Vec::new(),
            deleted: Vec::new(),
            pending: Vec::new(),
        });
        self.start(i);
    }

    fn start(&mut self, i: usize) {
        let node = &mut self.nodes[i];
        if node.left || node.engine.is_some() {
            return;
        }
        let conn = Connection::open(&node.uri).unwrap();
        let mut store =
            Store::with_connection(conn, &spool(), Box::new(|_| true), Default::default()).unwrap();
        if self.tables == Tables::FollowedWhole {
            let (whole_row, by_column): (TableFilter, TableFilter) =
                (Box::new(|_| true), Box::new(|_| false));
            store.set_merging(Merging { whole_row, by_column }).unwrap();
        }
        let mut engine = Engine::new(db(), store, &spool());
        if self.forgets {
            let (age_ms, absent_ms) = FORGET_MS;
            engine.remember(Forgetting { me: Some(node.name.clone()), age_ms, absent_ms });
        }
        node.engine = Some(engine);
        node.messages = MessageAssembler::default();
        self.net.up(&node.name);
    }

    fn kill(&mut self, i: usize) {
        self.forgotten += self.nodes[i].engine.as_ref().map_or(0, Engine::collected_rows);
        self.nodes[i].engine = None;
        let name = self.nodes[i].name.clone();
        self.net.down(&name);
    }

    /// One step, and what everybody does after it. A node that a history names and that is not there is another.
    pub fn step(&mut self, wait_ms: u64, what: &What) {
        self.now_ms += wait_ms;
        let count = self.nodes.len();
        match what {
            What::Write { node, ops, rollback } => self.write(node % count, ops, *rollback),
            What::Cut { a, b, both } => {
                let (a, b) = (self.nodes[a % count].name.clone(), self.nodes[b % count].name.clone());
                self.net.cut(&a, &b);
                if *both {
                    self.net.cut(&b, &a);
                }
            }
            What::Heal => self.net.heal(),
            What::Kill { node, moment } => {
                match moment {
                    Moment::Now => {}
                    Moment::BeforeSending => self.work(node % count, 0),
                    Moment::Sent(messages) => self.work(node % count, *messages),
                }
                self.kill(node % count);
            }
            What::Start { node } => self.start(node % count),
            What::Join { from } => self.join(from % count),
            // The first node stays, so that there is a mesh.
            What::Leave { node } if node % count > 0 => {
                self.kill(node % count);
                self.nodes[node % count].left = true;
            }
            What::Leave { .. } => {}
            What::Backup { node } => {
                let mut copy = Connection::open_in_memory().unwrap();
                copy_database(&self.nodes[node % count].app, &mut copy);
                self.nodes[node % count].backup = Some(copy);
            }
            What::Restore { node } => self.restore(node % count),
            What::Sleep { ms } => {
                for _ in 0..ms / 100 {
                    self.now_ms += 100;
                    self.turn();
                }
            }
            What::Tamper { node } => {
                let conn = &self.nodes[node % count].app;
                conn.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)
                    .unwrap();
                conn.execute_batch("INSERT INTO mine VALUES('tampered', 0)").unwrap();
                conn.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, true).unwrap();
            }
        }
        self.turn();
    }

    /// The next step of the history, which begins again when it ends.
    pub fn next_step(&mut self) {
        if let Some(step) = self.steps.pop_front() {
            self.step(step.wait_ms, &step.what);
            self.steps.push_back(step);
        }
    }

    /// Time goes on without writes.
    pub fn wait(&mut self, ms: u64) {
        self.now_ms += ms;
        self.turn();
    }

    /// A node's engine, which must be up.
    pub fn engine(&mut self, i: usize) -> &mut Engine {
        self.nodes[i].engine.as_mut().expect("it is up")
    }

    /// A connection of its own to a node's database.
    pub fn connect(&self, i: usize) -> Connection {
        Connection::open(&self.nodes[i].uri).unwrap()
    }

    /// The simulated clock.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// Every row of a node, as text.
    pub fn dump(&self, i: usize) -> BTreeMap<String, Vec<String>> {
        dump(&self.nodes[i].app)
    }

    /// A new node gets a copy, as the daemon makes one: of a state that is wholly absorbed, under a new site.
    fn join(&mut self, from: usize) {
        let count = self.nodes.len();
        let Node { engine: Some(engine), skew_ms, .. } = &mut self.nodes[from] else { return };
        engine.barrier().unwrap();
        let there = self.now_ms.saturating_add_signed(*skew_ms);
        engine.note_joining(&format!("n{count}").parse().unwrap(), there);
        let source = engine.store().head().site;
        let (uri, mut app) = memory();
        copy_database(&self.nodes[from].app, &mut app);
        let site = self.site();
        app.execute_batch("BEGIN IMMEDIATE").unwrap();
        copy::take_identity(&app, source, site).unwrap();
        app.execute_batch("COMMIT").unwrap();
        self.add_node(uri, app);
    }

    /// Puts the copy in the place of the file. The daemon finds a token that it does not know: a new site.
    fn restore(&mut self, i: usize) {
        let site = self.site();
        if self.nodes[i].backup.is_none() || self.nodes[i].left {
            return;
        }
        self.kill(i);
        let node = &mut self.nodes[i];
        copy_database(node.backup.as_ref().unwrap(), &mut node.app);
        adopt::become_site(&node.app, site).unwrap();
        node.keys.clear();
        node.deleted.clear();
        self.start(i);
    }

    /// One application transaction of a few statements, some of them rolled back.
    fn write(&mut self, i: usize, ops: &[Op], rollback: bool) {
        let node = &mut self.nodes[i];
        let (mut keys, mut deleted, mut pending) = (Vec::new(), Vec::new(), Vec::new());
        let seen = Truth::vector(&node.app);
        node.app.execute_batch("BEGIN").unwrap();
        for op in ops {
            match op {
                // Constraint errors are the application's own affair.
                Op::Sql(sql) if sql.starts_with("DELETE FROM mine") => {
                    let mut statement = node.app.prepare_cached(sql).unwrap();
                    let gone = statement.query_map([], |r| r.get::<_, String>(0)).unwrap();
                    deleted.extend(gone.map(Result::unwrap));
                }
                Op::Sql(sql) => {
                    let done = node.app.execute_batch(sql);
                    if let (Ok(()), Some(rest)) = (done, sql.strip_prefix("INSERT INTO mine VALUES('")) {
                        keys.push(rest.split('\'').next().unwrap().to_owned());
                    }
                }
                Op::Row { table, key, sql, what } => {
                    let before = Truth::row(&node.app, table, key);
                    let done = node.app.execute(sql, []).unwrap_or(0);
                    let after = Truth::row(&node.app, table, key);
                    let whole = self.tables == Tables::FollowedWhole;
                    let new = Pending::new(table, key, *what, before, after, &seen).written_whole(whole);
                    pending.extend(Some(new).filter(|p| done > 0 && p.says_something()));
                }
            }
        }
        // The application's clock is the world's, so that a seed repeats itself.
        let ms = self.now_ms.saturating_add_signed(node.skew_ms) as f64;
        let clock = "UPDATE __litemesh_log SET ms = ?1 / 86400000.0 + 2440587.5 WHERE ms < 2480000";
        node.app.execute(clock, [ms]).unwrap();
        if rollback {
            node.app.execute_batch("ROLLBACK").unwrap();
        } else {
            node.app.execute_batch("COMMIT").unwrap();
            node.keys.extend(keys);
            self.touched.extend(deleted.iter().cloned());
            node.deleted.extend(deleted);
            node.pending.extend(pending);
        }
    }

    /// Everybody takes in what arrived and says what it has to say.
    pub fn turn(&mut self) {
        for (to, message) in self.net.deliver(self.now_ms) {
            let Some(i) = self.nodes.iter().position(|n| n.name == to) else { continue };
            let node = &mut self.nodes[i];
            let now = self.now_ms.saturating_add_signed(node.skew_ms);
            let Some(engine) = &mut node.engine else { continue };
            match message {
                Incoming::Commit { site, payload, .. } => {
                    let piece: Fragment = decode(&payload).unwrap();
                    engine.on_fragment(SiteId(site), &piece).unwrap();
                }
                Incoming::Message { from, payload } => {
                    if let Some(message) = node.messages.push::<Message>(&from, &payload).unwrap() {
                        engine.on_message(&from, message, now).unwrap();
                    }
                }
                Incoming::Logged(logged) => engine.on_logged(&logged, now).unwrap(),
            }
        }
        for i in 0..self.nodes.len() {
            self.work(i, usize::MAX);
            self.unite(i);
        }
    }

    /// A node that was away for too long takes in a peer's file, as the daemon does it.
    fn unite(&mut self, i: usize) {
        let now = self.now_ms.saturating_add_signed(self.nodes[i].skew_ms);
        let Some(engine) = &self.nodes[i].engine else { return };
        let Some(peer) = engine.needs_copy(now) else { return };
        let Some(from) = self.nodes.iter().position(|n| n.name == peer) else { return };
        let name = self.nodes[i].name.clone();
        let there = self.now_ms.saturating_add_signed(self.nodes[from].skew_ms);
        let Some(engine) = &mut self.nodes[from].engine else { return };
        engine.barrier().unwrap();
        engine.note_joining(&name, there);
        let mut copy = Connection::open_in_memory().unwrap();
        copy_database(&self.nodes[from].app, &mut copy);
        let file = PeerFile::with_connection(copy, &spool()).unwrap();
        self.nodes[i].engine.as_mut().unwrap().unite(file, "came back", now, now).unwrap();
        self.united += 1;
    }

    /// A node's turn, of which only so many messages get out.
    fn work(&mut self, i: usize, messages: usize) {
        let now = self.now_ms.saturating_add_signed(self.nodes[i].skew_ms);
        let Some(engine) = &mut self.nodes[i].engine else { return };
        engine.settle(now).unwrap();
        engine.announce(now);
        let mut left = messages;
        for action in engine.take_actions() {
            if let Action::Publish(own) = &action {
                self.note(i, own.site, &own.header);
            }
            let name = self.nodes[i].name.clone();
            self.act(&name, action, &mut left);
        }
    }

    /// What was written belongs to this commit.
    fn note(&mut self, i: usize, site: SiteId, header: &CommitHeader) {
        let node = &mut self.nodes[i];
        let keys = std::mem::take(&mut node.keys);
        self.acknowledged.extend(keys.into_iter().map(|k| (k, site, header.to)));
        let deleted = std::mem::take(&mut node.deleted);
        self.deleted.extend(deleted.into_iter().map(|k| (k, site, header.to)));
        let version = Version { hlc: header.hlc, site };
        self.truth.commit(version, header.to, std::mem::take(&mut node.pending));
    }

    fn act(&mut self, from: &NodeName, action: Action, left: &mut usize) {
        let (net, now) = (&mut self.net, self.now_ms);
        let mut send = |message| {
            if *left > 0 {
                *left -= 1;
                net.send(from, message, now);
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
                message_pieces(&m, |payload| send(Outgoing::Direct { to: to.clone(), payload }));
            }
            Action::ReadLog(asked) => send(Outgoing::ReadLog(asked)),
            Action::Warn(_) => {}
        }
    }

    fn members(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|n| !n.left)
    }

    /// The network is good again, everybody is there, nobody writes: how long until all is quiet is bounded.
    pub fn settle_down(&mut self) {
        self.net.heal();
        self.net.set_weather(Weather { drop: 0.0, duplicate: 0.0, max_delay_ms: 5 });
        (0..self.nodes.len()).for_each(|i| self.start(i));
        for round in 0..3_000 {
            self.now_ms += 50;
            self.turn();
            let vectors = || self.members().map(|n| &n.engine.as_ref().unwrap().store().head().vector);
            let first = vectors().next().unwrap();
            if round % 10 == 0 && self.net.is_quiet() && vectors().all(|v| v == first) {
                return;
            }
        }
        let mut text = String::new();
        for node in self.members() {
            let engine = node.engine.as_ref().unwrap();
            let (head, pending) = (engine.store().head(), engine.pending());
            text += &format!("\n{}: {:?} {pending} {:?}", node.name, head.vector, engine.stopped());
        }
        panic!("the nodes do not come to agree: {text}");
    }

    /// All nodes have the same rows, and none that they should not lack; what is kept of conflicts is what was lost.
    pub fn check(&self) -> Counts {
        let dumps: Vec<(&Node, BTreeMap<String, Vec<String>>)> =
            self.members().map(|n| (n, dump(&n.app))).collect();
        let expected = &dumps[0].1;
        for (node, got) in &dumps {
            let ok: String = node.app.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
            assert_eq!(ok, "ok", "node {}", node.name);
            for (table, rows) in expected {
                let names = (&node.name, &dumps[0].0.name);
                if rows != &got[table] {
                    dumps.iter().for_each(|(n, _)| eprintln!("{}", position(n)));
                }
                assert_eq!(rows, &got[table], "table {table} on node {} and {}", names.0, names.1);
            }
        }
        let first = dumps[0].0;
        let vector = &first.engine.as_ref().unwrap().store().head().vector;
        if self.tables.are_followed() {
            return self.truth.check(&first.app, vector);
        }
        let mine: BTreeSet<&str> = expected["mine"].iter().map(|r| r.split('|').next().unwrap()).collect();
        for (key, site, n) in &self.acknowledged {
            let quoted = format!("'{key}'");
            let known = vector.n(*site) >= *n && !self.touched.contains(key);
            assert!(!known || mine.contains(quoted.as_str()), "the row {key} is missing");
        }
        for (key, site, n) in &self.deleted {
            let quoted = format!("'{key}'");
            let known = vector.n(*site) >= *n;
            assert!(!known || !mine.contains(quoted.as_str()), "the deleted row {key} is back");
        }
        Counts::default()
    }
}

/// How far a node is, for who looks for a fault.
fn position(node: &Node) -> String {
    let all = |sql: &str| {
        let mut statement = node.app.prepare(sql).unwrap();
        let rows = statement.query_map([], |r| r.get::<_, String>(0)).unwrap();
        rows.map(Result::unwrap).collect::<Vec<_>>().join(", ")
    };
    format!(
        "{}: site {}, lsn {}, feeds {}; peers {}",
        node.name,
        all("SELECT value || '' FROM __litemesh_meta WHERE key = 'site'"),
        all("SELECT lsn || '' FROM __litemesh_clock"),
        all("SELECT site || ': ' || n FROM __litemesh_site"),
        all("SELECT site || ': ' || lsn FROM __litemesh_peer"),
    )
}

/// Every row of every table as text, by SQLite's own quoting: nothing of litemesh's takes part in comparing. What is
/// kept of conflicts counts as a table of the application's.
fn dump(app: &Connection) -> BTreeMap<String, Vec<String>> {
    let mut out = BTreeMap::new();
    let mut tables = app
        .prepare(
            "SELECT name FROM pragma_table_list WHERE schema = 'main' AND name NOT LIKE 'sqlite%' AND
                  (name NOT LIKE '\\_\\_litemesh%' ESCAPE '\\' OR name = '__litemesh_conflicts')",
        )
        .unwrap();
    let names: Vec<String> = tables.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
    for name in names {
        let sql = format!("SELECT name FROM pragma_table_info('{name}')");
        let mut info = app.prepare(&sql).unwrap();
        let columns: Vec<String> = info.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
        let quoted = columns.iter().map(|c| format!("quote({c}) || ':' || typeof({c})"));
        let first = format!("quote({})", columns[0]);
        let rowid = if name == "nokey" { "rowid || '|' ||" } else { "" };
        let all = quoted.collect::<Vec<_>>().join(" || '|' || ");
        let sql = format!("SELECT {rowid} {first} || '|' || {all} FROM {name} ORDER BY 1");
        let mut rows = app.prepare(&sql).unwrap();
        out.insert(name, rows.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect());
    }
    out
}
