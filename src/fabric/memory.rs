//! A mesh without a network, for simulations: it drops, delays, reorders, duplicates and cuts as its seed says.
//! Invariant: the same seed and the same calls give the same deliveries; nothing here reads a clock.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::link::{Incoming, Outgoing};
use crate::core::names::NodeName;

/// What a link does to messages.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkFaults {
    /// Of messages that never arrive, 0 to 1.
    pub drop_probability: f64,
    /// Of messages that arrive twice, 0 to 1; the second one with a delay of its own.
    pub duplicate_probability: f64,
    /// How long a message takes. Where the range is wide, messages overtake each other.
    pub delay_ms: RangeInclusive<u64>,
}

impl LinkFaults {
    /// Everything arrives, once, in order, at once.
    pub fn none() -> Self {
        Self { drop_probability: 0.0, duplicate_probability: 0.0, delay_ms: 0..=0 }
    }
}

/// What became of messages, each counted for each of its addressees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Sent.
    pub sent: u64,
    /// Handed out; duplicates count.
    pub delivered: u64,
    /// Lost by chance.
    pub dropped: u64,
    /// Made twice by chance.
    pub duplicated: u64,
    /// Lost because a link was cut or a node was down, when it was sent or when it would have arrived.
    pub cut: u64,
}

#[derive(Debug)]
struct Flight {
    from: NodeName,
    to: NodeName,
    incoming: Incoming,
}

/// The mesh.
#[derive(Debug)]
pub struct MemoryFabric {
    rng: StdRng,
    faults: LinkFaults,
    links: BTreeMap<(NodeName, NodeName), LinkFaults>,
    /// Whether each node is up.
    nodes: BTreeMap<NodeName, bool>,
    cuts: BTreeSet<(NodeName, NodeName)>,
    /// By arrival time, then by the order in which they were sent.
    flights: BTreeMap<(u64, u64), Flight>,
    launched: u64,
    stats: MemoryStats,
}

impl MemoryFabric {
    /// A mesh whose links all do the same, for as long as [`Self::set_link`] says nothing else.
    pub fn new(seed: u64, faults: LinkFaults) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            faults,
            links: BTreeMap::new(),
            nodes: BTreeMap::new(),
            cuts: BTreeSet::new(),
            flights: BTreeMap::new(),
            launched: 0,
            stats: MemoryStats::default(),
        }
    }

    /// A new node, up; one that is down comes up.
    pub fn bring_up(&mut self, node: &NodeName) {
        self.nodes.insert(node.clone(), true);
    }

    /// The node neither sends nor receives; what is on its way to it is lost unless it is up again by then.
    pub fn take_down(&mut self, node: &NodeName) {
        self.nodes.insert(node.clone(), false);
    }

    /// What the link does from now on, one way.
    pub fn set_link(&mut self, from: &NodeName, to: &NodeName, faults: LinkFaults) {
        self.links.insert((from.clone(), to.clone()), faults);
    }

    /// What every link does from now on.
    pub fn set_all_links(&mut self, faults: LinkFaults) {
        self.links.clear();
        self.faults = faults;
    }

    /// Nothing gets through between the two, either way.
    pub fn cut(&mut self, a: &NodeName, b: &NodeName) {
        self.cut_one_way(a, b);
        self.cut_one_way(b, a);
    }

    /// Nothing gets through from one to the other.
    pub fn cut_one_way(&mut self, from: &NodeName, to: &NodeName) {
        self.cuts.insert((from.clone(), to.clone()));
    }

    /// Nothing gets through between those of `side` and all others.
    pub fn partition(&mut self, side: &[NodeName]) {
        let others: Vec<_> = self.nodes.keys().filter(|node| !side.contains(node)).cloned().collect();
        for (a, b) in side.iter().flat_map(|a| others.iter().map(move |b| (a, b))) {
            self.cut(a, b);
        }
    }

    /// No link is cut any more.
    pub fn heal(&mut self) {
        self.cuts.clear();
    }

    /// Sends a message at a time. A node that is down, or unknown, sends nothing.
    pub fn send(&mut self, from: &NodeName, out: Outgoing, now_ms: u64) {
        let (only, incoming) = match out {
            Outgoing::Commit { db, site, payload } => {
                (None, Incoming::Commit { from: from.clone(), db, site, payload })
            }
            Outgoing::Broadcast { payload } => (None, Incoming::Message { from: from.clone(), payload }),
            Outgoing::Direct { to, payload } => (Some(to), Incoming::Message { from: from.clone(), payload }),
        };
        let addressees: Vec<NodeName> = match only {
            Some(to) => vec![to],
            None => self.nodes.keys().cloned().collect(),
        };
        for to in addressees.into_iter().filter(|to| to != from) {
            self.launch(from, to, &incoming, now_ms);
        }
    }

    fn launch(&mut self, from: &NodeName, to: NodeName, incoming: &Incoming, now_ms: u64) {
        self.stats.sent += 1;
        if !self.passes(from, &to) {
            self.stats.cut += 1;
            return;
        }
        let faults = self.links.get(&(from.clone(), to.clone())).unwrap_or(&self.faults).clone();
        if self.rng.random_bool(faults.drop_probability) {
            self.stats.dropped += 1;
            return;
        }
        let copies = if self.rng.random_bool(faults.duplicate_probability) { 2 } else { 1 };
        self.stats.duplicated += copies - 1;
        for _ in 0..copies {
            let due_ms = now_ms + self.rng.random_range(faults.delay_ms.clone());
            self.launched += 1;
            let flight = Flight { from: from.clone(), to: to.clone(), incoming: incoming.clone() };
            self.flights.insert((due_ms, self.launched), flight);
        }
    }

    fn passes(&self, from: &NodeName, to: &NodeName) -> bool {
        let up = |node: &NodeName| self.nodes.get(node).copied().unwrap_or(false);
        up(from) && up(to) && !self.cuts.contains(&(from.clone(), to.clone()))
    }

    /// When the next message would arrive.
    pub fn next_due_ms(&self) -> Option<u64> {
        self.flights.keys().next().map(|(due_ms, _)| *due_ms)
    }

    /// The next message that gets through, whenever that is: its time, addressee and content.
    pub fn deliver_next(&mut self) -> Option<(u64, NodeName, Incoming)> {
        while let Some(((due_ms, _), flight)) = self.flights.pop_first() {
            // What a node sent before it went down is on its way all the same; a cut stops what is in the link.
            let arrives = self.nodes.get(&flight.to).copied().unwrap_or(false)
                && !self.cuts.contains(&(flight.from.clone(), flight.to.clone()));
            if arrives {
                self.stats.delivered += 1;
                return Some((due_ms, flight.to, flight.incoming));
            }
            self.stats.cut += 1;
        }
        None
    }

    /// All that has arrived by a time, in order of arrival.
    pub fn advance(&mut self, now_ms: u64) -> Vec<(NodeName, Incoming)> {
        // What is not due yet must not be handed out in place of what is lost.
        let later = self.flights.split_off(&(now_ms.saturating_add(1), 0));
        let mut arrived = Vec::new();
        while let Some((_, to, incoming)) = self.deliver_next() {
            arrived.push((to, incoming));
        }
        self.flights = later;
        arrived
    }

    /// What became of messages so far.
    pub fn stats(&self) -> MemoryStats {
        self.stats
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn name(text: &str) -> NodeName {
        text.parse().expect("a name")
    }

    fn mesh(seed: u64, faults: LinkFaults) -> (MemoryFabric, [NodeName; 3]) {
        let mut mesh = MemoryFabric::new(seed, faults);
        let nodes = [name("a"), name("b"), name("c")];
        nodes.iter().for_each(|node| mesh.bring_up(node));
        (mesh, nodes)
    }

    fn broadcast(number: u32) -> Outgoing {
        Outgoing::Broadcast { payload: Bytes::copy_from_slice(&number.to_be_bytes()) }
    }

    fn number(incoming: &Incoming) -> u32 {
        let (Incoming::Commit { payload, .. } | Incoming::Message { payload, .. }) = incoming;
        u32::from_be_bytes(payload.as_ref().try_into().expect("four bytes"))
    }

    #[test]
    fn reaches_whom_it_is_for_and_never_its_sender() {
        let (mut mesh, [a, b, c]) = mesh(1, LinkFaults::none());
        mesh.send(&a, broadcast(1), 5);
        assert_eq!(mesh.advance(4).len(), 0);
        let to: Vec<_> = mesh.advance(5).into_iter().map(|(to, _)| to).collect();
        assert_eq!(to, [b.clone(), c.clone()]);
        let payload = Bytes::from_static(&[0, 0, 0, 2]);
        mesh.send(&a, Outgoing::Direct { to: c.clone(), payload: payload.clone() }, 6);
        let db = "app".parse().expect("a name");
        mesh.send(&c, Outgoing::Commit { db, site: 9, payload }, 6);
        let arrived = mesh.advance(6);
        assert_eq!(arrived.len(), 3);
        assert!(matches!(&arrived[0], (to, Incoming::Message { from, .. }) if *to == c && *from == a));
        assert!(
            matches!(&arrived[1], (to, Incoming::Commit { from, site: 9, .. }) if *to == a && *from == c)
        );
    }

    #[test]
    fn the_seed_decides_everything() {
        let run = |seed| {
            let faults = LinkFaults { drop_probability: 0.2, duplicate_probability: 0.2, delay_ms: 1..=50 };
            let (mut mesh, [a, b, _]) = mesh(seed, faults);
            for i in 0..200 {
                mesh.send(if i % 2 == 0 { &a } else { &b }, broadcast(i), u64::from(i));
            }
            let arrived: Vec<_> =
                mesh.advance(1000).iter().map(|(to, incoming)| (to.clone(), number(incoming))).collect();
            (arrived, mesh.stats())
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1).0, run(2).0);
        let (arrived, stats) = run(1);
        assert_eq!(stats.delivered, arrived.len() as u64);
        assert_eq!(stats.sent + stats.duplicated, stats.delivered + stats.dropped);
        assert!(stats.dropped > 40 && stats.duplicated > 40);
        let at_c: Vec<_> = arrived.iter().filter(|(to, _)| *to == name("c")).map(|(_, n)| *n).collect();
        assert!(!at_c.is_sorted(), "messages overtake each other");
    }

    #[test]
    fn cuts_are_one_way_or_both_and_heal() {
        let (mut mesh, [a, b, c]) = mesh(1, LinkFaults { delay_ms: 10..=10, ..LinkFaults::none() });
        mesh.cut_one_way(&a, &b);
        mesh.send(&a, broadcast(1), 0);
        mesh.send(&b, broadcast(2), 0);
        let arrived: Vec<_> = mesh.advance(10).iter().map(|(to, i)| (to.clone(), number(i))).collect();
        assert_eq!(arrived, [(c.clone(), 1), (a.clone(), 2), (c.clone(), 2)]);
        mesh.send(&b, broadcast(3), 20);
        mesh.partition(std::slice::from_ref(&b));
        assert_eq!(mesh.advance(30).len(), 0, "a cut stops what is on its way");
        mesh.send(&a, broadcast(4), 40);
        assert_eq!(mesh.advance(50).len(), 1);
        mesh.heal();
        mesh.send(&a, broadcast(5), 60);
        assert_eq!(mesh.advance(70).len(), 2);
    }

    #[test]
    fn a_node_that_is_down_is_silent_and_deaf() {
        let (mut mesh, [a, b, c]) = mesh(1, LinkFaults { delay_ms: 10..=10, ..LinkFaults::none() });
        mesh.take_down(&b);
        mesh.send(&b, broadcast(1), 0);
        mesh.send(&a, broadcast(2), 0);
        mesh.send(&c, broadcast(3), 0);
        mesh.take_down(&c);
        mesh.bring_up(&b);
        let arrived: Vec<_> = mesh.advance(10).iter().map(|(to, i)| (to.clone(), number(i))).collect();
        assert_eq!(arrived, [(a, 3)], "sent while it was down, or arrived while it was down, is lost");
    }
}
