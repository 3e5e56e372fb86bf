//! The SQL that replication runs on one table. Invariant: built once a schema, so that statements stay prepared.

use crate::core::capture::{PREFIX, state_table};
use crate::core::schema::{KeyKind, Table};
use crate::core::sqltext::{ident, list};

/// A table and its statements. Key columns are parameters `?1…`.
pub struct Plan {
    /// The table.
    pub table: Table,
    /// What it is called on the wire.
    pub wire_name: String,
    /// What its columns are called there.
    pub wire_columns: Vec<String>,
    /// `k…` -> `bh, bs, dh, ds, cols`.
    pub select_state: String,
    /// `k…, bh, bs, dh, ds, cols, lsn`.
    pub put_state: String,
    /// `k…, bh, bs, lsn`; does nothing if there is one.
    pub add_state: String,
    /// `k…` -> the columns in order.
    pub select_row: String,
    /// `k…`.
    pub delete_row: String,
    /// `after lsn, up to lsn` -> `s.k…, bh, bs, dh, ds, cols, present, t.k…, columns…`.
    pub changed: String,
    /// `tbl` -> `op, k…, m…` in order.
    pub log: String,
    /// `bh, bs, base lsn, tbl, after seq, up to seq`: births for a part of the log that is nothing but inserts.
    pub absorb_inserts: String,
    /// `after lsn` -> how many states changed.
    pub count_changed: String,
}

impl Plan {
    /// Builds the statements of a table.
    pub fn new(table: Table, wire_name: String, wire_columns: Vec<String>) -> Self {
        let keys = table.key.len();
        let (state, on) = (state_table(&table), ident(&table.name));
        let k = |prefix: &str| list(0..keys, |i| format!("{prefix}k{i}"));
        let params = |from: usize, count: usize| list(from..from + count, |i| format!("?{i}"));
        let state_key = join_and(0..keys, |i| format!("k{i} = ?{}", i + 1));
        let row_key = join_and(0..keys, |i| format!("{} = ?{}", table.key[i].sql, i + 1));
        let columns = list(&table.columns, |c| ident(&c.name));
        let or_one = |text: String| if text.is_empty() { "1".to_owned() } else { text };
        let joined = join_and(0..keys, |i| format!("t.{} = s.k{i}", table.key[i].sql));
        let t_keys = list(&table.key, |c| format!("t.{}", c.sql));
        let t_columns: String = table.columns.iter().map(|c| format!(", t.{}", ident(&c.name))).collect();
        let masks = list(0..table.mask_count(), |i| format!("m{i}"));
        let no_nulls = join_and(0..keys, |i| format!("k{i} IS NOT NULL"));
        // Keys that come in any order are put into theirs: each page of the trees of such keys, here and on the peers, is
        // then touched once a commit. Integers come in their order as it is, and sorting them would cost.
        let (place, order) = match table.key_kind {
            KeyKind::Declared => {
                let key = table.key.iter().enumerate();
                let order = list(key, |(i, c)| format!("k{i} COLLATE {}", ident(&c.collation)));
                (format!("row_number() OVER (ORDER BY {order})"), String::new())
            }
            KeyKind::Integer | KeyKind::Rowid => ("(seq - ?5)".to_owned(), " ORDER BY seq".to_owned()),
        };
        Self {
            select_state: format!("SELECT bh, bs, dh, ds, cols FROM {state} WHERE {state_key}"),
            put_state: format!(
                "INSERT OR REPLACE INTO {state}({}, bh, bs, dh, ds, cols, lsn) VALUES({})",
                k(""),
                params(1, keys + 6)
            ),
            add_state: format!(
                "INSERT OR IGNORE INTO {state}({}, bh, bs, lsn) VALUES({})",
                k(""),
                params(1, keys + 3)
            ),
            select_row: format!("SELECT {} FROM {on} WHERE {row_key}", or_one(columns)),
            delete_row: format!("DELETE FROM {on} WHERE {row_key}"),
            changed: format!(
                "SELECT {}, bh, bs, dh, ds, cols, t.{} IS NOT NULL, {t_keys}{t_columns} \
                 FROM {state} AS s INDEXED BY {state}_lsn LEFT JOIN {on} AS t ON {joined} \
                 WHERE s.lsn > ?1 AND s.lsn <= ?2 ORDER BY s.lsn",
                k("s."),
                table.key[0].sql,
            ),
            log: format!("SELECT op, {}, {masks} FROM {PREFIX}log WHERE tbl = ?1 ORDER BY seq", k("")),
            absorb_inserts: format!(
                "INSERT INTO {state}({0}, bh, bs, lsn) SELECT {0}, ?1, ?2, ?3 + {place} FROM {PREFIX}log \
                 WHERE tbl = ?4 AND seq > ?5 AND seq <= ?6 AND {no_nulls}{order} ON CONFLICT({0}) DO UPDATE SET bh = excluded.bh, \
                 bs = excluded.bs, dh = NULL, ds = NULL, cols = NULL, lsn = excluded.lsn",
                k("")
            ),
            count_changed: format!("SELECT count(*) FROM {state} INDEXED BY {state}_lsn WHERE lsn > ?1"),
            wire_name,
            wire_columns,
            table,
        }
    }

    /// `k…, values…`: inserts a row with these of the table's columns. One that is not among them gets its default.
    pub fn insert_row(&self, columns: &[usize]) -> String {
        let all = self.table.columns.iter().enumerate();
        let (others, blanks): (Vec<String>, Vec<&str>) = all
            .filter(|(i, _)| !columns.contains(i))
            .filter_map(|(_, c)| Some((ident(&c.name), c.blank()?)))
            .unzip();
        let names = (self.table.key.iter().map(|k| k.sql.clone()))
            .chain(columns.iter().map(|c| ident(&self.table.columns[*c].name)))
            .chain(others);
        let count = self.table.key.len() + columns.len();
        let values = (1..=count).map(|i| format!("?{i}")).chain(blanks.into_iter().map(str::to_owned));
        format!(
            "INSERT INTO {}({}) VALUES({})",
            ident(&self.table.name),
            list(names, |n| n),
            list(values, |v| v)
        )
    }

    /// `k…`: takes a state out again.
    pub fn remove_state(&self) -> String {
        let key = join_and(0..self.table.key.len(), |i| format!("k{i} = ?{}", i + 1));
        format!("DELETE FROM {} WHERE {key}", state_table(&self.table))
    }

    /// `k…, values…`: sets these of the table's columns.
    pub fn update_row(&self, columns: &[usize]) -> String {
        let keys = self.table.key.len();
        let set = columns.iter().enumerate();
        format!(
            "UPDATE {} SET {} WHERE {}",
            ident(&self.table.name),
            list(set, |(i, c)| format!("{} = ?{}", ident(&self.table.columns[*c].name), keys + i + 1)),
            join_and(0..keys, |i| format!("{} = ?{}", self.table.key[i].sql, i + 1))
        )
    }
}

fn join_and(items: impl Iterator<Item = usize>, f: impl FnMut(usize) -> String) -> String {
    items.map(f).collect::<Vec<_>>().join(" AND ")
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use crate::core::schema::SchemaMode;
    use crate::core::version::SiteId;
    use crate::replica::adopt;
    use crate::replica::store::Store;

    /// The keys of a table in the order in which they are told, after two commits of inserts.
    fn told(schema: &str, inserts: [&str; 2]) -> (Vec<String>, i64) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.db");
        let app = Connection::open(&path).unwrap();
        app.execute_batch(&format!("PRAGMA journal_mode = WAL; {schema}")).unwrap();
        adopt::install(&app, 7, SiteId(1)).unwrap();
        let mut store = Store::open(&path, dir.path(), Box::new(|_| true), SchemaMode::Manual).unwrap();
        for values in inserts {
            app.execute_batch(&format!("INSERT INTO t(id) VALUES {values}")).unwrap();
            store.absorb().unwrap().expect("a commit");
        }
        let plan = store.plan("t").unwrap();
        let sql = format!("SELECT k0, lsn FROM __litemesh_state_{} ORDER BY lsn", plan.table.id);
        let mut statement = app.prepare(&sql).unwrap();
        let rows = statement.query_map([], |r| Ok((r.get::<_, String>(0)?, r.get::<_, i64>(1)?))).unwrap();
        let (keys, lsns): (Vec<String>, Vec<i64>) = rows.map(Result::unwrap).unzip();
        assert!(lsns.windows(2).all(|w| w[0] < w[1]), "no lsn is given twice");
        assert!(*lsns.last().unwrap() <= store.head().lsn);
        (keys, lsns[0])
    }

    #[test]
    fn text_keys_are_told_in_their_order_commit_by_commit() {
        let schema = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL)";
        let (keys, first) = told(schema, ["('q'), ('B'), ('z'), ('a')", "('c'), ('A')"]);
        assert_eq!(keys, ["B", "a", "q", "z", "A", "c"]);
        assert!(first > 0);
    }

    #[test]
    fn the_order_is_that_of_the_keys_collation() {
        let schema = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL COLLATE NOCASE) WITHOUT ROWID";
        assert_eq!(told(schema, ["('q'), ('B'), ('z'), ('a')", "('c')"]).0, ["a", "B", "q", "z", "c"]);
    }
}
