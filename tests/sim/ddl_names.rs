//! Tables that get other names on several nodes at once: what is one table stays one, with everybody's rows; what two
//! nodes give one name becomes one.

use litemesh::replica::forget::Forgetting;

use crate::ddl::{duo, exchange, meet};
use crate::rare;
use crate::site::{START_MS, Site, talk};

const TWO: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, v); CREATE TABLE u(id INTEGER PRIMARY KEY, v);
    INSERT INTO t VALUES(1, 'adopted'), (2, 'adopted'); INSERT INTO u VALUES(11, 'adopted')";

fn rows(site: &Site, table: &str) -> String {
    site.text(&format!("SELECT group_concat(id || v, ' ') FROM (SELECT * FROM {table} ORDER BY id)"))
}

fn tables(site: &Site) -> String {
    site.text(
        "SELECT group_concat(name, ' ') FROM (SELECT name FROM sqlite_schema
           WHERE type = 'table' AND name NOT LIKE '\\_\\_%' ESCAPE '\\' ORDER BY name)",
    )
}

/// What both have in the end.
fn both(a: &Site, b: &Site, table: &str) -> String {
    assert_eq!(tables(a), tables(b));
    assert_eq!(rows(a, table), rows(b, table));
    rows(a, table)
}

#[test]
fn a_table_that_two_nodes_rename_at_once_is_one_table_with_the_rows_of_both() {
    let (mut a, mut b) = duo("rename-two", TWO);
    a.run("INSERT INTO t VALUES(3, 'a'); ALTER TABLE t RENAME TO ta; INSERT INTO ta VALUES(4, 'a')");
    b.run("UPDATE t SET v = 'b' WHERE id = 1; ALTER TABLE t RENAME TO tb; INSERT INTO tb VALUES(5, 'b'); DELETE FROM tb WHERE id = 2");
    meet(&mut a, &mut b);
    let now = if tables(&a).contains("ta") { "ta" } else { "tb" };
    assert_eq!(both(&a, &b, now), "1b 3a 4a 5b");
    assert_eq!(tables(&a), format!("{now} u"));
    // It goes on as one, and can be renamed again.
    b.run(&format!("ALTER TABLE {now} RENAME TO t; INSERT INTO t VALUES(6, 'b')"));
    a.run(&format!("INSERT INTO {now} VALUES(7, 'a')"));
    meet(&mut a, &mut b);
    assert_eq!(both(&a, &b, "t"), "1b 3a 4a 5b 6b 7a");
}

#[test]
fn two_tables_that_get_one_name_become_one_with_the_rows_of_both() {
    let (mut a, mut b) = duo("rename-same", TWO);
    a.run("ALTER TABLE t RENAME TO w; INSERT INTO w VALUES(3, 'a'); DELETE FROM w WHERE id = 1; CREATE INDEX wv ON w(v)");
    b.run("ALTER TABLE u RENAME TO w; ALTER TABLE w ADD COLUMN c DEFAULT 5; INSERT INTO w VALUES(12, 'b', 6); INSERT INTO t VALUES(4, 'b')");
    meet(&mut a, &mut b);
    assert_eq!(both(&a, &b, "w"), "2adopted 3a 4b 11adopted 12b");
    assert_eq!(tables(&a), "w");
    let sums = "SELECT sum(c) || (SELECT group_concat(name) FROM pragma_index_list('w')) FROM w";
    assert_eq!((a.text(sums), b.text(sums)), ("26wv".to_owned(), "26wv".to_owned()));
    b.run("DROP TABLE w");
    meet(&mut a, &mut b);
    assert_eq!(tables(&a), "");
    a.run("CREATE TABLE w(id INTEGER PRIMARY KEY, v); INSERT INTO w VALUES(1, 'new')");
    meet(&mut a, &mut b);
    assert_eq!(both(&a, &b, "w"), "1new");
}

#[test]
fn a_name_that_one_node_gives_and_another_makes_is_one_table() {
    let (mut a, mut b) = duo("rename-create", TWO);
    a.run("ALTER TABLE t RENAME TO w; CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t VALUES(1, 'new')");
    b.run("CREATE TABLE w(id INTEGER PRIMARY KEY, v); INSERT INTO w VALUES(2, 'b'), (21, 'b'); INSERT INTO t VALUES(3, 'b')");
    meet(&mut a, &mut b);
    // What b wrote to the table that a renamed went with it.
    assert_eq!(both(&a, &b, "w"), "1adopted 2b 3b 21b");
    assert_eq!(both(&a, &b, "t"), "1new");
}

#[test]
fn a_table_renamed_here_and_dropped_there_lives_on_with_its_rows_and_without_the_deleted() {
    let (mut a, mut b) = duo("rename-drop", TWO);
    b.run("DELETE FROM t WHERE id = 2; INSERT INTO t VALUES(3, 'b')");
    meet(&mut a, &mut b);
    a.run("INSERT INTO t VALUES(4, 'a'); ALTER TABLE t RENAME TO ta");
    b.run("INSERT INTO t VALUES(5, 'b')");
    b.settle(START_MS);
    b.run("DROP TABLE t");
    meet(&mut a, &mut b);
    assert_eq!(both(&a, &b, "ta"), "1adopted 3b 4a 5b");
    b.run("UPDATE ta SET v = 'B'");
    a.run("DELETE FROM ta WHERE id = 5");
    meet(&mut a, &mut b);
    assert_eq!(both(&a, &b, "ta"), "1B 3B 4B");
}

#[test]
fn a_table_that_comes_back_has_its_rows_where_deletes_were_forgotten() {
    let (mut a, mut b) = duo("rename-forgotten", TWO);
    for s in [&mut a, &mut b] {
        s.engine.remember(Forgetting { me: None, age_ms: 1_000, absent_ms: 500_000 });
    }
    a.write("INSERT INTO t VALUES(3, 'a'), (4, 'doomed'); DELETE FROM t WHERE id = 1");
    rare::meet(&mut [&mut a, &mut b], START_MS + 10_000);
    b.write("DELETE FROM t WHERE id = 4");
    let now_ms = rare::forget(&mut [&mut a, &mut b], START_MS + 300_000);
    assert!(a.engine.collected_rows() > 0 && b.engine.collected_rows() > 0);
    a.run("ALTER TABLE t RENAME TO w; INSERT INTO w VALUES(5, 'a')");
    b.run("DROP TABLE t");
    rare::meet(&mut [&mut a, &mut b], now_ms + 10_000);
    assert_eq!(both(&a, &b, "w"), "2adopted 3a 5a");
}

/// Two meet, and every commit is lost: what they have of each other is from pages.
fn pages(x: &mut Site, y: &mut Site, now_ms: u64) {
    for site in [&mut *x, &mut *y] {
        site.settle(now_ms);
        site.commits.clear();
    }
    x.engine.greet(&y.name);
    y.engine.greet(&x.name);
    x.settle(now_ms);
    y.settle(now_ms);
    talk(x, y, now_ms);
    x.settle(now_ms + 1_000);
    y.settle(now_ms + 1_000);
    talk(x, y, now_ms + 1_000);
}

#[test]
fn what_was_recalled_is_passed_on_by_a_third_node_as_rows_of_a_page() {
    let (mut a, mut b) = duo("rename-page", TWO);
    let mut c =
        Site::with_mode("rename-page", "c", (3, 7), TWO, litemesh::core::schema::SchemaMode::Replicate);
    let mut now = START_MS;
    let mut carry = |a: &mut Site, b: &mut Site, c: &mut Site| {
        for _ in 0..8 {
            now += 3_000;
            pages(a, c, now);
            pages(b, c, now);
        }
    };
    carry(&mut a, &mut b, &mut c);
    a.run("ALTER TABLE t RENAME TO ta; INSERT INTO ta VALUES(4, 'a')");
    b.run("DROP TABLE t");
    carry(&mut a, &mut b, &mut c);
    for site in [&a, &b, &c] {
        assert_eq!((rows(site, "ta"), site.stopped()), ("1adopted 2adopted 4a".to_owned(), String::new()));
    }
}

#[test]
fn names_that_were_exchanged_are_exchanged_everywhere() {
    let (mut a, mut b) = duo("rename-swap", TWO);
    a.run("ALTER TABLE t RENAME TO x; ALTER TABLE u RENAME TO t; ALTER TABLE x RENAME TO u");
    b.run("INSERT INTO t VALUES(3, 'to t'); INSERT INTO u VALUES(13, 'to u')");
    meet(&mut a, &mut b);
    assert_eq!(both(&a, &b, "u"), "1adopted 2adopted 3to t");
    assert_eq!(both(&a, &b, "t"), "11adopted 13to u");
}

#[test]
fn what_another_node_does_to_a_renamed_table_follows_it() {
    let (mut a, mut b) = duo("rename-follow", TWO);
    a.run("ALTER TABLE t RENAME TO ta");
    b.run("ALTER TABLE t ADD COLUMN c DEFAULT 'c'; CREATE INDEX tv ON t(v, c); CREATE TABLE l(m);
           CREATE TRIGGER tt AFTER DELETE ON t BEGIN INSERT INTO l VALUES(OLD.id); END; INSERT INTO t VALUES(3, 'b', 'd')");
    meet(&mut a, &mut b);
    assert_eq!(both(&a, &b, "ta"), "1adopted 2adopted 3b");
    a.run("DELETE FROM ta WHERE id = 1");
    meet(&mut a, &mut b);
    assert_eq!((a.text("SELECT m FROM l"), b.text("SELECT m FROM l")), ("1".to_owned(), "1".to_owned()));
    assert_eq!(b.text("SELECT group_concat(c) FROM ta"), "c,d");
}

#[test]
fn the_same_rename_on_both_is_one_and_a_chain_of_renames_ends_alike() {
    let (mut a, mut b) = duo("rename-chain", TWO);
    a.run("ALTER TABLE t RENAME TO w; INSERT INTO w VALUES(3, 'a')");
    b.run("INSERT INTO t VALUES(4, 'b'); ALTER TABLE t RENAME TO w");
    meet(&mut a, &mut b);
    assert_eq!(both(&a, &b, "w"), "1adopted 2adopted 3a 4b");
    a.run("ALTER TABLE w RENAME TO z; ALTER TABLE u RENAME TO w; INSERT INTO w VALUES(12, 'a')");
    b.run("INSERT INTO w VALUES(5, 'b'); DROP TABLE u");
    meet(&mut a, &mut b);
    assert_eq!(both(&a, &b, "z"), "1adopted 2adopted 3a 4b 5b");
    assert_eq!(both(&a, &b, "w"), "11adopted 12a");
}

#[test]
fn a_table_built_anew_in_pieces_on_both_nodes_has_the_rows_of_both() {
    let (mut a, mut b) = duo("rename-pieces", TWO);
    for (site, n) in [(&mut a, 3), (&mut b, 4)] {
        for piece in [
            "CREATE TABLE new__t(id INTEGER PRIMARY KEY, v TEXT NOT NULL); INSERT INTO new__t SELECT * FROM t".to_owned(),
            "DROP TABLE t; ALTER TABLE new__t RENAME TO t".to_owned(),
            format!("INSERT INTO t VALUES({n}, 'later')"),
        ] {
            site.run(&piece);
            site.settle(START_MS);
        }
    }
    meet(&mut a, &mut b);
    assert_eq!(both(&a, &b, "t"), "1adopted 2adopted 3later 4later");
    assert_eq!(tables(&a), "t u");
}

#[test]
fn tables_of_one_name_that_contradict_each_other_wait_until_one_has_another_name() {
    let (mut a, mut b) = duo("rename-contradiction", TWO);
    a.run("ALTER TABLE t RENAME TO w; INSERT INTO w VALUES(3, 'a')");
    b.run("CREATE TABLE w(id TEXT PRIMARY KEY, v); INSERT INTO w VALUES('x', 'b')");
    exchange(&mut a, &mut b);
    for site in [&a, &b] {
        assert!(
            site.stopped().contains("of table \"w\"") || site.stopped().contains("of table \"t\""),
            "{}",
            site.stopped()
        );
    }
    b.run("ALTER TABLE w RENAME TO wb");
    let mut now = START_MS;
    for _ in 0..10 {
        now += 3_000;
        a.settle(now);
        b.settle(now);
        a.engine.greet(&b.name);
        b.engine.greet(&a.name);
        talk(&mut a, &mut b, now);
    }
    assert_eq!((a.stopped(), b.stopped()), (String::new(), String::new()));
    assert_eq!(both(&a, &b, "w"), "1adopted 2adopted 3a");
    assert_eq!(both(&a, &b, "wb"), "xb");
}
