//! How far catching up has come. Invariant: it tells, and decides nothing.

use super::engine::Engine;
use crate::core::names::NodeName;

/// Catching up with what this node missed.
#[derive(Debug, Clone)]
pub struct CatchUp {
    /// What is read: a node's `log`, or its `rows`.
    pub via: &'static str,
    /// The node that is read from now.
    pub node: NodeName,
    /// When it began.
    pub since_ms: u64,
    /// Bytes that came since then.
    pub bytes: u64,
    /// Commits of peers that were applied since then.
    pub commits: u64,
    /// [`super::engine::Counters::commits_applied`] when it began.
    applied_before: u64,
}

impl Engine {
    /// What catching up does, while it lasts.
    pub fn catching_up(&self) -> Option<CatchUp> {
        let commits = |c: &CatchUp| self.counters.commits_applied - c.applied_before;
        self.catch_up.as_ref().map(|c| CatchUp { commits: commits(c), ..c.clone() })
    }

    /// Catching up goes on from `node`, or begins.
    pub(super) fn catches_up(&mut self, via: &'static str, node: &NodeName, now_ms: u64) {
        let applied_before = self.counters.commits_applied;
        let new = CatchUp { via, node: node.clone(), since_ms: now_ms, bytes: 0, commits: 0, applied_before };
        let catch_up = self.catch_up.get_or_insert(new);
        catch_up.via = via;
        if catch_up.node != *node {
            catch_up.node = node.clone();
        }
    }

    /// So much of it came.
    pub(super) fn caught_up(&mut self, bytes: usize) {
        if let Some(catch_up) = &mut self.catch_up {
            catch_up.bytes += bytes as u64;
        }
    }
}
