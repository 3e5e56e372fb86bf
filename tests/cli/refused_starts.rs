//! State directories, ports and configurations with which a node does not start.

use std::net::TcpListener;

use crate::refusal::{SCHEMA, refused, up_refused, up_refused_with};
use crate::support::Node;

fn node(dir: &std::path::Path) -> Node {
    let node = Node::new(dir, "a", &["app.db"]);
    node.exec("app.db", SCHEMA);
    node
}

#[test]
fn a_state_directory_of_another_version() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    std::fs::create_dir(node.state_dir()).unwrap();
    std::fs::write(node.state_dir().join("format"), "litemesh state 99\n").unwrap();
    up_refused(&node, None, &["state directory", "litemesh state 99", "use the litemesh that made it"]);
    let left = std::fs::read_to_string(node.state_dir().join("format")).unwrap();
    assert_eq!(left, "litemesh state 99\n");
}

#[test]
fn ports_that_are_taken_name_their_flag() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    for (flag, address) in ["--cluster", "--client", "--http"].iter().zip(&node.addresses) {
        let held = TcpListener::bind(address).unwrap();
        up_refused(&node, None, &[flag, &address.to_string(), "taken by another process"]);
        drop(held);
    }
    // Nothing of these attempts stands in the way.
    let mut node = node;
    node.start(None);
    node.stop();
}

#[test]
fn a_wrong_configuration_has_its_own_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = node(dir.path());
    let file = node.file("litemesh.toml");
    std::fs::write(&file, "name = \"a\"\nclinet = \"127.0.0.1:4222\"\n").unwrap();
    let with = |node: &mut Node, extra: &[&str]| {
        node.extra = extra.iter().map(|e| (*e).to_owned()).collect();
        node.up_command(None)
    };
    let command = with(&mut node, &["--config", "litemesh.toml"]);
    up_refused_with(&node, command, 78, &["clinet", "did you mean \"client\"?"]);
    let command = with(&mut node, &["--config", "absent.toml"]);
    up_refused_with(&node, command, 78, &["absent.toml"]);
    let command = with(&mut node, &["--http", "0.0.0.0:1"]);
    refused(command, 2, &[]);
    let command = with(&mut node, &["none-*.db"]);
    up_refused_with(&node, command, 78, &["none-*.db", "no SQLite file matches"]);
    let command = with(&mut node, &["--log", "verbos"]);
    up_refused_with(&node, command, 78, &["verbos", "--log"]);
    for token in ["nonsense", "lm1-AAAA@127.0.0.1:1", "lm1-AAAA"] {
        let command = with(&mut node, &["--join", token]);
        up_refused_with(&node, command, 78, &["--join", "token"]);
    }
    let command = with(&mut node, &["--join-file", "absent"]);
    up_refused_with(&node, command, 78, &["absent"]);
}
