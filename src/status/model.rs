//! tmp
#![allow(missing_docs)]
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Status {
    pub node: String,
    pub version: String,
    pub pid: u32,
    pub state_dir: String,
    pub http: String,
    pub started_at: String,
    pub uptime_s: u64,
    pub ready: bool,
    pub not_ready_because: Vec<String>,
    pub warnings: Vec<String>,
    pub fabric: FabricStatus,
    pub peers: Vec<PeerStatus>,
    pub databases: Vec<DatabaseStatus>,
}
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct FabricStatus {
    pub connected: bool,
    pub server_version: String,
    pub server_pid: Option<u32>,
    pub server_restarts: u64,
    pub client_url: String,
    pub cluster_listen: String,
    pub routes: Vec<String>,
    pub log_acked: u64,
    pub log_unacked: u64,
}
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PeerStatus {
    pub node: String,
    pub live: bool,
    pub last_heard_s: f64,
    pub clock_offset_ms: i64,
    pub version: String,
    pub databases: Vec<String>,
}
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatabaseState {
    #[default]
    Ok,
    Syncing,
    Stopped,
    Error,
}
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DatabaseStatus {
    pub name: String,
    pub path: String,
    pub site: String,
    pub lineage: String,
    pub lsn: u64,
    pub state: DatabaseState,
    pub stopped: Vec<String>,
    pub pending_commits: u64,
    pub vector: BTreeMap<String, u64>,
    pub commits_published: u64,
    pub rows_published: u64,
    pub commits_applied: u64,
    pub peer_syncs: u64,
    pub messages_refused: u64,
    pub conflicts: u64,
    pub null_key_rows: u64,
    pub state_rows: u64,
    pub peers: Vec<DatabasePeer>,
}
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DatabasePeer {
    pub node: String,
    pub site: String,
    pub behind_commits: u64,
    pub missing_commits: u64,
    pub caught_up: bool,
    pub last_heard_s: f64,
}
