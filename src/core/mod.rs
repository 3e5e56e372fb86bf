//! The pure part: no I/O, no clock, no randomness, no tokio.

pub mod capture;
pub mod change;
pub mod conflict;
pub mod ddl;
pub mod digest;
pub mod frame;
pub mod lint;
pub mod merge;
pub mod message;
pub mod names;
pub mod rekey;
pub mod schema;
pub mod skew;
pub mod sqltext;
pub mod value;
pub mod vector;
pub mod verify;
pub mod version;
