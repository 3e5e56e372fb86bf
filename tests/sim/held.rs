//! Snapshots that are read from the file itself, while a program writes as fast as it can and brings its log into the
//! file all the time.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use litemesh::core::schema::SchemaMode;
use litemesh::core::version::SiteId;
use litemesh::replica::adopt;
use litemesh::replica::held::{HeldPages, Snapshot};
use rusqlite::Connection;

use crate::site::Site;

/// Money moves between accounts: there is always as much of it.
const ACCOUNTS: i64 = 2_000;

fn open(path: &Path) -> Connection {
    let conn = Connection::open(path).unwrap();
    conn.busy_timeout(Duration::from_secs(60)).unwrap();
    // A page is brought into the file soon, and often.
    conn.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF; PRAGMA wal_autocheckpoint = 20")
        .unwrap();
    conn
}

fn move_money(path: &Path, pause: Duration, ends: &AtomicBool) -> i64 {
    let mut conn = open(path);
    for n in 0.. {
        if ends.load(Ordering::Relaxed) {
            return n;
        }
        let tx = conn.transaction().unwrap();
        let sql = "UPDATE account SET money = money + ?2, filler = randomblob(300) WHERE id = ?1";
        tx.execute(sql, (n * 7 % ACCOUNTS, 5)).unwrap();
        tx.execute(sql, ((n * 13 + 1) % ACCOUNTS, -5)).unwrap();
        tx.commit().unwrap();
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
    unreachable!()
}

fn bytes(pages: &HeldPages, dest: &Path) -> Vec<u8> {
    let file = File::options().create(true).truncate(true).read(true).write(true).open(dest).unwrap();
    pages.copy_to(&file).unwrap();
    std::fs::read(dest).unwrap()
}

fn check(copy: &Path, a: &Site) {
    // Nobody else uses it, and its write-ahead log is what the snapshot must not need.
    let conn = Connection::open(copy).unwrap();
    let ask = |sql: &str| conn.query_row(sql, [], |r| r.get::<_, String>(0)).unwrap();
    assert_eq!(ask("PRAGMA integrity_check"), "ok");
    assert_eq!(ask("SELECT count(*) || ' ' || sum(money) FROM account"), format!("{ACCOUNTS} 0"));
    assert_eq!(ask("SELECT count(*) || '' FROM __litemesh_log"), "0", "all of it is absorbed");
    let reached: i64 = conn.query_row("SELECT max(n) FROM __litemesh_site", [], |r| r.get(0)).unwrap();
    assert_eq!(
        reached as u64,
        a.engine.store().head().vector.n(a.site()),
        "its own vector tells what it stands for"
    );
}

fn hold(pause: Duration, rounds: usize) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let app = open(&path);
    app.execute_batch("CREATE TABLE account(id INTEGER PRIMARY KEY, money INTEGER, filler BLOB)").unwrap();
    let fill = "WITH RECURSIVE c(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM c WHERE i + 1 < ?1)
                INSERT INTO account SELECT i, 0, randomblob(300) FROM c";
    app.execute(fill, [ACCOUNTS]).unwrap();
    adopt::install(&app, 7, SiteId(1)).unwrap();
    let mut a = Site::open(path.to_str().unwrap(), "a", SchemaMode::Replicate);
    let ends = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (path, ends) = (path.clone(), ends.clone());
        move || move_money(&path, pause, &ends)
    });
    let mut held = 0;
    for round in 0..rounds {
        let (_, snapshot) = a.engine.store_mut().file_snapshot().unwrap();
        let Snapshot::Held(pages) = snapshot else { continue };
        held += 1;
        let copy = dir.path().join(format!("copy{round}"));
        let first = bytes(&pages, &copy);
        check(&copy, &a);
        // More than a log's worth is written meanwhile, and absorbed.
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(5));
            a.engine.absorb().unwrap();
            a.engine.take_actions();
        }
        assert!(bytes(&pages, &copy) == first, "round {round}: nothing was written to its pages");
    }
    ends.store(true, Ordering::Relaxed);
    assert!(writer.join().unwrap() > 0);
    held
}

#[test]
fn pages_that_are_held_do_not_change() {
    assert!(hold(Duration::from_millis(3), 12) > 0, "a moment is found between writes");
    // Where none is found SQLite makes the copy.
    hold(Duration::ZERO, 12);
}

#[test]
fn of_a_file_at_rest_every_snapshot_is_held_and_none_in_rollback_mode() {
    let dir = tempfile::tempdir().unwrap();
    for (mode, is_held) in [("WAL", true), ("DELETE", false)] {
        let path = dir.path().join(mode);
        let app = Connection::open(&path).unwrap();
        app.pragma_update(None, "journal_mode", mode).unwrap();
        app.execute_batch("CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)").unwrap();
        adopt::install(&app, 7, SiteId(1)).unwrap();
        let mut a = Site::open(path.to_str().unwrap(), "a", SchemaMode::Replicate);
        for n in 0..5 {
            app.execute("INSERT INTO t VALUES(?1, ?1)", [n]).unwrap();
            let (own, snapshot) = a.engine.store_mut().file_snapshot().unwrap();
            assert_eq!(own.len(), 1);
            assert_eq!(matches!(snapshot, Snapshot::Held(_)), is_held, "{mode}");
        }
    }
}
