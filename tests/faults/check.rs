//! What has to be so when all is healed. Invariant: files are compared by what SQLite itself says they hold, with
//! nothing of litemesh's own.

use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::{Connection, Result};

use crate::look::look;
use crate::world::{PATIENCE, World};

/// Every row of every table of the application, and every definition, in SQLite's own quoting.
pub fn dump(file: &Path) -> Result<Vec<String>> {
    let conn = Connection::open_with_flags(file, rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    conn.busy_timeout(Duration::from_secs(20))?;
    conn.execute_batch("BEGIN")?;
    let ours = "name NOT LIKE '\\_\\_litemesh\\_%' ESCAPE '\\' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'";
    let mut out =
        texts(&conn, &format!("SELECT type || ' ' || name FROM sqlite_schema WHERE {ours} ORDER BY 1"))?;
    for table in
        texts(&conn, &format!("SELECT name FROM sqlite_schema WHERE type = 'table' AND {ours} ORDER BY 1"))?
    {
        let columns = format!("SELECT name FROM pragma_table_info('{table}') ORDER BY name");
        let quoted: Vec<String> =
            texts(&conn, &columns)?.iter().map(|c| format!("'{c}=' || quote(\"{c}\")")).collect();
        let rows =
            format!("SELECT '{table}: ' || {} FROM \"{table}\" ORDER BY 1", quoted.join(" || ' ' || "));
        out.extend(texts(&conn, &rows)?);
    }
    Ok(out)
}

fn texts(conn: &Connection, sql: &str) -> Result<Vec<String>> {
    conn.prepare(sql)?.query_map([], |r| r.get(0))?.collect()
}

/// Waits until all nodes run, have all that was acknowledged, and hold the same; returns how long it took.
pub fn converge(world: &mut World) -> std::result::Result<Duration, String> {
    let healed = Instant::now();
    let mut pause = Duration::from_millis(50);
    loop {
        world.tick();
        let why = match not_yet(world) {
            None => return Ok(healed.elapsed()),
            Some(why) => why,
        };
        if world.failed() {
            return Ok(healed.elapsed());
        }
        if healed.elapsed() > PATIENCE {
            return Err(format!(
                "not all is well {} s after everything was healed: {why}",
                PATIENCE.as_secs()
            ));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

/// What is not so yet.
fn not_yet(world: &World) -> Option<String> {
    if world.changing.is_some() {
        return Some("a change of the schema waits".to_owned());
    }
    if let Some(node) = world.nodes.iter().find(|n| !n.is_ready()) {
        return Some(format!("{} is not ready", node.name));
    }
    for (i, node) in world.nodes.iter().enumerate() {
        match world.missing(i, |_| true) {
            Ok(missing) if missing.is_empty() => {}
            Ok(missing) => return Some(format!("{} lacks: {}", node.name, missing.join("; "))),
            Err(e) => return Some(format!("{} cannot be read: {e}", node.name)),
        }
    }
    let dumps: Vec<_> = world.nodes.iter().map(|n| dump(&n.file())).collect();
    let first = match &dumps[0] {
        Ok(first) => first,
        Err(e) => return Some(format!("the first file cannot be read: {e}")),
    };
    for (node, other) in world.nodes.iter().zip(&dumps).skip(1) {
        match other {
            Ok(other) if other == first => {}
            Ok(other) => {
                return Some(format!(
                    "{} and {} differ: {}",
                    world.nodes[0].name,
                    node.name,
                    differ(first, other)
                ));
            }
            Err(e) => return Some(format!("{} cannot be read: {e}", node.name)),
        }
    }
    None
}

/// Some of what only one of two dumps has.
fn differ(one: &[String], other: &[String]) -> String {
    let only = |here: &[String], there: &[String]| {
        let there: std::collections::BTreeSet<&String> = there.iter().collect();
        let found =
            here.iter().filter(|l| !there.contains(l)).map(|l| l.chars().take(160).collect::<String>());
        found.take(4).collect::<Vec<_>>()
    };
    format!("{:?} against {:?}", only(one, other), only(other, one))
}

/// Looks at everything that does not need time.
pub fn files(world: &World) -> Vec<String> {
    let mut wrong = Vec::new();
    for node in &world.nodes {
        match one_file(&node.file()) {
            Ok(found) => {
                wrong.extend(found.into_iter().map(|w| format!("in the file of {}: {w}", node.name)))
            }
            Err(e) => wrong.push(format!("the file of {} cannot be read: {e}", node.name)),
        }
        let log = std::fs::read_to_string(node.log()).unwrap_or_default();
        let panics = log.lines().filter(|l| l.contains("panicked at"));
        wrong.extend(panics.map(|l| format!("litemesh of {} panicked: {l}", node.name)));
    }
    wrong
}

fn one_file(file: &Path) -> Result<Vec<String>> {
    let conn = Connection::open_with_flags(file, rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    conn.busy_timeout(Duration::from_secs(20))?;
    let mut wrong = look(&conn, true)?.wrong;
    let integrity = texts(&conn, "PRAGMA integrity_check")?;
    if integrity != ["ok"] {
        wrong.push(format!("integrity_check: {integrity:?}"));
    }
    let broken: i64 = conn.query_row("SELECT count(*) FROM pragma_foreign_key_check", [], |r| r.get(0))?;
    if broken > 0 {
        wrong.push(format!("foreign_key_check: {broken} rows"));
    }
    let sql = "SELECT tbl || ' ' || key || ' ' || kind || ', lost: ' || loser || ', won: ' || winner
               FROM __litemesh_conflicts WHERE tbl <> 'shared' LIMIT 5";
    wrong.extend(
        texts(&conn, sql)?
            .into_iter()
            .map(|c| format!("a conflict though one node alone writes the row: {c}")),
    );
    for table in texts(
        &conn,
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE 'made\\_%' ESCAPE '\\'",
    )? {
        let rows: i64 = conn.query_row(&format!("SELECT count(*) FROM {table}"), [], |r| r.get(0))?;
        if rows != 3 {
            wrong.push(format!("{table} has {rows} of the 3 rows that came with it"));
        }
    }
    Ok(wrong)
}

/// litemesh's own comparison has to find nothing, either.
pub fn verify(world: &World) -> Option<String> {
    let said = world.nodes[0].ask(&["verify", "app"], 120);
    said.err().map(|why| format!("litemesh verify on {}: {why}", world.nodes[0].name))
}

/// That the comparison sees what differs.
pub fn self_check(temp: &Path) {
    let file = temp.join(format!("litemesh-faults-self-check-{}", std::process::id()));
    for sql in [
        "UPDATE t SET b = '0.5' WHERE a = 1",
        "UPDATE t SET b = x'302e35' WHERE a = 1",
        "DELETE FROM t WHERE a = 2",
        "INSERT INTO t VALUES(2, NULL)",
        "CREATE INDEX i ON t(a)",
        "ALTER TABLE t ADD COLUMN c",
    ] {
        let made = Connection::open(&file).expect("a file");
        made.execute_batch("CREATE TABLE t(a, b); INSERT INTO t VALUES(1, 0.5), (2, NULL)").expect("rows");
        let before = dump(&file).expect("a dump");
        assert_eq!(before, dump(&file).expect("a dump"));
        made.execute_batch(sql).expect(sql);
        assert_ne!(before, dump(&file).expect("a dump"), "not seen: {sql}");
        drop(made);
        std::fs::remove_file(&file).expect("the file goes");
    }
}
