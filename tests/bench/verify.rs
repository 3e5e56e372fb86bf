//! What comparing files costs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::report::{Asked, Report};
use super::{INSERT, SCHEMA, open, processor_s, support, transactions};

/// What comparing a million rows costs, and what a writer at 200 tx/s notices of it.
pub fn verify(report: &mut Report) {
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
    let mut note = |what: &str, unit, value, asked| {
        report.note(&format!("verify, 1,000,000 rows, {what}"), unit, vec![value], asked);
    };
    note("on demand", "s", took_s, Asked::Nothing);
    note("processor, once an hour", "% core", here_s.max(there_s) / 36.0, Asked::Nothing);
    note("a writer's worst wait without", "ms", quiet_ms, Asked::Nothing);
    note("a writer's worst wait meanwhile", "ms", worst_ms, Asked::AtMost(50.0));
}
