//! What of a merge is a conflict. Invariant: only writes that the winner had not seen are losses; losing to a write
//! that had seen the loser is history, and a value that is there anyway is not lost.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::merge::{ColumnId, Row};
use super::value::Value;
use super::version::Version;

/// What kind of loss it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The same column was written twice.
    Column,
    /// The row was deleted, or inserted anew, while columns of it were written.
    Delete,
    /// A UNIQUE constraint that no single writer broke.
    Unique,
    /// Two rows were inserted under one key.
    Row,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Column, Self::Delete, Self::Unique, Self::Row];

    /// The word stored and shown.
    pub fn word(self) -> &'static str {
        match self {
            Self::Column => "column",
            Self::Delete => "delete",
            Self::Unique => "unique",
            Self::Row => "row",
        }
    }
}

/// A loser: what was lost, and who beat it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// What kind of loss.
    pub kind: Kind,
    /// The incarnation of the row that lost, or whose columns did.
    pub birth: Version,
    /// The columns whose writes were lost, each with its version.
    pub lost: BTreeMap<ColumnId, Version>,
    /// Whether the row itself is gone.
    pub whole_row: bool,
    /// Their values; if the row itself is gone, those of all its columns.
    pub values: BTreeMap<ColumnId, Value>,
    /// Versions of the columns in `values`.
    pub versions: BTreeMap<ColumnId, Version>,
    /// The version that won.
    pub winner: Version,
}

impl Loss {
    /// The loss of these columns of a row that is gone: all its values are kept, so that it can come back.
    pub fn of_row(kind: Kind, row: &Row, lost: BTreeMap<ColumnId, Version>, winner: Version) -> Self {
        let versions = all_versions(row);
        let (birth, values) = (row.state.birth, row.values.clone());
        Self { kind, birth, lost, whole_row: true, values, versions, winner }
    }

    /// The loss of columns of a row that goes on without them.
    pub fn of_columns(kind: Kind, birth: Version, winner: Version) -> Self {
        let (lost, values, versions) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { kind, birth, lost, whole_row: false, values, versions, winner }
    }

    /// Adds a column.
    pub fn add(&mut self, column: ColumnId, version: Version, value: &Value) {
        self.lost.insert(column, version);
        self.versions.insert(column, version);
        self.values.insert(column, value.clone());
    }

    /// The newest version that was lost.
    pub fn loser(&self) -> Version {
        self.lost.values().max().copied().unwrap_or(self.birth)
    }
}

/// The version of every value of a row.
pub fn all_versions(row: &Row) -> BTreeMap<ColumnId, Version> {
    row.values.keys().map(|c| (*c, row.state.column(*c))).collect()
}

/// Finds what was lost when `ours` and `theirs` were merged. `they_saw` tells whether the incoming state's writer had
/// seen a version, `we_saw` whether this file had.
///
/// It is enough to ask this of each pair of states that meet: whoever had seen both sides of a conflict before is,
/// or has heard from, a node where they met.
pub fn losses(
    ours: &Row,
    theirs: &Row,
    they_saw: &dyn Fn(Version) -> bool,
    we_saw: &dyn Fn(Version) -> bool,
) -> Vec<Loss> {
    if ours.state.birth == theirs.state.birth {
        return match (ours.state.dead, theirs.state.dead) {
            (Some(_), Some(_)) => Vec::new(),
            (None, None) => column_losses(ours, theirs, they_saw, we_saw),
            (Some(dead), None) => row_losses(theirs, ours, dead, we_saw),
            (None, Some(dead)) => row_losses(ours, theirs, dead, they_saw),
        };
    }
    match ours.state.birth < theirs.state.birth {
        true => row_losses(ours, theirs, theirs.state.birth, they_saw),
        false => row_losses(theirs, ours, ours.state.birth, we_saw),
    }
}

/// The incarnation that had to give way to one whose writer had not seen it, whether anything was lost or not.
pub fn displaced(
    ours: &Row,
    theirs: &Row,
    they_saw: &dyn Fn(Version) -> bool,
    we_saw: &dyn Fn(Version) -> bool,
) -> Option<Version> {
    let (a, b) = (ours.state.birth, theirs.state.birth);
    match a.cmp(&b) {
        Ordering::Equal => None,
        Ordering::Less => (!they_saw(a)).then_some(a),
        Ordering::Greater => (!we_saw(b)).then_some(b),
    }
}

/// What is lost of `loser`, an incarnation that died or gave way to a later one.
fn row_losses(loser: &Row, winner: &Row, by: Version, seen: &dyn Fn(Version) -> bool) -> Vec<Loss> {
    if loser.state.dead.is_some() {
        return Vec::new();
    }
    let mut lost = all_versions(loser);
    let kind = match seen(loser.state.birth) {
        true => Kind::Delete,
        // A row that is the same in all columns is the same row.
        false if winner.state.dead.is_none() && loser.values == winner.values => return Vec::new(),
        false => Kind::Row,
    };
    if kind == Kind::Delete {
        let there = |c: &ColumnId| winner.state.dead.is_none() && loser.values.get(c) == winner.values.get(c);
        lost.retain(|c, v| !seen(*v) && !there(c));
        if lost.is_empty() {
            return Vec::new();
        }
    }
    vec![Loss::of_row(kind, loser, lost, by)]
}

fn column_losses(
    ours: &Row,
    theirs: &Row,
    they_saw: &dyn Fn(Version) -> bool,
    we_saw: &dyn Fn(Version) -> bool,
) -> Vec<Loss> {
    let mut found: BTreeMap<(Version, Version), Loss> = BTreeMap::new();
    for (column, our_value) in &ours.values {
        let Some(their_value) = theirs.values.get(column) else { continue };
        let (a, b) = (ours.state.column(*column), theirs.state.column(*column));
        if a == b || our_value == their_value {
            continue;
        }
        let (loser, winner, value, seen) =
            if a < b { (a, b, our_value, they_saw(a)) } else { (b, a, their_value, we_saw(b)) };
        if seen {
            continue;
        }
        let new = || Loss::of_columns(Kind::Column, ours.state.birth, winner);
        found.entry((loser, winner)).or_insert_with(new).add(*column, loser, value);
    }
    found.into_values().collect()
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

    fn dead(birth: Version, at: Version) -> Row {
        Row { state: RowState { dead: Some(at), ..RowState::born(birth) }, values: BTreeMap::new() }
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

    #[test]
    fn each_column_that_was_not_seen_is_a_loss_whatever_is_newest() {
        // Column 0 at 2 was not seen by who deleted, column 1 at 5, the newest, was.
        let ours = row(at(1, 1), &[(0, at(2, 3), 7), (1, at(5, 1), 8), (2, at(1, 1), 9)]);
        let saw = |v: Version| v.site == SiteId(1);
        let lost = losses(&ours, &dead(at(1, 1), at(9, 2)), &saw, &|_| true);
        assert_eq!((lost.len(), lost[0].kind, lost[0].winner), (1, Kind::Delete, at(9, 2)));
        assert_eq!(lost[0].lost, BTreeMap::from([(0, at(2, 3))]));
        assert_eq!(lost[0].values.len(), 3, "the whole row is kept, so that it can come back");
        assert_eq!(lost[0].versions[&1], at(5, 1));
        // The same by a later incarnation whose writer had seen the row and not that column.
        let anew = row(at(9, 2), &[(0, at(9, 2), 1), (1, at(9, 2), 1), (2, at(9, 2), 1)]);
        assert_eq!(losses(&ours, &anew, &saw, &|_| true)[0].lost, BTreeMap::from([(0, at(2, 3))]));
        // There with the same value, it is not lost.
        let same = row(at(9, 2), &[(0, at(9, 2), 7), (1, at(9, 2), 1), (2, at(9, 2), 1)]);
        assert_eq!(losses(&ours, &same, &saw, &|_| true), []);
    }

    #[test]
    fn an_insert_that_was_not_seen_is_lost_whole() {
        let ours = row(at(3, 1), &[(0, at(3, 1), 7), (1, at(4, 1), 8)]);
        let lost =
            losses(&ours, &row(at(5, 2), &[(0, at(5, 2), 7), (1, at(5, 2), 9)]), &|_| false, &|_| true);
        assert_eq!((lost[0].kind, lost[0].lost.len(), lost[0].loser()), (Kind::Row, 2, at(4, 1)));
        // Two writers of one row, two winners: a loss each.
        let (a, b) = (
            row(at(1, 1), &[(0, at(2, 1), 1), (1, at(2, 1), 1)]),
            row(at(1, 1), &[(0, at(3, 2), 2), (1, at(4, 3), 2)]),
        );
        assert_eq!(losses(&a, &b, &|_| false, &|_| true).len(), 2);
    }
}
