//! The command line: one file a command. Invariant: a command prints its results on stdout, everything else on
//! stderr.

pub mod args;
pub mod check;
pub mod client;
pub mod complete;
pub mod conflicts;
pub mod demo;
pub mod env;
pub mod members;
pub mod node;
pub mod repair;
pub mod run;
pub mod up;
pub mod up_args;
pub mod verify;
pub mod watch;
