//! litemesh keeps SQLite files the same on every host, over a bundled NATS cluster.

pub mod cli;
pub mod config;
pub mod core;
pub mod fabric;
pub mod replica;
pub mod sqlite;
pub mod status;
