//! Interleavings that random runs rarely meet, written out: two or three engines, every message moved by hand.

use litemesh::core::message::{Fragment, decode, encode};

use crate::site::{SCHEMA, START_MS, Site, duo, talk};

#[test]
fn duplicates_echoes_and_reordering_change_nothing() {
    let (mut a, mut b) = duo("duplicates");
    let site = a.site();
    let commits = [
        a.write("INSERT INTO t VALUES(1, 'x')"),
        a.write("UPDATE t SET v = 'y'"),
        a.write("INSERT INTO t VALUES(2, 'z')"),
    ];
    for order in [[2, 1, 0], [0, 1, 2], [1, 0, 2]] {
        order.iter().for_each(|i| b.take(site, &commits[*i]));
        commits.iter().for_each(|c| a.take(site, c));
        b.settle(START_MS);
        a.settle(START_MS);
        assert_eq!((b.rows(), a.rows()), ("1=y 2=z".to_owned(), "1=y 2=z".to_owned()));
    }
    assert_eq!(b.engine.store().head().vector.n(site), 3);
    assert!(b.commits.is_empty() && a.commits.is_empty(), "nobody sends back what it got");
}

#[test]
fn a_hole_is_found_without_a_next_message_and_filled_by_any_peer() {
    let (mut a, mut b) = duo("hole");
    let mut c = Site::new("hole", "c", 3, 7, SCHEMA);
    let site = a.site();
    let first = a.write("INSERT INTO t VALUES(1, 'x')");
    let second = a.write("DELETE FROM t WHERE id = 1; INSERT INTO t VALUES(2, 'y')");
    for commit in [&first, &second] {
        c.take(site, commit);
    }
    c.settle(START_MS);
    // b has heard nothing; a is gone; c says what it holds.
    c.engine.announce(START_MS);
    c.settle(START_MS);
    talk(&mut b, &mut c, START_MS);
    b.settle(START_MS + 1_000);
    talk(&mut b, &mut c, START_MS + 1_000);
    assert_eq!(b.rows(), "2=y");
    assert_eq!(b.engine.store().head().vector.n(site), 2);
    assert_eq!(b.engine.counters().peer_syncs, 1);
    // The same commits, late: history.
    for commit in [&second, &first] {
        b.take(site, commit);
    }
    b.settle(START_MS + 2_000);
    assert_eq!(b.rows(), "2=y");
}

#[test]
fn way_is_given_where_programs_write_and_not_where_only_peers_do() {
    let (mut a, mut b) = duo("courtesy");
    a.engine.give_way();
    b.engine.give_way();
    let site = a.site();
    let commit = a.write("INSERT INTO t VALUES(1, 'x')");
    b.take(site, &commit);
    b.settle(START_MS);
    assert_eq!(b.rows(), "1=x");
    assert!(a.engine.gives_way() && !b.engine.gives_way());
}

#[test]
fn an_effect_is_not_shown_before_its_cause() {
    let (mut a, mut b) = duo("causal");
    let mut c = Site::new("causal", "c", 3, 7, SCHEMA);
    let (site_a, site_b) = (a.site(), b.site());
    let cause = a.write("INSERT INTO t VALUES(1, 'question')");
    b.take(site_a, &cause);
    b.settle(START_MS);
    let effect = b.write("INSERT INTO t VALUES(2, 'answer')");
    c.take(site_b, &effect);
    c.settle(START_MS);
    assert_eq!(c.rows(), "");
    c.take(site_a, &cause);
    c.settle(START_MS);
    assert_eq!(c.rows(), "1=question 2=answer");
}

#[test]
fn a_write_after_a_remote_row_is_later_whatever_the_clocks_say() {
    let (mut a, mut b) = duo("clocks");
    let (site_a, site_b) = (a.site(), b.site());
    a.app.execute_batch("INSERT INTO t VALUES(1, 'first')").unwrap();
    // a's application ran with a clock that is 30 s ahead.
    a.app.execute_batch("UPDATE __litemesh_log SET ms = ms + 30.0 / 86400").unwrap();
    a.settle(START_MS);
    let first = a.commits.pop().unwrap();
    b.take(site_a, &first);
    b.settle(START_MS);
    let second = b.write("UPDATE t SET v = 'second' WHERE id = 1");
    a.take(site_b, &second);
    a.settle(START_MS);
    assert_eq!((a.rows(), b.rows()), ("1=second".to_owned(), "1=second".to_owned()));
}

#[test]
fn writes_of_a_clock_far_ahead_wait_and_say_whose_it_is() {
    let (mut a, mut b) = duo("ahead");
    let site = a.site();
    a.app
        .execute_batch(
            "INSERT INTO t VALUES(1, 'from 2100'); UPDATE __litemesh_log SET ms = julianday('2100-01-01')",
        )
        .unwrap();
    a.settle(START_MS);
    let commit = a.commits.pop().unwrap();
    b.take(site, &commit);
    b.settle(START_MS);
    assert_eq!(b.rows(), "");
    assert!(b.engine.stopped()[0].contains("ahead of the mesh's clock"), "{:?}", b.engine.stopped());
    let before = b.engine.store().head().hlc;
    b.write("INSERT INTO t VALUES(2, 'now')");
    assert!(
        b.engine.store().head().hlc < litemesh::core::version::Hlc::from_ms(START_MS * 2)
            && b.engine.store().head().hlc > before
    );
    // When the time has come it goes on by itself.
    b.settle(4_102_444_800_000);
    assert_eq!(b.rows(), "1=from 2100 2=now");
    assert!(b.engine.stopped().is_empty());
}

#[test]
fn rows_for_a_table_that_is_not_here_wait_for_it_and_hold_up_nobody_else() {
    let (mut a, mut b) = duo("table");
    let mut c = Site::new("table", "c", 3, 7, SCHEMA);
    let (site_a, site_c) = (a.site(), c.site());
    a.app.execute_batch("CREATE TABLE later(id TEXT PRIMARY KEY NOT NULL, x)").unwrap();
    let first = a.write("INSERT INTO later VALUES('k', 1)");
    let second = a.write("INSERT INTO t VALUES(1, 'a')");
    let other = c.write("INSERT INTO t VALUES(2, 'c')");
    for (site, commit) in [(site_a, &first), (site_a, &second), (site_c, &other)] {
        b.take(site, commit);
    }
    b.settle(START_MS);
    assert_eq!(b.rows(), "2=c", "the other feed goes on");
    assert!(b.engine.stopped()[0].contains("\"later\""), "{:?}", b.engine.stopped());
    assert_eq!(b.warnings.len(), 1);
    b.settle(START_MS + 5_000);
    assert_eq!(b.warnings.len(), 1, "said once");
    b.app.execute_batch("CREATE TABLE later(id TEXT PRIMARY KEY NOT NULL, x)").unwrap();
    b.settle(START_MS + 10_000);
    assert_eq!((b.rows(), b.text("SELECT id FROM later")), ("1=a 2=c".to_owned(), "k".to_owned()));
    assert!(b.engine.stopped().is_empty());
}

#[test]
fn what_cannot_be_read_is_refused_whole_and_counted() {
    let (mut a, mut b) = duo("poison");
    let site = a.site();
    let good = a.write("INSERT INTO t VALUES(1, 'x'), (2, 'y')");
    let piece: Fragment = decode(&good[0]).unwrap();
    for cut in 1..piece.data.len() {
        let mut bad = piece.clone();
        bad.data = piece.data.slice(..cut);
        b.take(site, &[encode(&bad)]);
        b.settle(START_MS);
        assert_eq!(b.rows(), "", "cut after {cut} of {} bytes", piece.data.len());
    }
    assert!(b.engine.counters().messages_refused > 0);
    assert_eq!(b.engine.store().head().vector.n(site), 0);
    b.take(site, &good);
    b.settle(START_MS + 30_000);
    assert_eq!(b.rows(), "1=x 2=y");
}

#[test]
fn another_database_of_the_same_name_is_refused() {
    let mut a = Site::new("lineage", "a", 1, 7, SCHEMA);
    let mut b = Site::new("lineage", "b", 2, 8, SCHEMA);
    a.write("INSERT INTO t VALUES(1, 'a')");
    a.engine.announce(START_MS);
    a.settle(START_MS);
    talk(&mut a, &mut b, START_MS);
    b.settle(START_MS + 1_000);
    talk(&mut a, &mut b, START_MS + 1_000);
    assert_eq!(b.rows(), "");
    assert!(b.warnings.iter().any(|w| w.contains("another database of the same name")), "{:?}", b.warnings);
}

#[test]
fn a_concurrent_loser_is_kept_and_a_succession_is_not() {
    let (mut a, mut b) = duo("conflict");
    let (site_a, site_b) = (a.site(), b.site());
    let first = a.write("INSERT INTO t VALUES(1, 'a')");
    b.take(site_a, &first);
    b.settle(START_MS);
    let count = |s: &Site| s.engine.store().conflict_counts().unwrap().open;
    let next = b.write("UPDATE t SET v = 'b'");
    a.take(site_b, &next);
    a.settle(START_MS);
    assert_eq!((count(&a), count(&b)), (0, 0));
    let (at_a, at_b) = (a.write("UPDATE t SET v = 'a2'"), b.write("UPDATE t SET v = 'b2'"));
    a.take(site_b, &at_b);
    b.take(site_a, &at_a);
    a.settle(START_MS);
    b.settle(START_MS);
    assert_eq!(a.rows(), b.rows());
    assert_eq!((count(&a), count(&b)), (1, 1));
    let id = "SELECT hex(id) || loser FROM __litemesh_conflicts";
    assert_eq!(a.text(id), b.text(id), "the same conflict is the same entry");
}

#[test]
fn a_column_added_and_written_at_once_is_captured() {
    let (mut a, mut b) = duo("column");
    let site = a.site();
    let first = a.write("INSERT INTO t VALUES(1, 'x'), (2, 'y')");
    let second = a.write("ALTER TABLE t ADD COLUMN w DEFAULT 'none'; UPDATE t SET w = 'new' WHERE id = 1");
    b.take(site, &first);
    b.take(site, &second);
    b.settle(START_MS);
    assert!(b.engine.stopped()[0].contains("\"w\""), "{:?}", b.engine.stopped());
    b.app.execute_batch("ALTER TABLE t ADD COLUMN w DEFAULT 'none'").unwrap();
    b.settle(START_MS + 10_000);
    assert_eq!(b.text("SELECT group_concat(id || w) FROM (SELECT * FROM t ORDER BY id)"), "1new,2none");
    let third = a.write("UPDATE t SET v = v WHERE id = 2; UPDATE t SET w = 'later' WHERE id = 2");
    b.take(site, &third);
    b.settle(START_MS + 10_000);
    assert_eq!(b.text("SELECT w FROM t WHERE id = 2"), "later");
}
