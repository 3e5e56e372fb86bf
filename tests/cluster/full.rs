//! File systems that are full: who writes there is told, nothing acknowledged is lost, and all goes on when there is room.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode};
use serde_json::Value;

use crate::poison::look_inside;
use crate::support::{Node, wait_equal, wait_for};

const FILE: &str = "db/app.db";
const SCHEMA: &str = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)";

/// A small file system that is unmounted when the test ends.
struct Disk(PathBuf);

impl Disk {
    /// `None`, and says so, where nothing can be mounted.
    fn mount(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at.to_owned())),
            Ok(output) => {
                eprintln!(
                    "SKIPPED: no file system can be mounted here: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
                None
            }
            Err(e) => {
                eprintln!("SKIPPED: mount cannot be run: {e}");
                None
            }
        }
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Takes every byte that is left.
    fn fill(&self) {
        let mut file = File::options().create(true).append(true).open(self.ballast()).unwrap();
        let zeros = vec![0; 1 << 20];
        for size in [1 << 20, 1 << 12, 1] {
            while file.write_all(&zeros[..size]).is_ok() {}
        }
    }

    /// The same, but for so many bytes.
    fn fill_but(&self, bytes: u64) {
        self.fill();
        let file = File::options().write(true).open(self.ballast()).unwrap();
        file.set_len(file.metadata().unwrap().len() - bytes).unwrap();
    }

    fn make_room(&self) {
        std::fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let unmount = Command::new("umount").arg("--lazy").arg(&self.0).status();
        assert!(unmount.is_ok_and(|s| s.success()) || std::thread::panicking());
    }
}

/// Two nodes; `part` of the second is on a file system of its own. The disk is dropped last.
fn pair_with_disk(dir: &Path, part: &str, size: &str) -> Option<(Node, Node, Disk)> {
    let (mut a, mut b) = (Node::new(dir, "a", &[FILE]), Node::new(dir, "b", &[FILE]));
    let disk = Disk::mount(&b.home.join(part), size)?;
    [&a, &b].iter().for_each(|n| std::fs::create_dir_all(n.home.join("db")).unwrap());
    a.exec(FILE, SCHEMA);
    a.start(None);
    b.start(Some(&a.token()));
    Some((a, b, disk))
}

fn write(app: &Connection, who: &str, n: u32) -> rusqlite::Result<()> {
    let sql = "INSERT INTO t VALUES(?1, randomblob(3000))";
    app.execute(sql, [format!("{who}{n:06}")]).map(|_| ())
}

fn app(node: &Node) -> Value {
    node.status()["databases"][0].clone()
}

fn assert_sound(nodes: &[&Node]) {
    for node in nodes {
        assert_eq!(node.text(FILE, "PRAGMA integrity_check"), "ok", "{}", node.name);
    }
}

fn count(node: &Node, who: &str) -> u32 {
    node.text(FILE, &format!("SELECT CAST(count(*) AS TEXT) FROM t WHERE id LIKE '{who}%'")).parse().unwrap()
}

#[test]
fn a_full_disk_under_the_database_stops_nobody_for_good() {
    let dir = tempfile::tempdir().unwrap();
    let Some((a, b, disk)) = pair_with_disk(dir.path(), "db", "24M") else { return };
    let (of_a, of_b) = (a.app(FILE), b.app(FILE));
    for n in 0..20 {
        write(&of_a, "early", n).unwrap();
    }
    wait_equal(&[&a, &b], FILE);
    disk.fill();

    // The applying node: what its file has no room for waits, visibly.
    for n in 0..1_000 {
        write(&of_a, "a", n).unwrap();
    }
    wait_for("b says that its disk is full", || {
        let told = app(&b)["stopped"].to_string();
        told.contains("database or disk is full")
    });
    assert_eq!(app(&b)["state"], "error");
    let warned = b.log.lock().unwrap().iter().filter(|l| l.contains("disk is full")).count();
    assert!((1..10).contains(&warned), "told {warned} times");

    // The writing node: its application is told what SQLite says, for what does not fit.
    let (mut acknowledged, mut refused) = (0, 0);
    while refused < 5 {
        match write(&of_b, "b", acknowledged) {
            Ok(()) => acknowledged += 1,
            Err(e) => {
                assert_eq!(e.sqlite_error_code(), Some(ErrorCode::DiskFull), "{e}");
                assert!(e.to_string().contains("database or disk is full"), "{e}");
                refused += 1;
            }
        }
    }
    println!("{acknowledged} writes fitted");
    assert_eq!(app(&b)["state"], "error", "it runs, and answers");
    assert_eq!(app(&a)["state"], "ok", "a's own trouble it is not");
    std::thread::sleep(Duration::from_secs(2));

    disk.make_room();
    wait_for("b takes everything in", || count(&b, "a") == 1_000);
    wait_for("b's own reach a", || count(&a, "b") == acknowledged);
    write(&of_b, "late", 1).unwrap();
    wait_equal(&[&a, &b], FILE);
    wait_for("it says so", || app(&b)["state"] == "ok");
    assert_sound(&[&a, &b]);
}

#[test]
fn the_writers_disk_is_full_and_what_it_acknowledged_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let Some((a, b, disk)) = pair_with_disk(dir.path(), "db", "24M") else { return };
    let of_b = b.app(FILE);
    disk.fill_but(1 << 20);
    // Nothing comes from elsewhere: the application fills its own disk while its writes are sent.
    let mut acknowledged = 0;
    loop {
        match write(&of_b, "b", acknowledged) {
            Ok(()) => acknowledged += 1,
            Err(e) => {
                assert_eq!(e.sqlite_error_code(), Some(ErrorCode::DiskFull), "{e}");
                break;
            }
        }
    }
    println!("{acknowledged} writes fitted");
    assert!(acknowledged > 10);
    assert_eq!(count(&b, "b"), acknowledged, "what was acknowledged is there");
    wait_for("litemesh says what is wrong, or all was taken in", || {
        app(&b)["stopped"].to_string().contains("database or disk is full") || count(&a, "b") == acknowledged
    });
    disk.make_room();
    for n in 0..100 {
        write(&of_b, "late", n).unwrap();
    }
    wait_equal(&[&a, &b], FILE);
    assert_eq!((count(&a, "b"), count(&a, "late")), (acknowledged, 100));
    wait_for("it says so", || app(&b)["state"] == "ok");
    assert_sound(&[&a, &b]);
}

#[test]
fn a_full_state_directory_stops_neither_writes_nor_replication() {
    let dir = tempfile::tempdir().unwrap();
    let Some((a, b, disk)) = pair_with_disk(dir.path(), "state", "96M") else { return };
    let (of_a, of_b) = (a.app(FILE), b.app(FILE));
    wait_for("b's log is there", || {
        b.exec(FILE, "INSERT INTO t VALUES('first' || hex(randomblob(8)), 1)");
        b.status()["fabric"]["log_acked"].as_u64() > Some(0)
    });
    disk.fill();
    for n in 0..300 {
        write(&of_b, "b", n).unwrap();
        write(&of_a, "a", n).unwrap();
    }
    wait_equal(&[&a, &b], FILE);
    println!("while it is full: {}", b.status()["fabric"]);
    // One that is larger than what is kept in memory on its way.
    let large = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 6000)
                 INSERT INTO t SELECT 'large' || i, randomblob(2000) FROM c";
    of_a.execute(large, []).unwrap();
    of_b.execute(&large.replace("large", "big"), []).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    write(&of_b, "meanwhile", 1).unwrap();
    write(&of_a, "meanwhile too", 1).unwrap();
    println!("with large ones: {}", app(&b));

    disk.make_room();
    wait_equal(&[&a, &b], FILE);
    assert_eq!(
        (count(&a, "b0"), count(&b, "a0"), count(&b, "large"), count(&a, "big")),
        (300, 300, 6000, 6000)
    );
    let acked = || b.status()["fabric"]["log_acked"].as_u64().unwrap();
    let before = acked();
    let mut n = 0;
    wait_for("the log takes commits again", || {
        n += 1;
        write(&of_b, "late", n).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        acked() > before
    });
    wait_equal(&[&a, &b], FILE);
    wait_for("what the log missed is not awaited for ever", || b.status()["fabric"]["log_unacked"] == 0);
    wait_for("it says so", || app(&b)["state"] == "ok");
    assert_sound(&[&a, &b]);
}

/// How a node's log stream is configured, once it is there.
fn log_config(node: &Node) -> Value {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = look_inside(node).await;
        let answer =
            client.request(format!("$JS.API.STREAM.INFO.LM_{}", node.name), "".into()).await.unwrap();
        serde_json::from_slice::<Value>(&answer.payload).unwrap()["config"].clone()
    })
}

#[test]
fn the_log_keeps_what_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    a.exec("app.db", SCHEMA);
    // The last is more than all streams together may take otherwise.
    for (size, bytes, age, seconds) in [
        ("", 1 << 30, "", 72 * 3600),
        ("64MiB", 64 << 20, "2h", 7_200),
        ("9GiB", 9_u64 << 30, "30d", 30 * 86_400),
    ] {
        let options = [("--log-max-bytes", size), ("--log-max-age", age)];
        let given = options.iter().filter(|(_, v)| !v.is_empty());
        a.extra = given.flat_map(|(o, v)| [(*o).to_owned(), (*v).to_owned()]).collect();
        a.start(None);
        wait_for("the stream is as it should be", || {
            let config = log_config(&a);
            (config["max_bytes"].as_u64(), config["max_age"].as_u64())
                == (Some(bytes), Some(seconds * 1_000_000_000))
        });
        a.stop();
    }
    a.extra = vec!["--log-max-bytes".into(), "1MiB".into()];
    let refused = a.up_command(None).output().unwrap();
    assert_eq!(refused.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("the least is 16MiB"));
}
