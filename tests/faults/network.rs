//! A network of namespaces: a hub with a bridge, and one namespace for each node, linked to it. Invariant: nothing is
//! made outside of namespaces whose names hold this process's id, so that removing those removes all of it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What all names begin with.
pub const PREFIX: &str = "lmf-";

/// Programs without which there is no network to break.
const PROGRAMS: [&str; 7] = ["ip", "tc", "nft", "nsenter", "setpriv", "mount", "mkfs.ext4"];

/// Why the suite cannot run here, if it cannot.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("it makes network namespaces and mounts file systems, which only root may".to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = |name: &&str| std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    let absent: Vec<&str> = PROGRAMS.into_iter().filter(|name| !there(name)).collect();
    if !absent.is_empty() {
        return Some(format!(
            "{} not found (Debian: iproute2 nftables util-linux mount e2fsprogs)",
            absent.join(", ")
        ));
    }
    let probe = format!("{PREFIX}{}-probe", std::process::id());
    let made = try_run("ip", &["netns", "add", &probe]);
    let _ = try_run("ip", &["netns", "del", &probe]);
    made.err().map(|why| format!("namespaces cannot be made here: {why}"))
}

/// Runs a program to its end.
pub fn try_run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(format!("{program} {}: {}", args.join(" "), text(&output.stderr))),
    }
}

fn run(program: &str, args: &[&str]) -> String {
    try_run(program, args).unwrap_or_else(|e| panic!("{e}"))
}

/// What is wrong with what one node gets.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rules {
    /// The nodes from which nothing arrives.
    pub cut: Vec<usize>,
    /// Percent of packets dropped.
    pub loss: u32,
    /// Milliseconds that what it sends is late.
    pub delay_ms: u32,
    pub link_down: bool,
}

/// The namespaces of this process.
pub struct Network {
    tag: String,
    nodes: usize,
    /// Whether the kernel can delay packets; else the link is made slow, so that they queue.
    netem: bool,
}

impl Network {
    pub fn new(nodes: usize) -> Self {
        let mut network = Self { tag: format!("{PREFIX}{}", std::process::id()), nodes, netem: false };
        let hub = network.hub();
        run("ip", &["netns", "add", &hub]);
        run("ip", &["-n", &hub, "link", "add", "br0", "type", "bridge"]);
        run("ip", &["-n", &hub, "link", "set", "br0", "up"]);
        for i in 0..nodes {
            let (ns, port) = (network.namespace(i), format!("port{i}"));
            run("ip", &["netns", "add", &ns]);
            let link =
                ["-n", &hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &ns];
            run("ip", &link);
            run("ip", &["-n", &hub, "link", "set", &port, "master", "br0", "up"]);
            run("ip", &["-n", &ns, "addr", "add", &format!("{}/24", address(i)), "dev", "eth0"]);
            run("ip", &["-n", &ns, "link", "set", "lo", "up"]);
            run("ip", &["-n", &ns, "link", "set", "eth0", "up"]);
            network.nft(i, "add table inet faults\nadd chain inet faults arrives { type filter hook input priority 0; }\n");
        }
        let ns = network.namespace(0);
        network.netem =
            try_run("tc", &["-n", &ns, "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "1ms"])
                .is_ok();
        let _ = try_run("tc", &["-n", &ns, "qdisc", "del", "dev", "eth0", "root"]);
        network
    }

    /// How `Kind::Delay` is done.
    pub fn delays_by(&self) -> &'static str {
        if self.netem { "netem" } else { "a slow link (tbf; this kernel has no netem)" }
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.tag)
    }

    pub fn namespace(&self, node: usize) -> String {
        format!("{}-{node}", self.tag)
    }

    fn nft(&self, node: usize, text: &str) {
        let mut child = Command::new("nsenter")
            .args([&format!("--net=/run/netns/{}", self.namespace(node)), "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("nft");
        child.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("nft reads");
        assert!(child.wait().expect("nft").success(), "nft refused: {text}");
    }

    /// Makes the rules of a node so.
    pub fn set(&self, node: usize, rules: &Rules, before: &Rules) {
        let ns = self.namespace(node);
        let mut text = "flush chain inet faults arrives\n".to_owned();
        for from in &rules.cut {
            text += &format!("add rule inet faults arrives ip saddr {} drop\n", address(*from));
        }
        if rules.loss > 0 {
            let loss = rules.loss;
            text += &format!("add rule inet faults arrives iif != lo numgen random mod 100 < {loss} drop\n");
        }
        self.nft(node, &text);
        if rules.delay_ms != before.delay_ms {
            let _ = try_run("tc", &["-n", &ns, "qdisc", "del", "dev", "eth0", "root"]);
            let (delay, jitter) = (format!("{}ms", rules.delay_ms), format!("{}ms", rules.delay_ms / 4));
            let how: &[&str] = match self.netem {
                true => &["netem", "delay", &delay, &jitter],
                false => &["tbf", "rate", "1mbit", "burst", "4kb", "latency", &delay],
            };
            if rules.delay_ms > 0 {
                run("tc", &[&["-n", &ns, "qdisc", "add", "dev", "eth0", "root"], how].concat());
            }
        }
        if rules.link_down != before.link_down {
            run("ip", &["-n", &ns, "link", "set", "eth0", if rules.link_down { "down" } else { "up" }]);
        }
    }

    /// The processes that live in a node's namespace.
    pub fn processes(&self, node: usize) -> Vec<i32> {
        processes_in(&self.namespace(node))
    }

    /// Removes all namespaces; what cannot be removed is told.
    pub fn remove(&self) -> Result<(), String> {
        let names = (0..self.nodes).map(|i| self.namespace(i)).chain([self.hub()]);
        let failed: Vec<String> = names
            .filter(|n| namespaces().contains(n))
            .filter_map(|n| try_run("ip", &["netns", "del", &n]).err())
            .collect();
        if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
    }

    /// Namespaces of this process that are there.
    pub fn left(&self) -> Vec<String> {
        namespaces().into_iter().filter(|n| n.starts_with(&format!("{}-", self.tag))).collect()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.remove();
    }
}

/// The address of a node.
pub fn address(node: usize) -> String {
    format!("10.99.0.{}", node + 1)
}

fn namespaces() -> Vec<String> {
    let list = try_run("ip", &["netns", "list"]).unwrap_or_default();
    list.lines().filter_map(|l| l.split_whitespace().next()).map(str::to_owned).collect()
}

fn processes_in(namespace: &str) -> Vec<i32> {
    let pids = try_run("ip", &["netns", "pids", namespace]).unwrap_or_default();
    pids.lines().filter_map(|l| l.trim().parse().ok()).collect()
}

/// Whether a process of this test program has this id.
fn runs_still(pid: &str) -> bool {
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    exe.file_name().is_some_and(|n| n.to_string_lossy().starts_with("faults-"))
}

/// Removes what runs left that were killed: processes, file systems, namespaces, directories. Returns their names.
pub fn remove_leftovers(temp: &Path) -> Vec<String> {
    let mut removed = Vec::new();
    for name in namespaces() {
        let Some(pid) = name.strip_prefix(PREFIX).and_then(|r| r.split('-').next()) else { continue };
        if runs_still(pid) {
            continue;
        }
        processes_in(&name).into_iter().for_each(kill_hard);
        let _ = try_run("ip", &["netns", "del", &name]);
        removed.push(name);
    }
    for dir in run_dirs(temp) {
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let pid = name.rsplit('-').next().unwrap_or_default();
        // What a failed run keeps has the mark.
        if runs_still(pid) || dir.join(KEPT).exists() {
            continue;
        }
        unmount_below(&dir);
        let _ = std::fs::remove_dir_all(&dir);
        removed.push(name);
    }
    removed
}

/// In a directory that a failed run has kept.
pub const KEPT: &str = "kept";

fn run_dirs(temp: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(temp).into_iter().flatten().flatten().map(|e| e.path());
    let ours =
        |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("litemesh-faults-"));
    entries.filter(ours).collect()
}

/// Unmounts all file systems below a directory.
pub fn unmount_below(dir: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = mounts.lines().filter_map(|l| l.split(' ').nth(1)).filter(|p| Path::new(p).starts_with(dir));
    for path in below.collect::<Vec<_>>().into_iter().rev() {
        if try_run("umount", &[path]).is_err() {
            let _ = try_run("umount", &["--lazy", path]);
        }
    }
}

/// kill -9, and no more than that: for a process that is not our child.
pub fn kill_hard(pid: i32) {
    signal(pid, rustix::process::Signal::KILL);
}

/// Sends a signal to a process that may be gone.
pub fn signal(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}
