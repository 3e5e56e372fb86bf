//! What the applications said: kept here, outside of every disk that fills. Invariant: what is acknowledged here was
//! committed before; a violation, once noted, stays.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::look::TREES;

#[derive(Default)]
pub struct Journal {
    /// How far each node's rows were acknowledged, such as `batch/b`.
    pub acknowledged: BTreeMap<String, i64>,
    pub transactions: u64,
    pub reads: u64,
    pub refused_for_space: u64,
    pub violations: Vec<String>,
    /// What the readers of each node saw last.
    seen: BTreeMap<String, BTreeMap<String, i64>>,
    /// Errors of statements: when, which node's, what.
    errors: Vec<(Instant, String, String)>,
    file: Option<std::fs::File>,
}

/// Shared with the threads that listen to the applications.
#[derive(Clone, Default)]
pub struct SharedJournal(Arc<Mutex<Journal>>);

impl SharedJournal {
    pub fn new(file: &Path) -> Self {
        let journal = Self::default();
        journal.get().file = Some(std::fs::File::create(file).expect("the journal's file"));
        journal
    }

    pub fn get(&self) -> MutexGuard<'_, Journal> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Journal {
    /// Takes a line of an application of this node.
    pub fn take(&mut self, node: &str, line: &str) {
        if !line.starts_with('R') {
            self.note(&format!("{node} {line}"));
        }
        match line.split_at(line.len().min(2)) {
            ("A ", rest) => self.acknowledge(rest),
            ("R ", rest) => self.saw(node, rest),
            ("V ", rest) => self.violation(format!("on {node}: {rest}")),
            ("E ", rest) => self.errors.push((Instant::now(), node.to_owned(), rest.to_owned())),
            _ => self.violation(format!("the application of {node} said: {line}")),
        }
    }

    /// Writes a line into the journal's file.
    pub fn note(&mut self, line: &str) {
        if let Some(file) = &mut self.file {
            let ms = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |d| d.as_millis());
            writeln!(file, "{}.{:03} {line}", ms / 1_000, ms % 1_000).expect("the journal can be written");
        }
    }

    pub fn violation(&mut self, what: String) {
        self.note(&format!("VIOLATION {what}"));
        if self.violations.len() < 50 {
            self.violations.push(what);
        }
    }

    fn acknowledge(&mut self, rest: &str) {
        self.transactions += 1;
        let Some((what, value)) = rest.split_once(' ') else { return };
        let value: i64 = value.parse().unwrap_or_default();
        let mut reach = |what: String, value: i64| {
            let reached = self.acknowledged.entry(what).or_insert(value);
            *reached = value.max(*reached);
        };
        // A tree that was added took an old one away.
        if let Some(node) = what.strip_prefix("tree/") {
            reach(format!("pruned/{node}"), (value - TREES).max(0));
        }
        reach(what.to_owned(), value);
    }

    /// A reader that saw something never later sees less.
    fn saw(&mut self, node: &str, rest: &str) {
        self.reads += 1;
        let now: BTreeMap<String, i64> = rest
            .split(' ')
            .filter_map(|s| s.split_once('='))
            .filter_map(|(k, v)| Some((k.to_owned(), v.parse().ok()?)))
            .collect();
        let before = self.seen.insert(node.to_owned(), now.clone()).unwrap_or_default();
        for (what, value) in before {
            let later = now.get(&what).copied();
            if later.is_none_or(|l| l < value) {
                self.violation(format!("a reader on {node} saw {what} at {value}, and later at {later:?}"));
            }
        }
    }

    /// The file of this node is an older copy of itself: its readers begin anew.
    pub fn forget_seen(&mut self, node: &str) {
        self.seen.remove(node);
    }

    /// Judges the errors of statements: those for want of space are the applications' own, while there was none.
    pub fn judge_errors(&mut self, was_full: impl Fn(&str, Instant) -> bool) {
        for (at, node, what) in std::mem::take(&mut self.errors) {
            let code = what.split(' ').next().unwrap_or_default();
            let of_space = ["DiskFull", "SystemIoFailure", "CannotOpen"].contains(&code);
            if of_space && was_full(&node, at) {
                self.refused_for_space += 1;
            } else {
                self.violation(format!("a statement of the application on {node} failed: {what}"));
            }
        }
    }
}

/// That a journal finds what it is for.
pub fn self_check() {
    let mut journal = Journal::default();
    journal.take("a", "A tree/a 50");
    journal.take("a", "R counter/a=5 counter/b=3");
    journal.take("a", "R counter/a=6 counter/b=3");
    journal.take("b", "R counter/a=1");
    journal.take("a", "E DiskFull x");
    journal.judge_errors(|node, _| node == "a");
    assert!(journal.violations.is_empty(), "{:?}", journal.violations);
    assert_eq!((journal.transactions, journal.reads, journal.acknowledged["pruned/a"]), (1, 3, 10));
    for wrong in ["R counter/a=5 counter/b=4", "R counter/b=4", "E DatabaseBusy x", "V half", "panicked"] {
        let before = journal.violations.len();
        journal.take("a", wrong);
        journal.judge_errors(|_, _| true);
        assert_eq!(journal.violations.len(), before + 1, "not seen: {wrong}");
    }
    journal.take("a", "E DiskFull x");
    journal.judge_errors(|_, _| false);
    assert_eq!(journal.violations.len(), 6, "a disk that was not full");
}
