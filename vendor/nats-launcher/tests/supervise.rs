//! A real nats-server under the supervisor.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use nats_launcher::{Backoff, Bundle, ExitCause, READY, ServerEvent, ServerSpec, Supervisor};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

const PATIENCE: Duration = Duration::from_secs(20);

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port()
}

fn start(dir: &Path, port: u16, backoff: Backoff) -> (Supervisor, Receiver<ServerEvent>) {
    let spec = ServerSpec {
        name: "test".to_owned(),
        binary: Bundle::install(dir).expect("a server"),
        args: ["-a", "127.0.0.1", "-p", &port.to_string()].map(Into::into).to_vec(),
        memory_limit_mib: Some(64),
        ready_when: vec![READY],
        hushed: Vec::new(),
        overheard: Vec::new(),
        grace: Duration::from_secs(5),
        backoff,
    };
    let (events, inbox) = mpsc::channel();
    let supervisor = Supervisor::start(spec, move |event| drop(events.send(event))).expect("a thread");
    (supervisor, inbox)
}

fn until_ready(events: &Receiver<ServerEvent>) -> u32 {
    loop {
        match events.recv_timeout(PATIENCE).expect("the server gets ready") {
            ServerEvent::Ready { pid } => return pid,
            ServerEvent::Exited { exit, .. } => panic!("not ready: {exit:?}"),
            ServerEvent::Started { .. } | ServerEvent::Said { .. } => {}
        }
    }
}

fn exists(pid: u32) -> bool {
    test_kill_process(as_pid(pid)).is_ok()
}

fn as_pid(pid: u32) -> Pid {
    Pid::from_raw(pid as i32).expect("not zero")
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn starts_and_stops_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let (supervisor, events) = start(dir.path(), free_port(), Backoff::default());
    let pid = until_ready(&events);
    assert_eq!(supervisor.pid(), Some(pid));
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    if cfg!(target_os = "linux") {
        assert_eq!(environment, b"GOMEMLIMIT=64MiB\0", "only what the server needs to know");
    }
    supervisor.stop();
    assert!(!exists(pid), "stopped and reaped");
    let last = events.iter().last().expect("told of the end");
    assert!(
        matches!(last, ServerEvent::Exited { exit, restart_in: None } if exit.cause == ExitCause::Stopped)
    );
}

#[test]
fn a_killed_server_is_started_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let (supervisor, events) = start(dir.path(), free_port(), Backoff::default());
    let first = until_ready(&events);
    kill_process(as_pid(first), Signal::KILL).expect("ours");
    let ServerEvent::Exited { exit, restart_in: Some(_) } = events.recv_timeout(PATIENCE).expect("told")
    else {
        panic!("the next event is the end")
    };
    assert_eq!(exit.cause, ExitCause::Died);
    let second = until_ready(&events);
    assert_ne!(first, second);
    assert_eq!(supervisor.restarts(), 1);
    drop(supervisor);
    assert!(!exists(first) && !exists(second));
}

#[test]
fn a_taken_port_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = holder.local_addr().expect("bound");
    let (supervisor, events) = start(dir.path(), address.port(), Backoff::default());
    let exit = loop {
        match events.recv_timeout(PATIENCE).expect("told") {
            ServerEvent::Exited { exit, .. } => break exit,
            ServerEvent::Ready { .. } => panic!("it cannot get ready"),
            ServerEvent::Started { .. } | ServerEvent::Said { .. } => {}
        }
    };
    assert_eq!(exit.cause, ExitCause::PortTaken { address: address.to_string() });
    drop(holder);
    until_ready_despite_exits(&events);
    supervisor.stop();
}

fn until_ready_despite_exits(events: &Receiver<ServerEvent>) {
    while !matches!(events.recv_timeout(PATIENCE).expect("the server gets ready"), ServerEvent::Ready { .. })
    {
    }
}

#[test]
fn what_cannot_be_started_is_told_and_can_be_stopped() {
    let spec = ServerSpec {
        name: "test".to_owned(),
        binary: PathBuf::from("/nowhere/nats-server"),
        args: Vec::new(),
        memory_limit_mib: None,
        ready_when: vec![READY],
        hushed: Vec::new(),
        overheard: Vec::new(),
        grace: Duration::from_secs(1),
        backoff: Backoff { first: Duration::from_secs(3600), ..Backoff::default() },
    };
    let (events, inbox) = mpsc::channel();
    let supervisor = Supervisor::start(spec, move |event| drop(events.send(event))).expect("a thread");
    let ServerEvent::Exited { exit, .. } = inbox.recv_timeout(PATIENCE).expect("told") else {
        panic!("nothing was started")
    };
    assert_eq!(exit.cause, ExitCause::NeverReady);
    assert!(exit.message.is_some());
    supervisor.stop();
}

#[test]
fn a_killed_parent_leaves_no_server() {
    let dir = tempfile::tempdir().expect("a directory");
    // target/<profile>/deps/<this test> -> target/<profile>/examples/hold
    let this = std::env::current_exe().expect("a path");
    let example = this.ancestors().nth(2).expect("a profile's directory").join("examples/hold");
    let mut parent = Command::new(example)
        .arg(dir.path())
        .args(["-a", "127.0.0.1", "-p", &free_port().to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the example is built with the tests");
    let mut line = String::new();
    BufReader::new(parent.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    let pid: u32 = line.trim().parse().expect("the server's id");
    assert!(exists(pid));
    parent.kill().expect("ours");
    parent.wait().expect("ours");
    // Reaped by init, or a zombie where nobody does: dead either way.
    wait_until("the server dies with its parent", || !exists(pid) || is_zombie(pid));
}

fn is_zombie(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
}
