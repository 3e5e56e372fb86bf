//! Histories: what happens to a world, step by step, made from a seed alone. Invariant: a history does not depend on
//! what it causes, so that a part of it can be run as well as the whole.

use std::collections::BTreeSet;
use std::fmt;

use litemesh::fabric::memory::Weather;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What an application writes.
#[derive(Debug, Clone)]
pub enum Op {
    /// A statement whose effect nobody follows.
    Sql(String),
    /// A statement on one row whose effect the truth follows.
    Row { table: &'static str, key: String, sql: String, what: Effect },
}

/// What a statement on one row does, if it does anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    Insert,
    Update,
    Delete,
}

impl Op {
    pub fn sql(&self) -> &str {
        match self {
            Self::Sql(sql) | Self::Row { sql, .. } => sql,
        }
    }
}

/// When within its turn a node is killed.
#[derive(Debug, Clone, Copy)]
pub enum Moment {
    /// Before it does anything.
    Now,
    /// When its transactions are on the disk and nothing is sent.
    BeforeSending,
    /// When this many messages are sent.
    Sent(usize),
}

#[derive(Debug, Clone)]
pub enum What {
    Write {
        node: usize,
        ops: Vec<Op>,
        rollback: bool,
    },
    Cut {
        a: usize,
        b: usize,
        both: bool,
    },
    Heal,
    Kill {
        node: usize,
        moment: Moment,
    },
    Start {
        node: usize,
    },
    /// Time goes on: long enough for deletes to be forgotten.
    Sleep {
        ms: u64,
    },
    /// A new node gets a copy of another's file.
    Join {
        from: usize,
    },
    /// A node is gone for ever, with what nobody has of it.
    Leave {
        node: usize,
    },
    /// Somebody copies the file away.
    Backup {
        node: usize,
    },
    /// The file is replaced by that copy, while the node is down.
    Restore {
        node: usize,
    },
    /// A row is put in behind litemesh's back: not a part of generated histories, but of the test of the tests.
    Tamper {
        node: usize,
    },
}

#[derive(Debug, Clone)]
pub struct Step {
    pub wait_ms: u64,
    pub what: What,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "+{} ms ", self.wait_ms)?;
        match &self.what {
            What::Write { node, ops, rollback } => {
                let sql: Vec<&str> = ops.iter().map(Op::sql).collect();
                write!(f, "n{node} writes: {}{}", sql.join("; "), if *rollback { "; ROLLBACK" } else { "" })
            }
            other => write!(f, "{other:?}"),
        }
    }
}

/// What kind of world it is.
#[derive(Clone, Copy)]
pub struct Options {
    pub name: &'static str,
    pub nodes: (usize, usize),
    pub steps: usize,
    pub weather: Weather,
    pub cuts: f64,
    pub kills: f64,
    pub moves: f64,
    pub tables: Tables,
    /// Probability, in each step, that much time goes on, in which deletes are forgotten.
    pub sleeps: f64,
}

/// How long deletes are remembered where they are forgotten, and how long a member holds that up.
pub const FORGET_MS: (u64, u64) = (300, 2_500);

/// What tables there are, and how they are written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Tables {
    /// Of many shapes, written at random.
    Many,
    /// With UNIQUE columns.
    Uniques,
    /// Few rows, whose every write is followed.
    Followed,
    /// The same, with rows that are merged as a whole.
    FollowedWhole,
}

impl Tables {
    /// Whether the truth follows every write.
    pub fn are_followed(self) -> bool {
        matches!(self, Self::Followed | Self::FollowedWhole)
    }
}

const CALM: Weather = Weather { drop: 0.0, duplicate: 0.0, max_delay_ms: 5 };
const STORM: Weather = Weather { drop: 0.15, duplicate: 0.15, max_delay_ms: 400 };

/// The worlds there are.
pub const WORLDS: [Options; 7] = [
    Options {
        name: "good-network",
        nodes: (2, 4),
        steps: 60,
        weather: CALM,
        cuts: 0.0,
        kills: 0.0,
        moves: 0.0,
        tables: Tables::Many,
        sleeps: 0.0,
    },
    Options {
        name: "bad-network",
        nodes: (2, 7),
        steps: 100,
        weather: STORM,
        cuts: 0.03,
        kills: 0.04,
        moves: 0.02,
        tables: Tables::Many,
        sleeps: 0.0,
    },
    Options {
        name: "uniques",
        nodes: (2, 4),
        steps: 100,
        weather: STORM,
        cuts: 0.03,
        kills: 0.03,
        moves: 0.01,
        tables: Tables::Uniques,
        sleeps: 0.0,
    },
    Options {
        name: "conflicts",
        nodes: (2, 5),
        steps: 50,
        weather: STORM,
        cuts: 0.05,
        kills: 0.04,
        moves: 0.0,
        tables: Tables::Followed,
        sleeps: 0.0,
    },
    Options {
        name: "whole-rows",
        nodes: (2, 4),
        steps: 50,
        weather: STORM,
        cuts: 0.05,
        kills: 0.04,
        moves: 0.0,
        tables: Tables::FollowedWhole,
        sleeps: 0.0,
    },
    Options {
        name: "conflicts-and-moves",
        nodes: (2, 4),
        steps: 60,
        weather: STORM,
        cuts: 0.05,
        kills: 0.04,
        moves: 0.02,
        tables: Tables::Followed,
        sleeps: 0.0,
    },
    Options {
        name: "forgetting",
        nodes: (2, 5),
        steps: 100,
        weather: STORM,
        cuts: 0.03,
        kills: 0.05,
        moves: 0.02,
        tables: Tables::Many,
        sleeps: 0.08,
    },
];

/// A world and what happens to it.
pub struct History {
    pub options: Options,
    pub seed: u64,
    pub nodes: usize,
    pub steps: Vec<Step>,
}

impl History {
    pub fn new(options: Options, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let nodes = random.random_range(options.nodes.0..=options.nodes.1);
        let mut made = Maker { options, random, nodes, written: 0 };
        let mut steps = Vec::new();
        while steps.len() < options.steps {
            made.step(&mut steps);
        }
        Self { options, seed, nodes, steps }
    }

    /// The steps of these numbers.
    pub fn part(&self, keep: &BTreeSet<usize>) -> Self {
        let steps = self.steps.iter().enumerate().filter(|(i, _)| keep.contains(i));
        let steps = steps.map(|(_, s)| s.clone()).collect();
        Self { options: self.options, seed: self.seed, nodes: self.nodes, steps }
    }
}

struct Maker {
    options: Options,
    random: StdRng,
    nodes: usize,
    written: u64,
}

impl Maker {
    fn step(&mut self, steps: &mut Vec<Step>) {
        let r = &mut self.random;
        let mut add = |wait_ms, what| steps.push(Step { wait_ms, what });
        let (a, b) = (r.random_range(0..self.nodes), r.random_range(0..self.nodes));
        if r.random_bool(self.options.cuts) {
            add(0, What::Cut { a, b, both: r.random_bool(0.7) });
        }
        if r.random_bool(self.options.cuts) {
            add(0, What::Heal);
        }
        if r.random_bool(self.options.kills) {
            let moment = match r.random_range(0..4) {
                0 => Moment::Now,
                1 | 2 => Moment::BeforeSending,
                _ => Moment::Sent(r.random_range(1..6)),
            };
            add(0, What::Kill { node: a, moment });
        }
        if self.options.kills > 0.0 && r.random_bool(0.1) {
            add(0, What::Start { node: b });
        }
        if r.random_bool(self.options.moves) && self.nodes < 7 {
            add(0, What::Join { from: a });
            self.nodes += 1;
        }
        if r.random_bool(self.options.moves) {
            add(0, What::Leave { node: b });
        }
        // Whoever follows every write would have to follow those that a restored file makes again.
        if !self.options.tables.are_followed() && r.random_bool(self.options.moves * 2.0) {
            add(0, if r.random_bool(0.5) { What::Backup { node: a } } else { What::Restore { node: a } });
        }
        if r.random_bool(self.options.sleeps) {
            add(0, What::Sleep { ms: r.random_range(300..5_000) });
        }
        let (node, rollback) = (r.random_range(0..self.nodes), r.random_bool(0.1));
        let wait_ms = r.random_range(1..120);
        let count = r.random_range(1..5);
        let ops = (0..count).map(|_| self.op(node)).collect();
        steps.push(Step { wait_ms, what: What::Write { node, ops, rollback } });
    }

    fn op(&mut self, node: usize) -> Op {
        match self.options.tables {
            Tables::Many => Op::Sql(self.many(node)),
            Tables::Uniques if self.random.random_bool(0.6) => Op::Sql(self.unique()),
            Tables::Uniques => Op::Sql(self.many(node)),
            Tables::Followed | Tables::FollowedWhole => self.followed(),
        }
    }

    fn followed(&mut self) -> Op {
        self.written += 1;
        let r = &mut self.random;
        let (id, other, n) = (r.random_range(1..9), r.random_range(1..5), r.random_range(0..6));
        let kid = format!("k{}", r.random_range(0..4));
        let row = |table, key: String, sql: String, what| Op::Row { table, key, sql, what };
        let key = id.to_string();
        match r.random_range(0..20) {
            0..3 => row("cell", key, format!("INSERT INTO cell VALUES({id}, {n}, 'x')"), Effect::Insert),
            3 => row("cell", key, format!("REPLACE INTO cell VALUES({id}, {n}, 'y')"), Effect::Insert),
            4..7 => row("cell", key, format!("UPDATE cell SET a = {n} WHERE id = {id}"), Effect::Update),
            7..10 => row("cell", key, format!("UPDATE cell SET b = 'b{n}' WHERE id = {id}"), Effect::Update),
            10 => row(
                "cell",
                key,
                format!("UPDATE cell SET a = {n}, b = 'c{n}' WHERE id = {id}"),
                Effect::Update,
            ),
            11..14 => row("cell", key, format!("DELETE FROM cell WHERE id = {id}"), Effect::Delete),
            14 | 15 => {
                let key = format!("{kid}-{}", self.written);
                let sql = format!("INSERT INTO kid VALUES('{key}', {id}, {n})");
                row("kid", key, sql, Effect::Insert)
            }
            16 => {
                row("kid", kid.clone(), format!("INSERT INTO kid VALUES('{kid}', {id}, {n})"), Effect::Insert)
            }
            17 => row(
                "kid",
                kid.clone(),
                format!("UPDATE kid SET cell = {other}, v = {n} WHERE id = '{kid}'"),
                Effect::Update,
            ),
            18 => row("kid", kid.clone(), format!("DELETE FROM kid WHERE id = '{kid}'"), Effect::Delete),
            _ => {
                let key = format!("{id}/{other}");
                row("line", key, format!("REPLACE INTO line VALUES({id}, {other}, {n})"), Effect::Insert)
            }
        }
    }

    fn unique(&mut self) -> String {
        let r = &mut self.random;
        let (id, other, n) = (r.random_range(1..8), r.random_range(1..8), r.random_range(0..100));
        let or = ["", "", "OR REPLACE", "OR IGNORE"][r.random_range(0..4)];
        let mail = ["NULL".to_owned(), format!("'m{}'", r.random_range(0..5))][r.random_range(0..2)].clone();
        let nick = format!("'{}{}'", ["N", "n"][r.random_range(0..2)], r.random_range(0..6));
        match r.random_range(0..7) {
            0 | 1 => format!("INSERT {or} INTO person VALUES({id}, {mail}, {nick}, {}, {})", n % 2, n % 3),
            2 => format!("UPDATE {or} person SET mail = {mail} WHERE id = {id}"),
            3 => format!("UPDATE {or} person SET nick = {nick}, seat = {} WHERE id = {id}", n % 3),
            4 => format!("UPDATE {or} person SET id = {other} WHERE id = {id}"),
            5 => format!(
                "UPDATE person SET mail = mail || '-' WHERE id IN ({id}, {other});
                 UPDATE OR IGNORE person SET mail = (SELECT p.mail FROM person p WHERE p.id = {other}) WHERE id = {id}"
            ),
            _ => format!("DELETE FROM person WHERE id = {id}"),
        }
    }

    fn many(&mut self, node: usize) -> String {
        self.written += 1;
        let r = &mut self.random;
        let (id, other, n) = (r.random_range(1..8), r.random_range(1..8), r.random_range(0..100));
        let or = ["", "", "OR REPLACE", "OR IGNORE"][r.random_range(0..4)];
        if self.options.sleeps > 0.0 && r.random_bool(0.2) {
            let (whose, which) = (r.random_range(0..self.nodes), r.random_range(0..=self.written));
            return format!("DELETE FROM mine WHERE id = '{whose}-{which}' RETURNING id");
        }
        let which = r.random_range(0..14);
        plain_statement(which, (id, other, n), or).unwrap_or_else(|| {
            // The key says who inserts it: nobody else does, and nobody deletes it.
            format!("INSERT INTO mine VALUES('{node}-{}', {n})", self.written)
        })
    }
}

/// Numbers as people write them: `1,4-7`.
pub fn parse_keep(text: &str) -> BTreeSet<usize> {
    let number = |t: &str| t.trim().parse::<usize>().expect("LITEMESH_SIM_KEEP is a list such as 1,4-7");
    let ranges = text.split(',').filter(|t| !t.is_empty()).map(|t| match t.split_once('-') {
        Some((a, b)) => number(a)..=number(b),
        None => number(t)..=number(t),
    });
    ranges.flatten().collect()
}

pub fn show_keep(keep: &BTreeSet<usize>) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for &i in keep {
        match ranges.last_mut() {
            Some((_, end)) if *end + 1 == i => *end = i,
            _ => ranges.push((i, i)),
        }
    }
    let text = ranges.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") });
    text.collect::<Vec<_>>().join(",")
}

/// Removes steps as long as `fails` still holds: halves, quarters, …, single steps.
pub fn shrink(count: usize, mut fails: impl FnMut(&BTreeSet<usize>) -> bool) -> BTreeSet<usize> {
    let mut keep: BTreeSet<usize> = (0..count).collect();
    let mut size = count.div_ceil(2).max(1);
    loop {
        let mut removed = false;
        let all: Vec<usize> = keep.iter().copied().collect();
        for chunk in all.chunks(size) {
            let fewer: BTreeSet<usize> = keep.iter().copied().filter(|i| !chunk.contains(i)).collect();
            if fails(&fewer) {
                keep = fewer;
                removed = true;
            }
        }
        match (size, removed) {
            (1, false) => return keep,
            (1, true) => {}
            _ => size = size.div_ceil(2),
        }
    }
}

/// A statement on the tables that every world has; none for numbers from 12 on, which are for each world to fill.
pub fn plain_statement(which: u32, (id, other, n): (usize, i32, i32), or: &str) -> Option<String> {
    Some(match which {
        0 => format!("INSERT {or} INTO item VALUES({id}, {n}, 'b{n}', {n}.5)"),
        1 => {
            format!("INSERT INTO item VALUES({id}, {n}, 'u', 0) ON CONFLICT DO UPDATE SET a = excluded.a")
        }
        2 => format!("UPDATE item SET a = {n} WHERE id = {id}"),
        3 => format!("UPDATE item SET b = 'b{n}', c = {n} WHERE id >= {id}"),
        4 => format!("DELETE FROM item WHERE id = {id}"),
        5 => format!("UPDATE {or} item SET id = {other} WHERE id = {id}"),
        6 => format!("INSERT {or} INTO pair VALUES('{}', {other}, {n})", ["k", "K", "ü"][id % 3]),
        7 => format!("UPDATE pair SET v = {n} WHERE x = 'k'"),
        8 => format!("UPDATE {or} pair SET x = '{}' WHERE y = {other}", ["k", "K"][id % 2]),
        9 => format!("DELETE FROM pair WHERE y = {other}"),
        10 => format!(
            "SAVEPOINT s; DELETE FROM item; ROLLBACK TO s; RELEASE s; UPDATE item SET b = b WHERE id = {id}"
        ),
        11 => format!("INSERT INTO nokey VALUES({n})"),
        _ => return None,
    })
}
