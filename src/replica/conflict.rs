//! Writes that lost: what of a merge is a conflict, and keeping it. Invariant: only concurrent losers are kept;
//! losing to a write that had seen the loser is history.

use std::collections::BTreeMap;

use super::Result;
use super::plan::Plan;
use super::store::Store;
use crate::core::capture::{CONFLICTS, OP_INSERT};
use crate::core::merge::{ColumnId, Row};
use crate::core::value::{Value, ValueRef};
use crate::core::version::Version;

/// What kind of loss it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Two rows were inserted under one key.
    Row,
    /// The row was deleted while columns of it were written.
    Delete,
    /// The same columns were written twice.
    Column,
    /// A UNIQUE constraint that no single writer broke.
    Unique,
}

impl Kind {
    /// The word stored and shown.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Row => "row",
            Kind::Delete => "delete",
            Kind::Column => "column",
            Kind::Unique => "unique",
        }
    }
}

/// A loser: its values, and who beat it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// What kind of loss.
    pub kind: Kind,
    /// The values that lost.
    pub values: BTreeMap<ColumnId, Value>,
    /// The newest version among them.
    pub loser: Version,
    /// The version that won.
    pub winner: Version,
}

/// Finds what was lost when `ours` and `theirs` were merged. `they_saw` tells whether the incoming state's writer had
/// seen a version, `we_saw` whether this file had.
pub fn losses(
    ours: &Row,
    theirs: &Row,
    they_saw: &dyn Fn(Version) -> bool,
    we_saw: &dyn Fn(Version) -> bool,
) -> Vec<Loss> {
    let newest = |row: &Row| row.state.versions().max().unwrap_or(Version::ZERO);
    if ours.state.birth != theirs.state.birth {
        let ours_lost = ours.state.birth < theirs.state.birth;
        let (loser, winner) = if ours_lost { (ours, theirs) } else { (theirs, ours) };
        let version = newest(loser);
        let seen = if ours_lost { they_saw(version) } else { we_saw(version) };
        if seen || loser.state.dead.is_some() || loser.values == winner.values {
            return Vec::new();
        }
        let winner = winner.state.birth;
        return vec![Loss { kind: Kind::Row, values: loser.values.clone(), loser: version, winner }];
    }
    let (loser, dead, seen) = match (ours.state.dead, theirs.state.dead) {
        (Some(_), Some(_)) => return Vec::new(),
        (None, None) => return column_losses(ours, theirs, they_saw, we_saw),
        (Some(dead), None) => (theirs, dead, we_saw),
        (None, Some(dead)) => (ours, dead, they_saw),
    };
    let version = newest(loser);
    if version == loser.state.birth || seen(version) {
        return Vec::new();
    }
    vec![Loss { kind: Kind::Delete, values: loser.values.clone(), loser: version, winner: dead }]
}

fn column_losses(
    ours: &Row,
    theirs: &Row,
    they_saw: &dyn Fn(Version) -> bool,
    we_saw: &dyn Fn(Version) -> bool,
) -> Vec<Loss> {
    let mut lost: BTreeMap<(Version, Version), BTreeMap<ColumnId, Value>> = BTreeMap::new();
    for (column, our_value) in &ours.values {
        let Some(their_value) = theirs.values.get(column) else { continue };
        let (a, b) = (ours.state.column(*column), theirs.state.column(*column));
        if a == b || our_value == their_value {
            continue;
        }
        let (loser, winner, value, seen) =
            if a < b { (a, b, our_value, they_saw(a)) } else { (b, a, their_value, we_saw(b)) };
        if !seen {
            lost.entry((loser, winner)).or_default().insert(*column, value.clone());
        }
    }
    let loss = |((loser, winner), values)| Loss { kind: Kind::Column, values, loser, winner };
    lost.into_iter().map(loss).collect()
}

impl Store {
    /// Keeps a loser. The same conflict, seen again or on another node, is the same entry.
    pub(super) fn keep_conflict(&mut self, plan: &Plan, key: &[ValueRef<'_>], loss: &Loss) -> Result<()> {
        let key = json_array(key.iter().copied());
        let version = |v: Version| format!("{:016x}-{}", v.hlc.0, v.site);
        let (winner, loser) = (version(loss.winner), version(loss.loser));
        let mut hash = blake3::Hasher::new();
        for part in [plan.table.name.as_str(), &key, loss.kind.word(), &winner, &loser] {
            hash.update(&(part.len() as u64).to_be_bytes()).update(part.as_bytes());
        }
        let id = hash.finalize();
        let name = |c: &ColumnId| plan.table.columns.iter().find(|p| p.id == *c).map(|p| p.name.clone());
        let values = loss.values.iter().filter_map(|(c, v)| Some((name(c)?, json(v.as_ref()))));
        let values = serde_json::Value::Object(values.collect()).to_string();
        let sql = "INSERT OR IGNORE INTO __litemesh_conflicts(id, tbl, key, kind, loser, winner_version,
                   loser_version, at_ms) VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
        let at_ms = loss.winner.hlc.max(loss.loser.hlc).ms() as i64;
        let id = &id.as_bytes()[..16];
        let params =
            rusqlite::params![id, plan.table.name, key, loss.kind.word(), values, winner, loser, at_ms];
        if self.conn.prepare_cached(sql)?.execute(params)? > 0
            && let Some(conflicts) = self.plan(CONFLICTS)
        {
            self.log_own(&conflicts, &[Value::Blob(id.to_vec())], OP_INSERT, &[])?;
        }
        Ok(())
    }
}

fn json_array<'a>(values: impl Iterator<Item = ValueRef<'a>>) -> String {
    serde_json::Value::Array(values.map(json).collect()).to_string()
}

/// A value as JSON that can be turned back: what JSON has no form for is an object that says its type.
pub fn json(value: ValueRef<'_>) -> serde_json::Value {
    use serde_json::json;
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    match value {
        ValueRef::Null => serde_json::Value::Null,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::merge::RowState;
    use crate::core::version::{Hlc, SiteId};

    fn at(h: u64, s: u64) -> Version {
        Version { hlc: Hlc(h), site: SiteId(s) }
    }

    fn row(birth: Version, columns: &[(u32, Version, i64)]) -> Row {
        let state = RowState {
            columns: columns.iter().filter(|c| c.1 != birth).map(|c| (c.0, c.1)).collect(),
            ..RowState::born(birth)
        };
        Row { state, values: columns.iter().map(|c| (c.0, Value::Int(c.2))).collect() }
    }

    #[test]
    fn a_write_that_had_seen_the_loser_is_no_conflict() {
        let (a, b) = (row(at(1, 1), &[(0, at(2, 1), 7)]), row(at(1, 1), &[(0, at(3, 2), 8)]));
        assert_eq!(losses(&a, &b, &|_| true, &|_| false), []);
        let lost = losses(&a, &b, &|_| false, &|_| false);
        assert_eq!((lost[0].kind, lost[0].values[&0].clone()), (Kind::Column, Value::Int(7)));
    }

    #[test]
    fn the_loser_is_found_when_it_arrives_last() {
        let (a, b) = (row(at(1, 1), &[(0, at(2, 1), 7)]), row(at(1, 1), &[(0, at(3, 2), 8)]));
        assert_eq!(losses(&b, &a, &|_| true, &|_| false)[0].values[&0], Value::Int(7));
        assert_eq!(losses(&b, &a, &|_| true, &|_| true), []);
    }

    #[test]
    fn equal_rows_inserted_twice_are_one_row() {
        let (a, b) = (row(at(1, 1), &[(0, at(1, 1), 7)]), row(at(2, 2), &[(0, at(2, 2), 7)]));
        assert_eq!(losses(&a, &b, &|_| false, &|_| false), []);
        let c = row(at(2, 2), &[(0, at(2, 2), 9)]);
        assert_eq!(losses(&a, &c, &|_| false, &|_| false)[0].kind, Kind::Row);
    }
}
