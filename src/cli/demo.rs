//! `litemesh demo`: two nodes on this machine, from nothing. Invariant: everything is in one directory, on loopback,
//! and every process that was started is stopped.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rusqlite::Connection;

use super::args::DemoArgs;

const PATIENCE: Duration = Duration::from_secs(60);

/// A node of the demonstration; it is stopped when it is dropped.
struct Node {
    name: &'static str,
    process: Child,
    database: PathBuf,
    join_line: String,
}

impl Drop for Node {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        // It may have ended already.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        drop(self.process.wait());
    }
}

fn free_addresses<const N: usize>() -> Result<[SocketAddr; N]> {
    let listeners: Vec<TcpListener> =
        (0..N).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<_>>()?;
    let addresses = listeners.iter().map(TcpListener::local_addr).collect::<std::io::Result<Vec<_>>>()?;
    addresses.try_into().map_err(|_| anyhow::anyhow!("no free ports"))
}

impl Node {
    fn start(dir: &Path, name: &'static str, token: Option<&str>) -> Result<Self> {
        let home = dir.join(name);
        std::fs::create_dir_all(&home)?;
        let database = home.join("books.db");
        let [cluster, client, http] = free_addresses()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("up").arg(&database).args(["--name", name, "--log", "error"]);
        command.arg("--state-dir").arg(home.join("state"));
        let addresses = [("--cluster", cluster), ("--client", client), ("--http", http)];
        for (flag, address) in addresses {
            command.arg(flag).arg(address.to_string());
        }
        if let Some(token) = token {
            // Not an argument: other users could read it in the list of processes.
            command.env("LITEMESH_JOIN", token);
        }
        let mut process = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn()?;
        let out = process.stdout.take().context("no output")?;
        let mut node = Self { name, process, database, join_line: String::new() };
        for line in BufReader::new(out).lines() {
            let line = line?;
            if line.trim_start().starts_with("litemesh up") {
                node.join_line = line.trim().to_owned();
            }
            if line == "ready" {
                return Ok(node);
            }
        }
        bail!("node {name} did not start: see its message above")
    }

    fn token(&self) -> &str {
        self.join_line.rsplit(' ').next().unwrap_or_default()
    }

    fn execute(&self, sql: &str) -> Result<()> {
        println!("  {}$ sqlite3 books.db \"{sql}\"", self.name);
        let conn = Connection::open(&self.database)?;
        conn.busy_timeout(Duration::from_secs(10))?;
        Ok(conn.execute_batch(sql)?)
    }

    fn rows(&self) -> Result<Vec<String>> {
        let conn = Connection::open(&self.database)?;
        conn.busy_timeout(Duration::from_secs(10))?;
        let sql = "SELECT id || '|' || title || '|' || author || '|' || year FROM Books ORDER BY id";
        let mut statement = conn.prepare(sql)?;
        let rows = statement.query_map([], |r| r.get(0))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    fn show_when(&self, rows: usize) -> Result<()> {
        let started = Instant::now();
        while self.rows()?.len() != rows {
            if started.elapsed() > PATIENCE {
                bail!("node {} does not get the rows", self.name);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        println!(
            "  {}$ sqlite3 books.db \"SELECT * FROM Books\"    # after {} ms",
            self.name,
            started.elapsed().as_millis()
        );
        self.rows()?.iter().for_each(|row| println!("  {row}"));
        Ok(())
    }
}

/// Runs the demonstration.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    let temporary = tempfile::tempdir()?;
    let dir = match &args.dir {
        Some(dir) => std::path::absolute(dir)?,
        None => temporary.path().to_owned(),
    };
    if dir.join("alice").exists() {
        bail!("{} has a demo in it already: remove it, or name another directory with --dir", dir.display());
    }
    println!("Two nodes on this machine, each with a file of its own, in {}.\n", dir.display());
    let database = dir.join("alice").join("books.db");
    std::fs::create_dir_all(dir.join("alice"))?;
    Connection::open(&database)?.execute_batch(
        "CREATE TABLE Books(id INTEGER PRIMARY KEY, title TEXT NOT NULL, author TEXT NOT NULL, year INTEGER);
         INSERT INTO Books VALUES(1, 'Dune', 'Frank Herbert', 1965)",
    )?;
    let started = Instant::now();
    let alice = Node::start(&dir, "alice", None)?;
    println!(
        "alice$ litemesh up books.db                 # ready after {} ms, a mesh of its own",
        started.elapsed().as_millis()
    );
    let started = Instant::now();
    let bob = Node::start(&dir, "bob", Some(alice.token()))?;
    println!(
        "bob$   litemesh up books.db --join lm1-…    # ready after {} ms, with alice's rows:",
        started.elapsed().as_millis()
    );
    bob.show_when(1)?;
    println!("\nBoth write, with plain SQLite:");
    alice.execute("INSERT INTO Books VALUES(2, 'Solaris', 'Stanislaw Lem', 1961)")?;
    bob.execute("INSERT INTO Books VALUES(3, 'Kindred', 'Octavia Butler', 1979)")?;
    println!("\nand both have it all:");
    bob.show_when(3)?;
    alice.show_when(3)?;
    println!("\nBob's node is killed; both go on writing; bob's node is started again:");
    kill(bob)?;
    alice.execute("UPDATE Books SET year = 1966 WHERE id = 1; DELETE FROM Books WHERE id = 2")?;
    let file = Connection::open(dir.join("bob").join("books.db"))?;
    file.execute_batch("INSERT INTO Books VALUES(4, 'Ubik', 'Philip K. Dick', 1969)")?;
    drop(file);
    println!("  bob$   sqlite3 books.db \"INSERT INTO Books VALUES(4, 'Ubik', 'Philip K. Dick', 1969)\"");
    let bob = Node::start(&dir, "bob", None)?;
    alice.show_when(3)?;
    bob.show_when(3)?;
    if alice.rows()? != bob.rows()? {
        bail!("the two files differ, which must not happen");
    }
    println!("\nThe same on two hosts, each with litemesh installed:");
    println!("  host-a$ litemesh up books.db");
    println!("  host-b$ litemesh up books.db --join TOKEN      # the line that host-a printed");
    Ok(ExitCode::SUCCESS)
}

/// Ends a node without warning.
fn kill(mut node: Node) -> Result<()> {
    node.process.kill()?;
    node.process.wait()?;
    Ok(())
}
