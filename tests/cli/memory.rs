//! nats-server has its memory budget, and one that gets too little is started again without a row lost.

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};

use crate::support::{Node, pair, wait_equal, wait_for};

fn pid(node: &Node) -> Pid {
    Pid::from_raw(i32::try_from(node.server_pid()).unwrap()).unwrap()
}

fn environment(node: &Node) -> String {
    let bytes = std::fs::read(format!("/proc/{}/environ", node.server_pid())).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn told(node: &Node, words: &str) -> bool {
    node.log.lock().unwrap().iter().any(|line| line.contains(words) && line.contains("its budget is 48 MiB"))
}

#[test]
#[cfg(target_os = "linux")]
fn a_server_that_dies_for_memory_costs_no_row() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), "CREATE TABLE t(n INTEGER PRIMARY KEY, v)");
    a.stop();
    a.extra = vec!["--nats-memory".to_owned(), "48MiB".to_owned()];
    a.start(None);
    assert_eq!(
        (environment(&a), environment(&b)),
        ("GOMEMLIMIT=48MiB\0".into(), "GOMEMLIMIT=64MiB\0".into())
    );

    let conn = a.app("app.db");
    let mut n = 0;
    let mut write = |rows: u32| {
        for _ in 0..rows {
            n += 1;
            conn.execute("INSERT INTO t VALUES(?1, zeroblob(5000))", [n]).expect("no write fails");
        }
    };
    write(200);
    // As the system's own killer ends it.
    let first = pid(&a);
    kill_process(first, Signal::KILL).unwrap();
    write(200);
    wait_for("the log tells of it", || {
        told(&a, "killed by signal 9, perhaps by the system for want of memory")
    });
    wait_for("another one runs", || {
        a.status()["fabric"]["server_restarts"] == 1 && a.status()["fabric"]["connected"] == true
    });
    write(200);
    // What it has already is more than it may have: the next that it asks for it does not get. At times Go's runtime
    // falls over that before it can say so; then the next one has its turn.
    let limit = Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
    let mut starved = None;
    wait_for("it gets no more memory", || {
        let running = a.status()["fabric"]["server_pid"].as_i64().filter(|pid| starved != Some(*pid));
        if let Some(pid) = running.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?))
            && a.status()["fabric"]["connected"] == true
            && prlimit(Some(pid), Resource::As, limit).is_ok()
        {
            starved = running;
        }
        write(20);
        told(&a, "nats-server got no more memory")
    });
    write(200);
    wait_equal(&[&a, &b], "app.db");
    a.sync();
    wait_for("another one runs", || a.status()["fabric"]["connected"] == true);
    assert_eq!(b.text("app.db", "SELECT CAST(count(*) AS TEXT) FROM t"), n.to_string());
}
