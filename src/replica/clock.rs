//! The clocks of this process. Invariant: what times out goes by a clock that never jumps; the wall clock is only told
//! to others and compared with theirs.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::core::skew::Judgement;

/// For tests: how far this process's wall clock is off, in milliseconds.
pub const OFFSET_VARIABLE: &str = "LITEMESH_TEST_CLOCK_OFFSET_MS";

/// Milliseconds since 1970 by the wall clock.
pub fn wall_clock_ms() -> u64 {
    static OFFSET_MS: OnceLock<i64> = OnceLock::new();
    let offset_ms = *OFFSET_MS
        .get_or_init(|| std::env::var(OFFSET_VARIABLE).ok().and_then(|v| v.parse().ok()).unwrap_or_default());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    now.saturating_add_signed(offset_ms)
}

/// Milliseconds by a clock that began with the wall clock's time when this process did, and never jumps.
pub fn steady_ms() -> u64 {
    static START: OnceLock<(Instant, u64)> = OnceLock::new();
    let (start, ms) = START.get_or_init(|| (Instant::now(), wall_clock_ms()));
    ms + start.elapsed().as_millis() as u64
}

/// What the live nodes' clocks mean, as of the last time that one was heard.
#[derive(Debug, Clone)]
pub struct SharedClocks(Arc<Mutex<Judgement>>);

impl SharedClocks {
    /// Nobody has been heard yet.
    pub fn new(max_skew_ms: u64) -> Self {
        Self(Arc::new(Mutex::new(Judgement::alone(max_skew_ms))))
    }

    /// The latest judgement.
    pub fn get(&self) -> Judgement {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces it; returns the one before.
    pub fn set(&self, judgement: Judgement) -> Judgement {
        std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), judgement)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steady_clock_begins_with_the_wall_clock() {
        let (before, steady) = (wall_clock_ms(), steady_ms());
        assert!(steady + 60_000 > before && steady < before + 60_000);
        assert!(steady_ms() >= steady);
    }
}
