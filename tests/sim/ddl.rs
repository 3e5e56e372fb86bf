//! Changes of the schema: what one application does with DDL arrives on the other nodes, with the rows around it.

use litemesh::core::schema::SchemaMode;

use crate::site::{START_MS, Site, talk};

const SCHEMA: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, v)";

pub fn duo(test: &str, schema: &str) -> (Site, Site) {
    let site = |name, site| Site::with_mode(test, name, (site, 7), schema, SchemaMode::Replicate);
    let (mut a, mut b) = (site("a", 1), site("b", 2));
    meet(&mut a, &mut b);
    (a, b)
}

/// Delivers all commits both ways until there are none.
pub fn exchange(a: &mut Site, b: &mut Site) {
    for _ in 0..20 {
        a.settle(START_MS);
        b.settle(START_MS);
        let (from_a, from_b) = (std::mem::take(&mut a.commits), std::mem::take(&mut b.commits));
        if from_a.is_empty() && from_b.is_empty() {
            return;
        }
        from_a.iter().for_each(|c| b.take(a.site(), c));
        from_b.iter().for_each(|c| a.take(b.site(), c));
    }
    panic!("they never come to rest");
}

pub fn meet(a: &mut Site, b: &mut Site) {
    exchange(a, b);
    assert_eq!(a.shape(), b.shape());
    assert_eq!((a.stopped(), b.stopped()), (String::new(), String::new()));
}

#[test]
fn what_one_application_does_to_the_schema_is_done_everywhere() {
    let (mut a, mut b) = duo("everything", SCHEMA);
    a.run(
        "INSERT INTO t VALUES(1, 'x');
         CREATE TABLE u(k TEXT PRIMARY KEY, n INTEGER NOT NULL DEFAULT 7 CHECK(n > 0)) WITHOUT ROWID, STRICT;
         INSERT INTO u(k) VALUES('a');
         CREATE INDEX u_n ON u(n) WHERE n > 5;
         CREATE VIEW w AS SELECT v, n FROM t, u;
         CREATE TRIGGER tt AFTER INSERT ON t BEGIN INSERT INTO u VALUES(NEW.v, 1); END;
         ALTER TABLE t ADD COLUMN extra TEXT DEFAULT 'none';
         PRAGMA user_version = 3;",
    );
    meet(&mut a, &mut b);
    assert_eq!(b.text("SELECT group_concat(k || n) FROM u"), "a7");
    assert_eq!(b.text("SELECT extra FROM t"), "none");
    assert_eq!(b.text("PRAGMA user_version"), "3");
    b.run("INSERT INTO t VALUES(2, 'y', 'new'); ALTER TABLE t RENAME TO tt2; ALTER TABLE tt2 RENAME COLUMN v TO vv");
    a.run("INSERT INTO t VALUES(3, 'z', 'mine')");
    meet(&mut a, &mut b);
    let rows = "SELECT group_concat(id || vv || extra, ' ') FROM (SELECT * FROM tt2 ORDER BY id)";
    assert_eq!(a.text(rows), "1xnone 2ynew 3zmine");
    assert_eq!(b.text(rows), a.text(rows));
    assert_eq!(a.text("SELECT count(*) FROM u WHERE k = 'y'"), "1");
    b.run("DROP TRIGGER tt; DROP VIEW w; DROP INDEX u_n; DROP TABLE u; ALTER TABLE tt2 DROP COLUMN extra");
    meet(&mut a, &mut b);
    assert_eq!(
        a.text("SELECT group_concat(name) FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE '\\_\\_%' ESCAPE '\\'"),
        "tt2"
    );
}

#[test]
fn a_column_with_a_default_sends_no_rows() {
    let (mut a, mut b) = duo("default", SCHEMA);
    a.run("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 500) INSERT INTO t SELECT i, i FROM n");
    meet(&mut a, &mut b);
    let before = a.engine.counters().rows_published;
    a.run("ALTER TABLE t ADD COLUMN c INTEGER NOT NULL DEFAULT 5");
    meet(&mut a, &mut b);
    // The one row is the column's own.
    assert_eq!(a.engine.counters().rows_published - before, 1);
    a.run("ALTER TABLE t ADD COLUMN d DEFAULT 'x'; UPDATE t SET d = 'y' WHERE id = 3");
    meet(&mut a, &mut b);
    assert_eq!(a.engine.counters().rows_published - before, 3);
    assert_eq!(b.text("SELECT sum(c) || group_concat(DISTINCT d) FROM t"), "2500x,y");
}

#[test]
fn columns_added_on_both_sides_are_both_there() {
    let (mut a, mut b) = duo("both", SCHEMA);
    a.run("ALTER TABLE t ADD COLUMN x DEFAULT 1; INSERT INTO t VALUES(1, 'a', 'ax')");
    b.run("ALTER TABLE t ADD COLUMN m DEFAULT 2; INSERT INTO t VALUES(2, 'b', 'bm')");
    meet(&mut a, &mut b);
    let rows = "SELECT group_concat(id || v || m || x, ' ') FROM (SELECT * FROM t ORDER BY id)";
    assert_eq!(a.text(rows), "1a2ax 2bbm1");
    assert_eq!(a.text(rows), b.text(rows));
    assert_eq!(a.text("SELECT group_concat(name) FROM pragma_table_info('t')"), "id,v,m,x");
    assert_eq!(
        a.text("SELECT group_concat(name) FROM pragma_table_info('t')"),
        b.text("SELECT group_concat(name) FROM pragma_table_info('t')")
    );
}

#[test]
fn the_same_migration_on_both_is_one_change() {
    let (mut a, mut b) = duo("same", SCHEMA);
    let migration = "ALTER TABLE t ADD COLUMN c TEXT NOT NULL DEFAULT ''; CREATE TABLE n(id INTEGER PRIMARY KEY, x UNIQUE);
        CREATE INDEX i ON n(x); PRAGMA user_version = 2;";
    a.run(migration);
    a.run("INSERT INTO n VALUES(1, 'a'); INSERT INTO t VALUES(1, 1, 'a')");
    b.run(&migration.replace("TEXT", "text /* spelt otherwise */"));
    b.run("INSERT INTO n VALUES(2, 'b'); INSERT INTO t VALUES(2, 2, 'b')");
    meet(&mut a, &mut b);
    let rows = "SELECT (SELECT group_concat(id || x) FROM n) || (SELECT group_concat(id || c) FROM t)";
    assert_eq!((a.text(rows), b.text(rows)), ("1a,2b1a,2b".to_owned(), "1a,2b1a,2b".to_owned()));
}

#[test]
fn tables_built_anew_lose_no_row_of_either_side() {
    let (mut a, mut b) =
        duo("rebuild", "CREATE TABLE t(id INTEGER PRIMARY KEY, v, w); CREATE INDEX tv ON t(v)");
    a.run("INSERT INTO t VALUES(1, 'a', 1), (2, 'b', 2)");
    meet(&mut a, &mut b);
    a.run(
        "CREATE TABLE new__t(id INTEGER PRIMARY KEY, v TEXT NOT NULL, n INTEGER NOT NULL);
         INSERT INTO new__t SELECT id, v, w * 10 FROM t; DROP TABLE t; ALTER TABLE new__t RENAME TO t;
         CREATE UNIQUE INDEX tv ON t(v); INSERT INTO t VALUES(3, 'c', 30); DELETE FROM t WHERE id = 1;",
    );
    b.run("INSERT INTO t VALUES(4, 'd', 4); UPDATE t SET v = 'B' WHERE id = 2");
    exchange(&mut a, &mut b);
    let rows = "SELECT group_concat(id || v || n, ' ') FROM (SELECT * FROM t ORDER BY id)";
    assert_eq!((a.stopped(), b.stopped()), (String::new(), String::new()));
    assert_eq!(a.text(rows), b.text(rows));
    assert!(a.text(rows).contains("2B20 3c30 4d"), "{}", a.text(rows));
    assert_eq!(a.shape(), b.shape());
    b.run("INSERT INTO t VALUES(5, 'e', 50)");
    meet(&mut a, &mut b);
    assert_eq!(a.text("SELECT n FROM t WHERE id = 5"), "50");
}

#[test]
fn contradictory_changes_wait_until_they_are_the_same() {
    let (mut a, mut b) = duo("contradiction", SCHEMA);
    a.run("ALTER TABLE t ADD COLUMN c INTEGER; INSERT INTO t VALUES(1, 'a', 5)");
    b.run("ALTER TABLE t ADD COLUMN c TEXT; INSERT INTO t VALUES(2, 'b', 'five')");
    exchange(&mut a, &mut b);
    for site in [&a, &b] {
        assert!(site.stopped().contains("column \"c\" of table \"t\""), "{}", site.stopped());
        assert_eq!(site.text("SELECT count(*) FROM t"), "1");
    }
    b.run("ALTER TABLE t DROP COLUMN c");
    b.run("ALTER TABLE t ADD COLUMN c INTEGER; UPDATE t SET c = 55");
    let mut now = START_MS;
    for _ in 0..20 {
        now += 3_000;
        a.settle(now);
        b.settle(now);
        a.engine.greet(&b.name);
        b.engine.greet(&a.name);
        talk(&mut a, &mut b, now);
    }
    assert_eq!((a.stopped(), b.stopped()), (String::new(), String::new()));
    let rows = "SELECT group_concat(id || v || c, ' ') FROM (SELECT * FROM t ORDER BY id)";
    assert_eq!(a.text(rows), "1a5 2b55");
    assert_eq!(a.text(rows), b.text(rows));
}

#[test]
fn rows_of_a_table_that_was_rebuilt_with_others_are_told_without_a_comparison() {
    let (mut a, mut b) = duo("others", "CREATE TABLE t(id INTEGER PRIMARY KEY, v)");
    a.run("INSERT INTO t VALUES(1, 'was')");
    meet(&mut a, &mut b);
    a.run("DROP TABLE t; CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t VALUES(2, 'new')");
    meet(&mut a, &mut b);
    // It is compared all the same, for what has other values, under whatever name it has by then.
    assert_eq!(a.engine.store().rebuilt_tables().unwrap(), ["t"]);
    a.run("ALTER TABLE t RENAME TO u; CREATE TABLE t(id INTEGER PRIMARY KEY, v)");
    meet(&mut a, &mut b);
    assert_eq!(a.engine.store().rebuilt_tables().unwrap(), ["u"]);
    for site in [&a, &b] {
        assert_eq!(
            site.text("SELECT (SELECT group_concat(id || v) FROM u) || (SELECT count(*) FROM t)"),
            "2new0"
        );
    }
}

#[test]
fn dropped_and_made_again_is_another_one() {
    let (mut a, mut b) =
        duo("again", "CREATE TABLE t(id INTEGER PRIMARY KEY, v, c); CREATE TABLE u(id INTEGER PRIMARY KEY)");
    a.run("INSERT INTO t VALUES(1, 'a', 'old'); INSERT INTO u VALUES(1)");
    meet(&mut a, &mut b);
    a.run("ALTER TABLE t DROP COLUMN c; DROP TABLE u");
    a.settle(START_MS);
    a.run("ALTER TABLE t ADD COLUMN c DEFAULT 'new'; CREATE TABLE u(id INTEGER PRIMARY KEY); INSERT INTO u VALUES(9)");
    // Written to the old ones, without knowing.
    b.run("UPDATE t SET c = 'lost', v = 'kept'; INSERT INTO u VALUES(2)");
    meet(&mut a, &mut b);
    for site in [&a, &b] {
        assert_eq!(site.text("SELECT v || c FROM t"), "keptnew");
        assert_eq!(site.text("SELECT group_concat(id) FROM u"), "9");
    }
    b.run("UPDATE t SET c = 'again'; INSERT INTO u VALUES(3)");
    meet(&mut a, &mut b);
    assert_eq!(a.text("SELECT c || (SELECT count(*) FROM u) FROM t"), "again2");
}

#[test]
fn a_unique_index_over_rows_that_others_have_twice_is_made_all_the_same() {
    let (mut a, mut b) = duo("unique-index", SCHEMA);
    a.run("INSERT INTO t VALUES(1, 'x'); CREATE UNIQUE INDEX one ON t(v)");
    b.run("INSERT INTO t VALUES(2, 'x')");
    meet(&mut a, &mut b);
    let rows = "SELECT group_concat(id || coalesce(v, '-')) FROM t";
    assert_eq!(a.text(rows), b.text(rows));
    assert!(["1x,2-", "1-,2x"].contains(&a.text(rows).as_str()), "{}", a.text(rows));
}

#[test]
fn a_full_text_index_and_its_triggers_travel() {
    let (mut a, mut b) = duo("fts", "CREATE TABLE doc(id INTEGER PRIMARY KEY, body)");
    a.run("INSERT INTO doc VALUES(1, 'first words')");
    meet(&mut a, &mut b);
    a.run(
        "CREATE VIRTUAL TABLE s USING fts5(body, content='doc', content_rowid='id');
         INSERT INTO s(s) VALUES('rebuild');
         CREATE TRIGGER di AFTER INSERT ON doc BEGIN INSERT INTO s(rowid, body) VALUES(NEW.id, NEW.body); END;
         INSERT INTO doc VALUES(2, 'second words')",
    );
    meet(&mut a, &mut b);
    b.run("INSERT INTO doc VALUES(3, 'third words')");
    meet(&mut a, &mut b);
    for site in [&a, &b] {
        assert_eq!(site.text("SELECT group_concat(rowid) FROM s WHERE s MATCH 'words'"), "1,2,3");
    }
}
