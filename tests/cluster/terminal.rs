//! What somebody at a terminal sees of a node that joins.

use std::fs::File;
use std::io::Read;
use std::process::Stdio;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::support::{Node, wait_equal, wait_for};

#[test]
fn a_terminal_shows_how_far_a_copy_has_come() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (Node::new(dir.path(), "a", &["app.db"]), Node::new(dir.path(), "b", &["app.db"]));
    a.exec(
        "app.db",
        "CREATE TABLE t(id INTEGER PRIMARY KEY, v);
         WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 64)
         INSERT INTO t SELECT i, randomblob(1000000) FROM c",
    );
    a.start(None);
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    tcsetwinsize(&master, Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let terminal = File::options().write(true).open(name.to_str().unwrap()).unwrap();
    let mut command = b.up_command(Some(&a.token()));
    command.env("TERM", "xterm").stderr(terminal).stdout(Stdio::null()).stdin(Stdio::null());
    b.process = Some(command.spawn().unwrap());
    // The command holds a terminal of its own, which must be gone for the end to be seen.
    drop(command);
    let shown = std::thread::spawn(move || {
        let (mut master, mut shown) = (File::from(master), Vec::new());
        // When the last one who writes to it is gone, that is an error.
        let _ = master.read_to_end(&mut shown);
        String::from_utf8_lossy(&shown).into_owned()
    });
    wait_for("it has joined", || b.file("app.db").exists() && b.run(&["status"]).status.success());
    wait_equal(&[&a, &b], "app.db");
    b.stop();
    let shown = shown.join().unwrap();
    let bars: Vec<&str> = shown.split(['\r', '\n']).filter(|l| l.contains("fetching app")).collect();
    assert!(bars.iter().any(|l| l.contains(" MiB/") && l.contains("MiB/s")), "{shown}");
}
