//! Entries of the table of conflicts, and what is written in them. Invariant: an entry is a function of what was lost,
//! not of who saw it or when, and is never changed; so nodes that record the same loss make the same entry.
//!
//! A conflict is a group of entries: what was seen of the loss (a later state of a row that lost may arrive, or another
//! winner), the children of a row that lost, and marks that say what has been restored.

use rusqlite::types::FromSql;
use rusqlite::{Connection, Row as SqlRow};
use serde_json::{Map, Value as Json, json};

use super::Result;
use super::plan::Plan;
use crate::core::conflict::Loss;
use crate::core::merge::ColumnId;
use crate::core::value::{Value, ValueRef};
use crate::core::version::{Hlc, SiteId, Version};

/// The kind of an entry that is a child of a row that lost.
pub const CHILD: &str = "child";
/// The kind of an entry that only says that there was such a row, of which nothing was lost: it was deleted, or equal to
/// the one that took its key.
pub const OTHER: &str = "other";
/// The kind of an entry that says what was restored.
pub const RESTORED: &str = "restored";

/// The number of an entry, or of a conflict.
pub type EntryId = [u8; 16];

/// A row of the table of conflicts.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// A hash of all the rest.
    pub id: EntryId,
    /// The conflict it belongs to.
    pub conflict: EntryId,
    /// The table of the row that lost.
    pub table: String,
    /// Its key, as a JSON array.
    pub key: String,
    /// The word of a [`Kind`](crate::core::conflict::Kind), or one of those above.
    pub kind: String,
    /// The incarnation of the row that lost, or whose columns did.
    pub birth: Version,
    /// What was lost, and the like.
    pub content: Json,
    /// The version that won.
    pub winner: Version,
    /// When it happened, in milliseconds since 1970.
    pub at_ms: i64,
}

impl Entry {
    /// The entry of a loss.
    pub fn of_loss(plan: &Plan, key: &[ValueRef<'_>], loss: &Loss) -> Self {
        let name = |c: &ColumnId| plan.table.columns.iter().find(|p| p.id == *c).map(|p| p.name.clone());
        let values = loss.values.iter().filter_map(|(c, v)| Some((name(c)?, to_json(v.as_ref()))));
        let versions = loss.versions.iter().filter_map(|(c, v)| Some((name(c)?, json!(version_text(*v)))));
        let mut lost: Vec<String> = loss.lost.keys().filter_map(name).collect();
        lost.sort();
        let content = json!({
            "values": values.collect::<Map<_, _>>(),
            "versions": versions.collect::<Map<_, _>>(),
            "lost": lost,
            "whole": loss.whole_row,
        });
        let (table, key) = (plan.table.name.clone(), key_text(key.iter().copied()));
        // All that is lost of a row that is gone is one conflict; columns that lost while the row went on are one for
        // each write.
        let write = (!loss.whole_row).then(|| loss.loser());
        let conflict = conflict_id(&table, &key, loss.birth, write);
        let at_ms = loss.winner.hlc.max(loss.loser().hlc).ms() as i64;
        let kind = loss.kind.word().to_owned();
        Self {
            id: [0; 16],
            conflict,
            table,
            key,
            kind,
            birth: loss.birth,
            content,
            winner: loss.winner,
            at_ms,
        }
        .numbered()
    }

    /// The entry with the id that follows from what it says.
    pub fn numbered(mut self) -> Self {
        let content = self.content.to_string();
        let (birth, winner) = (version_text(self.birth), version_text(self.winner));
        self.id = hash(&[&hex(&self.conflict), &self.kind, &birth, &winner, &content]);
        self
    }

    /// The columns of the table, in the order in which [`Entry::read`] expects them.
    pub const COLUMNS: &str = "id, conflict, tbl, key, kind, birth, loser, winner, at_ms";

    /// Reads an entry; one that cannot be read is an error.
    pub fn read(row: &SqlRow<'_>) -> rusqlite::Result<Self> {
        fn text<T: FromSql>(row: &SqlRow<'_>, i: usize) -> rusqlite::Result<T> {
            row.get(i)
        }
        let version = |i| -> rusqlite::Result<Version> {
            parse_version(&text::<String>(row, i)?).ok_or(rusqlite::Error::InvalidQuery)
        };
        let content = serde_json::from_str(&text::<String>(row, 6)?);
        Ok(Self {
            id: text(row, 0)?,
            conflict: text(row, 1)?,
            table: text(row, 2)?,
            key: text(row, 3)?,
            kind: text(row, 4)?,
            birth: version(5)?,
            content: content.map_err(|_| rusqlite::Error::InvalidQuery)?,
            winner: version(7)?,
            at_ms: text(row, 8)?,
        })
    }

    /// Writes the entry, if it is not there; returns whether it was not.
    pub fn insert(&self, conn: &Connection) -> Result<bool> {
        let sql = format!(
            "INSERT OR IGNORE INTO __litemesh_conflicts({}) VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
            Self::COLUMNS
        );
        let (birth, winner) = (version_text(self.birth), version_text(self.winner));
        let params = rusqlite::params![
            &self.id[..],
            &self.conflict[..],
            self.table,
            self.key,
            self.kind,
            birth,
            self.content.to_string(),
            winner,
            self.at_ms
        ];
        Ok(conn.prepare_cached(&sql)?.execute(params)? > 0)
    }
}

/// The number of a conflict: about a row that is gone, or about one write of columns of it.
pub fn conflict_id(table: &str, key: &str, birth: Version, write: Option<Version>) -> EntryId {
    let write = write.map(version_text).unwrap_or_default();
    hash(&[&table.to_lowercase(), key, &version_text(birth), &write])
}

fn hash(parts: &[&str]) -> EntryId {
    let mut hash = blake3::Hasher::new();
    for part in parts {
        hash.update(&(part.len() as u64).to_be_bytes()).update(part.as_bytes());
    }
    let mut id = [0; 16];
    id.copy_from_slice(&hash.finalize().as_bytes()[..16]);
    id
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let pair = |i| u8::from_str_radix(text.get(i..i + 2)?, 16).ok();
    text.len().is_multiple_of(2).then(|| (0..text.len()).step_by(2).map(pair).collect()).flatten()
}

/// A version as text that sorts as versions do.
pub fn version_text(version: Version) -> String {
    format!("{:016x}-{}", version.hlc.0, version.site)
}

/// Reads what [`version_text`] wrote.
pub fn parse_version(text: &str) -> Option<Version> {
    let (hlc, site) = text.split_once('-')?;
    let number = |t| u64::from_str_radix(t, 16).ok();
    Some(Version { hlc: Hlc(number(hlc)?), site: SiteId(number(site)?) })
}

/// A key as a JSON array.
pub fn key_text<'a>(values: impl Iterator<Item = ValueRef<'a>>) -> String {
    Json::Array(values.map(to_json).collect()).to_string()
}

/// Reads what [`key_text`] wrote.
pub fn parse_key(text: &str) -> Option<Vec<Value>> {
    let values: Vec<Json> = serde_json::from_str(text).ok()?;
    values.iter().map(from_json).collect()
}

/// A value as JSON that can be turned back: what JSON has no form for is an object that says its type.
pub fn to_json(value: ValueRef<'_>) -> Json {
    match value {
        ValueRef::Null => Json::Null,
        ValueRef::Int(i) => json!(i),
        ValueRef::Real(r) if r.is_finite() => json!(r),
        ValueRef::Real(r) => json!({ "real": r.to_string() }),
        ValueRef::Text(b) => match std::str::from_utf8(b) {
            Ok(text) => json!(text),
            Err(_) => json!({ "text": hex(b) }),
        },
        ValueRef::Blob(b) => json!({ "blob": hex(b) }),
    }
}

/// Reads what [`to_json`] wrote.
pub fn from_json(json: &Json) -> Option<Value> {
    Some(match json {
        Json::Null => Value::Null,
        Json::Number(n) => match n.as_i64() {
            Some(i) => Value::Int(i),
            None => Value::Real(n.as_f64()?),
        },
        Json::String(s) => Value::Text(s.clone().into_bytes()),
        Json::Object(o) => match o.iter().next()? {
            (k, Json::String(s)) if k == "real" => Value::Real(s.parse().ok()?),
            (k, Json::String(s)) if k == "text" => Value::Text(unhex(s)?),
            (k, Json::String(s)) if k == "blob" => Value::Blob(unhex(s)?),
            _ => return None,
        },
        Json::Bool(_) | Json::Array(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::Int),
            any::<f64>().prop_filter("SQLite stores NULL for NaN", |r| !r.is_nan()).prop_map(Value::Real),
            prop::collection::vec(any::<u8>(), 0..9).prop_map(Value::Text),
            ".{0,5}".prop_map(|s| Value::Text(s.into_bytes())),
            prop::collection::vec(any::<u8>(), 0..9).prop_map(Value::Blob),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]

        #[test]
        fn a_value_comes_back_from_its_text_exactly(value in value()) {
            let text = to_json(value.as_ref()).to_string();
            prop_assert_eq!(from_json(&serde_json::from_str(&text).unwrap()), Some(value));
        }
    }

    #[test]
    fn versions_as_text_sort_as_versions() {
        let at = |h, s| Version { hlc: Hlc(h), site: SiteId(s) };
        let all = [Version::ZERO, at(9, 1), at(10, 1), at(10, 2), at(1 << 60, 1)];
        let texts: Vec<String> = all.iter().map(|v| version_text(*v)).collect();
        assert!(texts.is_sorted());
        assert!(texts.iter().zip(all).all(|(t, v)| parse_version(t) == Some(v)));
    }
}
