//! `litemesh up`: runs the node. Invariant: stdout carries what people and scripts read (the join line, `ready`), the
//! log goes to stderr.

use std::process::ExitCode;

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, setrlimit};
use tracing_subscriber::EnvFilter;

use super::check;
use super::up_args::UpArgs;
use crate::config::{self, Config, Surroundings};
use crate::core::lint::Severity;
use crate::daemon::{self, Started};

/// Runs the node until a signal ends it.
pub fn run(args: &UpArgs) -> Result<ExitCode> {
    forbid_core_dumps();
    let file = args.config.clone().or_else(|| std::env::var_os("LITEMESH_CONFIG").map(Into::into));
    let config = config::load(args.raw(), file.as_deref(), &Surroundings::of_process())?;
    let filter = EnvFilter::try_new(&config.log).context("the log filter")?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    warn_of_schemas(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.context("cannot start")?.block_on(daemon::run(config, tell))?;
    Ok(ExitCode::SUCCESS)
}

/// Keys, passwords and rows are in memory, and stay there: in nats-server's, too, which inherits this. Of a limit of nothing
/// Linux would still hand the dump to a program, if it is set up so; of one byte it does neither.
fn forbid_core_dumps() {
    let limit = Rlimit { current: Some(1), maximum: Some(1) };
    // Where there is a lower limit already, that holds.
    let _ = setrlimit(Resource::Core, limit);
}

/// What `check` warns of, for files that are there.
fn warn_of_schemas(config: &Config) {
    for database in config.databases.iter().filter(|d| d.path.exists()) {
        // A file that cannot be read is refused later, with the reason.
        let Ok(report) = check::examine(&database.path) else { continue };
        for finding in report.findings.iter().filter(|f| f.severity != Severity::Info) {
            let table = finding.table.as_deref().unwrap_or_default();
            let told = format!("{}. {}", finding.what, finding.what_litemesh_does);
            let file = database.path.display();
            tracing::warn!(db = %database.name, "table {table}: {told} More: litemesh check {file}");
        }
    }
}

fn tell(started: &Started) {
    println!("node {} runs; status page: http://{}/", started.node, started.http);
    for (name, path) in &started.databases {
        println!("database {name}: {}", path.display());
    }
    println!("to join from another host:");
    let names =
        started.databases.iter().map(|(name, path)| match path.file_stem().and_then(|s| s.to_str()) {
            Some(stem) if stem == name.as_str() => {
                path.file_name().unwrap_or_default().to_string_lossy().into_owned()
            }
            _ => format!("{name}={}", path.file_name().unwrap_or_default().to_string_lossy()),
        });
    let names: String = names.map(|n| format!(" {n}")).collect();
    println!("  litemesh up{names} {}", started.joining);
    println!("ready");
}
