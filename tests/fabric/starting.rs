//! Starting, stopping, starting again, and what stands in the way of it.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use litemesh::fabric::accounts::Accounts;
use litemesh::fabric::link::Outgoing;
use litemesh::fabric::{Fabric, FabricError};
use tokio::time::timeout;

use crate::support::{Site, commit, eventually, files_below, free_address, last_logged};

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_node_founds_its_cluster_and_serves_its_log() {
    let site = Site::new("a");
    let started = Instant::now();
    let node = site.start(None).await;
    let first_start = started.elapsed();
    node.log_exists().await;
    for _ in 0..3 {
        node.fabric.send(commit(b"one")).await.expect("sent");
    }
    eventually("the log has all", async || node.fabric.server_info().await.log.acked == 3).await;
    let log = node.fabric.server_info().await.log;
    assert_eq!((log.published, log.refused, log.unacked()), (3, 0, 0));
    node.fabric.shutdown().await;

    let started = Instant::now();
    let node = site.start(None).await;
    let later_start = started.elapsed();
    let client = site.look_inside().await;
    let kept = async || last_logged(&client, &site.name).await.as_deref() == Some(b"one");
    eventually("the log is served again", kept).await;
    println!("first start {first_start:?}, later {later_start:?}, log served {:?}", started.elapsed());
    assert!(first_start < Duration::from_secs(4), "{first_start:?}");
    assert!(later_start < Duration::from_secs(1), "{later_start:?}");
    assert_eq!(node.fabric.server_info().await.restarts, 0);
    node.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_founding_that_was_cut_off_is_taken_up_again() {
    for after_ms in [30, 120, 250, 400] {
        let site = Site::new("a");
        let cut = timeout(Duration::from_millis(after_ms), site.try_start(None)).await;
        // Whether it was done by then depends on the machine; it must not matter.
        drop(cut);
        let node = site.start(None).await;
        node.log_exists().await;
        assert!(!site.state().path().join("founding").exists(), "nothing of the helper is left");
        node.fabric.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_named_with_its_flag() {
    let site = Site::new("a");
    let holder = std::net::TcpListener::bind(site.cluster).expect("free");
    let error = site.try_start(None).await.err().expect("the port is taken");
    assert!(matches!(&error, FabricError::ClusterPortTaken { address } if *address == site.cluster.into()));
    assert!(error.to_string().contains("--cluster"));
    drop(holder);
    let holder = std::net::TcpListener::bind(site.client).expect("free");
    let error = site.try_start(None).await.err().expect("the port is taken");
    assert!(matches!(&error, FabricError::ClientPortTaken { address } if *address == site.client.into()));
    drop(holder);
    site.start(None).await.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_is_not_used_twice() {
    let site = Site::new("a");
    let node = site.start(None).await;
    let mut options = site.options(None);
    (options.cluster, options.client) = (free_address(), free_address());
    let error = Fabric::start(options).await.err().expect("it is in use");
    assert!(matches!(&error, FabricError::StateDirInUse { .. }), "{error}");
    node.fabric.send(commit(b"still there")).await.expect("the first one is not disturbed");
    node.fabric.shutdown().await;
    site.start(None).await.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_stay_in_files_of_the_owner() {
    let site = Site::new("a");
    let node = site.start(None).await;
    node.log_exists().await;
    let state = site.state();
    let accounts = Accounts::load_or_create(&state.accounts()).expect("readable");
    let token = node.fabric.join_token().expect("a token").reveal();
    let secret = &token["lm1-".len()..token.find('@').expect("has one")];
    let passwords = [&accounts.sys, &accounts.mesh, &accounts.app, &accounts.gate];
    let secrets: Vec<&str> = passwords.iter().map(|password| password.reveal()).chain([secret]).collect();

    let mut seen = 0;
    for path in files_below(state.path()) {
        let mode = path.metadata().expect("there").permissions().mode() & 0o777;
        let program = path.starts_with(state.path().join("bin"));
        let streams = path.starts_with(state.path().join("jetstream"));
        // nats-server makes its own files, below a directory that only the owner can enter.
        assert!(program || streams || mode == 0o600, "{} has mode {mode:o}", path.display());
        seen += 1;
    }
    assert!(seen > 6, "the key, certificates, passwords and configuration are there");
    let mode = state.path().metadata().expect("there").permissions().mode() & 0o777;
    assert_eq!(mode, 0o700);

    let pid = node.fabric.server_info().await.pid.expect("it runs");
    for what in ["cmdline", "environ"] {
        let text = std::fs::read(format!("/proc/{pid}/{what}")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(secrets.iter().all(|secret| !text.contains(secret)), "a secret in {what}");
    }
    node.fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_port_open_to_others_is_encrypted() {
    let mut site = Site::new("a");
    site.client.set_ip(std::net::Ipv4Addr::UNSPECIFIED.into());
    let node = site.start(None).await;
    node.fabric.send(Outgoing::Broadcast { payload: "x".into() }).await.expect("sent");
    node.fabric.flush().await.expect("the server has it");
    let accounts = Accounts::load_or_create(&site.state().accounts()).expect("readable");
    let login = || {
        async_nats::ConnectOptions::with_user_and_password("app".to_owned(), accounts.app.reveal().to_owned())
    };
    let url = format!("nats://127.0.0.1:{}", site.client.port());
    assert!(login().connect(&url).await.is_err(), "without the mesh's CA there is no trust, and no login");
    let ca = site.state().ca();
    let client = login().add_root_certificates(ca).require_tls(true).connect(&url).await;
    client.expect("with it there is").flush().await.expect("connected");
    node.fabric.shutdown().await;
}
