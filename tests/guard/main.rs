//! The guard against slowness: what fixed work costs, counted in instructions under valgrind and compared with what was
//! counted when `tests/bench/instructions.toml` was written. A count does not depend on what else the machine does, so
//! that a tenth more is a fault and not a chance. `cargo test --test guard` counts the build that tests use, with
//! `--release` the one that is shipped; `-- --rewrite` keeps what was counted, names of work as arguments count only that.
//!
//! It has a main of its own, because it starts itself again under valgrind.

mod work;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use serde::{Deserialize, Serialize};

/// The argument that makes this program do one piece of work.
const WORK: &str = "--work";
/// How far a count may be from the one that was kept, in percent.
const TOLERANCE_PERCENT: u64 = 10;
/// Counts of one build are not those of another.
const PROFILE: &str = if cfg!(debug_assertions) { "test" } else { "release" };
/// Nor are those of one kind of processor.
const MACHINE: &str = std::env::consts::ARCH;

/// What was counted once, by profile and machine.
#[derive(Default, Serialize, Deserialize)]
struct Kept(BTreeMap<String, Counts>);

#[derive(Default, Serialize, Deserialize)]
struct Counts {
    toolchain: String,
    instructions: BTreeMap<String, u64>,
}

fn kept_file() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/bench/instructions.toml")
}

/// What is counted. Its name is what valgrind looks for.
#[inline(never)]
fn counted_by_the_guard(work: &mut dyn FnMut(), times: u32) {
    for _ in 0..times {
        work();
    }
    std::hint::black_box(times);
}

fn do_work(args: &[String]) {
    let work = work::ALL.iter().find(|w| w.name == args[0]).expect("a piece of work");
    let mut ready = (work.prepare)();
    counted_by_the_guard(&mut ready, args.get(1).map_or(1, |n| n.parse().expect("a number")));
}

/// The instructions of one piece of work, so many times.
fn count(name: &str, times: u32) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "--toggle-collect=*counted_by_the_guard*"])
        .arg(format!("--callgrind-out-file={}", dir.path().join("out").display()))
        .arg(std::env::current_exe().unwrap())
        .args([WORK, name, &times.to_string()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} failed under valgrind:\n{said}");
    let line = said.lines().find_map(|l| l.split_once("Collected :")).map(|(_, n)| n.trim());
    let counted = line.and_then(|n| n.parse().ok()).unwrap_or_default();
    assert!(counted > 100_000, "{name}: nothing was counted:\n{said}");
    counted
}

/// How a count compares with the one that was kept.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Same,
    Worse,
    Better,
    New,
}

fn judge(counted: u64, kept: Option<u64>) -> Verdict {
    match kept {
        None => Verdict::New,
        Some(kept) if counted * 100 > kept * (100 + TOLERANCE_PERCENT) => Verdict::Worse,
        Some(kept) if counted * 100 < kept * (100 - TOLERANCE_PERCENT) => Verdict::Better,
        Some(_) => Verdict::Same,
    }
}

/// A guard that cannot bite is none: twice the work has to be found worse than once.
fn bites(once: u64) -> bool {
    judge(count(work::ALL[0].name, 2), Some(once)) == Verdict::Worse
        && judge(once + once / 9, Some(once)) == Verdict::Worse
        && judge(once + once / 20, Some(once)) == Verdict::Same
}

fn first_line(program: &str, argument: &str) -> Option<String> {
    let output = Command::new(program).arg(argument).output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == WORK) {
        do_work(&args[1..]);
        return ExitCode::SUCCESS;
    }
    let Some(valgrind) = first_line("valgrind", "--version") else {
        eprintln!(
            "\n##### SKIPPED: instructions were not counted: there is no valgrind here; install it #####\n"
        );
        // Where everything has to be checked its absence is a fault.
        return if std::env::var_os("CI").is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    };
    let compiler = first_line("rustc", "--version").unwrap_or_default();
    let toolchain = format!("{compiler}; {valgrind}");
    let rewrite = args.iter().any(|a| a == "--rewrite");
    let wanted: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
    let text = std::fs::read_to_string(kept_file()).unwrap_or_default();
    let mut kept: Kept = toml::from_str(&text).expect("tests/bench/instructions.toml");
    let counts = kept.0.entry(format!("{PROFILE}-{MACHINE}")).or_default();
    if counts.instructions.is_empty() && !rewrite {
        eprintln!("\n##### SKIPPED: no counts are kept for {PROFILE} builds on {MACHINE} #####\n");
        return ExitCode::SUCCESS;
    }
    println!("instructions of the {PROFILE} build on {MACHINE}, {toolchain}; kept: {}", counts.toolchain);
    let mut worse = Vec::new();
    for work in &work::ALL {
        if !wanted.is_empty() && !wanted.iter().any(|w| work.name.contains(w.as_str())) {
            continue;
        }
        let counted = count(work.name, 1);
        let before = counts.instructions.get(work.name).copied();
        let verdict = judge(counted, before);
        let ratio = before.map_or(1.0, |b| counted as f64 / b as f64);
        println!(
            "{:<20} {:>8} a row {ratio:>6.3} of what was kept  {verdict:?}",
            work.name,
            counted / work.rows as u64
        );
        if verdict == Verdict::Worse {
            worse.push(work.name);
        }
        if work.name == work::ALL[0].name && !bites(counted) {
            eprintln!("the guard does not notice twice the work");
            return ExitCode::FAILURE;
        }
        if rewrite {
            counts.instructions.insert(work.name.to_owned(), counted);
        }
    }
    if rewrite {
        counts.toolchain = toolchain;
        write_kept(&kept);
        return ExitCode::SUCCESS;
    }
    if !worse.is_empty() {
        eprintln!(
            "more than {TOLERANCE_PERCENT}% slower than what is kept: {}. Kept with {}, counted with {toolchain}. If it has \
             to be, or if it is the compiler's doing, keep the new counts: {}",
            worse.join(", "),
            counts.toolchain,
            rewrite_command()
        );
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn rewrite_command() -> String {
    let release = if PROFILE == "release" { " --release" } else { "" };
    format!("cargo test{release} --test guard -- --rewrite")
}

fn write_kept(kept: &Kept) {
    let head = "# What fixed work costs in instructions (tests/guard), by build and machine. Written by\n\
                # 'cargo test [--release] --test guard -- --rewrite'; worse by more than a tenth fails the tests.\n\n";
    std::fs::write(kept_file(), head.to_owned() + &toml::to_string(kept).unwrap()).unwrap();
    println!("kept in {}", kept_file().display());
}
