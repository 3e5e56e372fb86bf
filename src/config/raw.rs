//! The configuration as typed, from one source. Invariant: every field is optional, and nothing is interpreted but
//! which directory a relative path of the file starts from.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::ConfigError;

/// What the names of our environment variables begin with.
pub const ENV_PREFIX: &str = "LITEMESH_";

/// The options, by their names in the file.
pub const KEYS: &[&str] = &[
    "databases",
    "name",
    "state_dir",
    "cluster",
    "advertise",
    "client",
    "http",
    "join",
    "join_file",
    "peers",
    "key_file",
    "fabric_url",
    "fabric_credentials",
    "fabric_ca",
    "fabric_cert",
    "fabric_key",
    "fabric_mesh",
    "leaf_url",
    "leaf_credentials",
    "leaf_ca",
    "journal",
    "schema",
    "include",
    "exclude",
    "whole_row",
    "by_column",
    "verify_every",
    "max_skew",
    "rekey",
    "conflicts_age",
    "conflicts_max",
    "tombstones_age",
    "absent_age",
    "log_max_bytes",
    "log_max_age",
    "log_replicas",
    "nats_memory",
    "merge",
    "cdc",
    "log",
];

/// The variable that sets an option.
pub fn variable(option: &str) -> String {
    format!("{ENV_PREFIX}{}", option.to_uppercase())
}

/// Options as one source gives them.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Raw {
    /// `PATH`, `NAME=PATH` or globs.
    pub databases: Option<Vec<String>>,
    /// The node's name.
    pub name: Option<String>,
    /// The state directory.
    pub state_dir: Option<PathBuf>,
    /// Where to listen for peers.
    pub cluster: Option<String>,
    /// How peers reach this node.
    pub advertise: Option<String>,
    /// Where to listen for the host's programs.
    pub client: Option<String>,
    /// Where the status page is.
    pub http: Option<String>,
    /// A join token: secret.
    pub join: Option<String>,
    /// A file that holds it.
    pub join_file: Option<PathBuf>,
    /// Where all nodes of the mesh listen.
    pub peers: Option<Vec<String>>,
    /// A file with the mesh's key.
    pub key_file: Option<PathBuf>,
    /// The NATS system to meet on, instead of servers of the nodes' own: may hold a secret.
    pub fabric_url: Option<String>,
    /// A file with credentials for it.
    pub fabric_credentials: Option<PathBuf>,
    /// A file with its CA.
    pub fabric_ca: Option<PathBuf>,
    /// A file with a certificate for it.
    pub fabric_cert: Option<PathBuf>,
    /// A file with that certificate's key.
    pub fabric_key: Option<PathBuf>,
    /// The mesh's name there.
    pub fabric_mesh: Option<String>,
    /// These as a table of the file, without the `fabric_` of their names.
    pub fabric: Option<FabricTable>,
    /// The leafnode port of another NATS system: may hold a secret.
    pub leaf_url: Option<String>,
    /// A file with credentials for it.
    pub leaf_credentials: Option<PathBuf>,
    /// A file with its CA.
    pub leaf_ca: Option<PathBuf>,
    /// `wal` or `keep`.
    pub journal: Option<String>,
    /// `replicate` or `manual`.
    pub schema: Option<String>,
    /// Globs of tables to replicate.
    pub include: Option<Vec<String>>,
    /// Globs of tables to leave out.
    pub exclude: Option<Vec<String>>,
    /// How often rows are compared, or `off`.
    pub verify_every: Option<String>,
    /// How far a clock may be ahead.
    pub max_skew: Option<String>,
    /// Globs of tables that keep both rows of an id collision.
    pub rekey: Option<Vec<String>>,
    /// Globs of tables whose rows are merged as a whole.
    pub whole_row: Option<Vec<String>>,
    /// Globs of tables whose rows are merged column by column.
    pub by_column: Option<Vec<String>>,
    /// How long conflicts are kept.
    pub conflicts_age: Option<String>,
    /// How many of them.
    pub conflicts_max: Option<Number>,
    /// How long deletes are remembered after all have them.
    pub tombstones_age: Option<String>,
    /// How long a node may be away before nobody waits for it.
    pub absent_age: Option<String>,
    /// The most that the log stream takes on disk.
    pub log_max_bytes: Option<String>,
    /// The longest that it keeps a commit.
    pub log_max_age: Option<String>,
    /// How many copies of the log stream there are: `auto`, 1 or 3.
    pub log_replicas: Option<Number>,
    /// The memory that nats-server should stay within.
    pub nats_memory: Option<String>,
    /// Whether a file that differs from the mesh's is united with it by key.
    pub merge: Option<bool>,
    /// Whether programs are told of changes over NATS.
    pub cdc: Option<bool>,
    /// What to log.
    pub log: Option<String>,
}

/// What stands in place of a value that may be a secret.
pub const NOT_SHOWN: &str = "(not shown)";

/// The keys of [`FabricTable`].
const FABRIC_KEYS: &[&str] = &["url", "credentials", "ca", "cert", "key", "mesh"];

/// The table `[fabric]` of a file.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
pub struct FabricTable {
    /// As `fabric_url`, and so on.
    pub url: Option<String>,
    /// See above.
    pub credentials: Option<PathBuf>,
    /// See above.
    pub ca: Option<PathBuf>,
    /// See above.
    pub cert: Option<PathBuf>,
    /// See above.
    pub key: Option<PathBuf>,
    /// See above.
    pub mesh: Option<String>,
}

/// A number as typed: a file may write it with or without quotes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Number {
    /// As a number.
    Number(u64),
    /// As text.
    Text(String),
}

impl std::fmt::Debug for Raw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raw")
            .field("databases", &self.databases)
            .field("name", &self.name)
            .field("state_dir", &self.state_dir)
            .field("join", &self.join.as_ref().map(|_| "(secret)"))
            .field("join_file", &self.join_file)
            .finish_non_exhaustive()
    }
}

impl Raw {
    /// Reads a TOML file. Its relative paths start from its own directory, wherever the process was started.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        let wrong = |e: toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            line: e.span().map_or(0, |s| 1 + text[..s.start.min(text.len())].matches('\n').count()),
            // Not the error's own text, which would show the line: there may be a token in it.
            message: e.message().to_owned(),
        };
        let table: toml::Table = toml::from_str(&text).map_err(wrong)?;
        let unknown = |key: String, nearest: String| ConfigError::UnknownKey {
            place: path.display().to_string(),
            key,
            nearest,
        };
        for (key, value) in &table {
            match value {
                toml::Value::Table(fabric) if key == "fabric" => {
                    if let Some(key) = fabric.keys().find(|key| !FABRIC_KEYS.contains(&key.as_str())) {
                        let nearest = nearest(key, FABRIC_KEYS);
                        return Err(unknown(format!("fabric.{key}"), format!("fabric.{nearest}")));
                    }
                }
                _ if !KEYS.contains(&key.as_str()) => {
                    return Err(unknown(key.clone(), nearest(key, KEYS).to_owned()));
                }
                _ => {}
            }
        }
        let mut raw: Self = toml::from_str(&text).map_err(wrong)?;
        raw.take_fabric_table();
        raw.check_source(&path.display().to_string())?;
        raw.start_from(path.parent().unwrap_or(Path::new("")));
        Ok(raw)
    }

    fn take_fabric_table(&mut self) {
        let Some(table) = self.fabric.take() else { return };
        let FabricTable { url, credentials, ca, cert, key, mesh } = table;
        self.fabric_url = url.or(self.fabric_url.take());
        self.fabric_credentials = credentials.or(self.fabric_credentials.take());
        self.fabric_ca = ca.or(self.fabric_ca.take());
        self.fabric_cert = cert.or(self.fabric_cert.take());
        self.fabric_key = key.or(self.fabric_key.take());
        self.fabric_mesh = mesh.or(self.fabric_mesh.take());
    }

    fn start_from(&mut self, dir: &Path) {
        let files = [
            &mut self.join_file,
            &mut self.key_file,
            &mut self.leaf_credentials,
            &mut self.leaf_ca,
            &mut self.fabric_credentials,
            &mut self.fabric_ca,
            &mut self.fabric_cert,
            &mut self.fabric_key,
        ];
        for path in files.into_iter().chain([&mut self.state_dir]).flatten() {
            *path = dir.join(&*path);
        }
        for database in self.databases.iter_mut().flatten() {
            let (name, path) = super::databases::split(database);
            let name = name.map_or(String::new(), |n| format!("{n}="));
            // A path that is not Unicode cannot come from a TOML file, but the directory's may be so.
            *database = format!("{name}{}", dir.join(path).to_string_lossy());
        }
    }

    /// Reads the `LITEMESH_*` variables; lists are separated by commas, and an empty variable counts as unset.
    /// Others with our prefix are passed over: Kubernetes makes such variables of the name of a service.
    pub fn from_environment(variables: &[(OsString, OsString)]) -> Result<Self, ConfigError> {
        let mut raw = Self::default();
        for (name, value) in variables {
            let Some(name) = name.to_str() else { continue };
            let Some(key) = name.strip_prefix(ENV_PREFIX) else { continue };
            let key = key.to_lowercase();
            if !KEYS.contains(&key.as_str()) || value.is_empty() {
                continue;
            }
            let value = value.to_str().ok_or_else(|| ConfigError::NotUnicode(name.to_owned()))?;
            raw.set(&key, value);
        }
        raw.check_source("the environment")?;
        Ok(raw)
    }

    fn set(&mut self, key: &str, value: &str) {
        let list = || {
            let items = value.split(',').map(str::trim).filter(|v| !v.is_empty());
            Some(items.map(str::to_owned).collect())
        };
        let text = || Some(value.to_owned());
        let switch = || Some(!matches!(value.trim(), "0" | "false" | "no" | "off"));
        match key {
            "databases" => self.databases = list(),
            "include" => self.include = list(),
            "exclude" => self.exclude = list(),
            "rekey" => self.rekey = list(),
            "whole_row" => self.whole_row = list(),
            "by_column" => self.by_column = list(),
            "state_dir" => self.state_dir = Some(value.into()),
            "join_file" => self.join_file = Some(value.into()),
            "peers" => self.peers = list(),
            "key_file" => self.key_file = Some(value.into()),
            "fabric_url" => self.fabric_url = text(),
            "fabric_credentials" => self.fabric_credentials = Some(value.into()),
            "fabric_ca" => self.fabric_ca = Some(value.into()),
            "fabric_cert" => self.fabric_cert = Some(value.into()),
            "fabric_key" => self.fabric_key = Some(value.into()),
            "fabric_mesh" => self.fabric_mesh = text(),
            "leaf_url" => self.leaf_url = text(),
            "leaf_credentials" => self.leaf_credentials = Some(value.into()),
            "leaf_ca" => self.leaf_ca = Some(value.into()),
            "name" => self.name = text(),
            "cluster" => self.cluster = text(),
            "advertise" => self.advertise = text(),
            "client" => self.client = text(),
            "http" => self.http = text(),
            "join" => self.join = text(),
            "journal" => self.journal = text(),
            "schema" => self.schema = text(),
            "verify_every" => self.verify_every = text(),
            "max_skew" => self.max_skew = text(),
            "conflicts_age" => self.conflicts_age = text(),
            "conflicts_max" => self.conflicts_max = text().map(Number::Text),
            "tombstones_age" => self.tombstones_age = text(),
            "absent_age" => self.absent_age = text(),
            "log_max_bytes" => self.log_max_bytes = text(),
            "log_max_age" => self.log_max_age = text(),
            "merge" => self.merge = switch(),
            "cdc" => self.cdc = switch(),
            "nats_memory" => self.nats_memory = text(),
            "log_replicas" => self.log_replicas = text().map(Number::Text),
            "log" => self.log = text(),
            _ => {}
        }
    }

    /// Refuses what contradicts itself within one source.
    pub fn check_source(&self, place: &str) -> Result<(), ConfigError> {
        match (&self.join, &self.join_file) {
            (Some(_), Some(_)) => Err(ConfigError::TwoTokens(place.to_owned())),
            _ => Ok(()),
        }
    }

    /// These options, and those of `below` where these say nothing.
    pub fn over(self, below: Self) -> Self {
        // Two ways to give one thing: the upper source decides, whichever of them it uses.
        let (join, join_file) = match (self.join, self.join_file) {
            (None, None) => (below.join, below.join_file),
            given => given,
        };
        Self {
            databases: self.databases.or(below.databases),
            name: self.name.or(below.name),
            state_dir: self.state_dir.or(below.state_dir),
            cluster: self.cluster.or(below.cluster),
            advertise: self.advertise.or(below.advertise),
            client: self.client.or(below.client),
            http: self.http.or(below.http),
            join,
            join_file,
            peers: self.peers.or(below.peers),
            key_file: self.key_file.or(below.key_file),
            fabric_url: self.fabric_url.or(below.fabric_url),
            fabric_credentials: self.fabric_credentials.or(below.fabric_credentials),
            fabric_ca: self.fabric_ca.or(below.fabric_ca),
            fabric_cert: self.fabric_cert.or(below.fabric_cert),
            fabric_key: self.fabric_key.or(below.fabric_key),
            fabric_mesh: self.fabric_mesh.or(below.fabric_mesh),
            fabric: None,
            leaf_url: self.leaf_url.or(below.leaf_url),
            leaf_credentials: self.leaf_credentials.or(below.leaf_credentials),
            leaf_ca: self.leaf_ca.or(below.leaf_ca),
            journal: self.journal.or(below.journal),
            schema: self.schema.or(below.schema),
            include: self.include.or(below.include),
            exclude: self.exclude.or(below.exclude),
            whole_row: self.whole_row.or(below.whole_row),
            by_column: self.by_column.or(below.by_column),
            verify_every: self.verify_every.or(below.verify_every),
            max_skew: self.max_skew.or(below.max_skew),
            rekey: self.rekey.or(below.rekey),
            conflicts_age: self.conflicts_age.or(below.conflicts_age),
            conflicts_max: self.conflicts_max.or(below.conflicts_max),
            tombstones_age: self.tombstones_age.or(below.tombstones_age),
            absent_age: self.absent_age.or(below.absent_age),
            log_max_bytes: self.log_max_bytes.or(below.log_max_bytes),
            log_max_age: self.log_max_age.or(below.log_max_age),
            log_replicas: self.log_replicas.or(below.log_replicas),
            nats_memory: self.nats_memory.or(below.nats_memory),
            merge: self.merge.or(below.merge),
            cdc: self.cdc.or(below.cdc),
            log: self.log.or(below.log),
        }
    }
}

/// The known word that looks most like `word`.
pub fn nearest<'w>(word: &str, known: &[&'w str]) -> &'w str {
    let word = word.to_lowercase().replace('-', "_");
    let distance = |k: &&&str| strsim::damerau_levenshtein(&word, k);
    known.iter().min_by_key(distance).copied().unwrap_or_default()
}
