//! A transaction arrives whole, or not at all yet.

use crate::support::{pair, wait_for};

#[test]
fn a_reader_never_sees_a_part_of_a_large_transaction() {
    const ROWS: i64 = 200_000;
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(
        dir.path(),
        "CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT); CREATE TABLE s(id TEXT PRIMARY KEY, v)",
    );
    let reader = b.app("app.db");
    let fill = format!(
        "BEGIN; WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS})
         INSERT INTO t SELECT i, 'row ' || i FROM n; INSERT INTO s VALUES('done', 1); COMMIT"
    );
    a.exec("app.db", &fill);
    let mut counts = std::collections::BTreeSet::new();
    wait_for("the rows arrive", || {
        let sql = "SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM s)";
        let seen: (i64, i64) = reader.query_row(sql, [], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
        counts.insert(seen);
        seen.0 == ROWS
    });
    assert!(counts.iter().all(|c| *c == (0, 0) || *c == (ROWS, 1)), "seen: {counts:?}");
    a.exec("app.db", "BEGIN; UPDATE t SET v = 'changed' WHERE id % 2; UPDATE s SET v = 2; DELETE FROM t WHERE id % 2 = 0; COMMIT");
    let mut seen = std::collections::BTreeSet::new();
    wait_for("the changes arrive", || {
        let sql = "SELECT (SELECT count(*) FROM t WHERE v = 'changed'), (SELECT count(*) FROM t), (SELECT v FROM s)";
        let row: (i64, i64, i64) =
            reader.query_row(sql, [], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?))).unwrap();
        seen.insert(row);
        row.2 == 2
    });
    assert!(seen.iter().all(|s| *s == (0, ROWS, 1) || *s == (ROWS / 2, ROWS / 2, 2)), "seen: {seen:?}");
}
