//! `litemesh check`: reads a file's schema and tells what is fragile in it. Invariant: the file is opened for reading
//! only, and nothing in it changes.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use rusqlite::Connection;
use rusqlite::config::DbConfig;
use serde::Serialize;

use super::args::CheckArgs;
use crate::core::lint::{Facts, Finding, ForeignKey, Severity, TriggerFacts, TriggerWrites, lint};
use crate::core::schema::Table;
use crate::core::sqltext::{ident, list};
use crate::replica::adopt;
use crate::replica::review::conflicts;
use crate::sqlite::introspect::{self, AppTrigger, Schema, firing_statements, with_trigger_writes};
use crate::sqlite::{OpenError, open_read_only};

/// The width of a finding's text without its indentation.
const TEXT_WIDTH: usize = 76;

/// Why a file could not be checked. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The file cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its schema cannot be read.
    #[error(
        "{path}: its schema cannot be read: {source}; `PRAGMA integrity_check` tells whether it is damaged"
    )]
    Schema {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The result could not be written.
    #[error("the findings cannot be written: {0}")]
    Output(#[from] io::Error),
}

/// A table, as the report shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckedTable {
    /// Its name.
    pub name: String,
    /// The columns of its key; `_rowid_` if it has none.
    pub key: Vec<String>,
    /// Whether it is replicated.
    pub replicated: bool,
}

/// What was found in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The file.
    pub file: String,
    /// Its ordinary tables.
    pub tables: Vec<CheckedTable>,
    /// What is fragile.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether some table cannot be replicated.
    pub fn has_errors(&self) -> bool {
        self.findings.iter().any(|f| f.severity == Severity::Error)
    }
}

/// Runs the command: writes the report, and returns the exit code.
pub fn run(args: &CheckArgs, out: &mut dyn Write) -> Result<u8, CheckError> {
    let report = examine(&args.database)?;
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &report).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        write_text(&report, out)?;
    }
    Ok(u8::from(report.has_errors()))
}

/// Examines a file.
pub fn examine(path: &Path) -> Result<Report, CheckError> {
    let conn = open_read_only(path)?;
    let facts = gather(&conn).map_err(|source| CheckError::Schema { path: path.to_owned(), source })?;
    let table = |t: &Table| CheckedTable {
        name: t.name.clone(),
        key: t.key.iter().map(|k| k.name.clone()).collect(),
        replicated: facts.is_replicated(&t.name),
    };
    let tables = facts.tables.iter().map(table).collect();
    Ok(Report { file: path.display().to_string(), tables, findings: lint(&facts) })
}

fn write_text(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    let count = report.tables.iter().filter(|t| t.replicated).count();
    writeln!(out, "{}: {count} of {} tables can be replicated", report.file, report.tables.len())?;
    if report.findings.is_empty() {
        return writeln!(out, "nothing fragile");
    }
    let mut group = None;
    for f in &report.findings {
        if group != Some(&f.table) {
            let title = f.table.as_deref().map_or("the file".to_owned(), |t| format!("table {}", clean(t)));
            writeln!(out, "\n{title}")?;
            group = Some(&f.table);
        }
        writeln!(out, "  {} [{}]", f.severity.as_str(), f.code)?;
        for (label, text) in [("", &f.what), ("litemesh: ", &f.what_litemesh_does), ("advice: ", &f.advice)] {
            write_wrapped(&format!("{label}{}", clean(text)), out)?;
        }
    }
    let number = |s: Severity| report.findings.iter().filter(|f| f.severity == s).count();
    let (errors, warnings) = (number(Severity::Error), number(Severity::Warning));
    writeln!(out, "\n{errors} errors, {warnings} warnings, {} to know", number(Severity::Info))
}

/// Writes a text in lines that a terminal need not break, indented.
fn write_wrapped(text: &str, out: &mut dyn Write) -> io::Result<()> {
    let mut line = String::new();
    for word in text.split(' ') {
        if !line.is_empty() && line.chars().count() + word.chars().count() >= TEXT_WIDTH {
            writeln!(out, "    {line}")?;
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    writeln!(out, "    {line}")
}

/// The text without control characters: names come from the file.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Reads what the rules need to know.
fn gather(conn: &Connection) -> rusqlite::Result<Facts> {
    // As on a replica's connection; these settings are the connection's, not the file's.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    conn.pragma_update(None, "ignore_check_constraints", true)?;
    conn.pragma_update(None, "foreign_keys", false)?;
    let schema = introspect::read(conn)?;
    let mut facts = Facts {
        views: names(conn, "SELECT name FROM sqlite_schema WHERE type = 'view' ORDER BY name")?,
        journal_mode: conn.pragma_query_value(None, "journal_mode", |r| r.get(0))?,
        virtual_tables: schema.virtual_tables.iter().map(|v| v.name.clone()).collect(),
        ..Facts::default()
    };
    for table in &schema.tables {
        facts.foreign_keys.extend(foreign_keys(conn, &table.name)?);
        match conn.prepare(&format!("INSERT INTO {} DEFAULT VALUES", ident(&table.name))) {
            Ok(_) if has_null_key(conn, table)? => drop(facts.null_key_tables.insert(table.name.clone())),
            Ok(_) => {}
            Err(e) => facts.unwritable.push((table.name.clone(), said(&e))),
        }
    }
    if adopt::is_adopted(conn)? {
        // What cannot be read of conflicts is no finding about the schema.
        for c in conflicts(conn).unwrap_or_default().iter().filter(|c| c.is_open() && c.is_collision()) {
            let (rows, children) = facts.collisions.entry(c.table.clone()).or_default();
            *rows += 1;
            *children += c.children.iter().filter(|c| !c.restored).count();
        }
    }
    facts.triggers = triggers(conn, &schema, &facts.views)?;
    facts.tables = schema.tables;
    Ok(facts)
}

fn names(conn: &Connection, sql: &str) -> rusqlite::Result<Vec<String>> {
    conn.prepare(sql)?.query_map([], |r| r.get(0))?.collect()
}

/// SQLite's own words, without the statement of ours that they are about.
fn said(error: &rusqlite::Error) -> String {
    match error {
        rusqlite::Error::SqlInputError { msg, .. } => msg.clone(),
        rusqlite::Error::SqliteFailure(_, Some(msg)) => msg.clone(),
        other => other.to_string(),
    }
}

fn foreign_keys(conn: &Connection, table: &str) -> rusqlite::Result<Vec<ForeignKey>> {
    let sql = "SELECT id, \"table\", \"from\" FROM pragma_foreign_key_list(?1) ORDER BY id, seq";
    let mut statement = conn.prepare_cached(sql)?;
    let rows = statement
        .query_map([table], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, String>(1)?, r.get::<_, String>(2)?)))?;
    let mut keys: BTreeMap<i64, ForeignKey> = BTreeMap::new();
    for row in rows {
        let (id, parent, column) = row?;
        let new = || ForeignKey { table: table.to_owned(), columns: Vec::new(), parent };
        keys.entry(id).or_insert_with(new).columns.push(column);
    }
    Ok(keys.into_values().collect())
}

fn has_null_key(conn: &Connection, table: &Table) -> rusqlite::Result<bool> {
    let nullable = table.key.iter().filter(|k| k.nullable).map(|k| format!("{} IS NULL", k.sql));
    let condition = nullable.collect::<Vec<_>>().join(" OR ");
    if condition.is_empty() {
        return Ok(false);
    }
    let sql = format!("SELECT EXISTS(SELECT 1 FROM {} WHERE {condition})", ident(&table.name));
    conn.query_row(&sql, [], |r| r.get(0))
}

/// What each trigger of the application writes. The authorizer names the trigger behind each write while a statement
/// that fires it is compiled; none is run.
fn triggers(conn: &Connection, schema: &Schema, views: &[String]) -> rusqlite::Result<Vec<TriggerFacts>> {
    if schema.triggers.is_empty() {
        return Ok(Vec::new());
    }
    let (failures, seen) = with_trigger_writes(conn, |sink| {
        let failures = compile_writes(conn, schema, views);
        (failures, sink.lock().unwrap_or_else(PoisonError::into_inner).clone())
    })?;
    let facts = |t: &AppTrigger| {
        let writes = match (seen.get(&t.name), failures.get(&t.table.to_lowercase())) {
            // What was seen before a failure may not be all.
            (_, Some(why)) => TriggerWrites::Unknown(why.clone()),
            (seen, None) => TriggerWrites::Tables(seen.cloned().unwrap_or_default()),
        };
        TriggerFacts { name: t.name.clone(), table: t.table.clone(), writes }
    };
    Ok(schema.triggers.iter().map(facts).collect())
}

/// Compiles what fires the triggers of each table and view; returns why it failed, by name in lower case.
fn compile_writes(conn: &Connection, schema: &Schema, views: &[String]) -> BTreeMap<String, String> {
    let on = |name: &str, event: &str| {
        let mut of_name = schema.triggers.iter().filter(|t| t.table.eq_ignore_ascii_case(name));
        of_name.any(|t| event.is_empty() || fires_on(&t.sql, event))
    };
    let mut failures = BTreeMap::new();
    let mut compile = |name: &str, texts: &[String]| {
        for sql in texts {
            if let Err(e) = conn.prepare(sql) {
                failures.insert(name.to_lowercase(), said(&e));
            }
        }
    };
    for table in schema.tables.iter().filter(|t| on(&t.name, "")) {
        compile(&table.name, &firing_statements(table));
    }
    for view in views {
        let events = ["INSERT", "UPDATE", "DELETE"];
        let fired = |event: &&&str| on(view, event);
        let texts: Vec<String> =
            events.iter().filter(fired).filter_map(|e| view_write(conn, view, e)).collect();
        compile(view, &texts);
    }
    failures
}

/// Whether a trigger's text names this event before its ON.
fn fires_on(sql: &str, event: &str) -> bool {
    let all = crate::core::sqltext::tokens(sql);
    let head = all.iter().take_while(|t| !t.is_keyword("ON"));
    head.skip_while(|t| !t.is_keyword("TRIGGER")).any(|t| t.is_keyword(event))
}

/// A statement on a view that fires its INSTEAD OF triggers for an event.
fn view_write(conn: &Connection, view: &str, event: &str) -> Option<String> {
    let name = ident(view);
    match event {
        "INSERT" => Some(format!("INSERT INTO {name} DEFAULT VALUES")),
        "DELETE" => Some(format!("DELETE FROM {name}")),
        _ => {
            let mut statement = conn.prepare("SELECT name FROM pragma_table_xinfo(?1)").ok()?;
            let columns = statement.query_map([view], |r| r.get::<_, String>(0)).ok()?.flatten();
            let set = list(columns, |c| format!("{0} = {0}", ident(&c)));
            Some(format!("UPDATE {name} SET {set}"))
        }
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
