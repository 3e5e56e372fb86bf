//! Carries a pinned nats-server and runs it. Invariant: it knows nothing of what the server is used for.

mod bundle;
mod error;
mod guard;
mod log_line;
pub mod manifest;
mod resident;
mod spawn;
mod supervisor;

pub use bundle::{Bundle, BundleInfo, LICENSE};
pub use error::LaunchError;
pub use supervisor::{Backoff, Exit, ExitCause, READY, ROUTES_READY, ServerEvent, ServerSpec, Supervisor};
