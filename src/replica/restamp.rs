//! Dating writes anew that a wrong clock has dated. Invariant: the rows stay what they are; what was dated beyond the
//! bound is a new write of a new site, and nothing in the file is dated beyond the bound afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::absorb::OwnCommit;
use super::adopt::become_site;
use super::engine::{Action, Engine};
use super::plan::Plan;
use super::store::Store;
use super::{ReplicaError, Result};
use crate::core::capture::state_table;
use crate::core::merge::RowState;
use crate::core::message::Message;
use crate::core::names::NodeName;
use crate::core::sqltext::list;
use crate::core::value::{Value, ValueRef};
use crate::core::version::{Hlc, SiteId, Version};
use crate::sqlite::value::get;

/// How many row states are looked at before those that change are written.
const BATCH: i64 = 10_000;

/// What was dated anew.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Redated {
    /// Rows, the deleted ones included.
    pub rows: u64,
    /// How far the file's clock was ahead of the mesh's, in milliseconds.
    pub ahead_ms: u64,
    /// Peers that hold writes of such dates, too.
    pub also: Vec<NodeName>,
}

impl Engine {
    /// Dates anew what is dated further ahead of the mesh's clock than is taken in, as the site `site`.
    pub fn redate(&mut self, site: SiteId, now_ms: u64) -> Result<Redated> {
        let (mesh_ms, skew_ms) = (self.clocks.mesh_ms(now_ms), self.clocks.max_skew_ms);
        let bound = Hlc::from_ms(mesh_ms + skew_ms);
        let ahead_ms = self.store.head().hlc.ms().saturating_sub(mesh_ms);
        let holds = |p: &super::engine::Peer| p.holding.vector.0.values().any(|point| point.hlc > bound);
        let also = self.peers().iter().filter(|(_, p)| holds(p)).map(|(n, _)| n.clone()).collect();
        let Some((own, rows)) = self.store.redate(site, bound, mesh_ms)? else {
            return Ok(Redated { rows: 0, ahead_ms: 0, also });
        };
        self.publish(own);
        let holding = self.store.holding(&self.db, true);
        self.actions.push(Action::Broadcast(Message::Holding(holding)));
        Ok(Redated { rows, ahead_ms, also })
    }
}

impl Store {
    /// See [`Engine::redate`]; `None` if the file's clock is not beyond the bound.
    fn redate(&mut self, site: SiteId, bound: Hlc, mesh_ms: u64) -> Result<Option<(Option<OwnCommit>, u64)>> {
        self.write(|store| {
            // Its commit is not sent: what it holds is dated anew at once.
            store.absorb_pending()?;
            if store.head.hlc <= bound {
                return Ok(None);
            }
            if !store.links.is_empty() {
                let why = "it has tables that keep both rows of an id collision, whose rows are known by the date \
                           of their insert: what a wrong clock dated waits until that date";
                return Err(ReplicaError::Unfit(format!("the file cannot be dated anew: {why}")));
            }
            let base = store.head.lsn;
            let mut latest = BTreeMap::new();
            for plan in store.plans.clone() {
                store.survey(&plan, bound, &mut latest)?;
            }
            let heads = store.head.vector.0.values().map(|p| p.hlc).filter(|h| *h <= bound);
            // Later than all that stays.
            let hlc = heads.chain(latest.values().copied()).max().unwrap_or_default().tick(mesh_ms);
            let version = Version { hlc, site };
            let mut rows = 0;
            for plan in store.plans.clone() {
                rows += store.restamp_table(&plan, version, &|v| v.hlc > bound, base)?;
            }
            store.set_feeds_back(bound, &latest)?;
            become_site(&store.conn, site)?;
            store.head.site = site;
            store.head.hlc = hlc;
            let (body, sent) = store.gather(version, base)?;
            store.save_clock()?;
            let own = if sent > 0 { Some(store.number(version, body, sent)?) } else { None };
            Ok(Some((own, rows)))
        })
    }

    /// Finds the latest version of each site that is not beyond the bound.
    fn survey(&self, plan: &Plan, bound: Hlc, latest: &mut BTreeMap<SiteId, Hlc>) -> Result<()> {
        let sql = format!("SELECT bh, bs, dh, ds, cols FROM {}", state_table(&plan.table));
        let mut statement = self.conn.prepare(&sql)?;
        let mut found = statement.query([])?;
        while let Some(row) = found.next()? {
            let state = self.sites.read_state(row, 0)?;
            for v in state.versions().filter(|v| v.hlc <= bound) {
                let at = latest.entry(v.site).or_default();
                *at = v.hlc.max(*at);
            }
        }
        Ok(())
    }

    /// Gives every version that is wrong the new one.
    pub(super) fn restamp_table(
        &mut self,
        plan: &Arc<Plan>,
        version: Version,
        is_wrong: &dyn Fn(Version) -> bool,
        base: i64,
    ) -> Result<u64> {
        let keys = plan.table.key.len();
        let sql = format!(
            "SELECT {}, bh, bs, dh, ds, cols, lsn FROM {1} INDEXED BY {1}_lsn WHERE lsn > ?1 AND lsn <= ?2 \
             ORDER BY lsn LIMIT {BATCH}",
            list(0..keys, |i| format!("k{i}")),
            state_table(&plan.table)
        );
        let (mut after, mut count) = (-1, 0);
        loop {
            let (mut changed, mut looked) = (Vec::new(), 0);
            let mut statement = self.conn.prepare_cached(&sql)?;
            let mut found = statement.query([after, base])?;
            while let Some(row) = found.next()? {
                looked += 1;
                after = row.get(keys + 5)?;
                let mut state = self.sites.read_state(row, keys)?;
                let wrong = state.versions().any(is_wrong);
                if wrong {
                    set_back(&mut state, version, is_wrong);
                    let key = (0..keys).map(|i| Ok(get(row, i)?.to_value()));
                    changed.push((key.collect::<rusqlite::Result<Vec<Value>>>()?, state));
                }
            }
            drop(found);
            drop(statement);
            for (key, state) in &changed {
                let key: Vec<ValueRef<'_>> = key.iter().map(Value::as_ref).collect();
                let lsn = self.next_lsn();
                self.sites.put(&self.conn, plan, &key, state, lsn)?;
            }
            count += changed.len() as u64;
            if looked < BATCH {
                return Ok(count);
            }
        }
    }

    /// A feed whose head was dated beyond the bound: its last commit has the date of the latest version that stays.
    fn set_feeds_back(&mut self, bound: Hlc, latest: &BTreeMap<SiteId, Hlc>) -> Result<()> {
        let far: BTreeSet<SiteId> =
            self.head.vector.0.iter().filter(|(_, p)| p.hlc > bound).map(|(s, _)| *s).collect();
        for site in far {
            let hlc = latest.get(&site).copied().unwrap_or(Hlc(1));
            if let Some(point) = self.head.vector.0.get_mut(&site) {
                point.hlc = hlc;
            }
            let sql = "UPDATE __litemesh_site SET hlc = ?2 WHERE site = ?1";
            self.conn.prepare_cached(sql)?.execute((site.0 as i64, hlc.0 as i64))?;
        }
        Ok(())
    }
}

/// Puts the new version in the place of those that are wrong.
fn set_back(state: &mut RowState, version: Version, is_wrong: &dyn Fn(Version) -> bool) {
    let mut renew = |v: &mut Version| {
        if is_wrong(*v) {
            *v = version;
        }
    };
    renew(&mut state.birth);
    state.dead.iter_mut().for_each(&mut renew);
    state.columns.values_mut().for_each(&mut renew);
    let birth = state.birth;
    // A column that was written in the insert's commit goes by the birth; none is older than it.
    state.columns.retain(|_, v| *v > birth);
}
