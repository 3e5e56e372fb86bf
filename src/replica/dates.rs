//! Dates of writes against the mesh's clock. Invariant: nothing dated later than a bound moves this file's clock, and
//! what waits for that goes on by itself.

use super::engine::Engine;
use crate::core::skew::{Judgement, direction, utc};
use crate::core::vector::Vector;

impl Engine {
    /// Tells what the live nodes' clocks mean. Without it the clock given with each call is taken for the mesh's.
    pub fn set_clocks(&mut self, clocks: Judgement, now_ms: u64) {
        self.store.dates = Some((clocks.mesh_ms(now_ms), clocks.max_skew_ms));
        self.clocks = clocks;
    }

    /// What the live nodes' clocks mean.
    pub fn clocks(&self) -> &Judgement {
        &self.clocks
    }

    /// Commits that wait here with a later date than their feed's head has at a peer were dated anew there: their rows
    /// are fetched from it.
    pub(super) fn drop_redated(&mut self, held: &Vector) {
        for (site, point) in &held.0 {
            let Some(feed) = self.feeds.get_mut(site) else { continue };
            let before = feed.pending.len();
            feed.pending.retain(|_, c| c.header.to > point.n || c.header.hlc <= point.hlc);
            if feed.pending.len() < before {
                feed.bytes = feed.pending.values().map(|c| c.body.len()).sum();
                feed.stopped = None;
                feed.waiting_since_ms = None;
            }
        }
    }

    pub(super) fn too_far_ahead(&self, vector: &Vector, now_ms: u64) -> Option<String> {
        let latest_ms = self.clocks.latest_ms(now_ms, self.store.head().hlc.ms());
        let (site, point) = vector.0.iter().find(|(_, p)| p.hlc.ms() > latest_ms)?;
        Some(dated_ahead(&self.clocks, &self.site_name(*site), point.hlc.ms()))
    }
}

/// Why writes of a date wait, and what helps.
pub(super) fn dated_ahead(clocks: &Judgement, writer: &str, date_ms: u64) -> String {
    let writer = writer.strip_prefix("node ").unwrap_or(writer);
    let wrong = clocks.wrong.iter().find(|(node, off_ms)| node.as_str() == writer && **off_ms > 0);
    let clock = match wrong {
        Some((node, off_ms)) => format!("the clock of node {node} is {} the mesh's", direction(*off_ms)),
        None if clocks.is_own_wrong() => {
            format!("this node's clock is {} the mesh's", direction(clocks.own_off_ms))
        }
        None => "the clock there was wrong, or this node's is".to_owned(),
    };
    format!(
        "its writes are dated {}, ahead of the mesh's clock: {clock}; set the clocks right, then they go on when their time \
         has come, or after 'litemesh repair --restamp' there",
        utc(date_ms)
    )
}
