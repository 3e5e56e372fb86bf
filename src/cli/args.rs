//! The command line as typed. Invariant: nothing is decided here but what clap can decide from the text alone; what
//! an option means together with the environment and the configuration file is `config`'s to say.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand};

use super::up_args::UpArgs;
use crate::config::duration::parse_duration;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

const EXAMPLES: &str = "\
Examples:
  litemesh up app.db                    the first host: prints the line for the others
  litemesh up app.db --join lm1-...     another host
  litemesh check app.db                 what in a schema is fragile with several writers
  litemesh status --watch               nodes, lag, conflicts

Exit codes: 0 done, 1 failed, 2 wrong usage, 78 wrong configuration.";

const SOURCES: &str = "\
Every option may also be given in the environment (LITEMESH_NAME, LITEMESH_STATE_DIR, ..., LITEMESH_DATABASES; lists \
are separated by commas) or in the configuration file (name = \"n1\", databases = [\"app.db\"]). A flag goes over the \
environment, that over the file, that over the default. Relative paths in the file start from its directory.";

/// Keeps SQLite files the same on every host.
///
/// One `litemesh up` a host starts a bundled nats-server, joins it with those of the other hosts into one cluster, and
/// keeps the SQLite files you name the same everywhere. Programs go on opening their local file with plain SQLite;
/// every host can write, and nobody waits for a network.
#[derive(Debug, Parser)]
#[command(name = "litemesh", version, styles = STYLES, after_help = EXAMPLES, arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run this node: serve the mesh and replicate the files named.
    ///
    /// The same line serves for the first start, for every restart, and for systemd or a container. The first node
    /// makes a new mesh and prints the line with which others join it; `--join` is ignored by a node that already
    /// belongs to one. Prints `ready` once replication runs. Ends on SIGTERM or Ctrl-C, after what was committed
    /// has been sent.
    ///
    /// A file that does not exist yet is copied from a peer that has a database of that name. Without any database
    /// the node carries messages only.
    #[command(after_long_help = SOURCES)]
    Up(Box<UpArgs>),

    /// Print the token that lets another node join.
    ///
    /// The token holds the mesh's secret: give it only to hosts that may read and write everything. It is made of
    /// the key in the state directory and the addresses of the nodes known here.
    ///
    /// With --rotate the mesh gets a new key, while everything goes on: the nodes hand it to each other. The old one is
    /// accepted until all of them have it; a node that is away gets it when it is back.
    Token(TokenArgs),

    /// Show the node that runs here: peers, lag, conflicts, warnings.
    ///
    /// Asks the running node. The exit code is 0 if it is ready and 1 if it is not, or if none runs.
    Status(StatusArgs),

    /// Wait until every live node has what this node has now.
    ///
    /// Returns when each live node has applied all that was committed here before the call. The exit code is 1 if
    /// that takes longer than the time-out; the nodes that lag are then named.
    Sync(SyncArgs),

    /// Compare this node's rows with those of every live node.
    ///
    /// Reads the tables in short pieces on both sides and holds up nobody. A write that is under way is no difference;
    /// what is told was changed behind litemesh's back (triggers dropped, or switched off by a tool) or lost. The exit
    /// code is 0 if all rows are the same and 1 if not; then the commands that repair are printed.
    Verify(VerifyArgs),

    /// Make the rows of one node those of all nodes.
    ///
    /// Where rows differ, the node named writes its own again, as ordinary writes that travel as any other; a row that
    /// it lacks is deleted everywhere. Rows that are being changed meanwhile are left alone. May be run on any node.
    ///
    /// With --restamp it is about dates instead: what this node has written with a clock far ahead waits at the other
    /// nodes until that time has come; dated anew, it travels at once. Run it on the node whose clock was wrong.
    Repair(RepairArgs),

    /// Tell what in a file's schema is fragile when several nodes write.
    ///
    /// Reads the file and changes nothing; the file need not be replicated yet. Each finding says what it is, what
    /// litemesh does about it, and what would be better. The exit code is 0 unless the file cannot be replicated.
    Check(CheckArgs),

    /// Look at writes that lost against others and were kept.
    #[command(subcommand)]
    Conflicts(ConflictsCommand),

    /// Print changes of rows as they become visible here, as JSON lines.
    ///
    /// Whichever node wrote them; each line has the row as it is then. Without --since or --resume it begins with what
    /// happens from now on. Ends on Ctrl-C; while the node is stopped it waits for it.
    Watch(WatchArgs),

    /// Print what a NATS client of this host needs to reach the node's nats-server.
    ///
    /// As lines for the shell, with the variables that the nats CLI reads: eval "$(litemesh env)". The password is
    /// shown: it opens the account of the host's programs, and nothing of litemesh's own.
    Env(EnvArgs),

    /// Stop replicating a file and remove every trace of litemesh from it.
    ///
    /// Its rows stay as they are; our tables and triggers go. If the node runs, it is asked to do it, and goes
    /// on with its other databases. Other nodes keep their copies.
    Detach(DetachArgs),

    /// Take this node out of the mesh for good.
    ///
    /// Run it on the host that goes, while its node runs. What was written here is sent first, streams of the host's
    /// programs move to other nodes, the cluster lets the node go, and its litemesh ends. The files become plain SQLite
    /// files with the rows they have. If something is in the way, it says what, and the node stays a member.
    Leave(LeaveArgs),

    /// Take a node out of the mesh that is gone for ever.
    ///
    /// Run it on any node that is left. It says first what it will do, and asks. A node that comes back under its name
    /// needs no command, whatever became of its disk.
    Remove(RemoveArgs),

    /// Go on without members that are gone for ever, when too few are left to decide that.
    ///
    /// For a survivor of two whose peer is gone and is to be replaced under another name; one that comes back under its
    /// name needs no command. It says first what it will do, and asks for this node's name. Never run it on both sides of
    /// a broken network.
    Rescue(RescueArgs),

    /// See it work: two nodes and a small database, on this machine only.
    ///
    /// Starts two nodes in a directory of their own, writes on both, cuts them apart, and shows that they agree
    /// again. Nothing outside the directory is touched.
    Demo(DemoArgs),

    /// Print a completion script for a shell.
    ///
    /// For bash, for example: litemesh completions bash > /etc/bash_completion.d/litemesh
    Completions(CompletionsArgs),

    /// Print the manual page in roff.
    ///
    /// To read it at once: litemesh man | man -l -
    Man,
}

/// Where a command finds the node that runs here.
#[derive(Debug, Clone, Default, Args)]
pub struct StateArgs {
    /// The directory with this node's keys, logs and server.
    ///
    /// By default the user's data directory, such as ~/.local/share/litemesh.
    #[arg(long, value_name = "DIR", env = "LITEMESH_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
}

/// Arguments of `token`.
#[derive(Debug, Clone, Default, Args)]
pub struct TokenArgs {
    /// Make a new key for the mesh first. The old one is accepted until all nodes have the new one.
    #[arg(long)]
    pub rotate: bool,
    /// Accept the old key no more, even if nodes are away that have no other: with --rotate at once, else after it.
    ///
    /// Such a node has to be started once with --join and the new token.
    #[arg(long)]
    pub drop_old: bool,
    /// Where the node is found.
    #[command(flatten)]
    pub state: StateArgs,
}

/// Arguments of `status`.
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    /// Print the JSON of /api/status.
    #[arg(long)]
    pub json: bool,
    /// Show it anew every second until Ctrl-C.
    #[arg(long)]
    pub watch: bool,
    /// Where the node's state is.
    #[command(flatten)]
    pub state: StateArgs,
}

/// Arguments of `sync`.
#[derive(Debug, Clone, Args)]
pub struct SyncArgs {
    /// The database's name; all of them by default.
    #[arg(value_name = "DB")]
    pub database: Option<String>,
    /// How long to wait, for example 500ms, 10s or 2m.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    pub timeout: Duration,
    /// Where the node's state is.
    #[command(flatten)]
    pub state: StateArgs,
}

/// Arguments of `verify`.
#[derive(Debug, Clone, Args)]
pub struct VerifyArgs {
    /// The database's name; all of them by default.
    #[arg(value_name = "DB")]
    pub database: Option<String>,
    /// Print the differences as JSON.
    #[arg(long)]
    pub json: bool,
    /// Where the node's state is.
    #[command(flatten)]
    pub state: StateArgs,
}

/// Arguments of `repair`.
#[derive(Debug, Clone, Args)]
pub struct RepairArgs {
    /// The database's name.
    #[arg(value_name = "DB")]
    pub database: Option<String>,
    /// The node whose rows are right.
    #[arg(long, value_name = "NODE", required_unless_present = "restamp")]
    pub from: Option<String>,
    /// Date anew what this node has written while its clock was far ahead; the clock must be right now.
    #[arg(long, conflicts_with_all = ["from", "table", "dry_run", "json"])]
    pub restamp: bool,
    /// Repair this table only.
    #[arg(long, value_name = "TABLE")]
    pub table: Option<String>,
    /// Tell what would be done, and change nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Print what was done as JSON.
    #[arg(long)]
    pub json: bool,
    /// Where the node's state is.
    #[command(flatten)]
    pub state: StateArgs,
}

/// Arguments of `leave`.
#[derive(Debug, Clone, Args)]
pub struct LeaveArgs {
    /// How long the other nodes may take to get what is here, for example 30s or 10m.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration)]
    pub timeout: Duration,
    /// Leave although streams are bound to this node by their placement tag: they are lost.
    #[arg(long)]
    pub drop_streams: bool,
    /// Where the node's state is.
    #[command(flatten)]
    pub state: StateArgs,
}

/// Arguments of `remove`.
#[derive(Debug, Clone, Args)]
pub struct RemoveArgs {
    /// The node that is gone.
    #[arg(value_name = "NODE")]
    pub node: String,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
    /// Where this node's state is.
    #[command(flatten)]
    pub state: StateArgs,
}

/// Arguments of `rescue`.
#[derive(Debug, Clone, Args)]
pub struct RescueArgs {
    /// Instead of being asked for it: the name of this node, which goes on.
    #[arg(long, value_name = "NODE")]
    pub confirm: Option<String>,
    /// Where this node's state is.
    #[command(flatten)]
    pub state: StateArgs,
}

/// Arguments of `check`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// The SQLite file.
    #[arg(value_name = "DB")]
    pub database: PathBuf,
    /// Print findings as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What to do with conflicts.
#[derive(Debug, Subcommand)]
pub enum ConflictsCommand {
    /// List the writes that lost, newest first.
    ///
    /// Each with the beginning of its id, its age, kind, table, key and the values that lost; the versions are in the
    /// JSON. Those that were restored are left out.
    List(ConflictsListArgs),

    /// Show all that is kept of a conflict, and what the row is now.
    ///
    /// Who wrote what and when, every value, the children of a row that lost to another of the same id, and the line
    /// that brings it back.
    Show(ConflictsShowArgs),

    /// Write the values that lost back, as an ordinary write.
    ///
    /// A row that is gone is inserted again; of a row that is there the columns that lost are written, over what has
    /// won. With --new-id, a row that lost to another of the same integer id comes back under a new one, and the rows
    /// that referred to it refer to that. The node may run or not; the other nodes get it as any write.
    Restore(ConflictsRestoreArgs),
}

/// Arguments of `conflicts list`.
#[derive(Debug, Clone, Args)]
pub struct ConflictsListArgs {
    /// The SQLite file.
    #[arg(value_name = "DB")]
    pub database: PathBuf,
    /// Only those of this table.
    #[arg(long, value_name = "TABLE")]
    pub table: Option<String>,
    /// Only those of this key: a value, or a JSON array for a key of several columns.
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    pub key: Option<String>,
    /// Also those that were restored.
    #[arg(long)]
    pub all: bool,
    /// Print them as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `conflicts show`.
#[derive(Debug, Clone, Args)]
pub struct ConflictsShowArgs {
    /// The SQLite file.
    #[arg(value_name = "DB")]
    pub database: PathBuf,
    /// The conflict's id, or the beginning of it.
    #[arg(value_name = "ID")]
    pub id: String,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `conflicts restore`.
#[derive(Debug, Clone, Args)]
pub struct ConflictsRestoreArgs {
    /// The SQLite file.
    #[arg(value_name = "DB")]
    pub database: PathBuf,
    /// The conflict's id, or the beginning of it.
    #[arg(value_name = "ID")]
    pub id: String,
    /// Bring a row back under a new id, with the rows that refer to it.
    #[arg(long)]
    pub new_id: bool,
}

/// Arguments of `watch`.
#[derive(Debug, Clone, Args)]
pub struct WatchArgs {
    /// The database's name.
    #[arg(value_name = "DB")]
    pub database: String,
    /// Only changes of this table.
    #[arg(value_name = "TABLE")]
    pub table: Option<String>,
    /// Begin after this cursor, which a line has; 0 for all rows written since the file was taken in.
    #[arg(long, value_name = "CURSOR")]
    pub since: Option<String>,
    /// Keep in this file how far it came, and go on from there at the next start.
    #[arg(long, value_name = "FILE")]
    pub resume: Option<PathBuf>,
    /// Print what there is, and end.
    #[arg(long)]
    pub once: bool,
    /// Where the node's state is.
    #[command(flatten)]
    pub state: StateArgs,
}

/// Arguments of `env`.
#[derive(Debug, Clone, Args)]
pub struct EnvArgs {
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
    /// Where the node's state is.
    #[command(flatten)]
    pub state: StateArgs,
}

/// Arguments of `detach`.
#[derive(Debug, Clone, Args)]
pub struct DetachArgs {
    /// The SQLite file.
    #[arg(value_name = "DB")]
    pub database: PathBuf,
    /// Where the node's state is.
    #[command(flatten)]
    pub state: StateArgs,
}

/// Arguments of `demo`.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Where to keep the demo's files; by default a temporary directory that is removed at the end.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Arguments of `completions`.
#[derive(Debug, Clone, Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn up_takes_databases_and_flags_in_any_order() {
        let line = ["litemesh", "up", "a.db", "--name", "n1", "b=c.db", "--journal", "keep"];
        let Command::Up(up) = Cli::try_parse_from(line).unwrap().command else { panic!("not up") };
        let raw = up.raw();
        assert_eq!(raw.databases.unwrap(), ["a.db", "b=c.db"]);
        assert_eq!((raw.name.as_deref(), raw.journal.as_deref()), (Some("n1"), Some("keep")));
        assert_eq!(raw.include, None);
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            &["litemesh", "up", "--join", "a", "--join-file", "b"][..],
            &["litemesh", "sync", "--timeout", "soon"],
            &["litemesh", "check"],
            &["litemesh", "up", "--journal", "off"],
        ] {
            assert_eq!(Cli::try_parse_from(line).unwrap_err().exit_code(), 2, "{line:?}");
        }
    }

    #[test]
    fn every_command_tells_more_in_its_long_help() {
        for command in Cli::command().get_subcommands() {
            let long = command.get_long_about().map(ToString::to_string).unwrap_or_default();
            let group = command.has_subcommands();
            assert!(group || long.lines().count() > 1, "{}", command.get_name());
        }
    }
}
