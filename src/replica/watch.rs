//! Notices that a file was written. Invariant: a notification is only a hint; the log in the file is the truth, and
//! is looked at regularly even if no hint comes.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};

/// More notifications than this within [`WINDOW`] are a file that is written all the time, by us too: then they are
/// looked at now and then, and the system makes one of those that are the same. Few come close together only when there
/// is time enough for each.
const MANY: u32 = 200;
const WINDOW: Duration = Duration::from_millis(20);
const PAUSE: Duration = Duration::from_millis(2);

/// Counts notifications, and waits when there are too many.
struct Throttle {
    since: Instant,
    count: u32,
}

impl Throttle {
    fn note(&mut self, now: Instant) -> Option<Duration> {
        if now.duration_since(self.since) > WINDOW {
            (self.since, self.count) = (now, 0);
        }
        self.count += 1;
        (self.count > MANY).then_some(PAUSE)
    }
}

/// Calls `hint` when the file or its -wal is written, until it is dropped.
pub struct FileWatch {
    _watcher: RecommendedWatcher,
}

impl FileWatch {
    /// Watches the file's directory, because the -wal file comes and goes.
    pub fn new(path: &Path, hint: impl Fn() + Send + 'static) -> Result<Self, notify::Error> {
        let name = path.file_name().map(OsString::from).unwrap_or_default();
        let mut wal = name.clone();
        wal.push("-wal");
        let directory = match path.parent() {
            Some(d) if !d.as_os_str().is_empty() => d,
            _ => Path::new("."),
        };
        let mut throttle = Throttle { since: Instant::now(), count: 0 };
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else { return hint() };
            let written = matches!(event.kind, EventKind::Modify(_) | EventKind::Create(_) | EventKind::Any);
            let ours = |p: &std::path::PathBuf| p.file_name().is_some_and(|f| *f == *wal || *f == *name);
            if event.need_rescan() || written && event.paths.iter().any(ours) {
                hint();
            }
            if let Some(pause) = throttle.note(Instant::now()) {
                std::thread::sleep(pause);
            }
        })?;
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
        Ok(Self { _watcher: watcher })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_flood_of_notifications_is_held_back() {
        let start = Instant::now();
        let mut throttle = Throttle { since: start, count: 0 };
        let at = |ms: u64| start + Duration::from_millis(ms);
        // 200 transactions a second, ten writes each.
        assert!((0..20_000u64).all(|i| throttle.note(at(i / 2)).is_none()));
        let later = at(60_000);
        let held = (0..MANY * 2).filter(|_| throttle.note(later).is_some()).count();
        assert_eq!(held as u32, MANY);
        assert_eq!(throttle.note(at(61_000)), None);
    }
}
