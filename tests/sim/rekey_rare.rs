//! Tables that keep both rows of an id collision, together with everything else: comparing and repairing, changes of
//! the schema, copies and restored files, conflicts, UNIQUE columns, nodes that begin with it one after the other.

use std::collections::BTreeSet;

use litemesh::core::digest::{Layout, Verdict, judge};
use litemesh::core::schema::SchemaMode;
use litemesh::core::verify::{Cell, Key, Lookup};
use litemesh::core::version::SiteId;
use litemesh::replica::repair::Restamp;
use litemesh::replica::restore::restore;
use litemesh::replica::review::conflicts;
use litemesh::replica::{adopt, copy};
use rusqlite::Connection;
use rusqlite::backup::Backup;
use rusqlite::config::DbConfig;

use crate::rare::meet;
use crate::rekey_scripted::{SCHEMA, TREE, exchange};
use crate::site::{START_MS, Site};

fn site(test: &str, n: u64, schema: &str, mode: SchemaMode) -> Site {
    let mut site = Site::with_mode(&format!("keep-{test}"), &format!("s{n}"), (n, 7), schema, mode);
    site.engine.store_mut().keep_both(Box::new(|_| true)).unwrap();
    site
}

fn sites(test: &str, count: u64) -> Vec<Site> {
    (1..=count).map(|n| site(test, n, SCHEMA, SchemaMode::Replicate)).collect()
}

/// An order of the first two each, under one id, with a line and a note.
fn collide(all: &mut [Site]) {
    for (site, who) in all.iter_mut().zip(["ann", "bob"]) {
        site.run(&format!(
            "INSERT INTO orders(who) VALUES('{who}'); INSERT INTO line(what, ord) SELECT 'of {who}', max(id) FROM orders;
             INSERT INTO note(text, line) SELECT '{who}s', max(id) FROM line"
        ));
    }
    exchange(all);
    same(all, TREE, "ann>of ann>anns bob>of bob>bobs");
}

fn same(all: &[Site], sql: &str, expected: &str) {
    for site in all {
        assert_eq!((site.text(sql).as_str(), site.stopped().as_str()), (expected, ""), "{}", site.name);
    }
}

/// Every row of both, compared as `verify` does it.
fn differences(all: &mut [Site], (a, b): (usize, usize)) -> BTreeSet<(String, i64, String)> {
    let mut found = BTreeSet::new();
    for layout in layouts(&all[a]) {
        let sql = format!("SELECT id FROM {}", layout.table);
        let mut ids = BTreeSet::new();
        for site in [&all[a], &all[b]] {
            let mut rows = site.app.prepare(&sql).unwrap();
            ids.extend(rows.query_map([], |r| r.get::<_, i64>(0)).unwrap().map(Result::unwrap));
        }
        let keys: Vec<Key> = ids.iter().map(|id| vec![Cell::Int(*id)]).collect();
        let lookup = Lookup { layout: layout.clone(), keys, later_than_ms: None };
        let (ours, our_held) = all[a].engine.look_up(&lookup, START_MS).unwrap();
        let (theirs, their_held) = all[b].engine.look_up(&lookup, START_MS).unwrap();
        for (id, (ours, theirs)) in ids.into_iter().zip(ours.iter().zip(&theirs)) {
            if let Verdict::Differs(how) = judge(ours, &our_held.vector, theirs, &their_held.vector) {
                found.insert((layout.table.clone(), id, format!("{how:?}")));
            }
        }
    }
    found
}

fn layouts(site: &Site) -> Vec<Layout> {
    site.engine.store().plans().map(|p| Layout::of(&p.table).0).collect()
}

fn names(found: &BTreeSet<(String, i64, String)>) -> String {
    found.iter().map(|(t, ..)| t.as_str()).collect::<Vec<_>>().join(" ")
}

/// Makes the rows of one those of the other.
fn repair(all: &mut [Site], right: usize, other: usize) {
    let found = differences(all, (right, other));
    for layout in layouts(&all[right]) {
        let of_it = found.iter().filter(|(t, ..)| *t == layout.table);
        let keys: Vec<Key> = of_it.map(|(_, id, _)| vec![Cell::Int(*id)]).collect();
        let clock_ms = all[right].engine.repair_date_ms(START_MS);
        let lookup = Lookup { layout: layout.clone(), keys: keys.clone(), later_than_ms: Some(clock_ms) };
        let seen = all[other].engine.look_up(&lookup, START_MS).unwrap();
        let order = Restamp { layout, keys, peers: vec![seen], clock_ms };
        all[right].engine.restamp(&order).unwrap();
        exchange(all);
    }
}

/// A write that no trigger sees.
fn behind_its_back(site: &Site, sql: &str) {
    site.app.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false).unwrap();
    site.app.execute_batch(&format!("PRAGMA foreign_keys = OFF; {sql}")).unwrap();
    site.app.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, true).unwrap();
}

#[test]
fn a_row_that_had_to_move_on_one_node_only_is_no_difference() {
    let mut all = sites("moved", 3);
    all[0].run("INSERT INTO orders(who) VALUES('ann'); INSERT INTO line(what, ord) VALUES('x', 1)");
    let ann = {
        all[0].settle(START_MS);
        all[0].commits.pop().unwrap()
    };
    let (a, c) = (all[0].site(), all[2].site());
    let bob = all[2].write("INSERT INTO orders(who) VALUES('bob')");
    all[1].take(a, &ann);
    all[1].take(c, &bob);
    all[1].settle(START_MS);
    assert_eq!(all[1].text("SELECT count(*) FROM orders WHERE id < 0"), "1");
    assert_eq!(differences(&mut all, (0, 1)), BTreeSet::new(), "the first has not heard of bob");
    assert_eq!(differences(&mut all, (1, 0)), BTreeSet::new());
    all[0].take(c, &bob);
    exchange(&mut all);
    assert_eq!(differences(&mut all, (0, 1)), BTreeSet::new());
}

#[test]
fn what_was_changed_past_litemesh_is_found_and_repaired_wherever_rows_are_shown() {
    let changes = [
        ("UPDATE orders SET state = 'forged' WHERE id < 0", "orders"),
        ("DELETE FROM orders WHERE id < 0", "orders"),
        ("DELETE FROM orders WHERE id > 0", "orders"),
        ("INSERT INTO orders(id, who) VALUES(77, 'forged')", "orders"),
        ("UPDATE line SET ord = (SELECT max(id) FROM orders) WHERE ord < 0", "line"),
        ("UPDATE line SET ord = 4711", "line line"),
        ("DELETE FROM line WHERE id < 0; UPDATE note SET line = NULL WHERE line < 0", "line note"),
    ];
    for (i, (change, tables)) in changes.into_iter().enumerate() {
        for right in [0, 1] {
            let mut all = sites(&format!("forged{i}{right}"), 2);
            collide(&mut all);
            behind_its_back(&all[1], change);
            let found = differences(&mut all, (0, 1));
            assert_eq!(names(&found), tables, "{change}: {found:?}");
            let wanted = all[right].text(TREE);
            repair(&mut all, right, 1 - right);
            same(&all, TREE, &wanted);
            assert_eq!(differences(&mut all, (0, 1)), BTreeSet::new(), "{change}");
            // And all goes on as ever.
            all[0].run("INSERT INTO orders(id, who) VALUES(50, 'cy'); INSERT INTO line(id, what, ord) VALUES(50, 'of cy', 50)");
            all[1].run("INSERT INTO orders(id, who) VALUES(50, 'di'); INSERT INTO line(id, what, ord) VALUES(50, 'of di', 50)");
            exchange(&mut all);
            let late = "SELECT group_concat(t, ' ') FROM (SELECT who || '>' || what AS t FROM orders AS o
                        JOIN line AS l ON l.ord = o.id WHERE who IN ('cy', 'di') ORDER BY 1)";
            same(&all, late, "cy>of cy di>of di");
        }
    }
}

#[test]
fn columns_come_and_go_and_get_other_names_while_rows_collide() {
    let mut all = sites("columns", 3);
    collide(&mut all);
    all[0].run(
        "ALTER TABLE orders ADD COLUMN extra DEFAULT 'none'; UPDATE orders SET extra = who;
         ALTER TABLE line RENAME COLUMN ord TO of_order; ALTER TABLE note DROP COLUMN text",
    );
    all[1].run(
        "INSERT INTO orders(id, who) VALUES(9, 'cy'); INSERT INTO line(id, what, ord) VALUES(9, 'of cy', 9)",
    );
    all[2].run(
        "INSERT INTO orders(id, who) VALUES(9, 'di'); INSERT INTO line(id, what, ord) VALUES(9, 'of di', 9)",
    );
    exchange(&mut all);
    let tree = "SELECT group_concat(t, ' ') FROM (SELECT who || extra || '>' || what AS t FROM orders AS o
                JOIN line AS l ON l.of_order = o.id ORDER BY 1)";
    same(&all, tree, "annann>of ann bobbob>of bob cynone>of cy dinone>of di");
}

#[test]
fn tables_get_other_names_while_rows_collide() {
    let mut all = sites("tables", 3);
    collide(&mut all);
    all[0].run("ALTER TABLE orders RENAME TO sales");
    all[1].run(
        "INSERT INTO orders(id, who) VALUES(9, 'cy'); INSERT INTO line(id, what, ord) VALUES(9, 'of cy', 9)",
    );
    all[2].run(
        "INSERT INTO orders(id, who) VALUES(9, 'di'); INSERT INTO line(id, what, ord) VALUES(9, 'of di', 9)",
    );
    exchange(&mut all);
    let tree = &TREE.replace("FROM orders", "FROM sales");
    same(&all, tree, "ann>of ann>anns bob>of bob>bobs cy>of cy>- di>of di>-");
    // The new name keeps both as the old one did.
    for (site, who) in all.iter().zip(["ed", "flo"]) {
        site.run(&format!("INSERT INTO sales(id, who) VALUES(20, '{who}'); INSERT INTO line(id, what, ord) VALUES(20, 'of {who}', 20)"));
    }
    exchange(&mut all);
    same(
        &all,
        "SELECT count(*) FROM sales AS o JOIN line AS l ON l.ord = o.id AND l.what = 'of ' || o.who",
        "6",
    );
    // Renamed on two nodes at once.
    all[0].run("INSERT INTO note(id, text, line) VALUES(30, 'zero', 9)");
    all[1].run("INSERT INTO note(id, text, line) VALUES(30, 'one', 20)");
    exchange(&mut all);
    let lines = "SELECT group_concat(t, ' ') FROM (SELECT text || '>' || what AS t FROM note AS n
        JOIN line AS l ON l.id = n.line ORDER BY 1)";
    let before = all[0].text(lines);
    assert_eq!(before.matches('>').count(), 4, "{before}");
    all[0].run("ALTER TABLE note RENAME TO remark");
    all[1].run("ALTER TABLE note RENAME TO comment");
    exchange(&mut all);
    let name =
        all[0].text("SELECT name FROM sqlite_schema WHERE type = 'table' AND name IN ('remark', 'comment')");
    same(&all, &lines.replace("FROM note", &format!("FROM {name}")), &before);
}

#[test]
fn tables_are_built_anew_while_rows_collide() {
    let rebuild = |table: &str, columns: &str, definition: &str| {
        format!(
            "CREATE TABLE fresh({definition}); INSERT INTO fresh({columns}) SELECT {columns} FROM {table};
             DROP TABLE {table}; ALTER TABLE fresh RENAME TO {table}"
        )
    };
    for (i, sql) in [
        rebuild(
            "orders",
            "id, who, state",
            "id INTEGER PRIMARY KEY, who TEXT NOT NULL, state, extra DEFAULT 1",
        ),
        rebuild(
            "line",
            "id, what, ord",
            "id INTEGER PRIMARY KEY, what TEXT, ord INTEGER NOT NULL REFERENCES orders(id)",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let mut all = sites(&format!("anew{i}"), 3);
        collide(&mut all);
        all[0].app.execute_batch("PRAGMA foreign_keys = OFF").unwrap();
        all[0].run(&sql);
        for (site, who) in all.iter().skip(1).zip(["cy", "di"]) {
            site.run(&format!(
                "UPDATE orders SET state = 'late' WHERE id < 0;
                 INSERT INTO orders(id, who) VALUES(9, '{who}'); INSERT INTO line(id, what, ord) VALUES(9, 'of {who}', 9);
                 INSERT INTO line(what, ord) SELECT 'more of {who}', id FROM orders WHERE id < 0"
            ));
        }
        exchange(&mut all);
        let tree = all[0].text(TREE);
        assert!(
            tree.contains("cy>of cy>-") && tree.contains("di>of di>-") && tree.contains(">of bob>bobs"),
            "{tree}"
        );
        assert_eq!(tree.matches(":late>").count(), 3, "{tree}");
        same(&all, TREE, &tree);
    }
}

#[test]
fn references_to_a_table_that_was_made_again_are_to_its_new_rows() {
    let mut all = sites("again", 2);
    collide(&mut all);
    all.iter().for_each(|s| s.app.execute_batch("PRAGMA foreign_keys = OFF").unwrap());
    all[0].run("DROP TABLE orders; CREATE TABLE orders(id INTEGER PRIMARY KEY, who, state)");
    exchange(&mut all);
    all[0].run("INSERT INTO orders(id, who) SELECT DISTINCT ord, 'heir of ' || what FROM line");
    exchange(&mut all);
    let heirs =
        "SELECT count(*) FROM orders AS o JOIN line AS l ON l.ord = o.id WHERE o.who = 'heir of ' || l.what";
    same(&all, heirs, "2");
    // Both still keep both.
    for (site, who) in all.iter().zip(["cy", "di"]) {
        site.run(&format!("INSERT INTO orders(id, who) VALUES(9, '{who}'); INSERT INTO line(id, what, ord) VALUES(9, 'of {who}', 9)"));
    }
    exchange(&mut all);
    same(
        &all,
        "SELECT count(*) FROM orders AS o JOIN line AS l ON l.ord = o.id AND l.what = 'of ' || o.who",
        "2",
    );
    same(&all, heirs, "2");
    // The first rows' ids taken again on two nodes: whom the old lines mean is whoever has the id.
    all[0].run("DROP TABLE line; CREATE TABLE line(id INTEGER PRIMARY KEY, what, ord REFERENCES orders(id))");
    exchange(&mut all);
    all[0].run("INSERT INTO line(id, what, ord) VALUES(1, 'p', 9)");
    all[1].run("INSERT INTO line(id, what, ord) VALUES(1, 'q', 9)");
    exchange(&mut all);
    same(&all, "SELECT count(*) FROM line JOIN orders AS o ON o.id = ord", "2");
}

#[test]
fn a_row_whose_parent_was_made_again_keeps_its_parents_id() {
    let mut all = sites("id-only", 2);
    all[0].run("INSERT INTO orders(who) VALUES('old'); INSERT INTO line(what, ord) VALUES('x', 1)");
    exchange(&mut all);
    all.iter().for_each(|s| s.app.execute_batch("PRAGMA foreign_keys = OFF").unwrap());
    all[0].run("DROP TABLE orders");
    exchange(&mut all);
    all[0].run("CREATE TABLE orders(id INTEGER PRIMARY KEY, who, state)");
    exchange(&mut all);
    // The line says 1 and means nobody: whoever comes to have 1 is no reason for it to say anything else.
    all[0].run("INSERT INTO orders(id, who) VALUES(1, 'ann')");
    all[1].run("INSERT INTO orders(id, who) VALUES(1, 'bob')");
    exchange(&mut all);
    same(&all, "SELECT ord FROM line", "1");
}

#[test]
fn a_reference_declared_later_means_the_row_that_its_node_showed() {
    let schema = "CREATE TABLE orders(id INTEGER PRIMARY KEY, who, state);
        CREATE TABLE line(id INTEGER PRIMARY KEY, what, ord INTEGER);";
    let mut all: Vec<Site> = (1..=3).map(|n| site("later", n, schema, SchemaMode::Replicate)).collect();
    all[0].run("INSERT INTO orders(who) VALUES('ann'); INSERT INTO line(what, ord) VALUES('x', 1)");
    exchange(&mut all);
    // Whoever writes later has the id.
    let (c, b) = (all[1].site(), all[2].site());
    let cy = all[1].write("INSERT INTO orders(id, who) VALUES(5, 'cy'); UPDATE line SET ord = 5");
    let bob = all[2].write("INSERT INTO orders(id, who) VALUES(5, 'bob')");
    all[0].take(c, &cy);
    all[0].settle(START_MS);
    // The first shows the line to belong to cy, and says so for ever.
    all[0].run(
        "CREATE TABLE fresh(id INTEGER PRIMARY KEY, what, ord INTEGER REFERENCES orders(id));
         INSERT INTO fresh SELECT * FROM line; DROP TABLE line; ALTER TABLE fresh RENAME TO line",
    );
    all[0].settle(START_MS);
    all[0].take(b, &bob);
    all[1].take(b, &bob);
    all[2].take(c, &cy);
    exchange(&mut all);
    same(&all, "SELECT who FROM line JOIN orders AS o ON o.id = ord", "cy");
}

fn copy_of(all: &mut [Site], from: usize, test: &str, n: u64) -> Site {
    all[from].engine.barrier().unwrap();
    let source = all[from].site();
    let (name, uri) = (format!("s{n}"), format!("file:copied-{test}-{n}?mode=memory&cache=shared"));
    let mut to = Connection::open(&uri).unwrap();
    Backup::new(&all[from].app, &mut to).unwrap().step(-1).unwrap();
    to.execute_batch("BEGIN IMMEDIATE").unwrap();
    copy::take_identity(&to, source, SiteId(n)).unwrap();
    to.execute_batch("COMMIT").unwrap();
    Site::open(&uri, &name, SchemaMode::Replicate)
}

#[test]
fn a_node_that_joins_with_a_copy_has_the_moved_rows_and_moves_with_the_others() {
    let mut all = sites("joins", 2);
    collide(&mut all);
    let joined = copy_of(&mut all, 0, "joins", 3);
    all.push(joined);
    // Its configuration says nothing of it: the file does.
    for (site, who) in all.iter().zip(["cy", "di", "ed"]) {
        site.run(&format!("INSERT INTO orders(id, who) VALUES(9, '{who}'); INSERT INTO line(id, what, ord) VALUES(9, 'of {who}', 9)"));
    }
    all[2].run("UPDATE orders SET state = 'new' WHERE id < 0");
    exchange(&mut all);
    let tree = all[0].text(TREE);
    assert_eq!(tree.matches(":new>").count(), 1);
    for who in ["ann", "bob", "cy", "di", "ed"] {
        assert!(tree.contains(&format!("of {who}")), "{tree}");
    }
    same(&all, TREE, &tree);
    same(
        &all,
        "SELECT count(*) FROM orders AS o JOIN line AS l ON l.ord = o.id AND l.what = 'of ' || o.who",
        "5",
    );
}

#[test]
fn a_file_restored_from_before_the_collision_comes_to_the_same() {
    let mut all = sites("restored", 3);
    all[0].run("INSERT INTO orders(id, who) VALUES(3, 'old'); INSERT INTO line(id, what, ord) VALUES(3, 'of old', 3)");
    exchange(&mut all);
    let mut backup = Connection::open_in_memory().unwrap();
    Backup::new(&all[0].app, &mut backup).unwrap().step(-1).unwrap();
    for (site, who) in all.iter().zip(["ann", "bob", "cy"]) {
        site.run(&format!("INSERT INTO orders(id, who) VALUES(1, '{who}'); INSERT INTO line(id, what, ord) VALUES(1, 'of {who}', 1)"));
    }
    all[1].run("DELETE FROM line WHERE id = 3; DELETE FROM orders WHERE id = 3");
    exchange(&mut all);
    // The file of the first is put back, as another site, and is written to before it hears of anything.
    let uri = "file:put-back?mode=memory&cache=shared";
    let mut to = Connection::open(uri).unwrap();
    Backup::new(&backup, &mut to).unwrap().step(-1).unwrap();
    adopt::become_site(&to, SiteId(44)).unwrap();
    all[0] = Site::open(uri, "s1", SchemaMode::Replicate);
    all[0].run("INSERT INTO orders(id, who) VALUES(1, 'di'); INSERT INTO line(id, what, ord) VALUES(1, 'of di', 1); UPDATE orders SET state = 'x' WHERE id = 3");
    let [a, b, c] = &mut all[..] else { unreachable!() };
    meet(&mut [a, b, c], START_MS);
    exchange(&mut all);
    same(&all, TREE, "ann>of ann>- bob>of bob>- cy>of cy>- di>of di>-");
}

#[test]
fn rows_that_are_moved_give_way_in_unique_columns_like_any_other() {
    let schema = "CREATE TABLE orders(id INTEGER PRIMARY KEY, who, number TEXT UNIQUE, code NOT NULL UNIQUE);
        CREATE TABLE line(id INTEGER PRIMARY KEY, what, ord REFERENCES orders(id));";
    let mut all: Vec<Site> = (1..=3).map(|n| site("unique", n, schema, SchemaMode::Replicate)).collect();
    for (i, (site, who)) in all.iter().zip(["ann", "bob", "cy"]).enumerate() {
        site.run(&format!(
            "INSERT INTO orders VALUES(1, '{who}', 'N1', 'c{i}'); INSERT INTO line VALUES(1, 'of {who}', 1);
             INSERT INTO orders VALUES({}, 'extra {who}', NULL, 'same')",
            10 + i
        ));
    }
    exchange(&mut all);
    same(
        &all,
        "SELECT count(*) FROM orders AS o JOIN line AS l ON l.ord = o.id AND l.what = 'of ' || o.who",
        "3",
    );
    same(&all, "SELECT count(*) || '/' || count(number) FROM orders WHERE id <> 10", "3/1");
    let rows = "SELECT group_concat(id || who || coalesce(number, '-') || code) FROM (SELECT * FROM orders ORDER BY id)";
    let first = all[0].text(rows);
    same(&all, rows, &first);
    same(&all, "SELECT count(*) FROM orders WHERE code = 'same'", "1");
}

#[test]
fn what_a_moved_row_lost_is_restored_to_it_and_not_to_whoever_has_its_id() {
    let mut all = sites("lost", 3);
    all[0].run("INSERT INTO orders(id, who) VALUES(1, 'ann')");
    exchange(&mut all);
    all[0].run("UPDATE orders SET state = 'one' WHERE id = 1");
    all[1].run("UPDATE orders SET state = 'two' WHERE id = 1");
    exchange(&mut all);
    assert_eq!(all[0].engine.store().conflict_counts().unwrap().open, 1);
    // A row that was inserted by one who had seen none of it takes the id.
    let late = site("lost", 9, SCHEMA, SchemaMode::Replicate);
    late.run("INSERT INTO orders(id, who) VALUES(1, 'bob'), (2, 'x')");
    late.run("UPDATE orders SET who = 'bob' WHERE id = 1");
    all.push(late);
    exchange(&mut all);
    let [a, b, c, d] = &mut all[..] else { unreachable!() };
    meet(&mut [a, b, c, d], START_MS);
    exchange(&mut all);
    let before = all[0].text("SELECT state FROM orders WHERE who = 'ann'");
    let kept = conflicts(&all[2].app).unwrap();
    assert_eq!(kept.len(), 1, "{kept:?}");
    restore(&all[2].app, kept[0].id, false, START_MS).unwrap();
    exchange(&mut all);
    let after = if before == "one" { "two" } else { "one" };
    same(
        &all,
        "SELECT group_concat(who || coalesce(state, '-')) FROM (SELECT * FROM orders ORDER BY who)",
        &format!("ann{after},bob-,x-"),
    );
}

/// README tells the figure: a REPLACE is another row, and the one before leaves a tombstone.
#[test]
fn a_row_that_is_replaced_again_and_again_costs_a_tombstone_each_time_and_an_upsert_none() {
    let size = |s: &Site| -> i64 {
        s.text("SELECT (SELECT page_count FROM pragma_page_count) * (SELECT page_size FROM pragma_page_size)")
            .parse()
            .unwrap()
    };
    let rounds = 5_000;
    let grown = |test: &str, statement: &str| {
        let mut s = site(test, 1, SCHEMA, SchemaMode::Replicate);
        for i in 0..100 {
            s.run(&format!("INSERT INTO orders VALUES({i}, 'x', 0)"));
        }
        s.settle(START_MS);
        let before = size(&s);
        for i in 0..rounds {
            s.run(&statement.replace("ID", &(i % 100).to_string()));
            s.settle(START_MS);
            s.commits.clear();
        }
        (size(&s) - before) / rounds
    };
    let replaced = grown("replaced", "INSERT OR REPLACE INTO orders VALUES(ID, 'x', 1)");
    let upsert = "INSERT INTO orders VALUES(ID, 'x', 1) ON CONFLICT DO UPDATE SET state = state + 1";
    let updated = grown("updated", upsert);
    println!("a REPLACE costs {replaced} bytes of the file, an upsert {updated}");
    assert!((40..200).contains(&replaced), "{replaced}");
    assert!(updated < 5, "{updated}");
}
