//! Gathers what the node knows of itself for status, health and metrics. Invariant: it reads what the parts report
//! and holds up none of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::router::Router;
use crate::config::Config;
use crate::core::names::DbName;
use crate::core::vector::Vector;
use crate::core::verify::Outcome;
use crate::core::version::SiteId;
use crate::fabric::{Fabric, LogCopies};
use crate::replica::clock::steady_ms;
use crate::replica::conflict::ConflictCounts;
use crate::replica::engine::{Engine, Peer};
use crate::replica::events::Event;
use crate::replica::store::Store;
use crate::replica::worker::Report;
use crate::status::StatusHandle;
use crate::status::model::{
    CatchingUp, DatabasePeer, DatabaseState, DatabaseStatus, FabricStatus, FileEvent, LogStatus, PeerStatus,
    Status, Verified,
};

/// How often the whole is put together when nobody looks: sooner than a loop must beat.
const EVERY: Duration = Duration::from_secs(5);
/// How long the first reports of the databases are waited for.
const FIRST_REPORTS: Duration = Duration::from_secs(1);
/// How often a database reports at most, and how often it counts what takes long to count.
const REPORT_EVERY: Duration = Duration::from_millis(100);
const COUNT_EVERY: Duration = Duration::from_secs(60);
/// How often conflicts are counted anew, when some came or went.
const COUNT_CONFLICTS_EVERY: Duration = Duration::from_secs(1);

type Reports = Arc<Mutex<BTreeMap<DbName, DatabaseStatus>>>;

/// See the module.
#[derive(Clone)]
pub struct Observer(Arc<Inner>);

struct Inner {
    handle: StatusHandle,
    fabric: Arc<Fabric>,
    router: Arc<Router>,
    reports: Reports,
    ready: AtomicBool,
    started: Instant,
    base: Status,
}

impl Observer {
    /// An observer of a node that is starting.
    pub fn new(config: &Config, state_dir: &Path, fabric: Arc<Fabric>, router: Arc<Router>) -> Self {
        let cluster_listen = match config.external {
            None => config.cluster.to_string(),
            Some(_) => String::new(),
        };
        let base = Status {
            node: config.name.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            state_dir: state_dir.display().to_string(),
            started_at: OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            fabric: FabricStatus { cluster_listen, ..FabricStatus::default() },
            ..Status::default()
        };
        let inner = Inner {
            handle: StatusHandle::new(base.clone()),
            fabric,
            router,
            reports: Reports::default(),
            ready: AtomicBool::new(false),
            started: Instant::now(),
            base,
        };
        Self(Arc::new(inner))
    }

    /// Where the status can be read.
    pub fn handle(&self) -> StatusHandle {
        self.0.handle.clone()
    }

    /// Everything has started: whoever asks from now on is told so, and of every database.
    pub async fn ready(&self) {
        let told = || {
            let reports = self.0.reports.lock().unwrap_or_else(PoisonError::into_inner);
            self.0.router.databases().iter().all(|db| reports.contains_key(db))
        };
        let asked = Instant::now();
        while !told() && asked.elapsed() < FIRST_REPORTS {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.0.ready.store(true, Ordering::Release);
        self.0.handle.publish(self.gather().await);
    }

    /// What a database's thread calls after every turn.
    pub fn database(&self, name: &DbName, path: &Path) -> Report {
        let (reports, handle) = (self.0.reports.clone(), self.0.handle.clone());
        let (name, path) = (name.clone(), path.to_owned());
        let loop_name = format!("db-{name}");
        let mut last = None;
        let mut counted: Option<(Instant, u64)> = None;
        let mut conflicts: (Option<Instant>, ConflictCounts) = (None, ConflictCounts::default());
        Box::new(move |engine, trouble| {
            handle.beat(&loop_name);
            if last.is_some_and(|t: Instant| t.elapsed() < REPORT_EVERY) {
                return;
            }
            last = Some(Instant::now());
            if counted.is_none_or(|(at, _)| at.elapsed() > COUNT_EVERY) {
                counted = Some((Instant::now(), engine.store().state_count().unwrap_or_default()));
            }
            if conflicts.0.is_none_or(|at| at.elapsed() > COUNT_CONFLICTS_EVERY) {
                conflicts = (Some(Instant::now()), engine.store().conflict_counts().unwrap_or_default());
            }
            let rows = counted.map_or(0, |(_, rows)| rows);
            let status = describe(&name, &path, engine, trouble, rows, conflicts.1);
            reports.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), status);
        })
    }

    /// As which site a database's file goes on.
    pub fn site(&self, name: &DbName) -> Option<SiteId> {
        let reports = self.0.reports.lock().unwrap_or_else(PoisonError::into_inner);
        u64::from_str_radix(&reports.get(name)?.site, 16).ok().map(SiteId)
    }

    /// A database cannot be opened again.
    pub fn fail(&self, name: &DbName, path: &Path, why: String) {
        let mut reports = self.0.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = DatabaseStatus {
            name: name.to_string(),
            path: path.display().to_string(),
            state: DatabaseState::Error,
            stopped: vec![why],
            ..DatabaseStatus::default()
        };
        reports.insert(name.clone(), failed);
    }

    /// A database is gone.
    pub fn forget(&self, name: &DbName) {
        self.0.reports.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        self.0.handle.retire(&format!("db-{name}"));
    }

    /// Puts the whole together when somebody looks, and now and then.
    pub async fn run(self) {
        loop {
            self.0.handle.beat("observer");
            let status = self.gather().await;
            self.0.handle.publish(status);
            self.0.handle.wanted(EVERY).await;
        }
    }

    async fn gather(&self) -> Status {
        let inner = &self.0;
        let info = inner.fabric.server_info().await;
        let mut status = inner.base.clone();
        status.uptime_s = inner.started.elapsed().as_secs();
        status.fabric = FabricStatus {
            connected: inner.fabric.connected(),
            server_version: info.version,
            server_pid: info.pid,
            server_restarts: info.restarts,
            client_url: info.client_url,
            routes: info.routes,
            log_acked: info.log.acked,
            log_unacked: info.log.unacked(),
            messages_refused: inner.router.messages_refused(),
            leader: info.leader,
            servers: info.servers,
            log: log_status(info.log.copies),
            logs_led: info.log.leads,
            logs_held: info.log.holds,
            external: info.external,
            ..status.fabric
        };
        let now_ms = steady_ms();
        let mut peers: BTreeMap<_, _> = (inner.fabric.members().into_iter())
            .map(|name| (name.to_string(), PeerStatus { node: name.to_string(), ..PeerStatus::default() }))
            .collect();
        for (name, peer) in inner.router.peers() {
            let heard = PeerStatus {
                node: name.to_string(),
                live: peer.is_live(now_ms),
                last_heard_s: Some(now_ms.saturating_sub(peer.heard_ms) as f64 / 1_000.0),
                clock_offset_ms: Some(peer.clock_offset_ms as f64),
                version: Some(peer.hello.version.clone()),
                databases: peer.hello.dbs.iter().map(ToString::to_string).collect(),
            };
            peers.insert(name.to_string(), heard);
        }
        status.peers = peers.into_values().collect();
        status.databases =
            inner.reports.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let clocks = inner.router.clocks().get();
        status.clock_offset_ms = clocks.own_off_ms as f64;
        status.clocks = clocks.clocks as u64;
        status.warnings.extend(clocks.alarms(inner.router.node()));
        status.warnings.extend(inner.fabric.notices());
        let without = inner.fabric.without_new_key();
        if !without.is_empty() {
            let without: Vec<_> = without.iter().map(ToString::to_string).collect();
            status.warnings.push(format!(
                "the mesh's key is being changed: {} has not got the new one yet; until then the old one is accepted",
                without.join(", ")
            ));
        }
        add_outcomes(&mut status.databases, &inner.router.verifier.outcomes(), now_ms);
        judge(&mut status, inner.ready.load(Ordering::Acquire));
        status
    }
}

fn add_outcomes(databases: &mut [DatabaseStatus], outcomes: &BTreeMap<DbName, (Outcome, u64)>, now_ms: u64) {
    for (name, (o, noted_ms)) in outcomes {
        let Some(db) = databases.iter_mut().find(|d| d.name == name.as_str()) else { continue };
        db.verified = Some(Verified {
            at: rfc3339(o.at_ms),
            age_s: now_ms.saturating_sub(*noted_ms) as f64 / 1_000.0,
            took_s: o.took_ms as f64 / 1_000.0,
            by: o.by.to_string(),
            nodes: o.nodes.iter().map(ToString::to_string).collect(),
            not_compared: o.not_compared.clone(),
            rows: o.rows,
            divergent_rows: o.divergent_rows,
            unsettled_rows: o.unsettled_rows,
        });
    }
}

/// Ready or not, and what to warn of.
fn judge(status: &mut Status, started: bool) {
    if !started {
        status.not_ready_because.push("the databases are being started".to_owned());
    }
    for db in &status.databases {
        match db.state {
            DatabaseState::Error => {
                status.not_ready_because.push(format!("{}: {}", db.name, db.stopped.join("; ")));
            }
            DatabaseState::Stopped => {
                status.warnings.extend(db.stopped.iter().map(|why| format!("{}: {why}", db.name)));
            }
            DatabaseState::Ok | DatabaseState::Syncing => {}
        }
        if db.null_key_rows > 0 {
            let text = "changes of rows whose key is NULL stay on this node";
            status.warnings.push(format!("{}: {} {text}", db.name, db.null_key_rows));
        }
        if let Some(v) = db.verified.as_ref().filter(|v| v.divergent_rows > 0) {
            let (n, name, nodes) = (v.divergent_rows, &db.name, v.nodes.join(", "));
            let text =
                format!("{name}: {n} rows were not the same on {} and {nodes}: litemesh verify {name}", v.by);
            status.warnings.push(text);
        }
        if db.clock_ahead_s > 0.0 {
            let text = "what is written here may wait at the other nodes: litemesh repair --restamp";
            let (name, ahead_s) = (&db.name, db.clock_ahead_s);
            status.warnings.push(format!(
                "{name}: its writes are dated {ahead_s:.0} s ahead of the mesh's clock; {text} {name}"
            ));
        }
        if db.conflicts > 0 {
            let text = "writes lost against others and are kept: litemesh conflicts list";
            status.warnings.push(format!("{}: {} {text} {}", db.name, db.conflicts, db.path));
        }
        if db.id_collisions > 0 {
            let children = match db.collision_children {
                0 => String::new(),
                n => format!(" with {n} children"),
            };
            let text = "of them lost to a row that another node inserted under the same id at once";
            status.warnings.push(format!(
                "{}: {}{children} {text}: litemesh conflicts restore --new-id brings them back",
                db.name, db.id_collisions
            ));
        }
    }
    if !status.fabric.connected {
        let text = "not connected to our own nats-server: local writes go on and are sent later";
        let url = &status.fabric.client_url;
        status.warnings.push(match status.fabric.external {
            false => text.to_owned(),
            true => {
                format!("not connected to the NATS system at {url}: local writes go on and are sent later")
            }
        });
    }
    status.ready = status.not_ready_because.is_empty();
}

fn describe(
    name: &DbName,
    path: &Path,
    engine: &Engine,
    trouble: Option<&str>,
    state_rows: u64,
    conflicts: ConflictCounts,
) -> DatabaseStatus {
    let (store, head, counters) = (engine.store(), engine.store().head(), engine.counters());
    let mut stopped = engine.stopped();
    let needs_copy = engine.needs_copy(steady_ms());
    let state = match (trouble, stopped.is_empty(), engine.is_syncing() || needs_copy.is_some()) {
        (Some(_), ..) => DatabaseState::Error,
        (None, false, _) => DatabaseState::Stopped,
        (None, true, true) => DatabaseState::Syncing,
        (None, true, false) => DatabaseState::Ok,
    };
    stopped.extend(trouble.map(str::to_owned));
    let now_ms = steady_ms();
    let ours = head.vector.n(head.site);
    let peers = engine.peers().iter().map(|(node, peer)| {
        let theirs = &peer.holding;
        let behind = ours.saturating_sub(theirs.vector.n(head.site));
        let missing = missing_commits(peer, &head.vector);
        DatabasePeer {
            node: node.to_string(),
            site: theirs.site.to_string(),
            behind_commits: behind,
            missing_commits: missing,
            caught_up: behind == 0 && missing == 0,
            last_heard_s: Some(now_ms.saturating_sub(peer.heard_ms) as f64 / 1_000.0),
        }
    });
    DatabaseStatus {
        name: name.to_string(),
        path: path.display().to_string(),
        site: head.site.to_string(),
        lineage: format!("{:016x}", head.lineage),
        lsn: head.lsn as u64,
        state,
        stopped,
        pending_commits: engine.pending() as u64,
        vector: head.vector.0.iter().map(|(s, p)| (s.to_string(), p.n)).collect(),
        commits_published: counters.commits_published,
        rows_published: counters.rows_published,
        commits_applied: counters.commits_applied,
        peer_syncs: counters.peer_syncs,
        logged_pieces: counters.logged_pieces,
        catching_up: catching_up(engine, now_ms),
        messages_refused: counters.messages_refused,
        conflicts: conflicts.open,
        id_collisions: conflicts.collisions,
        collision_children: conflicts.children,
        whole_row_tables: store.whole_row_tables().unwrap_or_default(),
        moved_rows: store.kept_both().unwrap_or_default().into_iter().collect(),
        conflicts_pruned: counters.conflicts_pruned,
        deletes_forgotten: engine.collected_rows(),
        needs_copy: needs_copy.map(|node| node.to_string()),
        events: file_events(store),
        null_key_rows: store.null_keys(),
        state_rows,
        clock_ahead_s: clock_ahead_s(engine, now_ms),
        verified: None,
        peers: peers.collect(),
    }
}

fn log_status(copies: LogCopies) -> LogStatus {
    let LogCopies { leader, copies, behind, wanted, moving } = copies;
    LogStatus { leader, copies, behind, wanted, moving }
}

fn catching_up(engine: &Engine, now_ms: u64) -> Option<CatchingUp> {
    let c = engine.catching_up()?;
    let held = &engine.store().head().vector;
    let for_s = now_ms.saturating_sub(c.since_ms) as f64 / 1_000.0;
    let rate = |n: u64| if for_s > 0.0 { n as f64 / for_s } else { 0.0 };
    Some(CatchingUp {
        via: c.via.to_owned(),
        node: c.node.to_string(),
        for_s,
        missing_commits: engine.peers().values().map(|p| missing_commits(p, held)).max().unwrap_or(0),
        commits: c.commits,
        commits_per_s: rate(c.commits),
        bytes: c.bytes,
        bytes_per_s: rate(c.bytes),
    })
}

fn file_events(store: &Store) -> Vec<FileEvent> {
    let event = |e: Event| FileEvent { at: rfc3339(e.at_ms), what: e.what };
    store.events().unwrap_or_default().into_iter().map(event).collect()
}

/// A time since 1970 as status tells it.
fn rfc3339(ms: u64) -> String {
    let at = OffsetDateTime::from_unix_timestamp((ms / 1_000) as i64).ok();
    at.and_then(|t| t.format(&Rfc3339).ok()).unwrap_or_default()
}

/// How many commits a peer holds that are not held here.
fn missing_commits(peer: &Peer, held: &Vector) -> u64 {
    let lacking = peer.holding.vector.0.iter().map(|(s, p)| p.n.saturating_sub(held.n(*s)));
    lacking.fold(0, u64::saturating_add)
}

/// How far the file's clock is ahead of the mesh's, if that is further than other nodes follow.
fn clock_ahead_s(engine: &Engine, now_ms: u64) -> f64 {
    let (clocks, file_ms) = (engine.clocks(), engine.store().head().hlc.ms());
    let ahead_ms = file_ms.saturating_sub(clocks.mesh_ms(now_ms));
    if ahead_ms > clocks.max_skew_ms { ahead_ms as f64 / 1_000.0 } else { 0.0 }
}
