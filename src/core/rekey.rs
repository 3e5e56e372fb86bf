//! Keeping both rows of an id collision. Invariant: where a row is shown is a function of the set of incarnations
//! that a file knows, whatever the order in which it came to know them.
//!
//! What is replicated of a table whose ids may collide is not a map from id to row, but one from *incarnation* (the
//! id that the writer used, and the birth) to row; it only grows, and each entry is merged by [`merge`](super::merge)
//! alone. Each incarnation, dead or alive, has a way: its own id, then [`next_place`] of that, and so on. At each
//! place the one that ranks highest (the latest birth) stays, and all others go on. That is deferred acceptance with
//! one order of preference for all, whose outcome does not depend on who comes first (Gale and Shapley, 1962).
//!
//! A tombstone needs its place as much as a living row: a living state of that incarnation that arrives later must
//! meet it. It may name its *successor*, the row that was put in its place by a writer who had seen it; references to
//! the dead row go on to that one, as they do in a file that nobody else writes.

use std::collections::BTreeMap;

use super::merge::{ColumnId, Row, RowState};
use super::version::Version;

/// The column under which a tombstone keeps its successor's birth.
pub const SUCCESSOR: ColumnId = ColumnId::MAX;

/// Moved rows have ids from here down: no application counts to there, and a double holds all of them exactly.
const FIRST_MOVED: i64 = -(1 << 52);

/// A chain of successors or places longer than this is a fault: a peer's states decide how long one is.
const MAX_STEPS: usize = 100_000;

/// One row from its INSERT to its DELETE, whatever id it is shown under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation {
    /// The id that its writer gave it.
    pub origin: i64,
    /// The version of its INSERT.
    pub birth: Version,
}

impl Incarnation {
    /// Whether this one stays at a place that both come to.
    pub fn ranks_above(&self, other: &Self) -> bool {
        (self.birth, self.origin) > (other.birth, other.origin)
    }

    /// Whether it was there at adoption: such a row never moves. All files had it, so that whoever used its id again
    /// had it deleted.
    pub fn is_adopted(&self) -> bool {
        self.birth == Version::ZERO
    }
}

/// Whether an id may be that of a moved row.
pub fn may_be_moved(id: i64) -> bool {
    id <= FIRST_MOVED
}

/// Where an incarnation born at `birth` goes on to when it cannot stay at `place`. Part of what all nodes must agree
/// on: it never changes.
pub fn next_place(place: i64, birth: Version) -> i64 {
    let mut hash = mix(place as u64);
    hash = mix(hash ^ birth.hlc.0);
    hash = mix(hash ^ birth.site.0);
    FIRST_MOVED - (hash >> 12) as i64
}

/// One round of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// Who is at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Occupant {
    /// Which row it is.
    pub incarnation: Incarnation,
    /// The successor, if it is dead and has one.
    pub successor: Option<Version>,
}

/// A successor as a row's state tells it.
pub fn successor(state: &RowState) -> Option<Version> {
    state.dead.and(state.columns.get(&SUCCESSOR).copied())
}

/// The state of a row whose id the row born at `by` was given while the writer looked on.
pub fn succeeded(before: &RowState, by: Version) -> RowState {
    let columns = BTreeMap::from([(SUCCESSOR, by)]);
    RowState { dead: before.dead.or(Some(by)), columns, ..RowState::born(before.birth) }
}

/// Where an incarnation is, or would be if it came now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spot {
    /// The place.
    pub place: i64,
    /// The incarnation itself, if it is there already.
    pub held: Option<Occupant>,
}

/// The places of one table.
pub trait Places {
    /// Why a place cannot be looked at.
    type Error;

    /// Who is at a place.
    fn occupant(&mut self, place: i64) -> Result<Option<Occupant>, Self::Error>;
}

/// The places of one table, with their rows.
pub trait Homes: Places {
    /// What is known of a row.
    type Row;

    /// Merges a row into the one of the same incarnation that is at `place`.
    fn merge_at(&mut self, place: i64, row: Self::Row) -> Result<(), Self::Error>;

    /// Puts a row at a place, and gives back what was there.
    fn exchange(
        &mut self,
        place: i64,
        incarnation: Incarnation,
        row: Self::Row,
    ) -> Result<Option<(Incarnation, Self::Row)>, Self::Error>;
}

/// Finds the place of an incarnation.
pub fn locate<P: Places>(places: &mut P, wanted: Incarnation) -> Result<Spot, P::Error> {
    let mut place = wanted.origin;
    for _ in 0..MAX_STEPS {
        match places.occupant(place)? {
            Some(held) if held.incarnation == wanted => return Ok(Spot { place, held: Some(held) }),
            Some(other) if other.incarnation.ranks_above(&wanted) => {
                place = next_place(place, wanted.birth);
            }
            _ => break,
        }
    }
    Ok(Spot { place, held: None })
}

/// Where a reference leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The id to show for it.
    pub id: i64,
    /// Whether all rows on the way there are known: else the id changes when the next of them arrives.
    pub known: bool,
}

/// The id under which a reference to an incarnation is shown: its place, or that of the row that took its id.
pub fn resolve<P: Places>(places: &mut P, wanted: Incarnation) -> Result<Target, P::Error> {
    follow(places, wanted, |_| {})
}

/// As [`resolve`]; tells the rows that the reference leads by, from the wanted one to the one that is shown.
pub fn follow<P: Places>(
    places: &mut P,
    wanted: Incarnation,
    mut visit: impl FnMut(Incarnation),
) -> Result<Target, P::Error> {
    let mut wanted = wanted;
    let mut spot = locate(places, wanted)?;
    for _ in 0..MAX_STEPS {
        visit(wanted);
        let Some(held) = spot.held else { return Ok(Target { id: spot.place, known: false }) };
        let Some(next) = held.successor.filter(|next| *next > wanted.birth) else { break };
        match find_heir(places, wanted, next, spot.place)? {
            Some(heir) => (wanted, spot) = heir,
            None => return Ok(Target { id: spot.place, known: false }),
        }
    }
    Ok(Target { id: spot.place, known: true })
}

/// The successor was given the id that the dead row had at the successor's writer: one of the places on its way, and
/// the last of them, if that writer's commit put rows at several.
fn find_heir<P: Places>(
    places: &mut P,
    dead: Incarnation,
    birth: Version,
    last: i64,
) -> Result<Option<(Incarnation, Spot)>, P::Error> {
    let mut way = vec![dead.origin];
    while way.last() != Some(&last) && way.len() < MAX_STEPS {
        way.extend(way.last().map(|place| next_place(*place, dead.birth)));
    }
    for origin in way.into_iter().rev() {
        let heir = Incarnation { origin, birth };
        let spot = locate(places, heir)?;
        if spot.held.is_some() {
            return Ok(Some((heir, spot)));
        }
    }
    Ok(None)
}

/// Takes in what is known of one incarnation: merges it with what is here, or gives it its place and sends on who
/// has to make room.
pub fn take_in<H: Homes>(homes: &mut H, incarnation: Incarnation, row: H::Row) -> Result<(), H::Error> {
    let (mut incarnation, mut row) = (incarnation, row);
    loop {
        let spot = locate(homes, incarnation)?;
        if incarnation.is_adopted() && spot.place != incarnation.origin {
            return Ok(());
        }
        if spot.held.is_some() {
            return homes.merge_at(spot.place, row);
        }
        match homes.exchange(spot.place, incarnation, row)? {
            Some((displaced, its)) => (incarnation, row) = (displaced, its),
            None => return Ok(()),
        }
    }
}

/// A row and which rows its columns refer to; the values of those columns are the origins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkedRow {
    /// State and values.
    pub row: Row,
    /// The rows referred to, by column.
    pub refs: BTreeMap<ColumnId, Incarnation>,
}

/// Merges two states of one incarnation; a reference goes with its column's value.
pub fn merge(ours: &LinkedRow, theirs: &LinkedRow) -> LinkedRow {
    let row = super::merge::merge(&ours.row, &theirs.row);
    let mut refs = BTreeMap::new();
    let born = |side: &LinkedRow| side.row.state.birth == row.state.birth;
    for side in [ours, theirs].into_iter().filter(|s| born(s) && row.state.dead.is_none()) {
        for (column, parent) in &side.refs {
            let same_write = side.row.state.column(*column) == row.state.column(*column)
                && side.row.values.get(column) == row.values.get(column);
            if same_write && refs.get(column).is_none_or(|other| parent.ranks_above(other)) {
                refs.insert(*column, *parent);
            }
        }
    }
    LinkedRow { row, refs }
}
