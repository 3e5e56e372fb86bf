//! A change of a row as programs are told of it. Invariant: the id is a function of the row's state alone, so that
//! every node and every repetition gives one change the same.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use super::merge::RowState;
use super::value::ValueRef;
use super::vector::Vector;
use super::version::{SiteId, Version};

/// The largest integer up to which every integer is a JSON number for every reader.
const MAX_EXACT: u64 = (1 << 53) - 1;

/// What happened to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// It is there, and nothing of it was written since its insert.
    Insert,
    /// It is there.
    Update,
    /// It is gone.
    Delete,
}

impl Operation {
    /// What made a row this.
    pub fn of(state: &RowState) -> Self {
        match state.dead {
            Some(_) => Self::Delete,
            None if latest(state) == state.birth => Self::Insert,
            None => Self::Update,
        }
    }

    /// As in subjects and in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
        }
    }
}

/// The latest write that a row's state tells of.
pub fn latest(state: &RowState) -> Version {
    // What the columns of a tombstone say is not about the row.
    let columns = state.columns.values().copied().filter(|_| state.dead.is_none());
    columns.chain(state.dead).fold(state.birth, Version::max)
}

/// One change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// The same whenever and wherever the same change is told.
    pub id: String,
    /// The database.
    pub db: String,
    /// The table.
    pub table: String,
    /// What happened.
    pub op: Operation,
    /// The row's key, by column.
    pub key: Map<String, Json>,
    /// The whole row as it is now, key included; absent if it is gone, or too large to be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new: Option<Map<String, Json>>,
    /// The columns that the latest write changed, if it was an update.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changed: Vec<String>,
    /// The row is larger than what one message may hold: read it in the file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub too_large: bool,
    /// The latest write: sorts as text in the order of writes.
    pub version: String,
    /// When that was, in milliseconds since 1970, by its writer's clock.
    pub at_ms: u64,
    /// The node that wrote it, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Where a reader that has taken in this change goes on.
    pub cursor: String,
}

/// How far a reader of a file's changes has come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cursor {
    /// The incarnation of the file that was read; none before the first reading.
    pub site: Option<SiteId>,
    /// The file's counter up to which all was told.
    pub lsn: i64,
    /// All that this covers was told.
    pub vector: Vector,
    /// Up to this number, what `vector` covers is left out: the file is another incarnation than the one read before.
    #[serde(default)]
    pub again_upto: i64,
}

impl Cursor {
    /// As it is written in a change. It says nothing of what other incarnations of the file had.
    pub fn text(site: SiteId, lsn: i64) -> String {
        format!("{site}-{lsn}")
    }

    /// Reads what [`Cursor::text`] wrote, or `0` for everything that is known.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "0" {
            return Some(Self::default());
        }
        let (site, lsn) = text.split_once('-')?;
        let site = SiteId(u64::from_str_radix(site, 16).ok().filter(|_| site.len() == 16)?);
        Some(Self { site: Some(site), lsn: lsn.parse().ok().filter(|n| *n >= 0)?, ..Self::default() })
    }
}

/// The id of a row's state: by the names that table and columns have on the wire, which are the same on every node.
pub fn id(
    db: &str,
    table: &str,
    key: &[ValueRef<'_>],
    state: &RowState,
    column: impl Fn(u32) -> Option<String>,
) -> String {
    let mut hash = blake3::Hasher::new_derive_key("litemesh change of a row");
    let mut part = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_be_bytes()).update(bytes);
    };
    let version = |v: Version| [v.hlc.0.to_be_bytes(), v.site.0.to_be_bytes()].concat();
    part(db.as_bytes());
    part(table.as_bytes());
    for value in key {
        part(to_json(*value).to_string().as_bytes());
    }
    part(&version(state.birth));
    part(&state.dead.map(version).unwrap_or_default());
    // Columns have other numbers on other nodes, and so another order.
    let columns = state.columns.iter().filter(|_| state.dead.is_none());
    let columns: BTreeMap<String, Version> = columns.filter_map(|(c, v)| Some((column(*c)?, *v))).collect();
    for (name, written) in &columns {
        part(name.as_bytes());
        part(&version(*written));
    }
    hash.finalize().to_hex()[..32].to_owned()
}

/// A value as JSON. What JSON, or a reader that has only doubles, cannot hold exactly is an object that says its type.
pub fn to_json(value: ValueRef<'_>) -> Json {
    match value {
        ValueRef::Null => Json::Null,
        ValueRef::Int(i) if i.unsigned_abs() <= MAX_EXACT => json!(i),
        ValueRef::Int(i) => json!({ "int": i.to_string() }),
        ValueRef::Real(r) if r.is_finite() => json!(r),
        ValueRef::Real(r) => json!({ "real": r.to_string() }),
        ValueRef::Text(b) => match std::str::from_utf8(b) {
            Ok(text) => json!(text),
            Err(_) => json!({ "text": STANDARD.encode(b) }),
        },
        ValueRef::Blob(b) => json!({ "blob": STANDARD.encode(b) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::version::Hlc;

    fn at(h: u64, s: u64) -> Version {
        Version { hlc: Hlc(h), site: SiteId(s) }
    }

    #[test]
    fn values_are_exact_or_say_what_they_are() {
        let told = |v| to_json(v).to_string();
        assert_eq!(told(ValueRef::Int(9_007_199_254_740_991)), "9007199254740991");
        assert_eq!(told(ValueRef::Int(-9_007_199_254_740_992)), r#"{"int":"-9007199254740992"}"#);
        assert_eq!(told(ValueRef::Int(i64::MIN)), r#"{"int":"-9223372036854775808"}"#);
        assert_eq!(told(ValueRef::Real(1.0)), "1.0");
        assert_eq!(told(ValueRef::Real(f64::NEG_INFINITY)), r#"{"real":"-inf"}"#);
        assert_eq!(told(ValueRef::Text("ä\n".as_bytes())), r#""ä\n""#);
        assert_eq!(told(ValueRef::Text(&[0xff])), r#"{"text":"/w=="}"#);
        assert_eq!(told(ValueRef::Blob(b"ab")), r#"{"blob":"YWI="}"#);
        assert_eq!(told(ValueRef::Null), "null");
    }

    #[test]
    fn an_id_depends_on_the_state_and_on_nothing_else() {
        let key = [ValueRef::Int(1)];
        let mut state = RowState::born(at(5, 1));
        let one = |s: &RowState| id("app", "t", &key, s, |c| Some(format!("c{c}")));
        let born = one(&state);
        assert_eq!(one(&state), born);
        assert_ne!(id("app", "u", &key, &state, |_| None), born);
        assert_ne!(id("app", "t", &[ValueRef::Text(b"1")], &state, |_| None), born);
        state.columns = [(0, at(6, 1)), (1, at(7, 2))].into();
        let here = one(&state);
        assert_ne!(here, born);
        // Another node has numbered the columns the other way round.
        state.columns = [(1, at(6, 1)), (0, at(7, 2))].into();
        assert_eq!(id("app", "t", &key, &state, |c| Some(format!("c{}", 1 - c))), here);
        assert_eq!((Operation::of(&state), latest(&state)), (Operation::Update, at(7, 2)));
        state.dead = Some(at(6, 3));
        assert_eq!((Operation::of(&state), latest(&state)), (Operation::Delete, at(6, 3)));
    }

    #[test]
    fn a_cursor_comes_back_from_its_text() {
        let text = Cursor::text(SiteId(0xab), 17);
        let cursor = Cursor::parse(&text).expect("a cursor");
        assert_eq!((cursor.site, cursor.lsn), (Some(SiteId(0xab)), 17));
        assert_eq!(Cursor::parse("0"), Some(Cursor::default()));
        for wrong in ["", "1", "ab-1", "00000000000000ab", "00000000000000ab--1", "00000000000000xx-1"] {
            assert_eq!(Cursor::parse(wrong), None, "{wrong}");
        }
    }
}
