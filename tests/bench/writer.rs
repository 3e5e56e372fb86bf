//! An application that writes while something else goes on, and how long it waited.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::open;

/// Transactions of one phase.
#[derive(Default)]
pub struct Phase {
    waits_ms: Vec<f64>,
    pub took: Duration,
}

impl Phase {
    /// What so many of a hundred waited at most.
    pub fn at(&self, percent: f64) -> f64 {
        let last = self.waits_ms.len().saturating_sub(1);
        self.waits_ms.get((last as f64 * percent / 100.0).round() as usize).copied().unwrap_or_default()
    }

    pub fn rate(&self) -> f64 {
        self.waits_ms.len() as f64 / self.took.as_secs_f64()
    }

    pub fn told(&self) -> String {
        format!(
            "{:.0} tx/s, p50 {:.2} ms, p99 {:.2} ms, worst {:.1} ms",
            self.rate(),
            self.at(50.0),
            self.at(99.0),
            self.at(100.0)
        )
    }
}

/// Writes one row a transaction, at a steady pace or as fast as it goes, until it is ended.
pub struct Writer {
    phase: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Phase>>,
}

impl Writer {
    /// `sql` gets a number that grows from `first` on. Without a pace there is no pause.
    pub fn start(path: &Path, sql: &'static str, first: i64, pace: Option<Duration>) -> Self {
        let (phase, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (at, stopped, conn) = (phase.clone(), stop.clone(), open(path));
        let thread = std::thread::spawn(move || {
            let mut phases: Vec<Phase> = Vec::new();
            let mut statement = conn.prepare(sql).unwrap();
            let mut number = first;
            let mut due = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                let (phase, started) = (at.load(Ordering::Relaxed), Instant::now());
                statement.execute([number]).unwrap();
                let waited = started.elapsed();
                number += 1;
                phases.resize_with(phases.len().max(phase + 1), Phase::default);
                phases[phase].waits_ms.push(waited.as_secs_f64() * 1_000.0);
                if let Some(pace) = pace {
                    due = (due + pace).max(Instant::now() - pace);
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                }
                phases[phase].took += started.elapsed();
            }
            phases.iter_mut().for_each(|p| p.waits_ms.sort_by(f64::total_cmp));
            phases
        });
        Self { phase, stop, thread }
    }

    /// What follows belongs to the next phase.
    pub fn next_phase(&self) {
        self.phase.fetch_add(1, Ordering::Relaxed);
    }

    pub fn end(self) -> Vec<Phase> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
