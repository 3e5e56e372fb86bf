//! More histories written out: files that are copied, restored and cut short, pages that come late, keys that move.

use litemesh::core::message::Message;
use litemesh::core::schema::SchemaMode;
use litemesh::core::version::SiteId;
use litemesh::replica::adopt;
use litemesh::replica::copy::take_identity;
use litemesh::replica::forget::Forgetting;
use litemesh::replica::unite::PeerFile;
use rusqlite::Connection;
use rusqlite::backup::Backup;

use crate::site::{SCHEMA, START_MS, Site, duo};

/// Everybody says what it holds, and they talk until all is the same.
pub fn meet(sites: &mut [&mut Site], start_ms: u64) {
    for round in 0..6 {
        let now_ms = start_ms + round * 21_000;
        sites.iter_mut().for_each(|s| s.engine.announce(now_ms));
        for turn in 0..100 {
            let now_ms = now_ms + turn * 100;
            sites.iter_mut().for_each(|s| s.settle(now_ms));
            for from in 0..sites.len() {
                let (name, messages) = (sites[from].name.clone(), std::mem::take(&mut sites[from].messages));
                for (to, message) in messages {
                    let others = sites.iter_mut().filter(|s| s.name != name);
                    let meant = others.filter(|s| to.as_ref().is_none_or(|to| *to == s.name));
                    meant.for_each(|s| s.hear(&name, message.clone(), now_ms));
                }
            }
        }
    }
}

/// The message of this kind that a site has to send.
fn take(site: &mut Site, wanted: fn(&Message) -> bool) -> Message {
    let at = site.messages.iter().position(|(_, m)| wanted(m)).expect("such a message");
    site.messages.remove(at).1
}

fn is_page(message: &Message) -> bool {
    matches!(message, Message::SyncPage(_))
}

fn is_request(message: &Message) -> bool {
    matches!(message, Message::SyncRequest(_))
}

/// Lets `asker` ask `holder` for rows; returns the page that answers.
fn ask(asker: &mut Site, holder: &mut Site, now_ms: u64) -> Message {
    holder.engine.greet(&asker.name);
    holder.settle(now_ms);
    for (_, message) in std::mem::take(&mut holder.messages) {
        asker.hear(&holder.name, message, now_ms);
    }
    asker.settle(now_ms);
    asker.settle(now_ms + 1_000);
    let request = take(asker, is_request);
    asker.messages.clear();
    holder.hear(&asker.name, request, now_ms + 1_000);
    holder.settle(now_ms + 1_000);
    take(holder, is_page)
}

#[test]
fn a_page_for_another_process_of_that_name_is_not_taken() {
    let (mut a, mut b) = duo("twins");
    let (mut c, mut twin) = (Site::new("twins", "c", 3, 7, SCHEMA), Site::new("twins", "twin", 4, 7, SCHEMA));
    twin.name = c.name.clone();
    let site = a.site();
    let commits = [a.write("INSERT INTO t VALUES(1, 'x')"), a.write("INSERT INTO t VALUES(2, 'y')")];
    commits.iter().for_each(|commit| b.take(site, commit));
    c.take(site, &commits[0]);
    b.settle(START_MS);
    c.settle(START_MS);
    // Both ask b, which cannot tell them apart: nor can the subject that the answers come by.
    let page_for_c = ask(&mut c, &mut b, START_MS);
    let page_for_twin = ask(&mut twin, &mut b, START_MS);
    twin.hear(&b.name, page_for_c.clone(), START_MS + 1_000);
    twin.settle(START_MS + 1_000);
    assert_eq!(
        twin.engine.store().head().vector.n(site),
        0,
        "the first row was not in it, so nor is it held"
    );
    for page in [&page_for_twin, &page_for_c] {
        twin.hear(&b.name, page.clone(), START_MS + 1_000);
        c.hear(&b.name, page.clone(), START_MS + 1_000);
    }
    twin.settle(START_MS + 1_000);
    c.settle(START_MS + 1_000);
    assert_eq!((twin.rows().as_str(), c.rows().as_str()), ("1=x 2=y", "1=x 2=y"));
}

pub fn copy_into(from: &Connection, to: &mut Connection) {
    Backup::new(from, to).unwrap().step(-1).unwrap();
}

#[test]
fn a_commit_applied_between_the_last_page_and_its_arrival_is_not_in_the_pages_vector() {
    let (mut a, mut b) = duo("between");
    let mut c = Site::new("between", "c", 3, 7, SCHEMA);
    let site = a.site();
    let first = a.write("INSERT INTO t VALUES(1, 'x')");
    b.take(site, &first);
    b.settle(START_MS);
    let page = ask(&mut c, &mut b, START_MS);
    // The page is under way when b applies more and says so.
    let second = a.write("INSERT INTO t VALUES(2, 'y')");
    b.take(site, &second);
    b.settle(START_MS + 2_000);
    c.hear(&b.name, page, START_MS + 2_000);
    c.settle(START_MS + 2_000);
    assert_eq!((c.rows().as_str(), c.engine.store().head().vector.n(site)), ("1=x", 1));
    meet(&mut [&mut b, &mut c], START_MS + 3_000);
    assert_eq!((c.rows().as_str(), c.engine.store().head().vector.n(site)), ("1=x 2=y", 2));
}

#[test]
fn a_page_that_comes_late_changes_nothing_back() {
    let (mut a, mut b) = duo("stale");
    let site = a.site();
    let first = a.write("INSERT INTO t VALUES(1, 'x'), (2, 'y')");
    let page = ask(&mut b, &mut a, START_MS);
    let second = a.write("DELETE FROM t WHERE id = 1; UPDATE t SET v = 'z' WHERE id = 2");
    for commit in [&first, &second] {
        b.take(site, commit);
    }
    b.settle(START_MS + 2_000);
    assert_eq!(b.rows(), "2=z");
    b.hear(&a.name, page, START_MS + 3_000);
    b.settle(START_MS + 3_000);
    assert_eq!((b.rows().as_str(), b.engine.store().head().vector.n(site)), ("2=z", 2));
    assert_eq!(b.engine.store().conflict_counts().unwrap().open, 0);
}

#[test]
fn a_page_of_a_file_that_was_restored_meanwhile_is_not_taken() {
    let (mut a, mut b) = duo("restored");
    let old = a.site();
    for i in 1..6 {
        a.write(&format!("INSERT INTO t VALUES({i}, 'x')"));
    }
    meet(&mut [&mut a, &mut b], START_MS);
    // b asks from the number where it stands with a's file; before that arrives, a's file is another.
    a.write("INSERT INTO t VALUES(6, 'lost with the file')");
    a.engine.greet(&b.name);
    a.settle(START_MS + 200_000);
    for (_, message) in std::mem::take(&mut a.messages) {
        b.hear(&a.name, message, START_MS + 200_000);
    }
    b.settle(START_MS + 200_000);
    b.settle(START_MS + 201_000);
    let request = take(&mut b, is_request);
    let mut restored = Site::new("restored", "a2", 9, 7, SCHEMA);
    restored.name = a.name.clone();
    restored.write("INSERT INTO t VALUES(7, 'new')");
    restored.hear(&b.name, request, START_MS + 202_000);
    restored.settle(START_MS + 202_000);
    let page = take(&mut restored, is_page);
    b.hear(&a.name, page, START_MS + 202_000);
    b.settle(START_MS + 202_000);
    assert_eq!(b.engine.store().head().vector.n(SiteId(9)), 0, "its rows were not sent, so nor is it held");
    b.messages.clear();
    meet(&mut [&mut restored, &mut b], START_MS + 300_000);
    let all = "1=x 2=x 3=x 4=x 5=x 7=new";
    assert_eq!((b.rows().as_str(), restored.rows().as_str()), (all, all));
    assert_eq!(restored.engine.store().head().vector.n(old), 5);
}

#[test]
fn a_copy_that_runs_on_while_the_original_is_cut_off_is_another_site() {
    let (mut a, mut b) = duo("copied");
    a.write("INSERT INTO t VALUES(1, 'before'), (2, 'before')");
    meet(&mut [&mut a, &mut b], START_MS);
    let uri = "file:scripted-copied-c?mode=memory&cache=shared";
    let mut file = Connection::open(uri).unwrap();
    copy_into(&a.app, &mut file);
    // What the daemon does when it finds a file that it does not know.
    adopt::become_site(&file, SiteId(5)).unwrap();
    let mut c = Site::open(uri, "c", SchemaMode::Manual);
    a.write("UPDATE t SET v = 'of a' WHERE id = 1; INSERT INTO t VALUES(3, 'of a')");
    c.write("UPDATE t SET v = 'of c' WHERE id = 2; INSERT INTO t VALUES(4, 'of c')");
    b.write("INSERT INTO t VALUES(5, 'of b')");
    meet(&mut [&mut b, &mut c], START_MS + 500_000);
    meet(&mut [&mut a, &mut b, &mut c], START_MS + 900_000);
    let all = "1=of a 2=of c 3=of a 4=of c 5=of b";
    assert_eq!((a.rows().as_str(), b.rows().as_str(), c.rows().as_str()), (all, all, all));
}

/// A copy of a file that goes on under its site at once, as one made together with the state directory does.
fn twin(of: &Site, test: &str) -> (Connection, Site) {
    let uri = format!("file:scripted-{test}-c?mode=memory&cache=shared");
    let mut file = Connection::open(&uri).unwrap();
    copy_into(&of.app, &mut file);
    let site = Site::open(&uri, "c", SchemaMode::Manual);
    (file, site)
}

/// Both copies run on, by this many commits each, and are heard of one after the other.
fn run_on_as_one_site(at_a: usize, at_c: usize, while_running: bool) {
    let test = format!("forked-{at_a}-{at_c}-{while_running}");
    let (mut a, mut b) = duo(&test);
    let old = a.site();
    a.write("INSERT INTO t VALUES(1, 'before'), (2, 'before'), (3, 'before')");
    meet(&mut [&mut a, &mut b], START_MS);
    let (_file, mut c) = twin(&a, &test);
    if !while_running {
        let again = Site::open(&a.uri, "a", SchemaMode::Manual);
        a = again;
    }
    for i in 0..at_a {
        a.write(&format!("INSERT INTO t VALUES({}, 'of a'); UPDATE t SET v = 'a{i}' WHERE id = 1", 10 + i));
    }
    for i in 0..at_c {
        c.write(&format!("INSERT INTO t VALUES({}, 'of c'); UPDATE t SET v = 'c{i}' WHERE id = 2", 20 + i));
    }
    meet(&mut [&mut a, &mut b], START_MS + 300_000);
    meet(&mut [&mut b, &mut c], START_MS + 600_000);
    b.write("INSERT INTO t VALUES(30, 'of b')");
    meet(&mut [&mut a, &mut b, &mut c], START_MS + 900_000);
    let news: Vec<SiteId> = [&a, &c].iter().map(|s| s.site()).collect();
    assert!(!news.contains(&old) && news[0] != news[1], "{test}: {news:?}");
    for s in [&a, &b, &c] {
        assert_eq!((s.rows(), s.stopped().as_str()), (a.rows(), ""), "{test}: {}", s.name);
        let conflicts = s.engine.store().conflict_counts().unwrap().open;
        let updates = [format!("1=a{}", at_a - 1), format!("2=c{}", at_c - 1)];
        let lost = updates.iter().filter(|u| !s.rows().contains(*u)).count() as u64;
        assert!(if while_running { conflicts >= lost } else { lost == 0 }, "{test}: {}", s.rows());
    }
    let mut expected: Vec<usize> = (1..4).chain(10..10 + at_a).chain(20..20 + at_c).chain([30]).collect();
    expected.sort_unstable();
    let ids = b.text("SELECT group_concat(id, ' ') FROM (SELECT id FROM t ORDER BY id)");
    assert_eq!(ids, expected.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "), "{test}");
    // And they go on.
    a.write("UPDATE t SET v = 'later of a' WHERE id = 3");
    c.write("DELETE FROM t WHERE id = 30");
    meet(&mut [&mut a, &mut b, &mut c], START_MS + 1_500_000);
    assert!(b.rows().contains("3=later of a") && !b.rows().contains("30="), "{test}: {}", b.rows());
    assert_eq!((a.rows(), c.rows()), (b.rows(), b.rows()), "{test}");
}

#[test]
fn a_site_that_runs_on_at_two_nodes_is_left_by_both_and_nothing_is_lost() {
    for (at_a, at_c) in [(1, 1), (2, 2), (3, 1), (1, 3)] {
        run_on_as_one_site(at_a, at_c, false);
        run_on_as_one_site(at_a, at_c, true);
    }
}

#[test]
fn a_commit_that_follows_another_than_the_one_here_is_not_applied() {
    let (mut a, mut b) = duo("prev");
    let site = a.site();
    let first = a.write("INSERT INTO t VALUES(1, 'before')");
    let (_file, mut c) = twin(&a, "prev");
    let of_a = a.write("INSERT INTO t VALUES(2, 'of a')");
    let of_c = [c.write("INSERT INTO t VALUES(3, 'of c')"), c.write("INSERT INTO t VALUES(4, 'of c')")];
    // Both files' commits come in under one site: the second of c is number 3, and that of a was number 2.
    for commit in [&first, &of_a, &of_c[0], &of_c[1]] {
        b.take(site, commit);
        b.settle(START_MS);
    }
    assert_eq!((b.rows().as_str(), b.engine.store().head().vector.n(site)), ("1=before 2=of a", 2));
    assert!(b.warnings.iter().any(|w| w.contains("follows another commit 2")), "{:?}", b.warnings);
    meet(&mut [&mut b, &mut c], START_MS + 300_000);
    meet(&mut [&mut a, &mut b, &mut c], START_MS + 600_000);
    let all = "1=before 2=of a 3=of c 4=of c";
    assert_eq!((a.rows().as_str(), b.rows().as_str(), c.rows().as_str()), (all, all, all));
    assert_ne!(a.site(), c.site());
}

#[test]
fn a_new_node_with_a_copy_lacks_nothing_and_gives_what_it_writes() {
    let (mut a, mut b) = duo("joined");
    a.write("INSERT INTO t VALUES(1, 'x')");
    meet(&mut [&mut a, &mut b], START_MS);
    b.write("DELETE FROM t WHERE id = 1; INSERT INTO t VALUES(2, 'of b')");
    let uri = "file:scripted-joined-c?mode=memory&cache=shared";
    let mut file = Connection::open(uri).unwrap();
    copy_into(&b.app, &mut file);
    take_identity(&file, b.site(), SiteId(3)).unwrap();
    let mut c = Site::open(uri, "c", SchemaMode::Manual);
    assert_eq!(c.engine.store().head().vector.n(b.site()), 1);
    c.write("INSERT INTO t VALUES(3, 'of c')");
    meet(&mut [&mut a, &mut c], START_MS + 500_000);
    meet(&mut [&mut a, &mut b, &mut c], START_MS + 900_000);
    let all = "2=of b 3=of c";
    assert_eq!((a.rows().as_str(), b.rows().as_str(), c.rows().as_str()), (all, all, all));
}

#[test]
fn pieces_of_two_attempts_make_one_commit_once() {
    let (mut a, mut b) = duo("attempts");
    let site = a.site();
    // Pieces are of half a MiB; a commit sent twice has two sets of them.
    for i in 1..5 {
        a.app.execute("INSERT INTO t VALUES(?1, hex(randomblob(400000)))", [i]).unwrap();
    }
    a.engine.settle(START_MS).unwrap();
    let mut own = a.engine.take_actions().into_iter().find_map(|action| match action {
        litemesh::replica::engine::Action::Publish(own) => Some(own),
        _ => None,
    });
    let mut attempt = || {
        let mut pieces = Vec::new();
        litemesh::replica::send::commit_pieces(own.as_mut().unwrap(), |p| pieces.push(p)).unwrap();
        pieces
    };
    let (first, second) = (attempt(), attempt());
    assert!(first.len() > 3, "{} pieces", first.len());
    b.take(site, &first[..2]);
    b.take(site, &second[2..]);
    b.settle(START_MS);
    assert_eq!(b.engine.store().head().vector.n(site), 0, "halves of two attempts are no commit");
    b.take(site, &first[2..]);
    b.take(site, &second);
    b.take(site, &second);
    b.settle(START_MS);
    assert_eq!(b.engine.store().head().vector.n(site), 1);
    assert_eq!(a.text("SELECT sum(length(v)) || '' FROM t"), b.text("SELECT sum(length(v)) || '' FROM t"));
    assert_eq!(b.engine.counters().commits_applied, 1);
}

#[test]
fn a_row_inserted_again_is_another_and_what_was_written_to_the_old_one_is_kept() {
    let (mut a, mut b) = duo("reborn");
    let (site_a, site_b) = (a.site(), b.site());
    let first = a.write("INSERT INTO t VALUES(1, 'x')");
    b.take(site_a, &first);
    b.settle(START_MS);
    let again = a.write("DELETE FROM t WHERE id = 1; INSERT INTO t VALUES(1, 'again')");
    let update = b.write("UPDATE t SET v = 'of the old row' WHERE id = 1");
    b.take(site_a, &again);
    a.take(site_b, &update);
    a.settle(START_MS);
    b.settle(START_MS);
    assert_eq!((a.rows().as_str(), b.rows().as_str()), ("1=again", "1=again"));
    let kept = "SELECT group_concat(kind || loser) FROM __litemesh_conflicts";
    assert_eq!(a.text(kept), b.text(kept));
    assert!(
        a.text(kept).starts_with("delete") && a.text(kept).contains("of the old row"),
        "{}",
        a.text(kept)
    );
}

#[test]
fn one_key_changed_to_two_keys_is_both_rows() {
    let (mut a, mut b) = duo("rekeyed");
    let (site_a, site_b) = (a.site(), b.site());
    let first = a.write("INSERT INTO t VALUES(1, 'x')");
    b.take(site_a, &first);
    b.settle(START_MS);
    let (to_two, to_three) =
        (a.write("UPDATE t SET id = 2 WHERE id = 1"), b.write("UPDATE t SET id = 3 WHERE id = 1"));
    b.take(site_a, &to_two);
    a.take(site_b, &to_three);
    a.settle(START_MS);
    b.settle(START_MS);
    assert_eq!((a.rows().as_str(), b.rows().as_str()), ("2=x 3=x", "2=x 3=x"));
    assert_eq!(a.engine.store().conflict_counts().unwrap().open, 0, "nothing was lost");
}

#[test]
fn three_writers_of_one_column_keep_two_losers_in_whatever_order_they_meet() {
    let mut sites: Vec<Site> = ["a", "b", "c", "d", "e"]
        .iter()
        .enumerate()
        .map(|(i, name)| Site::new("three", name, i as u64 + 1, 7, SCHEMA))
        .collect();
    let first = sites[0].write("INSERT INTO t VALUES(1, 'x')");
    for site in &mut sites[1..] {
        site.take(SiteId(1), &first);
        site.settle(START_MS);
    }
    let commits: Vec<_> = (0..3).map(|i| sites[i].write(&format!("UPDATE t SET v = 'of {i}'"))).collect();
    // d meets them from the first to the last, e from the last to the first.
    for (to, order) in [(3, [0, 1, 2]), (4, [2, 1, 0])] {
        for from in order {
            sites[to].take(SiteId(from as u64 + 1), &commits[from]);
            sites[to].settle(START_MS);
        }
    }
    let mut all: Vec<&mut Site> = sites.iter_mut().collect();
    meet(&mut all, START_MS + 1_000_000);
    let kept = "SELECT group_concat(hex(id)) FROM (SELECT id FROM __litemesh_conflicts ORDER BY id)";
    for site in &sites {
        assert_eq!((site.rows(), site.text(kept)), (sites[0].rows(), sites[0].text(kept)));
        assert_eq!(site.engine.store().conflict_counts().unwrap().open, 2, "{}", site.name);
    }
}

/// A power cut takes back what was not on the disk: what applications committed after litemesh's last transaction.
/// What litemesh has told of before is on the disk (`synchronous=FULL`; that a disk does what it says is not tested).
#[test]
fn a_power_cut_after_a_page_was_served_takes_back_nothing_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.db");
    let mut a = Site::new("power", "a", 1, 7, SCHEMA);
    let mut c = Site::new("power", "c", 3, 7, SCHEMA);
    let app = Connection::open(&path).unwrap();
    app.execute_batch(&format!("PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 0; {SCHEMA}"))
        .unwrap();
    adopt::install(&app, 7, SiteId(9)).unwrap();
    let mut b = Site::open(path.to_str().unwrap(), "b", SchemaMode::Manual);
    let site = a.site();
    let first = a.write("INSERT INTO t VALUES(1, 'of a')");
    b.app.execute_batch("PRAGMA synchronous = NORMAL; INSERT INTO t VALUES(2, 'of b')").unwrap();
    b.take(site, &first);
    b.settle(START_MS);
    b.app.execute_batch("INSERT INTO t VALUES(3, 'of b, told with the page')").unwrap();
    let page = ask(&mut c, &mut b, START_MS);
    let wal = dir.path().join("b.db-wal");
    let on_disk = (std::fs::read(&path).unwrap(), std::fs::read(&wal).unwrap());
    b.app.execute_batch("INSERT INTO t VALUES(4, 'of b, not on the disk')").unwrap();
    drop((b, app));
    std::fs::write(&path, on_disk.0).unwrap();
    std::fs::write(&wal, on_disk.1).unwrap();
    c.hear(&"b".parse().unwrap(), page, START_MS + 2_000);
    c.settle(START_MS + 2_000);
    let mut b = Site::open(path.to_str().unwrap(), "b", SchemaMode::Manual);
    assert_eq!((b.rows(), b.engine.store().head().vector.n(site)), (c.rows(), 1));
    assert_eq!(c.rows(), "1=of a 2=of b 3=of b, told with the page");
    b.write("INSERT INTO t VALUES(4, 'again')");
    meet(&mut [&mut a, &mut b, &mut c], START_MS + 500_000);
    assert_eq!(b.rows(), "1=of a 2=of b 3=of b, told with the page 4=again");
    assert_eq!((a.rows(), c.rows()), (b.rows(), b.rows()));
    assert!(c.warnings.iter().all(|w| !w.contains("history")), "{:?}", c.warnings);
}

/// Lets both say what they hold, and time go on, until deletes are forgotten.
pub fn forget(sites: &mut [&mut Site], start_ms: u64) -> u64 {
    let mut now_ms = start_ms;
    for _ in 0..4 {
        meet(sites, now_ms);
        now_ms += 200_000;
    }
    now_ms
}

#[test]
fn a_page_that_comes_after_the_delete_was_forgotten_brings_nothing_back() {
    let (mut a, mut b) = duo("forgotten");
    for s in [&mut a, &mut b] {
        s.engine.remember(Forgetting { me: None, age_ms: 1_000, absent_ms: 500_000 });
    }
    a.write("INSERT INTO t VALUES(1, 'doomed'), (2, 'stays')");
    // A third node, of which the others know nothing, asks for rows, and the page is under way for long.
    let mut c = Site::new("forgotten", "c", 3, 7, SCHEMA);
    let page = ask(&mut c, &mut a, START_MS);
    meet(&mut [&mut a, &mut b], START_MS + 10_000);
    a.write("DELETE FROM t WHERE id = 1");
    let now_ms = forget(&mut [&mut a, &mut b], START_MS + 300_000);
    assert!(a.engine.collected_rows() > 0 && b.engine.collected_rows() > 0);
    assert_eq!(a.text("SELECT count(*) FROM __litemesh_state_4"), "1");
    // The page: a row that was deleted since, and that was forgotten.
    c.hear(&a.name, page, now_ms);
    c.settle(now_ms);
    assert_eq!(c.rows(), "1=doomed 2=stays");
    c.messages.clear();
    c.commits.clear();
    c.run("UPDATE t SET v = 'of c' WHERE id = 1");
    c.settle(now_ms);
    let update = c.commits.pop().unwrap();
    // Who has forgotten the row drops it, and keeps what was written to it.
    let site = c.site();
    b.take(site, &update);
    b.settle(now_ms);
    assert_eq!(b.rows(), "2=stays");
    assert_eq!(b.engine.store().conflict_counts().unwrap().open, 1);
    // c is refused what would leave it with the row, and asks for a copy.
    for round in 0..20 {
        let now_ms = now_ms + round * 1_000;
        a.engine.greet(&c.name);
        a.settle(now_ms);
        for (_, message) in std::mem::take(&mut a.messages) {
            c.hear(&a.name, message, now_ms);
        }
        c.settle(now_ms);
    }
    assert_eq!(c.engine.needs_copy(now_ms + 30_000), Some(a.name.clone()));
    assert!(!c.messages.iter().any(|(_, m)| is_request(m)), "nobody can answer");
    let mut copy = Connection::open_in_memory().unwrap();
    copy_into(&a.app, &mut copy);
    let file = PeerFile::with_connection(copy, &std::env::temp_dir()).unwrap();
    let united = c.engine.unite(file, "was away", now_ms, now_ms).unwrap();
    assert_eq!((united.removed, c.rows().as_str()), (1, "2=stays"));
    meet(&mut [&mut a, &mut b, &mut c], now_ms + 100_000);
    assert_eq!((a.rows(), b.rows(), c.rows()), (b.rows(), c.rows(), "2=stays".to_owned()));
}

fn peer_file(of: &Site) -> PeerFile {
    let mut copy = Connection::open_in_memory().unwrap();
    copy_into(&of.app, &mut copy);
    PeerFile::with_connection(copy, &std::env::temp_dir()).unwrap()
}

/// Each has forgotten deletes that the other has not heard of, and has writes that the other has not.
fn both_away(test: &str, at_once: bool) {
    let (mut a, mut b) = duo(test);
    for s in [&mut a, &mut b] {
        s.engine.remember(Forgetting { me: Some(s.name.clone()), age_ms: 1_000, absent_ms: 100_000 });
    }
    a.write(
        "INSERT INTO t VALUES(1, 'x'), (2, 'x'), (3, 'x'), (4, 'x'), (5, 'x'), (6, 'x'), (7, 'x'), (8, 'x')",
    );
    meet(&mut [&mut a, &mut b], START_MS);
    a.write("DELETE FROM t WHERE id IN (1, 3, 5, 6); INSERT INTO t VALUES(10, 'of a'), (20, 'a')");
    a.write("UPDATE t SET v = 'of a' WHERE id IN (4, 8)");
    b.write("DELETE FROM t WHERE id IN (2, 3, 6, 8); INSERT INTO t VALUES(11, 'of b'), (20, 'b')");
    b.write("UPDATE t SET v = 'of b' WHERE id IN (5, 7); INSERT INTO t VALUES(6, 'again')");
    let now_ms = forget(&mut [&mut a], START_MS + 300_000).max(forget(&mut [&mut b], START_MS + 300_000));
    assert!(a.engine.collected_rows() >= 4 && b.engine.collected_rows() >= 3);
    meet(&mut [&mut a, &mut b], now_ms);
    let now_ms = now_ms + 200_000;
    let needs = |s: &Site| s.engine.needs_copy(now_ms).map(|n| n.to_string());
    assert_eq!((needs(&a).as_deref(), needs(&b).as_deref()), (Some("b"), Some("a")));
    let (of_a, of_b) = (at_once.then(|| peer_file(&a)), peer_file(&b));
    a.engine.unite(of_b, "was away", now_ms, now_ms).unwrap();
    let of_a = of_a.unwrap_or_else(|| peer_file(&a));
    b.engine.unite(of_a, "was away", now_ms, now_ms).unwrap();
    meet(&mut [&mut a, &mut b], now_ms + 100_000);
    assert_eq!((needs(&a), needs(&b)), (None, None));
    let rows = a.rows();
    assert_eq!(rows, b.rows());
    let fixed = rows.rsplit_once(" 20=").unwrap().0;
    assert_eq!(fixed, "4=of a 6=again 7=of b 10=of a 11=of b");
    // The updates of the rows that the other had deleted, and the other row of the two, are kept.
    let kept = "SELECT group_concat(hex(id)) FROM (SELECT id FROM __litemesh_conflicts ORDER BY id)";
    assert_eq!(a.text(kept), b.text(kept));
    let losers = a.text("SELECT group_concat(loser) FROM __litemesh_conflicts");
    assert!(losers.contains("of a") && losers.contains("of b"), "{losers}");
    assert_eq!(a.engine.store().conflict_counts().unwrap().open, 3);
}

#[test]
fn two_that_were_both_away_past_retention_lose_nothing_that_either_wrote() {
    both_away("both-away-at-once", true);
    both_away("both-away-in-turn", false);
}
