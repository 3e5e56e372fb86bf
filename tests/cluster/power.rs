//! The power fails: whatever was not synchronised to the disk is gone, of the application's writes and of ours. Nothing
//! that a peer got before may be among it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rusqlite::Connection;

use crate::support::{Node, pair, wait_equal, wait_for};

const SCHEMA: &str = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, n INTEGER, filler BLOB)";

/// A disk that forgets: the library that keeps what was synchronised, and where.
struct Disk {
    library: PathBuf,
    watched: PathBuf,
    aside: PathBuf,
}

impl Disk {
    fn new(dir: &Path, watched: &Path) -> Self {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/power.c");
        let (library, aside) = (dir.join("power.so"), dir.join("aside"));
        std::fs::create_dir(&aside).unwrap();
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(&library)
            .arg(&source)
            .arg("-ldl")
            .status();
        assert!(built.expect("a C compiler").success());
        Self { library, watched: watched.canonicalize().unwrap(), aside }
    }

    fn variables(&self) -> Vec<(String, String)> {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        vec![
            ("LD_PRELOAD".to_owned(), text(&self.library)),
            ("POWER_WATCH".to_owned(), text(&self.watched)),
            ("POWER_ASIDE".to_owned(), text(&self.aside)),
        ]
    }

    /// What is left after the power was cut.
    fn cut(&self, file: &str) {
        for suffix in ["", "-wal", "-shm"] {
            let name = format!("{file}{suffix}");
            let (there, kept) = (self.watched.join(&name), self.aside.join(&name));
            if kept.exists() && suffix != "-shm" {
                std::fs::copy(&kept, &there).unwrap();
            } else if there.exists() && !suffix.is_empty() {
                std::fs::remove_file(&there).unwrap();
            }
        }
    }
}

/// The application, a process of its own: the command line's sqlite3.
fn application(disk: &Disk, round: usize) -> Child {
    let mut child = Command::new("sqlite3")
        .arg(disk.watched.join("app.db"))
        .envs(disk.variables())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("sqlite3");
    let mut input = child.stdin.take().unwrap();
    std::thread::spawn(move || {
        // A checkpoint synchronises the log, too: with many, what is lost is in the file itself; without, all that nobody
        // has synchronised by itself is lost.
        let pages = if round.is_multiple_of(2) { 40 } else { 100_000 };
        let first =
            format!(".timeout 20000\nPRAGMA synchronous = NORMAL;\nPRAGMA wal_autocheckpoint = {pages};\n");
        let mut sent = input.write_all(first.as_bytes());
        for n in 0.. {
            // It is killed some time.
            if sent.is_err() {
                return;
            }
            let row = format!("INSERT INTO t VALUES('{round}-{n}', {n}, randomblob(300));\n");
            sent = input.write_all(row.as_bytes()).and_then(|()| input.flush());
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    child
}

fn count(node: &Node, sql: &str) -> i64 {
    node.app("app.db").query_row(sql, [], |r| r.get(0)).unwrap()
}

/// The number of the last commit of a site that a file has.
fn reached(file: &Path, site: i64) -> i64 {
    let conn = Connection::open(file).unwrap();
    conn.busy_timeout(Duration::from_secs(20)).unwrap();
    let sql = "SELECT coalesce(max(n), 0) FROM __litemesh_site WHERE site = ?1";
    conn.query_row(sql, [site], |r| r.get(0)).unwrap()
}

fn site(node: &Node) -> i64 {
    count(node, "SELECT value FROM __litemesh_meta WHERE key = 'site'")
}

#[test]
fn what_a_peer_has_survives_a_power_cut_at_its_origin() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), SCHEMA);
    wait_equal(&[&a, &b], "app.db");
    a.stop();
    let disk = Disk::new(dir.path(), &a.home);
    a.variables = disk.variables();
    let mut lost = 0;
    for round in 0..5 {
        a.start(None);
        let origin = site(&a);
        let mut app = application(&disk, round);
        let here = format!("SELECT count(*) FROM t WHERE id LIKE '{round}-%'");
        wait_for("rows at the peer", || count(&b, &here) > 30 + 20 * round as i64);
        // Both at the same moment, as far as that goes: the one first, or the other.
        if round.is_multiple_of(2) {
            app.kill().unwrap();
            a.kill();
        } else {
            a.kill();
            app.kill().unwrap();
        }
        app.wait().unwrap();
        let written = count(&a, &here);
        disk.cut("app.db");
        let ok: String = a.app("app.db").query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
        assert_eq!(ok, "ok", "SQLite's own promise");
        lost += written - count(&a, &here);
        let (there, kept) = (reached(&b.file("app.db"), origin), reached(&a.file("app.db"), origin));
        assert!(there <= kept, "round {round}: the peer has commit {there}, the disk of its origin {kept}");
        let missing = format!("SELECT group_concat(id) FROM t WHERE id LIKE '{round}-%' ORDER BY n");
        let (of_b, of_a) = (b.text("app.db", &missing), a.text("app.db", &missing));
        let of_a: Vec<&str> = of_a.split(',').collect();
        assert!(of_b.split(',').all(|id| of_a.contains(&id)), "round {round}: {of_b} there, {of_a:?} kept");
    }
    println!("{lost} rows that nobody else had were lost with the power, as SQLite may");
    a.start(None);
    wait_equal(&[&a, &b], "app.db");
    assert_eq!(a.status()["databases"][0]["stopped"], serde_json::json!([]));
    a.exec("app.db", "INSERT INTO t VALUES('after', 1, NULL)");
    b.exec("app.db", "INSERT INTO t VALUES('after too', 1, NULL)");
    wait_equal(&[&a, &b], "app.db");
    assert_eq!(count(&a, "SELECT count(*) FROM t WHERE id LIKE 'after%'"), 2);
}
