//! UNIQUE constraints that no single writer broke, written out for each kind of index: the same rows stay on every
//! node whatever the order, never none of the two, and what had to go is kept.

use litemesh::core::version::SiteId;

use crate::rare::meet;
use crate::site::{START_MS, Site};

/// Three nodes write at once, in this order; the first two hear of each other's writes in opposite orders, the third
/// from a peer's pages. Returns the first's rows, which are everybody's, and how many conflicts are kept.
fn settle(test: &str, schema: &str, before: &str, writes: [&str; 3]) -> (String, u64) {
    let site = |i: usize| Site::new(test, ["a", "b", "c"][i], i as u64 + 1, 7, schema);
    let mut sites: Vec<Site> = (0..3).map(site).collect();
    if !before.is_empty() {
        let first = sites[0].write(before);
        for site in &mut sites[1..] {
            site.take(SiteId(1), &first);
            site.settle(START_MS);
        }
    }
    let mut commits = Vec::new();
    for (site, sql) in sites.iter_mut().zip(writes) {
        // The clock of SQLite goes on between writes, so that the first is the earliest.
        std::thread::sleep(std::time::Duration::from_millis(2));
        commits.push(if sql.is_empty() { Vec::new() } else { site.write(sql) });
    }
    for (to, order) in [(0, [1, 2]), (1, [2, 0])] {
        for from in order {
            sites[to].take(SiteId(from as u64 + 1), &commits[from]);
            sites[to].settle(START_MS);
        }
    }
    meet(&mut sites.iter_mut().collect::<Vec<_>>(), START_MS + 1_000_000);
    let rows = "SELECT group_concat(r, ' ') FROM (SELECT id || coalesce(x, '-') || coalesce(y, '-') AS r FROM u ORDER BY id)";
    let kept = "SELECT group_concat(hex(conflict)) FROM (SELECT DISTINCT conflict FROM __litemesh_conflicts ORDER BY 1)";
    for site in &sites {
        assert_eq!(site.stopped(), "");
        assert_eq!(site.text("PRAGMA integrity_check"), "ok");
        assert_eq!(
            (site.text(rows), site.text(kept)),
            (sites[0].text(rows), sites[0].text(kept)),
            "{}",
            site.name
        );
    }
    let open = sites[0].engine.store().conflict_counts().unwrap().open;
    (sites[0].text(rows), open)
}

const KEYED: &str = "CREATE TABLE u(id TEXT PRIMARY KEY NOT NULL, x, y);";

#[test]
fn values_swapped_in_one_transaction_arrive() {
    let schema = format!("{KEYED} CREATE UNIQUE INDEX i ON u(x)");
    let before = "INSERT INTO u VALUES('k', 1, 0), ('l', 2, 0), ('m', 3, 0)";
    let swap = "UPDATE u SET x = -1 WHERE id = 'k'; UPDATE u SET x = 1 WHERE id = 'l';
                UPDATE u SET x = 2 WHERE id = 'm'; UPDATE u SET x = 3 WHERE id = 'k'";
    assert_eq!(settle("swap", &schema, before, [swap, "", ""]), ("k30 l10 m20".to_owned(), 0));
}

#[test]
fn a_column_that_may_be_null_becomes_so() {
    let schema = format!("{KEYED} CREATE UNIQUE INDEX i ON u(x)");
    let writes = [
        "INSERT INTO u VALUES('k', 1, 0)",
        "INSERT INTO u VALUES('l', 1, 5)",
        "INSERT INTO u VALUES('m', 1, 6)",
    ];
    assert_eq!(settle("nullable", &schema, "", writes), ("k10 l-5 m-6".to_owned(), 2));
}

#[test]
fn a_row_that_must_have_the_value_goes() {
    let schema = "CREATE TABLE u(id TEXT PRIMARY KEY NOT NULL, x NOT NULL UNIQUE, y);";
    let writes = ["INSERT INTO u VALUES('k', 1, 0)", "INSERT INTO u VALUES('l', 1, 5)", ""];
    assert_eq!(settle("strict", schema, "", writes), ("k10".to_owned(), 1));
}

#[test]
fn of_composite_indexes_one_column_is_enough() {
    let schema = format!("{KEYED} CREATE UNIQUE INDEX i ON u(x, y)");
    let writes = [
        "INSERT INTO u VALUES('k', 1, 5)",
        "INSERT INTO u VALUES('l', 1, 5)",
        "INSERT INTO u VALUES('m', 1, 6)",
    ];
    assert_eq!(settle("composite", &schema, "", writes), ("k15 l-5 m16".to_owned(), 1));
}

#[test]
fn partial_indexes_count_only_what_is_in_them() {
    let schema = format!("{KEYED} CREATE UNIQUE INDEX i ON u(x) WHERE y > 0");
    let writes = [
        "INSERT INTO u VALUES('k', 1, 5)",
        "INSERT INTO u VALUES('l', 1, 0)",
        "INSERT INTO u VALUES('m', 1, 6)",
    ];
    assert_eq!(settle("partial", &schema, "", writes), ("k15 l10 m-6".to_owned(), 1));
}

#[test]
fn indexes_on_expressions_find_the_column_that_may_be_null() {
    let schema = format!("{KEYED} CREATE UNIQUE INDEX i ON u(lower(x))");
    let writes = ["INSERT INTO u VALUES('k', 'A', 5)", "INSERT INTO u VALUES('l', 'a', 0)", ""];
    assert_eq!(settle("expression", &schema, "", writes), ("kA5 l-0".to_owned(), 1));
    let schema = format!("{KEYED} CREATE UNIQUE INDEX i ON u(coalesce(lower(x), 'none'))");
    let writes = [
        "INSERT INTO u VALUES('k', 'A', 5)",
        "INSERT INTO u VALUES('l', 'a', 0)",
        "INSERT INTO u VALUES('m', NULL, 0)",
    ];
    // Without its value the second row stands in the way of the third, which came later.
    assert_eq!(settle("coalesce", &schema, "", writes), ("kA5 l-0".to_owned(), 2));
}

#[test]
fn a_row_between_two_others_stays_against_the_later_one() {
    let schema = "CREATE TABLE u(id TEXT PRIMARY KEY NOT NULL, x UNIQUE, y NOT NULL UNIQUE);";
    let writes = [
        "INSERT INTO u VALUES('k', 1, 5)",
        "INSERT INTO u VALUES('l', 1, 6)",
        "INSERT INTO u VALUES('m', 2, 6)",
    ];
    // l gives its x way to k, and stays; so m, which came after l, gives way to it.
    assert_eq!(settle("between", schema, "", writes), ("k15 l-6".to_owned(), 2));
}

#[test]
fn a_row_that_loses_in_two_columns_is_kept_as_it_was() {
    let schema = "CREATE TABLE u(id TEXT PRIMARY KEY NOT NULL, x UNIQUE, y NOT NULL UNIQUE);";
    let mut a = Site::new("twice", "a", 1, 7, schema);
    let mut b = Site::new("twice", "b", 2, 7, schema);
    let first = a.write("INSERT INTO u VALUES('k', 1, 5)");
    std::thread::sleep(std::time::Duration::from_millis(2));
    let second = b.write("INSERT INTO u VALUES('l', 1, 5)");
    b.take(SiteId(1), &first);
    a.take(SiteId(2), &second);
    meet(&mut [&mut a, &mut b], START_MS + 1_000_000);
    for site in [&a, &b] {
        assert_eq!(site.text("SELECT group_concat(id || x || y) FROM u"), "k15", "{}", site.name);
        let whole = "SELECT group_concat(DISTINCT loser) FROM __litemesh_conflicts WHERE loser LIKE '%\"whole\":true%'";
        assert!(site.text(whole).contains("\"values\":{\"x\":1,\"y\":5}"), "{}", site.text(whole));
    }
}
