//! The commands, the HTTP endpoints and the errors, as an operator meets them: real nodes, real processes.

#[path = "../support/mod.rs"]
mod support;

mod clocks;
mod conflicts;
mod detach;
mod hostile;
mod http;
mod intruder;
mod members;
mod memory;
mod merging;
mod refusal;
mod refused_files;
mod refused_joins;
mod refused_starts;
mod returning;
mod rotate;
mod status;
mod sync;
mod verify;
mod watch;
mod words;
