//! Wrong clocks: an hour ahead, an hour behind, set back, set to 2100; what is dated so, and what frees it.

use litemesh::core::digest::{Layout, Seen};
use litemesh::core::skew::Clocks;
use litemesh::core::verify::{Cell, Held, Lookup};
use litemesh::core::version::SiteId;
use litemesh::replica::repair::{Fate, Restamp};

use crate::mixed::{Options, World};
use crate::seeds;
use crate::site::{SCHEMA, START_MS, Site, duo, talk};

const HOUR_MS: i64 = 3_600_000;
/// 2100-01-01.
const FAR_MS: u64 = 4_102_444_800_000;

/// Tells each what the clocks of all say; `off_ms` are their own errors.
fn tell_clocks(sites: &mut [&mut Site], off_ms: &[i64], now_ms: u64) {
    let names: Vec<_> = sites.iter().map(|s| s.name.clone()).collect();
    for (i, site) in sites.iter_mut().enumerate() {
        let mut clocks = Clocks::default();
        for (j, name) in names.iter().enumerate().filter(|(j, _)| *j != i) {
            clocks.hear(name, now_ms.saturating_add_signed(off_ms[j]), now_ms);
        }
        let judged = clocks.judge(now_ms.saturating_add_signed(off_ms[i]), now_ms, 60_000);
        site.engine.set_clocks(judged, now_ms);
    }
}

/// A write by an application whose host's clock is `at_ms`, absorbed at `now_ms`; its commit.
fn write_at(site: &mut Site, sql: &str, at_ms: u64, now_ms: u64) -> Vec<bytes::Bytes> {
    let day = at_ms as f64 / 86_400_000.0 + 2_440_587.5;
    site.app.execute_batch(&format!("BEGIN; {sql}; UPDATE __litemesh_log SET ms = {day}; COMMIT")).unwrap();
    site.settle(now_ms);
    site.commits.pop().expect("a commit")
}

fn three(test: &str) -> (Site, Site, Site) {
    let site = |name, id| Site::new(test, name, id, 7, SCHEMA);
    (site("a", 1), site("b", 2), site("c", 3))
}

#[test]
fn one_of_three_an_hour_off_holds_up_nobody_and_shadows_nobody() {
    for off_ms in [HOUR_MS, -HOUR_MS] {
        let (mut a, mut b, mut c) = three(&format!("hour{off_ms}"));
        let c_ms = START_MS.saturating_add_signed(off_ms);
        tell_clocks(&mut [&mut a, &mut b, &mut c], &[0, 10, off_ms], START_MS);
        assert!(c.engine.clocks().is_own_wrong() && a.engine.clocks().wrong.contains_key(&c.name));
        // c takes in the others' correct writes, and they take in c's, at once.
        let first = write_at(&mut a, "INSERT INTO t VALUES(1, 'a')", START_MS, START_MS);
        c.take(a.site(), &first);
        b.take(a.site(), &first);
        c.settle(START_MS);
        assert_eq!(c.rows(), "1=a", "{:?}", c.engine.stopped());
        let second = write_at(&mut c, "UPDATE t SET v = 'c'", c_ms, START_MS);
        for site in [&mut a, &mut b] {
            site.take(SiteId(3), &second);
            site.settle(START_MS);
            assert_eq!(site.rows(), "1=c", "{:?}", site.engine.stopped());
        }
        // And whoever writes next is later.
        let third = write_at(&mut b, "UPDATE t SET v = 'b'", START_MS + 10, START_MS);
        for site in [&mut a, &mut c] {
            site.take(SiteId(2), &third);
            site.settle(START_MS);
            assert_eq!(site.rows(), "1=b");
        }
        for site in [&a, &b, &c] {
            assert!(site.engine.store().head().hlc.ms() <= START_MS + 60_000, "nobody's clock went ahead");
        }
    }
}

#[test]
fn a_clock_that_is_set_back_dates_nothing_before_what_was() {
    let (mut a, mut b) = duo("back");
    let site = a.site();
    let first = write_at(&mut a, "INSERT INTO t VALUES(1, 'first')", START_MS, START_MS);
    tell_clocks(&mut [&mut a, &mut b], &[-HOUR_MS, 0], START_MS + 10);
    let second = write_at(&mut a, "UPDATE t SET v = 'second'", START_MS - HOUR_MS as u64, START_MS + 10);
    b.take(site, &second);
    b.take(site, &first);
    b.settle(START_MS + 10);
    assert_eq!(b.rows(), "1=second");
    let third = write_at(&mut b, "UPDATE t SET v = 'third'", START_MS + 20, START_MS + 20);
    a.take(b.site(), &third);
    a.settle(START_MS + 20);
    assert_eq!((a.rows(), a.engine.stopped().len()), ("1=third".to_owned(), 0));
}

#[test]
fn of_two_the_later_clock_dates_by_the_earlier_and_what_it_dated_alone_waits() {
    let (mut a, mut b) = duo("two");
    a.engine.announce(START_MS);
    a.settle(START_MS);
    talk(&mut a, &mut b, START_MS);
    let site = a.site();
    let ahead_ms = START_MS + HOUR_MS as u64;
    // Alone, a has no other clock to go by.
    tell_clocks(&mut [&mut a], &[HOUR_MS], START_MS);
    let alone = write_at(&mut a, "INSERT INTO t VALUES(1, 'alone')", ahead_ms, START_MS);
    tell_clocks(&mut [&mut a, &mut b], &[HOUR_MS, 0], START_MS);
    b.take(site, &alone);
    b.settle(START_MS);
    assert_eq!(b.rows(), "");
    let why = &b.engine.stopped()[0];
    assert!(
        why.contains("dated 2030-03-17 18:46:40 UTC") && why.contains("the clock of node a is 3600 s ahead"),
        "{why}"
    );
    // The clocks are right again, and an hour has passed: it goes on by itself.
    let later_ms = START_MS + HOUR_MS as u64;
    tell_clocks(&mut [&mut a, &mut b], &[0, 0], later_ms);
    b.settle(later_ms);
    assert_eq!((b.rows(), b.engine.stopped().len()), ("1=alone".to_owned(), 0));

    let (mut a, mut b) = duo("together");
    tell_clocks(&mut [&mut a, &mut b], &[HOUR_MS, 0], START_MS);
    let together = write_at(&mut a, "INSERT INTO t VALUES(1, 'together')", ahead_ms, START_MS);
    b.take(a.site(), &together);
    b.settle(START_MS);
    assert_eq!(b.rows(), "1=together", "{:?}", b.engine.stopped());
}

#[test]
fn what_was_dated_2100_is_freed_and_nothing_is_lost() {
    let (mut a, mut b, mut c) = three("2100");
    let old = a.site();
    let first = write_at(&mut a, "INSERT INTO t VALUES(1, 'x'), (2, 'y'), (3, 'z')", START_MS, START_MS);
    for site in [&mut b, &mut c] {
        site.take(old, &first);
        site.settle(START_MS);
    }
    let sql =
        "UPDATE t SET v = 'far' WHERE id = 1; DELETE FROM t WHERE id = 2; INSERT INTO t VALUES(4, 'far')";
    let far = write_at(&mut a, sql, FAR_MS, START_MS);
    let more = write_at(&mut a, "INSERT INTO t VALUES(5, 'after')", START_MS + 5, START_MS);
    for commit in [&far, &more] {
        b.take(old, commit);
    }
    b.settle(START_MS);
    assert_eq!(b.rows(), "1=x 2=y 3=z");
    assert!(b.engine.stopped()[0].contains("repair --restamp"), "{:?}", b.engine.stopped());
    // Nothing is wrong with b: nothing is done there.
    assert_eq!(b.engine.redate(SiteId(8), START_MS).unwrap().ahead_ms, 0);

    let now_ms = START_MS + 10_000;
    a.app.execute_batch("UPDATE t SET v = 'pending' WHERE id = 3").unwrap();
    let redated = a.engine.redate(SiteId(9), now_ms).unwrap();
    assert_eq!((redated.rows, redated.also.len()), (5, 0), "1, 2, 3, 4 and 5");
    a.settle(now_ms);
    assert_eq!((a.rows(), a.site()), ("1=far 3=pending 4=far 5=after".to_owned(), SiteId(9)));
    assert!(a.engine.store().head().hlc.ms() <= now_ms + 1_000, "the file's clock is right again");
    // b, who holds the old commits back, and c, who never got them, both get the rows.
    for site in [&mut b, &mut c] {
        for step in 0..5 {
            let at_ms = now_ms + step * 1_000;
            a.engine.greet(&site.name);
            a.settle(at_ms);
            talk(&mut a, site, at_ms);
            site.settle(at_ms + 500);
            talk(&mut a, site, at_ms + 500);
        }
        assert_eq!(site.rows(), a.rows(), "{:?}", site.engine.stopped());
        assert!(site.engine.stopped().is_empty() && site.engine.pending() == 0);
        assert!(site.engine.store().head().vector.includes(&a.engine.store().head().vector));
    }
    let last = write_at(&mut c, "UPDATE t SET v = 'c' WHERE id = 1", now_ms + 20_000, now_ms + 20_000);
    a.take(SiteId(3), &last);
    a.settle(now_ms + 20_000);
    assert!(a.rows().starts_with("1=c "), "a later write is later: {}", a.rows());
    assert_eq!(a.engine.redate(SiteId(10), now_ms + 20_000).unwrap().rows, 0, "once is enough");
}

#[test]
fn dates_that_all_took_in_hold_up_nobody_and_are_freed_node_by_node() {
    let (mut a, mut b) = duo("all");
    let far = write_at(&mut a, "INSERT INTO t VALUES(1, 'far')", FAR_MS, START_MS);
    // Both clocks were wrong.
    b.take(a.site(), &far);
    b.settle(FAR_MS);
    assert_eq!(b.rows(), "1=far");
    // Now both are right, and go on together where the file's clocks are.
    let next = write_at(&mut b, "UPDATE t SET v = 'b'", START_MS, START_MS);
    a.take(b.site(), &next);
    a.settle(START_MS);
    assert_eq!((a.rows(), a.engine.stopped().len()), ("1=b".to_owned(), 0));
    b.engine.announce(START_MS);
    b.settle(START_MS);
    talk(&mut a, &mut b, START_MS);
    let redated = a.engine.redate(SiteId(11), START_MS).unwrap();
    assert_eq!(redated.also, [b.name.clone()], "b is named");
    b.engine.redate(SiteId(12), START_MS).unwrap();
    for step in 0..6 {
        let at_ms = START_MS + step * 1_000;
        a.engine.greet(&b.name);
        b.engine.greet(&a.name);
        a.settle(at_ms);
        b.settle(at_ms);
        talk(&mut a, &mut b, at_ms);
    }
    assert_eq!((a.rows(), b.rows()), ("1=b".to_owned(), "1=b".to_owned()));
    for site in [&a, &b] {
        assert!(site.engine.stopped().is_empty(), "{:?}", site.engine.stopped());
        assert!(site.engine.store().head().hlc.ms() < START_MS + 60_000);
    }
    let last = write_at(&mut a, "UPDATE t SET v = 'a'", START_MS + 9_000, START_MS + 9_000);
    b.take(SiteId(11), &last);
    b.settle(START_MS + 9_000);
    assert_eq!(b.rows(), "1=a");
}

#[test]
fn nobody_is_shadowed_for_ever_by_clocks_that_are_off() {
    for seed in seeds(20) {
        println!("last word: LITEMESH_SIM_SEED={seed}");
        let nodes = 3 + (seed % 2) as usize;
        let options =
            Options { nodes, steps: 60, skew_ms: HOUR_MS, jumps: 0.05, kills: 0.0, ..Options::storm() };
        let mut world = World::new(seed, options);
        for _ in 0..60 {
            world.step();
        }
        world.settle_down();
        for i in (0..nodes).chain(0..nodes) {
            let word = format!("{i} said");
            world.last_word(i, &word);
            world.wait(10);
            world.settle_down();
            for j in 0..nodes {
                assert_eq!(world.word(j), word, "seed {seed}: on node {j}");
            }
        }
        world.check();
    }
}

fn look(site: &mut Site, layout: &Layout, later_than_ms: Option<u64>) -> (Vec<Seen>, Held) {
    let lookup = Lookup { layout: layout.clone(), keys: vec![vec![Cell::Int(1)]], later_than_ms };
    site.engine.look_up(&lookup, START_MS).unwrap()
}

#[test]
fn a_repair_undoes_no_write_that_is_under_way_or_comes_later() {
    let (mut a, mut b) = duo("under way");
    let first = write_at(&mut a, "INSERT INTO t VALUES(1, 'x')", START_MS - 9_000, START_MS);
    b.take(a.site(), &first);
    b.settle(START_MS);
    // Behind our back on b: the log is emptied before anything is absorbed.
    b.app.execute_batch("BEGIN; UPDATE t SET v = 'wrong'; DELETE FROM __litemesh_log; COMMIT").unwrap();
    let layout = Layout::of(&a.engine.store().plans().next().unwrap().table).0;
    let keys = vec![vec![Cell::Int(1)]];
    let clock_ms = START_MS + 5_000;
    let order = |peer| Restamp { layout: layout.clone(), keys: keys.clone(), peers: vec![peer], clock_ms };

    // b has written the row properly, and a does not know of it yet.
    let proper = write_at(&mut b, "UPDATE t SET v = 'proper'", START_MS, START_MS);
    let seen = look(&mut b, &layout, Some(clock_ms));
    assert_eq!(a.engine.restamp(&order(seen)).unwrap(), [Fate::Left]);
    a.take(b.site(), &proper);
    a.settle(START_MS);
    assert_eq!(a.rows(), "1=proper");

    // b writes between being asked and the repair: later by the clock it was told, whatever its own says.
    b.app.execute_batch("BEGIN; UPDATE t SET v = 'wrong'; DELETE FROM __litemesh_log; COMMIT").unwrap();
    let clock_ms = START_MS + 15_000;
    let seen = look(&mut b, &layout, Some(clock_ms));
    let order = Restamp { layout: layout.clone(), keys, peers: vec![seen], clock_ms };
    let later = write_at(&mut b, "UPDATE t SET v = 'later'", START_MS, START_MS);
    assert_eq!(a.engine.restamp(&order).unwrap(), [Fate::Written]);
    a.settle(START_MS);
    let repair = a.commits.pop().unwrap();
    a.take(b.site(), &later);
    b.take(a.site(), &repair);
    a.settle(START_MS);
    b.settle(START_MS);
    assert_eq!((a.rows(), b.rows()), ("1=later".to_owned(), "1=later".to_owned()));
    // A file whose clock has gone on asks again.
    assert!(a.engine.restamp(&order).is_err());
}
