//! Many rows at once: how fast they reach the peers, and what that takes.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::report::{Asked, Report, median};
use super::support::{self, Node, wait_for};
use super::{INSERT, SCHEMA, open, peak_mib, processor_s, transactions};

/// Keys as programs make them: numbers in order, or text in none.
pub struct Keys {
    pub name: &'static str,
    pub schema: String,
    pub insert: String,
    pub asked: f64,
}

impl Keys {
    pub fn integer() -> Self {
        Self { name: "integer keys", schema: SCHEMA.to_owned(), insert: INSERT.to_owned(), asked: 200_000.0 }
    }

    pub fn text() -> Self {
        let schema = SCHEMA.replace("id INTEGER PRIMARY KEY", "id TEXT PRIMARY KEY NOT NULL");
        let key = "printf('%08x-%s', abs(random()) % 4294967296, ?1)";
        Self { name: "text keys", schema, insert: INSERT.replacen("?1", key, 1), asked: 50_000.0 }
    }
}

/// What one bulk load was.
pub struct Bulk {
    /// Rows a second that bare SQLite took.
    pub bare: f64,
    /// That the application kept while both nodes replicated.
    pub kept: f64,
    /// From the first to all of them on the peer.
    pub replicated: f64,
    /// Resident memory at most, and processor time a row, of both nodes.
    pub peak_mib: [f64; 2],
    pub processor_us: [f64; 2],
    pub growth: f64,
}

/// Rows in transactions of `size`, from the first to equal on the peer.
pub fn bulk_of(keys: &Keys, rows: i64, size: i64) -> Bulk {
    let dir = tempfile::tempdir().unwrap();
    let mut bare = open(&dir.path().join("bare.db"));
    bare.execute_batch(&keys.schema).unwrap();
    let base = transactions(&mut bare, 1, rows / size, size, &keys.insert);
    let (a, b) = support::pair(dir.path(), &keys.schema);
    let mut app = open(&a.file("app.db"));
    let pids = [&a, &b].map(|n| n.process.as_ref().unwrap().id());
    let before = pids.map(processor_s);
    let started = Instant::now();
    let with = transactions(&mut app, 1, rows / size, size, &keys.insert);
    let peer = open(&b.file("app.db"));
    while count(&peer) < rows {
        std::thread::sleep(Duration::from_millis(20));
    }
    let replicated = rows as f64 / started.elapsed().as_secs_f64();
    let after = pids.map(processor_s);
    let used = [0, 1].map(|i| (after[i] - before[i]) * 1e6 / rows as f64);
    let file_bytes = |path: &Path| {
        open(path).execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        std::fs::metadata(path).unwrap().len() as f64
    };
    a.sync();
    let growth = file_bytes(&a.file("app.db")) / file_bytes(&dir.path().join("bare.db"));
    Bulk {
        bare: base,
        kept: with / base,
        replicated,
        peak_mib: pids.map(peak_mib),
        processor_us: used,
        growth,
    }
}

fn count(conn: &Connection) -> i64 {
    conn.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap()
}

pub fn bulk(report: &mut Report) {
    for keys in [Keys::integer(), Keys::text()] {
        let runs: Vec<Bulk> = (0..3).map(|_| bulk_of(&keys, 1_000_000, 1_000)).collect();
        let all = |f: fn(&Bulk) -> f64| runs.iter().map(f).collect::<Vec<_>>();
        let bare = ("bare SQLite's rows/s", median(&all(|r| r.bare)));
        let name = format!("1,000,000 rows, {}", keys.name);
        report.note(
            &format!("{name}, to equal"),
            "rows/s",
            all(|r| r.replicated),
            Asked::AtLeast(keys.asked),
        );
        report.note_ratio(&format!("{name}, to equal"), all(|r| r.replicated / r.bare), bare, Asked::Nothing);
        report.note_ratio(&format!("{name}, the writer kept"), all(|r| r.kept), bare, Asked::AtLeast(0.45));
        report.note_ratio(
            &format!("{name}, file growth"),
            all(|r| r.growth),
            ("the bare file", 1.0),
            Asked::AtMost(1.3),
        );
        report.note(
            &format!("{name}, processor at the writer"),
            "us/row",
            all(|r| r.processor_us[0]),
            Asked::Nothing,
        );
        report.note(
            &format!("{name}, processor at the peer"),
            "us/row",
            all(|r| r.processor_us[1]),
            Asked::Nothing,
        );
        report.note(
            &format!("{name}, peak memory at the writer"),
            "MiB",
            all(|r| r.peak_mib[0]),
            Asked::Nothing,
        );
        report.note(
            &format!("{name}, peak memory at the peer"),
            "MiB",
            all(|r| r.peak_mib[1]),
            Asked::Nothing,
        );
    }
}

/// A transaction of a million rows: applied whole, in bounded memory.
pub fn million(report: &mut Report) {
    const ROWS: i64 = 1_000_000;
    for keys in [Keys::integer(), Keys::text()] {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = support::pair(dir.path(), &keys.schema);
        let pids = [&a, &b].map(|n| n.process.as_ref().unwrap().id());
        let (done, path) = (Arc::new(AtomicBool::new(false)), b.file("app.db"));
        let stop = done.clone();
        // Whatever a reader of the peer sees is nothing or all of it.
        let watcher = std::thread::spawn(move || {
            let conn = open(&path);
            let (mut seen, mut looks) = (std::collections::BTreeSet::new(), 0);
            while !stop.load(Ordering::Relaxed) {
                seen.insert(count(&conn));
                looks += 1;
                std::thread::sleep(Duration::from_millis(3));
            }
            (seen, looks)
        });
        let started = Instant::now();
        transactions(&mut open(&a.file("app.db")), 1, 1, ROWS, &keys.insert);
        let peer = open(&b.file("app.db"));
        wait_for_rows(&peer, ROWS);
        let took = started.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        let (seen, looks) = watcher.join().unwrap();
        assert!(seen.iter().all(|n| *n == 0 || *n == ROWS), "a part of a transaction was seen: {seen:?}");
        assert!(looks > 100, "the reader looked {looks} times only");
        let name = format!("one transaction of 1,000,000 rows, {}", keys.name);
        report.note(&format!("{name}, to visible"), "s", vec![took], Asked::Nothing);
        for (node, pid) in ["writer", "peer"].iter().zip(pids) {
            let what = format!("{name}, peak memory at the {node}");
            report.note(&what, "MiB", vec![peak_mib(pid)], Asked::AtMost(256.0));
        }
        a.sync();
        let sums = "SELECT count(*) || ' ' || sum(b) || ' ' || min(id) || ' ' || max(id) FROM t";
        assert_eq!(a.text("app.db", sums), b.text("app.db", sums));
    }
}

fn wait_for_rows(conn: &Connection, rows: i64) {
    let started = Instant::now();
    while count(conn) < rows {
        assert!(started.elapsed() < Duration::from_secs(600), "the rows do not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Two writers on two of three nodes against one of them alone, each on rows of its own.
pub fn two_writers(report: &mut Report) {
    const ROWS: i64 = 200_000;
    let dir = tempfile::tempdir().unwrap();
    let nodes = mesh(dir.path(), 3, &["app.db"], SCHEMA);
    let load = |node: &Node, first: i64| {
        let mut app = open(&node.file("app.db"));
        std::thread::spawn(move || transactions(&mut app, first, ROWS / 1_000, 1_000, INSERT))
    };
    let everywhere = |rows: i64| {
        let conns: Vec<Connection> = nodes.iter().map(|n| open(&n.file("app.db"))).collect();
        conns.iter().for_each(|c| wait_for_rows(c, rows));
    };
    let (mut one, mut both, mut total) = (Vec::new(), Vec::new(), 0);
    for round in 0..3 {
        let base = round * 10 * ROWS;
        let started = Instant::now();
        load(&nodes[0], base + 1).join().unwrap();
        total += ROWS;
        everywhere(total);
        one.push(ROWS as f64 / started.elapsed().as_secs_f64());
        let started = Instant::now();
        let writers = [load(&nodes[0], base + 2 * ROWS), load(&nodes[1], base + 4 * ROWS)];
        for writer in writers {
            writer.join().unwrap();
        }
        total += 2 * ROWS;
        everywhere(total);
        both.push(2.0 * ROWS as f64 / started.elapsed().as_secs_f64());
    }
    let ratios = both.iter().zip(&one).map(|(b, o)| b / (2.0 * o)).collect();
    let whole = ("twice one writer's rows/s", 2.0 * median(&one));
    report.note_ratio("2 writers, 3 nodes, disjoint rows, to equal", ratios, whole, Asked::AtLeast(0.8));
}

/// So many nodes that share these files, made on the first.
pub fn mesh(dir: &Path, nodes: usize, files: &[&str], schema: &str) -> Vec<Node> {
    let mut all: Vec<Node> = (0..nodes).map(|i| Node::new(dir, &format!("n{i}"), files)).collect();
    files.iter().for_each(|f| all[0].exec(f, schema));
    all[0].start(None);
    let token = all[0].token();
    for node in &mut all[1..] {
        node.start(Some(&token));
    }
    let tables = |n: &Node, f: &str| n.text(f, "SELECT count(*) || '' FROM sqlite_schema WHERE name = 't'");
    wait_for("the files are everywhere", || all.iter().all(|n| files.iter().all(|f| tables(n, f) == "1")));
    all
}

/// How cost grows with rows, row size, conflicts: bulk loads of integer keys.
pub fn sweep_rows(report: &mut Report, ten_million: bool) {
    let most = if ten_million { 10_000_000 } else { 1_000_000 };
    for rows in [1_000, 10_000, 100_000, 1_000_000, 10_000_000].into_iter().filter(|r| *r <= most) {
        for keys in [Keys::integer(), Keys::text()] {
            // Ten million text keys take as long as everything else together.
            if rows <= 1_000_000 || keys.name == "integer keys" {
                let run = bulk_of(&keys, rows, rows.min(1_000));
                let name = format!("rows: {rows}, {}", keys.name);
                report.note(&name, "rows/s", vec![run.replicated], Asked::Nothing);
                let [here, there] = run.processor_us;
                report.note(
                    &format!("{name}, processor of both"),
                    "us/row",
                    vec![here + there],
                    Asked::Nothing,
                );
            }
        }
    }
}

pub fn sweep_row_size(report: &mut Report) {
    for size in [10, 100, 1_000, 10_000, 100_000] {
        let rows = (40_000_000 / size).clamp(400, 200_000);
        let insert =
            INSERT.replacen("?2", &format!("substr(?2 || hex(randomblob({})), 1, {size})", size / 2 + 1), 1);
        let keys = Keys { insert, ..Keys::integer() };
        let run = bulk_of(&keys, rows, (rows / 10).min(1_000));
        let mib = size as f64 * rows as f64 / f64::from(1 << 20);
        let name = format!("row size: {size} bytes");
        report.note(&name, "rows/s", vec![run.replicated], Asked::Nothing);
        report.note(&name, "MiB/s", vec![run.replicated * mib / rows as f64], Asked::Nothing);
    }
}

pub fn sweep_nodes(report: &mut Report) {
    const ROWS: i64 = 200_000;
    for count_of_nodes in 1..=5 {
        let dir = tempfile::tempdir().unwrap();
        let nodes = mesh(dir.path(), count_of_nodes, &["app.db"], SCHEMA);
        let pids: Vec<u32> = nodes.iter().map(|n| n.process.as_ref().unwrap().id()).collect();
        let used = || pids.iter().map(|p| processor_s(*p)).sum::<f64>();
        let (before, started) = (used(), Instant::now());
        transactions(&mut open(&nodes[0].file("app.db")), 1, ROWS / 1_000, 1_000, INSERT);
        nodes.iter().for_each(|n| wait_for_rows(&open(&n.file("app.db")), ROWS));
        let rate = ROWS as f64 / started.elapsed().as_secs_f64();
        report.note(&format!("nodes: {count_of_nodes}"), "rows/s", vec![rate], Asked::Nothing);
        let cost = (used() - before) * 1e6 / ROWS as f64;
        report.note(
            &format!("nodes: {count_of_nodes}, processor of all"),
            "us/row",
            vec![cost],
            Asked::Nothing,
        );
    }
}

pub fn sweep_databases(report: &mut Report) {
    const ROWS: i64 = 100_000;
    for databases in [1, 10, 50] {
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<String> = (0..databases).map(|i| format!("d{i}.db")).collect();
        let names: Vec<&str> = files.iter().map(String::as_str).collect();
        let nodes = mesh(dir.path(), 2, &names, SCHEMA);
        let pids: Vec<u32> = nodes.iter().map(|n| n.process.as_ref().unwrap().id()).collect();
        let each = ROWS / databases;
        let started = Instant::now();
        let mut apps: Vec<Connection> = files.iter().map(|f| open(&nodes[0].file(f))).collect();
        for part in 0..each / 100 {
            for app in &mut apps {
                transactions(app, part * 100 + 1, 1, 100, INSERT);
            }
        }
        let apps_done = started.elapsed().as_secs_f64();
        files.iter().for_each(|f| wait_for_rows(&open(&nodes[1].file(f)), each));
        let rate = ROWS as f64 / started.elapsed().as_secs_f64();
        let name = format!("databases: {databases}");
        report.note(&name, "rows/s", vec![rate], Asked::Nothing);
        report.note(
            &format!("{name}, the writer alone"),
            "rows/s",
            vec![ROWS as f64 / apps_done],
            Asked::Nothing,
        );
        report.note(
            &format!("{name}, peak memory"),
            "MiB",
            pids.iter().map(|p| peak_mib(*p)).collect(),
            Asked::Nothing,
        );
    }
}

/// Two nodes update the same rows at once: of a hundred rows so many collide.
pub fn sweep_conflicts(report: &mut Report) {
    const ROWS: i64 = 50_000;
    for percent in [0, 10, 50, 100] {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = support::pair(dir.path(), SCHEMA);
        transactions(&mut open(&a.file("app.db")), 1, ROWS / 1_000, 1_000, INSERT);
        wait_for_rows(&open(&b.file("app.db")), ROWS);
        a.sync();
        let update = |node: &Node, from: i64, text: &'static str| {
            let mut app = open(&node.file("app.db"));
            std::thread::spawn(move || {
                let sql = format!("UPDATE t SET b = {text} || b WHERE id BETWEEN ?1 AND ?1 + 99");
                for id in (from..from + ROWS / 2).step_by(100) {
                    let tx = app.transaction().unwrap();
                    tx.execute(&sql, [id]).unwrap();
                    tx.commit().unwrap();
                }
            })
        };
        let started = Instant::now();
        // The second one's rows overlap the first one's by so much.
        let writers = [update(&a, 1, "1"), update(&b, 1 + ROWS / 2 * (100 - percent) / 100, "2")];
        writers.into_iter().for_each(|w| w.join().unwrap());
        a.sync();
        b.sync();
        let rate = ROWS as f64 / started.elapsed().as_secs_f64();
        let kept = a.text("app.db", "SELECT count(*) || '' FROM __litemesh_conflicts").parse().unwrap();
        let name = format!("conflicts: {percent}% of rows written on both");
        report.note(&name, "rows/s", vec![rate], Asked::Nothing);
        report.note(&format!("{name}, kept"), "", vec![kept], Asked::Nothing);
        assert_eq!(
            a.text("app.db", "SELECT sum(b) || '' FROM t"),
            b.text("app.db", "SELECT sum(b) || '' FROM t")
        );
    }
}
