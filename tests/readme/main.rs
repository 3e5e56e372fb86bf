//! README is run: its transcripts line by line with real nodes, and its tables against the definitions they describe.
//! Invariant: what README shows is what the binary prints; nothing is named there that does not exist, and nothing
//! that exists is left out.

#[path = "../support/mod.rs"]
mod support;

mod tables;
mod text;
mod transcript;
