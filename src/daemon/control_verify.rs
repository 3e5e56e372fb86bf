//! What `verify` and `repair` ask of a running node. Invariant: as [`super::control`]: every request carries the
//! state directory's secret.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router as Routes};
use serde::{Deserialize, Serialize};

use super::control::Control;
use super::divergence::Divergent;
use super::verify::Speed;
use crate::core::names::{DbName, NodeName};
use crate::core::verify::Outcome;

/// Asks for `/control/verify`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyAsk {
    /// The database; all of them if absent.
    pub db: Option<DbName>,
}

/// What a comparison found, for one database.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyAnswer {
    /// The database.
    pub db: DbName,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The rows that differ, or the first of them.
    pub differences: Vec<Divergent>,
}

/// Asks for `/control/repair`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RepairAsk {
    /// The database.
    pub db: DbName,
    /// The node whose rows are right.
    pub from: NodeName,
    /// This table only.
    pub table: Option<String>,
    /// Only tells what would be done.
    pub dry_run: bool,
}

/// Asks for `/control/restamp`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RestampAsk {
    /// The database; all of them if absent.
    pub db: Option<DbName>,
}

/// The endpoints.
pub fn routes() -> Routes<Control> {
    Routes::new()
        .route("/control/verify", post(verify))
        .route("/control/repair", post(repair))
        .route("/control/restamp", post(restamp))
}

fn failed(code: StatusCode, why: &str) -> Response {
    (code, format!("{why}\n")).into_response()
}

async fn verify(State(control): State<Control>, Json(ask): Json<VerifyAsk>) -> Response {
    let router = control.router;
    let databases = match ask.db {
        Some(db) if router.worker(&db).is_none() => {
            return failed(StatusCode::NOT_FOUND, &format!("this node does not replicate {db}"));
        }
        Some(db) => vec![db],
        None => router.databases(),
    };
    let work = tokio::task::spawn_blocking(move || {
        let each = databases.into_iter().map(|db| {
            let compared = router.verify(&db, Speed::OnDemand);
            let (outcome, differences) = compared.map_err(|why| format!("{db}: {why}"))?;
            Ok(VerifyAnswer { db, outcome, differences })
        });
        each.collect::<Result<Vec<_>, String>>()
    });
    match work.await {
        Ok(Ok(answers)) => Json(answers).into_response(),
        Ok(Err(why)) => failed(StatusCode::CONFLICT, &why),
        Err(e) => failed(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    }
}

async fn repair(State(control): State<Control>, Json(ask): Json<RepairAsk>) -> Response {
    let router = control.router;
    if router.worker(&ask.db).is_none() {
        return failed(StatusCode::NOT_FOUND, &format!("this node does not replicate {}", ask.db));
    }
    let work = tokio::task::spawn_blocking(move || router.repair(&ask.db, &ask.from, ask.table, ask.dry_run));
    match work.await {
        Ok(Ok(done)) => Json(done).into_response(),
        Ok(Err(why)) => failed(StatusCode::CONFLICT, &why),
        Err(e) => failed(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    }
}

async fn restamp(State(control): State<Control>, Json(ask): Json<RestampAsk>) -> Response {
    let (answer, answered) = tokio::sync::oneshot::channel();
    let ending = || failed(StatusCode::SERVICE_UNAVAILABLE, "the node is ending");
    if control.restamp.send((ask.db, answer)).await.is_err() {
        return ending();
    }
    match answered.await {
        Ok(Ok(text)) => text.into_response(),
        Ok(Err(why)) => failed(StatusCode::CONFLICT, &why),
        Err(_) => ending(),
    }
}
