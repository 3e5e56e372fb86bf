//! Notices that a file was written. Invariant: a notification is only a hint; the log in the file is the truth, and
//! is looked at regularly even if no hint comes.

use std::ffi::OsString;
use std::path::Path;

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};

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
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else { return hint() };
            let written = matches!(event.kind, EventKind::Modify(_) | EventKind::Create(_) | EventKind::Any);
            let ours = |p: &std::path::PathBuf| p.file_name().is_some_and(|f| *f == *wal || *f == *name);
            if written && event.paths.iter().any(ours) {
                hint();
            }
        })?;
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
        Ok(Self { _watcher: watcher })
    }
}
