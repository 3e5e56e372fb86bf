//! Dating anew what a wrong clock has dated, on the node that has written it. Invariant: only with a clock that the
//! mesh takes for right; the state directory learns of the new site as soon as the file has it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use super::databases::{Running, Starter};
use super::state_dir::new_site;
use crate::core::names::DbName;
use crate::core::skew::direction;
use crate::replica::clock::steady_ms;
use crate::replica::restamp::Redated;

/// Dates anew what is dated too far ahead in one database, or in all; returns what to tell.
pub fn restamp(
    starter: &Starter<'_>,
    running: &BTreeMap<DbName, Running>,
    only: Option<&DbName>,
) -> Result<String> {
    let clocks = starter.router.clocks().get();
    if clocks.is_own_wrong() {
        bail!(
            "this node's clock is {} the mesh's: set it right first, then run this again",
            direction(clocks.own_off_ms)
        );
    }
    if let Some(db) = only.filter(|db| !running.contains_key(*db)) {
        bail!("this node does not replicate {db}");
    }
    let mut told = String::new();
    for (db, database) in running.iter().filter(|(db, _)| only.is_none_or(|o| o == *db)) {
        let site = new_site();
        let redated = database
            .worker
            .call(move |engine| engine.redate(site, steady_ms()).map(|r| (r, engine.store().head().site)));
        let (redated, now) = redated.context("it is being stopped")?.with_context(|| format!("{db}"))?;
        if now == site {
            starter.state.note_site(db, site)?;
        }
        told += &tell(db, &redated);
    }
    if told.is_empty() {
        told.push_str("this node replicates no database\n");
    }
    Ok(told)
}

fn tell(db: &DbName, redated: &Redated) -> String {
    let also = redated.also.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let mut text = match (redated.ahead_ms, redated.rows) {
        (0, _) => format!("{db}: nothing is dated too far ahead: nothing was changed\n"),
        (ms, 0) => format!(
            "{db}: no row is dated too far ahead; the file's clock was, by {} s, and is right now\n",
            ms / 1_000
        ),
        (ms, rows) => format!(
            "{db}: {rows} rows that were dated up to {} s ahead are new writes of now, and go to the other nodes\n",
            ms / 1_000
        ),
    };
    if !also.is_empty() {
        text += &format!(
            "{db}: writes of such dates were taken in by {also}, too: run 'litemesh repair --restamp {db}' there as well, or \
             what is written on one side waits at the other\n"
        );
    }
    text
}
