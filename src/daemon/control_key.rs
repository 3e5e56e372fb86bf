//! What `token --rotate` asks of a running node. Invariant: as [`super::control`].

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router as Routes};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::control::Control;
use crate::fabric::{Fabric, FabricError};

const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The longest that a question waits for the other nodes.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Asks for `/control/key`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeyAsk {
    /// Make a new key.
    pub rotate: bool,
    /// Accept the old one no more, whoever has no other.
    pub drop_old: bool,
    /// How long to wait for the other nodes to have the new key, in milliseconds.
    pub wait_ms: u64,
}

/// The answer to it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeyAnswer {
    /// The join token from now on.
    pub token: String,
    /// The members that are not known to have the new key; none if the change is done.
    pub without: Vec<String>,
}

/// The endpoint.
pub(super) fn routes() -> Routes<Control> {
    Routes::new().route("/control/key", post(key))
}

async fn key(State(control): State<Control>, Json(ask): Json<KeyAsk>) -> Response {
    let Some(fabric) = control.fabric.upgrade() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "the node is ending\n").into_response();
    };
    match change(&fabric, &ask).await {
        Ok(answer) => Json(answer).into_response(),
        Err(e @ (FabricError::KeyChanging { .. } | FabricError::NotOurs { .. })) => {
            (StatusCode::CONFLICT, e.to_string()).into_response()
        }
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
    }
}

async fn change(fabric: &Fabric, ask: &KeyAsk) -> Result<KeyAnswer, FabricError> {
    if ask.rotate {
        fabric.change_key()?;
    }
    let deadline = Instant::now() + Duration::from_millis(ask.wait_ms).min(MAX_WAIT);
    // Who is there gets it in a moment; who is away is not waited for here.
    while fabric.is_key_changing() && Instant::now() < deadline {
        let without = fabric.without_new_key();
        let there = fabric.server_info().await.routes;
        if !there.iter().any(|peer| without.iter().any(|node| node.as_str() == peer)) {
            break;
        }
        sleep(LOOK_AGAIN).await;
    }
    let without = fabric.without_new_key();
    if ask.drop_old {
        fabric.drop_old_key()?;
    }
    let without = if ask.drop_old { Vec::new() } else { without };
    Ok(KeyAnswer {
        token: fabric.join_token()?.reveal(),
        without: without.iter().map(ToString::to_string).collect(),
    })
}
