//! What `leave`, `remove` and `rescue` ask of a running node. Invariant: as [`super::control`]: every request carries the
//! state directory's secret; one that only asks what would be done changes nothing.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router as Routes};
use serde::{Deserialize, Serialize};

use super::control::Control;
use super::leaving::LeaveAsk;
use crate::core::names::NodeName;
use crate::fabric::Fabric;

/// Asks for `/control/remove`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RemoveAsk {
    /// Who is gone.
    pub node: NodeName,
    /// Only tells what would be done.
    pub dry_run: bool,
}

/// Asks for `/control/rescue`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RescueAsk {
    /// Only tells what would be done.
    pub dry_run: bool,
}

/// The endpoints.
pub fn routes() -> Routes<Control> {
    Routes::new()
        .route("/control/leave", post(leave))
        .route("/control/remove", post(remove))
        .route("/control/rescue", post(rescue))
}

fn answered(result: Result<String, String>) -> Response {
    match result {
        Ok(text) => text.into_response(),
        Err(why) => (StatusCode::CONFLICT, format!("{why}\n")).into_response(),
    }
}

fn ending() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, "the node is ending\n").into_response()
}

async fn leave(State(control): State<Control>, Json(ask): Json<LeaveAsk>) -> Response {
    let (answer, answer_to_come) = tokio::sync::oneshot::channel();
    if control.leave.send((ask, answer)).await.is_err() {
        return ending();
    }
    answer_to_come.await.map_or_else(|_| ending(), answered)
}

async fn remove(State(control): State<Control>, Json(ask): Json<RemoveAsk>) -> Response {
    let Some(fabric) = control.fabric.upgrade() else { return ending() };
    answered(remove_node(&fabric, &ask).await)
}

async fn remove_node(fabric: &Arc<Fabric>, ask: &RemoveAsk) -> Result<String, String> {
    let node = &ask.node;
    if ask.dry_run {
        let members = fabric.members();
        if !members.contains(node) {
            let names: Vec<_> = members.iter().map(NodeName::as_str).collect();
            return Err(format!(
                "{node} is no member of this mesh: its other members are {}",
                names.join(", ")
            ));
        }
        let lost = unanswered(fabric).await;
        return Ok(format!(
            "{node} is taken out of the mesh, on all nodes:\n\
             - the cluster does not count it any more, and copies of streams that it held are made elsewhere;\n\
             - its addresses are not dialled any more, and no database waits for it;\n\
             - its log goes; what it had sent is in the files of the others, what it had not sent is lost unless it comes \
             back;\n{lost}\
             It must be gone for ever. One that is to come back under its name needs no command: start it again, with an empty \
             disk if need be.\n"
        ));
    }
    fabric.remove_member(node).await.map_err(|e| e.to_string())?;
    Ok(format!("{node} is no member of the mesh any more\n"))
}

async fn unanswered(fabric: &Arc<Fabric>) -> String {
    match fabric.unanswered_streams().await {
        Ok(names) if !names.is_empty() => format!(
            "- of these streams of your programs nobody answers now, and those whose only copy it had are lost: {}\n",
            names.join(", ")
        ),
        _ => String::new(),
    }
}

async fn rescue(State(control): State<Control>, Json(ask): Json<RescueAsk>) -> Response {
    let Some(fabric) = control.fabric.upgrade() else { return ending() };
    answered(rescue_mesh(&fabric, &ask).await)
}

async fn rescue_mesh(fabric: &Arc<Fabric>, ask: &RescueAsk) -> Result<String, String> {
    let absent = fabric.absent().await.map_err(|e| e.to_string())?;
    let names = absent.iter().map(NodeName::as_str).collect::<Vec<_>>().join(", ");
    if absent.is_empty() {
        return Err("no member is away: there is nothing to rescue".to_owned());
    }
    let decides = fabric.can_decide().await;
    if ask.dry_run {
        let why = match decides {
            true => "the cluster can decide without them, so 'litemesh remove' would do as well",
            false => "the cluster cannot decide anything without them",
        };
        return Ok(format!(
            "These members are away: {names}; {why}.\n\
             They are taken out of the mesh for ever, and the nodes that are connected to this one decide alone.\n\
             NEVER do that on both sides of a broken network: two clusters would come of it, and when they meet, one of them \
             loses its streams (rows in SQLite files are safe). Be sure that what is away is gone: switched off, its disk \
             destroyed or emptied. A node that is to come back under its name needs no rescue: start it, with an empty disk \
             if need be.\n"
        ));
    }
    fabric.rescue(&absent).await.map_err(|e| e.to_string())?;
    Ok(format!("{names}: no members of the mesh any more; the others decide\n"))
}
