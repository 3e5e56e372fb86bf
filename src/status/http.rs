//! tmp
use super::StatusHandle;
use axum::{Json, Router, extract::State, routing::get};
/// tmp
pub fn router(h: StatusHandle) -> Router {
    Router::new()
        .route("/api/status", get(|State(h): State<StatusHandle>| async move { Json(h.current()) }))
        .with_state(h)
}
