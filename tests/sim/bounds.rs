//! What peers send has its bounds: what waits for its turn, and pages that come to no end.

use bytes::Bytes;
use litemesh::core::message::{CommitHeader, Fragment, Message, SyncPage, encode};
use litemesh::core::version::{Hlc, SiteId};

use crate::site::{SCHEMA, START_MS, Site, duo};

const MIB: usize = 1 << 20;

/// A commit that waits for another, with so many bytes that nobody has looked at yet.
fn waiting(from: u64, len: usize) -> Fragment {
    let header = CommitHeader { from, to: from + 1, id: 1, prev: 1, hlc: Hlc(1), seen: Vec::new(), rows: 1 };
    let mut data = Vec::new();
    for block in [encode(&header), Bytes::from(vec![7; len])] {
        data.extend_from_slice(&(block.len() as u32).to_be_bytes());
        data.extend_from_slice(&block);
    }
    Fragment { attempt: from, index: 0, last: true, data: data.into() }
}

#[test]
fn commits_that_wait_have_bounds_a_feed_and_together_and_who_is_next_is_taken() {
    let (mut a, mut b) = duo("bounds");
    let mut offered = 0;
    let mut offer = |b: &mut Site, site: u64, count: u64| {
        for n in 0..count {
            b.engine.on_fragment(SiteId(site), &waiting(10 + n, MIB)).unwrap();
        }
        offered += count;
        b.engine.pending()
    };
    let of_one = offer(&mut b, 100, 100);
    assert!((50..=64).contains(&of_one), "{of_one} of one feed");
    for site in 101..110 {
        offer(&mut b, site, 50);
    }
    let of_all = b.engine.pending();
    assert!((200..=256).contains(&of_all), "{of_all} of {offered}");
    // However much waits: a commit whose turn it is.
    let commit = a.write("INSERT INTO t VALUES(1, 'in turn')");
    b.take(a.site(), &commit);
    b.settle(START_MS);
    assert_eq!(b.rows(), "1=in turn");
}

#[test]
fn small_commits_that_wait_are_counted_too() {
    let (_, mut b) = duo("small");
    for n in 0..30_000 {
        b.engine.on_fragment(SiteId(100), &waiting(10 + n, 1)).unwrap();
    }
    assert_eq!(b.engine.pending(), 20_000);
    // Feeds that nobody ever heard of are as many as one likes to send.
    for site in 1_000..4_000 {
        b.engine.on_fragment(SiteId(site), &waiting(10, 1)).unwrap();
    }
    assert!(b.engine.pending() <= 20_000 + 1_000, "{}", b.engine.pending());
}

#[test]
fn a_page_that_leads_nowhere_ends_the_asking_and_another_peer_is_asked() {
    let (mut a, mut b) = duo("nowhere");
    let mut c = Site::new("nowhere", "c", 3, 7, SCHEMA);
    let commit = a.write("INSERT INTO t VALUES(1, 'x')");
    c.take(a.site(), &commit);
    c.settle(START_MS);
    a.engine.greet(&b.name);
    a.settle(START_MS);
    for (_, message) in std::mem::take(&mut a.messages) {
        b.hear(&a.name, message, START_MS);
    }
    b.settle(START_MS);
    b.settle(START_MS + 1_000);
    let asked = b.messages.iter().find_map(|(_, m)| match m {
        Message::SyncRequest(ask) => Some(ask.clone()),
        _ => None,
    });
    let ask = asked.expect("b asks a for its rows");
    b.messages.clear();
    let page = SyncPage {
        db: ask.db,
        request: ask.request,
        site: a.site(),
        frames: Vec::new(),
        next_lsn: ask.after_lsn,
        complete: None,
    };
    b.hear(&a.name.clone(), Message::SyncPage(page), START_MS + 1_000);
    assert!(!b.engine.is_syncing(), "it does not ask for ever");
    b.settle(START_MS + 1_000);
    assert!(b.warnings.iter().any(|w| w.contains("leads nowhere")), "{:?}", b.warnings);
    assert!(b.stopped().contains("leads nowhere"), "{}", b.stopped());
    // By then c is there, and has what is missing.
    c.engine.greet(&b.name);
    c.settle(START_MS + 4_000);
    for (_, message) in std::mem::take(&mut c.messages) {
        b.hear(&c.name, message, START_MS + 4_000);
    }
    for step in 0..3 {
        b.settle(START_MS + 4_000 + 1_000 * step);
        crate::site::talk(&mut b, &mut c, START_MS + 4_000 + 1_000 * step);
    }
    assert_eq!(b.rows(), "1=x");
    assert_eq!(b.stopped(), "", "what could not be had there has come from elsewhere");
}
