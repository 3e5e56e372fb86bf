//! A Django project's whole history of migrations (auth, admin, sessions and an app of five) run on one node while the
//! other one writes; and what other tools do to change a table.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::Connection;

use crate::support::{Node, dump, wait_equal, wait_for};

const PACKAGES: [&str; 3] = ["django==5.2.8", "sqlite-utils==3.38", "alembic==1.13.3"];

/// The Python interpreter that has the packages, installed once under the build's directory.
fn python() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("migrations");
    let (python, done) = (dir.join("bin/python"), dir.join("installed"));
    if !done.exists() {
        let run = |command: &mut Command| command.output().is_ok_and(|o| o.status.success());
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        let ok = run(Command::new("python3").args(["-m", "venv"]).arg(&dir))
            && run(Command::new(&python).args(pip).args(PACKAGES));
        if !ok {
            eprintln!("skipped, Django cannot be installed");
            return None;
        }
        std::fs::write(done, PACKAGES.join(" ")).unwrap();
    }
    Some(python)
}

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps/django")
}

/// Runs Python on a node's file and returns what it printed.
fn run(python: &Path, node: &Node, arguments: &[&str]) -> String {
    let output = Command::new(python)
        .args(arguments)
        .current_dir(project())
        .env("DB", node.file("app.db"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn two_nodes(dir: &Path) -> (Node, Node) {
    let (mut a, mut b) = (Node::new(dir, "a", &["app.db"]), Node::new(dir, "b", &["app.db"]));
    a.start(None);
    let token = a.token();
    b.start(Some(&token));
    (a, b)
}

/// Lets the writer end, also when the test fails.
struct Finished<'a>(&'a AtomicBool);

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn write_meanwhile(writer: &Connection, migrated: &AtomicBool) -> i64 {
    let mut count = 0;
    while !migrated.load(Ordering::Relaxed) {
        count += 1;
        writer.execute("INSERT INTO side(n) VALUES(?1)", [count]).unwrap();
        // Fails until the table is there; the name of the table changes meanwhile.
        for table in ["shop_writer", "shop_author"] {
            let sql = format!("INSERT INTO {table}(id, name) VALUES(?1, 'of b')");
            drop(writer.execute(&sql, [1_000_000 + count]));
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    count
}

#[test]
fn djangos_migrations_run_on_one_node_while_the_other_writes() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = two_nodes(dir.path());
    let writer = Connection::open(b.file("app.db")).unwrap();
    writer.busy_timeout(crate::support::PATIENCE).unwrap();
    writer.execute_batch("CREATE TABLE side(id INTEGER PRIMARY KEY, n)").unwrap();
    let migrated = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let migrated = &migrated;
        let writing = scope.spawn(move || write_meanwhile(&writer, migrated));
        let end = Finished(migrated);
        for migration in ["0001", "0002", "0003", "0004", "0005"] {
            run(&python, &a, &["manage.py", "migrate", "shop", migration]);
        }
        run(&python, &a, &["manage.py", "migrate"]);
        drop(end);
        writing.join().unwrap()
    });
    wait_for("the migrations at b", || {
        run(&python, &b, &["manage.py", "migrate", "--plan"]).contains("No planned")
    });
    let add = "from django.contrib.auth.models import User; User.objects.create_user('x', password='y')";
    run(&python, &b, &["manage.py", "shell", "-c", add]);
    wait_equal(&[&a, &b], "app.db");
    let count = |node: &Node, sql: &str| {
        let conn = Connection::open(node.file("app.db")).unwrap();
        conn.query_row(sql, [], |r| r.get::<_, i64>(0)).unwrap()
    };
    for node in [&a, &b] {
        assert_eq!(count(node, "SELECT count(*) FROM side"), written);
        assert_eq!(count(node, "SELECT count(*) FROM shop_book WHERE slug = 'book-' || id"), 15);
        assert!(count(node, "SELECT count(*) FROM shop_author WHERE name = 'of b'") > 0);
        assert_eq!(count(node, "SELECT count(*) FROM auth_user"), 1);
        let columns =
            "SELECT count(*) FROM pragma_table_info('shop_book') WHERE name IN ('slug', 'name', 'price')";
        assert_eq!(count(node, columns), 3);
    }
    assert_eq!(dump(&a.file("app.db")), dump(&b.file("app.db")));
    assert_eq!(run(&python, &b, &["manage.py", "migrate"]).matches("Applying").count(), 0);
}

#[test]
fn each_node_may_run_the_migrations_itself() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = two_nodes(dir.path());
    run(&python, &a, &["manage.py", "migrate", "shop", "0002"]);
    wait_for("the first migrations at b", || {
        run(&python, &b, &["manage.py", "showmigrations", "shop"]).matches("[X]").count() == 2
    });
    // Apart, each with its own application, in another order.
    b.stop();
    run(&python, &a, &["manage.py", "migrate"]);
    run(&python, &b, &["manage.py", "migrate", "sessions"]);
    run(&python, &b, &["manage.py", "migrate"]);
    let add = "from django.contrib.auth.models import User; User.objects.create_user('of b', password='y')";
    run(&python, &b, &["manage.py", "shell", "-c", add]);
    b.start(None);
    wait_equal(&[&a, &b], "app.db");
    for node in [&a, &b] {
        let conn = Connection::open(node.file("app.db")).unwrap();
        let count = |sql: &str| conn.query_row(sql, [], |r| r.get::<_, i64>(0)).unwrap();
        assert_eq!(count("SELECT count(*) FROM shop_book"), 15);
        assert_eq!(count("SELECT count(*) FROM auth_user WHERE username = 'of b'"), 1);
        assert_eq!(run(&python, node, &["manage.py", "migrate"]).matches("Applying").count(), 0);
        assert_eq!(
            run(&python, node, &["manage.py", "check", "--database", "default"]).matches("no issues").count(),
            1
        );
    }
}
