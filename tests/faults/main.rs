//! The fault suite: real nodes, each in a network of its own, with applications as separate processes; processes are
//! killed and stopped, networks cut, disks filled, clocks set wrong, files replaced by older copies, all at once and by
//! a seeded plan. While it goes on readers look at every file; after each round all is healed and compared.
//!
//! It takes about a minute. `LITEMESH_FAULTS_SECONDS=n` breaks things for so long, `LITEMESH_FAULTS_SEED=n` by this
//! plan, `LITEMESH_FAULTS_NODES=n` with 2 to 5 nodes, `LITEMESH_FAULTS_OTHER_BINARY=FILE` with nodes that are restarted
//! with this litemesh or that one. It needs root, and says so where it has to be skipped.
//!
//! It has a main of its own, because it starts itself again as the applications, and what it reports is to be seen.

mod app;
mod check;
mod journal;
mod look;
mod nemesis;
mod network;
mod node;
mod plan;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use world::World;

const NAME: &str = "nothing_is_lost_whatever_breaks";

fn number(name: &str, default: u64) -> u64 {
    let given = std::env::var(name).ok().filter(|v| !v.is_empty());
    given.map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// What is asked for.
struct Asked {
    plan: plan::Options,
    binaries: Vec<PathBuf>,
}

impl Asked {
    fn new() -> Self {
        let seed = number("LITEMESH_FAULTS_SEED", 1);
        let nodes = number("LITEMESH_FAULTS_NODES", 2 + seed % 2) as usize;
        assert!((2..=5).contains(&nodes), "LITEMESH_FAULTS_NODES is 2 to 5");
        let mut binaries = vec![PathBuf::from(env!("CARGO_BIN_EXE_litemesh"))];
        if let Some(other) = std::env::var_os("LITEMESH_FAULTS_OTHER_BINARY").filter(|v| !v.is_empty()) {
            binaries.push(std::path::absolute(other).expect("a path"));
            assert!(binaries[1].is_file(), "LITEMESH_FAULTS_OTHER_BINARY is not a file");
        }
        let seconds = number("LITEMESH_FAULTS_SECONDS", 35);
        Self { plan: plan::Options { seed, nodes, seconds, swaps: binaries.len() > 1 }, binaries }
    }

    /// The line that repeats it.
    fn again(&self) -> String {
        let plan::Options { seed, nodes, seconds, .. } = self.plan;
        let other = self.binaries.get(1).map(|b| format!("LITEMESH_FAULTS_OTHER_BINARY={} ", b.display()));
        let other = other.unwrap_or_default();
        format!(
            "LITEMESH_FAULTS_SEED={seed} LITEMESH_FAULTS_NODES={nodes} LITEMESH_FAULTS_SECONDS={seconds} {other}cargo test --test faults"
        )
    }
}

fn main() -> ExitCode {
    app::run_if_asked();
    // As the usual runner does: names to run, and a list of them.
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|a| a == "--list") {
        println!("{NAME}: test");
        return ExitCode::SUCCESS;
    }
    let names: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
    if !names.is_empty() && !names.iter().any(|n| NAME.contains(n.as_str())) {
        println!("\nrunning 0 tests\n\ntest result: ok. 0 passed; 0 failed; 1 filtered out\n");
        return ExitCode::SUCCESS;
    }
    let temp = std::env::temp_dir();
    plan::self_check();
    look::self_check();
    journal::self_check();
    check::self_check(&temp);
    if let Some(why) = network::missing() {
        eprintln!("\n##### SKIPPED: the fault suite did not run: {why} #####\n");
        println!(
            "\nrunning 1 test\ntest {NAME} ... ignored\n\ntest result: ok. 0 passed; 0 failed; 1 ignored (SKIPPED)\n"
        );
        return ExitCode::SUCCESS;
    }
    for name in network::remove_leftovers(&temp) {
        println!("removed what a run that was killed had left: {name}");
    }
    let asked = Asked::new();
    println!("\nrunning 1 test\nto repeat it:\n  {}", asked.again());
    let run = std::panic::catch_unwind(|| run(&asked, &temp));
    let failed = match run {
        Ok(Ok(())) => Vec::new(),
        Ok(Err(violations)) => violations,
        Err(_) => vec!["the suite panicked: see above".to_owned()],
    };
    if failed.is_empty() {
        println!("test {NAME} ... ok\n\ntest result: ok. 1 passed; 0 failed\n");
        return ExitCode::SUCCESS;
    }
    println!("\ntest {NAME} ... FAILED");
    failed.iter().for_each(|v| println!("  {v}"));
    let kept = temp.join(format!("litemesh-faults-{}", std::process::id()));
    let _ = std::fs::write(kept.join(network::KEPT), "");
    println!(
        "files and logs of all nodes are kept in {}\nto repeat it:\n  {}",
        kept.display(),
        asked.again()
    );
    println!("\ntest result: FAILED. 0 passed; 1 failed\n");
    ExitCode::FAILURE
}

/// The whole run; what is wrong, if anything.
fn run(asked: &Asked, temp: &std::path::Path) -> Result<(), Vec<String>> {
    let rounds = plan::rounds(asked.plan);
    let started = Instant::now();
    let mut world = World::new(temp, asked.plan.seed, asked.plan.nodes, &asked.binaries);
    let clocks =
        if node::faketime().is_some() { "faketime" } else { "nothing (no faketime): litemesh's clock only" };
    println!(
        "{} nodes, {} rounds; delays by {}, applications' clocks by {clocks}",
        asked.plan.nodes,
        rounds.len(),
        world.network.delays_by()
    );
    let mut longest = Duration::ZERO;
    for (number, round) in rounds.iter().enumerate() {
        nemesis::run(&mut world, round);
        if world.failed() {
            break;
        }
        world.note("heal");
        world.heal();
        let took = check::converge(&mut world).unwrap_or_else(|why| {
            world.journal.get().violation(why);
            world::PATIENCE
        });
        longest = longest.max(took);
        let wrong = if world.failed() { Vec::new() } else { check::files(&world) };
        wrong.into_iter().for_each(|w| world.journal.get().violation(w));
        if world.failed() {
            break;
        }
        println!(
            "round {number}: {} faults, all equal {} ms after healing",
            round.faults.len(),
            took.as_millis()
        );
    }
    report(&world, started.elapsed(), longest);
    finish(world)
}

fn finish(mut world: World) -> Result<(), Vec<String>> {
    if !world.failed()
        && let Some(why) = check::verify(&world)
    {
        world.journal.get().violation(why);
    }
    if world.failed() {
        let violations = world.journal.get().violations.clone();
        drop(world);
        return Err(violations);
    }
    let left = world.end();
    // What it said while it stopped counts, too.
    world.tick_journal();
    let mut violations = world.journal.get().violations.clone();
    violations.extend(left.into_iter().map(|l| format!("left behind: {l}")));
    if violations.is_empty() {
        let _ = std::fs::remove_dir_all(&world.dir);
        return Ok(());
    }
    world.keep_files();
    Err(violations)
}

fn report(world: &World, took: Duration, longest: Duration) {
    let journal = world.journal.get();
    let faults: Vec<String> = world.injected.iter().map(|(kind, n)| format!("{kind} {n}")).collect();
    println!("seed {}; {} s in all", world.seed, took.as_secs());
    println!("faults: {} ({})", world.injected.values().sum::<u64>(), faults.join(", "));
    println!(
        "transactions acknowledged: {} (statements refused for want of space: {})",
        journal.transactions, journal.refused_for_space
    );
    println!("reads checked: {}", journal.reads);
    println!("longest time to converge after healing: {} ms", longest.as_millis());
}
