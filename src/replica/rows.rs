//! Rows of the file into frames. Invariant: state and values of a row are read by one statement.

use std::sync::Arc;

use rusqlite::Connection;

use super::Result;
use super::body::Body;
use super::plan::Plan;
use super::rekey::Links;
use super::shadow::Sites;
use crate::core::capture::SCHEMA;
use crate::core::frame::{FrameWriter, RowVersions};
use crate::core::merge::RowState;
use crate::core::value::ValueRef;
use crate::core::version::Version;
use crate::sqlite::value::get;

/// A frame is closed when it holds this much: large enough to compress well, small enough to be held at once.
const FRAME_BYTES: usize = 512 * 1024;

/// One changed row as it is read.
pub struct ChangedRow<'r> {
    /// Its key: as the row spells it, or the state's if the row is gone.
    pub key: Vec<ValueRef<'r>>,
    /// Its state.
    pub state: RowState,
    /// Whether the row is there.
    pub present: bool,
    /// Its values, if it is there.
    pub values: Vec<ValueRef<'r>>,
    /// The id that its writer gave it, if it is shown under another.
    pub origin: Option<i64>,
    /// Place of a column and birth of the row it refers to, as [`RowVersions::refs`].
    pub refs: Vec<(u32, Version)>,
    /// See [`RowVersions::fixed`].
    pub fixed: bool,
    plan: &'r Plan,
}

/// Writes rows into frames, and frames into a body.
pub struct RowWriter {
    default: Version,
    frame: FrameWriter,
    section: Option<i64>,
    rows: u64,
    columns: Vec<(u32, Version)>,
    links: Arc<Links>,
}

impl RowWriter {
    /// A writer for rows most of which were born at `default`.
    pub(super) fn new(default: Version, links: &Arc<Links>) -> Self {
        let (frame, columns, links) = (FrameWriter::new(default), Vec::new(), links.clone());
        Self { default, frame, section: None, rows: 0, columns, links }
    }

    /// Rows written so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Calls `visit` for every row of the table whose state changed in the range of lsn (after, up to).
    pub fn each_changed(
        &mut self,
        conn: &Connection,
        sites: &Sites,
        plan: &Arc<Plan>,
        range: (i64, i64),
        mut visit: impl FnMut(&mut Self, &mut ChangedRow<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut statement = conn.prepare_cached(&plan.changed)?;
        let mut rows = statement.query(range)?;
        let (keys, columns) = (plan.table.key.len(), plan.table.columns.len());
        let link = self.links.get(&plan.table.id).cloned();
        while let Some(row) = rows.next()? {
            let present: bool = row.get(keys + 5)?;
            let state = sites.read_state(row, keys)?;
            let key_at = if present { keys + 6 } else { 0 };
            let key = (key_at..key_at + keys).map(|i| get(row, i)).collect::<rusqlite::Result<_>>()?;
            let from = keys * 2 + 6;
            let values = if present { from..from + columns } else { 0..0 };
            let values = values.map(|i| get(row, i)).collect::<rusqlite::Result<_>>()?;
            let mut row = ChangedRow {
                key,
                state,
                present,
                values,
                origin: None,
                refs: Vec::new(),
                fixed: false,
                plan,
            };
            if let Some(link) = &link {
                link.tell(conn, sites, &mut row)?;
            }
            visit(self, &mut row)?;
        }
        Ok(())
    }

    /// Adds a row to the frame.
    pub fn push(&mut self, row: &ChangedRow<'_>) {
        let table = &row.plan.table;
        if self.section != Some(table.id) {
            let keys: Vec<&str> = table.key.iter().map(|k| k.name.as_str()).collect();
            let columns: Vec<&str> = row.plan.wire_columns.iter().map(String::as_str).collect();
            let keeps_both = self.links.get(&table.id).is_some_and(|l| l.keeps_both);
            self.frame.begin_section(&row.plan.wire_name, &keys, &columns, keeps_both);
            self.section = Some(table.id);
            if table.name == SCHEMA {
                self.frame.mark_schema();
            }
        }
        self.columns.clear();
        for (id, version) in &row.state.columns {
            if let Some(place) = table.columns.iter().position(|c| c.id == *id) {
                self.columns.push((place as u32, *version));
            }
        }
        let (birth, dead) = (row.state.birth, row.state.dead);
        let versions = RowVersions { birth, dead, columns: &self.columns, refs: &row.refs, fixed: row.fixed };
        let values = if row.state.dead.is_some() { &[][..] } else { &row.values[..] };
        let origin = row.origin.map(ValueRef::Int);
        let key = row.key.iter().copied().map(|k| origin.unwrap_or(k));
        self.frame.row(key, versions, values.iter().copied());
        self.rows += 1;
    }

    /// Ends a table: what is the schema's has frames of its own.
    pub fn end_table(&mut self, plan: &Plan, body: &mut Body) -> Result<()> {
        if plan.table.name == SCHEMA { self.flush(body) } else { Ok(()) }
    }

    /// Closes the frame if it is large enough.
    pub fn flush_if_full(&mut self, body: &mut Body) -> Result<()> {
        if self.frame.len() < FRAME_BYTES { Ok(()) } else { self.flush(body) }
    }

    /// Closes the frame, if it holds anything, and appends it as a block.
    pub fn flush(&mut self, body: &mut Body) -> Result<()> {
        if self.frame.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.frame, FrameWriter::new(self.default));
        self.section = None;
        Ok(body.append_block(&full.finish())?)
    }
}
