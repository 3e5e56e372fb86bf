//! What the other commands ask of a running node, over HTTP on loopback. Invariant: every request carries the secret
//! that only the state directory's owner can read.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router as Routes};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::leaving::LeaveRequest;
use super::router::Router;
use super::state_dir::write_durably;
use crate::core::message::Message;
use crate::core::names::{DbName, NodeName};
use crate::core::vector::Vector;
use crate::fabric::{Fabric, FabricError};
use crate::replica::clock::steady_ms;

/// Where a running node is found, and what opens it.
#[derive(Serialize, Deserialize)]
pub struct Contact {
    /// Its HTTP listener.
    pub http: SocketAddr,
    /// The secret.
    pub secret: String,
}

impl Contact {
    const FILE: &'static str = "control.json";

    /// Writes the contact of this process, with a new secret.
    pub fn publish(state_dir: &Path, http: SocketAddr) -> Result<Self> {
        let secret = (0..4).map(|_| format!("{:016x}", rand::random::<u64>())).collect();
        let contact = Self { http, secret };
        // A temporary file that is renamed: made with mode 0600.
        write_durably(&state_dir.join(Self::FILE), &serde_json::to_vec(&contact)?)?;
        Ok(contact)
    }

    /// Reads the contact of the node with this state directory.
    pub fn read(state_dir: &Path) -> Result<Self> {
        let path = state_dir.join(Self::FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => bail!(
                "no litemesh runs with the state directory {}: start it with 'litemesh up', or name its directory with \
                 --state-dir",
                state_dir.display()
            ),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
        };
        serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))
    }
}

/// Asks for `/control/sync`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SyncAsk {
    /// The database; all of them if absent.
    pub db: Option<DbName>,
    /// How long to wait, in milliseconds.
    pub timeout_ms: u64,
}

/// The answer to it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SyncAnswer {
    /// Who has not applied everything in time: node and database.
    pub laggards: Vec<(NodeName, DbName)>,
    /// How many nodes have, without this one.
    pub nodes: usize,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
}

/// Asks for `/control/detach`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DetachAsk {
    /// The database's file.
    pub path: std::path::PathBuf,
}

/// A database that is to be detached, and who waits for it.
pub type DetachRequest = (DetachAsk, oneshot::Sender<Result<String, String>>);

/// Databases whose writes are to be dated anew, all of them if none is named, and who waits for it.
pub type RestampRequest = (Option<DbName>, oneshot::Sender<Result<String, String>>);

/// What the endpoints need.
#[derive(Clone)]
pub struct Control {
    /// Databases and peers.
    pub router: Arc<Router>,
    /// Takes requests to detach.
    pub detach: mpsc::Sender<DetachRequest>,
    /// Takes requests to date writes anew.
    pub restamp: mpsc::Sender<RestampRequest>,
    /// Takes requests to leave the mesh.
    pub leave: mpsc::Sender<LeaveRequest>,
    /// The mesh's members; gone when the node ends.
    pub fabric: Weak<Fabric>,
    /// What opens the endpoints.
    pub secret: Arc<str>,
}

/// The endpoints.
pub fn routes(control: Control) -> Routes {
    Routes::new()
        .route("/control/sync", post(sync))
        .route("/control/token", get(token))
        .route("/control/detach", post(detach))
        .merge(super::control_verify::routes())
        .merge(super::control_changes::routes())
        .merge(super::control_key::routes())
        .merge(super::control_members::routes())
        // Not for paths that nobody serves: those are unknown, not forbidden.
        .route_layer(middleware::from_fn_with_state(control.clone(), authorize))
        .with_state(control)
}

async fn authorize(State(control): State<Control>, request: Request, next: Next) -> Response {
    let given = request.headers().get("authorization").and_then(|v| v.to_str().ok());
    let given = given.and_then(|v| v.strip_prefix("Bearer ")).unwrap_or_default();
    // Hashes are compared, so that time tells nothing of the secret.
    if blake3::hash(given.as_bytes()) != blake3::hash(control.secret.as_bytes()) {
        return (StatusCode::UNAUTHORIZED, "this needs the secret of the state directory\n").into_response();
    }
    next.run(request).await
}

async fn token(State(control): State<Control>) -> Response {
    match control.fabric.upgrade().map(|fabric| fabric.join_token()) {
        Some(Ok(token)) => token.reveal().into_response(),
        Some(Err(e @ FabricError::NotOurs { .. })) => (StatusCode::CONFLICT, e.to_string()).into_response(),
        Some(Err(e)) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the node is ending\n").into_response(),
    }
}

async fn detach(State(control): State<Control>, Json(ask): Json<DetachAsk>) -> Response {
    let (answer, answered) = oneshot::channel();
    if control.detach.send((ask, answer)).await.is_err() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the node is ending\n").into_response();
    }
    match answered.await {
        Ok(Ok(text)) => text.into_response(),
        Ok(Err(text)) => (StatusCode::CONFLICT, text).into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the node is ending\n").into_response(),
    }
}

async fn sync(State(control): State<Control>, Json(ask): Json<SyncAsk>) -> Response {
    let router = &control.router;
    let started = Instant::now();
    let deadline = started + Duration::from_millis(ask.timeout_ms);
    let databases = match &ask.db {
        Some(db) if router.worker(db).is_none() => {
            return (StatusCode::NOT_FOUND, format!("this node does not replicate {db}\n")).into_response();
        }
        Some(db) => vec![db.clone()],
        None => router.databases(),
    };
    let mut answer = SyncAnswer { laggards: Vec::new(), nodes: 0, took_ms: 0 };
    for db in databases {
        match barrier(router, &db, deadline).await {
            Ok((nodes, laggards)) => {
                answer.nodes = answer.nodes.max(nodes);
                answer.laggards.extend(laggards.into_iter().map(|node| (node, db.clone())));
            }
            Err(e) => return (StatusCode::INTERNAL_SERVER_ERROR, format!("{db}: {e:#}\n")).into_response(),
        }
    }
    answer.took_ms = started.elapsed().as_millis() as u64;
    Json(answer).into_response()
}

/// Waits until every live peer holds what this node holds now.
pub(super) async fn barrier(
    router: &Router,
    db: &DbName,
    deadline: Instant,
) -> Result<(usize, Vec<NodeName>)> {
    let worker = router.worker(db).context("it was detached")?;
    let asked = worker.clone();
    let target = tokio::task::spawn_blocking(move || asked.call(|engine| engine.barrier())).await?;
    let target: Vector = target.context("it was detached")??;
    let mut pause = Duration::from_millis(2);
    loop {
        let asked = worker.clone();
        let holding =
            tokio::task::spawn_blocking(move || asked.call(|engine| engine.peers().clone())).await?;
        let holding = holding.context("it was detached")?;
        let now_ms = steady_ms();
        let peers = router.peers();
        let live: Vec<_> = peers
            .iter()
            .filter(|(_, p)| p.is_live(now_ms) && p.hello.dbs.contains(db))
            .map(|(n, _)| n)
            .collect();
        let has = |n: &NodeName| holding.get(n).is_some_and(|p| p.holding.vector.includes(&target));
        let laggards: Vec<NodeName> = live.iter().filter(|n| !has(n)).map(|n| (*n).clone()).collect();
        if laggards.is_empty() || Instant::now() >= deadline {
            return Ok((live.len() - laggards.len(), laggards));
        }
        for peer in &laggards {
            router.send(peer, &Message::Ask { db: db.clone() }).await;
        }
        tokio::time::sleep(pause.min(deadline - Instant::now())).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
