//! The mesh's NATS: configuration, bootstrap, keys, streams. Invariant: knows no SQL.

pub mod address;
pub mod certs;
pub mod keys;
pub mod link;
mod private_file;
pub mod token;

pub use address::{Address, AddressError};
pub use private_file::StateFileError;
pub use token::{JoinToken, TokenError};
