//! What `watch` asks of a running node. Invariant: as [`super::control`]; and nothing is kept for who asks, so that any
//! number may ask and go away.

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router as Routes};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use super::control::Control;
use super::verify::open_reader;
use crate::core::change::{Change, Cursor};
use crate::core::names::DbName;
use crate::replica::changes::ChangesPage;

/// The longest that a question waits for news.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// Asks for `/control/changes`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChangesAsk {
    /// The database.
    pub db: DbName,
    /// Only changes of this table.
    pub table: Option<String>,
    /// What comes after this; absent to learn where now is.
    pub after: Option<Cursor>,
    /// How long to wait for a change, in milliseconds.
    pub wait_ms: u64,
}

/// The answer to it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChangesAnswer {
    /// The changes, in the order in which they became visible.
    pub changes: Vec<Change>,
    /// Where to go on.
    pub next: Cursor,
    /// Whether there is no more at the moment.
    pub is_last: bool,
    /// Whether deletes may have been forgotten that the asker was not told of.
    pub gap: bool,
}

/// The endpoints.
pub fn routes() -> Routes<Control> {
    Routes::new().route("/control/changes", post(changes))
}

async fn changes(State(control): State<Control>, Json(ask): Json<ChangesAsk>) -> Response {
    let until = Instant::now() + Duration::from_millis(ask.wait_ms).min(MAX_WAIT);
    loop {
        let Some(worker) = control.router.worker(&ask.db) else {
            let why = format!("this node does not replicate {}\n", ask.db);
            return (StatusCode::NOT_FOUND, why).into_response();
        };
        let mut changed = worker.changed();
        changed.borrow_and_update();
        let question = ask.clone();
        let read = tokio::task::spawn_blocking(move || -> Result<ChangesPage, String> {
            let mut reader = open_reader(&worker)?;
            match &question.after {
                Some(after) => {
                    reader.changes(&worker, question.db.as_str(), after, question.table.as_deref())
                }
                None => reader.newest(&worker).map(|next| ChangesPage {
                    changes: Vec::new(),
                    next,
                    is_last: true,
                    gap: false,
                }),
            }
            .map_err(|e| e.to_string())
        });
        let page = match read.await {
            Ok(Ok(page)) => page,
            Ok(Err(why)) => return (StatusCode::CONFLICT, why).into_response(),
            Err(_) => return (StatusCode::SERVICE_UNAVAILABLE, "the node is ending\n").into_response(),
        };
        let ChangesPage { changes, next, is_last, gap } = page;
        // What passed by without being told moves the cursor on, and is nothing to wake the asker for.
        if !changes.is_empty() || gap || !is_last || ask.after.is_none() || Instant::now() >= until {
            return Json(ChangesAnswer { changes, next, is_last, gap }).into_response();
        }
        if !matches!(timeout_at(until, changed.changed()).await, Ok(Ok(()))) && Instant::now() < until {
            // The file is being opened anew.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
