//! A network in memory for simulations: it drops, delays, duplicates, reorders and cuts. Invariant: the same seed
//! and the same calls give the same deliveries.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::link::{Incoming, Outgoing};
use crate::core::names::NodeName;

/// How bad the network is.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    /// Probability that a message is lost.
    pub drop: f64,
    /// Probability that it arrives twice.
    pub duplicate: f64,
    /// The longest delay, in milliseconds; each message draws its own, which reorders them.
    pub max_delay_ms: u64,
}

/// A network of named endpoints.
pub struct MemoryFabric {
    random: StdRng,
    weather: Weather,
    nodes: BTreeSet<NodeName>,
    cuts: BTreeSet<(NodeName, NodeName)>,
    flying: BTreeMap<(u64, u64), (NodeName, NodeName, Incoming)>,
    sequence: u64,
}

impl MemoryFabric {
    /// A network without endpoints.
    pub fn new(seed: u64, weather: Weather) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            weather,
            nodes: BTreeSet::new(),
            cuts: BTreeSet::new(),
            flying: BTreeMap::new(),
            sequence: 0,
        }
    }

    /// Adds an endpoint, or brings one back.
    pub fn up(&mut self, node: &NodeName) {
        self.nodes.insert(node.clone());
    }

    /// Takes an endpoint away: what is under way to it is lost.
    pub fn down(&mut self, node: &NodeName) {
        self.nodes.remove(node);
        self.flying.retain(|_, (_, to, _)| to != node);
    }

    /// Cuts one direction between two endpoints.
    pub fn cut(&mut self, from: &NodeName, to: &NodeName) {
        self.cuts.insert((from.clone(), to.clone()));
    }

    /// Ends all cuts.
    pub fn heal(&mut self) {
        self.cuts.clear();
    }

    /// Changes the weather.
    pub fn set_weather(&mut self, weather: Weather) {
        self.weather = weather;
    }

    /// Sends a message.
    pub fn send(&mut self, from: &NodeName, message: Outgoing, now_ms: u64) {
        let others = self.nodes.iter().filter(|n| *n != from).cloned();
        let (receivers, incoming): (Vec<NodeName>, Incoming) = match message {
            Outgoing::Commit { db, site, payload } => {
                (others.collect(), Incoming::Commit { from: from.clone(), db, site, payload })
            }
            Outgoing::Broadcast { payload } => {
                (others.collect(), Incoming::Message { from: from.clone(), payload })
            }
            Outgoing::Direct { to, payload } => {
                (others.filter(|n| *n == to).collect(), Incoming::Message { from: from.clone(), payload })
            }
        };
        for to in receivers {
            let copies = 1 + u32::from(self.random.random_bool(self.weather.duplicate));
            for _ in 0..copies {
                if self.cuts.contains(&(from.clone(), to.clone()))
                    || self.random.random_bool(self.weather.drop)
                {
                    continue;
                }
                let at = now_ms + self.random.random_range(0..=self.weather.max_delay_ms);
                self.sequence += 1;
                self.flying.insert((at, self.sequence), (from.clone(), to.clone(), incoming.clone()));
            }
        }
    }

    /// What arrives up to `now_ms`, in order.
    pub fn deliver(&mut self, now_ms: u64) -> Vec<(NodeName, Incoming)> {
        let later = self.flying.split_off(&(now_ms + 1, 0));
        let due = std::mem::replace(&mut self.flying, later);
        let cuts = &self.cuts;
        let arrives = due.into_values().filter(|(from, to, _)| !cuts.contains(&(from.clone(), to.clone())));
        arrives.map(|(_, to, message)| (to, message)).collect()
    }

    /// Whether nothing is under way.
    pub fn is_quiet(&self) -> bool {
        self.flying.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn run(seed: u64) -> Vec<String> {
        let weather = Weather { drop: 0.2, duplicate: 0.2, max_delay_ms: 50 };
        let mut net = MemoryFabric::new(seed, weather);
        let names: Vec<NodeName> = ["a", "b", "c"].iter().map(|n| n.parse().unwrap()).collect();
        names.iter().for_each(|n| net.up(n));
        net.cut(&names[0], &names[2]);
        for i in 0..50u8 {
            net.send(&names[0], Outgoing::Broadcast { payload: Bytes::from(vec![i]) }, u64::from(i));
        }
        let arrived = net.deliver(1_000);
        assert!(net.is_quiet());
        assert!(arrived.iter().all(|(to, _)| *to == names[1]), "a cut is a cut, and nothing echoes");
        arrived.iter().map(|(to, m)| format!("{to} {m:?}")).collect()
    }

    #[test]
    fn a_seed_repeats_itself_and_messages_get_lost_doubled_and_reordered() {
        let first = run(7);
        assert_eq!(first, run(7));
        assert_ne!(first, run(8));
        let mut sorted = first.clone();
        sorted.sort();
        sorted.dedup();
        assert!(sorted.len() < 50 && sorted.len() < first.len());
    }
}
