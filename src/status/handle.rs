//! The latest snapshot, and the heartbeats of the process's loops. Invariant: neither publishing nor beating ever
//! waits for a reader.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::model::Status;

/// A loop that has not turned for this long hangs.
pub const HANG_AFTER: Duration = Duration::from_secs(30);

/// The node's status, shared by who writes it and who shows it. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct StatusHandle {
    latest: Arc<watch::Sender<Arc<Status>>>,
    beats: Arc<Mutex<BTreeMap<String, Instant>>>,
}

impl Default for StatusHandle {
    fn default() -> Self {
        Self::new(Status::default())
    }
}

impl StatusHandle {
    /// A handle that shows `first` until something is published.
    pub fn new(first: Status) -> Self {
        Self { latest: Arc::new(watch::Sender::new(Arc::new(first))), beats: Arc::default() }
    }

    /// Replaces the snapshot.
    pub fn publish(&self, status: Status) {
        self.latest.send_replace(Arc::new(status));
    }

    /// The latest snapshot.
    pub fn current(&self) -> Arc<Status> {
        Arc::clone(&self.latest.borrow())
    }

    /// A receiver that sees every later snapshot, or at least the newest.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Status>> {
        self.latest.subscribe()
    }

    /// Says that a loop turns now. The first beat registers it: it must then beat at least every [`HANG_AFTER`].
    pub fn beat(&self, loop_name: &str) {
        let mut beats = self.beats();
        match beats.get_mut(loop_name) {
            Some(last) => *last = Instant::now(),
            None => drop(beats.insert(loop_name.to_owned(), Instant::now())),
        }
    }

    /// Says that a loop has ended as it should, and need not beat any more.
    pub fn retire(&self, loop_name: &str) {
        self.beats().remove(loop_name);
    }

    /// The loops that hang at `now`, with how long each has not turned.
    pub fn hanging(&self, now: Instant) -> Vec<(String, Duration)> {
        let since = |last: &Instant| now.saturating_duration_since(*last);
        let beats = self.beats();
        let late = beats.iter().filter(|(_, last)| since(last) > HANG_AFTER);
        late.map(|(name, last)| (name.clone(), since(last))).collect()
    }

    fn beats(&self) -> MutexGuard<'_, BTreeMap<String, Instant>> {
        // A map of instants is whole whatever panicked while it was held.
        self.beats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_clone_sees_the_latest_snapshot() {
        let handle = StatusHandle::default();
        let reader = handle.clone();
        handle.publish(Status { node: "n1".into(), ..Status::default() });
        assert_eq!(reader.current().node, "n1");
    }

    #[test]
    fn a_loop_hangs_when_it_stops_beating_and_not_when_it_has_ended() {
        let handle = StatusHandle::default();
        handle.beat("engine");
        handle.beat("watcher");
        let later = Instant::now() + HANG_AFTER + Duration::from_secs(1);
        assert!(handle.hanging(Instant::now()).is_empty());
        handle.retire("watcher");
        let hanging: Vec<String> = handle.hanging(later).into_iter().map(|(name, _)| name).collect();
        assert_eq!(hanging, ["engine"]);
    }
}
