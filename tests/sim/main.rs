//! Seeded simulations: several replicas over real SQLite databases in memory, and a network that drops, delays,
//! duplicates, partitions; nodes are killed and start again. At the end every file has the same rows.
//!
//! `LITEMESH_SIM_SEED=n` runs one seed, `LITEMESH_SIM_SEEDS=n` that many.

mod clocks;
mod compare;
mod ddl;
mod scripted;
mod world;

use world::{Options, World};

fn seeds(default: u64) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    match number("LITEMESH_SIM_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("LITEMESH_SIM_SEEDS").unwrap_or(default)).collect(),
    }
}

fn run(name: &str, default: u64, options: impl Fn(u64) -> Options) {
    for seed in seeds(default) {
        // Printed before the run, so that a panic shows which seed it was.
        println!("{name}: LITEMESH_SIM_SEED={seed}");
        World::new(seed, options(seed)).run();
    }
}

#[test]
fn nodes_converge_over_a_good_network() {
    run("good network", 30, |seed| Options { nodes: 2 + (seed % 3) as usize, ..Options::calm() });
}

#[test]
fn nodes_converge_over_a_bad_network_with_cuts_and_kills() {
    run("bad network", 60, |seed| Options { nodes: 2 + (seed % 4) as usize, ..Options::storm() });
}

#[test]
fn unique_constraints_converge() {
    run("unique", 60, |seed| Options { nodes: 2 + (seed % 3) as usize, uniques: true, ..Options::storm() });
}

#[test]
fn changes_of_the_schema_converge() {
    run("schema", 60, |seed| Options { nodes: 2 + (seed % 3) as usize, ddl: true, ..Options::storm() });
}

#[test]
fn nodes_converge_with_clocks_an_hour_off_that_jump() {
    run("clocks", 30, |seed| Options {
        nodes: 2 + (seed % 4) as usize,
        skew_ms: 3_600_000,
        jumps: 0.02,
        ..Options::storm()
    });
}
