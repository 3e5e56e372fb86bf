//! The applications: processes of their own that know SQLite and nothing of litemesh. Invariant: a line that
//! acknowledges is written after COMMIT has returned; nothing is remembered that is not in the file.

use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::{Connection, Result, Transaction, TransactionBehavior, params};

use crate::look::{GROUPS, LIST, SLOTS, TREES, look};

/// Says which part of this program a process is, and what it is to do.
pub const ROLE: &str = "LITEMESH_FAULTS_ROLE";

/// Runs an application if this process is one.
pub fn run_if_asked() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut words = role.splitn(4, ' ');
    let mut word = || words.next().expect("role, node, number, file").to_owned();
    let (role, node, number, file) = (word(), word(), word().parse().expect("a number"), word());
    match role.as_str() {
        "writer" => writer(&node, number, Path::new(&file)),
        "reader" => reader(Path::new(&file)),
        "ddl" => ddl(&node, number, Path::new(&file)),
        other => panic!("no such application: {other}"),
    }
    std::process::exit(0);
}

/// A connection as any program opens it.
fn open(file: &Path) -> Connection {
    loop {
        let opened =
            Connection::open_with_flags(file, rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE).and_then(|c| {
                c.busy_timeout(Duration::from_secs(40))?;
                c.execute_batch("PRAGMA foreign_keys = ON")?;
                Ok(c)
            });
        match opened {
            Ok(conn) => return conn,
            Err(e) => failed("open", &e),
        }
    }
}

fn tell(line: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody reads any more: the suite is gone.
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

fn failed(what: &str, error: &rusqlite::Error) {
    let code = error.sqlite_error_code().map(|c| format!("{c:?}")).unwrap_or_default();
    tell(&format!("E {code} {what}: {error}"));
    std::thread::sleep(Duration::from_millis(100));
}

/// The end of stdin asks for the end of this process.
fn end_with_stdin() -> std::sync::Arc<std::sync::atomic::AtomicBool> {
    let end = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let ended = end.clone();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    end
}

/// Writes until it is told to end: one connection for the node's own rows, one for those that all nodes write.
fn writer(node: &str, seed: u64, file: &Path) {
    let end = end_with_stdin();
    std::thread::scope(|scope| {
        for own in [true, false] {
            let end = end.clone();
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed ^ u64::from(own));
                let mut conn = open(file);
                while !end.load(std::sync::atomic::Ordering::Relaxed) {
                    let what = if own { rng.random_range(0..120) } else { 1_000 };
                    match transaction(&mut conn, node, what, &mut rng) {
                        Ok((what, value)) => tell(&format!("A {what}/{node} {value}")),
                        Err(e) => failed(&format!("transaction {what}"), &e),
                    }
                    std::thread::sleep(Duration::from_millis(rng.random_range(1..20)));
                }
            });
        }
    });
}

/// One transaction; returns what was reached when it is committed.
fn transaction(conn: &mut Connection, node: &str, what: u32, rng: &mut StdRng) -> Result<(String, i64)> {
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let reached = match what {
        0..40 => ("counter".to_owned(), count(&tx, node)?),
        40..60 => ("list".to_owned(), append(&tx, node)?),
        60..80 => ("tree".to_owned(), tree(&tx, node)?),
        80..100 => {
            let group = rng.random_range(0..GROUPS);
            (format!("account-{group}"), transfer(&tx, node, group, rng)?)
        }
        100..118 => ("batch".to_owned(), batch(&tx, node, rng)?),
        118..1_000 => ("bulk".to_owned(), bulk(&tx, node)?),
        _ => ("shared".to_owned(), shared(&tx, rng)?),
    };
    tx.commit()?;
    Ok(reached)
}

fn count(tx: &Transaction<'_>, node: &str) -> Result<i64> {
    let sql = "UPDATE counter SET n = n + 1, saw = (SELECT ifnull(group_concat(node || '=' || n, ' '), '') FROM counter
               WHERE node <> ?1) WHERE node = ?1 RETURNING n";
    let n = tx.query_row(sql, [node], |r| r.get(0))?;
    tx.execute("INSERT INTO inserts VALUES(?1, ?2, ?1 || '-' || ?2)", params![node, n])?;
    Ok(n)
}

fn append(tx: &Transaction<'_>, node: &str) -> Result<i64> {
    let sql = "SELECT ifnull(max(part), 0), (SELECT items FROM list WHERE node = ?1 ORDER BY part DESC LIMIT 1) FROM list
               WHERE node = ?1";
    let (part, items): (i64, Option<String>) = tx.query_row(sql, [node], |r| Ok((r.get(0)?, r.get(1)?)))?;
    let next = part * LIST + items.map_or(0, |i| i.split(',').count() as i64) + 1;
    let sql = "INSERT INTO list VALUES(?1, ?2, ?3) ON CONFLICT DO UPDATE SET items = items || ',' || excluded.items";
    tx.execute(sql, params![node, (next - 1) / LIST, next.to_string()])?;
    Ok(next)
}

fn tree(tx: &Transaction<'_>, node: &str) -> Result<i64> {
    let range = "SELECT ifnull(min(n), 1), ifnull(max(n), 0) FROM parent WHERE node = ?1";
    let (low, high): (i64, i64) = tx.query_row(range, [node], |r| Ok((r.get(0)?, r.get(1)?)))?;
    let (n, children) = (high + 1, 1 + high % 5);
    tx.execute("INSERT INTO parent VALUES(?1, ?2, ?3)", params![node, n, children])?;
    for i in 0..children {
        tx.execute("INSERT INTO child VALUES(?1, ?2, ?3, hex(randomblob(8)))", params![node, n, i])?;
    }
    if n - low >= TREES {
        tx.execute("DELETE FROM child WHERE node = ?1 AND n = ?2", params![node, low])?;
        tx.execute("DELETE FROM parent WHERE node = ?1 AND n = ?2", params![node, low])?;
    }
    Ok(n)
}

fn transfer(tx: &Transaction<'_>, node: &str, group: i64, rng: &mut StdRng) -> Result<i64> {
    let n: i64 = tx.query_row(
        "SELECT max(n) + 1 FROM account WHERE node = ?1 AND grp = ?2",
        params![node, group],
        |r| r.get(0),
    )?;
    let (from, amount) = (rng.random_range(0..SLOTS), rng.random_range(1..50));
    let to = (from + rng.random_range(1..SLOTS)) % SLOTS;
    let sql = "UPDATE account SET amount = amount + ?4, n = ?5 WHERE node = ?1 AND grp = ?2 AND slot = ?3";
    tx.execute(sql, params![node, group, from, -amount, n])?;
    tx.execute(sql, params![node, group, to, amount, n])?;
    Ok(n)
}

fn batch(tx: &Transaction<'_>, node: &str, rng: &mut StdRng) -> Result<i64> {
    // In place, or every row deleted and inserted again.
    if rng.random_ratio(1, 3) {
        let n: i64 = tx.query_row("SELECT max(n) + 1 FROM batch WHERE node = ?1", [node], |r| r.get(0))?;
        tx.execute("DELETE FROM batch WHERE node = ?1", [node])?;
        for slot in 0..crate::look::BATCH {
            tx.execute("INSERT INTO batch VALUES(?1, ?2, ?3)", params![node, slot, n])?;
        }
    } else {
        tx.execute("UPDATE batch SET n = n + 1 WHERE node = ?1", [node])?;
    }
    tx.execute("UPDATE extra SET n = n + 1 WHERE node = ?1", [node])?;
    tx.query_row("SELECT max(n) FROM batch WHERE node = ?1", [node], |r| r.get(0))
}

fn bulk(tx: &Transaction<'_>, node: &str) -> Result<i64> {
    tx.execute("UPDATE bulk SET n = n + 1, body = hex(randomblob(110)) WHERE node = ?1", [node])?;
    tx.query_row("SELECT max(n) FROM bulk WHERE node = ?1", [node], |r| r.get(0))
}

/// Rows that every node writes: all that is asked of them is that they end the same.
fn shared(tx: &Transaction<'_>, rng: &mut StdRng) -> Result<i64> {
    let (k, value) = (rng.random_range(0..60_i64), rng.random_range(0..1_000_000_i64));
    match rng.random_range(0..6) {
        0 => tx.execute("DELETE FROM shared WHERE k = ?1", [k])?,
        1 => tx.execute("INSERT OR REPLACE INTO shared VALUES(?1, ?2, ?2)", params![k, value])?,
        2 => tx.execute("UPDATE shared SET a = ?2 WHERE k BETWEEN ?1 AND ?1 + 5", params![k, value])?,
        3 => tx.execute("UPDATE shared SET b = ?2 WHERE k = ?1", params![k, value])?,
        4 => tx.execute("INSERT OR IGNORE INTO shared VALUES(?1, ?2, 'é' || ?2)", params![k, value])?,
        _ => tx.execute(
            "UPDATE OR REPLACE shared SET k = ?1 + 1, b = ?2 WHERE k = ?1",
            params![k, value as f64 / 7.0],
        )?,
    };
    Ok(0)
}

/// Looks at the file again and again, and tells what it saw.
fn reader(file: &Path) {
    let end = end_with_stdin();
    let conn = open(file);
    let mut all_at = Instant::now();
    while !end.load(std::sync::atomic::Ordering::Relaxed) {
        let started = Instant::now();
        let all = started >= all_at;
        if all {
            all_at = started + Duration::from_secs(3);
        }
        match look(&conn, all) {
            Ok(look) => {
                for wrong in look.wrong {
                    tell(&format!("V {wrong}"));
                }
                let reached: Vec<String> = look.reached.iter().map(|(k, v)| format!("{k}={v}")).collect();
                tell(&format!("R {}", reached.join(" ")));
            }
            Err(e) => failed("a look", &e),
        }
        // A third of the time at most: the machine has other things to do.
        std::thread::sleep(Duration::from_millis(5).max(started.elapsed() * 2));
    }
}

/// One change of the schema, by its number.
fn ddl(node: &str, number: u64, file: &Path) {
    let conn = open(file);
    let sql = match number % 3 {
        0 => format!(
            "BEGIN IMMEDIATE; CREATE TABLE made_{number}(id INTEGER PRIMARY KEY, v TEXT);
             INSERT INTO made_{number} VALUES(1, 'one'), (2, 'two'), (3, 'three'); COMMIT"
        ),
        1 => format!("ALTER TABLE extra ADD COLUMN made_{number} TEXT DEFAULT 'of {number}'"),
        _ => format!("CREATE INDEX made_{number} ON extra(n, node)"),
    };
    match conn.execute_batch(&sql) {
        Ok(()) => tell(&format!("A ddl-{number}/{node} 1")),
        Err(e) => failed("ddl", &e),
    }
}

/// Which of the changes of the schema a file has, as `ddl-7`.
pub fn made(conn: &Connection) -> Result<Vec<String>> {
    let sql = "SELECT name FROM sqlite_schema WHERE name LIKE 'made\\_%' ESCAPE '\\'
               UNION SELECT name FROM pragma_table_info('extra') WHERE name LIKE 'made\\_%' ESCAPE '\\'";
    let mut statement = conn.prepare(sql)?;
    let names = statement.query_map([], |r| r.get::<_, String>(0))?.collect::<Result<Vec<_>>>()?;
    Ok(names.into_iter().map(|n| n.replacen("made_", "ddl-", 1)).collect())
}
