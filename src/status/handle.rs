//! The latest snapshot, and the heartbeats of the process's loops. Invariant: neither publishing nor beating ever
//! waits for a reader, and a reader waits for a newer snapshot in bounded time only.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use super::model::Status;

/// A loop that has not turned for this long hangs.
pub const HANG_AFTER: Duration = Duration::from_secs(30);

/// What is shown is not older, unless whoever publishes is busy.
pub const FRESH: Duration = Duration::from_millis(250);
/// Then the last snapshot is shown after this long.
const PATIENCE: Duration = Duration::from_millis(500);

/// The node's status, shared by who writes it and who shows it. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct StatusHandle {
    latest: Arc<watch::Sender<(Arc<Status>, Option<Instant>)>>,
    asked: Arc<Notify>,
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
        let latest = Arc::new(watch::Sender::new((Arc::new(first), None)));
        Self { latest, asked: Arc::default(), beats: Arc::default() }
    }

    /// Replaces the snapshot.
    pub fn publish(&self, status: Status) {
        self.latest.send_replace((Arc::new(status), Some(Instant::now())));
    }

    /// A snapshot that is not older than [`FRESH`]: one is asked for where there is none. Where none comes within half a
    /// second, or nobody has ever published one, the last.
    pub async fn current(&self) -> Arc<Status> {
        let mut latest = self.latest.subscribe();
        let (last, at) = latest.borrow_and_update().clone();
        if at.is_none_or(|at| at.elapsed() < FRESH) {
            return last;
        }
        self.asked.notify_one();
        // Shorter than a reader's own patience.
        drop(timeout(PATIENCE, latest.changed()).await);
        Arc::clone(&latest.borrow().0)
    }

    /// Until somebody wants a newer snapshot than there is, or `longest` has gone by.
    pub async fn wanted(&self, longest: Duration) {
        tokio::select! {
            () = self.asked.notified() => {}
            () = sleep(longest) => {}
        }
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

    #[tokio::test]
    async fn every_clone_sees_the_latest_snapshot() {
        let handle = StatusHandle::default();
        let reader = handle.clone();
        handle.publish(Status { node: "n1".into(), ..Status::default() });
        assert_eq!(reader.current().await.node, "n1");
    }

    #[tokio::test]
    async fn an_old_snapshot_is_replaced_when_somebody_looks_and_not_before() {
        let handle = StatusHandle::default();
        let publisher = tokio::spawn({
            let handle = handle.clone();
            async move {
                for n in 1.. {
                    handle.publish(Status { node: n.to_string(), ..Status::default() });
                    handle.wanted(HANG_AFTER).await;
                }
            }
        });
        while handle.current().await.node.is_empty() {
            tokio::task::yield_now().await;
        }
        sleep(FRESH * 2).await;
        assert_eq!(handle.latest.borrow().0.node, "1", "nobody has looked");
        assert_eq!(handle.current().await.node, "2");
        publisher.abort();
        let _ = publisher.await;
        sleep(FRESH * 2).await;
        assert_eq!(handle.current().await.node, "2", "nobody publishes any more");
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
