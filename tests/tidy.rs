//! Rules of the house that the compiler does not know, checked over the sources. Invariant: a rule is never loosened
//! to fit the code; each scanning function is shown to find what it looks for.

#[path = "tidy/scan.rs"]
mod scan;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use scan::{
    climbing_paths, code_of, crate_paths, depth_of, functions, ignored, line_of, may_import, without_tests,
    words,
};

const MAX_FUNCTION_LINES: usize = 70;
const MAX_FILE_LINES: usize = 600;
/// Who may import what of ours, by top-level module. A row without a list may import everything.
const IMPORTS: [(&str, Option<&[&str]>); 11] = [
    ("core", Some(&[])),
    ("sqlite", Some(&["core"])),
    ("fabric", Some(&["core"])),
    ("status", Some(&["core"])),
    ("config", Some(&["core"])),
    ("replica", Some(&["core", "sqlite", "fabric::link", "fabric::memory"])),
    ("role", Some(&["core", "sqlite", "fabric::link", "fabric::memory"])),
    ("daemon", None),
    ("cli", None),
    ("lib", None),
    ("main", None),
];
/// Names that a top-level module must not mention.
const FOREIGN: [(&str, &[&str]); 7] = [
    (
        "core",
        &[
            "rusqlite",
            "tokio",
            "async_nats",
            "nats_launcher",
            "rand",
            "SystemTime",
            "Instant",
            "std::fs",
            "std::net",
        ],
    ),
    ("sqlite", &["async_nats", "nats_launcher"]),
    ("fabric", &["rusqlite"]),
    ("status", &["rusqlite", "async_nats", "nats_launcher"]),
    ("config", &["rusqlite", "async_nats", "nats_launcher"]),
    ("replica", &["async_nats", "nats_launcher"]),
    ("role", &["async_nats", "nats_launcher"]),
];
/// The files that may contain unsafe code. Each entry needs a reason beside it.
const UNSAFE_FILES: [&str; 2] = [
    // `madvise` has no safe form: the pages of the packed server need not stay in memory.
    "vendor/nats-launcher/src/resident.rs",
    // `pre_exec` has no safe form: the server must die with its parent.
    "vendor/nats-launcher/src/spawn.rs",
];
const BANNED_NAMES: [&str; 5] = ["util", "utils", "common", "helpers", "manager"];

/// A file of the repository.
struct Source {
    /// Relative to the repository, with slashes.
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether it is a part of a program, not of its tests.
    fn is_program(&self) -> bool {
        let is_test = self.path.ends_with("tests.rs");
        let in_src = self.path.starts_with("src/") || self.path.starts_with("vendor/");
        self.is_rust() && in_src && !self.path.contains("/tests/") && !is_test
    }

    /// The top-level module of litemesh that it is in.
    fn module(&self) -> Option<&str> {
        let first = self.path.strip_prefix("src/")?.split('/').next()?;
        Some(first.strip_suffix(".rs").unwrap_or(first))
    }
}

/// Every text file that git tracks or would; without git, those in the usual places.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = ["ls-files", "--cached", "--others", "--exclude-standard", "-z"];
    let paths: Vec<PathBuf> = match Command::new("git").args(list).current_dir(root).output() {
        Ok(out) if out.status.success() => String::from_utf8_lossy(&out.stdout)
            .split('\0')
            .filter(|p| !p.is_empty())
            .map(PathBuf::from)
            .collect(),
        _ => ["src", "tests", "vendor"].iter().flat_map(|d| walk(root, Path::new(d))).collect(),
    };
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(root.join(&path)).ok()?;
        Some(Source { path: path.to_string_lossy().replace('\\', "/"), text })
    };
    let found: Vec<Source> = paths.into_iter().filter_map(read).collect();
    assert!(found.iter().any(|s| s.path == "src/lib.rs"), "the sources were not found");
    found
}

fn walk(root: &Path, dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root.join(dir)).into_iter().flatten().flatten();
    let each = |e: std::fs::DirEntry| {
        let path = dir.join(e.file_name());
        if e.path().is_dir() { walk(root, &path) } else { vec![path] }
    };
    entries.flat_map(each).collect()
}

/// Fails with all violations at once.
fn expect_none(rule: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{rule}:\n  {}", found.join("\n  "));
}

/// What `check` finds in every Rust file, given its code.
fn in_rust(check: impl Fn(&Source, &str) -> Vec<(usize, String)>) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources().iter().filter(|s| s.is_rust()) {
        let code = code_of(&source.text);
        found.extend(
            check(source, &code).into_iter().map(|(line, what)| format!("{}:{line}: {what}", source.path)),
        );
    }
    found
}

#[test]
fn modules_import_only_what_the_table_allows() {
    let all = sources();
    let top: BTreeSet<&str> = all.iter().filter(|s| s.is_rust()).filter_map(Source::module).collect();
    let found = in_rust(|source, code| {
        let Some(own) = source.module() else { return Vec::new() };
        let Some((_, allowed)) = IMPORTS.iter().find(|(name, _)| *name == own) else {
            return vec![(1, format!("the module {own} has no row in the import table"))];
        };
        let Some(allowed) = allowed else { return Vec::new() };
        let mut paths = crate_paths(code);
        paths.extend(climbing_paths(code, depth_of(&source.path)));
        paths.retain(|(_, p)| top.contains(p.split("::").next().unwrap_or_default()));
        paths.retain(|(_, p)| !may_import(allowed, own, p));
        paths.into_iter().map(|(line, p)| (line, format!("{own} must not import {p}"))).collect()
    });
    expect_none("imports", found);
}

#[test]
fn modules_do_not_name_what_is_foreign_to_them() {
    let found = in_rust(|source, code| {
        let row = FOREIGN.iter().find(|(name, _)| source.module() == Some(name));
        // Tests may set the scene with anything.
        let code = without_tests(code);
        let names = row.map_or(&[][..], |(_, names)| names).iter();
        let hits = |name: &&'static str| {
            words(&code, name).map(|at| (line_of(&code, at), format!("names {name}"))).collect::<Vec<_>>()
        };
        if source.is_program() { names.flat_map(hits).collect() } else { Vec::new() }
    });
    expect_none("foreign names", found);
}

#[test]
fn the_launcher_knows_nothing_of_litemesh() {
    let all = sources();
    let launcher = all.iter().filter(|s| s.path.starts_with("vendor/nats-launcher/"));
    // The one variable by which a build is told not to fetch belongs to the whole workspace.
    let names = |s: &&Source| s.text.replace("LITEMESH_NO_FETCH", "").to_lowercase().contains("litemesh");
    expect_none("mentions litemesh", launcher.filter(names).map(|s| s.path.clone()).collect());
}

#[test]
fn functions_and_files_stay_short() {
    let found = in_rust(|source, code| {
        let lines = source.text.lines().count();
        let mut found = Vec::new();
        if lines > MAX_FILE_LINES {
            found.push((lines, format!("{lines} lines, at most {MAX_FILE_LINES}")));
        }
        if source.is_program() {
            let long =
                functions(&without_tests(code)).into_iter().filter(|(_, _, n)| *n > MAX_FUNCTION_LINES);
            found.extend(long.map(|(line, name, n)| (line, format!("fn {name} has {n} lines"))));
        }
        found
    });
    expect_none("length", found);
}

#[test]
fn nothing_is_left_unfinished() {
    let mark = ["FIX", "ME"].concat();
    let found = in_rust(|source, code| {
        let macros = ["todo", "unimplemented", "dbg"];
        let called = |m: &'static str| {
            let hits = words(code, m).filter(move |at| code[at + m.len()..].trim_start().starts_with('!'));
            hits.map(move |at| (line_of(code, at), format!("{m}!"))).collect::<Vec<_>>()
        };
        let marks = source.text.match_indices(&mark).map(|(at, _)| (line_of(&source.text, at), mark.clone()));
        macros.into_iter().flat_map(called).chain(marks).chain(ignored(code)).collect()
    });
    expect_none("unfinished", found);
}

#[test]
fn unsafe_code_is_only_where_it_is_listed() {
    let found = in_rust(|source, code| match UNSAFE_FILES.contains(&source.path.as_str()) {
        true => Vec::new(),
        false => words(code, "unsafe").map(|at| (line_of(code, at), "unsafe".to_owned())).collect(),
    });
    expect_none("unsafe", found);
}

#[test]
fn names_say_what_a_module_is_for() {
    let found = in_rust(|source, code| {
        let parts = source.path.trim_end_matches(".rs").split('/');
        let of_path = parts.filter(|p| BANNED_NAMES.contains(p)).map(|p| (1, format!("the name {p}")));
        let of_module = BANNED_NAMES.iter().flat_map(|name| {
            let after_mod = move |at: &usize| code[..*at].trim_end().ends_with("mod");
            words(code, name).filter(after_mod).map(move |at| (line_of(code, at), format!("mod {name}")))
        });
        of_path.chain(of_module).collect()
    });
    expect_none("names", found);
}

#[test]
fn every_source_begins_with_what_it_is_for() {
    let all = sources();
    let silent = all.iter().filter(|s| s.is_rust() && !s.text.starts_with("//! "));
    expect_none("no module documentation", silent.map(|s| s.path.clone()).collect());
}

#[test]
fn no_line_ends_in_space_or_names_a_home() {
    let homes = [["/ho", "me/"].concat(), ["/ro", "ot/"].concat(), ["/Us", "ers/"].concat()];
    let mut found = Vec::new();
    for source in sources() {
        for (i, line) in source.text.split('\n').enumerate() {
            let place = format!("{}:{}", source.path, i + 1);
            if line.ends_with([' ', '\t', '\r']) {
                found.push(format!("{place}: space at the end"));
            }
            found.extend(homes.iter().filter(|h| line.contains(*h)).map(|h| format!("{place}: names {h}")));
        }
    }
    expect_none("text", found);
}
