//! The JSON of `/api/status`, which `litemesh status --json` prints. Invariant: a public contract: fields are added,
//! never renamed, removed or given another meaning; a reader that knows fewer fields still understands the rest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The state of a node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The node's name.
    pub node: String,
    /// The version of litemesh.
    pub version: String,
    /// The process.
    pub pid: u32,
    /// The state directory.
    pub state_dir: String,
    /// When the process started, RFC 3339 in UTC.
    pub started_at: String,
    /// How long ago that was.
    pub uptime_s: u64,
    /// Whether databases are writable here and the first synchronisation is done. Peers that are down do not change
    /// it.
    pub ready: bool,
    /// Why not, in whole sentences; empty when ready.
    pub not_ready_because: Vec<String>,
    /// What somebody should look at, in whole sentences.
    pub warnings: Vec<String>,
    /// This node's clock minus the mesh's, in milliseconds.
    #[serde(default)]
    pub clock_offset_ms: f64,
    /// How many nodes' clocks, this one's included, tell what the mesh's is.
    #[serde(default)]
    pub clocks: u64,
    /// The bundled NATS server.
    pub fabric: FabricStatus,
    /// The other nodes, by name.
    pub peers: Vec<PeerStatus>,
    /// The replicated files, by name.
    pub databases: Vec<DatabaseStatus>,
}

/// The state of the node's NATS server.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FabricStatus {
    /// Whether litemesh has a connection to it.
    pub connected: bool,
    /// The server's version.
    pub server_version: String,
    /// The server's process, while it runs.
    pub server_pid: Option<u32>,
    /// How often it was started again since this process started.
    pub server_restarts: u64,
    /// Where the host's programs reach NATS.
    pub client_url: String,
    /// Where it listens for peers.
    pub cluster_listen: String,
    /// The nodes whose servers it is connected with.
    pub routes: Vec<String>,
    /// Commits that the log has acknowledged since this process started.
    pub log_acked: u64,
    /// Commits published that the log has not acknowledged yet.
    pub log_unacked: u64,
    /// Messages of peers that could not be read.
    #[serde(default)]
    pub messages_refused: u64,
    /// The node whose server leads the cluster; absent while it can decide nothing, such as to make a stream.
    #[serde(default)]
    pub leader: Option<String>,
    /// How many servers decide, those that are away included.
    #[serde(default)]
    pub servers: u64,
    /// This node's log.
    #[serde(default)]
    pub log: LogStatus,
    /// How many nodes' logs this node's server leads, and of how many it has a copy.
    #[serde(default)]
    pub logs_led: u64,
    /// See above.
    #[serde(default)]
    pub logs_held: u64,
    /// The nodes meet on a NATS system of their operator's: there is no server of this node's own.
    #[serde(default)]
    pub external: bool,
}

/// Where the copies of a node's log are.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LogStatus {
    /// The node that leads it; absent while nobody does.
    pub leader: Option<String>,
    /// The nodes that have a copy.
    pub copies: Vec<String>,
    /// Those of them whose copy is not whole yet.
    pub behind: Vec<String>,
    /// The nodes that are to have one.
    pub wanted: Vec<String>,
    /// Whether copies are on their way.
    pub moving: bool,
}

/// Another node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub node: String,
    /// Whether it was heard of lately.
    pub live: bool,
    /// Seconds since it was last heard of; absent if it never was by this process.
    pub last_heard_s: Option<f64>,
    /// Its clock minus ours, in milliseconds.
    pub clock_offset_ms: Option<f64>,
    /// Its version of litemesh.
    pub version: Option<String>,
    /// The databases it replicates.
    pub databases: Vec<String>,
}

/// How replication of a database stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatabaseState {
    /// It runs.
    #[default]
    Ok,
    /// The first copy, or a synchronisation with a peer, is under way.
    Syncing,
    /// Some feed waits for something, told in `stopped`.
    Stopped,
    /// The file cannot be used, told in `stopped`.
    Error,
}

impl DatabaseState {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ok, Self::Syncing, Self::Stopped, Self::Error];

    /// The word used in JSON, metrics and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Syncing => "syncing",
            Self::Stopped => "stopped",
            Self::Error => "error",
        }
    }
}

/// A replicated file. Counters count since this process started.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DatabaseStatus {
    /// Its name.
    pub name: String,
    /// Its path on this node.
    pub path: String,
    /// This incarnation of the file, in hexadecimal.
    pub site: String,
    /// Where the data descends from, in hexadecimal: equal on all nodes of one mesh.
    pub lineage: String,
    /// The file's own counter of changed row states.
    pub lsn: u64,
    /// How it stands.
    pub state: DatabaseState,
    /// What is stopped, why, and what to do about it.
    pub stopped: Vec<String>,
    /// Commits of peers that are here but wait for something before they can be applied.
    pub pending_commits: u64,
    /// What was applied of every site: site in hexadecimal -> commit number.
    pub vector: BTreeMap<String, u64>,
    /// Commits of this node that were published.
    pub commits_published: u64,
    /// Rows in them.
    pub rows_published: u64,
    /// Commits of peers that were applied.
    pub commits_applied: u64,
    /// How often a peer was asked for all that changed there.
    pub peer_syncs: u64,
    /// Pieces of commits that were read from peers' logs, because they had been missed.
    #[serde(default)]
    pub logged_pieces: u64,
    /// What is being made up for; absent when nothing is missing.
    #[serde(default)]
    pub catching_up: Option<CatchingUp>,
    /// Messages from peers that could not be read.
    pub messages_refused: u64,
    /// Lost writes that are kept in the file and were not restored.
    pub conflicts: u64,
    /// Among them, rows that lost to a row that another node inserted under the same integer.
    #[serde(default)]
    pub id_collisions: u64,
    /// Rows that refer to one of those by a foreign key.
    #[serde(default)]
    pub collision_children: u64,
    /// Tables whose rows are merged as a whole.
    #[serde(default)]
    pub whole_row_tables: Vec<String>,
    /// Tables that keep both rows of an id collision, and how many of their rows have another id than they were given.
    #[serde(default)]
    pub moved_rows: BTreeMap<String, u64>,
    /// Conflicts that this node removed because they were too old or too many.
    #[serde(default)]
    pub conflicts_pruned: u64,
    /// Deletes that are not remembered any more, because all nodes have applied them long ago.
    #[serde(default)]
    pub deletes_forgotten: u64,
    /// The node whose file is taken in, because this one was away for too long to be sent what has changed.
    #[serde(default)]
    pub needs_copy: Option<String>,
    /// What happened to the file: it was restored, came back after a long time; the latest last.
    #[serde(default)]
    pub events: Vec<FileEvent>,
    /// Rows that stay on this node because their key is NULL.
    pub null_key_rows: u64,
    /// Rows of replication state in the file.
    pub state_rows: u64,
    /// How many seconds the file's clock is ahead of the mesh's, if that is more than other nodes follow; else 0.
    #[serde(default)]
    pub clock_ahead_s: f64,
    /// What the latest comparison with other nodes found; absent until there was one.
    #[serde(default)]
    pub verified: Option<Verified>,
    /// How peers stand with this database.
    pub peers: Vec<DatabasePeer>,
}

/// Making up for what a node missed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CatchingUp {
    /// What is read: a node's `log`, or its `rows`.
    pub via: String,
    /// The node that is read from.
    pub node: String,
    /// How many seconds ago it began.
    pub for_s: f64,
    /// The commits that are still missing.
    pub missing_commits: u64,
    /// Commits applied since it began.
    pub commits: u64,
    /// Commits applied a second.
    pub commits_per_s: f64,
    /// Bytes received since it began.
    pub bytes: u64,
    /// Bytes received a second.
    pub bytes_per_s: f64,
}

/// Something that happened to a file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FileEvent {
    /// When, RFC 3339 in UTC.
    pub at: String,
    /// What.
    pub what: String,
}

/// What comparing rows with other nodes found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Verified {
    /// When, RFC 3339 in UTC.
    pub at: String,
    /// How many seconds ago that was.
    pub age_s: f64,
    /// How many seconds it took.
    pub took_s: f64,
    /// The node that compared.
    pub by: String,
    /// The nodes it compared with.
    pub nodes: Vec<String>,
    /// Nodes and tables that were not compared, and why.
    pub not_compared: Vec<String>,
    /// Rows looked at.
    pub rows: u64,
    /// Rows that are not the same everywhere.
    pub divergent_rows: u64,
    /// Rows that kept changing.
    pub unsettled_rows: u64,
}

/// How a peer stands with a database.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DatabasePeer {
    /// The peer.
    pub node: String,
    /// Its incarnation of the file, in hexadecimal.
    pub site: String,
    /// How many commits of ours it has not confirmed.
    pub behind_commits: u64,
    /// How many commits of its own we lack.
    pub missing_commits: u64,
    /// Whether both are none.
    pub caught_up: bool,
    /// Seconds since it last told how it stands.
    pub last_heard_s: Option<f64>,
}

#[cfg(test)]
pub(super) fn example() -> Status {
    let peer = |node: &str, behind, missing| DatabasePeer {
        node: node.into(),
        site: "00000000000000b2".into(),
        behind_commits: behind,
        missing_commits: missing,
        caught_up: behind + missing == 0,
        last_heard_s: Some(0.4),
    };
    let database = |name: &str, state, peers| DatabaseStatus {
        name: name.into(),
        path: format!("/srv/{name}.db"),
        site: "00000000000000a1".into(),
        state,
        vector: BTreeMap::from([("00000000000000a1".into(), 7)]),
        commits_published: 1204,
        conflicts: 3,
        events: ['1', '2', '3', '4']
            .map(|day| FileEvent { at: format!("2026-01-0{day}T03:00:00Z"), what: format!("event {day}") })
            .into(),
        moved_rows: BTreeMap::from([("invoice".into(), 2)]),
        verified: Some(Verified {
            at: "2026-01-02T03:00:00Z".into(),
            age_s: 245.0,
            took_s: 1.5,
            by: "n1".into(),
            nodes: vec!["n2".into()],
            rows: 1_000,
            divergent_rows: 2,
            ..Verified::default()
        }),
        peers,
        ..DatabaseStatus::default()
    };
    let mut stopped = database("orders", DatabaseState::Stopped, vec![peer("n3", 120, 4)]);
    stopped.catching_up = Some(CatchingUp {
        via: "log".into(),
        node: "n3".into(),
        for_s: 2.0,
        missing_commits: 4,
        commits: 2_000,
        commits_per_s: 1_000.0,
        bytes: 3_000_000,
        bytes_per_s: 1_500_000.0,
    });
    stopped.needs_copy = Some("n3".into());
    stopped.stopped = vec!["table \"invoice\" has no column \"paid\" here: run the same migration".into()];
    Status {
        node: "n1".into(),
        version: "0.1.0".into(),
        pid: 4711,
        started_at: "2026-01-02T03:04:05Z".into(),
        uptime_s: 93_784,
        not_ready_because: vec!["database orders: the first synchronisation with n3 is not done".into()],
        warnings: vec!["the clock of n3 is 4.2 s ahead: set it, or its writes win over ours".into()],
        fabric: FabricStatus {
            connected: true,
            server_version: "2.15.1".into(),
            server_pid: Some(4712),
            server_restarts: 1,
            client_url: "nats://127.0.0.1:4222".into(),
            cluster_listen: "0.0.0.0:6222".into(),
            routes: vec!["n2".into()],
            log_acked: 1200,
            log_unacked: 4,
            messages_refused: 0,
            leader: Some("n2".into()),
            servers: 2,
            log: LogStatus {
                leader: Some("n1".into()),
                copies: vec!["n1".into(), "n2".into(), "n3".into()],
                behind: vec!["n3".into()],
                wanted: vec!["n1".into(), "n2".into(), "n3".into()],
                moving: true,
            },
            logs_led: 1,
            logs_held: 2,
            external: false,
        },
        peers: vec![
            PeerStatus {
                node: "n2".into(),
                live: true,
                last_heard_s: Some(0.4),
                clock_offset_ms: Some(-1.25),
                version: Some("0.1.0".into()),
                databases: vec!["app".into(), "orders".into()],
            },
            PeerStatus { node: "n3".into(), last_heard_s: Some(301.0), ..PeerStatus::default() },
        ],
        databases: vec![
            database("app", DatabaseState::Ok, vec![peer("n2", 0, 0), peer("n3", 120, 0)]),
            stopped,
        ],
        ..Status::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_is_the_contract() {
        let json = serde_json::to_value(example()).unwrap();
        assert_eq!(json["databases"][1]["state"], "stopped");
        assert_eq!(json["databases"][0]["peers"][1]["behind_commits"], 120);
        assert_eq!(json["databases"][0]["vector"]["00000000000000a1"], 7);
        assert_eq!(json["fabric"]["routes"][0], "n2");
        assert!(json["peers"][1]["version"].is_null());
        let back: Status = serde_json::from_value(json).unwrap();
        assert_eq!(back, example());
        for state in DatabaseState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
    }
}
