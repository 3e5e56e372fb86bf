//! Hybrid logical clocks, sites and versions. Invariant: versions are totally ordered, and a site never makes two
//! commits with the same one.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How many bits of an [`Hlc`] count commits within one millisecond.
const COUNTER_BITS: u32 = 16;

/// A hybrid logical clock: milliseconds since 1970 in the upper 48 bits, a counter in the lower 16
/// (Kulkarni et al., "Logical Physical Clocks", 2014).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Hlc(pub u64);

impl Hlc {
    /// The clock's first value in the given millisecond.
    pub fn from_ms(ms: u64) -> Self {
        Self(ms << COUNTER_BITS)
    }

    /// The wall-clock part, in milliseconds since 1970.
    pub fn ms(self) -> u64 {
        self.0 >> COUNTER_BITS
    }

    /// The next value after everything seen so far (`self`), not before the wall clock `now_ms`.
    pub fn tick(self, now_ms: u64) -> Self {
        Self((self.0 + 1).max(Self::from_ms(now_ms).0))
    }
}

/// One incarnation of one database file: a random id that is stored in the file. Never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SiteId(pub u64);

impl fmt::Display for SiteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// When and where something was written. Ordered by clock, then by site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// The commit's clock.
    pub hlc: Hlc,
    /// The site that made the commit.
    pub site: SiteId,
}

impl Version {
    /// The version of everything that was there when the file was adopted: older than any write.
    pub const ZERO: Self = Self { hlc: Hlc(0), site: SiteId(0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_never_stands_or_goes_back() {
        let clock = Hlc::from_ms(1_000);
        assert_eq!(clock.tick(2_000), Hlc::from_ms(2_000));
        assert_eq!(clock.tick(500), Hlc(clock.0 + 1));
        assert!(clock.tick(1_000) > clock);
    }
}
