//! Tables that keep both rows of an id collision: the SQL under [`core::rekey`](crate::core::rekey). Invariant: what
//! is shown (ids of rows, ids that columns refer to) is made from row states and can be made again; a write of ours
//! that only shows things differently is no write of the application's, and is told to nobody.
//!
//! A row that had to make room is shown under another id; `__litemesh_moved_N` has its own. For a column that refers
//! to such a table, `__litemesh_refs_N` has which incarnation is meant; on the wire and in merges the column's value
//! is that row's own id. References to rows that are not here yet are in `__litemesh_waiting`. None of this exists in
//! a file that has no such table.

mod begin;
mod follow;
mod links;
mod own;
mod places;
mod whereabouts;

pub use begin::TABLES;
pub(super) use begin::refresh;
pub(super) use follow::Moves;
pub(super) use links::{Link, Links};
pub(super) use whereabouts::{Finder, Whereabouts};
