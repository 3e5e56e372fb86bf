//! `litemesh conflicts`: the writes that lost and were kept. Invariant: it only reads.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Value, json};

use super::args::ConflictsListArgs;
use crate::replica::adopt;
use crate::sqlite;

/// `litemesh conflicts list`.
pub fn list(args: &ConflictsListArgs) -> Result<ExitCode> {
    let conn = sqlite::open_read_only(&args.database)?;
    let mut found = Vec::new();
    if adopt::is_adopted(&conn)? {
        let mut statement = conn.prepare(
            "SELECT lower(hex(id)), tbl, key, kind, loser, winner_version, loser_version, at_ms
             FROM __litemesh_conflicts ORDER BY at_ms DESC, id",
        )?;
        let rows = statement.query_map([], |r| {
            let text = |i| r.get::<_, String>(i);
            let parsed = |text: String| serde_json::from_str::<Value>(&text).unwrap_or(Value::String(text));
            Ok(json!({
                "id": text(0)?, "table": text(1)?, "key": parsed(text(2)?), "kind": text(3)?,
                "lost": parsed(text(4)?), "winner_version": text(5)?, "loser_version": text(6)?,
                "at_ms": r.get::<_, i64>(7)?,
            }))
        })?;
        found = rows.collect::<rusqlite::Result<_>>()?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else if found.is_empty() {
        println!("no conflicts are kept in {}", args.database.display());
    } else {
        for c in &found {
            let text = |name: &str| c[name].as_str().map_or_else(|| c[name].to_string(), str::to_owned);
            println!(
                "{} {} {} key {}: lost {}",
                &text("id")[..12],
                text("kind"),
                text("table"),
                text("key"),
                text("lost")
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
