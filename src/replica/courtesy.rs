//! Giving way to programs that write the file while many commits of peers are taken in. Invariant: it changes when things
//! are done, never what is done.

use std::time::{Duration, Instant};

/// For so long after a write of a program another one is to be expected.
const WRITES_AGAIN: Duration = Duration::from_secs(10);
/// How long to leave the file alone after a transaction: as long as that took, within these bounds. Who waits for the
/// lock of a file looks for it now and then only, and does not find it free in a gap of microseconds.
const LEAST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(25);
/// A transaction that is long by itself.
const LONG: Duration = Duration::from_millis(8);

/// What goes into one transaction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batch {
    pub commits: usize,
    pub bytes: u64,
}

/// Enough to share an fsync, few enough to be short.
const ALONE: Batch = Batch { commits: 256, bytes: 1024 * 1024 };
/// About 10 ms.
const BESIDE_WRITERS: Batch = Batch { commits: 16, bytes: 64 * 1024 };

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

    fn is_due(&self) -> bool {
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
            std::thread::sleep(took.clamp(LEAST_PAUSE, LONGEST_PAUSE));
        }
    }
}
