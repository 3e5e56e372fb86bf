//! A network in memory for simulations: it drops, delays, duplicates, reorders and cuts, and keeps a log a node.
//! Invariant: the same seed and the same calls give the same deliveries.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use bytes::Bytes;

use super::link::{Incoming, LogEnd, LogRequest, Logged, Outgoing};
use crate::core::message::{Fragment, decode};
use crate::core::names::{DbName, NodeName};

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

/// Database, site and payload of each message.
type Log = VecDeque<(DbName, u64, Bytes)>;

/// A network of named endpoints.
pub struct MemoryFabric {
    random: StdRng,
    weather: Weather,
    nodes: BTreeSet<NodeName>,
    cuts: BTreeSet<(NodeName, NodeName)>,
    flying: BTreeMap<(u64, u64), (NodeName, NodeName, Incoming)>,
    sequence: u64,
    /// What each node's log took, and the place of the first that it still holds.
    logs: BTreeMap<NodeName, (u64, Log)>,
    /// How many messages a log keeps.
    log_size: usize,
}

impl MemoryFabric {
    /// A network without endpoints. The seed also says how long logs are: some keep nothing.
    pub fn new(seed: u64, weather: Weather) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            weather,
            nodes: BTreeSet::new(),
            cuts: BTreeSet::new(),
            flying: BTreeMap::new(),
            sequence: 0,
            logs: BTreeMap::new(),
            log_size: [10_000, 0, 40][(seed % 3) as usize],
        }
    }

    /// Says how many messages a log keeps from now on.
    pub fn keep_logs(&mut self, messages: usize) {
        self.log_size = messages;
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
        if let Outgoing::Commit { db, site, payload } = &message
            && !self.random.random_bool(self.weather.drop)
        {
            let (_, log) = self.logs.entry(from.clone()).or_insert((1, VecDeque::new()));
            log.push_back((db.clone(), *site, payload.clone()));
        }
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
            Outgoing::ReadLog(asked) => return self.read_log(from, asked, now_ms),
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

    fn read_log(&mut self, reader: &NodeName, asked: LogRequest, now_ms: u64) {
        let (from, node) = (asked.node.clone(), reader.clone());
        let is_cut = |a: &NodeName, b: &NodeName| self.cuts.contains(&(a.clone(), b.clone()));
        if is_cut(&node, &from) || is_cut(&from, &node) || self.random.random_bool(self.weather.drop) {
            return;
        }
        let (pieces, end) = match self.logs.get_mut(&from) {
            Some((first, log)) if self.nodes.contains(&from) => {
                let surplus = log.len().saturating_sub(self.log_size);
                log.drain(..surplus);
                *first += surplus as u64;
                read(*first, log, &asked)
            }
            _ => (Vec::new(), LogEnd::Gone("nobody answers for its log".to_owned())),
        };
        let at = now_ms + self.random.random_range(0..=self.weather.max_delay_ms);
        self.sequence += 1;
        let logged = Incoming::Logged(Logged { asked, pieces, end });
        self.flying.insert((at, self.sequence), (from, node, logged));
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

/// Reads a log whose first message is at `first`.
fn read(first: u64, log: &Log, asked: &LogRequest) -> (Vec<Bytes>, LogEnd) {
    let of_feed = (first..).zip(log).filter(|(_, (db, site, _))| *db == asked.db && *site == asked.site);
    let mut of_feed = of_feed.map(|(at, (.., payload))| (at, payload.clone())).peekable();
    if let Some(position) = asked.position {
        while of_feed.next_if(|(at, _)| *at < position).is_some() {}
    } else {
        let header = |payload: &Bytes| decode::<Fragment>(payload).ok()?.begins();
        while of_feed.next_if(|(_, p)| header(p).is_none_or(|h| h.to <= asked.after)).is_some() {}
        match of_feed.peek().and_then(|(_, payload)| header(payload)) {
            None => return (Vec::new(), LogEnd::End),
            Some(h) if h.from > asked.after => {
                return (Vec::new(), LogEnd::Gone("its log does not reach back that far".to_owned()));
            }
            Some(_) => {}
        }
    }
    let (mut pieces, mut bytes) = (Vec::new(), 0);
    while let Some((_, payload)) = of_feed.next_if(|_| bytes < asked.max_bytes) {
        bytes += payload.len();
        pieces.push(payload);
    }
    let end = of_feed.peek().map_or(LogEnd::End, |(at, _)| LogEnd::More(*at));
    (pieces, end)
}

#[cfg(test)]
mod tests {
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
