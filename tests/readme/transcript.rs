//! README's transcripts, run line by line. A line `who$ command` is typed into the terminal of `who`; the lines under
//! it are what must be printed, where `…` stands for anything. What runs on (`litemesh up`) is waited for until it has
//! printed its lines. Invariant: commands are run as they stand, but for ports, which README calls arbitrary, and
//! `TOKEN`, which stands for what the node before has printed.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::support::{Node, PATIENCE, free_addresses, litemesh, wait_for};
use crate::text::{blocks, code_spans, matches, section, table};

/// A command and what README shows under it.
struct Step {
    who: String,
    command: String,
    shown: Vec<String>,
}

fn steps(heading: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for block in blocks(&section(heading)).into_iter().filter(|b| b.kind == "console") {
        let mut first = true;
        for line in block.lines {
            let prompt = line.split_once("$ ").filter(|(who, _)| {
                !who.starts_with(' ') && who.chars().all(|c| c.is_ascii_lowercase() || c == '-')
            });
            // The demo prints prompts of its own.
            match prompt.filter(|(who, _)| first || !who.is_empty() && !steps[steps.len() - 1].who.is_empty())
            {
                Some((who, command)) => {
                    let (who, command) = (who.to_owned(), command.to_owned());
                    steps.push(Step { who, command, shown: Vec::new() });
                }
                None => steps.last_mut().expect("a block begins with a command").shown.push(line),
            }
            first = false;
        }
    }
    steps
}

fn has_sqlite3() -> bool {
    let found = Command::new("sqlite3").arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        println!("skipped: there is no sqlite3 in PATH");
    }
    found
}

/// The lines shown are those printed, in order; a line `…` alone stands for any number of lines.
fn expect_lines(step: &Step, printed: &str) -> Result<(), String> {
    let mut printed = printed.lines();
    let mut skipping = false;
    for shown in &step.shown {
        if shown == "…" {
            skipping = true;
            continue;
        }
        loop {
            match printed.next() {
                Some(line) if matches(shown, line) => break,
                Some(_) if skipping => {}
                other => return Err(format!("{}: shown {shown:?}, printed {other:?}", step.command)),
            }
        }
        skipping = false;
    }
    match printed.next() {
        Some(more) if !skipping => Err(format!("{}: README does not show {more:?}", step.command)),
        _ => Ok(()),
    }
}

/// Terminals in one directory or several, and the nodes that run in them.
struct Session {
    home: PathBuf,
    /// The ports README gives, and those taken in their place.
    ports: BTreeMap<String, u16>,
    token: Option<String>,
    nodes: BTreeMap<String, Node>,
}

impl Session {
    fn new(home: &Path, ports: &[u16]) -> Self {
        let free = free_addresses(ports.len());
        let ports = ports.iter().zip(free).map(|(p, a)| (p.to_string(), a.port())).collect();
        Self { home: home.to_owned(), ports, token: None, nodes: BTreeMap::new() }
    }

    /// A text of README with the ports taken.
    fn adapted(&self, text: &str) -> String {
        let mut text = text.to_owned();
        // In two steps: a port taken may begin with the digits of one shown.
        for shown in self.ports.keys() {
            text = text.replace(&format!("127.0.0.1:{shown}"), &format!("\u{1}{shown}\u{1}"));
        }
        for (shown, taken) in &self.ports {
            text = text.replace(&format!("\u{1}{shown}\u{1}"), &format!("127.0.0.1:{taken}"));
        }
        match (&self.token, text.contains("--join TOKEN")) {
            (Some(token), true) => text.replace("TOKEN", token),
            _ => text,
        }
    }

    fn run(&mut self, mut step: Step) {
        println!("{}$ {}", step.who, step.command);
        step.command = self.adapted(&step.command);
        step.shown = step.shown.iter().map(|l| self.adapted(l)).collect();
        if step.command.starts_with("litemesh up") {
            self.up(&step);
        } else if step.command == "kill %1" {
            self.nodes.get_mut(&step.who).expect("a job").stop();
        } else {
            self.command(&step);
        }
    }

    /// The node of a terminal; its home is the session's, and what else it is told comes from README's line.
    fn up(&mut self, step: &Step) {
        let line = step.command.split(" 2> ").next().unwrap();
        let mut node = self.nodes.remove(&step.who).unwrap_or_else(|| Node::new(&self.home, &step.who, &[]));
        let mut command = shell(&node_home(step, &self.home), &format!("exec {line}"));
        if !line.contains("--name") {
            // Two hosts: each has the default ports, state directory and name to itself.
            for (name, address) in ["CLUSTER", "CLIENT", "HTTP"].iter().zip(&node.addresses) {
                command.env(format!("LITEMESH_{name}"), address.to_string());
            }
            command.env("LITEMESH_STATE_DIR", node.state_dir()).env("LITEMESH_NAME", &step.who);
        }
        let http = node.addresses[2].port();
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
        let mut child = command.spawn().unwrap();
        (node.output, node.log) =
            (follow(child.stdout.take().unwrap()), follow(child.stderr.take().unwrap()));
        node.process = Some(child);
        node.wait_ready();
        let printed = node.output.lock().unwrap().join("\n");
        let mut step = Step { who: String::new(), command: line.to_owned(), shown: step.shown.clone() };
        if !line.contains("--name") {
            let own = |l: &String| l.replace("127.0.0.1:8222", &format!("127.0.0.1:{http}"));
            step.shown = step.shown.iter().map(own).collect();
        }
        expect_lines(&step, &printed).unwrap();
        self.token = Some(node.token());
        self.nodes.insert(node.name.clone(), node);
    }

    fn command(&self, step: &Step) {
        let started = Instant::now();
        loop {
            let output = shell(&self.home, &step.command).output().unwrap();
            let printed = String::from_utf8_lossy(&output.stdout).into_owned();
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            let result = match output.status.success() {
                true => expect_lines(step, &printed),
                false => Err(format!("{}: {told}", step.command)),
            };
            // Rows may be on their way, and README says what to do about a lock.
            let may_pass = step.command.contains("SELECT") || told.contains("database is locked");
            match result {
                Ok(()) => return,
                Err(why) => assert!(may_pass && started.elapsed() < PATIENCE, "{why}"),
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

fn follow(stream: impl Read + Send + 'static) -> Arc<Mutex<Vec<String>>> {
    let lines: Arc<Mutex<Vec<String>>> = Arc::default();
    let sink = lines.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            sink.lock().unwrap().push(line);
        }
    });
    lines
}

/// Nodes of one machine share a directory; hosts do not.
fn node_home(step: &Step, home: &Path) -> PathBuf {
    if step.who.starts_with("host-") { home.join(&step.who) } else { home.to_owned() }
}

/// A command as typed, with the binary under test in PATH.
fn shell(dir: &Path, line: &str) -> Command {
    let plain = litemesh();
    let binary = Path::new(plain.get_program()).parent().unwrap().to_owned();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(binary).chain(std::env::split_paths(&path))).unwrap();
    let mut command = Command::new("sh");
    for (name, _) in plain.get_envs() {
        command.env_remove(name);
    }
    command.current_dir(dir).env("PATH", path).arg("-c").arg(line);
    command
}

#[test]
fn two_hosts() {
    let dir = tempfile::tempdir().unwrap();
    let mut session = Session::new(dir.path(), &[]);
    for host in ["host-a", "host-b"] {
        std::fs::create_dir(dir.path().join(host)).unwrap();
    }
    let file = dir.path().join("host-a").join("app.db");
    let schema = "CREATE TABLE t(k TEXT PRIMARY KEY NOT NULL); INSERT INTO t VALUES('from the first host')";
    rusqlite::Connection::open(file).unwrap().execute_batch(schema).unwrap();
    for step in steps("## Two hosts") {
        session.run(step);
    }
    let (a, b) = (&session.nodes["host-a"], &session.nodes["host-b"]);
    b.exec("app.db", "INSERT INTO t VALUES('from the second')");
    wait_for("both have both rows", || {
        [a, b].iter().all(|n| crate::support::dump(&n.file("app.db")).len() == 2)
    });
    the_state_directory_is_as_described(&b.state_dir());
    the_pages_are_as_described(b.addresses[2]);
}

/// Every file of a node that has joined is in README's table, and every file of the table is there.
fn the_state_directory_is_as_described(dir: &Path) {
    let rows = table(&["file", "what it is"]);
    let shown: BTreeSet<String> =
        rows.iter().flat_map(|r| code_spans(&r[0])).map(|f| f.trim_end_matches('/').to_owned()).collect();
    let found = || -> BTreeSet<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    // A file may be on its way into the directory.
    wait_for(&format!("{:?} to be {shown:?}", found()), || found() == shown);
}

fn the_pages_are_as_described(http: SocketAddr) {
    for row in table(&["path", "what it answers"]) {
        let path = row[0].trim_matches('`');
        let ask = || {
            let mut stream = TcpStream::connect(http).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\n\r\n").unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            String::from_utf8_lossy(&answer).into_owned()
        };
        // The status is put together a few times a second.
        wait_for(path, || ask().starts_with("HTTP/1.1 200 "));
    }
}

#[test]
fn books() {
    if !has_sqlite3() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut session = Session::new(dir.path(), &[6222, 4222, 8222, 6223, 4223, 8223]);
    for step in steps("## Books: two nodes on one machine") {
        session.run(step);
    }
    assert!(
        session.nodes.len() == 2 && session.nodes.values().all(|n| n.process.is_none()),
        "both are stopped"
    );
}

#[test]
fn the_demo_shows_what_readme_shows() {
    let step = steps("## Set-up").into_iter().next().unwrap();
    let line = step.command.strip_prefix("cargo run --release -- ").expect("cargo runs the binary");
    let dir = tempfile::tempdir().unwrap();
    let output: Output = shell(dir.path(), &format!("litemesh {line}")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    expect_lines(&step, &String::from_utf8_lossy(&output.stdout)).unwrap();
}

#[test]
fn every_transcript_is_run() {
    let all = blocks(&crate::text::readme()).into_iter().filter(|b| b.kind == "console").count();
    let run = ["## Set-up", "## Two hosts", "## Books: two nodes on one machine"];
    let run: usize =
        run.iter().map(|h| blocks(&section(h)).iter().filter(|b| b.kind == "console").count()).sum();
    assert_eq!(all, run, "a console block is in a section that no test runs");
}
