//! Rows that differ, put together from the comparisons with each peer. Invariant: every row is counted once, however
//! many nodes it differs on, and a bounded number of them is kept.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::core::digest::Difference;
use crate::core::names::NodeName;
use crate::core::verify::{Cell, Key};
use crate::replica::compare::Finding;
use crate::replica::entry::to_json as json;

/// How many rows are listed; the rest is counted.
pub const LISTED: usize = 1_000;

/// A row that is not the same everywhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Divergent {
    /// Its table.
    pub table: String,
    /// Its key.
    pub key: serde_json::Value,
    /// `missing` (those nodes lack it), `extra` (only they have it), `columns` or `versions`.
    pub kind: String,
    /// The nodes that differ from the most; all of them, if none are the most.
    pub nodes: Vec<NodeName>,
    /// The columns that differ, for the kind `columns`.
    pub columns: Vec<String>,
}

/// A key as JSON.
pub fn key_json(key: &Key) -> serde_json::Value {
    let values: Vec<_> = key.iter().map(Cell::to_value).collect();
    serde_json::Value::Array(values.iter().map(|v| json(v.as_ref())).collect())
}

type Content = Option<(u64, Vec<u64>)>;

struct Row {
    finding: Finding,
    content: BTreeMap<NodeName, Content>,
    columns: Vec<String>,
}

/// Gathers what each comparison found.
pub struct Tally {
    here: NodeName,
    seen: HashSet<u64>,
    rows: HashMap<(String, Key), Row>,
}

impl Tally {
    /// Nothing found yet; `here` is the node that compares.
    pub fn new(here: NodeName) -> Self {
        Self { here, seen: HashSet::new(), rows: HashMap::new() }
    }

    /// Adds what was found with a peer.
    pub fn add(&mut self, peer: &NodeName, found: Vec<Finding>) {
        for finding in found {
            let id = (finding.layout.table.clone(), finding.key.clone());
            let text = format!("{id:?}");
            let hash = blake3::hash(text.as_bytes());
            self.seen.insert(u64::from_be_bytes(hash.as_bytes()[..8].try_into().unwrap_or_default()));
            if self.rows.len() >= LISTED && !self.rows.contains_key(&id) {
                continue;
            }
            let content = |seen: &crate::core::digest::Seen| {
                seen.content().map(|(key, columns)| (key, columns.to_vec()))
            };
            let (ours, theirs) = (content(&finding.ours), content(&finding.theirs));
            let mut columns = Vec::new();
            if let Difference::Columns(places) = &finding.difference {
                let names = places.iter().filter_map(|p| finding.layout.columns.get(*p as usize));
                columns = names.cloned().collect();
            }
            let row = self.rows.entry(id).or_insert_with(|| Row {
                finding,
                content: BTreeMap::from([(self.here.clone(), ours)]),
                columns: Vec::new(),
            });
            row.content.insert(peer.clone(), theirs);
            row.columns.extend(columns);
            row.columns.sort();
            row.columns.dedup();
        }
    }

    /// How many rows differ.
    pub fn count(&self) -> u64 {
        self.seen.len() as u64
    }

    /// The rows, at most [`LISTED`], by table and key. `compared` are all nodes compared with: one for which a row was
    /// not found has it as this node has.
    pub fn rows(mut self, compared: &[NodeName]) -> Vec<Divergent> {
        let here = self.here.clone();
        let values = |key: &Key| key.iter().map(Cell::to_value).collect::<Vec<_>>();
        let mut rows: Vec<Row> = std::mem::take(&mut self.rows).into_values().collect();
        rows.sort_by_cached_key(|r| (r.finding.layout.table.clone(), values(&r.finding.key)));
        rows.into_iter()
            .map(|mut row| {
                let ours = row.content[&here].clone();
                for node in compared {
                    row.content.entry(node.clone()).or_insert_with(|| ours.clone());
                }
                describe(row)
            })
            .collect()
    }
}

fn describe(row: Row) -> Divergent {
    let mut classes: Vec<(&Content, Vec<&NodeName>)> = Vec::new();
    for (node, content) in &row.content {
        match classes.iter_mut().find(|(c, _)| *c == content) {
            Some((_, nodes)) => nodes.push(node),
            None => classes.push((content, vec![node])),
        }
    }
    // The most nodes; of two equal camps the one that has a row.
    classes.sort_by_key(|(content, nodes)| (std::cmp::Reverse(nodes.len()), content.is_none()));
    let tie = classes.len() > 1 && classes[0].1.len() == classes[1].1.len();
    let absent = |content: &Content| content.is_none();
    let odd = classes.iter().skip(1);
    let kind = match row.finding.difference {
        Difference::Versions => "versions",
        _ if odd.clone().all(|(c, _)| absent(c)) => "missing",
        _ if absent(classes[0].0) => "extra",
        _ => "columns",
    };
    let all = tie && kind != "missing" || kind == "versions";
    let nodes = classes.iter().skip(usize::from(!all)).flat_map(|(_, nodes)| nodes.iter());
    let mut nodes: Vec<NodeName> = nodes.map(|n| (*n).clone()).collect();
    nodes.sort();
    Divergent {
        table: row.finding.layout.table.clone(),
        key: key_json(&row.finding.key),
        kind: kind.to_owned(),
        nodes,
        columns: row.columns,
    }
}
