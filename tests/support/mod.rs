//! Real nodes for tests: the litemesh binary with its own nats-server on loopback, in a directory of its own, stopped
//! by process id when dropped.

#![allow(dead_code, reason = "each test crate uses a part of it")]

pub mod authority;
pub mod operator;

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rusqlite::Connection;

/// How long a condition may take: far beyond what it takes, so that only a fault meets it.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// The binary under test.
pub fn litemesh() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_litemesh"));
    for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("LITEMESH_")) {
        command.env_remove(name);
    }
    command
}

/// Ports that were free a moment ago, no two the same in this process.
pub fn free_addresses(count: usize) -> Vec<SocketAddr> {
    static GIVEN: Mutex<Vec<u16>> = Mutex::new(Vec::new());
    let mut given = GIVEN.lock().unwrap();
    let mut addresses = Vec::new();
    while addresses.len() < count {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        if !given.contains(&address.port()) {
            given.push(address.port());
            addresses.push(address);
        }
    }
    addresses
}

/// Waits until `condition` holds.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A node: where it lives, and its process while it runs.
pub struct Node {
    pub name: String,
    pub home: PathBuf,
    pub addresses: Vec<SocketAddr>,
    pub databases: Vec<String>,
    pub extra: Vec<String>,
    /// It runs no nats-server of its own.
    pub is_guest: bool,
    /// Variables for its process.
    pub variables: Vec<(String, String)>,
    pub process: Option<Child>,
    /// What it printed on stdout since its last start.
    pub output: Arc<Mutex<Vec<String>>>,
    /// What it logged since its last start.
    pub log: Arc<Mutex<Vec<String>>>,
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {}:", self.name);
            self.log.lock().unwrap().iter().for_each(|line| eprintln!("{line}"));
        }
        self.kill();
    }
}

impl Node {
    /// A node that does not run yet, with the databases given as on the command line, relative to its home.
    pub fn new(dir: &Path, name: &str, databases: &[&str]) -> Self {
        let home = dir.join(name);
        std::fs::create_dir_all(&home).unwrap();
        Self {
            name: name.to_owned(),
            home,
            addresses: free_addresses(3),
            databases: databases.iter().map(|d| (*d).to_owned()).collect(),
            extra: Vec::new(),
            is_guest: false,
            variables: Vec::new(),
            process: None,
            output: Arc::default(),
            log: Arc::default(),
        }
    }

    /// The file of a database.
    pub fn file(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    pub fn state_dir(&self) -> PathBuf {
        self.home.join("state")
    }

    /// The command line of `up`.
    pub fn up_command(&self, token: Option<&str>) -> Command {
        let mut command = litemesh();
        command.current_dir(&self.home).arg("up").args(&self.databases).args(["--name", &self.name]);
        command.arg("--state-dir").arg(self.state_dir());
        for (flag, address) in ["--http", "--cluster", "--client"].iter().zip([2, 0, 1]) {
            let address = &self.addresses[address];
            if self.is_guest && *flag != "--http" {
                continue;
            }
            command.arg(flag).arg(address.to_string());
        }
        if let Some(token) = token {
            command.args(["--join", token]);
        }
        command.args(&self.extra).envs(self.variables.iter().cloned());
        command
    }

    /// Starts it and waits for `ready`.
    pub fn start(&mut self, token: Option<&str>) -> &mut Self {
        self.spawn(token);
        self.wait_ready();
        self
    }

    /// Starts it without waiting.
    pub fn spawn(&mut self, token: Option<&str>) {
        assert!(self.process.is_none(), "it runs already");
        let mut child = self
            .up_command(token)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.output = follow(child.stdout.take().unwrap());
        self.log = follow(child.stderr.take().unwrap());
        self.process = Some(child);
    }

    pub fn wait_ready(&mut self) {
        let started = Instant::now();
        while !self.output.lock().unwrap().iter().any(|l| l == "ready") {
            let ended = self.process.as_mut().unwrap().try_wait().unwrap();
            let log = || self.log.lock().unwrap().join("\n");
            assert!(ended.is_none(), "{} ended: {ended:?}\n{}", self.name, log());
            assert!(started.elapsed() < PATIENCE, "{} does not get ready:\n{}", self.name, log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The token that its join line holds.
    pub fn token(&self) -> String {
        let output = self.output.lock().unwrap();
        let line = output.iter().find(|l| l.contains("--join ")).expect("a join line");
        line.rsplit(' ').next().unwrap().to_owned()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.process.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and its exit.
    pub fn stop(&mut self) {
        let mut child = self.process.take().expect("it runs");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(child.wait().unwrap().success(), "{} did not end well", self.name);
    }

    /// An application's connection, as any program would open it.
    pub fn app(&self, file: &str) -> Connection {
        let conn = Connection::open(self.file(file)).unwrap();
        conn.busy_timeout(Duration::from_secs(20)).unwrap();
        conn
    }

    pub fn exec(&self, file: &str, sql: &str) {
        self.app(file).execute_batch(sql).unwrap_or_else(|e| panic!("{}: {sql}: {e}", self.name));
    }

    /// The one value that a query gives, as text.
    pub fn text(&self, file: &str, sql: &str) -> String {
        let text = |r: &rusqlite::Row<'_>| r.get::<_, Option<String>>(0);
        self.app(file).query_row(sql, [], text).unwrap().unwrap_or_default()
    }

    /// Another command against this node.
    pub fn run(&self, args: &[&str]) -> Output {
        let mut command = litemesh();
        command.current_dir(&self.home).args(args).arg("--state-dir").arg(self.state_dir());
        command.output().unwrap()
    }

    /// `litemesh sync`: every live node has what this one has.
    pub fn sync(&self) {
        let output = self.run(&["sync", "--timeout", "80s"]);
        assert!(output.status.success(), "{}: {}", self.name, String::from_utf8_lossy(&output.stderr));
    }

    pub fn status(&self) -> serde_json::Value {
        let output = self.run(&["status", "--json"]);
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    /// The process id of its nats-server.
    pub fn server_pid(&self) -> u64 {
        self.status()["fabric"]["server_pid"].as_u64().expect("a nats-server")
    }
}

/// Two nodes that share one file, `app.db`, made with this schema on the first.
pub fn pair(dir: &Path, schema: &str) -> (Node, Node) {
    let (mut a, mut b) = (Node::new(dir, "a", &["app.db"]), Node::new(dir, "b", &["app.db"]));
    a.exec("app.db", schema);
    a.start(None);
    b.start(Some(&a.token()));
    (a, b)
}

fn follow(stream: impl std::io::Read + Send + 'static) -> Arc<Mutex<Vec<String>>> {
    let lines: Arc<Mutex<Vec<String>>> = Arc::default();
    let sink = lines.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            sink.lock().unwrap().push(line);
        }
    });
    lines
}

/// Every row of every table of a file, by SQLite's own quoting; litemesh's tables left out.
pub fn dump(path: &Path) -> Vec<String> {
    let conn = Connection::open(path).unwrap();
    conn.busy_timeout(Duration::from_secs(20)).unwrap();
    let mut out = Vec::new();
    let mut tables = conn
        .prepare(
            "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'table'
             AND substr(name, 1, 11) <> '__litemesh_' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name",
        )
        .unwrap();
    let names: Vec<String> = tables.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
    for name in names {
        let quoted = format!("\"{}\"", name.replace('"', "\"\""));
        let mut rows = conn.prepare(&format!("SELECT * FROM {quoted}")).unwrap();
        let count = rows.column_count();
        let mut lines = Vec::new();
        let mut found = rows.query([]).unwrap();
        while let Some(row) = found.next().unwrap() {
            let values: Vec<String> = (0..count).map(|i| format!("{:?}", row.get_ref(i).unwrap())).collect();
            lines.push(format!("{name}: {}", values.join(" | ")));
        }
        lines.sort();
        out.extend(lines);
    }
    out
}

/// Waits until the files hold the same rows.
pub fn wait_equal(nodes: &[&Node], file: &str) {
    let started = Instant::now();
    loop {
        let dumps: Vec<_> = nodes.iter().map(|n| dump(&n.file(file))).collect();
        if dumps.iter().all(|d| *d == dumps[0]) {
            return;
        }
        if started.elapsed() > PATIENCE {
            for d in &dumps[1..] {
                let differing = d.iter().filter(|l| !dumps[0].contains(l)).take(5);
                differing.for_each(|l| eprintln!("only there: {l}"));
                let differing = dumps[0].iter().filter(|l| !d.contains(l)).take(5);
                differing.for_each(|l| eprintln!("only on the first: {l}"));
            }
            panic!("the files do not come to agree");
        }
        std::thread::sleep(Duration::from_millis(30));
    }
}
