//! Whose clock is right. Invariant: one wrong clock among three or more moves nobody else's; the clock that counts is
//! one that a live node really has.
//!
//! Of the live nodes' clocks, the own included, the middle one counts; of an even number the earlier of the two in the
//! middle, so of two nodes the earlier: a write dated too early by it is still later than everything its writer had
//! seen, while one dated too late would win over others' later writes until that time has come. What arrives is
//! measured by the same clock; but of two nodes each measures by its own: the other one's may have been set back.

use std::collections::BTreeMap;

use super::names::NodeName;

/// A clock that was heard of for longer than this ago does not count.
pub const FRESH_MS: u64 = 7_000;
/// How far a file's clock may be exceeded whatever the clocks say: files that went ahead together stay in step.
const STEP_MS: u64 = 1_000;

/// What peers said of their clocks, and when, by a clock of ours that never jumps.
#[derive(Debug, Clone, Default)]
pub struct Clocks(BTreeMap<NodeName, (u64, u64)>);

impl Clocks {
    /// A peer said that it is `their_ms` there.
    pub fn hear(&mut self, node: &NodeName, their_ms: u64, steady_ms: u64) {
        self.0.insert(node.clone(), (their_ms, steady_ms));
    }

    /// A peer is gone.
    pub fn forget(&mut self, node: &NodeName) {
        self.0.remove(node);
    }

    /// What all clocks together mean now.
    pub fn judge(&self, own_ms: u64, steady_ms: u64, max_skew_ms: u64) -> Judgement {
        let fresh = self.0.iter().filter(|(_, (_, at))| steady_ms < at + FRESH_MS);
        let theirs: Vec<(&NodeName, i64)> =
            fresh.map(|(node, (ms, at))| (node, *ms as i64 + steady_ms.saturating_sub(*at) as i64)).collect();
        let mut all: Vec<i64> = theirs.iter().map(|(_, ms)| *ms).chain([own_ms as i64]).collect();
        all.sort_unstable();
        let mesh_ms = all[(all.len() - 1) / 2];
        let far = |off_ms: i64| off_ms.unsigned_abs() > max_skew_ms;
        let wrong = theirs.iter().map(|(node, ms)| ((*node).clone(), ms - mesh_ms));
        let accept_ms = if all.len() == 2 { own_ms as i64 } else { mesh_ms };
        Judgement {
            ahead_of_steady_ms: mesh_ms - steady_ms as i64,
            accept_ahead_ms: accept_ms - steady_ms as i64,
            clocks: all.len(),
            own_off_ms: own_ms as i64 - mesh_ms,
            wrong: wrong.filter(|(_, off)| far(*off)).collect(),
            max_skew_ms,
        }
    }
}

/// What the live nodes' clocks mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// The mesh's clock minus our clock that never jumps.
    pub ahead_of_steady_ms: i64,
    /// The clock that what arrives is measured by, minus our clock that never jumps.
    pub accept_ahead_ms: i64,
    /// How many clocks were asked, the own included.
    pub clocks: usize,
    /// How far the own clock is ahead of the mesh's.
    pub own_off_ms: i64,
    /// Peers whose clocks are far from the mesh's, and how far ahead.
    pub wrong: BTreeMap<NodeName, i64>,
    /// How far is far.
    pub max_skew_ms: u64,
}

impl Judgement {
    /// The judgement of a node that has heard of nobody, whose own clock is the one that never jumps.
    pub fn alone(max_skew_ms: u64) -> Self {
        Self {
            ahead_of_steady_ms: 0,
            accept_ahead_ms: 0,
            clocks: 1,
            own_off_ms: 0,
            wrong: BTreeMap::new(),
            max_skew_ms,
        }
    }

    /// The mesh's clock.
    pub fn mesh_ms(&self, steady_ms: u64) -> u64 {
        steady_ms.saturating_add_signed(self.ahead_of_steady_ms)
    }

    /// The latest date that is taken in by a file whose own clock stands at `file_ms`.
    pub fn latest_ms(&self, steady_ms: u64, file_ms: u64) -> u64 {
        let measure_ms = steady_ms.saturating_add_signed(self.accept_ahead_ms);
        (measure_ms + self.max_skew_ms).max(file_ms + STEP_MS)
    }

    /// Whether the own clock is far from the mesh's.
    pub fn is_own_wrong(&self) -> bool {
        self.own_off_ms.unsigned_abs() > self.max_skew_ms
    }

    /// What to tell about the clocks, in whole sentences; nothing if they agree.
    pub fn alarms(&self, own: &NodeName) -> Vec<String> {
        let own_off = self.is_own_wrong().then_some((own.clone(), self.own_off_ms));
        let all = own_off.into_iter().chain(self.wrong.iter().map(|(n, off)| (n.clone(), *off)));
        let tell = |(node, off_ms): (NodeName, i64)| {
            let (off, this) = (direction(off_ms), if node == *own { " (this node)" } else { "" });
            match self.clocks {
                2 => format!(
                    "the clocks of the two nodes differ: that of node {node}{this} is {off} the other's; nobody can tell which \
                     is wrong, the earlier one counts until they agree: set the clocks right"
                ),
                n => format!(
                    "the clock of node {node}{this} is {off} the mesh's, by the middle one of {n} clocks: set the clocks right"
                ),
            }
        };
        all.map(tell).collect()
    }
}

/// "12 s ahead of", "3 s behind".
pub fn direction(off_ms: i64) -> String {
    let word = if off_ms > 0 { "ahead of" } else { "behind" };
    format!("{} s {word}", off_ms.unsigned_abs() / 1_000)
}

/// A date in milliseconds since 1970 as people write it, in UTC (Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms", civil_from_days).
pub fn utc(ms: u64) -> String {
    let (days, s) = ((ms / 86_400_000) as i64 + 719_468, ms / 1_000 % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let m = (5 * of_year + 2) / 153;
    let (d, month) = (of_year - (153 * m + 2) / 5 + 1, if m < 10 { m + 3 } else { m - 9 });
    let year = year + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{d:02} {:02}:{:02}:{:02} UTC", s / 3_600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000;
    const NOW: u64 = 1_900_000_000_000;

    fn judged(own: u64, others: &[u64]) -> Judgement {
        let mut clocks = Clocks::default();
        for (i, ms) in others.iter().enumerate() {
            clocks.hear(&format!("n{i}").parse().unwrap(), *ms, 1_000);
        }
        // A second later by the clock that never jumps.
        clocks.judge(own + 1_000, 2_000, 60_000)
    }

    #[test]
    fn one_wrong_clock_of_three_counts_for_nobody() {
        for wrong in [NOW + HOUR, NOW - HOUR, 0] {
            let right = judged(NOW, &[NOW + 20, wrong]);
            assert!(right.mesh_ms(2_000).abs_diff(NOW + 1_000) <= 20 && !right.is_own_wrong());
            assert_eq!(right.wrong.keys().map(|n| n.as_str()).collect::<Vec<_>>(), ["n1"]);
            let itself = judged(wrong, &[NOW, NOW + 20]);
            assert!(itself.mesh_ms(2_000).abs_diff(NOW + 1_000) <= 20 && itself.is_own_wrong());
            assert!(itself.wrong.is_empty());
            let told = itself.alarms(&"me".parse().unwrap());
            assert!(told[0].contains("node me (this node)") && told[0].contains("3 clocks"), "{told:?}");
        }
    }

    #[test]
    fn of_two_clocks_the_earlier_counts_on_both() {
        let (early, late) = (judged(NOW, &[NOW + HOUR]), judged(NOW + HOUR, &[NOW]));
        assert_eq!((early.mesh_ms(2_000), late.mesh_ms(2_000)), (NOW + 1_000, NOW + 1_000));
        assert_eq!(early.latest_ms(2_000, 0), NOW + 61_000, "each measures by its own");
        assert_eq!(late.latest_ms(2_000, 0), NOW + HOUR + 61_000);
        assert_eq!((early.own_off_ms, late.own_off_ms), (0, HOUR as i64));
        for (judged, node) in [(early, "n0"), (late, "me")] {
            let told = judged.alarms(&"me".parse().unwrap());
            assert!(
                told[0].contains(&format!("node {node}")) && told[0].contains("3600 s ahead"),
                "{told:?}"
            );
        }
    }

    #[test]
    fn dates_are_right() {
        for (ms, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400_000, "2000-02-29 00:00:00 UTC"),
            (1_795_359_722_505, "2026-11-22 15:02:02 UTC"),
            (4_102_444_799_999, "2099-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(utc(ms), text);
        }
    }

    #[test]
    fn who_is_silent_does_not_count() {
        let mut clocks = Clocks::default();
        clocks.hear(&"a".parse().unwrap(), NOW - HOUR, 1_000);
        assert_eq!(clocks.judge(NOW, 1_000 + FRESH_MS, 60_000).clocks, 1);
        assert_eq!(clocks.judge(NOW, 1_000, 60_000).clocks, 2);
        clocks.forget(&"a".parse().unwrap());
        assert_eq!(clocks.judge(NOW, 1_000, 60_000).clocks, 1);
    }

    #[test]
    fn a_file_that_is_ahead_already_is_followed_a_step_only() {
        let judged = Judgement::alone(60_000);
        assert_eq!(judged.latest_ms(NOW, NOW), NOW + 60_000);
        assert_eq!(judged.latest_ms(NOW, NOW + HOUR), NOW + HOUR + STEP_MS);
    }
}
