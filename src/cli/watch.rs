//! `litemesh watch`. Invariant: how far it came is written down after it was printed, never before.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::args::WatchArgs;
use super::node;
use crate::core::change::Cursor;
use crate::core::names::DbName;
use crate::daemon::control_changes::{ChangesAnswer, ChangesAsk};
use crate::daemon::state_dir::write_durably;

/// How long a question may wait for news.
const WAIT: Duration = Duration::from_secs(20);
/// How long to wait for a node that does not answer.
const RETRY: Duration = Duration::from_millis(500);

/// How far it came.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    db: DbName,
    table: Option<String>,
    cursor: Cursor,
}

/// Runs the command.
pub fn run(args: &WatchArgs) -> Result<ExitCode> {
    let db: DbName = args.database.parse()?;
    let mut after = begin(args, &db)?;
    let (mut answered, mut away) = (false, false);
    loop {
        let wait_ms = if args.once { 0 } else { WAIT.as_millis() as u64 };
        let ask = ChangesAsk { db: db.clone(), table: args.table.clone(), after: after.clone(), wait_ms };
        // Asked for anew each time: a node that was restarted has another secret.
        let answer = node::client(&args.state, WAIT)
            .and_then(|client| client.ask::<ChangesAnswer>("/control/changes", &ask));
        let answer = match answer {
            Ok(answer) => answer,
            Err(e) if args.once || !answered => return Err(e),
            Err(e) => {
                if !away {
                    eprintln!("litemesh: {e:#}; waiting for it");
                }
                away = true;
                std::thread::sleep(RETRY);
                continue;
            }
        };
        (answered, away) = (true, false);
        if !print(&db, &answer)? {
            return Ok(ExitCode::SUCCESS);
        }
        let moved = after.as_ref() != Some(&answer.next);
        if let Some(path) = args.resume.as_deref().filter(|_| moved) {
            keep(path, &Kept { db: db.clone(), table: args.table.clone(), cursor: answer.next.clone() })?;
        }
        after = Some(answer.next);
        if args.once && answer.is_last {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// Where to begin; `None` for now.
fn begin(args: &WatchArgs, db: &DbName) -> Result<Option<Cursor>> {
    let since = args.since.as_deref().map(|text| {
        Cursor::parse(text)
            .with_context(|| format!("{text:?} is no cursor: copy it from a line of watch, or say 0"))
    });
    let since = since.transpose()?;
    let Some(path) = args.resume.as_deref() else { return Ok(since) };
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(since),
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    };
    let kept: Kept = serde_json::from_slice(&bytes).with_context(|| {
        format!("{} is not what watch has written: remove it, or name another file", path.display())
    })?;
    if kept.db != *db || kept.table != args.table {
        let of = kept.table.map_or(kept.db.to_string(), |t| format!("{} {t}", kept.db));
        bail!("{} is about another watch, of {of}: name another file with --resume", path.display());
    }
    Ok(Some(kept.cursor))
}

fn keep(path: &Path, kept: &Kept) -> Result<()> {
    write_durably(&std::path::absolute(path)?, &serde_json::to_vec(kept)?)
}

/// Prints the changes; whether somebody still reads them.
fn print(db: &DbName, answer: &ChangesAnswer) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    let mut lines = Vec::new();
    if answer.gap {
        let why = "deletes may have been forgotten that were never told: read the tables anew";
        serde_json::to_writer(&mut lines, &json!({ "db": db, "op": "gap", "why": why }))?;
        lines.push(b'\n');
    }
    for change in &answer.changes {
        serde_json::to_writer(&mut lines, change)?;
        lines.push(b'\n');
    }
    match out.write_all(&lines).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true).map_err(Into::into),
    }
}
