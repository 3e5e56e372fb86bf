//! Plain nats-servers, without anything of litemesh around them: to show what the design stands on. Each is killed when it
//! is dropped.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{api, eventually, free_address};

/// A server and where it keeps what it keeps.
pub struct Raw {
    pub name: &'static str,
    dir: TempDir,
    pub client: SocketAddr,
    pub cluster: SocketAddr,
    leaf: SocketAddr,
    monitor: SocketAddr,
    store: &'static str,
    /// The servers it dials; without any it is on its own, and not clustered.
    pub routes: Vec<SocketAddr>,
    pub tags: Vec<String>,
    /// More lines of its configuration, and of that of its cluster.
    pub extra: &'static str,
    pub cluster_extra: &'static str,
    child: Option<Child>,
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.kill();
    }
}

fn binary() -> &'static PathBuf {
    static BINARY: OnceLock<(PathBuf, TempDir)> = OnceLock::new();
    let unpacked = BINARY.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory");
        (nats_launcher::Bundle::install(dir.path()).expect("a server"), dir)
    });
    &unpacked.0
}

impl Raw {
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            dir: tempfile::tempdir().expect("a directory"),
            client: free_address(),
            cluster: free_address(),
            leaf: free_address(),
            monitor: free_address(),
            store: "store",
            routes: Vec::new(),
            tags: vec![format!("node:{name}")],
            extra: "",
            cluster_extra: "",
            child: None,
        }
    }

    /// Servers of one cluster that runs and has a leader.
    pub async fn cluster<const N: usize>(names: [&'static str; N]) -> [Self; N] {
        Self::cluster_with(names, |_| {}).await
    }

    pub async fn cluster_with<const N: usize>(
        names: [&'static str; N],
        change: impl Fn(&mut Self),
    ) -> [Self; N] {
        let mut servers = names.map(Self::new);
        let routes: Vec<SocketAddr> = servers.iter().map(|s| s.cluster).collect();
        for server in &mut servers {
            server.routes.clone_from(&routes);
            change(server);
            server.start();
        }
        for server in &servers {
            let complete =
                async || server.group().await["cluster_size"] == N && server.leader().await.is_some();
            eventually("the cluster is complete", complete).await;
        }
        servers
    }

    fn conf_path(&self) -> PathBuf {
        self.dir.path().join("conf")
    }

    pub fn store(&self) -> PathBuf {
        self.dir.path().join(self.store)
    }

    pub fn write_conf(&self) {
        let tags: Vec<String> = self.tags.iter().map(|t| format!("{t:?}")).collect();
        let mut conf = format!(
            "server_name: {:?}\nserver_tags: [{}]\nlisten: \"{}\"\nhttp: \"{}\"\nleafnodes {{ listen: \"{}\" }}\n\
             jetstream {{ store_dir: {:?} }}\nsystem_account: SYS\nno_auth_user: u\naccounts {{\n\
             SYS {{ users: [{{ user: sys, password: sys }}] }}\n\
             A {{ jetstream: enabled, users: [{{ user: u, password: u }}] }}\n}}\n{}\n",
            self.name,
            tags.join(", "),
            self.client,
            self.monitor,
            self.leaf,
            self.store().display().to_string(),
            self.extra,
        );
        if !self.routes.is_empty() {
            let routes: Vec<String> = self.routes.iter().map(|r| format!("\"nats://{r}\"")).collect();
            let (listen, routes, extra) = (self.cluster, routes.join(", "), self.cluster_extra);
            conf +=
                &format!("cluster {{ name: facts, listen: \"{listen}\", routes: [{routes}]\n{extra} }}\n");
        }
        std::fs::write(self.conf_path(), conf).expect("writable");
    }

    pub fn start(&mut self) {
        assert!(self.child.is_none());
        self.write_conf();
        let mut command = Command::new(binary());
        command
            .arg("-c")
            .arg(self.conf_path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.child = Some(command.spawn().expect("it starts"));
    }

    pub fn leaf_address(&self) -> SocketAddr {
        self.leaf
    }

    pub fn set_leaf(&mut self, leaf: SocketAddr) {
        self.leaf = leaf;
    }

    /// Another directory for what it stores, by its configuration.
    pub fn move_store(&mut self) {
        self.store = "elsewhere";
    }

    pub fn move_store_back(&mut self) {
        self.store = "store";
    }

    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it runs");
        kill_process(Pid::from_child(child), signal).expect("ours");
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    async fn connect(&self, user: &str) -> async_nats::Client {
        let url = format!("nats://{}", self.client);
        loop {
            let options =
                async_nats::ConnectOptions::with_user_and_password(user.to_owned(), user.to_owned());
            if let Ok(client) = options.connect(&url).await {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn user(&self) -> async_nats::Client {
        self.connect("u").await
    }

    pub async fn sys(&self) -> async_nats::Client {
        self.connect("sys").await
    }

    /// What the monitoring port answers.
    pub async fn look(&self, path: &'static str) -> Value {
        let monitor = self.monitor;
        let ask = move || -> std::io::Result<Value> {
            let mut stream = TcpStream::connect(monitor)?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
            let mut reader = BufReader::new(stream);
            let mut line = String::new();
            while reader.read_line(&mut line)? > 2 {
                line.clear();
            }
            Ok(serde_json::from_reader(reader)?)
        };
        tokio::task::spawn_blocking(ask).await.expect("no panic").unwrap_or_default()
    }

    pub async fn group(&self) -> Value {
        self.look("/jsz").await["meta_cluster"].clone()
    }

    pub async fn leader(&self) -> Option<String> {
        self.group().await["leader"].as_str().filter(|l| !l.is_empty()).map(str::to_owned)
    }

    /// A leafnode connection, which ends when this is dropped.
    pub fn hold_leaf(&self) -> TcpStream {
        let stream = loop {
            match TcpStream::connect(self.leaf) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let mut reader = BufReader::new(stream.try_clone().expect("a handle"));
        let mut writer = stream.try_clone().expect("a handle");
        std::thread::spawn(move || -> std::io::Result<()> {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            write!(
                writer,
                "CONNECT {{\"user\":\"u\",\"pass\":\"u\",\"name\":\"leaf\",\"version\":\"2.15.1\"}}\r\nPING\r\n"
            )?;
            loop {
                line.clear();
                if reader.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                if line.starts_with("PING") {
                    writer.write_all(b"PONG\r\n")?;
                }
            }
        });
        stream
    }

    /// Makes a stream with one copy here, which answers to direct requests, and puts a message into it.
    pub async fn make_stream(&self, client: &async_nats::Client, name: &str, more: Value) {
        let mut config = json!({
            "name": name, "subjects": [format!("{name}.>")], "storage": "file", "num_replicas": 1, "allow_direct": true,
        });
        if !self.routes.is_empty() {
            config["placement"] = json!({ "tags": [format!("node:{}", self.name)] });
        }
        for (key, value) in more.as_object().expect("an object") {
            config[key] = value.clone();
        }
        let create = format!("$JS.API.STREAM.CREATE.{name}");
        let made =
            async || api(client, &create, config.clone()).await.is_some_and(|a| a.get("error").is_none());
        eventually("the stream is made", made).await;
        if config["mirror"].is_null() {
            let stored = async || publish(client, name).await;
            eventually("it takes a message", stored).await;
        }
    }
}

/// Whether the stream stores a message.
pub async fn publish(client: &async_nats::Client, stream: &str) -> bool {
    api(client, &format!("{stream}.x"), json!("x")).await.is_some_and(|a| a["seq"].as_u64() > Some(0))
}

/// Whether the last message of the stream is given to whoever asks directly.
pub async fn direct_get(client: &async_nats::Client, stream: &str) -> bool {
    let request = client.request(format!("$JS.API.DIRECT.GET.{stream}.{stream}.x"), "".into());
    let answer = tokio::time::timeout(Duration::from_secs(1), request).await;
    matches!(answer, Ok(Ok(message)) if message.status.is_none() && message.payload == "\"x\"")
}
