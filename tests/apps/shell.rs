//! Two terminals with the `sqlite3` shell.

use std::process::Command;

use crate::support::{Node, wait_for};

/// What `sqlite3 books.db SQL` prints; `None` where there is no such program.
fn sqlite3(node: &Node, sql: &str) -> Option<String> {
    let output = Command::new("sqlite3").current_dir(&node.home).args(["books.db", sql]).output().ok()?;
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn books_in_two_terminals() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) =
        (Node::new(dir.path(), "a", &["books.db"]), Node::new(dir.path(), "b", &["books.db"]));
    let create = "CREATE TABLE Books(id INTEGER PRIMARY KEY, title TEXT NOT NULL, author TEXT NOT NULL, \
                  publication_year INTEGER); \
                  INSERT INTO Books VALUES(1, 'The Hitchhiker''s Guide to the Galaxy', 'Douglas Adams', 1979)";
    if sqlite3(&a, create).is_none() {
        eprintln!("skipped: the program sqlite3 is not installed");
        return;
    }
    a.start(None);
    b.start(Some(&a.token()));
    let insert = |node: &Node, title: &str, author: &str, year: i64| {
        let columns = "Books(title, author, publication_year)";
        sqlite3(node, &format!("INSERT INTO {columns} VALUES('{title}', '{author}', {year})")).unwrap();
    };
    let titles = |node: &Node| sqlite3(node, "SELECT title FROM Books ORDER BY id").unwrap();
    insert(&a, "Nineteen Eighty-Four", "George Orwell", 1949);
    wait_for("a's book is on b", || titles(&b).contains("Nineteen"));
    insert(&b, "Neuromancer", "William Gibson", 1984);
    wait_for("b's book is on a", || titles(&a).contains("Neuromancer"));
    assert_eq!(titles(&a), "The Hitchhiker's Guide to the Galaxy\nNineteen Eighty-Four\nNeuromancer\n");
    sqlite3(&b, "UPDATE Books SET publication_year = 1948 WHERE id = 2; DELETE FROM Books WHERE id = 1")
        .unwrap();
    wait_for("b's changes are on a", || {
        sqlite3(&a, "SELECT id, publication_year FROM Books").unwrap() == "2|1948\n3|1984\n"
    });
    // The shell finds nothing wrong with the file.
    assert_eq!(sqlite3(&a, "PRAGMA integrity_check").unwrap(), "ok\n");
}
