//! Where the copies of a node's log are, and where they should be: at home while there are one or two nodes, on three
//! from then on, its own among them and the leader of the three, evenly over all nodes. Invariant: one step at a time, each
//! made from what the cluster says is so now; a copy that is the only whole one is never given up.

use serde_json::{Value, json};

use super::conf::placement_tag;
use crate::core::names::NodeName;

/// How many copies a log with copies elsewhere has.
const COPIES: usize = 3;

/// How many copies of its log a node keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogReplicas {
    /// Three from three nodes on, else one.
    #[default]
    Auto,
    /// One, at home.
    One,
    /// Three as soon as there are three nodes.
    Three,
}

/// Where a log's copies should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// The nodes, the log's own first.
    pub(super) copies: Vec<NodeName>,
    /// What binds it to them.
    tags: Vec<String>,
}

impl Wanted {
    /// The log of `node` goes to itself and the two nodes that follow in the ring of all names: so each node has as many
    /// as any other, whoever works it out.
    pub(super) fn of(node: &NodeName, others: &[NodeName], replicas: LogReplicas) -> Self {
        let mut ring: Vec<&NodeName> = others.iter().filter(|other| *other != node).chain([node]).collect();
        ring.sort();
        ring.dedup();
        if replicas == LogReplicas::One || ring.len() < COPIES {
            return Self { copies: vec![node.clone()], tags: vec![placement_tag(node.as_str())] };
        }
        let at = ring.iter().position(|n| *n == node).unwrap_or_default();
        let turned: Vec<NodeName> =
            ring.iter().cycle().skip(at).take(ring.len()).map(|n| (*n).clone()).collect();
        let (copies, rest) = turned.split_at(COPIES);
        // JetStream places a stream anew only when its tags change: the last, which no server has, says where to.
        let names: Vec<&str> = copies.iter().map(NodeName::as_str).collect();
        let at = format!("!at:{}", names.join("+"));
        let mut tags: Vec<String> = rest.iter().map(|n| format!("!{}", placement_tag(n.as_str()))).collect();
        tags.push(at);
        tags.sort();
        Self { copies: copies.to_vec(), tags }
    }
}

/// A stream as the cluster describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) replicas: usize,
    pub(super) tags: Vec<String>,
    pub(super) leader: Option<String>,
    /// The others that hold a copy, and whether it is whole.
    pub(super) followers: Vec<(String, bool)>,
}

impl Seen {
    /// Of an answer of JetStream's that describes a stream.
    pub(super) fn read(info: &Value) -> Self {
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let follower = |r: &Value| {
            let is_whole = r["current"].as_bool() == Some(true) && r["offline"].as_bool() != Some(true);
            (text(&r["name"]), is_whole)
        };
        let mut tags: Vec<String> = list(&info["config"]["placement"]["tags"]).iter().map(text).collect();
        tags.sort();
        let cluster = &info["cluster"];
        Self {
            replicas: info["config"]["num_replicas"].as_u64().unwrap_or(1) as usize,
            tags,
            leader: cluster["leader"].as_str().filter(|l| !l.is_empty()).map(str::to_owned),
            followers: list(&cluster["replicas"]).iter().map(follower).collect(),
        }
    }

    fn holds_whole(&self, node: &NodeName) -> bool {
        self.leads(node) || self.followers.iter().any(|(name, whole)| name == node.as_str() && *whole)
    }

    fn leads(&self, node: &NodeName) -> bool {
        self.leader.as_deref() == Some(node.as_str())
    }

    /// Whether there are fewer copies than there are to be.
    pub(super) fn is_short(&self) -> bool {
        self.followers.len() + 1 < self.replicas
    }

    fn is_at(&self, nodes: &[NodeName]) -> bool {
        let holders = self.followers.iter().map(|(name, _)| name).chain(&self.leader);
        let mut holders: Vec<&str> = holders.map(String::as_str).collect();
        let mut wanted: Vec<&str> = nodes.iter().map(NodeName::as_str).collect();
        holders.sort_unstable();
        wanted.sort_unstable();
        holders == wanted
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing: it is as it should be.
    Settled,
    /// Nothing now: something is on its way.
    Wait,
    /// Give the stream so many copies, bound so.
    Update(usize, Vec<String>),
    /// Let this node lead.
    Lead,
}

/// The next step from what is to what should be.
pub(super) fn next_step(node: &NodeName, wanted: &Wanted, seen: &Seen) -> Step {
    let count = wanted.copies.len();
    if seen.replicas != count {
        // The copy that leads is the one that stays.
        return match count == 1 && !seen.leads(node) {
            true if seen.holds_whole(node) && seen.leader.is_some() => Step::Lead,
            true => Step::Wait,
            // JetStream does not move and count anew at once: without any place it counts.
            false => Step::Update(count, Vec::new()),
        };
    }
    if seen.tags != wanted.tags {
        return Step::Update(count, wanted.tags.clone());
    }
    if !seen.is_at(&wanted.copies) {
        return Step::Wait;
    }
    if seen.leads(node) {
        return Step::Settled;
    }
    if seen.holds_whole(node) && seen.leader.is_some() { Step::Lead } else { Step::Wait }
}

/// Where a log's copies are, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogCopies {
    /// The node that leads it; none while nobody does.
    pub leader: Option<String>,
    /// The nodes that have a copy, those that are not whole yet included.
    pub copies: Vec<String>,
    /// Those of them whose copy is not whole.
    pub behind: Vec<String>,
    /// Where they should be.
    pub wanted: Vec<String>,
    /// They are not there yet.
    pub moving: bool,
}

impl LogCopies {
    /// Where nothing is to be moved.
    pub(super) fn as_seen(seen: &Seen) -> Self {
        let mut copies: Vec<String> =
            seen.followers.iter().map(|(name, _)| name.clone()).chain(seen.leader.clone()).collect();
        copies.sort();
        Self { leader: seen.leader.clone(), wanted: copies.clone(), copies, ..Self::default() }
    }

    pub(super) fn describe(wanted: &Wanted, seen: &Seen, step: &Step) -> Self {
        let mut copies: Vec<String> =
            seen.followers.iter().map(|(name, _)| name.clone()).chain(seen.leader.clone()).collect();
        copies.sort();
        let behind =
            seen.followers.iter().filter(|(_, whole)| !whole).map(|(name, _)| name.clone()).collect();
        let mut wanted: Vec<String> = wanted.copies.iter().map(ToString::to_string).collect();
        wanted.sort();
        Self { leader: seen.leader.clone(), copies, behind, wanted, moving: *step != Step::Settled }
    }
}

/// The part of a stream's configuration that says where its copies are.
pub(super) fn place(config: &mut Value, replicas: usize, tags: &[String]) {
    config["num_replicas"] = json!(replicas);
    config["placement"] = if tags.is_empty() { Value::Null } else { json!({ "tags": tags }) };
}

/// What binds a log to its own node.
pub(super) fn at_home(node: &NodeName) -> Vec<String> {
    vec![placement_tag(node.as_str())]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn names(text: &str) -> Vec<NodeName> {
        text.split_whitespace().map(|name| name.parse().expect("a name")).collect()
    }

    fn seen(replicas: usize, tags: &str, leader: &str, followers: &[(&str, bool)]) -> Seen {
        Seen {
            replicas,
            tags: tags.split_whitespace().map(str::to_owned).collect(),
            leader: (!leader.is_empty()).then(|| leader.to_owned()),
            followers: followers.iter().map(|(name, whole)| ((*name).to_owned(), *whole)).collect(),
        }
    }

    #[test]
    fn copies_are_spread_evenly_and_one_is_at_home() {
        for count in 1..12 {
            let all: Vec<NodeName> = (0..count).map(|i| format!("n{i}").parse().expect("a name")).collect();
            let mut held: BTreeMap<NodeName, usize> = BTreeMap::new();
            for node in &all {
                let wanted = Wanted::of(node, &all, LogReplicas::Auto);
                assert_eq!(wanted.copies[0], *node);
                assert_eq!(wanted.copies.len(), if count < 3 { 1 } else { 3 });
                wanted.copies.iter().for_each(|holder| *held.entry(holder.clone()).or_default() += 1);
                let alone = Wanted::of(node, &all, LogReplicas::One);
                assert_eq!(alone.copies, std::slice::from_ref(node));
            }
            assert!(held.values().all(|n| *n == if count < 3 { 1 } else { 3 }), "{count}: {held:?}");
        }
    }

    #[test]
    fn from_one_copy_to_three_and_back() {
        let (a, all) = (&names("a")[0], names("b c d e"));
        let three = Wanted::of(a, &all, LogReplicas::Auto);
        assert_eq!(three.copies, names("a b c"));
        let step = |seen: Seen| next_step(a, &three, &seen);
        assert_eq!(step(seen(1, "node:a", "a", &[])), Step::Update(3, vec![]));
        let bound = ["!at:a+b+c", "!node:d", "!node:e"].map(str::to_owned).to_vec();
        assert_eq!(step(seen(3, "", "a", &[("d", true), ("c", true)])), Step::Update(3, bound));
        let tags = "!at:a+b+c !node:d !node:e";
        assert_eq!(step(seen(3, tags, "c", &[("d", true), ("a", false), ("b", false)])), Step::Wait);
        assert_eq!(step(seen(3, tags, "c", &[("a", false), ("b", true)])), Step::Wait, "not whole yet");
        assert_eq!(step(seen(3, tags, "c", &[("a", true), ("b", false)])), Step::Lead);
        assert_eq!(step(seen(3, tags, "", &[("a", true), ("b", true), ("c", true)])), Step::Wait);
        assert_eq!(step(seen(3, tags, "a", &[("b", true), ("c", true)])), Step::Settled);

        let one = Wanted::of(a, &names("b"), LogReplicas::Auto);
        let step = |seen: Seen| next_step(a, &one, &seen);
        assert_eq!(step(seen(3, tags, "c", &[("a", true), ("b", true)])), Step::Lead, "home first");
        assert_eq!(step(seen(3, tags, "c", &[("a", false), ("b", true)])), Step::Wait);
        assert_eq!(step(seen(3, tags, "a", &[("b", true)])), Step::Update(1, vec![]));
        assert_eq!(step(seen(1, "", "a", &[])), Step::Update(1, vec!["node:a".to_owned()]));
        assert_eq!(step(seen(1, "node:a", "a", &[])), Step::Settled);
    }
}
