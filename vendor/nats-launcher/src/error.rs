//! Why a server could not be unpacked or started. Invariant: every message names the file and what to do.

use std::io;
use std::path::PathBuf;

/// Why a server could not be unpacked or started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The file system refused to take the server.
    #[error("cannot unpack nats-server to {}: {source}", path.display())]
    Unpack {
        /// Where it was to go.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What is embedded is not what was built in.
    #[error(
        "the nats-server inside this program is damaged (wanted sha256 {wanted}): install the program again"
    )]
    Damaged {
        /// The hash it should have.
        wanted: &'static str,
    },
    /// Built without a bundle, and there is none to be found.
    #[error("this build carries no nats-server and PATH has none: install nats-server 2.15 or newer")]
    NoServer,
    /// The process could not be started.
    #[error("cannot start {}: {source}", path.display())]
    Spawn {
        /// The program.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}
