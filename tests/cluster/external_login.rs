//! What lets nodes into a NATS system of somebody else's, servers of it that fail, and two nodes of one name.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::external::{LOGIN, Nats, SCHEMA, USER, connected, logged, refused, rows};
use crate::support::operator::Operator;
use crate::support::{Node, free_addresses, wait_equal, wait_for};

fn acked(node: &Node) -> u64 {
    node.status()["fabric"]["log_acked"].as_u64().unwrap()
}

/// Writes to a node until its log has more.
fn log_works(node: &Node, what: &str) {
    let (before, mut n) = (acked(node), 0);
    wait_for(what, || {
        n += 1;
        node.exec("app.db", &format!("INSERT OR REPLACE INTO t VALUES('{}, {what}', {n})", node.name));
        std::thread::sleep(Duration::from_millis(100));
        acked(node) > before
    });
}

#[test]
fn credentials_of_the_operator_let_nodes_in() {
    let dir = tempfile::tempdir().unwrap();
    let (operator, other) = (Operator::new(), Operator::new());
    let conf = format!("{}jetstream {{ store_dir: {:?} }}\n", operator.conf(), dir.path().join("js"));
    let nats = Nats::start(dir.path(), &conf);
    let with = |name: &str, file: &Path| {
        let mut node = nats.guest(dir.path(), name, "");
        node.extra = vec!["--fabric-credentials".to_owned(), file.display().to_string()];
        node
    };
    let (mut a, mut b) =
        (with("a", &operator.user(dir.path(), "first")), with("b", &operator.user(dir.path(), "second")));
    a.exec("app.db", SCHEMA);
    a.start(None);
    b.start(None);
    b.exec("app.db", "INSERT INTO t VALUES('b', 1)");
    wait_equal(&[&a, &b], "app.db");
    log_works(&a, "it has a log");
    let foreign = with("c", &other.user(dir.path(), "foreign"));
    let (code, said) = refused(&foreign);
    let words = "it does not let this node in";
    assert!(code == Some(1) && said.contains(words) && said.contains("--fabric-credentials"), "{said}");
    let (code, said) = refused(&with("c", &dir.path().join("nats.conf")));
    assert!(code == Some(1) && said.contains("nats.conf cannot be used"), "{said}");
    let (code, said) = refused(&nats.guest(dir.path(), "c", ""));
    assert!(code == Some(1) && said.contains(words), "{said}");
    let secret = std::fs::read_to_string(dir.path().join("first.creds")).unwrap();
    let seed = secret.lines().find(|line| line.starts_with("SU")).unwrap();
    assert!(!logged(&a, seed) && !a.status().to_string().contains(seed));
}

#[test]
fn a_token_lets_nodes_in() {
    let dir = tempfile::tempdir().unwrap();
    let nats = Nats::start(dir.path(), "authorization { token: \"t0ken@:/\" }\n");
    let (mut a, mut b) =
        (nats.guest(dir.path(), "a", "t0ken%40%3A%2F@"), nats.guest(dir.path(), "b", "t0ken%40%3A%2F@"));
    a.exec("app.db", SCHEMA);
    a.start(None);
    b.start(None);
    b.exec("app.db", "INSERT INTO t VALUES('b', 1)");
    wait_equal(&[&a, &b], "app.db");
    let (code, said) = refused(&nats.guest(dir.path(), "c", "another-t0ken@"));
    assert!(code == Some(1) && said.contains("it does not let this node in"), "{said}");
    assert!(!said.contains("t0ken") && !logged(&a, "t0ken") && !a.status().to_string().contains("t0ken"));
}

/// Three servers of one cluster, and where each tells of its connections.
struct Cluster {
    servers: Vec<Nats>,
    monitors: Vec<SocketAddr>,
}

impl Cluster {
    fn start(dir: &Path) -> Self {
        let (routes, monitors) = (free_addresses(3), free_addresses(3));
        let all: Vec<String> = routes.iter().map(|r| format!("\"nats://{r}\"")).collect();
        let server = |n: usize| {
            let home = dir.join(format!("n{n}"));
            std::fs::create_dir(&home).unwrap();
            let conf = format!(
                "{USER}server_name: n{n}\nhttp: \"{}\"\njetstream {{ store_dir: {:?} }}\ncluster {{ name: c, listen: \
                 \"{}\", routes: [{}] }}\n",
                monitors[n],
                home.join("js"),
                routes[n],
                all.join(", ")
            );
            Nats::start(&home, &conf)
        };
        Self { servers: (0..3).map(server).collect(), monitors }
    }

    fn url(&self) -> String {
        let places: Vec<String> = self.servers.iter().map(|s| s.address.to_string()).collect();
        format!("nats://{LOGIN}{}", places.join(",nats://"))
    }

    /// The server that a node is connected to.
    fn server_of(&self, node: &str) -> Option<usize> {
        (0..3).find(|n| {
            let connections = look(self.monitors[*n], "/connz");
            let name = format!("litemesh {node}");
            connections["connections"].as_array().into_iter().flatten().any(|c| c["name"] == name)
        })
    }
}

fn look(monitor: SocketAddr, path: &str) -> Value {
    let ask = || -> std::io::Result<Value> {
        let mut stream = TcpStream::connect(monitor)?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(serde_json::from_str(answer.split_once("\r\n\r\n").map_or("", |(_, body)| body))?)
    };
    ask().unwrap_or_default()
}

#[test]
fn of_three_servers_any_may_be_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path());
    let node = |name: &str| {
        let mut node = Node::new(dir.path(), name, &["app.db"]);
        node.is_guest = true;
        node.variables.push(("LITEMESH_FABRIC_URL".to_owned(), cluster.url()));
        node.extra = ["--log-replicas", "3"].map(str::to_owned).to_vec();
        node
    };
    let (mut a, mut b) = (node("a"), node("b"));
    a.exec("app.db", SCHEMA);
    a.start(None);
    b.start(None);
    log_works(&a, "before");
    log_works(&b, "before");
    let copies = |node: &Node| node.status()["fabric"]["log"]["copies"].as_array().map_or(0, Vec::len);
    wait_for("the log has three copies", || copies(&a) == 3);
    for round in 0..2 {
        let server = cluster.server_of("a").expect("a is connected");
        let killed = Instant::now();
        cluster.servers[server].kill();
        a.exec("app.db", &format!("INSERT INTO t VALUES('a, while nobody may know {round}', 1)"));
        b.exec("app.db", &format!("INSERT INTO t VALUES('b, while nobody may know {round}', 1)"));
        wait_equal(&[&a, &b], "app.db");
        println!("equal again {:?} after the server that a was connected to was killed", killed.elapsed());
        wait_for("it is on another", || cluster.server_of("a").is_some_and(|other| other != server));
        log_works(&a, &format!("with two servers of three, {round}"));
        println!("the log is written again {:?} after that", killed.elapsed());
        log_works(&b, &format!("with two servers of three, {round}"));
        wait_equal(&[&a, &b], "app.db");
        assert!(connected(&a) && connected(&b));
        cluster.servers[server].run();
        log_works(&a, &format!("all are back, {round}"));
    }
    // Who was away reads the log, whichever server has it.
    b.kill();
    for n in 0..50 {
        a.exec("app.db", &format!("INSERT INTO t VALUES('while b was away {n}', 1)"));
    }
    cluster.servers[2].kill();
    b.start(None);
    wait_equal(&[&a, &b], "app.db");
}

/// A line to a server that can be cut.
struct Line {
    address: SocketAddr,
    is_cut: Arc<AtomicBool>,
}

impl Line {
    fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let line = Self { address: listener.local_addr().unwrap(), is_cut: Arc::default() };
        let is_cut = line.is_cut.clone();
        // It ends with the process.
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if is_cut.load(Ordering::Relaxed) {
                    continue;
                }
                let Ok(far) = TcpStream::connect(to) else { continue };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let is_cut = is_cut.clone();
                    std::thread::spawn(move || pass(from, to, &is_cut));
                }
            }
        });
        line
    }

    fn cut(&self, cut: bool) {
        self.is_cut.store(cut, Ordering::Relaxed);
    }
}

/// Until either side ends, or the line is cut.
fn pass(mut from: TcpStream, mut to: TcpStream, is_cut: &AtomicBool) {
    from.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut bytes = [0; 65_536];
    while !is_cut.load(Ordering::Relaxed) {
        match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(len) if to.write_all(&bytes[..len]).is_err() => break,
            Ok(_) => {}
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}

#[test]
fn two_of_one_name_that_meet_later_are_told_and_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let nats = Nats::with_jetstream(dir.path());
    let line = Line::start(nats.address);
    let mut first = nats.guest(dir.path(), "a", LOGIN);
    first.variables = vec![("LITEMESH_FABRIC_URL".to_owned(), format!("nats://{LOGIN}{}", line.address))];
    first.exec("app.db", SCHEMA);
    first.exec("app.db", "INSERT INTO t VALUES('first', 1)");
    first.start(None);
    let mut b = nats.guest(dir.path(), "b", LOGIN);
    b.start(None);
    wait_equal(&[&first, &b], "app.db");
    line.cut(true);
    wait_for("it is cut off", || !connected(&first));
    // Nobody answers to the name, so that a second one may start under it.
    let mut second = nats.guest(&dir.path().join("twin"), "a", LOGIN);
    second.start(None);
    first.exec("app.db", "INSERT INTO t VALUES('of the first, cut off', 1)");
    second.exec("app.db", "INSERT INTO t VALUES('of the second', 1)");
    wait_equal(&[&second, &b], "app.db");
    line.cut(false);
    let words = "another node of the mesh is called a too";
    for node in [&first, &second] {
        wait_for("each says so", || node.status()["warnings"].to_string().contains(words));
        assert!(logged(node, words));
    }
    b.exec("app.db", "INSERT INTO t VALUES('of b, with both there', 1)");
    // One of them goes, and starts anew under a name of its own: nothing that was written on any of the three is missing.
    wait_equal(&[&second, &b], "app.db");
    second.stop();
    let mut third = nats.guest(dir.path(), "c", LOGIN);
    third.start(None);
    first.exec("app.db", "INSERT INTO t VALUES('of the first, the only one', 1)");
    wait_equal(&[&first, &b, &third], "app.db");
    assert_eq!(rows(&b), "5");
}
