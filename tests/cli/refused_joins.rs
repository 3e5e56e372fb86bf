//! Meshes that cannot be joined.

use std::io::Write;
use std::net::TcpListener;
use std::path::PathBuf;

use crate::refusal::{SCHEMA, up_refused};
use crate::support::{Node, dump, free_addresses};

fn newcomer(dir: &std::path::Path, name: &str) -> Node {
    let node = Node::new(dir, name, &["app.db"]);
    node.exec("app.db", SCHEMA);
    node
}

/// A listener that says this to whoever comes, and hangs up.
fn chatterer(words: &'static str) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            // Who has gone already is told nothing.
            drop(stream.write_all(words.as_bytes()));
        }
    });
    address
}

#[test]
fn addresses_where_there_is_no_mesh_to_join() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    a.exec("app.db", SCHEMA);
    a.start(None);
    let b = newcomer(dir.path(), "b");
    let token = a.token();
    let secret = token.split('@').next().unwrap();
    let at = |address: &str| format!("{secret}@{address}");
    up_refused(
        &b,
        Some(&at("no-such-host.invalid:6222")),
        &["no-such-host.invalid:6222", "no such host", "check"],
    );
    let nobody = free_addresses(1)[0].to_string();
    up_refused(&b, Some(&at(&nobody)), &[&nobody, "connection refused", "is litemesh running there"]);
    for words in ["", "hello, this is no mesh\n", "HTTP/1.1 400 Bad Request\r\n\r\n"] {
        let other = chatterer(words).to_string();
        up_refused(&b, Some(&at(&other)), &["cannot join", &other]);
    }
    let client = a.addresses[1].to_string();
    up_refused(&b, Some(&at(&client)), &[&client, "client port", "not the cluster port"]);
    let http = a.addresses[2].to_string();
    up_refused(&b, Some(&at(&http)), &["cannot join", &http]);

    let mut x = newcomer(dir.path(), "x");
    x.start(None);
    let foreign = x.token();
    let foreign = format!("{}@{}", foreign.split('@').next().unwrap(), a.addresses[0]);
    up_refused(&b, Some(&foreign), &[&a.addresses[0].to_string(), "another mesh", "litemesh token"]);
    // The name of a node that is there.
    let namesake = newcomer(&dir.path().join("elsewhere"), "a");
    up_refused(&namesake, Some(&token), &["is called a too", "--name"]);
    // A node of one mesh does not go over to another.
    x.stop();
    up_refused(&x, Some(&token), &["another mesh", "--join"]);
    // After all that, it can join: its file has the same rows.
    let mut b = b;
    b.start(Some(&token));
    assert_eq!(dump(&a.file("app.db")), dump(&b.file("app.db")));
}

fn faketime() -> Option<PathBuf> {
    let places = ["/usr/lib", "/usr/lib64", "/usr/local/lib"];
    let dirs = places.iter().filter_map(|p| std::fs::read_dir(p).ok()).flatten();
    let inner = dirs.filter_map(|e| Some(e.ok()?.path().join("faketime/libfaketime.so.1")));
    let direct = places.iter().map(|p| PathBuf::from(p).join("faketime/libfaketime.so.1"));
    direct.chain(inner).find(|p| p.exists())
}

#[test]
fn a_clock_that_is_far_off() {
    let Some(library) = faketime() else {
        eprintln!("skipped: the package faketime is not installed");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut a = newcomer(dir.path(), "a");
    a.start(None);
    for (offset, direction) in [("+1h", "ahead of"), ("-1h", "behind")] {
        let b = newcomer(dir.path(), &format!("b{}", direction.len()));
        let mut command = b.up_command(Some(&a.token()));
        command.env("LD_PRELOAD", &library).env("FAKETIME", offset).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        crate::refusal::up_refused_with(&b, command, 1, &["clock", direction, "set the clocks right"]);
    }
    a.exec("app.db", "INSERT INTO t VALUES('unharmed', 1)");
    a.sync();
}
