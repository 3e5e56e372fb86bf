//! Giving way to programs that write the file while many commits of peers are taken in. Invariant: it changes when things
//! are done, never what is done.

use std::time::{Duration, Instant};

/// For so long after a write of a program another one is to be expected.
const WRITES_AGAIN: Duration = Duration::from_secs(10);
/// How long to leave the file alone after a transaction: so many times as long as that took, within these bounds. Who
/// waits for the lock of a file looks for it now and then only, and does not find it free in a gap of microseconds.
const PAUSE_FACTOR: u32 = 2;
const LEAST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// A transaction that is long by itself.
const LONG: Duration = Duration::from_millis(2);

/// What goes into one transaction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batch {
    pub commits: usize,
    pub rows: u64,
    pub bytes: u64,
}

/// Enough to share an fsync, few enough to be short.
const ALONE: Batch = Batch { commits: 256, rows: 100_000, bytes: 1024 * 1024 };
/// A few ms, unless one commit takes longer.
const BESIDE_WRITERS: Batch = Batch { commits: 4, rows: 800, bytes: 64 * 1024 };

/// Whether programs write, and what follows from that. Without being told to, nothing does.
#[derive(Debug, Default)]
pub struct Courtesy {
    given: bool,
    written: Option<Instant>,
}

impl Courtesy {
    /// From now on programs that write are given way to.
    pub fn give(&mut self) {
        self.given = true;
    }

    /// A program has written.
    pub(super) fn note_write(&mut self) {
        self.written = Some(Instant::now());
    }

    pub(super) fn is_due(&self) -> bool {
        self.given && self.written.is_some_and(|at| at.elapsed() < WRITES_AGAIN)
    }

    pub(super) fn batch(&self) -> Batch {
        if self.is_due() { BESIDE_WRITERS } else { ALONE }
    }

    /// Leaves the file alone for a moment after a transaction of so many commits that took so long, if it was one of a
    /// crowd: between single ones there is time enough.
    pub(super) fn pause(&self, commits: usize, took: Duration) {
        let crowded = commits >= BESIDE_WRITERS.commits || took >= LONG;
        if crowded && self.is_due() {
            std::thread::sleep((took * PAUSE_FACTOR).clamp(LEAST_PAUSE, LONGEST_PAUSE));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paused(courtesy: &Courtesy, commits: usize, took: Duration) -> bool {
        let started = Instant::now();
        courtesy.pause(commits, took);
        started.elapsed() >= LEAST_PAUSE
    }

    #[test]
    fn only_where_programs_write_is_there_anything_to_give_way_to() {
        let mut courtesy = Courtesy::default();
        courtesy.note_write();
        assert_eq!(courtesy.batch().commits, ALONE.commits, "nobody said that there are programs");
        courtesy.give();
        assert_eq!(courtesy.batch().commits, BESIDE_WRITERS.commits);
        let mut quiet = Courtesy::default();
        quiet.give();
        assert_eq!((quiet.batch().commits, quiet.batch().bytes), (ALONE.commits, ALONE.bytes));
        quiet.written = Instant::now().checked_sub(WRITES_AGAIN);
        assert_eq!(quiet.batch().commits, ALONE.commits, "that is long ago");
        assert!(!paused(&quiet, BESIDE_WRITERS.commits, LONG));
    }

    #[test]
    fn one_of_a_crowd_and_a_long_one_are_followed_by_a_pause() {
        let mut courtesy = Courtesy::default();
        courtesy.give();
        courtesy.note_write();
        assert!(paused(&courtesy, BESIDE_WRITERS.commits, Duration::ZERO));
        assert!(paused(&courtesy, 1, LONG));
        // A single short one costs nobody anything. (Had it paused, each of these would have.)
        let started = Instant::now();
        (0..1_000).for_each(|_| courtesy.pause(1, Duration::ZERO));
        assert!(started.elapsed() < LEAST_PAUSE * 1_000);
    }
}
