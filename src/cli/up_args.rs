//! The arguments of `up`. Invariant: as [`super::args`].

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::config::raw::{Number, Raw};

/// Arguments of `up`. Each may also be given as `LITEMESH_*` or in the configuration file; what is given here wins.
#[derive(Debug, Clone, Default, Args)]
pub struct UpArgs {
    /// SQLite files to replicate: a path, NAME=PATH, or a quoted glob.
    ///
    /// A database goes by one name on every host: the file's name without its extension, or the NAME given.
    #[arg(value_name = "DB|NAME=DB|GLOB")]
    pub databases: Vec<String>,
    /// The node's name, unique in the mesh [default: the host's name].
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// The directory for this node's keys, logs and server.
    ///
    /// By default the user's data directory, such as ~/.local/share/litemesh.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where this node listens for its peers [default: 0.0.0.0:6222].
    #[arg(long, value_name = "ADDR:PORT")]
    pub cluster: Option<String>,
    /// How peers reach this node, if not by the address it listens on.
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Where programs of this host reach NATS [default: 127.0.0.1:4222].
    #[arg(long, value_name = "ADDR:PORT")]
    pub client: Option<String>,
    /// Where the status page, metrics and health checks are: loopback only [default: 127.0.0.1:8222].
    #[arg(long, value_name = "ADDR:PORT")]
    pub http: Option<String>,
    /// The token that `litemesh token` or `up` printed on another node.
    ///
    /// Other users of this host can see it in the list of processes: LITEMESH_JOIN or --join-file keep it to
    /// yourself.
    #[arg(long, value_name = "TOKEN", conflicts_with = "join_file")]
    pub join: Option<String>,
    /// A file that holds the token.
    #[arg(long, value_name = "FILE")]
    pub join_file: Option<PathBuf>,
    /// Where all nodes of the mesh listen, this one first or among them: the same list for all, instead of a token.
    ///
    /// All are started with it and with --key-file, at once and in any order. The node at the first address founds the
    /// mesh as soon as most of the list are there; the others join it.
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',', conflicts_with_all = ["join", "join_file"])]
    pub peers: Vec<String>,
    /// A file with the mesh's key: 32 random bytes in Base64, the same on every node.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["join", "join_file"])]
    pub key_file: Option<PathBuf>,
    /// The client port of a NATS system of yours, on which the nodes meet instead of servers of their own.
    ///
    /// Such as nats://nats.example:4222, several with commas between. Whoever is let in there with the same URL and mesh
    /// belongs: no token is needed. A password in it can be seen in the list of processes: use --fabric-credentials, or
    /// LITEMESH_FABRIC_URL.
    #[arg(long, value_name = "URL", conflicts_with_all = ["cluster", "advertise", "client", "join", "join_file", "peers", "key_file", "leaf_url"])]
    pub fabric_url: Option<String>,
    /// A file with credentials for it.
    #[arg(long, value_name = "FILE")]
    pub fabric_credentials: Option<PathBuf>,
    /// A file with the CA of its certificates.
    #[arg(long, value_name = "FILE")]
    pub fabric_ca: Option<PathBuf>,
    /// A file with a certificate that it lets in, and --fabric-key with its key.
    #[arg(long, value_name = "FILE")]
    pub fabric_cert: Option<PathBuf>,
    /// A file with the key of --fabric-cert.
    #[arg(long, value_name = "FILE")]
    pub fabric_key: Option<PathBuf>,
    /// The mesh's name there: several may share an account [default: litemesh].
    #[arg(long, value_name = "NAME")]
    pub fabric_mesh: Option<String>,
    /// The leafnode port of another NATS system, which this host's programs reach then, such as tls://hub:7422.
    ///
    /// A password in it can be seen in the list of processes: use --leaf-credentials, or LITEMESH_LEAF_URL.
    #[arg(long, value_name = "URL")]
    pub leaf_url: Option<String>,
    /// A file with credentials for it.
    #[arg(long, value_name = "FILE")]
    pub leaf_credentials: Option<PathBuf>,
    /// A file with the CA of its certificate.
    #[arg(long, value_name = "FILE")]
    pub leaf_ca: Option<PathBuf>,
    /// A TOML file with any of these options.
    #[arg(long, value_name = "FILE", env = "LITEMESH_CONFIG")]
    pub config: Option<PathBuf>,
    /// The journal of the SQLite files [default: wal].
    #[arg(long, value_enum)]
    pub journal: Option<JournalArg>,
    /// What happens to CREATE, ALTER and DROP [default: replicate].
    #[arg(long, value_enum)]
    pub schema: Option<SchemaArg>,
    /// Replicate only tables that match one of these globs (may be given several times).
    #[arg(long, value_name = "TABLE_GLOB")]
    pub include: Vec<String>,
    /// Leave out tables that match one of these globs (may be given several times).
    #[arg(long, value_name = "TABLE_GLOB")]
    pub exclude: Vec<String>,
    /// How often rows are compared with the other nodes', such as 1h, or off [default: 1h].
    #[arg(long, value_name = "TIME")]
    pub verify_every: Option<String>,
    /// How far a clock may be ahead of the mesh's before what it dates waits [default: 60s].
    #[arg(long, value_name = "TIME")]
    pub max_skew: Option<String>,
    /// Keep both rows when two nodes insert under one id, in tables that match one of these globs (may be given
    /// several times).
    #[arg(long, value_name = "TABLE_GLOB")]
    pub rekey: Vec<String>,
    /// Merge rows of these tables as a whole, on all nodes (may be given several times).
    ///
    /// Of two writes of one row at once the later stays, with all its columns. Say it on one node: the others follow.
    #[arg(long, value_name = "TABLE_GLOB")]
    pub whole_row: Vec<String>,
    /// Merge rows of these tables column by column again, on all nodes (may be given several times).
    #[arg(long, value_name = "TABLE_GLOB")]
    pub by_column: Vec<String>,
    /// How long writes that lost are kept, such as 30d or 12h [default: 90d].
    #[arg(long, value_name = "TIME")]
    pub conflicts_age: Option<String>,
    /// How many of them are kept, of each database [default: 10000].
    #[arg(long, value_name = "COUNT")]
    pub conflicts_max: Option<String>,
    /// How long deletes are remembered after all nodes have them [default: 24h].
    #[arg(long, value_name = "TIME")]
    pub tombstones_age: Option<String>,
    /// How long a node may be away before deletes are forgotten without it [default: 7d].
    ///
    /// A node that comes back later fetches a copy of a peer's file, and what was written on it meanwhile goes on top.
    #[arg(long, value_name = "TIME")]
    pub absent_age: Option<String>,
    /// The most that this node's log stream takes on disk, such as 512MiB [default: 1GiB].
    ///
    /// Nodes that were away read it; what it does not hold any more they fetch from any node's rows.
    #[arg(long, value_name = "SIZE")]
    pub log_max_bytes: Option<String>,
    /// The longest that it keeps a commit [default: 72h].
    #[arg(long, value_name = "TIME")]
    pub log_max_age: Option<String>,
    /// How many nodes keep a copy of this node's log stream: 1, 3, or auto, which is 3 from three nodes on [default: auto].
    #[arg(long, value_name = "auto|1|3")]
    pub log_replicas: Option<String>,
    /// The memory that nats-server should stay within, such as 128MiB [default: 64MiB].
    ///
    /// It is told to, and collects what it can; what it needs it takes all the same.
    #[arg(long, value_name = "SIZE")]
    pub nats_memory: Option<String>,
    /// Unite a file that was never in the mesh and has other rows with the mesh's, by key.
    ///
    /// Its rows become rows of the mesh; where both have one under a key, the mesh's stays and the other is kept as a
    /// conflict.
    #[arg(long)]
    pub merge: bool,
    /// Tell this host's programs of every change of a row, over NATS: cdc.DB.TABLE.insert, .update and .delete.
    #[arg(long)]
    pub cdc: bool,
    /// What to log: error, warn, info, debug, trace, or filters of single modules [default:
    /// info,nats=warn,async_nats=warn].
    #[arg(long, value_name = "LEVEL")]
    pub log: Option<String>,
}

/// What to do with a file's journal mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum JournalArg {
    /// Put files into WAL mode once; this lasts, and readers no longer wait for writers.
    Wal,
    /// Leave each file's mode as it is.
    Keep,
}

/// What happens to changes of the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SchemaArg {
    /// They reach every node.
    Replicate,
    /// You run the same migration on every node; rows wait for it.
    Manual,
}

impl UpArgs {
    /// The options that were given, as the topmost source of the configuration.
    pub fn raw(&self) -> Raw {
        let list = |l: &[String]| (!l.is_empty()).then(|| l.to_vec());
        let journal = self.journal.map(|j| match j {
            JournalArg::Wal => "wal".to_owned(),
            JournalArg::Keep => "keep".to_owned(),
        });
        let schema = self.schema.map(|s| match s {
            SchemaArg::Replicate => "replicate".to_owned(),
            SchemaArg::Manual => "manual".to_owned(),
        });
        Raw {
            databases: list(&self.databases),
            name: self.name.clone(),
            state_dir: self.state_dir.clone(),
            cluster: self.cluster.clone(),
            advertise: self.advertise.clone(),
            client: self.client.clone(),
            http: self.http.clone(),
            join: self.join.clone(),
            join_file: self.join_file.clone(),
            peers: list(&self.peers),
            key_file: self.key_file.clone(),
            fabric_url: self.fabric_url.clone(),
            fabric_credentials: self.fabric_credentials.clone(),
            fabric_ca: self.fabric_ca.clone(),
            fabric_cert: self.fabric_cert.clone(),
            fabric_key: self.fabric_key.clone(),
            fabric_mesh: self.fabric_mesh.clone(),
            fabric: None,
            leaf_url: self.leaf_url.clone(),
            leaf_credentials: self.leaf_credentials.clone(),
            leaf_ca: self.leaf_ca.clone(),
            journal,
            schema,
            include: list(&self.include),
            exclude: list(&self.exclude),
            whole_row: list(&self.whole_row),
            by_column: list(&self.by_column),
            verify_every: self.verify_every.clone(),
            max_skew: self.max_skew.clone(),
            rekey: list(&self.rekey),
            conflicts_age: self.conflicts_age.clone(),
            conflicts_max: self.conflicts_max.clone().map(Number::Text),
            tombstones_age: self.tombstones_age.clone(),
            absent_age: self.absent_age.clone(),
            log_max_bytes: self.log_max_bytes.clone(),
            log_max_age: self.log_max_age.clone(),
            log_replicas: self.log_replicas.clone().map(Number::Text),
            nats_memory: self.nats_memory.clone(),
            merge: self.merge.then_some(true),
            cdc: self.cdc.then_some(true),
            log: self.log.clone(),
        }
    }
}
