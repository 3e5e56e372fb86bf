//! What capture costs an application.

use std::path::Path;
use std::time::Instant;

use super::report::{Asked, Report, median};
use super::support::Node;
use super::{INSERT, SCHEMA, UPDATE, cpu_time, open, transactions};

/// The argument that makes this program a writer of these figures.
pub const WRITER: &str = "--writer";
const TURNS: i64 = 9;

/// The node is stopped, the triggers are there. Processes take turns, each with one file, as applications are:
/// connections of one process share a page cache, which would hide a part of the cost.
pub fn stopped(report: &mut Report) {
    let dir = tempfile::tempdir().unwrap();
    let bare = dir.path().join("bare.db");
    open(&bare).execute_batch(SCHEMA).unwrap();
    let mut node = Node::new(dir.path(), "n", &["app.db"]);
    node.exec("app.db", SCHEMA);
    node.start(None).stop();
    let captured = node.file("app.db");
    for (name, count, size, asked) in [
        ("insert bulk", 60, 1_000, 0.60),
        ("insert single", 2_000, 1, 0.60),
        ("update bulk", 60, 1_000, 0.45),
        ("update single", 2_000, 1, 0.60),
    ] {
        let (mut wall, mut cpu, mut rates) = (Vec::new(), Vec::new(), Vec::new());
        let apart = if name.contains("single") { 10_000_000 } else { 0 };
        for turn in 0..TURNS {
            let first = apart + turn * count * size;
            let timed = |path: &Path| writer_process(path, name, first, count, size);
            let (base, with) = if turn % 2 == 0 {
                let base = timed(&bare);
                (base, timed(&captured))
            } else {
                let with = timed(&captured);
                (timed(&bare), with)
            };
            wall.push(base.0 / with.0);
            cpu.push(base.1 / with.1);
            rates.push((count * size) as f64 / base.0);
        }
        let bare = ("bare SQLite's writes/s", median(&rates));
        report.note_ratio(&format!("capture, {name}"), wall, bare, Asked::AtLeast(asked));
        report.note_ratio(&format!("capture, {name}, by processor time"), cpu, bare, Asked::Nothing);
    }
    let logged: i64 =
        open(&captured).query_row("SELECT count(*) FROM __litemesh_log", [], |r| r.get(0)).unwrap();
    assert_eq!(logged, 2 * TURNS * (60 * 1_000 + 2_000), "every write was captured");
}

/// Runs [`write_block`] in a process of its own; returns seconds by the clock and of processor time.
fn writer_process(path: &Path, kind: &str, first: i64, count: i64, size: i64) -> (f64, f64) {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.arg(WRITER).arg(path).arg(kind).args([first, count, size].map(|n| n.to_string()));
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (wall, cpu) = text.trim().split_once(' ').expect("two times");
    (wall.parse().unwrap(), cpu.parse().unwrap())
}

/// What the process of [`writer_process`] does.
pub fn write_block(args: &[String]) {
    let number = |i: usize| args[i].parse::<i64>().unwrap();
    let mut conn = open(Path::new(&args[0]));
    let sql = if args[1].starts_with("insert") { INSERT } else { UPDATE };
    let (started, before) = (Instant::now(), cpu_time());
    transactions(&mut conn, number(2), number(3), number(4), sql);
    println!("{} {}", started.elapsed().as_secs_f64(), (cpu_time() - before).as_secs_f64());
}
