//! `litemesh conflicts`: the writes that lost and were kept. Invariant: `list` and `show` only read; `restore` writes as
//! any program would, so that litemesh takes it for one of the application's writes, whether a node runs or not.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use rusqlite::Connection;
use serde_json::{Map, Value as Json, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::args::{ConflictsListArgs, ConflictsRestoreArgs, ConflictsShowArgs};
use crate::core::conflict::Kind;
use crate::core::sqltext::{ident, list as comma};
use crate::core::value::Value;
use crate::core::version::Version;
use crate::replica::clock::wall_clock_ms;
use crate::replica::entry::{hex, to_json, version_text};
use crate::replica::restore::{Outcome, restore as bring_back};
use crate::replica::review::{Conflict, conflicts, node_of};
use crate::replica::{ReplicaError, adopt};
use crate::sqlite::{self, introspect};

/// How much of an id is shown: enough to tell thousands apart.
const ID_SHOWN: usize = 12;
/// How much of the lost values is shown in a line.
const LINE: usize = 160;

fn kept(conn: &Connection) -> Result<Vec<Conflict>, ReplicaError> {
    if adopt::is_adopted(conn)? { conflicts(conn) } else { Ok(Vec::new()) }
}

/// `litemesh conflicts list`.
pub fn list(args: &ConflictsListArgs) -> Result<ExitCode> {
    let conn = sqlite::open_read_only(&args.database)?;
    let mut found = kept(&conn).with_context(|| args.database.display().to_string())?;
    let all = found.len();
    found.retain(|c| {
        (args.all || c.is_open())
            && args.table.as_ref().is_none_or(|t| t.eq_ignore_ascii_case(&c.table))
            && args.key.as_ref().is_none_or(|k| *k == c.key_text || *k == shown_key(c))
    });
    let now_ms = wall_clock_ms();
    let mut out = io::stdout().lock();
    if args.json {
        let each = found.iter().map(|c| summary(&conn, c, now_ms)).collect::<Result<Vec<_>>>()?;
        writeln!(out, "{}", serde_json::to_string_pretty(&each)?)?;
    } else if found.is_empty() {
        let file = args.database.display();
        match (all, args.table.is_some() || args.key.is_some()) {
            (0, _) => writeln!(out, "no conflicts are kept in {file}")?,
            (_, true) => writeln!(out, "no conflict in {file} is of that table and key")?,
            (n, false) => writeln!(out, "{n} conflicts are kept in {file}, all restored: --all shows them")?,
        }
    }
    for c in found.iter().filter(|_| !args.json) {
        let children = match c.children.iter().filter(|c| !c.restored).count() {
            0 => String::new(),
            1 => ", 1 child".to_owned(),
            n => format!(", {n} children"),
        };
        let restored = if c.is_open() { "" } else { " (restored)" };
        writeln!(
            out,
            "{} {} {} {} key {}: lost {}{children}{restored}",
            &hex(&c.id)[..ID_SHOWN],
            age(now_ms, c.at_ms),
            c.kind.word(),
            clean(&c.table),
            clean(&shown_key(c)),
            cut(&clean(&lost(c).to_string()))
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The values that were lost.
fn lost(c: &Conflict) -> Json {
    let lost = c.columns.iter().filter(|(_, k)| k.lost);
    Json::Object(lost.map(|(name, k)| (name.clone(), to_json(k.value.as_ref()))).collect())
}

fn shown_key(c: &Conflict) -> String {
    shown(&c.key)
}

/// A key as one would type it: the value itself, or the JSON array of several.
fn shown(key: &[Value]) -> String {
    match key {
        [Value::Text(text)] => String::from_utf8_lossy(text).into_owned(),
        [one] => to_json(one.as_ref()).to_string(),
        several => Json::Array(several.iter().map(|v| to_json(v.as_ref())).collect()).to_string(),
    }
}

fn summary(conn: &Connection, c: &Conflict, now_ms: u64) -> Result<Json> {
    let (winner, loser) = (written(conn, c.winner)?, written(conn, c.loser)?);
    let children = c.children.iter().map(|child| {
        json!({
            "table": child.table, "key": keys(&child.key), "column": child.column, "restored": child.restored,
        })
    });
    Ok(json!({
        "id": hex(&c.id),
        "table": c.table,
        "key": keys(&c.key),
        "kind": c.kind.word(),
        "lost": lost(c),
        "kept": c.columns.iter().map(|(n, k)| (n.clone(), to_json(k.value.as_ref()))).collect::<Map<_, _>>(),
        "winner_version": version_text(c.winner),
        "loser_version": version_text(c.loser),
        "winner_node": winner.0,
        "loser_node": loser.0,
        "at_ms": c.at_ms,
        "age_s": (i64::try_from(now_ms)? - c.at_ms).max(0) / 1_000,
        "children": children.collect::<Vec<_>>(),
        "restored": c.restored.as_ref().map(|(key, at)| json!({ "key": keys(key), "at_ms": at })),
        "open": c.is_open(),
    }))
}

fn keys(key: &[Value]) -> Vec<Json> {
    key.iter().map(|v| to_json(v.as_ref())).collect()
}

/// Where and when a version was written: the node's name, or its site's number, and a date.
fn written(conn: &Connection, version: Version) -> Result<(String, String)> {
    let node = match node_of(conn, version.site)? {
        Some(name) => name,
        None => format!("site {}", version.site),
    };
    Ok((node, date(i64::try_from(version.hlc.ms())?)))
}

fn date(ms: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).ok();
    at.and_then(|t| t.format(&Rfc3339).ok()).unwrap_or_else(|| format!("{ms} ms since 1970"))
}

/// How long ago something was, in the largest unit that is filled.
fn age(now_ms: u64, at_ms: i64) -> String {
    let s = (now_ms as i64).saturating_sub(at_ms).max(0) / 1_000;
    match s {
        0..60 => format!("{s}s"),
        60..3_600 => format!("{}m", s / 60),
        3_600..86_400 => format!("{}h", s / 3_600),
        _ => format!("{}d", s / 86_400),
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(LINE) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// The text without control characters: it comes from the file.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The conflict whose id begins so.
fn find(conn: &Connection, database: &Path, prefix: &str) -> Result<Conflict> {
    let file = database.display();
    let wanted = prefix.to_lowercase();
    let mut found: Vec<Conflict> =
        kept(conn)?.into_iter().filter(|c| hex(&c.id).starts_with(&wanted)).collect();
    match (found.len(), prefix.is_empty()) {
        (1, false) => Ok(found.remove(0)),
        (0, _) => bail!(
            "{file}: no conflict that is kept has an id that begins with {prefix:?}; 'litemesh conflicts list --all {file}' shows them"
        ),
        (n, _) => bail!("{file}: {n} conflicts have an id that begins with {prefix:?}: give more of it"),
    }
}

/// `litemesh conflicts show`.
pub fn show(args: &ConflictsShowArgs) -> Result<ExitCode> {
    let conn = sqlite::open_read_only(&args.database)?;
    let c = find(&conn, &args.database, &args.id)?;
    let now_ms = wall_clock_ms();
    let now = current_row(&conn, &c)?;
    let mut out = io::stdout().lock();
    if args.json {
        let mut all = summary(&conn, &c, now_ms)?;
        all["row_now"] = now.map_or(Json::Null, |row| Json::Object(row.into_iter().collect()));
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (winner, loser) = (written(&conn, c.winner)?, written(&conn, c.loser)?);
    writeln!(out, "conflict {}: {}", hex(&c.id), meaning(&c))?;
    writeln!(out, "  table  {}", clean(&c.table))?;
    writeln!(out, "  key    {}", clean(&shown_key(&c)))?;
    writeln!(out, "  lost   by node {}, {} ({} ago)", loser.0, loser.1, age(now_ms, c.at_ms))?;
    match nobody(&c) {
        Some(what) => writeln!(out, "  won    {what}")?,
        None => writeln!(out, "  won    by node {}, {}", winner.0, winner.1)?,
    }
    for (name, k) in &c.columns {
        let state = match (k.lost, k.restored) {
            (true, false) => "lost",
            (true, true) => "lost, restored",
            (false, _) => "kept with it",
        };
        writeln!(out, "  {state}: {} = {}", clean(name), clean(&to_json(k.value.as_ref()).to_string()))?;
    }
    match now {
        Some(row) => {
            let text = Json::Object(row.into_iter().collect()).to_string();
            writeln!(out, "  the row with this key now: {}", clean(&text))?;
        }
        None => writeln!(out, "  there is no row with this key now")?,
    }
    for child in &c.children {
        let (table, key) = (clean(&child.table), clean(&shown(&child.key)));
        let state = if child.restored { ", restored" } else { "" };
        writeln!(out, "  child: {table} key {key} by {}{state}", clean(&child.column))?;
    }
    if let Some((key, at_ms)) = &c.restored {
        writeln!(out, "  restored under the key {}, {}", clean(&shown(key)), date(*at_ms))?;
    }
    if c.is_open() {
        let (file, id) = (args.database.display(), &hex(&c.id)[..ID_SHOWN]);
        let new_id = if c.is_collision() { " --new-id" } else { "" };
        writeln!(out, "to bring it back: litemesh conflicts restore {file} {id}{new_id}")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What won if no node is known for it.
fn nobody(c: &Conflict) -> Option<&'static str> {
    if c.winner.site != Version::ZERO.site {
        return None;
    }
    Some(match c.kind {
        Kind::Delete => {
            "a delete that all nodes had applied and that is forgotten: by which node is not known any more"
        }
        _ => "a row that was there before the databases were one: no node's write",
    })
}

fn meaning(c: &Conflict) -> &'static str {
    match (c.kind, c.whole_row) {
        (Kind::Row, _) => "two rows were inserted under one key, and the later one stayed",
        (Kind::Delete, _) => "the row was deleted or replaced while columns of it were written",
        (Kind::Column, _) => "the same columns were written twice, and the later write stayed",
        (Kind::Unique, true) => "a row had to go because another has the same unique value",
        (Kind::Unique, false) => "a unique value had to go because another row has it",
    }
}

/// What is in the table under the key now; `None` if nothing is.
fn current_row(conn: &Connection, c: &Conflict) -> Result<Option<BTreeMap<String, Json>>> {
    let schema = introspect::read(conn)?;
    let Some(table) = schema.tables.iter().find(|t| t.name.eq_ignore_ascii_case(&c.table)) else {
        return Ok(None);
    };
    if table.key.len() != c.key.len() {
        return Ok(None);
    }
    let names: Vec<&str> = table.columns.iter().map(|c| c.name.as_str()).collect();
    let condition = table.key.iter().enumerate().map(|(i, k)| format!("{} = ?{}", k.sql, i + 1));
    let sql = format!(
        "SELECT {} FROM {} WHERE {}",
        if names.is_empty() { "1".to_owned() } else { comma(&names, |n| ident(n)) },
        ident(&table.name),
        condition.collect::<Vec<_>>().join(" AND ")
    );
    let mut statement = conn.prepare(&sql)?;
    let mut rows = statement.query(rusqlite::params_from_iter(&c.key))?;
    let Some(row) = rows.next()? else { return Ok(None) };
    let value = |i| Ok::<_, rusqlite::Error>(to_json(sqlite::value::get(row, i)?));
    let each = names.iter().enumerate().map(|(i, name)| Ok(((*name).to_owned(), value(i)?)));
    Ok(Some(each.collect::<Result<_, rusqlite::Error>>()?))
}

/// `litemesh conflicts restore`.
pub fn restore(args: &ConflictsRestoreArgs) -> Result<ExitCode> {
    let conn = sqlite::open_application(&args.database)?;
    let c = find(&conn, &args.database, &args.id)?;
    let outcome = bring_back(&conn, c.id, args.new_id, wall_clock_ms());
    let outcome = outcome.with_context(|| {
        format!("{}: conflict {} was not restored, nothing was changed", args.database.display(), args.id)
    })?;
    println!("{}", done(&outcome, c.is_collision() && !args.new_id));
    Ok(ExitCode::SUCCESS)
}

fn done(outcome: &Outcome, over_winner: bool) -> String {
    let Outcome { table, key, inserted, columns, moved, left } = outcome;
    let key = clean(&shown(key));
    let mut text = match (inserted, columns) {
        (true, _) => format!("restored: {} has the row again, under the key {key}", clean(table)),
        (false, 0) => format!("restored: nothing was to be written to {} key {key}", clean(table)),
        (false, n) => format!("restored: {n} columns of {} key {key} are written", clean(table)),
    };
    if !inserted && over_winner {
        text += "; the row that had won is overwritten";
    }
    match moved {
        0 => {}
        1 => text += "; 1 child refers to it",
        n => text += &format!("; {n} children refer to it"),
    }
    match left {
        0 => {}
        1 => text += "; 1 child refers to something else since, or is gone",
        n => text += &format!("; {n} children refer to something else since, or are gone"),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_in_the_largest_unit() {
        let at = |s: i64| age(10_000_000_000, 10_000_000_000 - s * 1_000);
        assert_eq!([at(0), at(59), at(60), at(7_200), at(3 * 86_400)], ["0s", "59s", "1m", "2h", "3d"]);
        assert_eq!(age(0, 5_000), "0s", "a clock that is ahead is not a negative age");
    }

    #[test]
    fn long_values_are_cut_at_a_character() {
        assert_eq!(cut(&"ä".repeat(LINE)), "ä".repeat(LINE));
        assert_eq!(cut(&"ä".repeat(LINE + 1)), format!("{}…", "ä".repeat(LINE)));
    }
}
