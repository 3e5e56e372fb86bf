//! The figures of this release, each against its baseline in the same run: `cargo bench --bench figures`, with names of
//! measurements (`capture`, `start`, `bulk`, `lag`, `verify`, `join`, `catchup`) as arguments to run only those.

mod catchup;
mod join;
#[path = "../support/mod.rs"]
mod support;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use support::Node;

const ROUNDS: usize = 5;
const SCHEMA: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, a TEXT, b INTEGER, c REAL)";

/// The argument that makes this program a writer of the capture figures.
const WRITER: &str = "--writer";

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == WRITER) {
        return write_block(&args[1..]);
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let run = |name: &str, measure: fn()| {
        if wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str())) {
            measure();
        }
    };
    run("capture", capture);
    run("start", start);
    run("bulk", bulk);
    run("lag", lag);
    run("verify", verify);
    run("join", join::join);
    run("catchup", catchup::catchup);
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn open(path: &Path) -> Connection {
    let conn = Connection::open(path).unwrap();
    conn.busy_timeout(Duration::from_secs(60)).unwrap();
    conn.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL").unwrap();
    conn
}

fn transactions(conn: &mut Connection, first: i64, count: i64, size: i64, sql: &str) -> f64 {
    let started = Instant::now();
    for t in 0..count {
        let tx = conn.transaction().unwrap();
        let mut statement = tx.prepare_cached(sql).unwrap();
        for i in 0..size {
            let id = first + t * size + i;
            let text = "one hundred and twenty bytes a row, with everything that stands around it, is what this text is for, more or less";
            statement.execute((id, text, id * 7, id as f64 / 3.0)).unwrap();
        }
        drop(statement);
        tx.commit().unwrap();
    }
    (count * size) as f64 / started.elapsed().as_secs_f64()
}

const INSERT: &str = "INSERT INTO t VALUES(?1, ?2, ?3, ?4)";
const UPDATE: &str = "UPDATE t SET a = ?2 || 'x', b = ?3 + 1, c = ?4 WHERE id = ?1";

/// What capture costs an application: the node is stopped, the triggers are there. Processes take turns, each with one
/// file, as applications are: connections of one process share a page cache, which would hide a part of the cost.
fn capture() {
    const TURNS: i64 = 9;
    let dir = tempfile::tempdir().unwrap();
    let bare = dir.path().join("bare.db");
    open(&bare).execute_batch(SCHEMA).unwrap();
    let mut node = Node::new(dir.path(), "n", &["app.db"]);
    node.exec("app.db", SCHEMA);
    node.start(None).stop();
    let captured = node.file("app.db");
    for (name, count, size) in [
        ("insert bulk", 60, 1_000),
        ("insert single", 2_000, 1),
        ("update bulk", 60, 1_000),
        ("update single", 2_000, 1),
    ] {
        let (mut wall, mut cpu) = (Vec::new(), Vec::new());
        let apart = if name.contains("single") { 10_000_000 } else { 0 };
        for turn in 0..TURNS {
            let first = apart + turn * count * size;
            let timed = |path: &Path| writer_process(path, name, first, count, size);
            let (base, with) = if turn % 2 == 0 {
                let base = timed(&bare);
                (base, timed(&captured))
            } else {
                let with = timed(&captured);
                (timed(&bare), with)
            };
            wall.push(base.0 / with.0);
            cpu.push(base.1 / with.1);
        }
        let (wall, cpu) = (median(wall), median(cpu));
        println!("capture, {name}: {wall:.2} of bare SQLite's rate; {cpu:.2} by processor time alone");
    }
    let logged: i64 =
        open(&captured).query_row("SELECT count(*) FROM __litemesh_log", [], |r| r.get(0)).unwrap();
    assert_eq!(logged, 2 * TURNS * (60 * 1_000 + 2_000), "every write was captured");
}

/// Runs [`write_block`] in a process of its own; returns seconds by the clock and of processor time.
fn writer_process(path: &Path, kind: &str, first: i64, count: i64, size: i64) -> (f64, f64) {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.arg(WRITER).arg(path).arg(kind).args([first, count, size].map(|n| n.to_string()));
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (wall, cpu) = text.trim().split_once(' ').expect("two times");
    (wall.parse().unwrap(), cpu.parse().unwrap())
}

/// What the process of [`writer_process`] does.
fn write_block(args: &[String]) {
    let number = |i: usize| args[i].parse::<i64>().unwrap();
    let mut conn = open(Path::new(&args[0]));
    let sql = if args[1].starts_with("insert") { INSERT } else { UPDATE };
    let (started, before) = (Instant::now(), cpu_time());
    transactions(&mut conn, number(2), number(3), number(4), sql);
    println!("{} {}", started.elapsed().as_secs_f64(), (cpu_time() - before).as_secs_f64());
}

/// The processor time this process has used.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// From the command to `ready`.
fn start() {
    let (mut first, mut later) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let dir = tempfile::tempdir().unwrap();
        let mut node = Node::new(dir.path(), "n", &["app.db"]);
        node.exec("app.db", SCHEMA);
        for times in [&mut first, &mut later] {
            let started = Instant::now();
            node.start(None);
            times.push(started.elapsed().as_secs_f64());
            node.stop();
        }
    }
    println!("ready: first ever {:.2} s, later {:.2} s", median(first), median(later));
}

/// A million rows in transactions of a thousand, from the first to equal on the peer.
fn bulk() {
    const ROWS: i64 = 1_000_000;
    for keys in ["integer", "text"] {
        let dir = tempfile::tempdir().unwrap();
        let schema = match keys {
            "integer" => SCHEMA.to_owned(),
            _ => SCHEMA.replace("id INTEGER PRIMARY KEY", "id TEXT PRIMARY KEY NOT NULL"),
        };
        let insert = match keys {
            "integer" => INSERT.to_owned(),
            _ => INSERT.replacen("?1", "printf('%08x-%s', abs(random()) % 4294967296, ?1)", 1),
        };
        let mut bare = open(&dir.path().join("bare.db"));
        bare.execute_batch(&schema).unwrap();
        let base = transactions(&mut bare, 1, ROWS / 1_000, 1_000, &insert);
        let (a, b) = support::pair(dir.path(), &schema);
        let mut app = open(&a.file("app.db"));
        let started = Instant::now();
        let with = transactions(&mut app, 1, ROWS / 1_000, 1_000, &insert);
        let peer = open(&b.file("app.db"));
        let count = || peer.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0)).unwrap();
        while count() < ROWS {
            std::thread::sleep(Duration::from_millis(20));
        }
        let rate = ROWS as f64 / started.elapsed().as_secs_f64();
        let memory = |node: &Node| resident_mib(node.process.as_ref().unwrap().id());
        println!(
            "bulk, {keys} keys: {rate:.0} rows/s replicated; the writer kept {:.2} of bare SQLite's {base:.0} rows/s; resident {} and {} MiB",
            with / base,
            memory(&a),
            memory(&b)
        );
        let size = |path: &Path| std::fs::metadata(path).unwrap().len();
        let (mine, theirs) = (size(&a.file("app.db")), size(&dir.path().join("bare.db")));
        println!("bulk, {keys} keys: the file is {:.2} times bare SQLite's", mine as f64 / theirs as f64);
    }
}

fn resident_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() / 1024
}

/// 200 single-row transactions a second, each timed from COMMIT to visible on the peer.
fn lag() {
    const COUNT: i64 = 2_000;
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = support::pair(dir.path(), "CREATE TABLE t(id INTEGER PRIMARY KEY, at_us INTEGER)");
    let peer = open(&b.file("app.db"));
    let begin = Instant::now();
    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        let mut statement = peer.prepare("SELECT id, at_us FROM t WHERE id > ?1 ORDER BY id").unwrap();
        let mut version = peer.prepare("PRAGMA data_version").unwrap();
        let (mut last, mut last_version) = (0i64, 0i64);
        while last < COUNT {
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
    let app = open(&a.file("app.db"));
    let mut waits = Vec::new();
    for id in 1..=COUNT {
        let due = Duration::from_millis(5 * id as u64);
        std::thread::sleep(due.saturating_sub(begin.elapsed()));
        let before = begin.elapsed();
        app.execute("INSERT INTO t VALUES(?1, ?2)", (id, before.as_micros() as i64)).unwrap();
        waits.push((begin.elapsed() - before).as_secs_f64() * 1_000.0);
    }
    let mut lags = reader.join().unwrap();
    lags.sort_by(f64::total_cmp);
    waits.sort_by(f64::total_cmp);
    let at = |v: &[f64], q: f64| v[((v.len() - 1) as f64 * q) as usize];
    println!(
        "lag at 200 tx/s: p50 {:.2} ms, p99 {:.2} ms, worst {:.1} ms; the writer's worst INSERT {:.1} ms",
        at(&lags, 0.5),
        at(&lags, 0.99),
        at(&lags, 1.0),
        at(&waits, 1.0)
    );
    let wal = a.file("app.db-wal");
    println!("lag at 200 tx/s: the WAL is {} KiB", std::fs::metadata(wal).map_or(0, |m| m.len() / 1024));
}

/// What comparing a million rows costs, and what a writer at 200 tx/s notices of it.
fn verify() {
    const ROWS: i64 = 1_000_000;
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = support::pair(dir.path(), SCHEMA);
    transactions(&mut open(&a.file("app.db")), 1, ROWS / 1_000, 1_000, INSERT);
    a.sync();
    let stop = Arc::new(AtomicBool::new(false));
    let (phase, app, stopped) = (Arc::new(AtomicUsize::new(0)), open(&a.file("app.db")), stop.clone());
    let at = phase.clone();
    let writer = std::thread::spawn(move || {
        let mut worst = [0.0f64; 2];
        let mut id = 0;
        while !stopped.load(Ordering::Relaxed) {
            id = (id + 7_919) % ROWS + 1;
            let started = Instant::now();
            app.execute("UPDATE t SET b = b + 1 WHERE id = ?1", [id]).unwrap();
            let waited_ms = started.elapsed().as_secs_f64() * 1_000.0;
            let phase = at.load(Ordering::Relaxed);
            worst[phase] = worst[phase].max(waited_ms);
            std::thread::sleep(Duration::from_millis(5).saturating_sub(started.elapsed()));
        }
        worst
    });
    let cpu = || [&a, &b].map(|n| processor_s(n.process.as_ref().unwrap().id()));
    let (before, started) = (cpu(), Instant::now());
    std::thread::sleep(Duration::from_secs(10));
    let (idle, baseline_s) = (cpu(), started.elapsed().as_secs_f64());
    phase.store(1, Ordering::Relaxed);
    let started = Instant::now();
    let output = a.run(&["verify"]);
    let (done, took_s) = (cpu(), started.elapsed().as_secs_f64());
    stop.store(true, Ordering::Relaxed);
    let [quiet_ms, worst_ms] = writer.join().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    // Less what replicating the writer's rows costs.
    let used = |i: usize| (done[i] - idle[i]) - (idle[i] - before[i]) / baseline_s * took_s;
    let (here_s, there_s) = (used(0), used(1));
    println!(
        "verify, 1,000,000 rows: {took_s:.1} s on demand; {here_s:.1} s of processor time here and {there_s:.1} s on the \
         peer: {:.3}% of a core at one comparison an hour",
        here_s.max(there_s) / 36.0
    );
    println!(
        "verify, 1,000,000 rows: a writer's worst UPDATE at 200 tx/s {worst_ms:.1} ms meanwhile, {quiet_ms:.1} ms without"
    );
}

/// The processor time that a process has used, in seconds.
fn processor_s(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit_once(')').unwrap().1;
    let ticks = after_name.split_whitespace().skip(11).take(2).map(|t| t.parse::<f64>().unwrap());
    // The unit of /proc is a hundredth of a second on every Linux.
    ticks.sum::<f64>() / 100.0
}
