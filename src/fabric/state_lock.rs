//! One process a state directory. Invariant: two servers never have the same streams open, which neither would
//! survive; the system gives the lock back whichever way its holder ends.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use tokio::time::{Instant, sleep};

use super::error::FabricError;

/// A predecessor may be just about to end.
const PATIENCE: Duration = Duration::from_secs(2);
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// The right to use a state directory, for as long as it lives.
#[derive(Debug)]
pub(super) struct StateLock(#[expect(dead_code, reason = "held, not read")] File);

impl StateLock {
    /// Takes it, or says that another process has it.
    pub(super) async fn take(dir: &Path) -> Result<Self, FabricError> {
        let fail =
            |source: io::Error| FabricError::System { what: "cannot lock the state directory", source };
        let path = dir.join("lock");
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path).map_err(fail)?;
        let until = Instant::now() + PATIENCE;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => sleep(TRY_AGAIN).await,
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(FabricError::StateDirInUse { dir: dir.to_owned() });
                }
                Err(e) => return Err(fail(e.into())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_holder_at_a_time() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = StateLock::take(dir.path()).await.expect("free");
        let error = StateLock::take(dir.path()).await.expect_err("held");
        assert!(matches!(error, FabricError::StateDirInUse { .. }));
        drop(first);
        StateLock::take(dir.path()).await.expect("free again");
    }
}
