//! Strangers get nothing, and secrets stay where they belong.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::refusal::processes;
use crate::support::{Node, wait_equal};

/// What a listener answers to plain words.
fn plain(address: SocketAddr, words: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // It may hang up at any moment.
    drop(stream.write_all(words.as_bytes()));
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer));
    answer
}

/// What it answers over TLS to somebody without a certificate; `None` where there is no openssl.
fn without_certificate(address: SocketAddr, words: &str) -> Option<String> {
    let mut child = Command::new("openssl")
        .args(["s_client", "-quiet", "-connect", &address.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    // It may have ended already.
    drop(child.stdin.take().unwrap().write_all(words.as_bytes()));
    Some(String::from_utf8_lossy(&child.wait_with_output().unwrap().stdout).into_owned())
}

#[test]
fn a_stranger_at_the_cluster_port_gets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = crate::support::pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    let route = "CONNECT {\"verbose\":false,\"name\":\"z\"}\r\nSUB lm.> 1\r\nPING\r\n";
    for words in ["", "GET / HTTP/1.1\r\n\r\n", route, "\u{16}\u{3}\u{1}\u{ff}garbage"] {
        let answer = String::from_utf8_lossy(&plain(a.addresses[0], words)).into_owned();
        for telling in ["INFO", "PONG", "lm.", "server_name"] {
            assert!(!answer.contains(telling), "{words:?}: {answer}");
        }
    }
    match without_certificate(a.addresses[0], route) {
        Some(answer) => assert!(!answer.contains("INFO") && !answer.contains("PONG"), "{answer}"),
        None => eprintln!("skipped: there is no openssl to come with TLS"),
    }
    // Many who say nothing at all hold nobody up.
    let silent: Vec<_> = (0..50).map(|_| TcpStream::connect(a.addresses[0]).unwrap()).collect();
    a.exec("app.db", "INSERT INTO t VALUES('a', 1)");
    b.exec("app.db", "INSERT INTO t VALUES('b', 1)");
    a.sync();
    b.sync();
    wait_equal(&[&a, &b], "app.db");
    drop(silent);
    let answer = String::from_utf8_lossy(&plain(a.addresses[1], "CONNECT {}\r\nPING\r\n")).into_owned();
    assert!(answer.contains("-ERR 'Authorization Violation'") && !answer.contains("PONG"), "{answer}");
}

#[test]
fn what_is_the_meshs_is_not_for_programs_that_may_use_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = crate::support::pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    let env: serde_json::Value = serde_json::from_slice(&a.run(&["env", "--json"]).stdout).unwrap();
    let connect =
        format!("CONNECT {{\"verbose\":false,\"user\":{},\"pass\":{}}}\r\n", env["user"], env["password"]);
    let say = |words: &str| {
        let answer = plain(a.addresses[1], &format!("{connect}{words}PING\r\n"));
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.contains("PONG"), "it was let in and read: {answer}");
        answer
    };
    assert!(say("SUB own.> 1\r\nPUB own.1 2\r\nhi\r\n").contains("MSG own.1 1 2"));
    // For ten seconds in which the nodes talk to each other, and programs write.
    a.exec("app.db", "INSERT INTO t VALUES('a', 1)");
    let answer = say("SUB lm.> 1\r\nSUB $SYS.> 2\r\nSUB $NRG.> 3\r\nPUB lm.c.b.app.1 2\r\nhi\r\n");
    for subject in ["$SYS", "$NRG", "lm.b", "lm.k"] {
        assert!(!answer.contains(&format!("MSG {subject}")), "{answer}");
    }
    assert_eq!(b.status()["databases"][0]["messages_refused"], 0, "it did not come through");
    let (asked, before) = (0x0101_0101, meta_term(&a));
    let mut request = "\u{1}\u{1}\u{1}\u{1}".to_owned();
    request.extend(std::iter::repeat_n('\0', 20));
    request.push_str("nobody!!");
    say(&format!("PUB $NRG.V._meta_ reply {}\r\n{request}\r\n", request.len()));
    assert!(before < asked && meta_term(&a) < asked, "nobody's request for votes was heard");
}

/// The term of the group that decides where streams are, from the server's own monitoring port.
fn meta_term(node: &Node) -> u64 {
    let conf = std::fs::read_to_string(node.state_dir().join("nats.conf")).unwrap();
    let line = conf.lines().find(|line| line.starts_with("http:")).unwrap();
    let address = line.split('"').nth(1).unwrap().parse().unwrap();
    let answer = String::from_utf8(plain(address, "GET /raftz?acc=SYS HTTP/1.0\r\n\r\n")).unwrap();
    let json = answer.split_once("\r\n\r\n").unwrap().1;
    let groups: serde_json::Value = serde_json::from_str(json).unwrap();
    groups["SYS"]["_meta_"]["term"].as_u64().unwrap()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// Strings of the state directory that only its owner may know.
fn secrets(node: &Node) -> Vec<String> {
    let read = |name: &str| std::fs::read_to_string(node.state_dir().join(name)).unwrap();
    let token = node.token();
    // The key's own letters may be dashes.
    let (_, key) = token.split_once('-').unwrap();
    let mut secrets = vec![key.split('@').next().unwrap().to_owned(), read("mesh.key").trim().to_owned()];
    assert!(secrets.iter().all(|s| s.len() >= 40), "whole keys");
    for file in ["accounts.json", "control.json"] {
        let words: Vec<String> = read(file).split('"').map(str::to_owned).collect();
        secrets.extend(words.into_iter().filter(|w| w.len() >= 20 && !w.contains([':', '.', '/'])));
    }
    assert!(secrets.len() >= 4, "a password or two, the control secret, the key, the token");
    secrets
}

#[test]
fn secrets_stay_in_files_of_the_owner() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    let mut b = Node::new(dir.path(), "b", &["app.db"]);
    a.exec("app.db", "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    for node in [&mut a, &mut b] {
        node.extra = vec!["--log".into(), "debug".into()];
    }
    a.start(None);
    std::fs::write(b.file("token"), a.token()).unwrap();
    b.extra.extend(["--join-file".into(), "token".into()]);
    b.start(None);
    a.exec("app.db", "INSERT INTO t VALUES('x', 1)");
    a.sync();
    for node in [&a, &b] {
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&node.state_dir()), 0o700);
        let secrets = secrets(node);
        // The server's program itself knows the words.
        let programs = node.state_dir().join("bin");
        for file in files(&node.state_dir()).into_iter().filter(|f| !f.starts_with(&programs)) {
            // Servers replace files while they run.
            let Ok(bytes) = std::fs::read(&file) else { continue };
            let bytes = String::from_utf8_lossy(&bytes).into_owned();
            let is_secret = secrets.iter().any(|s| bytes.contains(s)) || bytes.contains("PRIVATE KEY");
            let private = std::fs::metadata(&file).is_ok_and(|m| m.permissions().mode() & 0o777 == 0o600);
            assert!(!is_secret || private || !file.exists(), "{}", file.display());
        }
        let status = node.status().to_string();
        let text = String::from_utf8(node.run(&["status"]).stdout).unwrap();
        let log = node.log.lock().unwrap().join("\n");
        let lines: String =
            processes(node.home.to_str().unwrap()).into_iter().map(|(_, line)| line).collect();
        assert!(lines.contains("nats-server") || !Path::new("/proc/self").exists());
        for secret in secrets {
            assert!(!status.contains(&secret) && !text.contains(&secret), "in the status");
            assert!(!log.contains(&secret), "in the log");
            assert!(!lines.contains(&secret), "in the list of processes: {lines}");
        }
    }
}

#[test]
fn what_is_in_memory_is_not_dumped_to_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    a.start(None);
    let litemesh = a.process.as_ref().unwrap().id();
    let server = a.server_pid() as u32;
    for pid in [litemesh, server] {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        let limits: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        // One byte, not none: only that keeps Linux from handing a dump to a program, too.
        assert_eq!(limits, [1, 1], "{line}");
    }
    let pid = rustix::process::Pid::from_raw(litemesh as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::ABORT).unwrap();
    let status = a.process.take().unwrap().wait().unwrap();
    assert!(!std::os::unix::process::ExitStatusExt::core_dumped(&status), "{status}");
    let left: Vec<_> = files(&a.home).into_iter().filter(|f| f.to_string_lossy().contains("core")).collect();
    assert!(left.is_empty(), "{left:?}");
}
