//! The merge of two states of one row. Invariant: commutative, associative, idempotent; no clock, no I/O.
//!
//! 1. Different births: the later birth wins whole.
//! 2. Same birth: dead wins (of two deaths the later version is kept, and the later successor: `core::rekey`).
//! 3. Both alive: column by column, the later version wins; equal versions with different values, which only a
//!    fault can leave behind, are settled by the greater value.

use std::collections::BTreeMap;

use super::value::Value;
use super::version::Version;

/// A column of one table in one file: a small number that is never used again for another column.
pub type ColumnId = u32;

/// What is known of one key besides its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowState {
    /// The version of the INSERT that made this incarnation of the row.
    pub birth: Version,
    /// The version of its DELETE.
    pub dead: Option<Version>,
    /// Versions of the columns written since birth; an absent one has the birth's.
    pub columns: BTreeMap<ColumnId, Version>,
}

impl RowState {
    /// A row that was there when the file was adopted, untouched since.
    pub const ADOPTED: Self = Self::born(Version::ZERO);

    /// A row as its INSERT left it.
    pub const fn born(birth: Version) -> Self {
        Self { birth, dead: None, columns: BTreeMap::new() }
    }

    /// The version of one column.
    pub fn column(&self, column: ColumnId) -> Version {
        self.columns.get(&column).copied().unwrap_or(self.birth)
    }

    /// Every version the state is made of.
    pub fn versions(&self) -> impl Iterator<Item = Version> + '_ {
        [Some(self.birth), self.dead].into_iter().flatten().chain(self.columns.values().copied())
    }
}

/// A row: its state and, if it is alive, its values without the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Birth, death and versions.
    pub state: RowState,
    /// The values by column; a column that the row's writer did not know is absent.
    pub values: BTreeMap<ColumnId, Value>,
}

/// Merges two states of one key.
pub fn merge(ours: &Row, theirs: &Row) -> Row {
    if ours.state.birth != theirs.state.birth {
        let later = if ours.state.birth > theirs.state.birth { ours } else { theirs };
        return later.clone();
    }
    let birth = ours.state.birth;
    if let Some(dead) = ours.state.dead.max(theirs.state.dead) {
        let state = RowState { dead: Some(dead), columns: graves(ours, theirs), ..RowState::born(birth) };
        return Row { state, values: BTreeMap::new() };
    }
    let mut merged = Row { state: RowState::born(birth), values: BTreeMap::new() };
    let columns = [ours, theirs].into_iter().flat_map(|r| r.values.keys().chain(r.state.columns.keys()));
    for &column in columns.collect::<std::collections::BTreeSet<_>>() {
        let (version, value) = merge_column(ours, theirs, column);
        if version != birth {
            merged.state.columns.insert(column, version);
        }
        if let Some(value) = value {
            merged.values.insert(column, value.clone());
        }
    }
    merged
}

/// What tombstones say besides their death: the latest of each. Columns of the living have no part in it.
fn graves(ours: &Row, theirs: &Row) -> BTreeMap<ColumnId, Version> {
    let mut columns = BTreeMap::new();
    for row in [ours, theirs].into_iter().filter(|r| r.state.dead.is_some()) {
        for (column, version) in &row.state.columns {
            let latest = columns.entry(*column).or_insert(*version);
            *latest = *version.max(latest);
        }
    }
    columns
}

fn merge_column<'a>(ours: &'a Row, theirs: &'a Row, column: ColumnId) -> (Version, Option<&'a Value>) {
    let a = (ours.state.column(column), ours.values.get(&column));
    let b = (theirs.state.column(column), theirs.values.get(&column));
    // Version first; a value that is there beats one that its writer did not know; then the greater value.
    a.max(b)
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod histories;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::core::version::{Hlc, SiteId};

    fn version() -> impl Strategy<Value = Version> {
        (0u64..6, 1u64..4).prop_map(|(h, s)| match h {
            0 => Version::ZERO,
            _ => Version { hlc: Hlc(h), site: SiteId(s) },
        })
    }

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            (-2i64..3).prop_map(Value::Int),
            prop_oneof![Just(0.0), Just(-0.0), Just(1.0), Just(f64::INFINITY)].prop_map(Value::Real),
            prop::collection::vec(any::<u8>(), 0..3).prop_map(Value::Text),
            prop::collection::vec(any::<u8>(), 0..3).prop_map(Value::Blob),
        ]
    }

    /// Rows as nodes can hold them: a column's version is never before the birth, a dead row has no values.
    fn row() -> impl Strategy<Value = Row> {
        let values = prop::collection::btree_map(0u32..4, value(), 0..4);
        let columns = prop::collection::btree_map(0u32..4, version(), 0..4);
        (version(), prop::option::of(version()), columns, values).prop_map(
            |(birth, dead, mut columns, values)| {
                columns.retain(|_, v| *v > birth);
                match dead {
                    Some(d) => {
                        Row { state: RowState { birth, dead: Some(d), columns }, values: BTreeMap::new() }
                    }
                    None => Row { state: RowState { birth, dead: None, columns }, values },
                }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]

        #[test]
        fn merge_is_commutative(a in row(), b in row()) {
            prop_assert_eq!(merge(&a, &b), merge(&b, &a));
        }

        #[test]
        fn merge_is_associative(a in row(), b in row(), c in row()) {
            prop_assert_eq!(merge(&merge(&a, &b), &c), merge(&a, &merge(&b, &c)));
        }

        #[test]
        fn merge_is_idempotent(a in row(), b in row()) {
            prop_assert_eq!(merge(&a, &a), a.clone());
            let ab = merge(&a, &b);
            prop_assert_eq!(merge(&ab, &b), ab.clone());
            prop_assert_eq!(merge(&ab, &a), ab);
        }
    }

    fn at(h: u64, s: u64) -> Version {
        Version { hlc: Hlc(h), site: SiteId(s) }
    }

    #[test]
    fn two_writers_of_different_columns_both_win() {
        let base =
            Row { state: RowState::born(at(1, 1)), values: [(0, Value::Int(0)), (1, Value::Int(0))].into() };
        let mut a = base.clone();
        a.state.columns.insert(0, at(2, 1));
        a.values.insert(0, Value::Int(10));
        let mut b = base;
        b.state.columns.insert(1, at(3, 2));
        b.values.insert(1, Value::Int(20));
        assert_eq!(merge(&a, &b).values, [(0, Value::Int(10)), (1, Value::Int(20))].into());
    }

    #[test]
    fn a_delete_beats_a_concurrent_update_and_a_later_insert_beats_both() {
        let mut updated = Row { state: RowState::born(at(1, 1)), values: [(0, Value::Int(1))].into() };
        updated.state.columns.insert(0, at(9, 1));
        let deleted =
            Row { state: RowState { dead: Some(at(2, 2)), ..RowState::born(at(1, 1)) }, values: [].into() };
        assert!(merge(&updated, &deleted).state.dead.is_some());
        let reborn = Row { state: RowState::born(at(10, 2)), values: [(0, Value::Int(7))].into() };
        assert_eq!(merge(&merge(&updated, &deleted), &reborn), reborn);
    }
}
