//! What was measured, as a table and as JSON. Invariant: a figure is shown with its spread, with its baseline of the
//! same run where it has one, and with what was asked of it, reached or not.

use std::path::Path;

use serde_json::{Value, json};

/// What is asked of a figure.
#[derive(Debug, Clone, Copy)]
pub enum Asked {
    AtLeast(f64),
    AtMost(f64),
    /// Nothing: it is there for comparison.
    Nothing,
}

impl Asked {
    fn told(self) -> String {
        match self {
            Self::AtLeast(n) => format!(">= {n}"),
            Self::AtMost(n) => format!("<= {n}"),
            Self::Nothing => String::new(),
        }
    }

    fn is_reached(self, value: f64) -> Option<bool> {
        match self {
            Self::AtLeast(n) => Some(value >= n),
            Self::AtMost(n) => Some(value <= n),
            Self::Nothing => None,
        }
    }
}

/// One figure: what is asked goes for the median of its values.
pub struct Figure {
    what: String,
    unit: &'static str,
    values: Vec<f64>,
    baseline: Option<(&'static str, f64)>,
    asked: Asked,
}

/// All figures of a run. Each is printed when it is known, and all of them at the end.
#[derive(Default)]
pub struct Report(Vec<Figure>);

impl Report {
    /// Notes a figure that stands for itself.
    pub fn note(&mut self, what: &str, unit: &'static str, values: Vec<f64>, asked: Asked) {
        self.add(Figure { what: what.to_owned(), unit, values, baseline: None, asked });
    }

    /// Notes a figure that is a part of something: `whole` says of what, and how much that was.
    pub fn note_ratio(&mut self, what: &str, values: Vec<f64>, whole: (&'static str, f64), asked: Asked) {
        self.add(Figure { what: what.to_owned(), unit: "x", values, baseline: Some(whole), asked });
    }

    fn add(&mut self, figure: Figure) {
        println!("{}", figure.line());
        self.0.push(figure);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All figures, one a line.
    pub fn table(&self) -> String {
        let head = format!(
            "{:<62} {:>10} {:<7} {:>21} {:>9} {}",
            "figure", "median", "", "least .. most", "asked", "baseline"
        );
        let lines = self.0.iter().map(Figure::line);
        std::iter::once(head).chain(lines).collect::<Vec<_>>().join("\n")
    }

    /// The same with machine, date and commit.
    pub fn json(&self) -> Value {
        json!({
            "date": date(),
            "commit": said("git", &["rev-parse", "HEAD"]),
            "changed": !said("git", &["status", "--porcelain", "--", "src", "tests/bench", "vendor"]).is_empty(),
            "machine": machine(),
            "figures": self.0.iter().map(Figure::json).collect::<Vec<_>>(),
        })
    }

    pub fn write_json(&self, path: &Path) {
        let text = serde_json::to_string_pretty(&self.json()).unwrap() + "\n";
        std::fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

impl Figure {
    fn median(&self) -> f64 {
        median(&self.values)
    }

    fn line(&self) -> String {
        let (least, most) = (at(&self.values, 0.0), at(&self.values, 100.0));
        let spread = match self.values.len() {
            0 | 1 => String::new(),
            _ => format!("{} .. {}", short(least), short(most)),
        };
        let verdict = match self.asked.is_reached(self.median()) {
            Some(false) => " MISSED",
            _ => "",
        };
        let baseline = self.baseline.map(|(what, n)| format!("of {what}: {}", short(n))).unwrap_or_default();
        let line = format!(
            "{:<62} {:>10} {:<7} {:>21} {:>9} {baseline}{verdict}",
            self.what,
            short(self.median()),
            self.unit,
            spread,
            self.asked.told()
        );
        line.trim_end().to_owned()
    }

    fn json(&self) -> Value {
        let baseline = self.baseline.map(|(what, value)| json!({ "what": what, "value": round(value) }));
        json!({
            "what": self.what,
            "unit": self.unit,
            "median": round(self.median()),
            "values": self.values.iter().map(|v| round(*v)).collect::<Vec<_>>(),
            "baseline": baseline,
            "asked": self.asked.told(),
            "reached": self.asked.is_reached(self.median()),
        })
    }
}

/// What so many of a hundred are at most.
pub fn at(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * percent / 100.0).round() as usize).copied().unwrap_or(f64::NAN)
}

pub fn median(values: &[f64]) -> f64 {
    at(values, 50.0)
}

fn round(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}

fn short(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn said(program: &str, args: &[&str]) -> String {
    let output =
        std::process::Command::new(program).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
}

fn date() -> String {
    let now = time::OffsetDateTime::now_utc();
    now.format(&time::format_description::well_known::Rfc3339).unwrap()
}

/// The value after a name in a file of `/proc`.
fn proc_value(file: &str, name: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_default();
    line.split_once(':').map_or("", |(_, v)| v.trim()).to_owned()
}

fn machine() -> Value {
    let memory_kib =
        proc_value("/proc/meminfo", "MemTotal").split(' ').next().and_then(|n| n.parse::<u64>().ok());
    json!({
        "processor": proc_value("/proc/cpuinfo", "model name"),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory_mib": memory_kib.unwrap_or_default() / 1024,
        "system": said("uname", &["-srm"]),
        "compiler": said("rustc", &["--version"]),
        "sqlite": rusqlite::version(),
        // What else went on: figures by the clock of a loaded machine are worse than it is.
        "load_average": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
    })
}
