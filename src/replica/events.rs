//! What happened to a file that its owner should know of: kept in it, shown by status. Invariant: an entry is written in
//! the transaction that did what it tells.

use rusqlite::Connection;
use serde::{Deserialize, Serialize};

use super::Result;
use super::store::Store;

/// How many are kept.
const KEPT: usize = 10;
const EVENTS: &str = "events";

/// Something that happened to a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// What, for people.
    pub what: String,
}

/// What happened to a file, the latest last.
pub fn events(conn: &Connection) -> Result<Vec<Event>> {
    let kept: Option<String> = Store::meta(conn, EVENTS)?;
    Ok(kept.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default())
}

/// Adds an event, within the transaction at hand.
pub fn note(conn: &Connection, at_ms: u64, what: String) -> Result<()> {
    let mut all = events(conn)?;
    all.push(Event { at_ms, what });
    let from = all.len().saturating_sub(KEPT);
    Ok(Store::set_meta(conn, EVENTS, serde_json::json!(all[from..]).to_string())?)
}

impl Store {
    /// What happened to the file, the latest last.
    pub fn events(&self) -> Result<Vec<Event>> {
        events(&self.conn)
    }
}
