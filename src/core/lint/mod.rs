//! What in a schema is fragile when several nodes write. Invariant: a finding tells what litemesh really does, so
//! that whoever reads it can decide; a schema without findings needs no thought.

mod triggers;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::core::schema::{Affinity, KeyColumn, KeyKind, Table, UniqueIndex};

/// The collating sequences that every SQLite has. (Asking a connection does not help: it lists those that a schema
/// only mentions as well.)
const COLLATIONS: [&str; 3] = ["BINARY", "NOCASE", "RTRIM"];

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Two nodes that write at once can get a result nobody meant.
    Warning,
    /// It is not replicated.
    Error,
}

impl Severity {
    /// The word shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// One thing about a schema.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The table or view; none for what concerns the whole file.
    pub table: Option<String>,
    /// What kind of finding it is: a word that does not change between versions.
    pub code: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// What was found.
    pub what: String,
    /// What litemesh does about it.
    pub what_litemesh_does: String,
    /// What would be better, or what to mind.
    pub advice: String,
}

/// A FOREIGN KEY constraint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignKey {
    /// The table that refers.
    pub table: String,
    /// Its columns.
    pub columns: Vec<String>,
    /// The table referred to.
    pub parent: String,
}

/// What a trigger of the application writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TriggerWrites {
    /// These tables, in lower case; none at all if it only checks.
    Tables(BTreeSet<String>),
    /// It cannot be told: the statement that fires it does not compile here.
    Unknown(String),
}

/// A trigger of the application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TriggerFacts {
    /// Its name.
    pub name: String,
    /// The table or view it is on.
    pub table: String,
    /// What it writes.
    pub writes: TriggerWrites,
}

/// What is known of a file.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Ordinary tables.
    pub tables: Vec<Table>,
    /// Virtual tables.
    pub virtual_tables: Vec<String>,
    /// Views.
    pub views: Vec<String>,
    /// Triggers of the application.
    pub triggers: Vec<TriggerFacts>,
    /// FOREIGN KEY constraints.
    pub foreign_keys: Vec<ForeignKey>,
    /// Tables that hold rows whose key is NULL.
    pub null_key_tables: BTreeSet<String>,
    /// Tables that cannot be written without the application's own functions or collations, and what SQLite says.
    pub unwritable: Vec<(String, String)>,
    /// The journal mode.
    pub journal_mode: String,
    /// Rows that lost to another node's row of the same id, and how many children they have, by table.
    pub collisions: BTreeMap<String, (usize, usize)>,
}

impl Facts {
    /// Why this table is not replicated at all: a collation of its key that only the application has.
    fn unknown_collation<'t>(&self, table: &'t Table) -> Option<&'t str> {
        let known = |c: &str| COLLATIONS.iter().any(|k| k.eq_ignore_ascii_case(c));
        table.key.iter().map(|k| k.collation.as_str()).find(|c| !known(c))
    }

    /// Whether rows of the table of this name travel.
    pub fn is_replicated(&self, name: &str) -> bool {
        let same = |t: &&Table| t.name.eq_ignore_ascii_case(name);
        self.tables.iter().find(same).is_some_and(|t| self.unknown_collation(t).is_none())
    }
}

/// Everything worth saying about a file: what concerns it as a whole, then table by table.
pub fn lint(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    if !matches!(facts.journal_mode.as_str(), "wal" | "memory") {
        found.push(journal_mode(&facts.journal_mode));
    }
    for table in &facts.tables {
        if let Some(collation) = facts.unknown_collation(table) {
            found.push(unknown_collation(&table.name, collation));
            continue;
        }
        let why = facts.unwritable.iter().find(|(name, _)| *name == table.name);
        found.extend(why.map(|(name, why)| unwritable(name, why)));
        found.extend(key(facts, table));
        found.extend(table.uniques.iter().map(|u| unique(table, u)));
        found.extend(facts.collisions.get(&table.name).map(|counts| collisions(&table.name, *counts)));
        let children = facts.foreign_keys.iter().filter(|f| f.table == table.name);
        found.extend(children.map(|f| foreign_key(facts, f)));
        found.extend(triggers::on(facts, &table.name));
    }
    for name in &facts.virtual_tables {
        found.push(triggers::virtual_table(facts, name));
        found.extend(triggers::on(facts, name));
    }
    for view in &facts.views {
        found.extend(triggers::on(facts, view));
    }
    found
}

fn finding(
    table: &str,
    code: &'static str,
    severity: Severity,
    [what, what_litemesh_does, advice]: [String; 3],
) -> Finding {
    Finding { table: Some(table.to_owned()), code, severity, what, what_litemesh_does, advice }
}

fn collisions(table: &str, (rows, children): (usize, usize)) -> Finding {
    let what = format!(
        "{rows} of its rows lost to a row that another node inserted under the same id at once; {children} other rows \
         referred to them"
    );
    let does = "They are kept: `litemesh conflicts list` shows them.";
    let advice =
        "`litemesh conflicts restore` with --new-id brings each back under a new id, with its children.";
    finding(table, "id-collisions", Severity::Warning, [what, does.into(), advice.into()])
}

fn journal_mode(mode: &str) -> Finding {
    Finding {
        table: None,
        code: "journal-mode",
        severity: Severity::Info,
        what: format!("the file's journal mode is {mode}, not WAL: readers and a writer wait for each other"),
        what_litemesh_does: "`litemesh up` puts the file into WAL mode once, which lasts.".into(),
        advice: "To keep the mode, start with --journal keep; give connections a busy timeout then.".into(),
    }
}

fn unknown_collation(table: &str, collation: &str) -> Finding {
    finding(
        table,
        "unknown-collation",
        Severity::Error,
        [
            format!("its key uses the collation {collation}, which only the application has"),
            "This table is not replicated: without the collation its rows cannot be found by their key."
                .into(),
            "Declare the key with BINARY, NOCASE or RTRIM.".into(),
        ],
    )
}

fn unwritable(table: &str, why: &str) -> Finding {
    finding(table, "needs-application", Severity::Error, [
        format!("it cannot be written without something that only the application has: {why}"),
        "Writes made here are sent, but rows from peers cannot be put in: replication stops at the first.".into(),
        "Take the function or collation out of the table's indexes and generated columns.".into(),
    ])
}

/// Findings about how the table's rows are identified.
fn key(facts: &Facts, table: &Table) -> Vec<Finding> {
    let mut found = Vec::new();
    match table.key_kind {
        KeyKind::Rowid => found.push(no_primary_key(table)),
        KeyKind::Integer => found.push(auto_key(table)),
        KeyKind::Declared => {}
    }
    let names = |keep: &dyn Fn(&KeyColumn) -> bool| {
        table.key.iter().filter(|k| keep(k)).map(|k| format!("\"{}\"", k.name)).collect::<Vec<_>>().join(", ")
    };
    let nullable = names(&|k| k.nullable);
    if !nullable.is_empty() {
        found.push(nullable_key(table, &nullable, facts.null_key_tables.contains(&table.name)));
    }
    let real = names(&|k| k.affinity == Affinity::Real);
    if !real.is_empty() {
        found.push(finding(
            &table.name,
            "real-key",
            Severity::Warning,
            [
                format!("its key holds floating-point numbers ({real})"),
                "Numbers are kept to the last bit; two that differ there are two rows.".into(),
                "Use integers or text: what two nodes compute may differ in the last bit.".into(),
            ],
        ));
    }
    found
}

fn no_primary_key(table: &Table) -> Finding {
    finding(&table.name, "no-primary-key", Severity::Warning, [
        "it has no primary key".into(),
        "Its rows are identified by their rowid. Two nodes hand out the same rowid, and the later insert then wins \
         whole; the other row is kept as a conflict."
            .into(),
        "Declare a primary key, best of random values (UUID). Until then do not run VACUUM on the file: it may \
         number the rows anew, which every node does differently."
            .into(),
    ])
}

fn auto_key(table: &Table) -> Finding {
    let key = table.key.first().map_or("", |k| k.name.as_str());
    let how = if table.autoincrement { "AUTOINCREMENT counts on each node for itself" } else { "max + 1" };
    finding(&table.name, "auto-key", Severity::Warning, [
        format!("its key \"{key}\" is an INTEGER PRIMARY KEY, which SQLite assigns when an insert leaves it out ({how})"),
        "Two nodes that insert at once may get the same id: the insert with the later birth wins whole, and the \
         other row is kept as a conflict. Rows equal in all columns are one row."
            .into(),
        "Where several nodes insert, assign random keys (UUID text, or a random 63-bit integer), or have both rows \
         kept: `up --rekey`. Where only one node inserts, nothing needs to change."
            .into(),
    ])
}

fn nullable_key(table: &Table, columns: &str, has_null: bool) -> Finding {
    let (severity, what) = match has_null {
        true => {
            (Severity::Warning, format!("its key may be NULL ({columns}), and there are rows where it is"))
        }
        false => (Severity::Info, format!("its key may be NULL ({columns}); no row has such a key now")),
    };
    finding(&table.name, "nullable-key", severity, [
        what,
        "A row whose key is NULL cannot be told from another one: it stays on the node that wrote it, and is \
         counted in `litemesh status`."
            .into(),
        "Declare the key NOT NULL.".into(),
    ])
}

fn unique(table: &Table, index: &UniqueIndex) -> Finding {
    const ORDER: &str =
        "When two nodes write the same value at once, the row with the earlier (birth, key) stays";
    let partial = match &index.condition {
        Some(condition) => format!(" where {}", condition.trim()),
        None => String::new(),
    };
    let terms = match &index.columns {
        Some(columns) => quoted(columns),
        None => index.terms.join(", "),
    };
    let what = format!("{terms} must be unique{partial}");
    let Some(columns) = &index.columns else {
        return finding(
            &table.name,
            "unique-expression",
            Severity::Warning,
            [
                format!("{what} (index {} on an expression)", index.name),
                format!(
                    "{ORDER}; the other row is deleted, as no single column is to blame, and kept as a conflict."
                ),
                "Make a generated or plain column of the expression that may be NULL, or the key of it."
                    .into(),
            ],
        );
    };
    let code = if index.condition.is_some() { "unique-partial" } else { "unique" };
    let may_be_null = |c: &&String| table.column(c).is_some_and(|c| !c.not_null);
    let (severity, effect, advice) = match columns.iter().find(may_be_null) {
        Some(column) => (
            Severity::Info,
            format!("in the other \"{column}\" becomes NULL"),
            "Programs must bear with NULL there. If that cannot be, make it the primary key.",
        ),
        None => (
            Severity::Warning,
            "the other row is deleted, as none of its columns may be NULL".to_owned(),
            "Let one of the columns be NULL, or make them the primary key: then both writes meet in one row.",
        ),
    };
    let does = format!("{ORDER}; {effect}, and what was there is kept as a conflict.");
    finding(&table.name, code, severity, [what, does, advice.into()])
}

fn foreign_key(facts: &Facts, key: &ForeignKey) -> Finding {
    let parent = facts.tables.iter().find(|t| t.name.eq_ignore_ascii_case(&key.parent));
    let advice = match parent.map(|t| t.key_kind) {
        Some(KeyKind::Integer | KeyKind::Rowid) => format!(
            "Ids of \"{}\" are assigned by SQLite: if two nodes assign the same one, the children of the row that \
             lost belong to the other. Random keys avoid it.",
            key.parent
        ),
        _ => "Programs that read should bear with a parent that is missing.".to_owned(),
    };
    finding(&key.table, "foreign-key", Severity::Info, [
        format!("{} refers to \"{}\"", quoted(&key.columns), key.parent),
        "Foreign keys are enforced where a write is made, not again when it arrives: a parent deleted on one node \
         while another adds a child leaves the child without it."
            .into(),
        advice,
    ])
}

/// Names in a sentence.
fn quoted(names: &[String]) -> String {
    names.iter().map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join(", ")
}
