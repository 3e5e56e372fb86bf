//! The figures of this release, each against its baseline in the same run: `cargo bench --bench figures` measures every
//! row of the table, names of measurements as arguments only those (see [`MEASUREMENTS`]). `--json FILE` writes them with
//! machine, date and commit. `sweep` shows how cost grows; `--ten-million` lets it go on that far.

mod capture;
mod catchup;
mod cdc;
mod join;
mod lag;
mod load;
mod report;
mod scale;
mod still;
#[path = "../support/mod.rs"]
mod support;
mod verify;
mod writer;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use report::Report;
use rusqlite::Connection;

const SCHEMA: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, a TEXT, b INTEGER, c REAL)";
const INSERT: &str = "INSERT INTO t VALUES(?1, ?2, ?3, ?4)";
const UPDATE: &str = "UPDATE t SET a = ?2 || 'x', b = ?3 + 1, c = ?4 WHERE id = ?1";
const TEXT: &str = "one hundred and twenty bytes a row, with everything that stands around it, is what this text is for, more or less";

/// Measures, prints and reports.
type Measure = fn(&mut Report);

/// What can be measured, by name: the rows of the table, then what is measured only when it is named.
const MEASUREMENTS: [(&str, bool, Measure); 20] = [
    ("capture", true, capture::stopped),
    ("bulk", true, load::bulk),
    ("million", true, load::million),
    ("single", true, lag::single),
    ("lag", true, lag::alone),
    ("lag-beside-bulk", true, lag::beside_bulk),
    ("two-writers", true, load::two_writers),
    ("first-sync", true, still::first_sync),
    ("idle", true, still::idle),
    ("start", true, still::start),
    ("verify", true, verify::verify),
    ("cdc", false, |_| cdc::unheard()),
    ("join", false, join::join),
    ("catchup", false, |_| catchup::catchup()),
    ("scale", false, scale::scale),
    ("sweep-rows", false, |r| load::sweep_rows(r, std::env::args().any(|a| a == "--ten-million"))),
    ("sweep-row-size", false, load::sweep_row_size),
    ("sweep-nodes", false, load::sweep_nodes),
    ("sweep-databases", false, load::sweep_databases),
    ("sweep-conflicts", false, load::sweep_conflicts),
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == capture::WRITER) {
        return capture::write_block(&args[1..]);
    }
    let json = args.iter().position(|a| a == "--json").map(|at| at + 1);
    let file = json.map(|at| PathBuf::from(args.get(at).expect("--json FILE")));
    let names = args.iter().enumerate().filter(|(at, a)| Some(*at) != json && !a.starts_with('-'));
    let wanted: Vec<&str> = names.map(|(_, a)| a.as_str()).collect();
    let is_named = |name: &str| wanted.iter().any(|w| name == *w || name.starts_with(&format!("{w}-")));
    for name in &wanted {
        let known = MEASUREMENTS.iter().any(|(n, ..)| n == name || n.starts_with(&format!("{name}-")));
        let all = MEASUREMENTS.map(|(n, ..)| n).join(", ");
        assert!(known, "there is no measurement {name}; there are {all}");
    }
    let mut report = Report::default();
    for (name, of_table, measure) in MEASUREMENTS {
        if is_named(name) || wanted.is_empty() && of_table {
            measure(&mut report);
        }
    }
    if !report.is_empty() {
        println!("\n{}", report.table());
    }
    if let Some(file) = file {
        report.write_json(&file);
    }
}

fn open(path: &Path) -> Connection {
    let conn = Connection::open(path).unwrap();
    conn.busy_timeout(Duration::from_secs(60)).unwrap();
    conn.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL").unwrap();
    conn
}

fn transactions(conn: &mut Connection, first: i64, count: i64, size: i64, sql: &str) -> f64 {
    let started = Instant::now();
    for t in 0..count {
        let tx = conn.transaction().unwrap();
        let mut statement = tx.prepare_cached(sql).unwrap();
        for i in 0..size {
            let id = first + t * size + i;
            statement.execute((id, TEXT, id * 7, id as f64 / 3.0)).unwrap();
        }
        drop(statement);
        tx.commit().unwrap();
    }
    (count * size) as f64 / started.elapsed().as_secs_f64()
}

/// The processor time this process has used.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn status_mib(pid: u32, name: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_default();
    let kib = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok());
    kib.unwrap_or_default() / 1024.0
}

/// The most memory that a process has had.
fn peak_mib(pid: u32) -> f64 {
    status_mib(pid, "VmHWM:")
}

fn resident_mib(pid: u32) -> u64 {
    peak_mib(pid) as u64
}

/// The processor time that a process has used, in seconds.
fn processor_s(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit_once(')').unwrap().1;
    let ticks = after_name.split_whitespace().skip(11).take(2).map(|t| t.parse::<f64>().unwrap());
    // The unit of /proc is a hundredth of a second on every Linux.
    ticks.sum::<f64>() / 100.0
}
