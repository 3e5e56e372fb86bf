//! The mesh's NATS: configuration, bootstrap, keys, streams. Invariant: knows no SQL.

pub mod link;
pub mod memory;
