//! What a node says about itself: the state types, health, HTTP, metrics, the page and the terminal's table.
//! Invariant: everything shown comes from one published snapshot, so that no two views disagree.

pub mod handle;
pub mod http;
pub mod listener;
pub mod metrics;
pub mod model;
pub mod table;

pub use handle::StatusHandle;
pub use model::Status;
