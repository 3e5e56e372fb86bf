//! What must hold of the mixed world at the end.

use std::collections::{BTreeMap, BTreeSet};

use crate::mixed::World;

impl World {
    pub fn check(&self) {
        let first = self.nodes.iter().position(|n| !n.left).unwrap();
        let expected = self.dump(first);
        for i in (0..self.nodes.len()).filter(|i| !self.nodes[*i].left) {
            let ok: String = self.nodes[i].app.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
            assert_eq!(ok, "ok", "seed {} node {i}", self.seed);
            let got = self.dump(i);
            assert!(expected.keys().eq(got.keys()), "seed {}: the tables on node {i}", self.seed);
            for (table, rows) in &expected {
                let (ours, theirs): (BTreeSet<_>, BTreeSet<_>) =
                    (rows.iter().collect(), got[table].iter().collect());
                let (only_first, only_i): (Vec<_>, Vec<_>) =
                    (ours.difference(&theirs).collect(), theirs.difference(&ours).collect());
                assert_eq!(only_first, only_i, "seed {}: table {table} on nodes {first} and {i}", self.seed);
                assert_eq!(rows.len(), got[table].len(), "seed {}: table {table} on node {i}", self.seed);
            }
        }
        if let Some(oracle) = &self.oracle {
            // What was written before all had begun may be lost to a collision.
            match oracle.check(&self.nodes[first].app) {
                Err(what) if !self.options.late => panic!("seed {}: {what}", self.seed),
                _ => return,
            }
        }
        let renamed: Vec<&String> = expected.keys().filter(|t| t.starts_with('r')).collect();
        assert_eq!(renamed.len(), usize::from(self.options.ddl), "seed {}: {renamed:?}", self.seed);
        let kept = expected.iter().filter(|(t, _)| *t == "mine(id,n)" || renamed.contains(t));
        let mine: BTreeSet<&str> =
            kept.flat_map(|(_, rows)| rows).map(|r| r.split('|').next().unwrap()).collect();
        for key in &self.acknowledged {
            let quoted = format!("'{key}'");
            assert!(
                mine.contains(quoted.as_str()),
                "seed {}: the acknowledged row {key} is missing",
                self.seed
            );
        }
    }

    /// Every row of every table as text, by SQLite's own quoting: nothing of litemesh's takes part in comparing.
    pub fn dump(&self, i: usize) -> BTreeMap<String, Vec<String>> {
        let app = &self.nodes[i].app;
        let mut out = BTreeMap::new();
        let mut tables = app
            .prepare("SELECT name FROM pragma_table_list WHERE schema = 'main' AND name NOT LIKE '\\_\\_litemesh%' ESCAPE '\\' AND name NOT LIKE 'sqlite%'")
            .unwrap();
        let names: Vec<String> = tables.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
        for name in names {
            let sql = format!("SELECT name FROM pragma_table_info('{name}')");
            let mut info = app.prepare(&sql).unwrap();
            let columns: Vec<String> =
                info.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
            let quoted = columns.iter().map(|c| format!("quote({c}) || ':' || typeof({c})"));
            let first = format!("quote({})", columns[0]);
            let rowid = if name == "nokey" { "rowid || '|' ||" } else { "" };
            let heading = columns.join(",");
            let all = quoted.collect::<Vec<_>>().join(" || '|' || ");
            let sql = format!("SELECT {rowid} {first} || '|' || {all} FROM {name} ORDER BY 1");
            let mut rows = app.prepare(&sql).unwrap();
            out.insert(
                format!("{name}({heading})"),
                rows.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect(),
            );
        }
        out
    }
}
