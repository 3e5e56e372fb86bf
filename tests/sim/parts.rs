//! Many inserts that become several commits: each is whole transactions, as they were, whatever is written meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use litemesh::core::schema::SchemaMode;
use litemesh::core::version::SiteId;
use litemesh::replica::adopt;
use rusqlite::Connection;

use crate::site::{START_MS, Site, duo, talk};

/// Runs transactions one after the other, after some of which somebody looks where the log ends; how many commits they
/// become, and what the other node has after each.
fn split(test: &str, transactions: &[(&str, bool)]) -> Vec<String> {
    let (mut a, mut b) = duo(test);
    a.engine.store_mut().set_part_rows(2);
    for (sql, looked) in transactions {
        a.run(sql);
        if *looked {
            a.engine.store().note_end().unwrap();
        }
    }
    a.settle(START_MS);
    let site = a.site();
    let told = std::mem::take(&mut a.commits).into_iter().map(|commit| {
        b.take(site, &commit);
        b.settle(START_MS);
        b.rows()
    });
    let told = told.collect();
    assert_eq!(a.rows(), b.rows());
    assert_eq!(a.engine.store().head().vector, b.engine.store().head().vector);
    told
}

const TWO: (&str, bool) = ("INSERT INTO t VALUES(1, 'a'), (2, 'b')", true);

#[test]
fn inserts_become_commits_that_end_where_transactions_do() {
    let more =
        [TWO, ("INSERT INTO t VALUES(3, 'c')", true), ("INSERT INTO t VALUES(4, 'd'), (5, 'e')", false)];
    let told = split("parts", &more);
    assert_eq!(told, ["1=a 2=b", "1=a 2=b 3=c 4=d 5=e"], "a part has at least two rows");
    let unseen =
        [("INSERT INTO t VALUES(1, 'a'), (2, 'b')", false), ("INSERT INTO t VALUES(3, 'c'), (4, 'd')", true)];
    assert_eq!(split("unseen", &unseen), ["1=a 2=b 3=c 4=d"], "nobody saw where the first one ended");
}

#[test]
fn a_row_that_was_written_again_keeps_its_transactions_together() {
    let replaced = [TWO, ("INSERT OR REPLACE INTO t VALUES(2, 'B'), (3, 'c')", true)];
    assert_eq!(split("replaced", &replaced), ["1=a 2=B 3=c"]);
    let updated =
        [TWO, ("UPDATE t SET v = 'B' WHERE id = 2", true), ("INSERT INTO t VALUES(3, 'c'), (4, 'd')", true)];
    assert_eq!(split("updated", &updated), ["1=a 2=B 3=c 4=d"]);
    let deleted =
        [TWO, ("DELETE FROM t WHERE id = 1", true), ("INSERT INTO t VALUES(3, 'c'), (4, 'd')", true)];
    assert_eq!(split("deleted", &deleted), ["2=b 3=c 4=d"]);
}

#[test]
fn keys_in_no_order_are_told_in_theirs_all_together() {
    let mut a = Site::new("text-parts", "a", 1, 7, "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    a.engine.store_mut().set_part_rows(2);
    for key in ["q", "b", "z", "a"] {
        a.run(&format!("INSERT INTO t VALUES('{key}', 1), ('{key}{key}', 2)"));
        a.engine.store().note_end().unwrap();
    }
    a.settle(START_MS);
    assert_eq!(a.commits.len(), 1);
    let told = "SELECT group_concat(k0, ' ') FROM (SELECT k0 FROM __litemesh_state_4 ORDER BY lsn)";
    assert_eq!(a.text(told), "a aa b bb q qq z zz");
}

#[test]
fn where_a_log_ended_says_nothing_about_the_next_one() {
    let (mut a, mut b) = duo("next-log");
    a.engine.store_mut().set_part_rows(2);
    a.run("INSERT INTO t VALUES(1, 'a')");
    a.run("INSERT INTO t VALUES(2, 'b')");
    a.engine.store().note_end().unwrap();
    a.settle(START_MS);
    // Another two, whose second entry is in the middle of a transaction.
    a.run("INSERT INTO t VALUES(3, 'c')");
    a.run("INSERT INTO t VALUES(4, 'd'), (5, 'e'), (6, 'f')");
    a.settle(START_MS);
    assert_eq!(a.commits.len(), 2);
    talk(&mut a, &mut b, START_MS);
}

#[test]
fn parts_that_were_never_sent_come_with_the_rows() {
    let (mut a, mut b) = duo("never-sent");
    a.engine.store_mut().set_part_rows(2);
    for k in 0..10 {
        a.run(&format!("INSERT INTO t VALUES({k}, 'x'), ({k} + 100, 'y')"));
        a.engine.store().note_end().unwrap();
    }
    a.engine.absorb().unwrap();
    // Killed before anything was sent.
    let uri = a.uri.clone();
    let keep = Connection::open(&uri).unwrap();
    drop(a);
    let mut a = Site::open(&uri, "a", SchemaMode::Manual);
    drop(keep);
    assert_eq!(a.engine.store().head().vector.n(a.site()), 10);
    for at in [START_MS, START_MS + 5_000, START_MS + 10_000] {
        a.engine.announce(at);
        b.engine.announce(at);
        a.settle(at);
        b.settle(at);
        talk(&mut a, &mut b, at);
    }
    assert_eq!(b.text("SELECT count(*) FROM t"), "20");
    assert_eq!(a.rows(), b.rows());
}

/// In every transaction all rows get or have the same value.
fn write_all(path: &std::path::Path, stop: &AtomicBool) {
    let conn = Connection::open(path).unwrap();
    conn.busy_timeout(Duration::from_secs(60)).unwrap();
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let sql = match n % 12 {
            11 => "UPDATE t SET v = v + 1".to_owned(),
            _ => format!(
                "INSERT INTO t SELECT {n} * 5 + value, (SELECT v FROM t WHERE id = -1) FROM json_each('[0,1,2,3,4]')"
            ),
        };
        conn.execute(&sql, []).unwrap();
        // Now and then the table becomes small again.
        if n % 400 == 399 {
            conn.execute("DELETE FROM t WHERE id >= 0", []).unwrap();
        }
        // Between two updates there is to be time for a turn or two.
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn what_is_written_while_parts_are_read_is_not_in_them() {
    let dir = tempfile::tempdir().unwrap();
    let sites = ["a", "b"].map(|name| {
        let path = dir.path().join(name);
        let app = Connection::open(&path).unwrap();
        app.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF; CREATE TABLE t(id INTEGER PRIMARY KEY, v)",
        )
        .unwrap();
        app.execute_batch("INSERT INTO t VALUES(-1, 0)").unwrap();
        adopt::install(&app, 7, SiteId(if name == "a" { 1 } else { 2 })).unwrap();
        Site::open(path.to_str().unwrap(), name, SchemaMode::Manual)
    });
    let [mut a, mut b] = sites;
    a.engine.store_mut().set_part_rows(5);
    let (stop, path) = (Arc::new(AtomicBool::new(false)), dir.path().join("a"));
    let writer = std::thread::spawn({
        let stop = stop.clone();
        move || write_all(&path, &stop)
    });
    let (mut in_parts, mut changed) = (0, 0);
    while in_parts < 500 || changed < 50 {
        for _ in 0..3 {
            a.engine.store().note_end().unwrap();
        }
        a.settle(START_MS);
        let commits = std::mem::take(&mut a.commits);
        in_parts += if commits.len() > 1 { commits.len() } else { 0 };
        for commit in commits {
            b.take(SiteId(1), &commit);
            b.settle(START_MS);
            let torn = "SELECT count(*) FROM (SELECT id / 5 FROM t WHERE id >= 0 GROUP BY id / 5 HAVING count(*) <> 5)";
            assert_eq!(b.text(torn), "0", "half a transaction is visible");
            assert_eq!(b.text("SELECT count(DISTINCT v) FROM t"), "1", "rows as of different transactions");
        }
        changed = b.text("SELECT v FROM t WHERE id = -1").parse().unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
}
