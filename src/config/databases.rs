//! Which SQLite files a command line or a file means. Invariant: no two of the result have one name, and no two are
//! one file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::valid::{DatabaseSpec, absolute};
use super::{ConfigError, Join};
use crate::core::names::DbName;

/// What every SQLite file that is not empty begins with.
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// Endings of files that SQLite keeps beside a database.
const COMPANIONS: [&str; 3] = ["-wal", "-shm", "-journal"];
/// Extensions by which an empty file still counts as a database: SQLite writes the header with the first table.
const EXTENSIONS: [&str; 4] = ["db", "db3", "sqlite", "sqlite3"];

/// Splits `NAME=PATH`; an equals sign after a slash belongs to the path.
pub fn split(text: &str) -> (Option<&str>, &str) {
    match text.split_once('=') {
        Some((name, path)) if !name.contains(['/', '\\']) => (Some(name), path),
        _ => (None, text),
    }
}

/// The databases meant by these texts, in the same order.
pub fn resolve(texts: &[String]) -> Result<Vec<DatabaseSpec>, ConfigError> {
    let mut found: Vec<DatabaseSpec> = Vec::new();
    let mut by_name: BTreeMap<DbName, PathBuf> = BTreeMap::new();
    let mut by_file: BTreeMap<PathBuf, String> = BTreeMap::new();
    for text in texts {
        for spec in one(text)? {
            let identity = identity(&spec.path);
            if let Some(first) = by_file.insert(identity, text.clone()) {
                return Err(ConfigError::SameFile { first, second: text.clone(), path: spec.path });
            }
            if let Some(first) = by_name.insert(spec.name.clone(), spec.path.clone()) {
                let name = spec.name.to_string();
                return Err(ConfigError::SameName { name, first, second: spec.path });
            }
            found.push(spec);
        }
    }
    Ok(found)
}

fn one(text: &str) -> Result<Vec<DatabaseSpec>, ConfigError> {
    let (name, path) = split(text);
    if path.is_empty() {
        return Err(ConfigError::value("databases", text, "a path is missing"));
    }
    if let Some(name) = name {
        let wrong = |source| ConfigError::DatabaseName { text: text.to_owned(), source };
        let name = name.parse().map_err(wrong)?;
        return Ok(vec![DatabaseSpec { name, path: absolute(Path::new(path)) }]);
    }
    // A file that exists is meant itself, whatever characters are in its name.
    if Path::new(path).exists() || !path.contains(['*', '?', '[']) {
        return Ok(vec![of_path(Path::new(path))?]);
    }
    let wrong = |e: glob::PatternError| ConfigError::value("databases", path, e.to_string());
    let matches = glob::glob(path).map_err(wrong)?.flatten().filter(|p| is_database(p));
    let specs: Vec<DatabaseSpec> = matches.map(|p| of_path(&p)).collect::<Result<_, _>>()?;
    match specs.is_empty() {
        true => Err(ConfigError::NoMatch(path.to_owned())),
        false => Ok(specs),
    }
}

fn of_path(path: &Path) -> Result<DatabaseSpec, ConfigError> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = stem.parse().map_err(|source| ConfigError::Stem { path: path.to_owned(), source })?;
    Ok(DatabaseSpec { name, path: absolute(path) })
}

/// What a path is compared by: the file behind links, or where it would be.
fn identity(path: &Path) -> PathBuf {
    let of_parent = || {
        let parent = path.parent()?.canonicalize().ok()?;
        Some(parent.join(path.file_name()?))
    };
    path.canonicalize().ok().or_else(of_parent).unwrap_or_else(|| path.to_owned())
}

fn is_database(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if COMPANIONS.iter().any(|c| name.ends_with(c)) || !path.is_file() {
        return false;
    }
    let Ok(mut file) = File::open(path) else { return false };
    let mut start = [0; MAGIC.len()];
    match file.read(&mut start) {
        Ok(0) => {
            let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
            EXTENSIONS.contains(&extension.as_str())
        }
        Ok(n) => n == MAGIC.len() && start == *MAGIC,
        Err(_) => false,
    }
}

/// The token, from wherever it is. Called only when the node belongs to no mesh yet: the file may be gone later.
pub(super) fn read_token(join: &Join) -> Result<String, ConfigError> {
    let path = match join {
        Join::Token(token) => return Ok(token.clone()),
        Join::File(path) => path,
    };
    let wrong = |reason: String| ConfigError::JoinFile { path: path.clone(), reason };
    let text = std::fs::read_to_string(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
    let token = text.trim();
    match token.is_empty() {
        true => Err(wrong("is empty: put in what `litemesh token` prints on another node".to_owned())),
        false => Ok(token.to_owned()),
    }
}
