//! The endpoints on loopback, and whom they refuse.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::support::{pair, wait_for};

/// One request with these headers; the status code and the body.
fn ask(address: SocketAddr, request: &str, headers: &[&str]) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    let headers: String = headers.iter().map(|h| format!("{h}\r\n")).collect();
    write!(stream, "{request} HTTP/1.1\r\n{headers}Connection: close\r\nContent-Length: 0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let code = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (code, answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

#[test]
fn health_status_and_metrics_for_this_host_only() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    let address = a.addresses[2];
    let host = format!("Host: {address}");
    let get = |path: &str| ask(address, &format!("GET {path}"), &[&host]);
    assert_eq!(get("/healthz").0, 200);
    wait_for("it is told ready", || get("/readyz").0 == 200);
    let page = get("/");
    assert!(page.0 == 200 && page.1.to_lowercase().contains("<html"), "{}", page.1);
    let (code, text) = get("/api/status");
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &status["node"]), (200, &"a".into()));
    let (code, metrics) = get("/metrics");
    assert_eq!(code, 200);
    for line in metrics.lines().filter(|l| !l.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(name.starts_with("litemesh_") && value.parse::<f64>().is_ok(), "{line}");
    }
    assert!(metrics.contains("litemesh_ready 1"), "{metrics}");
    assert_eq!(get("/nothing").0, 404);
    for stranger in ["Host: evil.example", "Host: evil.example:8222", "Host: 192.0.2.1", "X-No-Host: 1"] {
        for path in ["/", "/api/status", "/metrics", "/readyz", "/control/token"] {
            let (code, body) = ask(address, &format!("GET {path}"), &[stranger]);
            assert!(code == 403 || code == 400, "{stranger} {path}: {code}");
            assert!(!body.contains("lm1-") && !body.contains("app.db"), "{body}");
        }
    }
    let wrong = "Authorization: Bearer 0000000000000000";
    for request in ["GET /control/token", "POST /control/sync", "POST /control/detach"] {
        for headers in [&[&host[..]][..], &[&host[..], wrong], &[&host[..], "Authorization: Bearer "]] {
            let (code, body) = ask(address, request, headers);
            assert_eq!(code, 401, "{request} {headers:?}");
            assert!(!body.contains("lm1-"), "{body}");
        }
    }
    b.kill();
    wait_for("b is away", || a.status()["peers"][0]["live"] == false);
    assert_eq!((get("/readyz").0, get("/healthz").0), (200, 200), "they do not depend on the peer");
}
