//! The snapshot in Prometheus's text format (version 0.0.4). Invariant: base units, each family once with its HELP
//! and TYPE before its samples, and labels escaped whatever they hold.

use std::fmt::Write;

use super::model::{DatabasePeer, DatabaseState, DatabaseStatus, PeerStatus, Status, Verified};

/// The media type of what [`render`] makes.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

#[derive(Clone, Copy)]
enum Type {
    Gauge,
    Counter,
}

struct Writer<'s> {
    out: String,
    node: &'s str,
}

impl Writer<'_> {
    /// One family: its samples are labels and a value; every one gets the node's name.
    fn family<'l>(
        &mut self,
        name: &str,
        kind: Type,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<(&'l str, &'l str)>, f64)>,
    ) {
        let kind = match kind {
            Type::Gauge => "gauge",
            Type::Counter => "counter",
        };
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        // Writing into a String cannot fail.
        let _ = writeln!(self.out, "# HELP litemesh_{name} {help}\n# TYPE litemesh_{name} {kind}");
        for (labels, value) in samples {
            let _ = write!(self.out, "litemesh_{name}{{node=\"{}\"", escape(self.node));
            for (label, text) in labels {
                let _ = write!(self.out, ",{label}=\"{}\"", escape(text));
            }
            let _ = writeln!(self.out, "}} {value}");
        }
    }

    fn single(&mut self, name: &str, kind: Type, help: &str, value: f64) {
        self.family(name, kind, help, [(Vec::new(), value)]);
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

/// The metrics of a node; `hanging` is how many of its loops hang.
pub fn render(status: &Status, hanging: usize) -> String {
    let mut w = Writer { out: String::with_capacity(8 * 1024), node: &status.node };
    node(&mut w, status, hanging);
    fabric(&mut w, status);
    peers(&mut w, &status.peers);
    databases(&mut w, &status.databases);
    database_peers(&mut w, &status.databases);
    w.out
}

fn node(w: &mut Writer<'_>, s: &Status, hanging: usize) {
    let info = [(vec![("version", s.version.as_str())], 1.0)];
    w.family("build_info", Type::Gauge, "Always 1; the version is a label.", info);
    w.single("ready", Type::Gauge, "1 if the node is ready.", flag(s.ready));
    w.single("uptime_seconds", Type::Gauge, "Time since the process started.", s.uptime_s as f64);
    w.single("warnings", Type::Gauge, "Warnings that status shows.", s.warnings.len() as f64);
    let help = "This node's clock minus the mesh's.";
    w.single("clock_offset_seconds", Type::Gauge, help, s.clock_offset_ms / 1e3);
    w.single("loops_hanging", Type::Gauge, "Loops of the process that do not turn.", hanging as f64);
}

fn fabric(w: &mut Writer<'_>, s: &Status) {
    let f = &s.fabric;
    w.single("fabric_connected", Type::Gauge, "1 if connected to the bundled server.", flag(f.connected));
    w.single("fabric_routes", Type::Gauge, "Servers of peers connected.", f.routes.len() as f64);
    let help = "Starts of the bundled server after the first.";
    w.single("fabric_server_restarts_total", Type::Counter, help, f.server_restarts as f64);
    let help = "Commits that the log has acknowledged.";
    w.single("log_acked_commits_total", Type::Counter, help, f.log_acked as f64);
    let help = "Commits published that the log has not acknowledged yet.";
    w.single("log_unacked_commits", Type::Gauge, help, f.log_unacked as f64);
    let help = "1 if the cluster has a leader and can decide.";
    w.single("fabric_leader_known", Type::Gauge, help, flag(f.leader.is_some()));
    w.single("fabric_servers", Type::Gauge, "Servers that decide, those away included.", f.servers as f64);
    w.single("log_copies", Type::Gauge, "Nodes with a copy of this node's log.", f.log.copies.len() as f64);
    w.single("log_moving", Type::Gauge, "1 while copies of this node's log move.", flag(f.log.moving));
    w.single("logs_led", Type::Gauge, "Nodes' logs that this node's server leads.", f.logs_led as f64);
    w.single("logs_held", Type::Gauge, "Nodes' logs of which it has a copy.", f.logs_held as f64);
    let help = "Messages of peers that could not be read.";
    w.single("messages_refused_total", Type::Counter, help, f.messages_refused as f64);
}

fn peers(w: &mut Writer<'_>, peers: &[PeerStatus]) {
    let each = |value: fn(&PeerStatus) -> Option<f64>| {
        peers.iter().filter_map(move |p| Some((vec![("peer", p.node.as_str())], value(p)?)))
    };
    w.family("peer_live", Type::Gauge, "1 if the peer was heard of lately.", each(|p| Some(flag(p.live))));
    let help = "Time since the peer was last heard of.";
    w.family("peer_last_heard_seconds", Type::Gauge, help, each(|p| p.last_heard_s));
    let help = "The peer's clock minus ours.";
    w.family("peer_clock_offset_seconds", Type::Gauge, help, each(|p| p.clock_offset_ms.map(|ms| ms / 1e3)));
}

/// Name, type, help and value of what there is of every database.
type Family = (&'static str, Type, &'static str, fn(&DatabaseStatus) -> u64);

const DATABASE_FAMILIES: [Family; 17] = [
    ("db_lsn", Type::Counter, "The file's counter of changed row states.", |d| d.lsn),
    ("db_pending_commits", Type::Gauge, "Commits of peers that wait to be applied.", |d| d.pending_commits),
    ("db_stopped_reasons", Type::Gauge, "Reasons why something is stopped.", |d| d.stopped.len() as u64),
    ("db_commits_published_total", Type::Counter, "Commits of this node published.", |d| d.commits_published),
    ("db_rows_published_total", Type::Counter, "Rows in commits published.", |d| d.rows_published),
    ("db_commits_applied_total", Type::Counter, "Commits of peers applied.", |d| d.commits_applied),
    ("db_peer_syncs_total", Type::Counter, "Requests to a peer for all its changes.", |d| d.peer_syncs),
    ("db_logged_pieces_total", Type::Counter, "Pieces of commits read from peers' logs.", |d| {
        d.logged_pieces
    }),
    ("db_missing_commits", Type::Gauge, "Commits that are missing and being fetched.", |d| {
        d.catching_up.as_ref().map_or(0, |c| c.missing_commits)
    }),
    ("db_messages_refused_total", Type::Counter, "Messages that could not be read.", |d| d.messages_refused),
    ("db_conflicts", Type::Gauge, "Lost writes that are kept and not restored.", |d| d.conflicts),
    ("db_id_collisions", Type::Gauge, "Those that are rows inserted at once under one id.", |d| {
        d.id_collisions
    }),
    ("db_collision_children", Type::Gauge, "Rows that refer to one of those.", |d| d.collision_children),
    ("db_conflicts_pruned_total", Type::Counter, "Conflicts removed: too old or too many.", |d| {
        d.conflicts_pruned
    }),
    ("db_deletes_forgotten_total", Type::Counter, "Deletes that are not remembered any more.", |d| {
        d.deletes_forgotten
    }),
    ("db_null_key_rows", Type::Gauge, "Rows that stay here: their key is NULL.", |d| d.null_key_rows),
    ("db_state_rows", Type::Gauge, "Rows of replication state in the file.", |d| d.state_rows),
];

fn databases(w: &mut Writer<'_>, databases: &[DatabaseStatus]) {
    let states = databases.iter().flat_map(|d| {
        DatabaseState::ALL.map(|s| (vec![("db", d.name.as_str()), ("state", s.as_str())], flag(d.state == s)))
    });
    w.family("db_state", Type::Gauge, "1 for the state that the database is in.", states);
    for (name, kind, help, value) in DATABASE_FAMILIES {
        let samples = databases.iter().map(|d| (vec![("db", d.name.as_str())], value(d) as f64));
        w.family(name, kind, help, samples);
    }
    let ahead = databases.iter().map(|d| (vec![("db", d.name.as_str())], d.clock_ahead_s));
    let help = "How far the file's clock is ahead of what other nodes follow; 0 if it is not.";
    w.family("db_clock_ahead_seconds", Type::Gauge, help, ahead);
    verified(w, databases);
}

fn verified(w: &mut Writer<'_>, databases: &[DatabaseStatus]) {
    let each = |value: fn(&Verified) -> f64| {
        let all = databases.iter().filter_map(|d| Some((d, d.verified.as_ref()?)));
        all.map(move |(d, v)| (vec![("db", d.name.as_str())], value(v)))
    };
    let help = "Rows that were not the same on all nodes when they were compared last.";
    w.family("divergent_rows", Type::Gauge, help, each(|v| v.divergent_rows as f64));
    w.family("verified_age_seconds", Type::Gauge, "Time since rows were compared last.", each(|v| v.age_s));
    let help = "How long the last comparison took.";
    w.family("verified_took_seconds", Type::Gauge, help, each(|v| v.took_s));
}

fn database_peers(w: &mut Writer<'_>, databases: &[DatabaseStatus]) {
    let each = |value: fn(&DatabasePeer) -> Option<f64>| {
        databases.iter().flat_map(move |d| {
            d.peers.iter().filter_map(move |p| {
                Some((vec![("db", d.name.as_str()), ("peer", p.node.as_str())], value(p)?))
            })
        })
    };
    let help = "Commits of ours that the peer has not confirmed.";
    w.family("db_peer_behind_commits", Type::Gauge, help, each(|p| Some(p.behind_commits as f64)));
    let help = "Commits of the peer that are not here.";
    w.family("db_peer_missing_commits", Type::Gauge, help, each(|p| Some(p.missing_commits as f64)));
    let help = "1 if neither side lacks a commit of the other.";
    w.family("db_peer_caught_up", Type::Gauge, help, each(|p| Some(flag(p.caught_up))));
    let help = "Time since the peer last told how it stands with the database.";
    w.family("db_peer_last_heard_seconds", Type::Gauge, help, each(|p| p.last_heard_s));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::status::model::example;

    #[test]
    fn the_text_is_well_formed() {
        let text = render(&example(), 0);
        let mut typed = BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(typed.insert(name), "{name} twice");
                assert!(kind == "gauge" || kind == "counter");
                assert!(kind == "gauge" || name.ends_with("_total") || name == "litemesh_db_lsn", "{name}");
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let name = series.split('{').next().unwrap();
                assert!(typed.contains(name) && name.starts_with("litemesh_"), "{line}");
                assert!(series.contains("{node=\"n1\"") && value.parse::<f64>().is_ok(), "{line}");
            }
        }
        assert!(text.contains("litemesh_db_peer_behind_commits{node=\"n1\",db=\"app\",peer=\"n3\"} 120\n"));
        assert!(text.contains("litemesh_peer_clock_offset_seconds{node=\"n1\",peer=\"n2\"} -0.00125\n"));
        assert!(text.contains("litemesh_db_state{node=\"n1\",db=\"orders\",state=\"stopped\"} 1\n"));
    }

    #[test]
    fn labels_are_escaped() {
        let status = Status { node: "a\"b\\c\nd".into(), ..Status::default() };
        assert!(render(&status, 0).contains("litemesh_ready{node=\"a\\\"b\\\\c\\nd\"} 0\n"));
    }
}
