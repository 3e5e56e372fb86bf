//! What catching up costs those who write meanwhile: on the node that was there, and on the one that was away.

use std::time::{Duration, Instant};

use super::support::{Node, pair, wait_for};
use super::writer::{Phase, Writer};
use super::{INSERT, SCHEMA, open, resident_mib, transactions};

const ROWS: i64 = 500_000;
const SIZE: i64 = 100;
const QUIET: Duration = Duration::from_secs(8);
const WRITE: &str = "INSERT INTO t VALUES(?1, 'meanwhile', 1, 0.5)";

/// Where the writer is, and at what pace.
pub fn catchup() {
    for (at, here) in [("the node that was there", true), ("the node that catches up", false)] {
        for (pace, told) in [(Some(Duration::from_millis(5)), "at 200 tx/s"), (None, "as fast as it can")] {
            measure(at, here, pace, told);
        }
    }
}

fn measure(at: &str, here: bool, pace: Option<Duration>, told: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), SCHEMA);
    a.sync();
    b.stop();
    transactions(&mut open(&a.file("app.db")), 1, ROWS / SIZE, SIZE, INSERT);
    wait_for("the log has it", || a.status()["fabric"]["log_unacked"] == 0);
    let file = if here { a.file("app.db") } else { b.file("app.db") };
    // Without: the same node, the same file, nobody catches up. Its own rows are captured all the same.
    let writer = Writer::start(&file, WRITE, 100_000_000, pace);
    std::thread::sleep(QUIET);
    writer.next_phase();
    b.start(None);
    let started = Instant::now();
    let peer = open(&b.file("app.db"));
    let count =
        || -> i64 { peer.query_row("SELECT count(*) FROM t WHERE id <= ?1", [ROWS], |r| r.get(0)).unwrap() };
    writer.next_phase();
    while count() < ROWS {
        std::thread::sleep(Duration::from_millis(100));
    }
    let took = started.elapsed().as_secs_f64();
    writer.next_phase();
    std::thread::sleep(QUIET);
    let phases = writer.end();
    let source = |n: &Node, field: &str| n.status()["databases"][0][field].as_u64().unwrap_or_default();
    println!(
        "catchup, {ROWS} rows in transactions of {SIZE}: {:.0} rows/s ({took:.1} s; {} pieces of the log, {} times rows); \
         resident at most {} and {} MiB",
        ROWS as f64 / took,
        source(&b, "logged_pieces"),
        source(&b, "peer_syncs"),
        resident_mib(a.process.as_ref().unwrap().id()),
        resident_mib(b.process.as_ref().unwrap().id())
    );
    let tell =
        |when: &str, phase: &Phase| println!("catchup: a writer on {at}, {told}, {when}: {}", phase.told());
    tell("peer away", &phases[0]);
    tell("meanwhile", &phases[2]);
    tell("afterwards, both up", &phases[3]);
}
