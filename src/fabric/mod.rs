//! The mesh's NATS: configuration, bootstrap, keys, streams. Invariant: knows no SQL.

pub mod accounts;
pub mod address;
mod bootstrap;
pub mod certs;
mod conf;
mod departure;
mod error;
mod events;
mod gate;
mod hello;
mod identity;
pub mod keys;
pub mod link;
mod log_read;
mod log_stream;
mod members;
pub mod memory;
mod monitor;
mod nats;
mod options;
pub mod preflight;
mod private_file;
mod server;
mod state_lock;
mod subjects;
pub mod token;
mod watchdog;

pub use address::{Address, AddressError};
pub use error::FabricError;
pub use events::{Event, Events};
pub use log_stream::{LogLimits, LogState, stream_name};
pub use members::MembersError;
pub use nats::{Fabric, MAX_MESSAGE_BYTES, ServerInfo};
pub use options::{FabricOptions, StateDir};
pub use private_file::StateFileError;
pub use token::{JoinToken, TokenError};
