//! Files that come back: restored, replaced, away for too long, with rows of their own. Real nodes.

use std::path::Path;

use rusqlite::Connection;
use rusqlite::backup::Backup;

use crate::support::{Node, litemesh, pair, wait_equal, wait_for};

const SCHEMA: &str = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v); INSERT INTO t VALUES('first', 1)";

fn rows(node: &Node) -> String {
    node.text("app.db", "SELECT group_concat(id || '=' || v, ' ') FROM (SELECT * FROM t ORDER BY id)")
}

fn copy_to(node: &Node, to: &Path) {
    Connection::open(node.file("app.db")).unwrap().execute("VACUUM INTO ?1", [to.to_str().unwrap()]).unwrap();
}

fn conflicts(node: &Node, args: &[&str]) -> String {
    let output = litemesh().current_dir(&node.home).arg("conflicts").args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn events(node: &Node) -> String {
    node.status()["databases"][0]["events"].to_string()
}

fn site(node: &Node) -> String {
    node.status()["databases"][0]["site"].to_string()
}

/// Rows written after the backup come back from the peer, what the backup alone has reaches it.
fn check_restored(a: &Node, b: &Node, before: &str) {
    wait_for("a new site", || site(a) != before && events(a).contains("goes on as a new site"));
    wait_for("the newer row is back", || rows(a).contains("newer"));
    a.exec("app.db", "INSERT INTO t VALUES('restored', 1)");
    a.sync();
    b.sync();
    wait_equal(&[a, b], "app.db");
    assert!(rows(b).contains("restored=1"), "{}", rows(b));
}

#[test]
fn a_backup_restored_into_the_live_file_is_noticed_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), SCHEMA);
    a.sync();
    let (backup, before) = (dir.path().join("backup.db"), site(&a));
    copy_to(&a, &backup);
    a.exec("app.db", "INSERT INTO t VALUES('newer', 1)");
    a.sync();
    let mut live = Connection::open(a.file("app.db")).unwrap();
    let from = Connection::open(&backup).unwrap();
    let restored = Backup::new(&from, &mut live).unwrap();
    wait_for("it is restored", || matches!(restored.step(-1), Ok(rusqlite::backup::StepResult::Done)));
    drop(restored);
    check_restored(&a, &b, &before);
}

#[test]
fn a_backup_moved_over_the_live_file_is_noticed_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), SCHEMA);
    a.sync();
    let (backup, before) = (dir.path().join("a").join("backup.db"), site(&a));
    copy_to(&a, &backup);
    a.exec("app.db", "INSERT INTO t VALUES('newer', 1)");
    a.sync();
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(a.file(&format!("app.db{suffix}")));
    }
    std::fs::rename(&backup, a.file("app.db")).unwrap();
    check_restored(&a, &b, &before);
}

#[test]
fn a_copy_of_the_same_run_put_back_while_stopped_is_noticed_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), SCHEMA);
    a.sync();
    let (backup, before) = (dir.path().join("backup.db"), site(&a));
    copy_to(&a, &backup);
    a.exec("app.db", "INSERT INTO t VALUES('newer', 1)");
    a.sync();
    a.stop();
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(a.file(&format!("app.db{suffix}")));
    }
    std::fs::copy(&backup, a.file("app.db")).unwrap();
    a.exec("app.db", "INSERT INTO t VALUES('unsent', 1)");
    a.start(None);
    check_restored(&a, &b, &before);
    assert!(rows(&b).contains("unsent=1"));
}

/// The machine of a node goes back as a whole: its state directory with its file.
#[test]
fn a_node_that_went_back_with_its_state_directory_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), SCHEMA);
    a.sync();
    a.stop();
    let image = dir.path().join("image.db");
    copy_to(&a, &image);
    let remembered = std::fs::read(a.state_dir().join("databases.json")).unwrap();
    a.start(None);
    let before = site(&a);
    a.exec("app.db", "INSERT INTO t VALUES('newer', 1)");
    a.sync();
    a.kill();
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(a.file(&format!("app.db{suffix}")));
    }
    std::fs::copy(&image, a.file("app.db")).unwrap();
    std::fs::write(a.state_dir().join("databases.json"), remembered).unwrap();
    a.exec("app.db", "INSERT INTO t VALUES('unsent', 1)");
    a.start(None);
    check_restored(&a, &b, &before);
    wait_for("what it wrote before it knew is everywhere", || rows(&b).contains("unsent=1"));
}

/// Makes the logs that a stopped node keeps empty, as age does: else what was missed is read from there.
fn empty_logs(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()) {
        if entry.file_name().is_some_and(|n| n == "msgs") && dir.ends_with("LM_a") {
            std::fs::remove_dir_all(&entry).unwrap();
            std::fs::create_dir(&entry).unwrap();
        } else {
            empty_logs(&entry);
        }
    }
}

#[test]
fn a_node_away_past_all_retention_takes_a_copy_and_keeps_what_it_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), SCHEMA);
    a.exec("app.db", "INSERT INTO t VALUES('doomed', 1), ('shared', 1)");
    a.sync();
    a.stop();
    b.stop();
    let short = ["--tombstones-age", "200ms", "--absent-age", "1s"].map(str::to_owned);
    (a.extra, b.extra) = (short.to_vec(), short.to_vec());
    a.start(None);
    a.exec("app.db", "DELETE FROM t WHERE id IN ('doomed', 'first'); INSERT INTO t VALUES('of a', 1)");
    b.exec("app.db", "UPDATE t SET v = 2 WHERE id = 'doomed'; INSERT INTO t VALUES('of b', 1)");
    b.exec("app.db", "DELETE FROM t WHERE id = 'shared'");
    let forgotten = |n: &Node| n.status()["databases"][0]["deletes_forgotten"].as_u64().unwrap_or(0);
    wait_for("a forgets its deletes", || forgotten(&a) >= 2);
    a.stop();
    empty_logs(&a.state_dir());
    a.start(None);
    // An application has the file open all the time.
    let app = b.app("app.db");
    b.start(None);
    wait_for("b took a copy", || events(&b).contains("was away for too long"));
    app.execute("INSERT INTO t VALUES('still here', 1)", []).unwrap();
    wait_for("all are the same", || rows(&a) == "of a=1 of b=1 still here=1" && rows(&a) == rows(&b));
    let beside = std::fs::read_dir(b.file("app.db").parent().unwrap()).unwrap();
    let kept = beside.map(|e| e.unwrap().path()).find(|p| p.to_string_lossy().contains("app.db.diverged-"));
    let kept = Connection::open(kept.expect("the file as it was")).unwrap();
    let doomed: i64 = kept.query_row("SELECT v FROM t WHERE id = 'doomed'", [], |r| r.get(0)).unwrap();
    assert_eq!(doomed, 2);
    wait_for("the update of the deleted row is a conflict", || {
        conflicts(&a, &["list", "app.db"]).contains("doomed")
    });
}

#[test]
fn a_file_with_rows_of_its_own_is_united_by_key_with_merge() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (Node::new(dir.path(), "a", &["app.db"]), Node::new(dir.path(), "b", &["app.db"]));
    a.exec("app.db", SCHEMA);
    a.exec("app.db", "INSERT INTO t VALUES('both', 'of the mesh')");
    a.start(None);
    b.exec("app.db", "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    b.exec("app.db", "INSERT INTO t VALUES('both', 'of b'), ('first', 1), ('only b', 2)");
    b.extra = vec!["--merge".into()];
    b.start(Some(&a.token()));
    let all = "both=of the mesh first=1 only b=2";
    wait_for("both have all", || rows(&a) == all && rows(&b) == all);
    let list = |n: &Node| conflicts(n, &["list", "app.db"]);
    wait_for("the other row is kept", || list(&a).contains("of b") && list(&b).contains("of b"));
    let text = list(&b);
    let id = text.split_whitespace().next().unwrap();
    conflicts(&b, &["restore", "app.db", id]);
    wait_for("it is back everywhere", || rows(&a) == "both=of b first=1 only b=2" && rows(&b) == rows(&a));
}

fn put(node: &Node, bytes: &[u8]) {
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(node.file(&format!("app.db{suffix}")));
    }
    std::fs::write(node.file("app.db"), bytes).unwrap();
}

/// One adopted file is copied to two new nodes, which start at once.
#[test]
fn one_copy_started_on_two_nodes_at_once_goes_on_as_two_sites() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), SCHEMA);
    a.sync();
    let image = dir.path().join("image.db");
    copy_to(&a, &image);
    let (mut c, mut d) = (Node::new(dir.path(), "c", &["app.db"]), Node::new(dir.path(), "d", &["app.db"]));
    a.exec("app.db", "INSERT INTO t VALUES('newer', 1); DELETE FROM t WHERE id = 'first'");
    for node in [&c, &d] {
        std::fs::copy(&image, node.file("app.db")).unwrap();
        node.exec("app.db", &format!("INSERT INTO t VALUES('unsent of {}', 1)", node.name));
    }
    let token = a.token();
    c.spawn(Some(&token));
    d.spawn(Some(&token));
    c.wait_ready();
    d.wait_ready();
    for node in [&a, &b, &c, &d] {
        node.exec("app.db", &format!("INSERT INTO t VALUES('of {}', 1)", node.name));
    }
    let all = "newer=1 of a=1 of b=1 of c=1 of d=1 unsent of c=1 unsent of d=1";
    wait_for("all have all", || [&a, &b, &c, &d].iter().all(|n| rows(n) == all));
    wait_equal(&[&a, &b, &c, &d], "app.db");
    let mut sites: Vec<String> = [&a, &b, &c, &d].map(site).into();
    sites.sort();
    sites.dedup();
    assert_eq!(sites.len(), 4, "{sites:?}");
    for node in [&c, &d] {
        assert!(events(node).contains("goes on as a new site"), "{}", events(node));
        let shown = node.run(&["status"]);
        assert!(String::from_utf8_lossy(&shown.stdout).contains("event "), "the terminal shows it");
    }
    assert!(!events(&a).contains("new site") && !events(&b).contains("new site"));
    a.stop();
}

/// The main file alone, copied between two of its checkpoints: an older state that is whole.
#[test]
fn a_main_file_copied_without_its_log_goes_on_as_a_new_site() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), SCHEMA);
    a.exec("app.db", "INSERT INTO t VALUES('early', 1); PRAGMA wal_checkpoint(TRUNCATE)");
    a.sync();
    a.exec("app.db", "PRAGMA wal_checkpoint(TRUNCATE)");
    let before = site(&a);
    a.exec("app.db", "INSERT INTO t VALUES('newer', 1)");
    let image = std::fs::read(a.file("app.db")).unwrap();
    a.sync();
    a.stop();
    put(&a, &image);
    a.start(None);
    check_restored(&a, &b, &before);
}

/// The same, taken while SQLite was writing pages of the log into it: half of it is older than the other half.
#[test]
fn a_torn_copy_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), SCHEMA);
    let many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
                INSERT INTO t SELECT 'key ' || i, hex(randomblob(60)) FROM n";
    a.sync();
    a.exec("app.db", "PRAGMA wal_checkpoint(TRUNCATE)");
    let early = std::fs::read(a.file("app.db")).unwrap();
    a.exec("app.db", many);
    a.sync();
    a.exec("app.db", "PRAGMA wal_checkpoint(TRUNCATE)");
    a.stop();
    a.exec("app.db", "PRAGMA wal_checkpoint(TRUNCATE)");
    let late = std::fs::read(a.file("app.db")).unwrap();
    // The first pages are new, those behind them are not written yet.
    let at = 4 * 4096;
    let mut torn = late.clone();
    torn[at..early.len()].copy_from_slice(&early[at..]);
    torn.truncate(late.len());
    put(&a, &torn);
    a.spawn(None);
    wait_for("it ends", || a.process.as_mut().unwrap().try_wait().unwrap().is_some());
    assert!(!a.process.take().unwrap().wait().unwrap().success());
    let said = a.log.lock().unwrap().join("\n");
    assert!(said.contains("is damaged") && said.contains("move it away"), "{said}");
    assert_eq!(std::fs::read(a.file("app.db")).unwrap(), torn, "nothing was changed");
    // As it says.
    std::fs::rename(a.file("app.db"), a.file("damaged.db")).unwrap();
    a.start(None);
    wait_equal(&[&a, &b], "app.db");
    b.stop();
}

/// As README says: the whole mesh goes back to a backup.
#[test]
fn a_mesh_that_is_rolled_back_by_the_recipe_has_the_backups_rows_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), SCHEMA);
    let backup = dir.path().join("backup.db");
    a.sync();
    copy_to(&a, &backup);
    for node in [&a, &b] {
        node.exec(
            "app.db",
            &format!("INSERT INTO t VALUES('mistake of {}', 1); DELETE FROM t WHERE id = 'first'", node.name),
        );
        node.sync();
    }
    a.stop();
    b.stop();
    put(&a, &std::fs::read(&backup).unwrap());
    std::fs::remove_dir_all(a.state_dir()).unwrap();
    let detached = a.run(&["detach", "app.db"]);
    assert!(detached.status.success(), "{}", String::from_utf8_lossy(&detached.stderr));
    a.start(None);
    std::fs::rename(b.file("app.db"), b.file("before.db")).unwrap();
    std::fs::remove_dir_all(b.state_dir()).unwrap();
    b.start(Some(&a.token()));
    b.exec("app.db", "INSERT INTO t VALUES('after', 1)");
    b.sync();
    wait_equal(&[&a, &b], "app.db");
    assert_eq!(rows(&a), "after=1 first=1");
}
