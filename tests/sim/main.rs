//! Seeded simulations: several replicas over real SQLite databases in memory, and a network that drops, delays,
//! duplicates, partitions; nodes are killed between any two steps and start again, join, leave, are restored from a
//! copy. At the end every file has the same rows, and what is kept of conflicts is what was lost.
//!
//! `LITEMESH_SIM_SEEDS=n` runs so many seeds of each world (`250..500`: those), `LITEMESH_SIM_SEED=n` one.
//! `LITEMESH_SIM_WORLD=name` runs one world only, `LITEMESH_SIM_KEEP=1,4-7` only these steps of its history. A failure prints the line that repeats
//! it with as few steps as possible.

mod bounds;
mod clocks;
mod compare;
mod ddl;
mod ddl_names;
mod ddl_random;
mod held;
mod history;
mod mixed;
mod mixed_check;
mod parts;
mod rare;
mod rekey_model;
mod rekey_oracle;
mod rekey_rare;
mod rekey_scripted;
mod scripted;
mod site;
mod truth;
mod uniques;
mod world;

use std::collections::BTreeSet;
use std::time::Instant;

use history::{History, Options, Step, WORLDS, What, parse_keep, show_keep, shrink};

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

fn number(name: &str) -> Option<u64> {
    variable(name).map(|v| v.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// The seeds to run, for tests that make their own histories.
fn seeds(default: u64) -> std::ops::Range<u64> {
    match number("LITEMESH_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => variable("LITEMESH_SIM_SEEDS").map_or(0..default, |text| parse_seeds(&text)),
    }
}

/// So many seeds, or those from one number up to another.
fn parse_seeds(text: &str) -> std::ops::Range<u64> {
    let number = |t: &str| t.parse().expect("LITEMESH_SIM_SEEDS is a number, or two such as 250..500");
    text.split_once("..").map_or_else(|| 0..number(text), |(from, to)| number(from)..number(to))
}

/// Runs the seeds of a world.
fn run(name: &str, default: u64) {
    let options = WORLDS.into_iter().find(|w| w.name == name).unwrap();
    if variable("LITEMESH_SIM_WORLD").is_some_and(|w| w != name) {
        return;
    }
    let seeds = seeds(default);
    let (started, count) = (Instant::now(), seeds.end - seeds.start);
    let (mut conflicts, mut children, mut required) = (0, 0, 0);
    let (mut forgotten, mut united) = (0, 0);
    for seed in seeds {
        let counts = run_one(options, seed);
        conflicts += counts.conflicts;
        children += counts.children;
        required += counts.required;
        forgotten += counts.forgotten;
        united += counts.united;
    }
    let rate = count as f64 / started.elapsed().as_secs_f64();
    println!(
        "{name}: {count} seeds, {rate:.1} a second; {conflicts} losses kept, {required} had to be, {children} children; \
         {forgotten} deletes forgotten, {united} files taken in whole"
    );
    assert!(options.sleeps == 0.0 || count < 20 || (forgotten > 0 && united > 0), "nothing was forgotten");
}

fn run_one(options: Options, seed: u64) -> world::Counts {
    let history = History::new(options, seed);
    let all: BTreeSet<usize> = (0..history.steps.len()).collect();
    let keep = variable("LITEMESH_SIM_KEEP").map_or(all, |k| parse_keep(&k));
    world::run(&history.part(&keep)).unwrap_or_else(|why| {
        if variable("LITEMESH_SIM_KEEP").is_some() {
            panic!("{}\n{}", tell(&history, &keep), why);
        }
        let keep = smallest(&history);
        let why = world::run(&history.part(&keep)).err().unwrap_or(why);
        panic!("{}\n{}", tell(&history, &keep), why);
    })
}

/// The steps that are enough to fail.
fn smallest(history: &History) -> BTreeSet<usize> {
    // What panics on the way is not the news.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    // A shorter history that fails in another way is another failure.
    let class = |why: String| why.split([':', '`']).next().unwrap_or_default().to_owned();
    let failure = world::run(history).err().map(class);
    let keep =
        shrink(history.steps.len(), |keep| world::run(&history.part(keep)).err().map(class) == failure);
    std::panic::set_hook(hook);
    keep
}

/// The history that fails, and how to repeat it.
fn tell(history: &History, keep: &BTreeSet<usize>) -> String {
    let steps: String = keep.iter().map(|i| format!("  {i}: {}\n", history.steps[*i])).collect();
    format!(
        "world {} with {} nodes, seed {}, {} of {} steps:\n{steps}again with:\n  LITEMESH_SIM_WORLD={} \
         LITEMESH_SIM_SEED={} LITEMESH_SIM_KEEP={} cargo test --test sim\n",
        history.options.name,
        history.nodes,
        history.seed,
        keep.len(),
        history.steps.len(),
        history.options.name,
        history.seed,
        show_keep(keep)
    )
}

#[test]
fn nodes_converge_over_a_good_network() {
    run("good-network", 300);
}

#[test]
fn nodes_converge_over_a_bad_network_with_cuts_and_kills() {
    run("bad-network", 500);
}

#[test]
fn unique_constraints_converge() {
    run("uniques", 500);
}

#[test]
fn conflicts_are_kept_exactly_when_writes_were_concurrent() {
    run("conflicts", 1_200);
}

#[test]
fn conflicts_are_kept_while_nodes_join_and_leave() {
    run("conflicts-and-moves", 800);
}

#[test]
fn rows_merged_as_a_whole_converge_and_lose_nothing() {
    run("whole-rows", 400);
}

#[test]
fn deletes_are_forgotten_and_nothing_comes_back_or_is_lost() {
    run("forgetting", 150);
}

#[test]
fn a_fault_is_found_shrunk_and_repeated() {
    let options = WORLDS.into_iter().find(|w| w.name == "good-network").unwrap();
    let mut history = History::new(options, 4);
    history.steps.insert(30, Step { wait_ms: 5, what: What::Tamper { node: 1 } });
    assert!(world::run(&history).is_err());
    let keep = smallest(&history);
    assert!(keep.contains(&30) && keep.len() <= 3, "{}", tell(&history, &keep));
    let text = tell(&history, &keep);
    let again = text.split("LITEMESH_SIM_KEEP=").nth(1).unwrap().split(' ').next().unwrap();
    assert_eq!(parse_keep(again), keep);
    assert!(world::run(&history.part(&keep)).is_err());
    let without: BTreeSet<usize> = keep.iter().copied().filter(|i| *i != 30).collect();
    assert!(world::run(&history.part(&without)).is_ok());
}

/// Worlds with what histories do not know: changes of the schema, clocks that jump, tables that keep both rows.
fn mix(name: &str, default: u64, options: impl Fn(u64) -> mixed::Options) {
    for seed in seeds(default) {
        // Printed before the run, so that a panic shows which seed it was.
        println!("{name}: LITEMESH_SIM_SEED={seed}");
        mixed::World::new(seed, options(seed)).run();
    }
}

#[test]
fn changes_of_the_schema_converge() {
    mix("schema", 90, schema_storm);
}

/// A column that came to its name by a rename on one node and by another way on the other; one that was dropped in one of
/// two tables that became one.
#[test]
fn a_column_that_several_nodes_renamed_or_dropped_has_one_value() {
    for seed in [277, 1034] {
        mixed::World::new(seed, schema_storm(seed)).run();
    }
}

fn schema_storm(seed: u64) -> mixed::Options {
    mixed::Options { nodes: 2 + (seed % 3) as usize, ddl: true, ..mixed::Options::storm() }
}

#[test]
fn nodes_converge_with_clocks_an_hour_off_that_jump() {
    mix("clocks", 30, |seed| mixed::Options {
        nodes: 2 + (seed % 4) as usize,
        skew_ms: 3_600_000,
        jumps: 0.02,
        ..mixed::Options::storm()
    });
}

#[test]
fn tables_that_keep_both_lose_nothing_and_confuse_nobody() {
    mix("rekey", 60, |seed| {
        let kind = if seed.is_multiple_of(3) { mixed::Options::calm() } else { mixed::Options::storm() };
        let nodes = 2 + (seed % 4) as usize;
        // From clocks that agree to clocks that put one node before all others.
        let skew_ms = [10, 500, 20_000][(seed / 3 % 3) as usize];
        // Joining with a copy, leaving for ever, files restored from older copies: in half of the worlds.
        let moves = (seed % 2) as f64 * 0.03;
        mixed::Options { nodes, rekey: true, oracle: true, skew_ms, moves, ..kind }
    });
}

#[test]
fn tables_that_keep_both_converge_with_unique_constraints_and_equal_rows() {
    mix("rekey unique", 40, |seed| {
        let nodes = 2 + (seed % 3) as usize;
        let uniques = seed.is_multiple_of(2);
        mixed::Options { nodes, uniques, rekey: true, moves: 0.01, ..mixed::Options::storm() }
    });
}

/// What was written before all had begun may be lost to a collision, as in other tables; nobody comes to differ.
#[test]
fn tables_that_begin_to_keep_both_amid_writes_converge() {
    mix("rekey late", 60, |seed| {
        let nodes = 2 + (seed % 4) as usize;
        let skew_ms = [10, 500, 20_000][(seed / 3 % 3) as usize];
        let (oracle, moves) = (seed % 2 == 0, 0.01);
        mixed::Options { nodes, rekey: true, late: true, oracle, skew_ms, moves, ..mixed::Options::storm() }
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
