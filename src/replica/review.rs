//! Conflicts as people and commands see them: the entries of one loss put together. Invariant: it only reads, and what
//! it tells follows from the entries alone, in whatever order they came.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, OptionalExtension};
use serde_json::Value as Json;

use super::Result;
use super::entry::{CHILD, Entry, EntryId, RESTORED, from_json, parse_key, parse_version};
use super::rekey::{Finder, Whereabouts};
use crate::core::conflict::Kind;
use crate::core::value::Value;
use crate::core::version::{SiteId, Version};

/// A value that is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// The value.
    pub value: Value,
    /// When and where it was written.
    pub version: Version,
    /// Whether that write was lost; else it is kept because the row was.
    pub lost: bool,
    /// Whether it was restored since.
    pub restored: bool,
}

/// A row that referred to a row that lost.
#[derive(Debug, Clone, PartialEq)]
pub struct Child {
    /// The entry that says so.
    pub entry: EntryId,
    /// Its table.
    pub table: String,
    /// Its key.
    pub key: Vec<Value>,
    /// The column that refers.
    pub column: String,
    /// The version of that column: when it is another, the row has been given another parent since.
    pub version: Version,
    /// Whether it was moved since.
    pub restored: bool,
}

/// A loss.
#[derive(Debug, Clone, PartialEq)]
pub struct Conflict {
    /// Its number.
    pub id: EntryId,
    /// The table.
    pub table: String,
    /// The key under which the row is now, or was.
    pub key: Vec<Value>,
    /// The key that its writer gave it, as a JSON array.
    pub key_text: String,
    /// Whether whoever has the key now is another row, or may be: the table keeps both rows of an id collision, and this
    /// one is not there.
    pub gone: bool,
    /// What kind of loss it was.
    pub kind: Kind,
    /// The incarnation of the row.
    pub birth: Version,
    /// Whether the row itself was lost, not only columns of it.
    pub whole_row: bool,
    /// The newest write that was lost.
    pub loser: Version,
    /// The newest write that won.
    pub winner: Version,
    /// What is kept, by column.
    pub columns: BTreeMap<String, Kept>,
    /// Children of the row that lost.
    pub children: Vec<Child>,
    /// The key under which it was restored last, and when.
    pub restored: Option<(Vec<Value>, i64)>,
    /// When it happened.
    pub at_ms: i64,
}

impl Conflict {
    /// Whether anything of it is not restored.
    pub fn is_open(&self) -> bool {
        self.columns.values().any(|k| k.lost && !k.restored) || self.children.iter().any(|c| !c.restored)
    }

    /// Whether two rows were inserted under one integer.
    pub fn is_collision(&self) -> bool {
        self.kind == Kind::Row && matches!(self.key[..], [Value::Int(_)])
    }

    /// What a mark has to cover for all of it to be restored.
    pub fn marks(&self) -> Vec<String> {
        let lost = self.columns.iter().filter(|(_, k)| k.lost).map(|(name, k)| write_mark(name, k.version));
        lost.chain(self.children.iter().map(|c| super::entry::hex(&c.entry))).collect()
    }
}

/// What a mark calls one write.
fn write_mark(column: &str, version: Version) -> String {
    format!("{}@{column}", super::entry::version_text(version))
}

/// All conflicts kept, newest first.
pub fn conflicts(conn: &Connection) -> Result<Vec<Conflict>> {
    let sql = format!("SELECT {} FROM __litemesh_conflicts ORDER BY id", Entry::COLUMNS);
    let mut statement = conn.prepare_cached(&sql)?;
    let entries = statement.query_map([], Entry::read)?;
    let mut groups: BTreeMap<EntryId, Vec<Entry>> = BTreeMap::new();
    for entry in entries {
        let entry = entry?;
        groups.entry(entry.conflict).or_default().push(entry);
    }
    let mut all: Vec<Conflict> = groups.into_values().filter_map(|g| gather(&g)).collect();
    settle_children(&mut all);
    let mut finder = Finder::new(conn)?;
    for conflict in &mut all {
        match finder.find(&conflict.table, &conflict.key, conflict.birth)? {
            Whereabouts::Plain => {}
            Whereabouts::Shown(id) => conflict.key = vec![Value::Int(id)],
            Whereabouts::Gone => conflict.gone = true,
        }
    }
    all.sort_by_key(|c| (std::cmp::Reverse(c.at_ms), c.id));
    Ok(all)
}

/// A child that is written down with two parents belongs to the earlier: nodes may take its writer to have seen more
/// than it had, never less.
fn settle_children(all: &mut [Conflict]) {
    type Write = (String, Vec<Value>, String, Version);
    let of = |c: &Child| -> Write { (c.table.clone(), c.key.clone(), c.column.clone(), c.version) };
    let mut parents: BTreeMap<Write, Version> = BTreeMap::new();
    for conflict in all.iter() {
        for child in &conflict.children {
            let parent = parents.entry(of(child)).or_insert(conflict.birth);
            *parent = conflict.birth.min(*parent);
        }
    }
    for conflict in all {
        let birth = conflict.birth;
        conflict.children.retain(|child| parents[&of(child)] == birth);
    }
}

/// Puts the entries of one conflict together; `None` while none of them keeps a value.
fn gather(entries: &[Entry]) -> Option<Conflict> {
    let of_kind = |kind: &'static str| entries.iter().filter(move |e| e.kind == kind);
    let views: Vec<(&Entry, Kind)> = entries.iter().filter_map(|e| Some((e, kind_of(&e.kind)?))).collect();
    let first = views.first()?.0;
    let marks: BTreeSet<&str> = of_kind(RESTORED)
        .flat_map(|e| e.content["covers"].as_array().into_iter().flatten().filter_map(Json::as_str))
        .collect();
    let restored = of_kind(RESTORED).max_by_key(|e| (e.at_ms, e.id)).and_then(|e| {
        let key = e.content["key"].as_array()?.iter().map(from_json).collect::<Option<_>>()?;
        Some((key, e.at_ms))
    });
    let mut columns: BTreeMap<String, Kept> = BTreeMap::new();
    for (view, _) in &views {
        for (name, kept) in kept(view, &marks) {
            match columns.get_mut(&name) {
                Some(old) if old.version == kept.version => old.lost |= kept.lost,
                Some(old) if old.version > kept.version => {}
                _ => drop(columns.insert(name, kept)),
            }
        }
    }
    let loser = columns.values().filter(|k| k.lost).map(|k| k.version).max().unwrap_or(first.birth);
    Some(Conflict {
        id: first.conflict,
        table: first.table.clone(),
        key: parse_key(&first.key)?,
        key_text: first.key.clone(),
        gone: false,
        kind: views.iter().map(|(_, kind)| *kind).max()?,
        birth: first.birth,
        whole_row: views.iter().any(|(e, _)| is_whole(e)),
        loser,
        winner: views.iter().map(|(e, _)| e.winner).max()?,
        columns,
        children: of_kind(CHILD).filter_map(|e| child(e, &marks)).collect(),
        restored,
        at_ms: views.iter().map(|(e, _)| e.at_ms).max()?,
    })
}

fn kind_of(word: &str) -> Option<Kind> {
    Kind::ALL.into_iter().find(|k| k.word() == word)
}

/// Of a row that is gone everything is kept, of one that goes on what it lost.
fn is_whole(entry: &Entry) -> bool {
    entry.content["whole"] == true
}

fn kept(view: &Entry, marks: &BTreeSet<&str>) -> Vec<(String, Kept)> {
    let content = &view.content;
    let lost: BTreeSet<&str> =
        content["lost"].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
    let values = content["values"].as_object().into_iter().flatten();
    let one = |(name, value): (&String, &Json)| {
        let version = parse_version(content["versions"][name].as_str()?)?;
        let restored = marks.contains(write_mark(name, version).as_str());
        let kept = Kept { value: from_json(value)?, version, lost: lost.contains(name.as_str()), restored };
        Some((name.clone(), kept))
    };
    values.filter_map(one).collect()
}

fn child(entry: &Entry, marks: &BTreeSet<&str>) -> Option<Child> {
    let content = &entry.content;
    Some(Child {
        entry: entry.id,
        table: content["table"].as_str()?.to_owned(),
        key: content["key"].as_array()?.iter().map(from_json).collect::<Option<_>>()?,
        column: content["column"].as_str()?.to_owned(),
        version: parse_version(content["version"].as_str()?)?,
        restored: marks.contains(super::entry::hex(&entry.id).as_str()),
    })
}

/// The name of the node that a site is or was, if this file has met it.
pub fn node_of(conn: &Connection, site: SiteId) -> Result<Option<String>> {
    let mut ask = conn.prepare_cached("SELECT node FROM __litemesh_site WHERE site = ?1")?;
    Ok(ask.query_row([site.0 as i64], |r| r.get(0)).optional()?.flatten())
}
