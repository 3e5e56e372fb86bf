//! What a node costs that does little: to start, to fetch its file, and to wait.

use std::time::{Duration, Instant};

use super::report::{Asked, Report, median};
use super::support::{self, Node};
use super::{SCHEMA, open, processor_s, status_mib};

/// From the command to `ready`.
pub fn start(report: &mut Report) {
    let (mut first, mut later) = (Vec::new(), Vec::new());
    for _ in 0..5 {
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
    report.note("start to ready, first ever", "s", first, Asked::AtMost(4.0));
    report.note("start to ready, later", "s", later, Asked::AtMost(1.0));
}

/// Two nodes of which nobody wants anything: litemesh and its server together, the dearer node.
pub fn idle(report: &mut Report) {
    const LOOK: Duration = Duration::from_secs(30);
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = support::pair(dir.path(), SCHEMA);
    a.sync();
    let processes = |n: &Node| [n.process.as_ref().unwrap().id(), n.server_pid() as u32];
    let nodes = [processes(&a), processes(&b)];
    let used = |pids: &[u32; 2]| pids.iter().map(|p| processor_s(*p)).sum::<f64>();
    std::thread::sleep(Duration::from_secs(5));
    let before = nodes.map(|n| used(&n));
    std::thread::sleep(LOOK);
    let percent = nodes.iter().zip(before).map(|(n, b)| (used(n) - b) / LOOK.as_secs_f64() * 100.0).collect();
    let memory = nodes.iter().map(|n| n.iter().map(|p| status_mib(*p, "VmRSS:")).sum::<f64>()).collect();
    report.note("idle, processor of both processes", "% core", percent, Asked::AtMost(1.0));
    report.note("idle, resident memory of both processes", "MiB", memory, Asked::AtMost(48.0));
}

/// A node without the file fetches one of 1 GiB from a peer that nobody writes to.
pub fn first_sync(report: &mut Report) {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    let file = a.file("app.db");
    let conn = open(&file);
    conn.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)").unwrap();
    let sql = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 786000)
               INSERT INTO t SELECT i, randomblob(1024) FROM c";
    conn.execute(sql, []).unwrap();
    conn.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    let mib = std::fs::metadata(&file).unwrap().len() as f64 / f64::from(1 << 20);
    a.start(None);
    let (mut rates, mut copied) = (Vec::new(), Vec::new());
    for round in 0..3 {
        let copy = dir.path().join("cp");
        let started = Instant::now();
        std::fs::copy(&file, &copy).unwrap();
        std::fs::File::open(&copy).unwrap().sync_all().unwrap();
        copied.push(mib / started.elapsed().as_secs_f64());
        std::fs::remove_file(&copy).unwrap();
        let mut b = Node::new(dir.path(), &format!("b{round}"), &["app.db"]);
        let started = Instant::now();
        b.start(Some(&a.token()));
        rates.push(mib / started.elapsed().as_secs_f64());
        b.stop();
        std::fs::remove_dir_all(&b.home).unwrap();
    }
    let ratios = rates.iter().zip(&copied).map(|(r, c)| r / c).collect();
    report.note("first sync of 1 GiB, command to ready", "MiB/s", rates, Asked::AtLeast(150.0));
    report.note_ratio(
        "first sync of 1 GiB",
        ratios,
        ("cp and fsync, MiB/s", median(&copied)),
        Asked::Nothing,
    );
}
