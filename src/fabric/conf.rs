//! The text of nats-server's configuration. Invariant: a pure function, and the only place that knows its syntax.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::Path;

use super::accounts::{APP_USER, Accounts, GATE_USER, MESH_USER, SYS_USER};
use super::address::Address;
use super::certs::{COMMON_NAME, CertFiles};
use super::options::LeafHub;
use super::subjects::{PROGRAMS, Subjects};

/// The largest message any account may send.
pub const MAX_PAYLOAD_BYTES: usize = 8 * 1024 * 1024;

/// So many nodes that join at once do not take themselves for the whole cluster.
const JOINERS: usize = 16;

/// What makes one server's configuration differ from another's.
#[derive(Debug, Clone)]
pub struct ServerConf<'a> {
    /// The server's name: the node's.
    pub name: &'a str,
    /// See [`super::keyring::KeyRing::mesh_id`].
    pub mesh_id: &'a str,
    /// Where programs connect.
    pub client: SocketAddr,
    /// Where it answers about its state.
    pub monitor: SocketAddr,
    /// Where the gate connects; a server that is never alone has none.
    pub gate: Option<SocketAddr>,
    /// Where peers connect.
    pub cluster: SocketAddr,
    /// Under which address peers tell each other of it.
    pub advertise: Option<&'a Address>,
    /// The peers it dials.
    pub routes: &'a [Address],
    /// It comes into a cluster that exists, with an empty disk.
    pub joins: bool,
    /// The directory of its streams.
    pub store_dir: &'a Path,
    /// The most all streams together may take on disk.
    pub store_limit_mib: u64,
    /// What the programs' account is connected to.
    pub leaf: Option<&'a LeafHub>,
    /// Its certificate.
    pub certs: &'a CertFiles,
    /// Its users.
    pub accounts: &'a Accounts,
}

/// The cluster's name: servers of different meshes refuse each other by it.
pub fn cluster_name(mesh_id: &str) -> String {
    format!("lm-{mesh_id}")
}

/// The mesh of a cluster's name.
pub fn mesh_of_cluster(name: &str) -> Option<String> {
    name.strip_prefix("lm-").map(str::to_owned)
}

/// The tag that pins a stream to its host.
pub fn placement_tag(node: &str) -> String {
    format!("node:{node}")
}

/// The whole configuration file.
pub fn render(conf: &ServerConf<'_>) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_server(&mut text, conf);
    let _ = write_cluster(&mut text, conf);
    let _ = write_accounts(&mut text, conf);
    text
}

fn write_server(out: &mut String, conf: &ServerConf<'_>) -> std::fmt::Result {
    writeln!(out, "server_name: {}", quote(conf.name))?;
    writeln!(out, "server_tags: [{}]", quote(&placement_tag(conf.name)))?;
    writeln!(out, "listen: {}", quote(&conf.client.to_string()))?;
    writeln!(out, "http: {}", quote(&conf.monitor.to_string()))?;
    if !conf.client.ip().is_loopback() {
        writeln!(out, "tls {{ {} }}", cert_and_key(conf.certs))?;
    }
    writeln!(out, "max_payload: {MAX_PAYLOAD_BYTES}")?;
    writeln!(out, "write_deadline: \"5s\"")?;
    // Otherwise one hung peer slows every publisher here down, for a minute.
    writeln!(out, "no_fast_producer_stall: true")?;
    writeln!(out, "jetstream {{")?;
    writeln!(out, "  store_dir: {}", quote(&conf.store_dir.display().to_string()))?;
    writeln!(out, "  max_memory_store: 64MB")?;
    writeln!(out, "  max_file_store: {}", conf.store_limit_mib.saturating_mul(1024 * 1024))?;
    writeln!(out, "}}")
}

fn write_cluster(out: &mut String, conf: &ServerConf<'_>) -> std::fmt::Result {
    writeln!(out, "cluster {{")?;
    writeln!(out, "  name: {}", quote(&cluster_name(conf.mesh_id)))?;
    writeln!(out, "  listen: {}", quote(&conf.cluster.to_string()))?;
    if let Some(address) = conf.advertise {
        writeln!(out, "  cluster_advertise: {}", quote(&address.to_string()))?;
    }
    // Clients are told no other node's client address: on most hosts that is a loopback address of another host.
    writeln!(out, "  no_advertise: true")?;
    writeln!(out, "  ping_interval: \"2s\"")?;
    writeln!(out, "  ping_max: 2")?;
    writeln!(out, "  write_deadline: \"5s\"")?;
    let ca = quote(&conf.certs.ca.display().to_string());
    writeln!(out, "  tls {{ {}, ca_file: {ca}, verify: true, timeout: 5 }}", cert_and_key(conf.certs))?;
    // Without any route the server is not clustered. The one to itself costs nothing (it knows its own addresses),
    // and as the first host name it is the name that peers dialled by IP address are checked for.
    writeln!(out, "  routes: [")?;
    // A server with an empty disk takes the cluster to be as large as it has routes, and as many with empty disks elect one
    // of them, over the head of a server that leads a cluster of one: its streams would be lost. So few never count as all.
    let own = format!("nats://{COMMON_NAME}:{}", conf.cluster.port());
    writeln!(out, "    {}", quote(&own))?;
    for n in 1..if conf.joins { JOINERS } else { 1 } {
        // Equal ones are counted once.
        writeln!(out, "    {}", quote(&format!("{own}/{n}")))?;
    }
    for route in conf.routes {
        writeln!(out, "    {}", quote(&format!("nats://{route}")))?;
    }
    writeln!(out, "  ]")?;
    writeln!(out, "}}")
}

fn write_accounts(out: &mut String, conf: &ServerConf<'_>) -> std::fmt::Result {
    let user =
        |name, password| format!("users: [{{ user: {}, password: {} }}]", quote(name), quote(password));
    let accounts = conf.accounts;
    if let Some(gate) = conf.gate {
        writeln!(out, "leafnodes {{")?;
        writeln!(out, "  listen: {}", quote(&gate.to_string()))?;
        writeln!(out, "  no_advertise: true")?;
        let (name, password) = (quote(GATE_USER), quote(accounts.gate.reveal()));
        writeln!(out, "  authorization {{ user: {name}, password: {password}, account: GATE }}")?;
        if let Some(hub) = conf.leaf {
            write_leaf(out, hub)?;
        }
        writeln!(out, "}}")?;
    }
    writeln!(out, "accounts {{")?;
    writeln!(out, "  SYS {{ {} }}", user(SYS_USER, accounts.sys.reveal()))?;
    // Each node's programs are told of changes by their own node alone: when its file has them, and once.
    let ours = Subjects::bundled();
    let (changes, answers) = (ours.all_changes(conf.name), ours.all_answers(conf.name));
    let (changes, answers, programs) = (quote(&changes), quote(&answers), quote(PROGRAMS));
    writeln!(out, "  MESH {{")?;
    writeln!(out, "    jetstream: enabled, {}", user(MESH_USER, accounts.mesh.reveal()))?;
    writeln!(out, "    exports: [{{ stream: {changes}, accounts: [APP] }}]")?;
    writeln!(out, "    imports: [{{ stream: {{ account: APP, subject: {answers} }} }}]")?;
    writeln!(out, "  }}")?;
    writeln!(out, "  APP {{")?;
    writeln!(out, "    jetstream: enabled, {}", user(APP_USER, accounts.app.reveal()))?;
    writeln!(out, "    exports: [{{ stream: {answers}, accounts: [MESH] }}]")?;
    writeln!(out, "    imports: [{{ stream: {{ account: MESH, subject: {changes} }}, to: {programs} }}]")?;
    writeln!(out, "  }}")?;
    writeln!(out, "  GATE {{ }}")?;
    writeln!(out, "}}")?;
    writeln!(out, "system_account: SYS")
}

fn write_leaf(out: &mut String, hub: &LeafHub) -> std::fmt::Result {
    let file = |path: &Path| quote(&path.display().to_string());
    writeln!(out, "  remotes: [{{")?;
    writeln!(out, "    urls: [{}]", quote(&hub.url))?;
    writeln!(out, "    account: APP")?;
    if let Some(path) = &hub.credentials {
        writeln!(out, "    credentials: {}", file(path))?;
    }
    if let Some(path) = &hub.ca {
        writeln!(out, "    tls {{ ca_file: {} }}", file(path))?;
    }
    writeln!(out, "  }}]")
}

fn cert_and_key(certs: &CertFiles) -> String {
    let path = |path: &Path| quote(&path.display().to_string());
    format!("cert_file: {}, key_file: {}", path(&certs.certificate), path(&certs.key))
}

/// A string of the configuration language: in double quotes nothing is a variable, a number or a comment.
fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            _ => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(advertise: Option<&Address>, change: impl FnOnce(&mut ServerConf<'_>)) -> String {
        let certs = CertFiles { ca: "/s/ca".into(), certificate: "/s/crt".into(), key: "/s/key".into() };
        let accounts = Accounts::generate().expect("randomness");
        let routes = ["10.0.0.2:6222".parse().expect("an address"), "[::1]:7".parse().expect("an address")];
        let mut conf = ServerConf {
            name: "a",
            mesh_id: "00ff",
            client: "127.0.0.1:4222".parse().expect("an address"),
            monitor: "127.0.0.1:1".parse().expect("an address"),
            gate: Some("127.0.0.1:2".parse().expect("an address")),
            cluster: "[::]:6222".parse().expect("an address"),
            advertise,
            routes: &routes,
            joins: false,
            store_dir: Path::new("/state/a \"b\"\\c"),
            store_limit_mib: 2,
            leaf: None,
            certs: &certs,
            accounts: &accounts,
        };
        change(&mut conf);
        render(&conf)
    }

    #[test]
    fn says_what_the_design_needs() {
        let text = text(None, |_| {});
        for wanted in [
            "server_name: \"a\"",
            "server_tags: [\"node:a\"]",
            "listen: \"127.0.0.1:4222\"",
            "listen: \"[::]:6222\"",
            "name: \"lm-00ff\"",
            "\"nats://localhost:6222\"\n    \"nats://10.0.0.2:6222\"\n    \"nats://[::1]:7\"\n",
            "ca_file: \"/s/ca\", verify: true",
            "ping_interval: \"2s\"",
            "no_fast_producer_stall: true",
            "max_payload: 8388608",
            "max_file_store: 2097152",
            "account: GATE",
            "system_account: SYS",
            "{ stream: { account: MESH, subject: \"lm.e.a.>\" }, to: \"cdc.>\" }",
            r#"store_dir: "/state/a \"b\"\\c""#,
        ] {
            assert!(text.contains(wanted), "{wanted} is missing in\n{text}");
        }
        assert!(!text.contains("cluster_advertise") && !text.contains("\ntls "));
    }

    #[test]
    fn what_is_open_to_others_is_encrypted() {
        let text = text(None, |conf| conf.client = "0.0.0.0:4222".parse().expect("an address"));
        assert!(text.contains("\ntls { cert_file: \"/s/crt\", key_file: \"/s/key\" }"));
    }

    #[test]
    fn who_joins_never_takes_others_who_join_for_the_whole_cluster() {
        let routes = |text: String| {
            let own = text.lines().map(str::trim).filter(|l| l.starts_with("\"nats://localhost:6222"));
            own.map(str::to_owned).collect::<std::collections::BTreeSet<_>>().len()
        };
        assert_eq!(routes(text(None, |conf| conf.joins = true)), JOINERS);
        assert_eq!(routes(text(None, |_| {})), 1);
    }

    #[test]
    fn a_hub_is_connected_to_the_programs_account_alone() {
        let hub: &'static LeafHub = Box::leak(Box::new(LeafHub {
            url: "tls://hub.example:7422".to_owned(),
            credentials: Some("/s/hub.creds".into()),
            ca: Some("/s/hub.ca".into()),
        }));
        let text = text(None, |conf| conf.leaf = Some(hub));
        for wanted in [
            "urls: [\"tls://hub.example:7422\"]\n    account: APP\n",
            "credentials: \"/s/hub.creds\"",
            "tls { ca_file: \"/s/hub.ca\" }",
        ] {
            assert!(text.contains(wanted), "{wanted} is missing in\n{text}");
        }
    }

    #[test]
    fn advertise_and_no_gate() {
        let address: Address = "a.example:6222".parse().expect("an address");
        let text = text(Some(&address), |conf| conf.gate = None);
        assert!(text.contains("cluster_advertise: \"a.example:6222\"") && !text.contains("leafnodes"));
    }
}
