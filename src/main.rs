//! The `litemesh` command: parse, dispatch, exit code.

use std::process::ExitCode;

use clap::Parser;
use litemesh::cli::{args::Cli, run};

fn main() -> ExitCode {
    run::run(&Cli::parse())
}
