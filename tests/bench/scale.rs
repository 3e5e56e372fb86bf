//! What a mesh costs as it grows, counted and not timed: the protocol's own engines over files in memory, every message
//! encoded as it travels and handed to whom it is for. What NATS adds to it is not in here.

use std::time::{Duration, Instant};

use bytes::Bytes;
use litemesh::core::message::{CommitHeader, Fragment, Hello, Holding, Message, decode, encode};
use litemesh::core::names::NodeName;
use litemesh::core::schema::SchemaMode;
use litemesh::core::vector::{Point, Vector};
use litemesh::core::version::{Hlc, SiteId};
use litemesh::replica::adopt;
use litemesh::replica::engine::{Action, Engine};
use litemesh::replica::send::{commit_pieces, message_pieces};
use litemesh::replica::store::Store;
use rusqlite::Connection;

use super::report::{Asked, Report};

const START_MS: u64 = 1_900_000_000_000;
/// How often nodes say hello, in seconds (`daemon::router`).
const HELLO_EVERY_S: f64 = 2.0;
/// Simulated seconds, one write a node in each.
const SECONDS: u64 = 3;

struct Peer {
    name: NodeName,
    site: SiteId,
    engine: Engine,
    app: Connection,
}

/// What was sent, in messages and bytes: once by its sender, however many hear it.
#[derive(Default, Clone, Copy)]
struct Sent {
    commits: u64,
    commit_bytes: u64,
    holdings: u64,
    holding_bytes: u64,
    asides: u64,
    taken: Duration,
}

struct Mesh {
    peers: Vec<Peer>,
    sent: Sent,
}

impl Mesh {
    fn new(nodes: usize) -> Self {
        let peer = |i: usize| {
            let uri = format!("file:scale-{nodes}-{i}?mode=memory&cache=shared");
            let app = Connection::open(&uri).unwrap();
            app.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT)").unwrap();
            // Sites are random numbers of 64 bits.
            let site = SiteId((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            adopt::install(&app, 7, site).unwrap();
            let conn = Connection::open(&uri).unwrap();
            let spool = std::env::temp_dir();
            let store = Store::with_connection(conn, &spool, Box::new(|_| true), SchemaMode::Manual).unwrap();
            let engine = Engine::new("app".parse().unwrap(), store, &spool);
            Peer { name: format!("node-{i:03}").parse().unwrap(), site, engine, app }
        };
        Self { peers: (0..nodes).map(peer).collect(), sent: Sent::default() }
    }

    /// Performs what the engines want until they want nothing more at this moment.
    fn settle(&mut self, now_ms: u64) {
        for at in 0..self.peers.len() {
            self.peers[at].engine.settle(now_ms).unwrap();
        }
        loop {
            let wanted: Vec<Vec<Action>> = self.peers.iter_mut().map(|p| p.engine.take_actions()).collect();
            if wanted.iter().all(Vec::is_empty) {
                return;
            }
            for (from, actions) in wanted.into_iter().enumerate() {
                for action in actions {
                    self.perform(from, action, now_ms);
                }
            }
            for peer in &mut self.peers {
                let started = Instant::now();
                peer.engine.settle(now_ms).unwrap();
                self.sent.taken += started.elapsed();
            }
        }
    }

    fn perform(&mut self, from: usize, action: Action, now_ms: u64) {
        match action {
            Action::Publish(mut own) => {
                let mut pieces: Vec<Bytes> = Vec::new();
                commit_pieces(&mut own, |p| pieces.push(p)).unwrap();
                self.sent.commits += 1;
                self.sent.commit_bytes += pieces.iter().map(|p| p.len() as u64).sum::<u64>();
                let site = self.peers[from].site;
                let started = Instant::now();
                for (_, peer) in self.peers.iter_mut().enumerate().filter(|(i, _)| *i != from) {
                    for piece in &pieces {
                        peer.engine.on_fragment(site, &decode::<Fragment>(piece).unwrap()).unwrap();
                    }
                }
                self.sent.taken += started.elapsed();
            }
            Action::Broadcast(message) => self.tell(from, None, &message, now_ms),
            Action::Send(to, message) => self.tell(from, Some(to), &message, now_ms),
            Action::ReadLog(_) => unreachable!("nothing is lost here"),
            Action::Warn(text) => panic!("{text}"),
        }
    }

    fn tell(&mut self, from: usize, to: Option<NodeName>, message: &Message, now_ms: u64) {
        let mut bytes = 0;
        message_pieces(message, |p| bytes += p.len() as u64);
        match to {
            None => {
                self.sent.holdings += 1;
                self.sent.holding_bytes += bytes;
            }
            Some(_) => self.sent.asides += 1,
        }
        let name = self.peers[from].name.clone();
        let started = Instant::now();
        for (_, peer) in self.peers.iter_mut().enumerate().filter(|(i, _)| *i != from) {
            if to.as_ref().is_none_or(|to| *to == peer.name) {
                peer.engine.on_message(&name, message.clone(), now_ms).unwrap();
            }
        }
        self.sent.taken += started.elapsed();
    }

    /// A second in which so many nodes write a row, each in a transaction.
    fn second(&mut self, second: u64, writers: usize) {
        let now_ms = START_MS + 1_000 * second;
        for (i, peer) in self.peers.iter().enumerate().take(writers) {
            let id = second as i64 * 1_000_000 + i as i64;
            peer.app
                .execute(
                    "INSERT INTO t VALUES(?1, 'one row of some fifty bytes, as programs write them')",
                    [id],
                )
                .unwrap();
        }
        self.settle(now_ms);
        for peer in &mut self.peers {
            peer.engine.announce(now_ms);
        }
        self.settle(now_ms);
    }
}

/// What each node receives and does when every node writes one row a second, and when one alone does.
fn measure(report: &mut Report, nodes: usize) {
    let mut mesh = Mesh::new(nodes);
    mesh.second(0, nodes);
    let meeting = mesh.sent;
    let mut note = |what: &str, unit, value: f64| {
        report.note(&format!("scale, {nodes} nodes: {what}"), unit, vec![value], Asked::Nothing);
    };
    let met = meeting.asides + (meeting.commits + meeting.holdings) * (nodes as u64 - 1);
    note("messages received when all meet at once, all nodes", "", met as f64);
    for (told, writers) in [("every node writes", nodes), ("one node writes", 1)] {
        mesh.sent = Sent::default();
        let first = if writers == 1 { 1 + SECONDS } else { 1 };
        (first..first + SECONDS).for_each(|s| mesh.second(s, writers));
        let sent = mesh.sent;
        let per_node =
            |total: u64| total as f64 / SECONDS as f64 * (nodes - 1) as f64 / nodes as f64 / 1_024.0;
        note(
            &format!("{told}: a commit of one row"),
            "bytes",
            sent.commit_bytes as f64 / sent.commits as f64,
        );
        note(
            &format!("{told}: a vector that is told"),
            "bytes",
            sent.holding_bytes as f64 / sent.holdings as f64,
        );
        note(&format!("{told}: commits that a node receives"), "KiB/s", per_node(sent.commit_bytes));
        note(&format!("{told}: vectors that a node receives"), "KiB/s", per_node(sent.holding_bytes));
        let busy_ms = sent.taken.as_secs_f64() * 1_000.0 / SECONDS as f64 / nodes as f64;
        note(&format!("{told}: time of a node's thread"), "ms/s", busy_ms);
    }
    let hello = Hello { version: "0.1.0".to_owned(), now_ms: START_MS, dbs: vec!["app".parse().unwrap()] };
    let hello_bytes = encode(&Message::Hello(hello)).len() as f64;
    note("hellos that a node receives", "KiB/s", hello_bytes * (nodes - 1) as f64 / HELLO_EVERY_S / 1_024.0);
    let rows = |p: &Peer| -> i64 { p.app.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap() };
    let all = (nodes as u64 * (1 + SECONDS) + SECONDS) as i64;
    assert!(mesh.peers.iter().all(|p| rows(p) == all), "every node has every row");
}

/// What travels in a mesh of so many nodes, without running it: the work of all its nodes would take a machine hours.
fn sizes(report: &mut Report, nodes: usize) {
    let site = |i: usize| SiteId((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let hlc = |i: usize| Hlc::from_ms(START_MS + i as u64);
    let seen = (1..nodes).map(|i| (site(i), 100_000 + i as u64, hlc(i))).collect();
    let id = 0x1234_5678_9abc_def0;
    let header = CommitHeader { from: 100_000, to: 100_001, id, prev: id + 1, hlc: hlc(0), seen, rows: 1 };
    let vector = Vector((0..nodes).map(|i| (site(i), Point { n: 100_000, hlc: hlc(i), id })).collect());
    let collected = vector.clone();
    let db = "app".parse().unwrap();
    let (lineage, lsn, joining, left) = (id, 100_000 * nodes as u64, Vec::new(), Vec::new());
    let holding =
        Holding { db, lineage, site: site(0), vector, lsn, answer: false, collected, joining, left };
    let mut note = |what: &str, unit, value: f64| {
        report.note(&format!("scale, {nodes} nodes, long in use: {what}"), unit, vec![value], Asked::Nothing);
    };
    let (commit, told) = (encode(&header).len() as f64, encode(&Message::Holding(holding)).len() as f64);
    note("a commit's header", "bytes", commit);
    note("a vector that is told", "bytes", told);
    note("vectors that a node receives while any node writes", "KiB/s", told * (nodes - 1) as f64 / 1_024.0);
    note(
        "headers that a node receives when every node writes once a second",
        "KiB/s",
        commit * (nodes - 1) as f64 / 1_024.0,
    );
}

pub fn scale(report: &mut Report) {
    for nodes in [5, 50, 150] {
        measure(report, nodes);
    }
    for nodes in [5, 50, 500] {
        sizes(report, nodes);
    }
}
