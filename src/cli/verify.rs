//! `litemesh verify`: which rows are not the same on all nodes. Invariant: exit code 0 only if all that could be
//! compared is the same.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

use super::args::VerifyArgs;
use super::node::client;
use crate::daemon::control_verify::{VerifyAnswer, VerifyAsk};
use crate::daemon::divergence::Divergent;

/// Large files take a while.
pub(super) const PATIENCE: Duration = Duration::from_secs(24 * 3600);
/// How many rows are printed; `--json` has more.
const PRINTED: usize = 50;

/// `litemesh verify`.
pub fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let db = args.database.as_deref().map(str::parse).transpose()?;
    let answers: Vec<VerifyAnswer> =
        client(&args.state, PATIENCE)?.ask("/control/verify", &VerifyAsk { db })?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&answers)?);
    } else {
        answers.iter().for_each(|a| print!("{}", render(a)));
    }
    let clean = |a: &VerifyAnswer| a.outcome.divergent_rows == 0 && a.outcome.unsettled_rows == 0;
    Ok(if answers.iter().all(clean) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn rows_of(count: u64) -> String {
    if count == 1 { "1 row".to_owned() } else { format!("{count} rows") }
}

fn render(answer: &VerifyAnswer) -> String {
    let (db, o) = (&answer.db, &answer.outcome);
    let mut out = String::new();
    // Writing into a String cannot fail.
    let nodes = o.nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let _ = match (o.nodes.is_empty(), o.divergent_rows) {
        (true, _) => writeln!(out, "{db}: compared with nobody"),
        (false, 0) if o.unsettled_rows == 0 => {
            writeln!(out, "{db}: {} are the same here and on {nodes} ({} ms)", rows_of(o.rows), o.took_ms)
        }
        (false, n) => writeln!(
            out,
            "{db}: of {}, compared with {nodes}, {n} differ ({} ms)",
            rows_of(o.rows),
            o.took_ms
        ),
    };
    for row in answer.differences.iter().take(PRINTED) {
        let _ = writeln!(out, "  {} {}: {}", clean(&row.table), row.key, what(row));
    }
    if o.divergent_rows > PRINTED as u64 {
        let _ = writeln!(out, "  and {} more (--json lists up to 1000)", o.divergent_rows - PRINTED as u64);
    }
    if o.unsettled_rows > 0 {
        let _ = writeln!(
            out,
            "{db}: {} kept changing, or wait for a write that has not arrived: see 'litemesh status', then run it again",
            rows_of(o.unsettled_rows)
        );
    }
    for why in &o.not_compared {
        let _ = writeln!(out, "{db}: not compared: {why}");
    }
    if o.divergent_rows > 0 {
        let mut nodes: Vec<_> = o.nodes.iter().chain([&o.by]).collect();
        nodes.sort();
        let _ = writeln!(out, "say which node is right, and its rows become those of all nodes:");
        for node in nodes {
            let _ = writeln!(out, "  litemesh repair {db} --from {node}");
        }
    }
    out
}

fn what(row: &Divergent) -> String {
    let nodes = row.nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let columns = if row.columns.is_empty() { "its key".to_owned() } else { clean(&row.columns.join(", ")) };
    match row.kind.as_str() {
        "missing" => format!("missing on {nodes}"),
        "extra" => format!("only on {nodes}"),
        "versions" => format!("the same content with other versions on {nodes}"),
        _ => format!("{columns} differ on {nodes}"),
    }
}

/// The text without control characters, which could make a terminal lie.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
