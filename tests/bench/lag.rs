//! How long a commit takes from COMMIT to visible on the peer, and how long its writer waited.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::report::{Asked, Report, at, median};
use super::support::{self, Node};
use super::{INSERT, SCHEMA, open, transactions};

const STAMPED: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, at_us INTEGER)";
/// 200 transactions a second.
const PACE: Duration = Duration::from_millis(5);

/// What 200 single-row transactions a second saw, in milliseconds.
struct Seen {
    lags: Vec<f64>,
    waits: Vec<f64>,
}

/// Writes `count` rows into `from` at a steady pace, and looks for each in `to`.
fn steady(from: &Path, to: &Path, count: i64) -> Seen {
    let (peer, begin) = (open(to), Instant::now());
    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        let mut statement = peer.prepare("SELECT id, at_us FROM t WHERE id > ?1 ORDER BY id").unwrap();
        let mut version = peer.prepare("PRAGMA data_version").unwrap();
        let (mut last, mut last_version) = (0i64, 0i64);
        while last < count {
            let now: i64 = version.query_row([], |r| r.get(0)).unwrap();
            if now == last_version {
                std::thread::sleep(Duration::from_micros(100));
                continue;
            }
            last_version = now;
            let rows =
                statement.query_map([last], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, i64>(1)?))).unwrap();
            for (id, at_us) in rows.map(Result::unwrap) {
                seen.push((begin.elapsed().as_micros() as i64 - at_us) as f64 / 1_000.0);
                last = id;
            }
        }
        seen
    });
    let waits = write_steadily(from, count, begin);
    Seen { lags: reader.join().unwrap(), waits }
}

/// Writes `count` rows at a steady pace; how long each took, in milliseconds.
fn write_steadily(path: &Path, count: i64, begin: Instant) -> Vec<f64> {
    let app = open(path);
    let mut waits = Vec::new();
    for id in 1..=count {
        std::thread::sleep((PACE * id as u32).saturating_sub(begin.elapsed()));
        let before = begin.elapsed();
        app.execute("INSERT INTO t VALUES(?1, ?2)", (id, before.as_micros() as i64)).unwrap();
        waits.push((begin.elapsed() - before).as_secs_f64() * 1_000.0);
    }
    waits
}

/// Loads rows until it is stopped; how many a second.
fn load(path: &Path, stop: &Arc<AtomicBool>) -> JoinHandle<f64> {
    let (stopped, mut bulk) = (stop.clone(), open(path));
    std::thread::spawn(move || {
        let (mut rows, started) = (0, Instant::now());
        while !stopped.load(Ordering::Relaxed) {
            transactions(&mut bulk, rows + 1, 1, 1_000, INSERT);
            rows += 1_000;
        }
        rows as f64 / started.elapsed().as_secs_f64()
    })
}

/// A writer's worst wait beside a load of another file when both are bare SQLite.
fn bare_wait_beside_bulk(dir: &Path) -> f64 {
    let (app, bulk) = (dir.join("bare.db"), dir.join("bare-bulk.db"));
    open(&app).execute_batch(STAMPED).unwrap();
    open(&bulk).execute_batch(SCHEMA).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let loader = load(&bulk, &stop);
    let waits = write_steadily(&app, 1_000, Instant::now());
    stop.store(true, Ordering::Relaxed);
    loader.join().unwrap();
    at(&waits, 100.0)
}

/// What 200 single-row transactions a second do when nothing else goes on.
pub fn alone(report: &mut Report) {
    let (mut p50, mut p99, mut worst, mut waits, mut wal) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = support::pair(dir.path(), STAMPED);
        let seen = steady(&a.file("app.db"), &b.file("app.db"), 2_000);
        p50.push(at(&seen.lags, 50.0));
        p99.push(at(&seen.lags, 99.0));
        worst.push(at(&seen.lags, 100.0));
        waits.push(at(&seen.waits, 100.0));
        let bytes = |n: &Node| std::fs::metadata(n.file("app.db-wal")).map_or(0, |m| m.len());
        wal.push(bytes(&a).max(bytes(&b)) as f64 / f64::from(1 << 20));
    }
    report.note("lag at 200 tx/s, p50", "ms", p50, Asked::AtMost(2.0));
    report.note("lag at 200 tx/s, p99", "ms", p99, Asked::AtMost(5.0));
    report.note("lag at 200 tx/s, worst", "ms", worst, Asked::Nothing);
    report.note("lag at 200 tx/s, a writer's worst wait", "ms", waits, Asked::AtMost(50.0));
    report.note("WAL at 200 tx/s, the larger of both nodes'", "MiB", wal, Asked::AtMost(8.0));
}

/// The same while another database of the same two nodes is loaded with rows.
pub fn beside_bulk(report: &mut Report) {
    let (mut p50, mut p99, mut waits, mut rates, mut bare) = (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        bare.push(bare_wait_beside_bulk(dir.path()));
        let files = ["app.db", "bulk.db"];
        let (mut a, mut b) = (Node::new(dir.path(), "a", &files), Node::new(dir.path(), "b", &files));
        a.exec("app.db", STAMPED);
        a.exec("bulk.db", SCHEMA);
        a.start(None);
        b.start(Some(&a.token()));
        let stop = Arc::new(AtomicBool::new(false));
        let loader = load(&a.file("bulk.db"), &stop);
        std::thread::sleep(Duration::from_secs(1));
        let seen = steady(&a.file("app.db"), &b.file("app.db"), 2_000);
        stop.store(true, Ordering::Relaxed);
        rates.push(loader.join().unwrap());
        p50.push(at(&seen.lags, 50.0));
        p99.push(at(&seen.lags, 99.0));
        waits.push(at(&seen.waits, 100.0));
    }
    report.note("lag beside a bulk load of another database, p50", "ms", p50, Asked::Nothing);
    report.note("lag beside a bulk load of another database, p99", "ms", p99, Asked::AtMost(50.0));
    report.note("a writer's worst wait beside such a load", "ms", waits, Asked::AtMost(50.0));
    report.note("a writer's worst wait beside such a load, bare SQLite", "ms", bare, Asked::Nothing);
    report.note("that load", "rows/s", rates, Asked::Nothing);
}

/// One row a transaction as fast as it goes, while both nodes replicate.
pub fn single(report: &mut Report) {
    const COUNT: i64 = 10_000;
    let (mut ratios, mut rates, mut worst) = (vec![], vec![], vec![]);
    for _ in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        let mut bare = open(&dir.path().join("bare.db"));
        bare.execute_batch(SCHEMA).unwrap();
        let base = transactions(&mut bare, 1, COUNT, 1, INSERT);
        let (a, b) = support::pair(dir.path(), SCHEMA);
        let app = open(&a.file("app.db"));
        let (started, mut longest) = (Instant::now(), Duration::ZERO);
        for id in 1..=COUNT {
            let before = Instant::now();
            app.prepare_cached(INSERT).unwrap().execute((id, super::TEXT, id * 7, id as f64 / 3.0)).unwrap();
            longest = longest.max(before.elapsed());
        }
        ratios.push(COUNT as f64 / started.elapsed().as_secs_f64() / base);
        rates.push(base);
        worst.push(longest.as_secs_f64() * 1_000.0);
        a.sync();
        assert_eq!(b.text("app.db", "SELECT count(*) || '' FROM t"), COUNT.to_string());
    }
    let bare = ("bare SQLite's writes/s", median(&rates));
    report.note_ratio(
        "single rows, the writer kept while both nodes replicate",
        ratios,
        bare,
        Asked::AtLeast(0.5),
    );
    report.note("single rows, a writer's worst wait", "ms", worst, Asked::AtMost(50.0));
}
