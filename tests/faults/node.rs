//! One node: its litemesh, its file systems, its applications. Invariant: every process is started from the main
//! thread, with the order to die with it, and is stopped by its id.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::app::ROLE;
use crate::journal::SharedJournal;
use crate::network::{Rules, address, signal, try_run};

/// How large the file systems are that are filled. They are sparse.
const DISK: &str = "1G";

/// An application, and the thread that listens to it.
pub struct App {
    child: Child,
    listener: Option<JoinHandle<()>>,
}

impl App {
    /// Starts this program again as an application.
    pub fn start(role: &str, of: &Node, number: u64, journal: &SharedJournal) -> Self {
        let (me, node) = (std::env::current_exe().expect("this program"), &of.name);
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(me)
            .env(ROLE, format!("{role} {node} {number} {}", of.file().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // The clock of a host is wrong for all that runs there.
        if let Some(library) = faketime().filter(|_| of.clock_offset_ms != 0) {
            command.env("LD_PRELOAD", library).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            command.env("FAKETIME", format!("{:+.3}", of.clock_offset_ms as f64 / 1_000.0));
        }
        let mut child = command.spawn().expect("an application");
        let (out, journal, node) = (child.stdout.take().expect("a pipe"), journal.clone(), node.to_owned());
        let listener = std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                journal.get().take(&node, &line);
            }
        });
        Self { child, listener: Some(listener) }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Whether it has ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child")
    }

    /// Asks it to end, waits, and takes all that it said.
    pub fn end(mut self) {
        drop(self.child.stdin.take());
        signal(self.pid(), Signal::CONT);
        self.wait();
    }

    /// kill -9; what it said before counts.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        self.wait();
    }

    fn wait(&mut self) {
        let _ = self.child.wait();
        if let Some(listener) = self.listener.take() {
            listener.join().expect("the listener");
        }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.child.kill();
        self.wait();
    }
}

/// A command that asks a node, and may take its time. Its answer is short.
pub struct Question {
    child: Option<Child>,
    until: Instant,
}

impl Question {
    /// What it said, once it has ended or taken too long.
    pub fn answer(&mut self) -> Option<Result<String, String>> {
        let child = self.child.as_mut()?;
        let ended = child.try_wait().ok()?.is_some();
        if !ended && Instant::now() < self.until {
            return None;
        }
        let mut child = self.child.take()?;
        if !ended {
            let _ = child.kill();
            let _ = child.wait();
            return Some(Err("no answer".to_owned()));
        }
        Some(child.wait_with_output().map_err(|e| e.to_string()).and_then(|output| {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            match output.status.success() {
                true => Ok(text),
                false => Err(format!("{text}{}", String::from_utf8_lossy(&output.stderr))),
            }
        }))
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The library that gives a process another time, if it is installed.
pub fn faketime() -> Option<PathBuf> {
    let directories = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|e| e.path());
    directories.map(|d| d.join("faketime/libfaketime.so.1")).find(|p| p.is_file())
}

/// Until when something is so.
#[derive(Debug, Clone, Copy)]
pub struct Until(pub Instant);

/// One node of the mesh.
pub struct Node {
    pub index: usize,
    pub name: String,
    pub namespace: String,
    pub home: PathBuf,
    /// Its programs: this one, and another if one was given.
    pub binaries: Vec<PathBuf>,
    pub binary: usize,
    pub clock_offset_ms: i64,
    pub litemesh: Option<Child>,
    pub starts: u32,
    pub down_until: Option<Until>,
    pub writer: Option<App>,
    pub reader: Option<App>,
    pub writer_down_until: Option<Until>,
    pub reader_down_until: Option<Until>,
    /// Its file is an older copy: its applications wait until it has what it had.
    pub behind: bool,
    /// Stopped processes.
    pub paused: Vec<(i32, Until)>,
    pub rules: Rules,
    /// Faults of its network, each until its time.
    pub network_faults: Vec<(crate::plan::Kind, Until)>,
    /// The directory whose file system can be filled.
    pub disk: Option<PathBuf>,
    pub full_until: Option<Until>,
    /// When its disk was full.
    pub was_full: Vec<(Instant, Option<Instant>)>,
    /// Copies of its file, oldest first.
    pub copies: Vec<PathBuf>,
}

impl Node {
    pub fn new(dir: &Path, index: usize, namespace: String, binaries: Vec<PathBuf>) -> Self {
        let name = char::from(b'a' + index as u8).to_string();
        let home = dir.join(&name);
        for part in ["db", "state", "copies"] {
            fs::create_dir_all(home.join(part)).expect("a directory");
        }
        Self {
            index,
            name,
            namespace,
            home,
            binaries,
            binary: 0,
            clock_offset_ms: 0,
            litemesh: None,
            starts: 0,
            down_until: None,
            writer: None,
            reader: None,
            writer_down_until: None,
            reader_down_until: None,
            behind: false,
            paused: Vec::new(),
            rules: Rules::default(),
            network_faults: Vec::new(),
            disk: None,
            full_until: None,
            was_full: Vec::new(),
            copies: Vec::new(),
        }
    }

    /// Gives a directory of the node a file system of its own, with an end.
    pub fn limit_disk(&mut self, part: &str) {
        let (mount, image) = (self.home.join(part), self.home.join(format!("{part}.ext4")));
        let (at, image) = (mount.display().to_string(), image.display().to_string());
        let made = File::create(&image).and_then(|f| f.set_len(1 << 30)).map_err(|e| e.to_string());
        let loops = made
            .and_then(|()| try_run("mkfs.ext4", &["-q", "-m", "0", "-E", "lazy_itable_init=1", &image]))
            .and_then(|_| try_run("mount", &["-o", "loop", &image, &at]));
        if loops.is_err() {
            let _ = fs::remove_file(&image);
            try_run("mount", &["-t", "tmpfs", "-o", &format!("size={DISK}"), "faults", &at])
                .expect("a file system");
        }
        self.disk = Some(mount);
    }

    pub fn file(&self) -> PathBuf {
        self.home.join("db/app.db")
    }

    pub fn log(&self) -> PathBuf {
        self.home.join("litemesh.log")
    }

    fn out(&self) -> PathBuf {
        self.home.join(format!("litemesh.out.{}", self.starts))
    }

    /// litemesh as a process of this node's network.
    pub fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "nsenter"])
            .arg(format!("--net=/run/netns/{}", self.namespace))
            .arg("--");
        command.arg(&self.binaries[self.binary]).current_dir(&self.home).stdin(Stdio::null());
        for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("LITEMESH_")) {
            command.env_remove(name);
        }
        command
    }

    /// Starts litemesh without waiting.
    pub fn start(&mut self, token: Option<&str>) {
        self.starts += 1;
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log()).expect("a log");
        let cluster = format!("{}:6222", address(self.index));
        let mut command = self.command();
        command.args([
            "up",
            "db/app.db",
            "--name",
            &self.name,
            "--state-dir",
            "state",
            "--cluster",
            &cluster,
        ]);
        command.args(["--verify-every", "off", "--log", "info,litemesh=debug,nats=warn,async_nats=warn"]);
        command.env("LITEMESH_TEST_CLOCK_OFFSET_MS", self.clock_offset_ms.to_string());
        if let Some(token) = token {
            command.args(["--join", token]);
        }
        let out = File::create(self.out()).expect("a file");
        self.litemesh = Some(command.stdout(out).stderr(log).spawn().expect("litemesh"));
    }

    /// What it printed since its last start.
    pub fn output(&self) -> String {
        fs::read_to_string(self.out()).unwrap_or_default()
    }

    pub fn is_ready(&self) -> bool {
        self.litemesh.is_some() && self.output().lines().any(|l| l == "ready")
    }

    /// Runs a command that asks the running node; gives up after some seconds.
    pub fn ask(&self, args: &[&str], patience_s: u64) -> Result<String, String> {
        let mut question = self.begin_to_ask(args, patience_s)?;
        loop {
            if let Some(answer) = question.answer() {
                return answer;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The same, for somebody who has other things to do meanwhile.
    pub fn begin_to_ask(&self, args: &[&str], patience_s: u64) -> Result<Question, String> {
        let mut command = self.command();
        command.args(args).args(["--state-dir", "state"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(|e| e.to_string())?;
        Ok(Question { child: Some(child), until: Instant::now() + Duration::from_secs(patience_s) })
    }

    /// kill -9 of litemesh.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.litemesh.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and its exit; kill -9 after a long time, which is an error.
    pub fn stop(&mut self) -> Result<(), String> {
        // Before it is ready the signal may meet a process that has only begun, and end it at once.
        let was_ready = self.is_ready();
        let Some(mut child) = self.litemesh.take() else { return Ok(()) };
        let pid = child.id() as i32;
        signal(pid, Signal::CONT);
        signal(pid, Signal::TERM);
        let until = Instant::now() + Duration::from_secs(90);
        while Instant::now() < until {
            if let Some(status) = child.try_wait().expect("a child") {
                let cut_short = !was_ready && status.signal() == Some(Signal::TERM.as_raw());
                return if status.success() || cut_short {
                    Ok(())
                } else {
                    Err(format!("{} ended with {status}", self.name))
                };
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = child.kill();
        let _ = child.wait();
        Err(format!("{} did not end within 90 s of SIGTERM", self.name))
    }

    /// The process of its nats-server: the child of litemesh.
    pub fn server_pid(&self) -> Option<i32> {
        let parent = self.litemesh.as_ref()?.id();
        let entries = fs::read_dir("/proc").ok()?.flatten();
        entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok()).find(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let of_parent =
                stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)) == Some(&parent.to_string());
            of_parent && stat.contains("(nats-server")
        })
    }

    /// Fills its file system to the last byte.
    pub fn fill_disk(&self) {
        let Some(dir) = &self.disk else { return };
        let file = File::create(dir.join("filler")).expect("room for a name");
        let mut at = 0;
        // In halves, so that what is left is found without knowing it.
        let mut part: u64 = 1 << 30;
        while part >= 512 {
            match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), at, part) {
                Ok(()) => at += part,
                Err(_) => part /= 2,
            }
        }
    }

    pub fn free_disk(&self) {
        if let Some(dir) = &self.disk {
            let _ = fs::remove_file(dir.join("filler"));
        }
    }

    /// Whether the disk with the node's file or state was full at that time, or so shortly before that it shows still.
    pub fn was_full_at(&self, at: Instant) -> bool {
        let after = Duration::from_secs(5);
        self.was_full.iter().any(|(from, to)| at >= *from && to.is_none_or(|to| at <= to + after))
    }

    /// Takes a copy while everything runs, as sqlite3's .backup does.
    pub fn copy_online(&mut self) -> rusqlite::Result<()> {
        let to = self.next_copy();
        let from = rusqlite::Connection::open(self.file())?;
        from.busy_timeout(Duration::from_secs(20))?;
        from.backup(rusqlite::MAIN_DB, to.join("app.db"), None)?;
        self.keep_copy(to);
        Ok(())
    }

    /// Takes a copy with cp, while nothing has the file open.
    pub fn copy_stopped(&mut self) -> std::io::Result<()> {
        let to = self.next_copy();
        copy_database(&self.home.join("db"), &to)?;
        self.keep_copy(to);
        Ok(())
    }

    fn next_copy(&self) -> PathBuf {
        let number =
            self.copies.last().and_then(|c| c.file_name()?.to_str()?.parse::<u32>().ok()).unwrap_or_default();
        let dir = self.home.join("copies").join((number + 1).to_string());
        fs::create_dir_all(&dir).expect("a directory");
        dir
    }

    fn keep_copy(&mut self, copy: PathBuf) {
        self.copies.push(copy);
        while self.copies.len() > 3 {
            let _ = fs::remove_dir_all(self.copies.remove(0));
        }
    }

    /// Puts an older copy in the place of the file.
    pub fn put_back(&self, copy: &Path) -> std::io::Result<()> {
        let db = self.home.join("db");
        for suffix in SUFFIXES {
            let _ = fs::remove_file(db.join(format!("app.db{suffix}")));
        }
        copy_database(copy, &db)
    }
}

const SUFFIXES: [&str; 3] = ["", "-wal", "-shm"];

fn copy_database(from: &Path, to: &Path) -> std::io::Result<()> {
    for suffix in &SUFFIXES[..2] {
        let name = format!("app.db{suffix}");
        if from.join(&name).exists() {
            fs::copy(from.join(&name), to.join(&name))?;
        }
    }
    Ok(())
}
