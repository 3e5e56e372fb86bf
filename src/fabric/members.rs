//! Which nodes belong and where they listen. Invariant: what was learned once survives a restart, so that a restart
//! needs no token.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::address::Address;
use super::private_file::{self, StateFileError};
use crate::core::names::NodeName;

/// A node of many addresses is a fault or an attack on our memory.
const MAX_ADDRESSES: usize = 8;
/// How many nodes that left are remembered.
const MAX_GONE: usize = 256;

/// Why the members are not known.
#[derive(Debug, thiserror::Error)]
pub enum MembersError {
    /// The file system refused.
    #[error(transparent)]
    File(#[from] StateFileError),
    /// The file is not what we wrote.
    #[error("{path} is damaged: delete it and start once more with --join")]
    Damaged {
        /// The file.
        path: String,
    },
}

/// The nodes known, and the addresses that were joined by.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// The addresses of the token this node joined with.
    #[serde(default)]
    seeds: Vec<Address>,
    /// Where the other nodes say they listen.
    #[serde(default)]
    nodes: BTreeMap<NodeName, Vec<Address>>,
    /// Nodes that left or were removed. Told to the others until one of the name comes again: who was away has to hear it.
    #[serde(default)]
    gone: BTreeSet<NodeName>,
}

impl Members {
    /// Those of the file; `None` when there is none.
    pub fn load(path: &Path) -> Result<Option<Self>, MembersError> {
        let Some(bytes) = private_file::read(path)? else { return Ok(None) };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|_| MembersError::Damaged { path: path.display().to_string() })
    }

    /// Keeps them for the next start.
    pub fn save(&self, path: &Path) -> Result<(), MembersError> {
        let text = serde_json::to_vec_pretty(self).expect("strings become JSON");
        Ok(private_file::write(path, &text)?)
    }

    /// Those of a node that joins with a token.
    pub fn from_seeds(seeds: Vec<Address>) -> Self {
        Self { seeds, ..Self::default() }
    }

    /// Has these dialled, too, instead of the addresses that were joined by before.
    pub fn seed(&mut self, addresses: &[Address]) {
        self.seeds = addresses.to_vec();
    }

    /// Takes in what a node says of itself; whether that changed anything.
    pub fn learn(&mut self, node: &NodeName, addresses: &[Address]) -> bool {
        let mut addresses = addresses.to_vec();
        addresses.truncate(MAX_ADDRESSES);
        let is_back = self.gone.remove(node);
        if self.nodes.get(node) == Some(&addresses) {
            return is_back;
        }
        if let Some(before) = self.nodes.insert(node.clone(), addresses.clone()) {
            // Where it was joined by and is not any more.
            self.seeds.retain(|seed| !before.contains(seed) || addresses.contains(seed));
        }
        true
    }

    /// Forgets a node that left; whether that was news. The seeds that were its addresses go with it.
    pub fn forget(&mut self, node: &NodeName) -> bool {
        // Names come from peers: a list without an end is a fault or an attack on our memory.
        let is_news = self.gone.len() < MAX_GONE && self.gone.insert(node.clone());
        let Some(addresses) = self.nodes.remove(node) else { return is_news };
        self.seeds.retain(|seed| !addresses.contains(seed));
        true
    }

    /// Where a node listens; none if it is not known.
    pub fn addresses(&self, node: &NodeName) -> &[Address] {
        self.nodes.get(node).map_or(&[], Vec::as_slice)
    }

    /// The nodes that left or were removed.
    pub fn gone(&self) -> impl Iterator<Item = &NodeName> {
        self.gone.iter()
    }

    /// Whom to dial, each once, without `own`.
    pub fn routes(&self, own: &[Address]) -> Vec<Address> {
        let mut routes: Vec<Address> = Vec::new();
        for address in self.nodes.values().flatten().chain(&self.seeds) {
            if !own.contains(address) && !routes.contains(address) {
                routes.push(address.clone());
            }
        }
        routes
    }

    /// The other nodes that are known by name.
    pub fn names(&self) -> impl Iterator<Item = &NodeName> {
        self.nodes.keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse().expect("an address")
    }

    #[test]
    fn are_learned_kept_and_forgotten() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("members.json");
        assert!(Members::load(&path).expect("readable").is_none());
        let b: NodeName = "b".parse().expect("a name");
        let mut members = Members::from_seeds(vec![address("h:1"), address("h:2")]);
        assert!(members.learn(&b, &[address("h:1"), address("b:3")]));
        assert!(!members.learn(&b, &[address("h:1"), address("b:3")]));
        assert_eq!(members.routes(&[address("h:2")]), [address("h:1"), address("b:3")]);
        members.save(&path).expect("writable");
        assert_eq!(Members::load(&path).expect("readable"), Some(members.clone()));
        assert!(members.forget(&b) && !members.forget(&b));
        assert_eq!(members.routes(&[]), [address("h:2")]);
        assert_eq!(members.gone().collect::<Vec<_>>(), [&b]);
        assert!(members.learn(&b, &[address("b:3")]), "it is back");
        assert_eq!(members.gone().count(), 0);
        std::fs::write(&path, "[").expect("writable");
        assert!(matches!(Members::load(&path), Err(MembersError::Damaged { .. })));
    }
}
