//! Nodes that meet on a NATS system of somebody else's, and run no server.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::support::authority::authority;
use crate::support::{Node, free_addresses, wait_equal, wait_for};

pub const USER: &str = "authorization { user: lm, password: \"s3cret@:\" }\n";
pub const LOGIN: &str = "lm:s3cret%40%3A@";
pub const SCHEMA: &str = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)";

/// A nats-server that knows nothing of litemesh; it is stopped when dropped.
pub struct Nats {
    program: PathBuf,
    conf: PathBuf,
    pub address: SocketAddr,
    process: Option<Child>,
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Nats {
    pub fn start(dir: &Path, conf: &str) -> Self {
        let program = nats_launcher::Bundle::install(&dir.join("bin")).unwrap();
        let address = free_addresses(1)[0];
        let file = dir.join("nats.conf");
        std::fs::write(&file, format!("listen: \"{address}\"\n{conf}")).unwrap();
        let mut nats = Self { program, conf: file, address, process: None };
        nats.run();
        nats
    }

    pub fn with_jetstream(dir: &Path) -> Self {
        Self::start(dir, &format!("{USER}jetstream {{ store_dir: {:?} }}\n", dir.join("js")))
    }

    pub fn run(&mut self) {
        let mut command = Command::new(&self.program);
        command.arg("-c").arg(&self.conf).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.process = Some(command.spawn().unwrap());
        wait_for("it listens", || TcpStream::connect(self.address).is_ok());
    }

    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended already.
            drop(process.kill());
            drop(process.wait());
        }
    }

    pub fn guest(&self, dir: &Path, name: &str, login: &str) -> Node {
        let mut node = Node::new(dir, name, &["app.db"]);
        node.is_guest = true;
        node.variables.push(("LITEMESH_FABRIC_URL".to_owned(), format!("nats://{login}{}", self.address)));
        node
    }

    async fn connect(&self) -> async_nats::Client {
        let options =
            async_nats::ConnectOptions::with_user_and_password("lm".to_owned(), "s3cret@:".to_owned());
        options.connect(format!("nats://{}", self.address)).await.unwrap()
    }

    fn streams(&self) -> Vec<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answer = runtime.block_on(async {
            self.connect().await.request("$JS.API.STREAM.NAMES", "{}".into()).await.unwrap()
        });
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
        let names = answer["streams"].as_array().into_iter().flatten();
        names.map(|name| name.as_str().unwrap().to_owned()).collect()
    }
}

fn text(output: &Output) -> String {
    String::from_utf8([output.stdout.as_slice(), output.stderr.as_slice()].concat()).unwrap()
}

/// Starts it, expects it to end, and returns its exit code and what it said.
pub fn refused(node: &Node) -> (Option<i32>, String) {
    let output = node.up_command(None).output().unwrap();
    (output.status.code(), text(&output))
}

pub fn logged(node: &Node, words: &str) -> bool {
    node.log.lock().unwrap().iter().any(|line| line.contains(words))
}

pub fn rows(node: &Node) -> String {
    node.text("app.db", "SELECT count(*) || '' FROM t")
}

pub fn connected(node: &Node) -> bool {
    node.status()["fabric"]["connected"] == true
}

#[test]
fn two_nodes_meet_on_a_nats_system_that_is_killed_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut nats = Nats::with_jetstream(dir.path());
    let (mut a, mut b) = (nats.guest(dir.path(), "a", LOGIN), nats.guest(dir.path(), "b", LOGIN));
    a.exec("app.db", SCHEMA);
    a.exec("app.db", "INSERT INTO t VALUES('first', 1)");
    a.start(None);
    b.start(None);
    assert_eq!(rows(&b), "1", "it had the rows when it was ready");
    b.exec("app.db", "INSERT INTO t VALUES('b', 1)");
    wait_equal(&[&a, &b], "app.db");
    wait_for("both have logs", || {
        let mut streams = nats.streams();
        streams.sort();
        streams == ["LM_a@litemesh", "LM_b@litemesh"]
    });
    // What each command says.
    let status = a.status();
    assert_eq!(
        (&status["fabric"]["external"], &status["fabric"]["server_pid"]),
        (&true.into(), &Value::Null)
    );
    assert!(!a.state_dir().join("nats.conf").exists() && !a.state_dir().join("mesh.key").exists());
    let join = format!("--fabric-url nats://{} --fabric-mesh litemesh", nats.address);
    assert!(a.output.lock().unwrap().iter().any(|l| l.ends_with(&join)), "{:?}", a.output);
    for (args, word) in [
        (&["token"][..], "another node joins with the same --fabric-url"),
        (&["token", "--rotate"], "it has no key and no token"),
        (&["rescue", "--confirm", "a"], "is for its operator to say"),
    ] {
        let said = a.run(args);
        assert!(!said.status.success() && text(&said).contains(word), "{args:?}: {}", text(&said));
    }
    let env = a.run(&["env"]);
    assert!(text(&env).contains(&format!("NATS_URL='nats://{}'", nats.address)), "{}", text(&env));
    let table = text(&a.run(&["status"]));
    assert!(table.contains(&format!("NATS system at nats://{}", nats.address)), "{table}");

    nats.kill();
    wait_for("both notice", || !connected(&a) && !connected(&b));
    a.exec("app.db", "INSERT INTO t VALUES('a, alone', 1)");
    b.exec("app.db", "INSERT INTO t VALUES('b, alone', 1)");
    assert_eq!(a.status()["ready"], true);
    assert!(a.status()["warnings"].to_string().contains("not connected to the NATS system at"));
    // A node that belongs starts without it.
    b.stop();
    b.start(None);
    assert!(logged(&b, "is away (it cannot be reached"));
    b.exec("app.db", "INSERT INTO t VALUES('b, started alone', 1)");
    nats.run();
    wait_equal(&[&a, &b], "app.db");
    assert_eq!(rows(&a), "5");
    wait_for("it is told", || logged(&a, "is back"));
    for node in [&a, &b] {
        assert!(!logged(node, "s3cret") && !node.status().to_string().contains("s3cret"), "{}", node.name);
        assert!(!node.state_dir().join("jetstream").exists());
    }
    // Who was away reads what it missed, and a node killed comes back.
    b.kill();
    for n in 0..50 {
        a.exec("app.db", &format!("INSERT INTO t VALUES('while b was away {n}', 1)"));
    }
    b.start(None);
    wait_equal(&[&a, &b], "app.db");
}

#[test]
fn meshes_and_names_on_one_account_are_kept_apart() {
    let dir = tempfile::tempdir().unwrap();
    let nats = Nats::with_jetstream(dir.path());
    let mut a = nats.guest(dir.path(), "a", LOGIN);
    a.exec("app.db", SCHEMA);
    a.exec("app.db", "INSERT INTO t VALUES('a', 1)");
    a.start(None);
    // Another mesh, another database of the same name.
    let mut other = nats.guest(&dir.path().join("other"), "b", LOGIN);
    other.extra = vec!["--fabric-mesh".to_owned(), "other".to_owned()];
    other.exec("app.db", "CREATE TABLE other(id TEXT PRIMARY KEY NOT NULL)");
    other.exec("app.db", "INSERT INTO other VALUES('x')");
    other.start(None);
    // Two of one name in one mesh would not hear each other.
    let twin = nats.guest(&dir.path().join("twin"), "a", LOGIN);
    let (code, said) = refused(&twin);
    assert!(code == Some(1) && said.contains("is called a too: choose another name with --name"), "{said}");
    let mut b = nats.guest(dir.path(), "b", LOGIN);
    b.start(None);
    wait_equal(&[&a, &b], "app.db");
    wait_for("it is a member", || a.status()["peers"].as_array().unwrap().len() == 1);
    assert_eq!(other.status()["peers"].as_array().unwrap().len(), 0);
    assert_eq!(a.status()["fabric"]["messages_refused"], 0);
    // A state directory stays with its mesh, and with its kind of server.
    b.stop();
    b.extra = vec!["--fabric-mesh".to_owned(), "other".to_owned()];
    let (code, said) = refused(&b);
    assert!(code == Some(1) && said.contains("the mesh litemesh"), "{said}");
    (b.extra, b.is_guest) = (Vec::new(), false);
    let url = b.variables.pop().unwrap();
    let (code, said) = refused(&b);
    assert!(code == Some(1) && said.contains("start it with --fabric-url as before"), "{said}");
    (b.is_guest, b.variables) = (true, vec![url]);
    b.start(None);
    // Out of it, by others and by itself.
    let removed = a.run(&["remove", "b", "--yes"]);
    assert!(!removed.status.success() && text(&removed).contains("b is running"), "{}", text(&removed));
    b.kill();
    wait_for("it is removed", || a.run(&["remove", "b", "--yes"]).status.success());
    assert!(!nats.streams().contains(&"LM_b@litemesh".to_owned()));
    b.start(None);
    b.exec("app.db", "INSERT INTO t VALUES('b is back', 1)");
    wait_equal(&[&a, &b], "app.db");
    b.sync();
    let left = b.run(&["leave"]);
    assert!(left.status.success(), "{}", text(&left));
    assert!(!b.state_dir().join("external.json").exists());
    let tables = b.text(
        "app.db",
        "SELECT group_concat(name) FROM sqlite_schema WHERE name LIKE '\\_\\_lite%' ESCAPE '\\'",
    );
    assert_eq!(tables, "");
    wait_for("its log is gone", || !nats.streams().contains(&"LM_b@litemesh".to_owned()));
}

#[test]
fn without_jetstream_rows_replicate_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let nats = Nats::start(dir.path(), USER);
    let (mut a, mut b) = (nats.guest(dir.path(), "a", LOGIN), nats.guest(dir.path(), "b", LOGIN));
    // Both at once: rows come first.
    b.exec("app.db", SCHEMA);
    b.exec("app.db", "INSERT INTO t VALUES('b', 1)");
    a.spawn(None);
    b.start(None);
    a.wait_ready();
    wait_equal(&[&a, &b], "app.db");
    a.exec("app.db", "INSERT INTO t VALUES('a', 1)");
    a.sync();
    wait_for("it is told", || logged(&a, "this node has no log in JetStream"));
    b.kill();
    for n in 0..50 {
        a.exec("app.db", &format!("INSERT INTO t VALUES('while b was away {n}', 1)"));
    }
    b.start(None);
    wait_equal(&[&a, &b], "app.db");
    assert_eq!(rows(&b), "52");
    assert_eq!(a.status()["ready"], true);
}

#[test]
fn certificates_of_both_sides_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, cert, key) = authority(dir.path(), "good");
    let (other_ca, other_cert, other_key) = authority(dir.path(), "other");
    let tls = format!("tls {{ cert_file: {cert:?}, key_file: {key:?}, ca_file: {ca:?}, verify: true }}\n");
    let nats = Nats::start(dir.path(), &format!("{USER}{tls}"));
    let with = |name: &str, options: &[&str]| {
        let mut node = nats.guest(dir.path(), name, LOGIN);
        let url = format!("tls://{LOGIN}{}", nats.address);
        node.variables = vec![("LITEMESH_FABRIC_URL".to_owned(), url)];
        node.extra = options.iter().map(|o| (*o).to_owned()).collect();
        node
    };
    let all = ["--fabric-ca", &ca, "--fabric-cert", &cert, "--fabric-key", &key];
    let (mut a, mut b) = (with("a", &all), with("b", &all));
    a.exec("app.db", SCHEMA);
    a.start(None);
    b.start(None);
    b.exec("app.db", "INSERT INTO t VALUES('b', 1)");
    wait_equal(&[&a, &b], "app.db");
    for (options, words) in [
        (
            &["--fabric-ca", &other_ca, "--fabric-cert", &cert, "--fabric-key", &key][..],
            "its CA with --fabric-ca",
        ),
        (&["--fabric-ca", &ca][..], "--fabric-cert and --fabric-key"),
        (
            &["--fabric-ca", &ca, "--fabric-cert", &other_cert, "--fabric-key", &other_key],
            "--fabric-cert and --fabric-key",
        ),
        (&["--fabric-ca", "/no/such/file"], "/no/such/file cannot be used"),
    ] {
        let (code, said) = refused(&with("c", options));
        assert!(code == Some(1) && said.contains(words), "{options:?}: {said}");
        assert!(!said.contains("s3cret"), "{said}");
    }
}

#[test]
fn what_cannot_work_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    let bound = dir.path().join("bound");
    for sub in [&small, &bound] {
        std::fs::create_dir(sub).unwrap();
    }
    let nats = Nats::start(dir.path(), USER);
    let (code, said) = refused(&nats.guest(dir.path(), "a", "lm:wrong-one@"));
    let words = "it does not let this node in (authorization violation";
    assert!(code == Some(1) && said.contains(words) && !said.contains("wrong-one"), "{said}");
    let small = Nats::start(&small, &format!("{USER}max_payload: 65536\n"));
    let (_, said) = refused(&small.guest(dir.path(), "a", LOGIN));
    assert!(said.contains("raise its max_payload"), "{said}");
    let permissions = "permissions: { publish: [\"lm-litemesh.>\", \"_INBOX.>\", \"$SYS.REQ.USER.INFO\"], subscribe: \
                       [\"lm-litemesh.m.>\", \"_INBOX.>\"] }";
    let users =
        format!("authorization {{ users: [{{ user: lm, password: \"s3cret@:\", {permissions} }}] }}\n");
    let bound = Nats::start(&bound, &users);
    let (_, said) = refused(&bound.guest(dir.path(), "a", LOGIN));
    assert!(said.contains("its user lacks permissions") && said.contains("lm-litemesh.>"), "{said}");
    let nobody = nats.address;
    drop(nats);
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    a.is_guest = true;
    a.extra = vec!["--fabric-url".to_owned(), format!("nats://{nobody}")];
    let (code, said) = refused(&a);
    assert!(code == Some(1) && said.contains("is this its client port?"), "{said}");
    assert!(
        !a.file("app.db").exists() && !a.state_dir().join("external.json").exists(),
        "nothing was changed"
    );
    // Wrong usage on the command line, wrong configuration elsewhere.
    a.extra.extend(["--cluster".to_owned(), "127.0.0.1:1".to_owned()]);
    let (code, said) = refused(&a);
    assert!(code == Some(2) && said.contains("--cluster"), "{said}");
    a.extra.truncate(2);
    a.variables = vec![("LITEMESH_JOIN".to_owned(), "lm1-secret".to_owned())];
    let (code, said) = refused(&a);
    assert!(
        code == Some(78) && said.contains("there is no join (--join)") && !said.contains("secret"),
        "{said}"
    );
}

#[test]
fn changes_are_told_under_one_id_by_whichever_node() {
    let dir = tempfile::tempdir().unwrap();
    let nats = Nats::with_jetstream(dir.path());
    let (mut a, mut b) = (nats.guest(dir.path(), "a", LOGIN), nats.guest(dir.path(), "b", LOGIN));
    for node in [&mut a, &mut b] {
        node.extra.push("--cdc".to_owned());
    }
    a.exec("app.db", SCHEMA);
    a.start(None);
    b.start(None);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (client, mut changes) = runtime.block_on(async {
        let client = nats.connect().await;
        // A stream keeps each change once.
        let config = async_nats::jetstream::stream::Config {
            name: "CDC".to_owned(),
            subjects: vec!["cdc.>".to_owned()],
            ..Default::default()
        };
        async_nats::jetstream::new(client.clone()).create_stream(config).await.unwrap();
        let changes = client.subscribe("cdc.>").await.unwrap();
        client.flush().await.unwrap();
        (client, changes)
    });
    a.exec("app.db", "INSERT INTO t VALUES('x', 1)");
    // More than a message may have there.
    a.exec("app.db", "INSERT INTO t VALUES('large', zeroblob(1200000))");
    let next = |changes: &mut async_nats::Subscriber| {
        let told = runtime.block_on(async {
            use futures::StreamExt;
            tokio::time::timeout(crate::support::PATIENCE, changes.next()).await.unwrap().unwrap()
        });
        assert_eq!(told.subject.as_str(), "cdc.app.t.insert");
        serde_json::from_slice::<Value>(&told.payload).unwrap()
    };
    let told: Vec<Value> = (0..4).map(|_| next(&mut changes)).collect();
    let mut ids: Vec<_> = told.iter().map(|change| change["id"].to_string()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 2, "each of both nodes tells both");
    let large = told.iter().find(|change| change["key"]["id"] == "large").unwrap();
    assert!(large["too_large"] == true && large["new"].is_null(), "{large}");
    let kept = runtime.block_on(async {
        let stream = async_nats::jetstream::new(client).get_stream("CDC").await.unwrap();
        stream.cached_info().state.messages
    });
    assert_eq!(kept, 2);
}
