//! The mesh under test, and what is to be so at each moment. Invariant: every fault has a time when it is over;
//! `tick` brings the processes, networks and disks to what the time demands, whatever order faults came in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rustix::process::Signal;

use crate::journal::SharedJournal;
use crate::look::{look, schema};
use crate::network::{self, Network, Rules, signal};
use crate::node::{App, Node, Until};
use crate::plan::Kind;

/// How long anything may take that is only slow: far beyond what it takes.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// What a node that cannot start for want of space waits before the next try, as an init system would.
const START_AGAIN: Duration = Duration::from_secs(1);

pub struct World {
    pub dir: PathBuf,
    pub network: Network,
    pub nodes: Vec<Node>,
    pub journal: SharedJournal,
    /// What was done, by kind.
    pub injected: BTreeMap<String, u64>,
    pub seed: u64,
    /// The change of a schema that is under way, and on which node: one at a time.
    pub changing: Option<(usize, App)>,
    /// Applications started so far: each gets a seed of its own.
    started: u64,
    removed: bool,
}

impl World {
    /// Makes the network, and a mesh of nodes that hold the same rows.
    pub fn new(temp: &Path, seed: u64, nodes: usize, binaries: &[PathBuf]) -> Self {
        let dir = temp.join(format!("litemesh-faults-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let network = Network::new(nodes);
        let journal = SharedJournal::new(&dir.join("journal"));
        let made = |i| Node::new(&dir, i, network.namespace(i), binaries.to_vec());
        let nodes: Vec<Node> = (0..nodes).map(made).collect();
        let injected = BTreeMap::new();
        let mut world =
            Self { dir, network, nodes, journal, injected, seed, changing: None, started: 0, removed: false };
        let last = world.nodes.len() - 1;
        world.nodes[last].limit_disk("db");
        world.nodes[last - 1].limit_disk("state");
        world.begin();
        world
    }

    fn begin(&mut self) {
        let names: Vec<String> = self.nodes.iter().map(|n| n.name.clone()).collect();
        let first = Connection::open(self.nodes[0].file()).expect("a file");
        first.execute_batch(&format!("PRAGMA journal_mode = WAL; {}", schema(&names))).expect("the schema");
        drop(first);
        let mut token = None;
        for i in 0..self.nodes.len() {
            self.nodes[i].start(token.as_deref());
            self.wait("a first start", |w| w.nodes[i].is_ready());
            let output = self.nodes[i].output();
            let line = output.lines().find(|l| l.contains("--join ")).expect("a join line");
            token = line.rsplit(' ').next().map(str::to_owned);
        }
    }

    /// Waits, ticking, until something is so.
    pub fn wait(&mut self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !condition(self) {
            assert!(started.elapsed() < PATIENCE, "waited in vain: {what}");
            self.tick();
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn count(&mut self, what: &str) {
        *self.injected.entry(what.to_owned()).or_default() += 1;
    }

    pub fn note(&self, what: &str) {
        self.journal.get().note(&format!("-- {what}"));
    }

    pub fn failed(&self) -> bool {
        !self.journal.get().violations.is_empty()
    }

    /// Brings everything to what this moment demands.
    pub fn tick(&mut self) {
        let now = Instant::now();
        for i in 0..self.nodes.len() {
            self.tick_pauses(i, now);
            self.tick_network(i, now);
            self.tick_disk(i, now);
            self.tick_litemesh(i, now);
        }
        if self.changing.as_mut().is_some_and(|(_, app)| app.ended().is_some()) {
            self.changing = None;
        }
        self.tick_journal();
    }

    /// Judges what applications said of their errors.
    pub fn tick_journal(&mut self) {
        let nodes = &self.nodes;
        let was_full = |name: &str, at| nodes.iter().any(|n| n.name == name && n.was_full_at(at));
        self.journal.get().judge_errors(was_full);
    }

    fn tick_pauses(&mut self, i: usize, now: Instant) {
        let over = |(pid, until): &mut (i32, Until)| {
            let over = until.0 <= now;
            if over {
                signal(*pid, Signal::CONT);
            }
            !over
        };
        self.nodes[i].paused.retain_mut(over);
    }

    fn tick_network(&mut self, i: usize, now: Instant) {
        let node = &mut self.nodes[i];
        node.network_faults.retain(|(_, until)| until.0 > now);
        let mut rules = Rules::default();
        for (kind, _) in &node.network_faults {
            match kind {
                Kind::CutFrom(other) => rules.cut.push(*other),
                Kind::Loss(percent) => rules.loss = rules.loss.max(*percent),
                Kind::Delay(ms) => rules.delay_ms = rules.delay_ms.max(*ms),
                Kind::LinkDown => rules.link_down = true,
                _ => {}
            }
        }
        if rules != node.rules {
            self.network.set(i, &rules, &node.rules);
            node.rules = rules;
        }
    }

    fn tick_disk(&mut self, i: usize, now: Instant) {
        let node = &mut self.nodes[i];
        if node.full_until.is_some_and(|until| until.0 <= now) {
            node.full_until = None;
            node.free_disk();
            if let Some((_, to)) = node.was_full.last_mut() {
                *to = Some(now);
            }
        }
    }

    /// Starts what is to run, and notices what ended by itself.
    fn tick_litemesh(&mut self, i: usize, now: Instant) {
        let node = &mut self.nodes[i];
        if let Some(status) = node.litemesh.as_mut().and_then(|c| c.try_wait().expect("a child")) {
            node.litemesh = None;
            if node.was_full_at(now) {
                node.down_until = Some(Until(now + START_AGAIN));
            } else {
                let what = format!("litemesh of {} ended by itself: {status}", node.name);
                self.journal.get().violation(what);
                return;
            }
        }
        if node.starts > 0 && node.litemesh.is_none() && node.down_until.is_none_or(|until| until.0 <= now) {
            node.down_until = None;
            node.start(None);
        }
    }

    /// Starts the applications that are to run and do not.
    pub fn tick_applications(&mut self) {
        let now = Instant::now();
        for i in 0..self.nodes.len() {
            if self.nodes[i].behind && !self.has_what_it_had(i) {
                continue;
            }
            self.nodes[i].behind = false;
            self.tick_application(i, "writer", now);
            self.tick_application(i, "reader", now);
        }
    }

    fn tick_application(&mut self, i: usize, role: &str, now: Instant) {
        let node = &mut self.nodes[i];
        let (app, down_until) = match role {
            "writer" => (&mut node.writer, node.writer_down_until),
            _ => (&mut node.reader, node.reader_down_until),
        };
        if let Some(status) = app.as_mut().and_then(App::ended) {
            let what = format!("the {role} of {} ended by itself: {status}", node.name);
            self.journal.get().violation(what);
            *app = None;
        }
        if app.is_none() && down_until.is_none_or(|until| until.0 <= now) {
            self.started += 1;
            let app = Some(App::start(role, node, self.seed ^ self.started, &self.journal));
            match role {
                "writer" => node.writer = app,
                _ => node.reader = app,
            }
        }
    }

    /// Whether a node whose file was put back has again what its applications were told is there.
    fn has_what_it_had(&self, i: usize) -> bool {
        let node = &self.nodes[i];
        if !node.is_ready() {
            return false;
        }
        self.missing(i, |of| of == node.name).is_ok_and(|missing| missing.is_empty())
    }

    /// What of the acknowledged a node's file does not have, of the writers that `of` admits.
    pub fn missing(&self, i: usize, of: impl Fn(&str) -> bool) -> rusqlite::Result<Vec<String>> {
        let conn =
            Connection::open_with_flags(self.nodes[i].file(), rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        conn.busy_timeout(Duration::from_secs(20))?;
        let mut seen = look(&conn, false)?;
        let made = crate::app::made(&conn)?;
        let acknowledged = self.journal.get().acknowledged.clone();
        for what in acknowledged.keys() {
            if what.split('/').next().is_some_and(|name| made.iter().any(|m| m == name)) {
                seen.reached.insert(what.clone(), 1);
            }
        }
        Ok(seen.missing(&acknowledged, of))
    }

    /// Ends all faults; applications that write end, too.
    pub fn heal(&mut self) {
        for i in 0..self.nodes.len() {
            let (now, node) = (Until(Instant::now()), &mut self.nodes[i]);
            node.paused.iter_mut().for_each(|p| p.1 = now);
            node.network_faults.iter_mut().for_each(|f| f.1 = now);
            node.full_until = node.full_until.map(|_| now);
            node.down_until = node.down_until.map(|_| now);
            (node.writer_down_until, node.reader_down_until) = (None, None);
            self.tick_pauses(i, now.0);
            if let Some(writer) = self.nodes[i].writer.take() {
                writer.end();
            }
            if self.nodes[i].clock_offset_ms != 0 {
                self.nodes[i].clock_offset_ms = 0;
                self.stop(i);
            }
        }
        self.tick();
    }

    /// Stops litemesh with SIGTERM. That it does not end well is a violation, unless its disk is full.
    pub fn stop(&mut self, i: usize) {
        let stopped = self.nodes[i].stop();
        if let Err(why) = stopped
            && !self.nodes[i].was_full_at(Instant::now())
        {
            self.journal.get().violation(why);
        }
    }

    /// Ends everything in order and removes what was made; returns what was left over.
    pub fn end(&mut self) -> Vec<String> {
        for i in 0..self.nodes.len() {
            for app in [self.nodes[i].writer.take(), self.nodes[i].reader.take()].into_iter().flatten() {
                app.end();
            }
            self.stop(i);
        }
        let mut left: Vec<String> = Vec::new();
        for i in 0..self.nodes.len() {
            // A server ends a moment after the process whose child it was is gone.
            let since = Instant::now();
            while !self.network.processes(i).is_empty() && since.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(20));
            }
            left.extend(self.network.processes(i).iter().map(|pid| format!("process {pid} of node {i}")));
        }
        left.extend(self.remove());
        left
    }

    /// Kills what still runs, and removes namespaces and file systems.
    fn remove(&mut self) -> Vec<String> {
        self.removed = true;
        self.changing = None;
        for (i, node) in self.nodes.iter_mut().enumerate() {
            (node.writer, node.reader) = (None, None);
            node.kill();
            self.network.processes(i).into_iter().for_each(network::kill_hard);
        }
        let mut left: Vec<String> = self.network.remove().err().into_iter().collect();
        left.extend(self.network.left().into_iter().map(|n| format!("namespace {n}")));
        network::unmount_below(&self.dir);
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        left.extend(mounts.lines().filter(|l| l.contains(&*self.dir.to_string_lossy())).map(str::to_owned));
        left
    }

    /// Keeps all files for a look, those of file systems that go away included.
    pub fn keep_files(&mut self) {
        for node in &mut self.nodes {
            (node.writer, node.reader) = (None, None);
            node.kill();
            node.free_disk();
            if let Some(disk) = node.disk.take() {
                let aside = disk.with_extension("kept");
                let (from, to) = (disk.display().to_string(), aside.display().to_string());
                let _ = network::try_run("cp", &["-a", &from, &to]);
                let _ = network::try_run("umount", &[&from]);
                let _ = std::fs::remove_dir(&disk).and_then(|()| std::fs::rename(&aside, &disk));
                let _ = std::fs::remove_file(disk.with_extension("ext4"));
            }
        }
        let _ = std::fs::write(self.dir.join(network::KEPT), "");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !self.removed {
            self.keep_files();
            self.remove();
        }
    }
}
