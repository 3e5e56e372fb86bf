//! Leaving the mesh for good. Invariant: nothing is taken away here before every node that is there has all that was
//! written here; if it cannot be finished, the node goes on as a member.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{info, warn};

use super::control::barrier;
use super::databases::{Running, Starter};
use super::observe::Observer;
use crate::core::names::DbName;
use crate::fabric::Fabric;
use crate::replica::adopt;
use crate::replica::clock::steady_ms;
use crate::replica::engine::Engine;
use crate::sqlite;

/// Asks for `/control/leave`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LeaveAsk {
    /// How long the others may take to get everything, in milliseconds.
    pub timeout_ms: u64,
    /// Streams that are bound to this node may go with it.
    pub drop_streams: bool,
}

/// A wish to leave, and who waits for what comes of it.
pub type LeaveRequest = (LeaveAsk, oneshot::Sender<Result<String, String>>);

/// Leaves the mesh; afterwards the process has to end. The files are plain SQLite files again.
pub async fn leave(
    starter: &Starter<'_>,
    observer: &Observer,
    fabric: &Fabric,
    running: &mut BTreeMap<DbName, Running>,
    ask: &LeaveAsk,
) -> Result<String> {
    let patience = Duration::from_millis(ask.timeout_ms);
    check(starter, fabric, ask).await?;
    info!("leaves the mesh: streams of programs are given to other nodes first");
    fabric.evacuate(patience).await?;
    everybody_has(starter, running, patience).await.inspect_err(|_| fabric.stay())?;
    info!("leaves the mesh: every node has what was written here; from now on nothing is captured any more");
    let result = async {
        for database in running.values() {
            in_thread(database, Engine::close).await??;
        }
        everybody_has(starter, running, patience).await?;
        Ok(fabric.leave().await?)
    };
    if let Err(e) = result.await {
        fabric.stay();
        for database in running.values() {
            in_thread(database, Engine::reopen).await?;
        }
        warn!("this node stays in the mesh: {e:#}");
        return Err(e);
    }
    starter.state.note_left(&starter.mesh_id)?;
    let mut told = String::from("this node has left the mesh, and its litemesh ends\n");
    for (name, database) in std::mem::take(running) {
        let path = database.path.clone();
        starter.router.remove(&name);
        tokio::task::spawn_blocking(move || database.stop()).await?;
        observer.forget(&name);
        starter.state.forget(&name)?;
        let file = path.clone();
        let detached = tokio::task::spawn_blocking(move || -> Result<()> {
            Ok(adopt::detach(&sqlite::open_replica(&file)?)?)
        });
        let line = match detached.await? {
            Ok(()) => format!(
                "{}: a plain SQLite file again; what programs write into it from now on is its own\n",
                path.display()
            ),
            Err(e) => format!("{0}: {e:#}: run 'litemesh detach {0}'\n", path.display()),
        };
        told.push_str(&line);
    }
    if fabric.is_external() {
        told.push_str(
            "what lets this host into the NATS system still does: that is for its operator to end\n",
        );
        return Ok(told);
    }
    told.push_str(
        "the mesh key is removed from this host; who has a copy of it, or a token, can still join: 'litemesh token --rotate' \
         on another node makes both worthless\n",
    );
    Ok(told)
}

async fn check(starter: &Starter<'_>, fabric: &Fabric, ask: &LeaveAsk) -> Result<()> {
    if fabric.members().is_empty() {
        bail!(
            "this node is the only one of its mesh: stop it, and 'litemesh detach' its files if they are to be plain ones"
        );
    }
    let now_ms = steady_ms();
    if !starter.router.peers().values().any(|p| p.is_live(now_ms)) {
        bail!("no other node of the mesh is there: nobody could take over what is here");
    }
    fabric.may_leave().await?;
    let bound = fabric.bound_streams().await?;
    if !bound.is_empty() && !ask.drop_streams {
        bail!(
            "these streams are bound to this node by their placement tag, and would be lost: {}; move them, or say \
             --drop-streams",
            bound.join(", ")
        );
    }
    Ok(())
}

/// Until every node that is there has all of every database.
async fn everybody_has(
    starter: &Starter<'_>,
    running: &BTreeMap<DbName, Running>,
    patience: Duration,
) -> Result<()> {
    let deadline = Instant::now() + patience;
    for name in running.keys() {
        let (nodes, laggards) = barrier(starter.router, name, deadline).await?;
        if let Some(node) = laggards.first() {
            bail!("node {node} does not have everything of {name} after {} s", patience.as_secs());
        }
        if nodes == 0 {
            bail!(
                "no other node that is there has the database {name}: it would be lost to the mesh; start one, or 'litemesh \
                 detach' the file first"
            );
        }
    }
    Ok(())
}

async fn in_thread<T: Send + 'static>(
    database: &Running,
    work: impl FnOnce(&mut Engine) -> T + Send + 'static,
) -> Result<T> {
    let worker = database.worker.clone();
    let done = tokio::task::spawn_blocking(move || worker.call(work)).await?;
    done.with_context(|| format!("database {} is being stopped", database.name))
}
