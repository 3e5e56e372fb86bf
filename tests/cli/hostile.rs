//! Those who come to do harm: they get nothing, cost little, and replication does not notice.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::support::{Node, pair, wait_equal, wait_for};

/// A TLS record that begins a handshake, and says that there is much to come.
const HANDSHAKE: [u8; 9] = [0x16, 0x03, 0x01, 0x40, 0x00, 0x01, 0xff, 0xff, 0xff];

fn resident_mib(pid: u64) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("a running process");
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1_024
}

/// Sends until it is thrown out; how much was taken from it.
fn pour(address: SocketAddr, first: &[u8], most: usize) -> usize {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as u8
    })
    .take(64 * 1_024)
    .collect();
    let mut sent = 0;
    if stream.write_all(first).is_err() {
        return 0;
    }
    while sent < most && stream.write_all(&noise).is_ok() {
        sent += noise.len();
    }
    sent
}

fn works(a: &Node, b: &Node, round: &str) {
    a.exec("app.db", &format!("INSERT INTO t VALUES('a {round}', 1)"));
    b.exec("app.db", &format!("INSERT INTO t VALUES('b {round}', 1)"));
    wait_equal(&[a, b], "app.db");
}

#[test]
fn noise_slow_talkers_and_endless_handshakes_cost_little() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    works(&a, &b, "before");
    let server = a.server_pid();
    let own = u64::from(a.process.as_ref().unwrap().id());
    let before = (resident_mib(server), resident_mib(own));

    // Half a handshake each, then silence.
    let began = Instant::now();
    let mut slow: Vec<TcpStream> = (0..400)
        .map(|_| {
            let mut stream = TcpStream::connect(a.addresses[0]).unwrap();
            stream.write_all(&HANDSHAKE).unwrap();
            stream
        })
        .collect();
    works(&a, &b, "with half-open connections");
    for first in
        [&HANDSHAKE[..], &[0x16, 0x03, 0x01, 0xff, 0xff], b"", b"CONNECT {", b"GET / HTTP/1.1\r\nA: "]
    {
        for address in &a.addresses[..2] {
            let taken = pour(*address, first, 64 << 20);
            assert!(taken < 64 << 20, "{address} takes whatever it is sent after {first:?}");
        }
    }
    works(&a, &b, "after noise");
    // They are thrown out, so that any number of them is bounded by what comes in a few seconds.
    for stream in &mut slow {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut rest = Vec::new();
        let ended = stream.read_to_end(&mut rest);
        let timed_out = ended.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!timed_out, "it is let in for as long as it likes");
    }
    println!("400 half-open connections were gone after {:?}", began.elapsed());
    works(&a, &b, "afterwards");
    let after = (resident_mib(server), resident_mib(own));
    println!("resident MiB of server and litemesh: {before:?} before, {after:?} after");
    assert!(after.0 < before.0 + 64 && after.1 < before.1 + 32, "{before:?} {after:?}");
    let status = a.status();
    assert_eq!(status["fabric"]["server_restarts"], 0);
    assert_eq!(status["fabric"]["routes"].as_array().unwrap().len(), 1);
}

/// Whether the other side has ended a connection, within the time that may take.
fn is_ended(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut rest = Vec::new();
    !stream.read_to_end(&mut rest).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock)
}

#[test]
fn thousands_of_half_open_connections_to_each_port_are_bounded_and_delay_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    works(&a, &b, "before");
    let (server, own) = (a.server_pid(), u64::from(a.process.as_ref().unwrap().id()));
    let before = (resident_mib(server), resident_mib(own));
    let halves: [&[u8]; 3] =
        [&HANDSHAKE, b"CONNECT {", b"GET /api/status HTTP/1.1\r\nHost: localhost\r\nA: "];
    let (mut open, mut slowest) = (Vec::new(), Duration::ZERO);
    for round in 0..4 {
        for (address, half) in a.addresses.iter().zip(halves) {
            for _ in 0..250 {
                // A full queue takes no more for the moment: nothing is to be proved by waiting.
                let stream = TcpStream::connect_timeout(address, Duration::from_millis(200));
                let Ok(mut stream) = stream else { continue };
                if stream.write_all(half).is_ok() {
                    open.push(stream);
                }
            }
        }
        let began = Instant::now();
        works(&a, &b, &format!("round {round}"));
        slowest = slowest.max(began.elapsed());
    }
    let during = (resident_mib(server), resident_mib(own));
    println!(
        "{} half-open connections: {before:?} MiB before, {during:?} during; slowest round {slowest:?}",
        open.len()
    );
    assert!(open.len() > 2_000, "{}", open.len());
    assert!(during.0 < before.0 + 96 && during.1 < before.1 + 48, "{before:?} {during:?}");
    assert!(slowest < Duration::from_secs(30), "{slowest:?}");
    // A page is served in spite of them, when those before it have had their time.
    let mut asks = TcpStream::connect(a.addresses[2]).unwrap();
    asks.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    asks.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    asks.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(open.iter_mut().all(is_ended), "one is let in for as long as it likes");
    works(&a, &b, "afterwards");
    assert_eq!(a.status()["fabric"]["server_restarts"], 0);
}

#[test]
fn who_asks_and_does_not_read_is_thrown_out() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    let asks = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(200);
    let mut greedy = TcpStream::connect(a.addresses[2]).unwrap();
    greedy.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let began = Instant::now();
    // Either its requests are not taken any more, or it is thrown out.
    while greedy.write_all(&asks).is_ok() && began.elapsed() < Duration::from_secs(60) {}
    wait_for("it is thrown out", || {
        let gone = greedy.write(b"G").is_err_and(|e| e.kind() != std::io::ErrorKind::WouldBlock);
        std::thread::sleep(Duration::from_millis(100));
        gone
    });
    works(&a, &b, "afterwards");
}

#[test]
fn a_program_of_the_host_gets_nothing_of_the_meshs_or_the_servers() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    wait_for("the log is there", || !a.status()["fabric"]["log"]["copies"].as_array().unwrap().is_empty());
    let accounts = std::fs::read(a.state_dir().join("accounts.json")).unwrap();
    let accounts: serde_json::Value = serde_json::from_slice(&accounts).unwrap();
    let password = accounts["app"].as_str().unwrap().to_owned();
    let url = format!("nats://{}", a.addresses[1]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let options = async_nats::ConnectOptions::with_user_and_password("app".to_owned(), password);
        let client = options.connect(&url).await.unwrap();
        let mut heard = client.subscribe("lm.>").await.unwrap();
        let mut events = client.subscribe("$SYS.>").await.unwrap();
        client.flush().await.unwrap();
        for subject in ["lm.b.z", "lm.d.b.z", "lm.k.a", "lm.m.z", "lm.c.a.app.0000000000000001"] {
            client
                .publish(subject, "{\"routes\":[\"203.0.113.1:1\"],\"gone\":[\"b\"]}".into())
                .await
                .unwrap();
        }
        for subject in [
            "$JS.API.STREAM.DELETE.LM_a",
            "$JS.API.STREAM.PURGE.LM_a",
            "$JS.API.SERVER.REMOVE",
            "$JS.API.META.RESCUE",
            "$JS.API.META.LEADER.STEPDOWN",
            "$SYS.REQ.SERVER.PING",
        ] {
            let asked = client.request(subject, "{\"peer\":\"b\",\"quorum_needed\":1}".into());
            let answer = tokio::time::timeout(Duration::from_secs(2), asked).await;
            if let Ok(Ok(message)) = answer {
                let text = String::from_utf8_lossy(&message.payload).into_owned();
                assert!(text.contains("\"error\"") || text.is_empty(), "{subject}: {text}");
            }
        }
        works(&a, &b, "meanwhile");
        let quiet = Duration::from_secs(3);
        let own = tokio::time::timeout(quiet, async {
            use futures::StreamExt;
            // What it said itself comes back to it; nothing else does.
            while let Some(message) = heard.next().await {
                assert!(message.payload.starts_with(b"{\"routes\""), "{}", message.subject);
            }
        });
        drop(own.await);
        let told = tokio::time::timeout(quiet, async {
            use futures::StreamExt;
            while let Some(message) = events.next().await {
                assert!(message.payload.starts_with(b"{\"peer\""), "{}", message.subject);
            }
        });
        drop(told.await);
        assert!(async_nats::connect(&url).await.is_err(), "without a password nobody is let in");
    });
    assert_eq!(a.status()["peers"].as_array().unwrap().len(), 1);
    assert_eq!(b.status()["fabric"]["messages_refused"], 0);
    assert_eq!(a.status()["fabric"]["log"]["copies"], serde_json::json!(["a"]));
    works(&a, &b, "afterwards");
}
