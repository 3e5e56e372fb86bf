//! `--merge`: a file with rows of its own becomes a part of the mesh.

use crate::support::{Node, litemesh, wait_equal, wait_for};

const SCHEMA: &str = "CREATE TABLE log(line TEXT);
    CREATE TABLE u(id TEXT PRIMARY KEY NOT NULL, mail TEXT NOT NULL UNIQUE);
    CREATE TABLE maybe(id TEXT PRIMARY KEY NOT NULL, mail TEXT UNIQUE)";

fn conflicts(node: &Node, args: &[&str]) -> std::process::Output {
    litemesh().current_dir(&node.home).arg("conflicts").args(args).output().unwrap()
}

fn listed(node: &Node, with: &[&str]) -> String {
    let output = conflicts(node, &["list", "app.db", "--json"]);
    let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let found: Vec<String> = (all.as_array().unwrap().iter())
        .filter(|c| with.iter().all(|w| c.to_string().contains(w)))
        .map(|c| c["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(found.len(), 1, "{with:?} in {all}");
    found[0].clone()
}

fn lines(node: &Node) -> String {
    node.text(
        "app.db",
        "SELECT group_concat(rowid || '=' || line, ' ') FROM (SELECT rowid, * FROM log ORDER BY 1)",
    )
}

fn users(node: &Node, table: &str) -> String {
    let all = format!(
        "SELECT group_concat(id || '=' || coalesce(mail, '-'), ' ') FROM (SELECT * FROM {table} ORDER BY 1)"
    );
    node.text("app.db", &all)
}

#[test]
fn tables_without_a_key_and_rows_that_lose_in_unique_columns() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (Node::new(dir.path(), "a", &["app.db"]), Node::new(dir.path(), "b", &["app.db"]));
    [&a, &b].iter().for_each(|n| n.exec("app.db", SCHEMA));
    a.exec("app.db", "INSERT INTO log VALUES('a1'), ('same'); INSERT INTO u VALUES('x', 'm1')");
    a.exec("app.db", "INSERT INTO maybe VALUES('x', 'm1')");
    b.exec(
        "app.db",
        "INSERT INTO log VALUES('b1'), ('same'), ('b3'); INSERT INTO u VALUES('y', 'm1'), ('z', 'm2')",
    );
    b.exec("app.db", "INSERT INTO maybe VALUES('y', 'm1'), ('z', 'm2')");
    a.start(None);
    b.extra = vec!["--merge".into()];
    b.start(Some(&a.token()));
    wait_equal(&[&a, &b], "app.db");
    wait_for("the rows of b are there", || lines(&a) == "1=a1 2=same 3=b3");
    for node in [&a, &b] {
        assert_eq!(lines(node), "1=a1 2=same 3=b3");
        assert_eq!(users(node, "u"), "x=m1 z=m2");
        assert!(users(node, "maybe").starts_with("x=m1"), "{}", users(node, "maybe"));
        assert_eq!(node.text("app.db", "PRAGMA integrity_check"), "ok");
    }
    // Each row that is not there is kept, on both.
    wait_for("kept on both", || {
        let known = |n: &Node| String::from_utf8(conflicts(n, &["list", "app.db"]).stdout).unwrap();
        [&a, &b].iter().all(|n| known(n).contains("b1") && known(n).contains(" u key"))
    });
    let (line, user) = (listed(&a, &["\"line\":\"b1\""]), listed(&a, &["\"table\":\"u\""]));
    // The row without a key comes back under another rowid; the other when nothing stands in its way.
    let restored = conflicts(&a, &["restore", "app.db", &line, "--new-id"]);
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    let refused = conflicts(&a, &["restore", "app.db", &user]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("another row stands in the way"));
    a.exec("app.db", "UPDATE u SET mail = 'm3' WHERE id = 'x'");
    let restored = conflicts(&a, &["restore", "app.db", &user]);
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    a.sync();
    wait_equal(&[&a, &b], "app.db");
    assert_eq!(lines(&b), "1=a1 2=same 3=b3 4=b1");
    assert_eq!(users(&b, "u"), "x=m3 y=m1 z=m2");
}
