//! What is broken when: made from the seed alone. Invariant: the same seed, number of nodes and length give the same
//! plan, whatever happens while it runs.

use std::collections::BTreeMap;
use std::fmt;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// A process of a node that can be killed or stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    Litemesh,
    Server,
    Writer,
    Reader,
}

/// One thing that is broken.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// kill -9; it is started again when the time is over (nats-server by litemesh itself).
    Kill(Victim),
    /// kill -9 of all processes of the node at once.
    KillAll,
    /// SIGSTOP, and SIGCONT when the time is over.
    Pause(Victim),
    /// SIGTERM, and a start when the time is over.
    Restart,
    /// A restart with a clock that is wrong by so many milliseconds, until the next restart.
    Clock(i64),
    /// A restart with the other binary, where one is given.
    Swap,
    /// Nothing from the other node arrives here.
    CutFrom(usize),
    /// Nothing goes either way between the two.
    CutBoth(usize),
    /// The node's network interface is down.
    LinkDown,
    /// So many percent of the packets that the node gets are dropped.
    Loss(u32),
    /// What the node sends is late, by about so many milliseconds.
    Delay(u32),
    /// The file system of the node's database, or of its state directory, has no space.
    FullDisk,
    /// The file is replaced by an older copy of itself.
    PutBack { killed: bool },
    /// The node's schema is changed.
    Ddl,
}

impl Kind {
    /// What it is counted as.
    pub fn name(&self) -> String {
        let victim = |v: &Victim| format!("{v:?}").to_lowercase();
        match self {
            Self::Kill(v) => format!("kill-{}", victim(v)),
            Self::KillAll => "kill-all".into(),
            Self::Pause(v) => format!("pause-{}", victim(v)),
            Self::Restart => "restart".into(),
            Self::Clock(_) => "clock".into(),
            Self::Swap => "other-binary".into(),
            Self::CutFrom(_) => "cut-one-way".into(),
            Self::CutBoth(_) => "cut-two-way".into(),
            Self::LinkDown => "link-down".into(),
            Self::Loss(_) => "loss".into(),
            Self::Delay(_) => "delay".into(),
            Self::FullDisk => "full-disk".into(),
            Self::PutBack { .. } => "older-copy".into(),
            Self::Ddl => "ddl".into(),
        }
    }
}

/// A fault, its place and its time.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// After the beginning of its round.
    pub at_ms: u64,
    pub lasts_ms: u64,
    pub node: usize,
    pub kind: Kind,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {:>6} ms, for {:>5} ms, node {}: {:?}", self.at_ms, self.lasts_ms, self.node, self.kind)
    }
}

/// What the plan is made from.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub seed: u64,
    pub nodes: usize,
    pub seconds: u64,
    /// Whether there is another binary to run nodes with.
    pub swaps: bool,
}

/// A round: faults, and after its length all is healed and looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    pub lasts_ms: u64,
    pub faults: Vec<Fault>,
}

/// The rounds of a run. Their lengths add up to the seconds asked for; healing and looking come on top.
pub fn rounds(options: Options) -> Vec<Round> {
    let mut rng = StdRng::seed_from_u64(options.seed);
    let mut left_ms = options.seconds.max(1) * 1_000;
    let mut rounds = Vec::new();
    let mut coming = Deck::default();
    while left_ms > 0 {
        let some_ms = rng.random_range(12_000..=30_000);
        // What is left then would be too short to be a round of its own.
        let lasts_ms = if left_ms < some_ms + 8_000 { left_ms } else { some_ms };
        left_ms -= lasts_ms;
        rounds.push(Round { lasts_ms, faults: faults(&mut rng, options, lasts_ms, &mut coming) });
    }
    rounds
}

fn faults(rng: &mut StdRng, options: Options, lasts_ms: u64, coming: &mut Deck) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut at_ms = rng.random_range(200..1_500);
    while at_ms < lasts_ms {
        let node = rng.random_range(0..options.nodes);
        let kind = coming.next(rng, node, options);
        let lasts_ms = match kind {
            Kind::Kill(_)
            | Kind::KillAll
            | Kind::Restart
            | Kind::Clock(_)
            | Kind::Swap
            | Kind::PutBack { .. } => rng.random_range(0..4_000),
            Kind::Ddl => 0,
            _ => rng.random_range(300..6_000),
        };
        faults.push(Fault { at_ms, lasts_ms, node, kind });
        // Sometimes several at nearly the same moment.
        at_ms += if rng.random_ratio(1, 4) { rng.random_range(0..100) } else { rng.random_range(300..2_200) };
    }
    faults
}

/// Kinds in a shuffled order, all of them before any comes again: a short run has as many as it can have.
#[derive(Default)]
struct Deck(Vec<usize>);

impl Deck {
    fn next(&mut self, rng: &mut StdRng, node: usize, options: Options) -> Kind {
        const KINDS: usize = 21;
        loop {
            if self.0.is_empty() {
                self.0 = (0..KINDS).collect();
                rand::seq::SliceRandom::shuffle(&mut self.0[..], rng);
            }
            let card = self.0.pop().unwrap_or_default();
            let other = (node + rng.random_range(1..options.nodes)) % options.nodes;
            return match card {
                0 | 1 => Kind::Kill(Victim::Litemesh),
                2 => Kind::Kill(Victim::Server),
                3 => Kind::Kill(Victim::Writer),
                4 => Kind::Kill(Victim::Reader),
                5 => Kind::KillAll,
                6 => Kind::Pause(Victim::Litemesh),
                7 => Kind::Pause(Victim::Server),
                8 => Kind::Pause(Victim::Writer),
                9 => Kind::Pause(Victim::Reader),
                10 => Kind::Restart,
                11 => Kind::Clock(clock(rng)),
                12 if options.swaps => Kind::Swap,
                12 => continue,
                13 => Kind::CutFrom(other),
                14 => Kind::CutBoth(other),
                15 => Kind::LinkDown,
                16 => Kind::Loss(*[5, 20, 50].choose(rng).unwrap_or(&5)),
                17 => Kind::Delay(*[20, 100, 400].choose(rng).unwrap_or(&20)),
                18 => Kind::FullDisk,
                19 => Kind::Ddl,
                _ => Kind::PutBack { killed: rng.random_ratio(1, 2) },
            };
        }
    }
}

/// Mostly within what a mesh takes without a word; sometimes an hour back, which does no harm either.
fn clock(rng: &mut StdRng) -> i64 {
    match rng.random_ratio(1, 4) {
        true => -3_600_000,
        false => rng.random_range(-25_000..=25_000),
    }
}

/// How often each kind comes in the plan.
pub fn counts<'a>(faults: impl Iterator<Item = &'a Fault>) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for fault in faults {
        *counts.entry(fault.kind.name()).or_default() += 1;
    }
    counts
}

/// That the seed alone makes the plan.
pub fn self_check() {
    let options = Options { seed: 7, nodes: 3, seconds: 300, swaps: true };
    assert_eq!(rounds(options), rounds(options), "the same seed gave two plans");
    assert_ne!(rounds(options), rounds(Options { seed: 8, ..options }), "two seeds gave one plan");
    let all = rounds(options);
    assert_eq!(all.iter().map(|r| r.lasts_ms).sum::<u64>(), 300_000);
    let kinds = counts(all.iter().flat_map(|r| &r.faults));
    assert_eq!(kinds.len(), 20, "every kind of fault comes in five minutes: {kinds:?}");
}
