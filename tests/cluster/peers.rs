//! Nodes that are all started with one line, as systemd and Kubernetes do: a list of peers and a file with the key.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::support::{Node, wait_equal, wait_for};

/// A key as an operator makes one.
const KEY: &str = "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=\n";

#[test]
fn three_nodes_started_at_once_with_one_line_share_the_first_ones_rows() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    std::fs::write(&key, KEY).unwrap();
    let mut nodes: Vec<Node> = ["a", "b", "c"].map(|n| Node::new(dir.path(), n, &["app.db"])).into();
    let list: Vec<String> = nodes.iter().map(|n| n.addresses[0].to_string()).collect();
    for node in &mut nodes {
        node.extra =
            ["--peers", &list.join(","), "--key-file", key.to_str().unwrap()].map(str::to_owned).into();
    }
    nodes[0].exec("app.db", "CREATE TABLE t(id TEXT PRIMARY KEY, v); INSERT INTO t VALUES('first', 1)");
    for which in [2, 1, 0] {
        nodes[which].spawn(None);
    }
    nodes.iter_mut().for_each(Node::wait_ready);
    for node in &nodes {
        node.exec("app.db", &format!("INSERT INTO t VALUES('{}', 2)", node.name));
    }
    wait_equal(&nodes.iter().collect::<Vec<_>>(), "app.db");
    assert_eq!(
        nodes[2].text("app.db", "SELECT group_concat(id) FROM (SELECT id FROM t ORDER BY 1)"),
        "a,b,c,first"
    );
    // Killed and started with the same line, each alone for a moment.
    nodes.iter_mut().for_each(Node::kill);
    for node in &mut nodes {
        node.start(None);
        node.exec("app.db", &format!("UPDATE t SET v = v + 1 WHERE id = '{}'", node.name));
    }
    wait_equal(&nodes.iter().collect::<Vec<_>>(), "app.db");
    let other = dir.path().join("other");
    std::fs::write(&other, KEY.replace('q', "r")).unwrap();
    nodes[1].kill();
    nodes[1].extra[3] = other.to_str().unwrap().to_owned();
    let refused = nodes[1].up_command(None).output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("already belongs to another mesh"), "{text}");
}

/// A network namespace whose names this test gives; removed when dropped.
struct Names {
    namespace: String,
    hosts: PathBuf,
}

impl Drop for Names {
    fn drop(&mut self) {
        drop(Command::new("ip").args(["netns", "delete", &self.namespace]).status());
        drop(std::fs::remove_dir_all(self.hosts.parent().unwrap()));
    }
}

impl Names {
    /// `None` where namespaces cannot be made.
    fn new() -> Option<Self> {
        let namespace = format!("litemesh-names-{}", std::process::id());
        let hosts = Path::new("/etc/netns").join(&namespace).join("hosts");
        let names = Self { namespace: namespace.clone(), hosts: hosts.clone() };
        std::fs::create_dir_all(hosts.parent()?).ok()?;
        std::fs::write(&hosts, "").ok()?;
        let ip = |args: &[&str]| Command::new("ip").args(args).output().is_ok_and(|o| o.status.success());
        let made = ip(&["netns", "add", &namespace]) && ip(&["-n", &namespace, "link", "set", "lo", "up"]);
        made.then_some(names)
    }

    /// What `mesh.test` leads to from now on.
    fn lead_to(&self, addresses: &[&str]) {
        let lines = addresses.iter().map(|a| format!("{a} mesh.test\n")).collect::<String>();
        // In place: the file is mounted where programs look for it.
        std::fs::write(&self.hosts, format!("127.0.0.1 localhost\n{lines}")).unwrap();
    }

    /// Starts a node at an address of its own, without waiting.
    fn spawn(&self, node: &mut Node, address: &str, peers: &str, key: &Path) {
        node.addresses[0] = format!("{address}:16222").parse().unwrap();
        node.extra = ["--peers", peers, "--key-file", key.to_str().unwrap()].map(str::to_owned).into();
        let up = node.up_command(None);
        let log = std::fs::File::create(node.home.join("log")).unwrap();
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(up.get_program()).args(up.get_args());
        command.current_dir(&node.home).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        node.process = Some(command.spawn().unwrap());
    }
}

fn log(node: &Node) -> String {
    std::fs::read_to_string(node.home.join("log")).unwrap_or_default()
}

fn count(node: &Node) -> String {
    let path = node.file("app.db");
    if !path.exists() {
        return String::new();
    }
    let query =
        || node.app("app.db").query_row("SELECT count(*) || '' FROM t", [], |r| r.get::<_, String>(0));
    query().unwrap_or_default()
}

#[test]
fn a_name_is_resolved_again_and_again_and_may_lead_to_many() {
    let Some(names) = Names::new() else {
        eprintln!("skipped: network namespaces cannot be made here");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    std::fs::write(&key, KEY).unwrap();
    let [mut a, mut b, mut c] = ["a", "b", "c"].map(|n| Node::new(dir.path(), n, &["app.db"]));
    let list = "mesh.test:16222,127.0.0.3:16222";
    a.exec("app.db", "CREATE TABLE t(id INTEGER PRIMARY KEY)");
    names.lead_to(&["127.0.0.9"]);
    names.spawn(&mut a, "127.0.0.2", list, &key);
    names.spawn(&mut b, "127.0.0.3", list, &key);
    wait_for("they wait", || {
        log(&a).contains("mesh.test:16222 does not answer") && log(&b).contains("waits for")
    });
    // A name of several nodes says nobody is the first: nothing is founded.
    names.lead_to(&["127.0.0.2", "127.0.0.3"]);
    std::thread::sleep(Duration::from_secs(2));
    assert!(![&a, &b].iter().any(|n| log(n).contains("the cluster is founded")));
    names.lead_to(&["127.0.0.2"]);
    wait_for("b has the table", || count(&b) == "0");
    // To join, a name of many addresses is enough, dead ones among them.
    names.lead_to(&["127.0.0.9", "127.0.0.2", "127.0.0.3"]);
    names.spawn(&mut c, "127.0.0.5", "mesh.test:16222", &key);
    wait_for("c has the table", || count(&c) == "0");
    [&mut a, &mut b, &mut c].into_iter().for_each(Node::kill);
    // Both know nothing but the name, which will lead to a alone, at another address.
    for node in [&a, &c] {
        std::fs::remove_file(node.state_dir().join("members.json")).unwrap();
    }
    names.lead_to(&["127.0.0.9"]);
    names.spawn(&mut c, "127.0.0.5", "mesh.test:16222", &key);
    names.spawn(&mut a, "127.0.0.6", "mesh.test:16222", &key);
    a.exec("app.db", "INSERT INTO t VALUES(1)");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(count(&c), "0");
    names.lead_to(&["127.0.0.9", "127.0.0.6"]);
    wait_for("c has found a", || count(&c) == "1");
}
