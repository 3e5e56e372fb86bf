//! Forks that nobody could see when the file was opened: two files go on under one site, or one went back together with
//! its state directory. Invariant: a site that has forked is left by every file that goes on under it, each with what it
//! has written since it was opened as writes of a new site; so all rows of all branches reach everybody.

use super::absorb::OwnCommit;
use super::adopt::become_site;
use super::engine::{Action, Engine};
use super::events;
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::message::{Holding, Message};
use crate::core::names::NodeName;
use crate::core::vector::Point;
use crate::core::version::{Hlc, SiteId, Version};

/// The key of the sites that were left, in the file.
const LEFT: &str = "left_sites";

impl Engine {
    /// Looks whether a peer knows another history of this file's own feed; then this file goes on as a new site.
    pub(super) fn check_own_feed(&mut self, from: &NodeName, holding: &Holding, now_ms: u64) -> Result<()> {
        let head = self.store().head();
        let ours = head.vector.0.get(&head.site).copied();
        let theirs = holding.vector.0.get(&head.site).copied();
        let why = if holding.site == head.site {
            "has a file of the same site: one is a copy of the other, made together with the state directory"
        } else if holding.left.contains(&head.site) {
            "had a file of the same site, and has left it to this one"
        } else {
            match (ours, theirs) {
                (None, Some(t)) if t.n > 0 => "has commits of this file that it does not have: it went back",
                (Some(o), Some(t)) if t.n > o.n => {
                    "has commits of this file that it does not have: it went back"
                }
                (Some(o), Some(t)) if t.n == o.n && t.id != o.id => {
                    "has another commit under the number of ours"
                }
                _ => return Ok(()),
            }
        };
        let why = format!("node {from} {why}");
        let site = SiteId((rand::random::<u64>() >> 1).max(1));
        let told = format!("the file goes on as a new site, because {why}; nothing is lost");
        let own = self.store_mut().leave_site(site, &told, now_ms)?;
        self.publish(own);
        self.feeds.clear();
        self.actions.push(Action::Warn(format!("{}: {told}", self.db)));
        let holding = self.store.holding(&self.db, true);
        self.actions.push(Action::Broadcast(Message::Holding(holding)));
        Ok(())
    }
}

impl Store {
    /// The sites that this file has left because they had forked.
    pub(super) fn left_sites(&self) -> Result<Vec<SiteId>> {
        let kept: Option<String> = Self::meta(&self.conn, LEFT)?;
        Ok(kept.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default())
    }

    /// Goes on as another site, with what was written since the file was opened as writes of that one.
    fn leave_site(&mut self, site: SiteId, told: &str, now_ms: u64) -> Result<Option<OwnCommit>> {
        if !self.links.is_empty() {
            let why = "it has tables that keep both rows of an id collision, whose rows are known by who wrote them: \
                       stop the node, move the file away, and start it again: it fetches a copy";
            return Err(ReplicaError::Unfit(format!("the file cannot go on as another site: {why}")));
        }
        self.write(|store| {
            // Its commit is not sent: what it holds is the new site's at once.
            store.absorb_pending()?;
            let (old, opened, base) = (store.head.site, store.opened, store.head.lsn);
            let hlc = Hlc(store.head.hlc.0 + 1);
            let forked = |v: Version| v.site == old && v.hlc > opened.hlc;
            let version = Version { hlc, site };
            for plan in store.plans.clone() {
                store.restamp_table(&plan, version, &forked, base)?;
            }
            let sql = "UPDATE __litemesh_site SET n = ?2, hlc = ?3, id = ?4 WHERE site = ?1";
            let values = (old.0 as i64, opened.n as i64, opened.hlc.0 as i64, opened.id as i64);
            store.conn.execute(sql, values)?;
            match opened.n {
                0 => drop(store.head.vector.0.remove(&old)),
                _ => drop(store.head.vector.0.insert(old, opened)),
            }
            // Up to where peers' files are here was found by comparing with what this one only seemed to hold.
            store.conn.execute("DELETE FROM __litemesh_peer", [])?;
            let mut left = store.left_sites()?;
            left.push(old);
            Self::set_meta(&store.conn, LEFT, serde_json::json!(left).to_string())?;
            events::note(&store.conn, now_ms, told.to_owned())?;
            become_site(&store.conn, site)?;
            store.head.site = site;
            store.head.hlc = hlc;
            store.opened = Point { n: 0, hlc: Hlc(0), id: 0 };
            let (body, rows) = store.gather(version, base)?;
            store.save_clock()?;
            if rows > 0 { store.number(version, body, rows).map(Some) } else { Ok(None) }
        })
    }
}
