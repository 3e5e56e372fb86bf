//! Ends a server that hangs. Invariant: only a server that does not even say that its storage works, for a long
//! while, is ended; one without a leader or without peers is well.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tracing::warn;

use super::monitor;
use super::server::Server;

const PERIOD: Duration = Duration::from_secs(5);
const MAX_FAILURES: u32 = 6;

/// Until it is aborted.
pub(super) async fn watch(server: Arc<Server>, address: SocketAddr) {
    let mut failures = 0;
    loop {
        sleep(PERIOD).await;
        // One that is starting is the supervisor's business.
        let failed = server.is_ready() && !monitor::is_healthy(address).await;
        failures = if failed { failures + 1 } else { 0 };
        if failures >= MAX_FAILURES {
            warn!(pid = server.pid(), "nats-server does not answer: it is ended and started again");
            server.replace_process();
            failures = 0;
        }
    }
}
