//! From the parsed command line to the command, and from its error to an exit code. Invariant: 0 done, 1 failed,
//! 2 usage (clap's own), 78 configuration.

use std::process::ExitCode;

use super::args::{Cli, Command, ConflictsCommand};
use super::{check, complete, conflicts, demo, env, members, node, repair, up, verify, watch};
use crate::config::ConfigError;
use crate::config::error::EXIT_CONFIG;
use crate::fabric::token::TokenError;

/// Runs the command; prints the chain of causes if it fails.
pub fn run(cli: &Cli) -> ExitCode {
    let result = match &cli.command {
        Command::Up(args) => up::run(args),
        Command::Token(args) => node::token(args),
        Command::Status(args) => node::status(args),
        Command::Sync(args) => node::sync(args),
        Command::Verify(args) => verify::run(args),
        Command::Repair(args) => repair::run(args),
        Command::Check(args) => {
            let checked = check::run(args, &mut std::io::stdout());
            checked.map(ExitCode::from).map_err(Into::into)
        }
        Command::Conflicts(ConflictsCommand::List(args)) => conflicts::list(args),
        Command::Conflicts(ConflictsCommand::Show(args)) => conflicts::show(args),
        Command::Conflicts(ConflictsCommand::Restore(args)) => conflicts::restore(args),
        Command::Watch(args) => watch::run(args),
        Command::Env(args) => env::run(args),
        Command::Detach(args) => node::detach(args),
        Command::Leave(args) => members::leave(args),
        Command::Remove(args) => members::remove(args),
        Command::Rescue(args) => members::rescue(args),
        Command::Demo(args) => demo::run(args),
        Command::Completions(args) => written(complete::completions(args.shell, &mut std::io::stdout())),
        Command::Man => written(complete::man(&mut std::io::stdout())),
    };
    result.unwrap_or_else(|error| {
        eprintln!("litemesh: {error:#}");
        ExitCode::from(exit_code(&error))
    })
}

/// What a script can tell apart: a mistake in what was configured, or something that failed.
fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(config) = error.downcast_ref::<ConfigError>() {
        return config.exit_code();
    }
    if error.is::<TokenError>() { EXIT_CONFIG } else { 1 }
}

fn written(result: std::io::Result<()>) -> anyhow::Result<ExitCode> {
    match result {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}
