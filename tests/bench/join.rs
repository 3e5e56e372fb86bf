//! A node that joins with a large file, from a peer that is being written to.

use std::path::Path;
use std::time::{Duration, Instant};

use super::open;
use super::report::{Asked, Report, median};
use super::support::{Node, wait_for};
use super::writer::Writer;

const MIB: f64 = (1 << 20) as f64;
const SCHEMA: &str =
    "CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB); CREATE TABLE w(id INTEGER PRIMARY KEY, n INTEGER)";
/// Rows of about a kibibyte: a file of one GiB.
const ROWS: i64 = 786_000;
/// 200 transactions a second.
const PACE: Duration = Duration::from_millis(5);
const ROUNDS: i64 = 5;
const QUIET: Duration = Duration::from_secs(10);
const INSERT: &str = "INSERT INTO w VALUES(?1, ?1)";

fn fill(path: &Path) {
    let conn = open(path);
    conn.execute_batch(SCHEMA).unwrap();
    let sql = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < ?1)
               INSERT INTO t SELECT i, randomblob(1024) FROM c";
    conn.execute(sql, [ROWS]).unwrap();
    conn.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
}

/// `cp` and an fsync of the same file: what the disk allows.
fn copied_mib_per_s(from: &Path, to: &Path) -> f64 {
    let size = std::fs::metadata(from).unwrap().len();
    let started = Instant::now();
    std::fs::copy(from, to).unwrap();
    std::fs::File::open(to).unwrap().sync_all().unwrap();
    let took = started.elapsed();
    std::fs::remove_file(to).unwrap();
    size as f64 / MIB / took.as_secs_f64()
}

/// The bytes that are there of a copy on its way.
fn on_its_way(node: &Node) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(node.file("app.db.litemesh-join")).map_or(0, |m| m.blocks() * 512)
}

fn log_line(node: &Node, with: &str) -> String {
    let log = node.log.lock().unwrap();
    let found = log.iter().rev().find(|l| l.contains(with)).cloned();
    let line = found.unwrap_or_else(|| panic!("no {with:?} in the log"));
    line.split_once(with).map(|(_, rest)| format!("{with}{rest}")).unwrap_or_default()
}

pub fn join(report: &mut Report) {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    let file = a.file("app.db");
    fill(&file);
    let size_mib = std::fs::metadata(&file).unwrap().len() as f64 / MIB;
    a.start(None);
    let (mut rates, mut waits, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let cp = copied_mib_per_s(&file, &dir.path().join("cp"));
        let mut b = Node::new(dir.path(), &format!("b{round}"), &["app.db"]);
        let writer = Writer::start(&file, INSERT, round * 1_000_000, Some(PACE));
        std::thread::sleep(QUIET);
        writer.next_phase();
        let started = Instant::now();
        b.start(Some(&a.token()));
        let took = started.elapsed();
        let phases = writer.end();
        let rate = size_mib / took.as_secs_f64();
        println!(
            "join, {size_mib:.0} MiB: {:.1} s from the command to ready, {rate:.0} MiB/s ({:.2} of cp and fsync, {cp:.0} MiB/s); {}",
            took.as_secs_f64(),
            rate / cp,
            log_line(&b, "fetched ")
        );
        println!("join: the peer's writer at 200 tx/s, without: {}", phases[0].told());
        println!("join: the peer's writer at 200 tx/s, meanwhile: {}", phases[1].told());
        rates.push(rate);
        waits.push(phases[1].at(99.0) / phases[0].at(99.0));
        alone.push(phases[0].at(99.0));
        check_equal(&a, &b);
        b.stop();
        std::fs::remove_dir_all(&b.home).unwrap();
    }
    report.note(
        "1 GiB of a peer that is written to, command to ready",
        "MiB/s",
        rates,
        Asked::AtLeast(150.0),
    );
    let whole = ("without, ms", median(&alone));
    report.note_ratio("its writer's p99 meanwhile", waits, whole, Asked::AtMost(2.0));
    cut(&a, dir.path(), size_mib);
}

/// Killed in the middle, it goes on from where it was.
fn cut(a: &Node, dir: &Path, size_mib: f64) {
    let mut b = Node::new(dir, "cut", &["app.db"]);
    let writer = Writer::start(&a.file("app.db"), INSERT, 10_000_000, Some(PACE));
    std::thread::sleep(QUIET);
    writer.next_phase();
    let half = (size_mib * MIB / 2.0) as u64;
    b.spawn(Some(&a.token()));
    wait_for("half of it is there", || on_its_way(&b) > half);
    b.kill();
    let there = on_its_way(&b);
    let started = Instant::now();
    b.start(Some(&a.token()));
    let took = started.elapsed().as_secs_f64();
    let phases = writer.end();
    println!(
        "join, killed with {:.0} of {size_mib:.0} MiB there: {took:.1} s from its second start to ready; {}",
        there as f64 / MIB,
        log_line(&b, "fetched ")
    );
    println!("join, killed: the peer's writer at 200 tx/s, without: {}", phases[0].told());
    println!("join, killed: the peer's writer at 200 tx/s, meanwhile: {}", phases[1].told());
    check_equal(a, &b);
}

fn check_equal(a: &Node, b: &Node) {
    a.sync();
    let sums = "SELECT count(*) || ' ' || sum(length(v)) || ' ' || hex(max(v)) || ' ' || hex(min(v)) FROM t";
    assert_eq!(a.text("app.db", sums), b.text("app.db", sums), "the rows of the copy");
    let written = "SELECT count(*) || ' ' || sum(n) FROM w";
    wait_for("what was written meanwhile", || a.text("app.db", written) == b.text("app.db", written));
    assert_eq!(b.text("app.db", "PRAGMA quick_check"), "ok");
}
