//! Tables that keep both rows of an id collision, in small histories that show one rule each.

use bytes::Bytes;
use litemesh::core::schema::SchemaMode;
use litemesh::replica::restore::restore;
use litemesh::replica::review::conflicts;

use super::site::{START_MS, Site};

pub const SCHEMA: &str = "
    CREATE TABLE orders(id INTEGER PRIMARY KEY, who, state);
    CREATE TABLE line(id INTEGER PRIMARY KEY, what, ord REFERENCES orders(id));
    CREATE TABLE note(id INTEGER PRIMARY KEY, text, line REFERENCES line(id));";

/// Every row with the rows above it, by what they say rather than by their ids.
pub const TREE: &str = "SELECT group_concat(t, ' ') FROM (
    SELECT o.who || coalesce(':' || o.state, '') || '>' || coalesce(l.what, '-') || '>' || coalesce(n.text, '-') AS t
    FROM orders AS o LEFT JOIN line AS l ON l.ord = o.id LEFT JOIN note AS n ON n.line = l.id ORDER BY 1)";

fn site(test: &str, n: u64, schema: &str, keep_both: bool) -> Site {
    let mut site = Site::with_mode(test, &format!("s{n}"), (n, 7), schema, SchemaMode::Manual);
    if keep_both {
        site.engine.store_mut().keep_both(Box::new(|_| true)).unwrap();
    }
    site
}

fn sites(test: &str, count: u64) -> Vec<Site> {
    (1..=count).map(|n| site(test, n, SCHEMA, true)).collect()
}

/// Gives everybody all commits, those that come of it included, until nobody has a word to say.
pub fn exchange(sites: &mut [Site]) {
    for _ in 0..10 {
        sites.iter_mut().for_each(|s| s.settle(START_MS));
        let mut said: Vec<(usize, Vec<Bytes>)> = Vec::new();
        for (i, site) in sites.iter_mut().enumerate() {
            said.extend(site.commits.drain(..).map(|c| (i, c)));
        }
        if said.is_empty() {
            return;
        }
        for (from, commit) in said {
            let id = sites[from].site();
            sites.iter_mut().for_each(|s| s.take(id, &commit));
        }
    }
    panic!("they never stop talking");
}

fn same(sites: &[Site], expected: &str) {
    for site in sites {
        assert_eq!(site.text(TREE), expected, "{}", site.name);
        assert_eq!(site.stopped(), "");
        assert_eq!(site.engine.store().conflict_counts().unwrap().open, 0, "nothing was lost");
    }
    let ids = "SELECT group_concat(id || who) FROM (SELECT * FROM orders ORDER BY id)";
    assert!(sites.iter().all(|s| s.text(ids) == sites[0].text(ids)), "one row has one id everywhere");
}

#[test]
fn both_rows_of_a_collision_stay_and_so_do_their_children() {
    let mut all = sites("both", 3);
    for (site, who) in all.iter_mut().zip(["ann", "bob", "cy"]) {
        site.run(&format!(
            "INSERT INTO orders(who) VALUES('{who}'); INSERT INTO line(what, ord) VALUES('of {who}', 1);
             INSERT INTO note(text, line) VALUES('{who}s', 1)"
        ));
    }
    exchange(&mut all);
    same(&all, "ann>of ann>anns bob>of bob>bobs cy>of cy>cys");
    assert_eq!(
        all[0].text("SELECT count(*) FROM orders WHERE id BETWEEN -9007199254740992 AND -4503599627370496"),
        "2"
    );
    assert_eq!(all[0].text("SELECT count(*) FROM orders WHERE id = 1"), "1");
    // Whoever has which id now: it is a row like any other.
    all[2].run("UPDATE orders SET state = 'paid' WHERE who = 'ann'");
    all[0].run(
        "DELETE FROM note WHERE text IN ('bobs', 'cys'); DELETE FROM line WHERE what = 'of cy';
                DELETE FROM orders WHERE who = 'cy'",
    );
    all[1].run("INSERT INTO line(what, ord) SELECT 'more', id FROM orders WHERE who = 'ann'");
    exchange(&mut all);
    same(&all, "ann:paid>more>- ann:paid>of ann>anns bob>of bob>-");
}

#[test]
fn a_child_written_before_the_collision_was_seen_is_pointed_right_when_it_comes() {
    let mut all = sites("late", 3);
    let ann = all[0].write("INSERT INTO orders(who) VALUES('ann')");
    let (id, other) = (all[0].site(), all[1].site());
    all[2].take(id, &ann);
    all[2].settle(START_MS);
    let bob = all[1].write("INSERT INTO orders(who) VALUES('bob')");
    // The third node knows ann's order as number 1, and nothing of bob's.
    let line = all[2].write("INSERT INTO line(what, ord) VALUES('for ann', 1)");
    let third = all[2].site();
    all[1].take(third, &line);
    all[1].settle(START_MS);
    assert_eq!(all[1].text("SELECT count(*) FROM line"), "0", "it waits for its cause");
    all[1].take(id, &ann);
    all[1].settle(START_MS);
    all[0].take(other, &bob);
    all[0].take(third, &line);
    all[2].take(other, &bob);
    exchange(&mut all);
    same(&all, "ann>for ann>- bob>->-");
}

#[test]
fn a_row_that_was_deleted_does_not_come_back_when_its_id_is_used_again() {
    for replace in [false, true] {
        let mut all = sites(&format!("back{replace}"), 3);
        all[0].run("INSERT INTO orders(who) VALUES('old')");
        exchange(&mut all);
        // One node changes the row while another uses its id again, and a third hears of the change last.
        let change = all[1].write("UPDATE orders SET state = 'late' WHERE id = 1");
        match replace {
            false => {
                let delete = all[0].write("DELETE FROM orders WHERE id = 1");
                all[0].commits.push(delete);
                all[0].run("INSERT INTO orders(who) VALUES('new')");
            }
            true => all[0].run("INSERT OR REPLACE INTO orders(id, who) VALUES(1, 'new')"),
        }
        let changer = all[1].site();
        all[1].commits.push(change);
        exchange(&mut all);
        assert!(all.iter().all(|s| s.engine.store().head().vector.n(changer) >= 1));
        for site in &all {
            assert_eq!(site.text(TREE), "new>->-", "{}", site.name);
        }
    }
}

#[test]
fn children_stay_with_the_id_when_the_application_replaces_their_parent() {
    let mut all = sites("heir", 2);
    all[0].run("INSERT INTO orders(who) VALUES('v1'); INSERT INTO line(what, ord) VALUES('x', 1)");
    exchange(&mut all);
    all[0].app.execute_batch("PRAGMA foreign_keys = OFF").unwrap();
    all[0].run("INSERT OR REPLACE INTO orders(id, who) VALUES(1, 'v2')");
    let line = all[1].write("INSERT INTO line(what, ord) VALUES('y', 1)");
    all[1].commits.push(line);
    exchange(&mut all);
    same(&all, "v2>x>- v2>y>-");
    // And they follow when the new row has to give the id up.
    all[0].run("INSERT INTO orders(id, who) VALUES(2, 'v3')");
    all[1].run("INSERT INTO orders(id, who) VALUES(2, 'v4'); UPDATE line SET ord = 2 WHERE what = 'y'");
    exchange(&mut all);
    same(&all, "v2>x>- v3>->- v4>y>-");
}

#[test]
fn equal_rows_are_one_row_to_which_all_children_belong() {
    let mut all = sites("twins", 3);
    for site in &mut all {
        site.run("INSERT INTO orders VALUES(1, 'admin', 'seed'), (2, 'guest', 'seed')");
        let line = format!("INSERT INTO line(what, ord) VALUES('{}', 1)", site.name);
        site.run(&line);
    }
    exchange(&mut all);
    same(&all, "admin:seed>s1>- admin:seed>s2>- admin:seed>s3>- guest:seed>->-");
    all[1].run("UPDATE orders SET state = 'changed' WHERE id = 1");
    exchange(&mut all);
    same(&all, "admin:changed>s1>- admin:changed>s2>- admin:changed>s3>- guest:seed>->-");
}

#[test]
fn one_node_says_it_and_all_do_it() {
    let mut all = [site("one-says", 1, SCHEMA, true), site("one-says", 2, SCHEMA, false)];
    exchange(&mut all);
    for (site, who) in all.iter().zip(["ann", "bob"]) {
        site.run(&format!(
            "INSERT INTO orders(who) VALUES('{who}'); INSERT INTO line(what, ord) VALUES('of {who}', 1)"
        ));
    }
    exchange(&mut all);
    same(&all, "ann>of ann>- bob>of bob>-");
    let kept = |s: &Site| s.engine.store().kept_both().unwrap();
    assert_eq!(kept(&all[0]), kept(&all[1]));
    assert_eq!(kept(&all[1]), [("line".to_owned(), 1), ("note".to_owned(), 0), ("orders".to_owned(), 1)]);
}

#[test]
fn what_collided_before_all_kept_both_is_a_conflict_and_what_collides_afterwards_is_not() {
    for told_first in [false, true] {
        let mut all = [1, 2, 3].map(|n| site(&format!("late{told_first}"), n, SCHEMA, false));
        let write = |site: &Site, id: i64, who: &str| {
            site.run(&format!(
                "INSERT INTO orders(id, who) VALUES({id}, '{who}');
                 INSERT INTO line(id, what, ord) VALUES({id}, 'of {who}', {id})"
            ));
        };
        write(&all[0], 1, "ann");
        write(&all[1], 1, "bob");
        exchange(&mut all);
        let open = |s: &Site| s.engine.store().conflict_counts().unwrap().open;
        assert!(all.iter().all(|s| s.text("SELECT count(*) FROM orders") == "1" && open(s) == 2));
        // The first begins while the third is about to insert the same id.
        all[0].engine.store_mut().keep_both(Box::new(|_| true)).unwrap();
        if told_first {
            exchange(&mut all);
        }
        write(&all[0], 5, "cy");
        std::thread::sleep(std::time::Duration::from_millis(2));
        write(&all[2], 5, "di");
        exchange(&mut all);
        let has = |s: &Site, who: &str| s.text(TREE).contains(&format!("{who}>of {who}>-"));
        // The later one stays; the other moves, for its own writer had begun.
        for s in &all {
            assert!(has(s, "cy") && has(s, "di"), "{told_first}: {}", s.text(TREE));
            assert_eq!((s.stopped().as_str(), open(s)), ("", 2));
        }
        for (site, who) in all.iter().zip(["ed", "flo", "gus"]) {
            write(site, 9, who);
        }
        exchange(&mut all);
        assert!(all.iter().all(|s| has(s, "ed") && has(s, "flo") && has(s, "gus") && open(s) == 2));
        // What was lost before can be brought back.
        for conflict in conflicts(&all[1].app).unwrap() {
            restore(&all[1].app, conflict.id, conflict.is_collision(), START_MS).unwrap();
            exchange(&mut all);
        }
        for s in &all {
            let tree = s.text(TREE);
            assert!(tree.contains("of ann") && tree.contains("of bob") && open(s) == 0, "{tree}");
            assert_eq!(tree, all[0].text(TREE));
        }
    }
}

#[test]
fn a_file_without_such_tables_has_nothing_of_it_and_a_key_that_refers_is_refused() {
    let tables = "SELECT count(*) FROM sqlite_schema WHERE name LIKE '\\_\\_litemesh\\_moved%' ESCAPE '\\'
        OR name LIKE '\\_\\_litemesh\\_refs%' ESCAPE '\\' OR name IN ('__litemesh_waiting', '__litemesh_rekey')";
    let without = site("none", 1, SCHEMA, false);
    assert_eq!(without.text(tables), "0");
    let schema =
        format!("{SCHEMA} CREATE TABLE pick(line INTEGER REFERENCES line, ord, PRIMARY KEY(line, ord))");
    let mut with = site("keyed", 2, &schema, true);
    with.settle(START_MS);
    assert_eq!(with.text("SELECT count(*) FROM __litemesh_rekey"), "2");
    assert!(with.warnings.iter().any(|w| w.contains("\"line\" cannot keep both")), "{:?}", with.warnings);
    let schema = "CREATE TABLE t(id TEXT PRIMARY KEY, v);
        CREATE TABLE u(a INTEGER PRIMARY KEY, b) WITHOUT ROWID";
    let mut other = site("text", 4, schema, true);
    other.settle(START_MS);
    for table in ["t", "u"] {
        let begins = format!("table \"{table}\" cannot keep both");
        let told = |w: &String| w.contains(&begins) && w.contains("INTEGER PRIMARY KEY");
        assert!(other.warnings.iter().any(told), "{:?}", other.warnings);
    }
    let same = site("off", 3, SCHEMA, true);
    assert_eq!(same.text("SELECT count(*) FROM __litemesh_rekey"), "3");
}
