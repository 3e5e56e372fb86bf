//! The validated configuration. Invariant: a [`Config`] is consistent in itself; what it says about the world (ports,
//! files) may still turn out otherwise when it is used.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use glob::{MatchOptions, Pattern};
use tracing_subscriber::EnvFilter;

use super::databases;
use super::duration::parse_duration;
use super::external::{External, external};
use super::raw::{Number, Raw, nearest};
use super::size::parse_size;
use super::{ConfigError, Surroundings};
use crate::core::names::{DbName, MAX_NAME_LEN, NodeName};
use crate::core::schema::SchemaMode;

/// Where peers are listened for by default.
pub const DEFAULT_CLUSTER: &str = "0.0.0.0:6222";
/// Where the host's programs are listened for by default.
pub const DEFAULT_CLIENT: &str = "127.0.0.1:4222";
/// Where the status page is by default.
pub const DEFAULT_HTTP: &str = "127.0.0.1:8222";
/// What is logged by default.
pub const DEFAULT_LOG: &str = "info,nats=warn,async_nats=warn";

/// How often rows are compared by default.
pub const DEFAULT_VERIFY_EVERY: &str = "1h";
/// How far a clock may be ahead by default.
pub const DEFAULT_MAX_SKEW: &str = "60s";
/// How long conflicts are kept by default.
pub const DEFAULT_CONFLICTS_AGE: &str = "90d";
/// How many of them by default.
pub const DEFAULT_CONFLICTS_MAX: &str = "10000";

/// How long deletes are remembered after all nodes have them, by default.
pub const DEFAULT_TOMBSTONES_AGE: &str = "24h";
/// How long a node may be away before nobody waits for it, by default.
pub const DEFAULT_ABSENT_AGE: &str = "7d";
/// What the log stream takes on disk by default.
pub const DEFAULT_LOG_MAX_BYTES: &str = "1GiB";
/// How long it keeps a commit by default.
pub const DEFAULT_LOG_MAX_AGE: &str = "72h";
/// How many copies of it there are by default.
pub const DEFAULT_LOG_REPLICAS: &str = "auto";
/// The memory that nats-server should stay within by default.
pub const DEFAULT_NATS_MEMORY: &str = "64MiB";
/// Below this it would do little but look for memory.
const LEAST_NATS_MEMORY: u64 = 32 * 1024 * 1024;
/// A log that holds less than a few large commits is none.
const LEAST_LOG_BYTES: u64 = 16 * 1024 * 1024;
const LEAST_LOG_AGE: Duration = Duration::from_secs(1);

/// A SQLite file to replicate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseSpec {
    /// Its name, the same on every node.
    pub name: DbName,
    /// Its absolute path; there may be no such file yet.
    pub path: PathBuf,
}

/// How peers reach this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertise {
    /// A name or an address, an IPv6 address without its brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl fmt::Display for Advertise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Where the join token is. What it holds is never printed.
#[derive(Clone, PartialEq, Eq)]
pub enum Join {
    /// The token itself.
    Token(String),
    /// A file that holds it.
    File(PathBuf),
}

impl fmt::Debug for Join {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(_) => f.write_str("Token(secret)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

impl Join {
    /// The token. Call it only for a node that belongs to no mesh yet: the file need not outlive the joining.
    pub fn token(&self) -> Result<String, ConfigError> {
        databases::read_token(self)
    }
}

/// Where another NATS system takes leafnodes. The URL is never printed: it may hold a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Its URL.
    pub url: String,
    /// A file with credentials.
    pub credentials: Option<PathBuf>,
    /// A file with its CA.
    pub ca: Option<PathBuf>,
}

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaf").field("credentials", &self.credentials).finish_non_exhaustive()
    }
}

fn leaf(
    url: Option<String>,
    credentials: Option<&Path>,
    ca: Option<&Path>,
) -> Result<Option<Leaf>, ConfigError> {
    let wrong = |why: &str| Err(ConfigError::value("leaf_url", "(not shown)", why));
    // Without a hub they are for nobody.
    let Some(url) = url else { return Ok(None) };
    let known = ["nats-leaf://", "nats://", "tls://"].iter().any(|scheme| url.starts_with(scheme));
    if !known || url.contains(char::is_whitespace) {
        return wrong("write the hub's leafnode port, such as tls://hub.example:7422");
    }
    Ok(Some(Leaf { url, credentials: credentials.map(absolute), ca: ca.map(absolute) }))
}

/// What to do with the journal mode of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Journal {
    /// Put it into WAL mode once.
    #[default]
    Wal,
    /// Leave it.
    Keep,
}

/// Which tables are replicated.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableFilter {
    include: Vec<Pattern>,
    exclude: Vec<Pattern>,
}

impl TableFilter {
    /// Whether a table of this name is replicated: it matches an `include` glob, or there is none, and no `exclude`
    /// glob. Table names have no case, as in SQLite.
    pub fn covers(&self, table: &str) -> bool {
        let options = MatchOptions { case_sensitive: false, ..MatchOptions::new() };
        let any = |globs: &[Pattern]| globs.iter().any(|g| g.matches_with(table, options));
        (self.include.is_empty() || any(&self.include)) && !any(&self.exclude)
    }
}

/// Some tables, by globs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableGlobs(Vec<Pattern>);

impl TableGlobs {
    /// Whether a table of this name is meant. Table names have no case, as in SQLite.
    pub fn covers(&self, table: &str) -> bool {
        let options = MatchOptions { case_sensitive: false, ..MatchOptions::new() };
        self.0.iter().any(|g| g.matches_with(table, options))
    }
}

/// A node's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The SQLite files; a node without any carries messages only.
    pub databases: Vec<DatabaseSpec>,
    /// The node's name.
    pub name: NodeName,
    /// The directory for its keys, logs and server, absolute.
    pub state_dir: PathBuf,
    /// Where it listens for peers.
    pub cluster: SocketAddr,
    /// How peers reach it, if not by `cluster`.
    pub advertise: Option<Advertise>,
    /// Where it listens for the host's programs.
    pub client: SocketAddr,
    /// Where the status page is; a loopback address.
    pub http: SocketAddr,
    /// The token to join with, if one was given.
    pub join: Option<Join>,
    /// Where all nodes of the mesh listen, if they are started with a list instead of a token.
    pub peers: Vec<Advertise>,
    /// A file with the mesh's key.
    pub key_file: Option<PathBuf>,
    /// Another NATS system that this host's programs are connected to.
    pub leaf: Option<Leaf>,
    /// The NATS system that the nodes meet on instead of servers of their own.
    pub external: Option<External>,
    /// What to do with journal modes.
    pub journal: Journal,
    /// What happens to changes of the schema.
    pub schema: SchemaMode,
    /// Which tables are replicated.
    pub tables: TableFilter,
    /// How often rows are compared with the other nodes'; never, if absent.
    pub verify_every: Option<Duration>,
    /// How far a clock may be ahead of the mesh's before what it dates waits.
    pub max_skew: Duration,
    /// Which of them keep both rows of an id collision; `None` if none is named.
    pub rekey: Option<TableFilter>,
    /// Tables whose rows are merged as a whole, on all nodes.
    pub whole_row: TableGlobs,
    /// Tables whose rows are merged column by column, on all nodes.
    pub by_column: TableGlobs,
    /// How long conflicts are kept.
    pub conflicts_age: Duration,
    /// How many of them, of each database.
    pub conflicts_max: u64,
    /// How long deletes are remembered after all nodes have them.
    pub tombstones_age: Duration,
    /// How long a node may be away before deletes are forgotten without it.
    pub absent_age: Duration,
    /// The most that this node's log stream takes on disk.
    pub log_max_bytes: u64,
    /// The longest that it keeps a commit.
    pub log_max_age: Duration,
    /// How many copies of it there are: 1 or 3, or as many as the nodes allow.
    pub log_replicas: Option<u64>,
    /// The memory that nats-server should stay within, in MiB.
    pub nats_memory_mib: u64,
    /// Whether a file that was never in the mesh and differs from it is united with it by key.
    pub merge: bool,
    /// Whether the host's programs are told of changes over NATS.
    pub cdc: bool,
    /// A filter for the log, in the syntax of `tracing_subscriber::EnvFilter`.
    pub log: String,
}

/// Validates merged options.
pub fn validate(raw: Raw, around: &Surroundings) -> Result<Config, ConfigError> {
    let external = external(&raw)?;
    let cluster = address("cluster", raw.cluster.as_deref(), DEFAULT_CLUSTER)?;
    let client = loopback("client", raw.client.as_deref(), DEFAULT_CLIENT, "programs on this host use it")?;
    let http = loopback("http", raw.http.as_deref(), DEFAULT_HTTP, "the status page has no password")?;
    if external.is_none() {
        distinct_ports(&[("cluster", cluster), ("client", client), ("http", http)])?;
    }
    let join = match (raw.join, raw.join_file) {
        (Some(token), _) if token.trim().is_empty() => {
            return Err(ConfigError::value("join", "", "a token as `litemesh token` prints it is missing"));
        }
        (Some(token), _) => Some(Join::Token(token.trim().to_owned())),
        (None, file) => file.map(|f| Join::File(absolute(&f))),
    };
    let peers = raw.peers.unwrap_or_default();
    Ok(Config {
        databases: databases::resolve(&raw.databases.unwrap_or_default())?,
        name: node_name(raw.name.as_deref(), around)?,
        state_dir: super::state_dir(raw.state_dir.as_deref(), around)?,
        cluster,
        advertise: raw.advertise.as_deref().map(|a| host_and_port("advertise", a)).transpose()?,
        client,
        http,
        join,
        peers: peers.iter().map(|p| host_and_port("peers", p)).collect::<Result<_, _>>()?,
        key_file: raw.key_file.as_deref().map(absolute),
        leaf: leaf(raw.leaf_url, raw.leaf_credentials.as_deref(), raw.leaf_ca.as_deref())?,
        external,
        journal: journal(raw.journal.as_deref())?,
        schema: schema(raw.schema.as_deref())?,
        tables: TableFilter {
            include: globs("include", raw.include)?,
            exclude: globs("exclude", raw.exclude)?,
        },
        verify_every: verify_every(raw.verify_every.as_deref())?,
        max_skew: max_skew(raw.max_skew.as_deref())?,
        rekey: match globs("rekey", raw.rekey)? {
            none if none.is_empty() => None,
            include => Some(TableFilter { include, exclude: Vec::new() }),
        },
        whole_row: TableGlobs(globs("whole_row", raw.whole_row)?),
        by_column: TableGlobs(globs("by_column", raw.by_column)?),
        conflicts_age: age("conflicts_age", raw.conflicts_age.as_deref(), DEFAULT_CONFLICTS_AGE)?,
        conflicts_max: conflicts_max(raw.conflicts_max)?,
        tombstones_age: age("tombstones_age", raw.tombstones_age.as_deref(), DEFAULT_TOMBSTONES_AGE)?,
        merge: raw.merge.unwrap_or(false),
        cdc: raw.cdc.unwrap_or(false),
        absent_age: age("absent_age", raw.absent_age.as_deref(), DEFAULT_ABSENT_AGE)?,
        log_max_bytes: log_max_bytes(raw.log_max_bytes.as_deref())?,
        log_max_age: log_max_age(raw.log_max_age.as_deref())?,
        log_replicas: log_replicas(raw.log_replicas)?,
        nats_memory_mib: nats_memory(raw.nats_memory.as_deref())? >> 20,
        log: log(raw.log)?,
    })
}

fn age(option: &'static str, given: Option<&str>, default: &str) -> Result<Duration, ConfigError> {
    let text = given.unwrap_or(default);
    parse_duration(text).map_err(|why| ConfigError::value(option, text, why))
}

fn log_max_bytes(given: Option<&str>) -> Result<u64, ConfigError> {
    let text = given.unwrap_or(DEFAULT_LOG_MAX_BYTES);
    let wrong = |why: String| ConfigError::value("log_max_bytes", text, why);
    match parse_size(text).map_err(wrong)? {
        bytes if bytes < LEAST_LOG_BYTES => Err(wrong("the least is 16MiB".to_owned())),
        bytes => Ok(bytes),
    }
}

fn nats_memory(given: Option<&str>) -> Result<u64, ConfigError> {
    let text = given.unwrap_or(DEFAULT_NATS_MEMORY);
    let wrong = |why: String| ConfigError::value("nats_memory", text, why);
    match parse_size(text).map_err(wrong)? {
        bytes if bytes < LEAST_NATS_MEMORY => Err(wrong("the least is 32MiB".to_owned())),
        bytes => Ok(bytes),
    }
}

fn log_max_age(given: Option<&str>) -> Result<Duration, ConfigError> {
    match age("log_max_age", given, DEFAULT_LOG_MAX_AGE)? {
        short if short < LEAST_LOG_AGE => {
            Err(ConfigError::value("log_max_age", given.unwrap_or_default(), "the least is 1s"))
        }
        age => Ok(age),
    }
}

fn log_replicas(given: Option<Number>) -> Result<Option<u64>, ConfigError> {
    let text = match given {
        None => DEFAULT_LOG_REPLICAS.to_owned(),
        Some(Number::Number(n)) => n.to_string(),
        Some(Number::Text(text)) => text,
    };
    match text.trim() {
        "auto" => Ok(None),
        "1" => Ok(Some(1)),
        "3" => Ok(Some(3)),
        other => {
            let reason = "it is \"auto\" (3 from three nodes on, else 1), 1 or 3";
            Err(ConfigError::value("log_replicas", other, reason))
        }
    }
}

fn conflicts_max(given: Option<Number>) -> Result<u64, ConfigError> {
    let text = match given {
        Some(Number::Number(n)) => return Ok(n),
        Some(Number::Text(text)) => text,
        None => DEFAULT_CONFLICTS_MAX.to_owned(),
    };
    let wrong = |_| ConfigError::value("conflicts_max", &text, "write how many to keep, such as 10000");
    text.trim().parse().map_err(wrong)
}

/// The path from the root, without looking at the file.
pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn address(option: &'static str, given: Option<&str>, default: &str) -> Result<SocketAddr, ConfigError> {
    let text = given.unwrap_or(default).trim();
    let numeric = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_owned(),
    };
    let wrong =
        |_| ConfigError::value(option, text, format!("write an address and a port, such as {default}"));
    numeric.parse().map_err(wrong)
}

fn loopback(
    option: &'static str,
    given: Option<&str>,
    default: &str,
    why: &str,
) -> Result<SocketAddr, ConfigError> {
    let address = address(option, given, default)?;
    if !address.ip().is_loopback() {
        let reason = format!("{why}, so only a loopback address such as {default} is accepted");
        return Err(ConfigError::value(option, given.unwrap_or(default), reason));
    }
    Ok(address)
}

fn distinct_ports(listeners: &[(&'static str, SocketAddr)]) -> Result<(), ConfigError> {
    for (i, (second, b)) in listeners.iter().enumerate() {
        for (first, a) in &listeners[..i] {
            let same_ip = a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified();
            if a.port() == b.port() && a.port() != 0 && same_ip {
                return Err(ConfigError::SamePort { first, second, port: a.port() });
            }
        }
    }
    Ok(())
}

fn host_and_port(option: &'static str, text: &str) -> Result<Advertise, ConfigError> {
    let wrong = || {
        let reason =
            "write a host and a port as peers reach them, such as db1.example:6222 or [2001:db8::1]:6222";
        ConfigError::value(option, text, reason)
    };
    let (host, port) = text.trim().rsplit_once(':').ok_or_else(wrong)?;
    let port: u16 = port.parse().ok().filter(|p| *p != 0).ok_or_else(wrong)?;
    let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().map_err(|_| wrong())?.to_string(),
        None => host.to_owned(),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-' || c == '_';
    let is_v6 = host.parse::<std::net::Ipv6Addr>().is_ok() && text.contains('[');
    let unspecified = host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_unspecified());
    if host.is_empty() || unspecified || !(is_v6 || host.chars().all(plain)) {
        return Err(wrong());
    }
    Ok(Advertise { host, port })
}

fn node_name(given: Option<&str>, around: &Surroundings) -> Result<NodeName, ConfigError> {
    if let Some(name) = given {
        return name.parse().map_err(|e| ConfigError::value("name", name, format!("{e}")));
    }
    let host = around.host_name.as_deref().unwrap_or_default();
    let short = host.split('.').next().unwrap_or_default();
    let fit = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' };
    let made: String = short.chars().map(fit).take(MAX_NAME_LEN).collect();
    made.trim_matches('-').parse().map_err(|_| ConfigError::HostName(host.to_owned()))
}

fn schema(given: Option<&str>) -> Result<SchemaMode, ConfigError> {
    match given.map(str::trim) {
        None | Some("replicate") => Ok(SchemaMode::Replicate),
        Some("manual") => Ok(SchemaMode::Manual),
        Some(other) => {
            let reason = "it is \"replicate\" (CREATE, ALTER and DROP reach every node) or \"manual\"";
            Err(ConfigError::value("schema", other, reason))
        }
    }
}

fn journal(given: Option<&str>) -> Result<Journal, ConfigError> {
    match given.map(str::to_lowercase).as_deref() {
        None | Some("wal") => Ok(Journal::Wal),
        Some("keep") => Ok(Journal::Keep),
        Some(other) => {
            Err(ConfigError::value("journal", other, "it is \"wal\" (WAL mode, set once) or \"keep\""))
        }
    }
}

fn verify_every(given: Option<&str>) -> Result<Option<Duration>, ConfigError> {
    let text = given.unwrap_or(DEFAULT_VERIFY_EVERY).trim();
    if text.eq_ignore_ascii_case("off") {
        return Ok(None);
    }
    match parse_duration(text) {
        Ok(every) if every >= Duration::from_secs(1) => Ok(Some(every)),
        Ok(_) => Err(ConfigError::value("verify_every", text, "at least 1s, or \"off\"")),
        Err(why) => Err(ConfigError::value("verify_every", text, format!("{why}, or \"off\""))),
    }
}

fn max_skew(given: Option<&str>) -> Result<Duration, ConfigError> {
    let text = given.unwrap_or(DEFAULT_MAX_SKEW).trim();
    match parse_duration(text) {
        Ok(skew) if skew >= Duration::from_secs(10) => Ok(skew),
        Ok(_) => {
            Err(ConfigError::value("max_skew", text, "at least 10s: clocks and messages are never exact"))
        }
        Err(why) => Err(ConfigError::value("max_skew", text, why)),
    }
}

fn globs(option: &'static str, given: Option<Vec<String>>) -> Result<Vec<Pattern>, ConfigError> {
    let wrong = |text: &str, e: glob::PatternError| ConfigError::value(option, text, e.to_string());
    given.unwrap_or_default().iter().map(|g| Pattern::new(g).map_err(|e| wrong(g, e))).collect()
}

fn log(given: Option<String>) -> Result<String, ConfigError> {
    const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
    let text = given.unwrap_or_else(|| DEFAULT_LOG.to_owned());
    let level = text.trim().to_lowercase();
    // One word that is no level would pass as the name of a module, and nothing would be logged.
    if !level.contains(['=', ',', '[']) && !LEVELS.contains(&level.as_str()) {
        let reason = format!("there is no such level; did you mean {:?}?", nearest(&level, &LEVELS));
        return Err(ConfigError::value("log", &text, reason));
    }
    EnvFilter::try_new(text.trim()).map_err(|e| ConfigError::value("log", &text, e.to_string()))?;
    Ok(text.trim().to_owned())
}
