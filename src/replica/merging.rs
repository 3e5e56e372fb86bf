//! How rows of each table are merged: column by column, or as a whole. Invariant: nodes agree because what is decided
//! replicates, as a row of a table of ours; who absorbs an update of a table whose rows are whole gives every column its
//! version, so that merging column by column, which is all that merging ever does, cannot mix two writers.

use rusqlite::OptionalExtension;

use super::Result;
use super::plan::Plan;
use super::store::{Store, TableFilter};
use crate::core::capture::{OP_INSERT, OPTIONS};
use crate::core::value::Value;

/// What a table's rows are merged as.
const WHOLE: &str = "row";
const COLUMNS: &str = "column";

/// What this node's operator says about tables; of one that neither names nothing is said here.
pub struct Merging {
    /// Tables whose rows are merged as a whole.
    pub whole_row: TableFilter,
    /// Tables whose rows are merged column by column, as they are by default.
    pub by_column: TableFilter,
}

impl Store {
    /// Takes what this node's operator says about merging; it holds for tables that are made later, too.
    pub fn set_merging(&mut self, merging: Merging) -> Result<()> {
        self.merging = Some(merging);
        self.write(|store| store.decide_merging())
    }

    /// Writes down for all nodes what is said here and is not so yet.
    pub(super) fn decide_merging(&mut self) -> Result<()> {
        let Some(merging) = &self.merging else { return Ok(()) };
        let wanted = |name: &str| match ((merging.whole_row)(name), (merging.by_column)(name)) {
            (true, _) => Some(WHOLE),
            (false, true) => Some(COLUMNS),
            (false, false) => None,
        };
        let tables = self.plans().map(|p| p.table.name.to_lowercase());
        let decided: Vec<(String, &str)> = tables.filter_map(|t| Some((t.clone(), wanted(&t)?))).collect();
        let Some(options) = self.plan(OPTIONS) else { return Ok(()) };
        for (table, merge) in decided {
            // Column by column is what holds while nothing is written down.
            let now = self.merged_as(&table)?.unwrap_or_else(|| COLUMNS.to_owned());
            if now != merge {
                let sql =
                    "INSERT OR REPLACE INTO __litemesh_option(tbl, what, value) VALUES(?1, 'merge', ?2)";
                self.conn.prepare_cached(sql)?.execute((&table, merge))?;
                let key = [table.into_bytes(), b"merge".to_vec()].map(Value::Text);
                self.log_own(&options, &key, OP_INSERT, &[])?;
            }
        }
        Ok(())
    }

    fn merged_as(&self, table: &str) -> Result<Option<String>> {
        let sql = "SELECT value FROM __litemesh_option WHERE tbl = ?1 AND what = 'merge'";
        let mut ask = self.conn.prepare_cached(sql)?;
        Ok(ask.query_row([table.to_lowercase()], |r| r.get(0)).optional()?)
    }

    /// Whether rows of a table are merged as a whole.
    pub(super) fn is_whole(&self, plan: &Plan) -> Result<bool> {
        Ok(!plan.table.is_ours() && self.merged_as(&plan.table.name)?.as_deref() == Some(WHOLE))
    }

    /// The tables whose rows are merged as a whole, for status.
    pub fn whole_row_tables(&self) -> Result<Vec<String>> {
        let sql = "SELECT tbl FROM __litemesh_option WHERE what = 'merge' AND value = ?1 ORDER BY tbl";
        let mut statement = self.conn.prepare_cached(sql)?;
        let rows = statement.query_map([WHOLE], |r| r.get(0))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }
}
