//! The command line: one file a command. Invariant: a command prints its results on stdout, everything else on
//! stderr.

pub mod args;
pub mod check;
pub mod complete;
