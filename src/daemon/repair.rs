//! Making one node's rows those of all nodes. Invariant: the node whose rows are right does it, by ordinary writes of
//! its own; whoever asks another node for it only waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, info};

use super::divergence::key_json;
use super::router::Router;
use super::verify::{Duty, RemotePeer, Speed, open_reader};
use crate::core::message::Message;
use crate::core::names::{DbName, NodeName};
use crate::core::verify::{Key, Lookup, Repaired, VerifyMessage};
use crate::replica::ReplicaError;
use crate::replica::compare::{CompareError, Comparison, Finding, batches, look_there};
use crate::replica::repair::{Fate, Restamp};
use crate::replica::verify::Owner;
use crate::replica::worker::WorkerHandle;

/// How often rows are tried again when that time was too short.
const TRIES: u32 = 5;
/// How many repaired rows are named.
const NAMED: usize = 1_000;
/// How often a node at work says so, and how long to wait for such a sign.
const SIGN_EVERY: Duration = Duration::from_secs(3);
const SIGN_PATIENCE: Duration = Duration::from_secs(60);

/// How often to look for tables that were rebuilt.
const RECHECK_EVERY: Duration = Duration::from_secs(2);

struct Repair<'a> {
    worker: &'a WorkerHandle,
    /// Everybody who is asked before a row is written.
    peers: Vec<RemotePeer>,
    dry_run: bool,
    done: Repaired,
}

impl Repair<'_> {
    fn take(&mut self, found: Vec<Finding>) -> Result<(), CompareError> {
        self.done.differed += found.len() as u64;
        if self.dry_run {
            for finding in &found {
                let what = if finding.ours.present { "would be written" } else { "would be deleted" };
                self.name(&finding.layout.table, &finding.key, what);
            }
            return Ok(());
        }
        let Some(layout) = found.first().map(|f| f.layout.clone()) else { return Ok(()) };
        for batch in batches(found.into_iter().map(|f| (f.key, ())).collect()) {
            let keys: Vec<Key> = batch.into_iter().map(|(k, ())| k).collect();
            let fates = self.restamp(&layout, &keys)?;
            for (key, fate) in keys.iter().zip(fates) {
                match fate {
                    Fate::Equal => {}
                    Fate::Left => self.done.left += 1,
                    Fate::Written | Fate::Deleted => {
                        self.done.repaired += 1;
                        let what = if fate == Fate::Written { "written" } else { "deleted" };
                        self.name(&layout.table, key, what);
                    }
                }
            }
        }
        Ok(())
    }

    fn name(&mut self, table: &str, key: &Key, what: &str) {
        if self.done.rows.len() < NAMED {
            self.done.rows.push((table.to_owned(), key_json(key).to_string(), what.to_owned()));
        }
    }

    fn restamp(
        &mut self,
        layout: &crate::core::digest::Layout,
        keys: &[Key],
    ) -> Result<Vec<Fate>, CompareError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let clock_ms = self.worker.repair_date_ms()?;
            let mut peers = Vec::new();
            for peer in &mut self.peers {
                let lookup =
                    Lookup { layout: layout.clone(), keys: keys.to_vec(), later_than_ms: Some(clock_ms) };
                peers.push(look_there(peer, lookup)?);
            }
            let order = Restamp { layout: layout.clone(), keys: keys.to_vec(), peers, clock_ms };
            match self.worker.restamp(order) {
                Err(ReplicaError::ClockPassed) if tries < TRIES => {}
                result => return Ok(result?),
            }
        }
    }
}

impl Router {
    /// Writes this node's rows again where live peers differ. Blocks.
    fn repair_from_here(
        self: &Arc<Self>,
        db: &DbName,
        table: Option<&str>,
        dry_run: bool,
    ) -> Result<Repaired, String> {
        let done = {
            let _alone = self.verifier.alone();
            self.write_again(db, table, dry_run)?
        };
        if dry_run {
            return Ok(done);
        }
        let (outcome, rows) = self.verify(db, Speed::OnDemand)?;
        let still_differ = match table {
            Some(table) => rows.iter().filter(|r| r.table.eq_ignore_ascii_case(table)).count() as u64,
            None => outcome.divergent_rows,
        };
        Ok(Repaired { still_differ, ..done })
    }

    fn write_again(
        self: &Arc<Self>,
        db: &DbName,
        table: Option<&str>,
        dry_run: bool,
    ) -> Result<Repaired, String> {
        let worker = self.worker(db).ok_or("this node does not replicate it")?;
        let lineage = worker.lineage().map_err(|e| e.to_string())?;
        let mut reader = open_reader(&worker)?;
        if let Some(table) = table {
            let known = reader.layouts(&worker).map_err(|e| e.to_string())?;
            if !known.iter().any(|l| l.table.eq_ignore_ascii_case(table)) {
                return Err(format!("there is no table {table:?} here that is replicated"));
            }
        }
        let partners = self.partners(db);
        if partners.live.is_empty() {
            return Err("no other node that has it is there: nothing can be compared".to_owned());
        }
        let remote = |node: &NodeName| RemotePeer {
            router: self.clone(),
            node: node.clone(),
            db: db.clone(),
            lineage,
        };
        let mut repair = Repair {
            worker: &worker,
            peers: partners.live.iter().map(remote).collect(),
            dry_run,
            done: Repaired { not_compared: partners.away, ..Repaired::default() },
        };
        let mut compared = 0;
        for node in &partners.live {
            let (mut peer, mut pace) =
                (remote(node), Duty { verifier: &self.verifier, speed: Speed::OnDemand });
            let mut comparison = Comparison::new(&worker, &mut reader, &mut peer, &mut pace);
            match comparison.run(table, &mut |found| repair.take(found)) {
                Ok(()) => compared += 1,
                Err(e @ (CompareError::AwayThere | CompareError::AwayHere)) => {
                    comparison.compared.left_out.push(e.to_string());
                }
                Err(e) => return Err(format!("node {node}: {e}")),
            }
            repair.done.left += comparison.compared.unsettled;
            let left_out = std::mem::take(&mut comparison.compared.left_out).into_iter();
            repair.done.not_compared.extend(left_out.map(|why| format!("with node {node}: {why}")));
        }
        if compared == 0 {
            return Err(format!("nothing could be compared: {}", repair.done.not_compared.join("; ")));
        }
        Ok(repair.done)
    }

    /// Compares tables that an application rebuilt: for as long as that took they had no triggers, and what was written
    /// to them is told to the others now.
    pub async fn keep_rechecking(self: Arc<Self>) {
        loop {
            tokio::time::sleep(RECHECK_EVERY).await;
            for db in self.databases() {
                let router = self.clone();
                // It ends early when the node does.
                drop(tokio::task::spawn_blocking(move || router.recheck(&db)).await);
            }
        }
    }

    fn recheck(self: &Arc<Self>, db: &DbName) {
        let Some(worker) = self.worker(db) else { return };
        let Some(Ok(tables)) = worker.call(|e| e.store().rebuilt_tables()) else { return };
        for table in tables {
            if self.partners(db).live.is_empty() {
                return;
            }
            let result = {
                let _alone = self.verifier.alone();
                self.write_again(db, Some(&table), false)
            };
            match result {
                // A peer that does not have the table's new form yet is compared later.
                Ok(done) if done.left > 0 || done.not_compared.iter().any(|n| n.starts_with("with node")) => {
                }
                Ok(done) => {
                    let forgotten =
                        worker.call(move |e| e.store_mut().forget_rebuilt(&table).map(|()| table));
                    if let Some(Ok(table)) = forgotten.filter(|_| done.repaired > 0) {
                        let rows = done.repaired;
                        info!(db = %db, "{rows} rows of table {table:?} had changed while it was rebuilt: they are told now");
                    }
                }
                Err(why) => debug!(db = %db, "table {table:?} is compared later: {why}"),
            }
        }
    }

    /// Makes the rows of `from` those of all nodes, wherever that is. Blocks.
    pub fn repair(
        self: &Arc<Self>,
        db: &DbName,
        from: &NodeName,
        table: Option<String>,
        dry_run: bool,
    ) -> Result<Repaired, String> {
        if from == self.node() {
            return self.repair_from_here(db, table.as_deref(), dry_run);
        }
        let worker = self.worker(db).ok_or("this node does not replicate it")?;
        if !self.partners(db).live.contains(from) {
            return Err(format!("node {from} is not there, or does not have it: see litemesh status"));
        }
        let lineage = worker.lineage().map_err(|e| e.to_string())?;
        let (request, answers) = self.verifier.expect();
        let message = VerifyMessage::Repair { db: db.clone(), lineage, request, table, dry_run };
        tokio::runtime::Handle::current().block_on(self.send(from, &Message::Verify(message)));
        let mut heard = Instant::now();
        let result = loop {
            match answers.recv_timeout(Duration::from_millis(100)) {
                Ok(VerifyMessage::Repaired { result, .. }) => break result,
                Ok(_) => heard = Instant::now(),
                Err(_) if self.verifier.is_ending() => break Err("this node is ending".to_owned()),
                Err(_) if heard.elapsed() > SIGN_PATIENCE || self.is_gone(from, heard) => {
                    break Err(format!(
                        "node {from} does not answer: what it has repaired so far stays so; run it again"
                    ));
                }
                Err(_) => {}
            }
        };
        self.verifier.unexpect(request);
        result.map_err(|why| format!("node {from}: {why}"))
    }

    /// Whether a node that was to give a sign is not there any more.
    fn is_gone(&self, node: &NodeName, heard: Instant) -> bool {
        heard.elapsed() > SIGN_EVERY * 3 && !self.is_live(node)
    }

    /// Does what another node asks for, and tells it from time to time that it is at work.
    pub(super) fn on_repair(
        self: &Arc<Self>,
        from: NodeName,
        request: u64,
        db: DbName,
        lineage: u64,
        table: Option<String>,
        dry_run: bool,
    ) {
        let router = self.clone();
        tokio::spawn(async move {
            let at_work = router.clone();
            let mut work = tokio::task::spawn_blocking(move || {
                let worker = at_work.worker(&db).ok_or("this node does not have that database")?;
                if worker.lineage().map_err(|e| e.to_string())? != lineage {
                    return Err("this node's file is another database of the same name".to_owned());
                }
                at_work.repair_from_here(&db, table.as_deref(), dry_run)
            });
            let result = loop {
                match tokio::time::timeout(SIGN_EVERY, &mut work).await {
                    Ok(Ok(result)) => break result,
                    Ok(Err(e)) => break Err(e.to_string()),
                    Err(_) => {
                        router.send(&from, &Message::Verify(VerifyMessage::Repairing { request })).await;
                    }
                }
            };
            router.send(&from, &Message::Verify(VerifyMessage::Repaired { request, result })).await;
        });
    }
}
