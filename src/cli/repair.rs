//! `litemesh repair`: makes one node's rows those of all nodes. Invariant: exit code 0 only if no row that was to be
//! repaired still differs.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use super::args::RepairArgs;
use super::node::client;
use super::verify::{PATIENCE, clean};
use crate::core::verify::Repaired;
use crate::daemon::control_verify::{RepairAsk, RestampAsk};

/// `litemesh repair`.
pub fn run(args: &RepairArgs) -> Result<ExitCode> {
    if args.restamp {
        let db = args.database.as_deref().map(str::parse).transpose()?;
        print!("{}", client(&args.state, PATIENCE)?.post("/control/restamp", &RestampAsk { db })?);
        return Ok(ExitCode::SUCCESS);
    }
    let Some(database) = &args.database else { bail!("name the database that is to be repaired") };
    let from = args.from.as_deref().context("say whose rows are right: --from NODE")?;
    let ask = RepairAsk {
        db: database.parse()?,
        from: from.parse()?,
        table: args.table.clone(),
        dry_run: args.dry_run,
    };
    let done: Repaired = client(&args.state, PATIENCE)?.ask("/control/repair", &ask)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&done)?);
    } else {
        tell(&ask, &done);
    }
    let failed = done.still_differ > 0 || done.left > 0;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn tell(ask: &RepairAsk, done: &Repaired) {
    const PRINTED: usize = 50;
    let (db, from) = (&ask.db, &ask.from);
    for (table, key, what) in done.rows.iter().take(PRINTED) {
        println!("  {} {key}: {what}", clean(table));
    }
    let named = if ask.dry_run { done.differed } else { done.repaired };
    if named > PRINTED as u64 {
        println!("  and {} more", named - PRINTED as u64);
    }
    match (ask.dry_run, done.differed) {
        (_, 0) => println!("{db}: no row differs from node {from}'s: nothing to repair"),
        (true, n) => println!("{db}: {n} rows would become what node {from} has; nothing was changed"),
        (false, _) if done.repaired == 1 => println!("{db}: 1 row is now what node {from} has"),
        (false, _) => println!("{db}: {} rows are now what node {from} has", done.repaired),
    }
    if done.left > 0 {
        println!("{db}: {} rows were being written and are left as they are: run it again", done.left);
    }
    for why in &done.not_compared {
        println!("{db}: not repaired: {why}");
    }
    if done.still_differ > 0 {
        println!("{db}: {} rows still differ: litemesh verify {db}", done.still_differ);
    }
}
