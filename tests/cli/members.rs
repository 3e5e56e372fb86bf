//! Nodes that are gone for ever: taken out by those that are left, after a word of their operator.

use std::process::Output;

use crate::support::{Node, pair, wait_equal, wait_for};

fn text(output: &Output) -> String {
    let all = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8(all).unwrap()
}

fn peers(node: &Node) -> Vec<String> {
    let status = node.status();
    status["peers"].as_array().unwrap().iter().map(|p| p["node"].as_str().unwrap().to_owned()).collect()
}

fn decides(node: &Node) -> bool {
    node.status()["fabric"]["leader"].is_string()
}

#[test]
fn a_dead_node_is_removed_by_a_survivor() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = ["a", "b", "c"].map(|name| Node::new(dir.path(), name, &["app.db"]));
    nodes[0].exec("app.db", "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    // Members are written down at that pace.
    nodes.iter_mut().for_each(|n| n.extra = vec!["--tombstones-age".into(), "4s".into()]);
    nodes[0].start(None);
    let token = nodes[0].token();
    nodes[1].start(Some(&token));
    nodes[2].start(Some(&token));
    nodes[2].exec("app.db", "INSERT INTO t VALUES('c', 1)");
    nodes[2].sync();
    let [a, b, mut c] = nodes;
    let member = "SELECT CAST(count(*) AS TEXT) FROM __litemesh_member WHERE node = 'c'";
    wait_for("c is a member", || [&a, &b].iter().all(|n| n.text("app.db", member) == "1"));
    wait_for("all are in the cluster", || a.status()["fabric"]["servers"] == 3);

    let running = a.run(&["remove", "c", "--yes"]);
    assert!(!running.status.success() && text(&running).contains("c is running"), "{}", text(&running));
    c.kill();
    wait_for("c is missed", || !a.status()["fabric"]["routes"].to_string().contains("\"c\""));
    let unasked = a.run(&["remove", "c"]);
    assert!(!unasked.status.success(), "{}", text(&unasked));
    for word in ["is taken out of the mesh", "its log goes", "--yes", "nothing was changed"] {
        assert!(text(&unasked).contains(word), "{word}: {}", text(&unasked));
    }
    assert_eq!(peers(&b), ["a", "c"]);
    let unknown = a.run(&["remove", "x", "--yes"]);
    assert!(!unknown.status.success() && text(&unknown).contains("no member"), "{}", text(&unknown));

    let removed = a.run(&["remove", "c", "--yes"]);
    assert!(removed.status.success(), "{}", text(&removed));
    wait_for("nobody shows it", || peers(&a) == ["b"] && peers(&b) == ["a"]);
    wait_for("no database waits for it", || [&a, &b].iter().all(|n| n.text("app.db", member) == "0"));
    wait_for("the cluster does not count it", || a.status()["fabric"]["servers"] == 2);
    // Its rows stay, and it may come again.
    assert_eq!(a.text("app.db", "SELECT id FROM t"), "c");
    std::fs::remove_dir_all(&c.home).unwrap();
    std::fs::create_dir(&c.home).unwrap();
    c.start(Some(&token));
    wait_equal(&[&a, &b, &c], "app.db");
    wait_for("it is a member again", || peers(&b) == ["a", "c"]);
}

#[test]
fn a_survivor_of_two_goes_on_with_another_node() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v)");
    let token = a.token();
    wait_for("both are in the cluster", || a.status()["fabric"]["servers"] == 2);
    let early = a.run(&["rescue", "--confirm", "a"]);
    assert!(!early.status.success() && text(&early).contains("nothing to rescue"), "{}", text(&early));
    b.kill();
    wait_for("nobody leads", || !decides(&a));
    let stuck = a.run(&["remove", "b", "--yes"]);
    assert!(!stuck.status.success() && text(&stuck).contains("litemesh rescue"), "{}", text(&stuck));

    let mut c = Node::new(dir.path(), "c", &["app.db"]);
    c.start(Some(&token));
    c.exec("app.db", "INSERT INTO t VALUES('c', 1)");
    c.sync();
    let unasked = a.run(&["rescue"]);
    assert!(!unasked.status.success(), "{}", text(&unasked));
    for word in ["are away: b;", "NEVER do that on both sides", "--confirm a", "nothing was changed"] {
        assert!(text(&unasked).contains(word), "{word}: {}", text(&unasked));
    }
    let wrong = a.run(&["rescue", "--confirm", "b"]);
    assert!(!wrong.status.success() && text(&wrong).contains("is called a"), "{}", text(&wrong));
    assert!(!decides(&a), "nothing was changed");
    // One that runs meanwhile would not get its streams for certain.
    let early = a.run(&["rescue", "--confirm", "a"]);
    assert!(!early.status.success(), "{}", text(&early));
    assert!(text(&early).contains("stop c, run this again, then start c"), "{}", text(&early));
    c.stop();
    wait_for("the survivor is rescued", || a.run(&["rescue", "--confirm", "a"]).status.success());
    c.start(None);
    wait_for("the new pair decides", || decides(&a) && decides(&c) && a.status()["fabric"]["servers"] == 2);
    wait_for("b is forgotten", || peers(&a) == ["c"] && peers(&c) == ["a"]);
    wait_equal(&[&a, &c], "app.db");
}
