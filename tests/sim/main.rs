//! Seeded simulations: several replicas over real SQLite databases in memory, and a network that drops, delays,
//! duplicates, partitions; nodes are killed and start again. At the end every file has the same rows.
//!
//! `LITEMESH_SIM_SEED=n` runs one seed, `LITEMESH_SIM_SEEDS=n` that many.

mod clocks;
mod compare;
mod ddl;
mod rekey_model;
mod rekey_oracle;
mod rekey_scripted;
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
#[test]
fn tables_that_keep_both_lose_nothing_and_confuse_nobody() {
    run("rekey", 60, |seed| {
        let kind = if seed.is_multiple_of(3) { Options::calm() } else { Options::storm() };
        Options { nodes: 2 + (seed % 4) as usize, rekey: true, oracle: true, ..kind }
    });
}

#[test]
fn tables_that_keep_both_converge_with_unique_constraints_and_equal_rows() {
    run("rekey unique", 40, |seed| {
        let nodes = 2 + (seed % 3) as usize;
        Options { nodes, uniques: seed.is_multiple_of(2), rekey: true, ..Options::storm() }
    });
}

fn rekey_model(seed: u64, flaw: rekey_model::Flaw) -> Result<(), String> {
    let options = rekey_model::Options {
        nodes: 2 + (seed % 4) as usize,
        steps: 40 + (seed % 5) as usize * 30,
        drop: [0.0, 0.2, 0.5][(seed % 3) as usize],
        flaw,
    };
    rekey_model::Model::new(seed, options).run()
}

#[test]
fn rekey_keeps_every_row_in_the_model() {
    for seed in seeds(2_000) {
        if let Err(what) = rekey_model(seed, rekey_model::Flaw::None) {
            panic!("LITEMESH_SIM_SEED={seed}: {what}");
        }
    }
}

#[test]
fn rekey_needs_each_of_its_rules_in_the_model() {
    use rekey_model::Flaw;
    for (flaw, complaint) in [
        (Flaw::ForgetReplaced, "is back"),
        (Flaw::ForgetOnReuse, "is back"),
        (Flaw::ForgetOnArrival, "is back"),
        (Flaw::DropDeadLosers, "is back"),
        (Flaw::DropLosers, "0 times"),
    ] {
        let complaints: Vec<String> = (0..400).filter_map(|seed| rekey_model(seed, flaw).err()).collect();
        println!("{flaw:?}: {} of 400 histories end wrong", complaints.len());
        assert!(complaints.iter().any(|c| c.contains(complaint)), "{flaw:?}: {complaints:?}");
    }
}
