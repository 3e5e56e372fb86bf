//! Summaries of rows, and what two nodes' views of one row mean. Invariant: a difference is told only where no write
//! that is under way can explain it: equal versions with different content, or different versions that both sides
//! know of.

use serde::{Deserialize, Serialize};

use super::merge::RowState;
use super::rekey::Incarnation;
use super::schema::Table;
use super::value::ValueRef;
use super::vector::Vector;
use super::version::Version;

/// 128 bits of a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Hash(pub u64, pub u64);

/// Feeds a row into a hash, each part with its type and length.
#[derive(Default)]
pub struct RowHasher(blake3::Hasher);

impl RowHasher {
    /// Adds a value, exactly: 1 is not 1.0, text is not a blob, -0.0 is not 0.0.
    pub fn value(&mut self, value: ValueRef<'_>) {
        let mut fixed = |tag: u8, bits: u64| {
            let mut bytes = [tag; 9];
            bytes[1..].copy_from_slice(&bits.to_be_bytes());
            self.0.update(&bytes);
        };
        match value {
            ValueRef::Null => fixed(0, 0),
            ValueRef::Int(i) => fixed(1, i as u64),
            ValueRef::Real(r) => fixed(2, r.to_bits()),
            ValueRef::Text(b) => {
                fixed(3, b.len() as u64);
                self.0.update(b);
            }
            ValueRef::Blob(b) => {
                fixed(4, b.len() as u64);
                self.0.update(b);
            }
        }
    }

    /// Adds the versions of a row, columns by their place in the layout.
    pub fn state(&mut self, state: &SeenState) {
        self.version(state.birth);
        self.version(state.dead.unwrap_or(Version::ZERO));
        for (place, v) in &state.columns {
            self.version(*v);
            self.0.update(&place.to_be_bytes());
        }
    }

    /// Adds a row that is referred to, in place of the id under which it is shown.
    pub fn incarnation(&mut self, row: &Incarnation) {
        self.0.update(&[5; 9]);
        self.value(ValueRef::Int(row.origin));
        self.version(row.birth);
    }

    fn version(&mut self, v: Version) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&v.hlc.0.to_be_bytes());
        bytes[8..].copy_from_slice(&v.site.0.to_be_bytes());
        self.0.update(&bytes);
    }

    /// The hash; the hasher is empty again.
    pub fn finish(&mut self) -> Hash {
        let bytes = *self.0.finalize().as_bytes();
        self.0.reset();
        let half = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        Hash(half(0), half(8))
    }
}

/// A summary of rows that does not depend on their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Digest {
    /// How many rows.
    pub rows: u64,
    /// The sum of their hashes, each half for itself.
    pub sum: Hash,
}

impl Digest {
    /// Adds a row.
    pub fn add(&mut self, hash: Hash) {
        self.rows += 1;
        self.sum = Hash(self.sum.0.wrapping_add(hash.0), self.sum.1.wrapping_add(hash.1));
    }
}

/// What two tables must share for their rows to be compared: names without case, in an order of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The table's name.
    pub table: String,
    /// The key: name and collation.
    pub key: Vec<(String, String)>,
    /// The other columns, sorted.
    pub columns: Vec<String>,
}

impl Layout {
    /// The layout of a table, and where each of its sorted columns stands in the table's own list.
    pub fn of(table: &Table) -> (Self, Vec<usize>) {
        let mut order: Vec<usize> = (0..table.columns.len()).collect();
        order.sort_by_key(|i| table.columns[*i].name.to_ascii_lowercase());
        let key = table
            .key
            .iter()
            .map(|k| (k.name.to_ascii_lowercase(), k.collation.to_ascii_uppercase()))
            .collect();
        let columns = order.iter().map(|i| table.columns[*i].name.to_ascii_lowercase()).collect();
        (Self { table: table.name.to_ascii_lowercase(), key, columns }, order)
    }
}

/// A row's versions with columns by their place in the [`Layout`], which is the same on both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenState {
    /// See [`RowState::birth`].
    pub birth: Version,
    /// See [`RowState::dead`].
    pub dead: Option<Version>,
    /// Place and version of the columns written since birth.
    pub columns: Vec<(u32, Version)>,
}

impl SeenState {
    /// The state with columns by place; `order` and `table` as [`Layout::of`] has them.
    pub fn of(state: &RowState, table: &Table, order: &[usize]) -> Self {
        let mut columns = Vec::new();
        if !state.columns.is_empty() {
            for (place, i) in order.iter().enumerate() {
                if let Some(version) = state.columns.get(&table.columns[*i].id) {
                    columns.push((place as u32, *version));
                }
            }
        }
        Self { birth: state.birth, dead: state.dead, columns }
    }

    /// The state of a row that was there at adoption, untouched since.
    pub fn adopted() -> Self {
        Self { birth: Version::ZERO, dead: None, columns: Vec::new() }
    }

    fn versions(&self) -> impl Iterator<Item = Version> + '_ {
        [Some(self.birth), self.dead].into_iter().flatten().chain(self.columns.iter().map(|(_, v)| *v))
    }
}

/// One key as a node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Whether there is a row.
    pub present: bool,
    /// Its state, if it has one.
    pub state: Option<SeenState>,
    /// A hash of the key as the row spells it.
    pub key: u64,
    /// A hash of each column's value, in the layout's order.
    pub columns: Vec<u64>,
    /// Whether rows of the table keep out of each other's way (`core::rekey`): which row is under a key then depends on
    /// other rows, too.
    pub placed: bool,
}

impl Seen {
    /// Nothing is known of the key.
    pub const NOTHING: Self =
        Self { present: false, state: None, key: 0, columns: Vec::new(), placed: false };

    fn same_content(&self, other: &Self) -> bool {
        self.present == other.present
            && (!self.present || (self.key == other.key && self.columns == other.columns))
    }

    /// A state of its own, or that of a row from adoption.
    fn effective(&self) -> SeenState {
        self.state.clone().unwrap_or_else(SeenState::adopted)
    }

    /// Nodes with the same content have the same value here.
    pub fn content(&self) -> Option<(u64, &[u64])> {
        self.present.then_some((self.key, &self.columns[..]))
    }
}

/// How a row differs between two nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Difference {
    /// It is there, not here.
    MissingHere,
    /// It is here, not there.
    MissingThere,
    /// These columns differ, by place in the layout; none if the key is spelled differently.
    Columns(Vec<u32>),
    /// The content is the same, the versions are not.
    Versions,
}

/// What two views of one row mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// They are the same.
    Equal,
    /// A write that one side has not taken in yet may explain the difference.
    Unsettled,
    /// No write explains it.
    Differs(Difference),
}

/// Compares what two nodes see of one row, each with what it held at that moment. Both had absorbed everything.
pub fn judge(ours: &Seen, our_vector: &Vector, theirs: &Seen, their_vector: &Vector) -> Verdict {
    if !ours.present && !theirs.present {
        return Verdict::Equal;
    }
    let (a, b) = (ours.effective(), theirs.effective());
    // Who holds a version has merged it: if each side holds all of the other's, both came to the same state.
    let merged =
        || a.versions().all(|v| their_vector.covers(v)) && b.versions().all(|v| our_vector.covers(v));
    // Which of two rows is under a key follows from these and from rows that only one side may hold.
    let same_row = a.birth == b.birth || !(ours.placed || theirs.placed);
    let settled = a == b || (merged() && (same_row || our_vector == their_vector));
    if !settled {
        return Verdict::Unsettled;
    }
    let difference = match (ours.present, theirs.present) {
        (false, _) => Difference::MissingHere,
        (true, false) => Difference::MissingThere,
        (true, true) if ours.same_content(theirs) => {
            if a == b {
                return Verdict::Equal;
            }
            Difference::Versions
        }
        (true, true) => {
            let pairs = ours.columns.iter().zip(&theirs.columns).enumerate();
            Difference::Columns(pairs.filter(|(_, (a, b))| a != b).map(|(i, _)| i as u32).collect())
        }
    };
    Verdict::Differs(difference)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::vector::Point;
    use crate::core::version::{Hlc, SiteId};

    fn at(h: u64, s: u64) -> Version {
        Version { hlc: Hlc(h), site: SiteId(s) }
    }

    fn holds(site: u64, hlc: u64) -> Vector {
        Vector([(SiteId(site), Point { n: hlc, hlc: Hlc(hlc), id: hlc })].into())
    }

    fn row(state: Option<SeenState>, value: u64) -> Seen {
        Seen { present: true, state, key: 1, columns: vec![value], placed: false }
    }

    fn born(v: Version) -> Option<SeenState> {
        Some(SeenState { birth: v, ..SeenState::adopted() })
    }

    #[test]
    fn equal_versions_with_other_content_differ() {
        let none = Vector::default();
        let judged = judge(&row(None, 1), &none, &row(None, 2), &none);
        assert_eq!(judged, Verdict::Differs(Difference::Columns(vec![0])));
        assert_eq!(judge(&row(None, 1), &none, &row(None, 1), &none), Verdict::Equal);
        assert_eq!(
            judge(&row(None, 1), &none, &Seen::NOTHING, &none),
            Verdict::Differs(Difference::MissingThere)
        );
        let gone = Seen { state: born(at(5, 1)), ..Seen::NOTHING };
        let judged = judge(&gone, &none, &row(born(at(5, 1)), 1), &none);
        assert_eq!(judged, Verdict::Differs(Difference::MissingHere));
    }

    #[test]
    fn a_write_under_way_is_no_difference() {
        let (old, new) = (row(born(at(1, 1)), 1), row(born(at(9, 1)), 2));
        let (behind, ahead) = (holds(1, 1), holds(1, 9));
        assert_eq!(judge(&old, &behind, &new, &ahead), Verdict::Unsettled);
        assert_eq!(judge(&Seen::NOTHING, &behind, &new, &ahead), Verdict::Unsettled);
        // Held by both, and still not the same: something was lost.
        assert!(matches!(judge(&old, &ahead, &new, &ahead), Verdict::Differs(_)));
        assert!(matches!(judge(&Seen::NOTHING, &ahead, &new, &ahead), Verdict::Differs(_)));
        let same = row(born(at(9, 1)), 1);
        assert_eq!(judge(&old, &ahead, &same, &ahead), Verdict::Differs(Difference::Versions));
    }

    #[test]
    fn which_row_is_under_a_key_depends_on_rows_that_one_side_may_not_hold() {
        let (moved, nothing) = (row(born(at(1, 1)), 1), Seen { placed: true, ..Seen::NOTHING });
        let here = holds(1, 1);
        let mut there = here.clone();
        there.0.extend(holds(2, 5).0);
        assert_eq!(judge(&nothing, &here, &moved, &there), Verdict::Unsettled);
        assert_eq!(judge(&nothing, &there, &moved, &there), Verdict::Differs(Difference::MissingHere));
        // A row that is known here under this key, and gone.
        let gone = Seen { state: born(at(1, 1)), ..nothing };
        assert_eq!(judge(&gone, &here, &moved, &there), Verdict::Differs(Difference::MissingHere));
    }

    #[test]
    fn a_digest_knows_no_order_and_every_type() {
        let mut hasher = RowHasher::default();
        let values = [
            ValueRef::Null,
            ValueRef::Int(0),
            ValueRef::Real(0.0),
            ValueRef::Real(-0.0),
            ValueRef::Text(b""),
            ValueRef::Blob(b""),
            ValueRef::Text(b"a"),
        ];
        let hashes: Vec<Hash> = values
            .iter()
            .map(|v| {
                hasher.value(*v);
                hasher.finish()
            })
            .collect();
        for (i, a) in hashes.iter().enumerate() {
            assert!(hashes[..i].iter().all(|b| a != b), "{:?}", values[i]);
        }
        let (mut forth, mut back) = (Digest::default(), Digest::default());
        hashes.iter().for_each(|h| forth.add(*h));
        hashes.iter().rev().for_each(|h| back.add(*h));
        assert_eq!(forth, back);
        back.add(hashes[0]);
        assert_ne!(forth, back);
    }
}
