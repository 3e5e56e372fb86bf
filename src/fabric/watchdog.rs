//! Ends a server that hangs. Invariant: only a server that does not even say that its storage works, for a long
//! while, is ended; one without a leader or without peers is well.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::sleep;
use tracing::warn;

use super::error::FabricError;
use super::monitor;
use super::server::Server;

/// How often it is asked.
pub(super) const PERIOD: Duration = Duration::from_secs(10);
/// Each of them takes up to the monitor's patience on top of the period.
const MAX_FAILURES: u32 = 3;

/// Until it is aborted.
pub(super) async fn watch(server: Arc<Server>, address: SocketAddr, store: PathBuf, period: Duration) {
    let mut failures = 0;
    loop {
        sleep(period).await;
        if let Some(why) = server.store_damage() {
            // The next one finds none, and is told by its peers what there is.
            if let Err(e) = set_aside(&store, &why) {
                warn!("{e}");
            }
        }
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

/// Keeps what a server has stored and cannot read for whoever wants to look at it, out of its way. Rows are in SQLite files.
pub(super) fn set_aside(store: &Path, why: &str) -> Result<(), FabricError> {
    let failed = |source| FabricError::System { what: "cannot set the damaged streams aside", source };
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let aside = store.with_extension(format!("damaged-{}", since.as_secs()));
    std::fs::rename(store, &aside).map_err(failed)?;
    warn!(
        "nats-server cannot use what it has stored ({why}): that is kept as {}, and it starts without; no row is lost, and \
         streams with copies on other nodes come back from there",
        aside.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::process::{Pid, Signal, kill_process, test_kill_process};
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::fabric::server::{Ports, ServerSetup, free_loopback};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_server_that_hangs_is_replaced_and_one_that_is_well_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let binary = nats_launcher::Bundle::install(dir.path()).expect("a server");
        let [client, cluster] = free_loopback().expect("ports");
        let ports = Ports::choose(cluster, client).expect("ports");
        let conf = format!(
            "listen: \"{client}\"\nhttp: \"{}\"\ncluster {{ name: c, listen: \"{cluster}\" }}\n",
            ports.monitor
        );
        let setup = ServerSetup {
            name: "a",
            binary: &binary,
            conf_path: dir.path().join("conf"),
            conf: &conf,
            memory_limit_mib: None,
            hushed: Vec::new(),
        };
        let server = Server::start(setup, None).expect("a thread");
        server.ready(&ports).await.expect("it starts");
        let server = Arc::new(server);
        let task =
            tokio::spawn(watch(server.clone(), ports.monitor, PathBuf::new(), Duration::from_millis(20)));
        sleep(Duration::from_millis(500)).await;
        assert_eq!(server.restarts(), 0, "twenty good answers");

        let pid = i32::try_from(server.pid().expect("it runs")).expect("an id");
        let pid = Pid::from_raw(pid).expect("not zero");
        kill_process(pid, Signal::STOP).expect("ours");
        let until = Instant::now() + Duration::from_secs(30);
        while server.restarts() == 0 {
            assert!(Instant::now() < until, "it is never replaced");
            sleep(Duration::from_millis(20)).await;
        }
        assert!(test_kill_process(pid).is_err(), "the one that hung is gone");
        task.abort();
    }
}
