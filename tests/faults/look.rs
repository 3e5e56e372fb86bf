//! What must be so in every snapshot of a file, whatever is broken around it. Invariant: a look is one read
//! transaction; what it finds wrong was visible to an application at that moment.

use std::collections::BTreeMap;

use rusqlite::{Connection, Result, Row};

/// Rows of each node's batch, which one transaction changes together.
pub const BATCH: i64 = 20;
/// The same of rows that make a commit of several pieces.
pub const BULK: i64 = 2_600;
/// Accounts of a group, groups of a node, and what the accounts of a group sum up to.
pub const SLOTS: i64 = 5;
pub const GROUPS: i64 = 3;
pub const SUM: i64 = 1_000;
/// Items of a list before the next one begins.
pub const LIST: i64 = 100;
/// Trees that are kept; older ones are deleted.
pub const TREES: i64 = 40;

/// The tables that the applications write. Rows are of one node each, but for those of `shared`.
pub fn schema(nodes: &[String]) -> String {
    let mut sql = "
CREATE TABLE counter(node TEXT PRIMARY KEY NOT NULL, n INTEGER NOT NULL, saw TEXT NOT NULL DEFAULT '');
CREATE TABLE inserts(node TEXT NOT NULL, n INTEGER NOT NULL, body TEXT NOT NULL, PRIMARY KEY(node, n));
CREATE TABLE list(node TEXT NOT NULL, part INTEGER NOT NULL, items TEXT NOT NULL, PRIMARY KEY(node, part));
CREATE TABLE parent(node TEXT NOT NULL, n INTEGER NOT NULL, children INTEGER NOT NULL, PRIMARY KEY(node, n));
CREATE TABLE child(node TEXT NOT NULL, n INTEGER NOT NULL, i INTEGER NOT NULL, body TEXT,
  PRIMARY KEY(node, n, i), FOREIGN KEY(node, n) REFERENCES parent(node, n)) WITHOUT ROWID;
CREATE TABLE account(node TEXT NOT NULL, grp INTEGER NOT NULL, slot INTEGER NOT NULL, amount INTEGER NOT NULL,
  n INTEGER NOT NULL DEFAULT 0, PRIMARY KEY(node, grp, slot));
CREATE TABLE batch(node TEXT NOT NULL, slot INTEGER NOT NULL, n INTEGER NOT NULL, PRIMARY KEY(node, slot));
CREATE TABLE bulk(node TEXT NOT NULL, slot INTEGER NOT NULL, n INTEGER NOT NULL, body TEXT, PRIMARY KEY(node, slot));
CREATE TABLE shared(k INTEGER PRIMARY KEY, a, b);
CREATE TABLE extra(node TEXT PRIMARY KEY NOT NULL, n INTEGER NOT NULL);
"
    .to_owned();
    let numbers = "WITH RECURSIVE i(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM i WHERE i < 2999)";
    for node in nodes {
        sql += &format!(
            "INSERT INTO counter(node, n) VALUES('{node}', 0); INSERT INTO extra VALUES('{node}', 0);
             {numbers} INSERT INTO account(node, grp, slot, amount)
               SELECT '{node}', i / {SLOTS}, i % {SLOTS}, {SUM} / {SLOTS} FROM i WHERE i < {SLOTS} * {GROUPS};
             {numbers} INSERT INTO batch SELECT '{node}', i, 0 FROM i WHERE i < {BATCH};
             {numbers} INSERT INTO bulk SELECT '{node}', i, 0, '' FROM i WHERE i < {BULK};\n"
        );
    }
    sql
}

/// What one snapshot shows.
#[derive(Debug, Default)]
pub struct Look {
    /// How far each node's own rows are, such as `batch/b`: none ever goes back.
    pub reached: BTreeMap<String, i64>,
    pub wrong: Vec<String>,
}

impl Look {
    fn reach(&mut self, what: &str, node: &str, value: i64) {
        let reached = self.reached.entry(format!("{what}/{node}")).or_insert(value);
        *reached = value.max(*reached);
    }

    fn expect(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds && self.wrong.len() < 20 {
            self.wrong.push(what());
        }
    }

    /// The parts of `acknowledged` that this file does not have, for the nodes that `of` admits.
    pub fn missing(&self, acknowledged: &BTreeMap<String, i64>, of: impl Fn(&str) -> bool) -> Vec<String> {
        let lacks = |(what, value): (&String, &i64)| {
            let here = self.reached.get(what).copied().unwrap_or_default();
            let counts = of(what.rsplit('/').next().unwrap_or_default());
            (counts && here < *value).then(|| format!("{what}: {value} was acknowledged, {here} is here"))
        };
        acknowledged.iter().filter_map(lacks).collect()
    }
}

/// Looks at a file in one read transaction; `all` looks at every row, else at what is new.
pub fn look(conn: &Connection, all: bool) -> Result<Look> {
    conn.execute_batch("BEGIN")?;
    let mut look = Look::default();
    let result = checks(conn, all, &mut look);
    conn.execute_batch("COMMIT")?;
    result.map(|()| look)
}

fn checks(conn: &Connection, all: bool, look: &mut Look) -> Result<()> {
    counters(conn, all, look)?;
    lists(conn, all, look)?;
    trees(conn, look)?;
    for (table, rows) in [("batch", BATCH), ("bulk", BULK)] {
        let sql = format!("SELECT node, min(n), max(n), count(*) FROM {table} GROUP BY node");
        each(conn, &sql, |r| {
            let (node, least, most, count): (String, i64, i64, i64) = row4(r)?;
            look.expect(least == most && count == rows, || {
                format!(
                    "{table} of {node}: half a transaction is visible: n from {least} to {most}, {count} rows"
                )
            });
            look.reach(table, &node, most);
            Ok(())
        })?;
    }
    each(conn, "SELECT node, grp, sum(amount), max(n) FROM account GROUP BY node, grp", |r| {
        let (node, group, sum, n): (String, i64, i64, i64) = row4(r)?;
        look.expect(sum == SUM, || format!("account: group {group} of {node} sums up to {sum}, not {SUM}"));
        look.reach(&format!("account-{group}"), &node, n);
        Ok(())
    })?;
    each(conn, "SELECT node, n FROM extra", |r| {
        look.reach("extra", &r.get::<_, String>(0)?, r.get(1)?);
        Ok(())
    })
}

/// One transaction counts and inserts; it notes how far it saw the others.
fn counters(conn: &Connection, all: bool, look: &mut Look) -> Result<()> {
    let mut saw = Vec::new();
    let sql = "SELECT node, n, (SELECT count(*) FROM inserts i WHERE i.node = c.node),
               (SELECT ifnull(max(n), 0) FROM inserts i WHERE i.node = c.node), saw FROM counter c";
    each(conn, sql, |r| {
        let (node, n, count, most): (String, i64, i64, i64) = row4(r)?;
        look.expect(n == count && n == most, || {
            format!(
                "counter of {node} is {n}, its inserts are {count} up to {most}: one transaction wrote both"
            )
        });
        look.reach("counter", &node, n);
        saw.push((node, r.get::<_, String>(4)?));
        Ok(())
    })?;
    for (node, saw) in saw {
        for (other, n) in saw.split(' ').filter_map(|s| s.split_once('=')) {
            let here = look.reached.get(&format!("counter/{other}")).copied().unwrap_or_default();
            look.expect(n.parse().is_ok_and(|n: i64| n <= here), || {
                format!("an effect before its cause: {node} had seen {other} at {n}, here it is at {here}")
            });
        }
    }
    if all {
        let bad = "SELECT count(*) FROM inserts WHERE body <> node || '-' || n";
        let bad: i64 = conn.query_row(bad, [], |r| r.get(0))?;
        look.expect(bad == 0, || format!("inserts: {bad} rows have not the content that was written"));
    }
    Ok(())
}

fn lists(conn: &Connection, all: bool, look: &mut Look) -> Result<()> {
    let newest =
        if all { "" } else { "WHERE part >= (SELECT max(part) FROM list m WHERE m.node = l.node) - 1" };
    each(conn, &format!("SELECT node, part, items FROM list l {newest} ORDER BY node, part"), |r| {
        let (node, part, items): (String, i64, String) = (r.get(0)?, r.get(1)?, r.get(2)?);
        let items: Vec<i64> = items.split(',').filter_map(|i| i.parse().ok()).collect();
        let expected: Vec<i64> = (1..=items.len() as i64).map(|i| part * LIST + i).collect();
        look.expect(items == expected, || format!("list {part} of {node} is not in its order: {items:?}"));
        look.reach("list", &node, part * LIST + items.len() as i64);
        Ok(())
    })?;
    let sql = "SELECT node, count(*), max(part) + 1 FROM list GROUP BY node HAVING count(*) <> max(part) + 1";
    each(conn, sql, |r| {
        look.wrong.push(format!(
            "lists of {}: {} of {}",
            r.get::<_, String>(0)?,
            r.get::<_, i64>(1)?,
            r.get::<_, i64>(2)?
        ));
        Ok(())
    })
}

fn trees(conn: &Connection, look: &mut Look) -> Result<()> {
    let sql = "SELECT node, n, children, (SELECT count(*) FROM child c WHERE c.node = p.node AND c.n = p.n) FROM parent p";
    each(conn, sql, |r| {
        let (node, n, children, found): (String, i64, i64, i64) = row4(r)?;
        look.expect(children == found, || format!("tree {n} of {node} has {found} children, not {children}"));
        Ok(())
    })?;
    let orphans =
        "SELECT c.node, c.n, c.i, 0 FROM child c LEFT JOIN parent p ON p.node = c.node AND p.n = c.n
                   WHERE p.node IS NULL";
    each(conn, orphans, |r| {
        let (node, n, i, _): (String, i64, i64, i64) = row4(r)?;
        look.expect(false, || format!("child {i} of tree {n} of {node} has no parent"));
        Ok(())
    })?;
    each(conn, "SELECT node, min(n), max(n), count(*) FROM parent GROUP BY node", |r| {
        let (node, low, high, count): (String, i64, i64, i64) = row4(r)?;
        look.expect(high - low + 1 == count, || format!("trees of {node} from {low} to {high} are {count}"));
        look.reach("tree", &node, high);
        look.reach("pruned", &node, low - 1);
        Ok(())
    })
}

fn each(conn: &Connection, sql: &str, mut row: impl FnMut(&Row<'_>) -> Result<()>) -> Result<()> {
    let mut statement = conn.prepare_cached(sql)?;
    let mut rows = statement.query([])?;
    while let Some(found) = rows.next()? {
        row(found)?;
    }
    Ok(())
}

fn row4(r: &Row<'_>) -> Result<(String, i64, i64, i64)> {
    Ok((r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?))
}

/// That a look finds what it is for: each of these is wrong, and is seen.
pub fn self_check() {
    let fresh = || {
        let conn = Connection::open_in_memory().expect("memory");
        conn.execute_batch(&schema(&["a".to_owned(), "b".to_owned()])).expect("the schema");
        let rows = "INSERT INTO parent VALUES('a', 1, 1); INSERT INTO child VALUES('a', 1, 0, '');
                    INSERT INTO list VALUES('a', 0, '1,2'); INSERT INTO inserts VALUES('a', 1, 'a-1');
                    UPDATE counter SET n = 1 WHERE node = 'a'";
        conn.execute_batch(rows).expect("rows");
        conn
    };
    assert_eq!(look(&fresh(), true).expect("a look").wrong, Vec::<String>::new());
    let wrong = [
        "DELETE FROM inserts",
        "UPDATE counter SET n = 2 WHERE node = 'a'",
        "UPDATE counter SET saw = 'a=2' WHERE node = 'b'",
        "UPDATE inserts SET body = 'b-1'",
        "UPDATE list SET items = '2,1'",
        "UPDATE list SET part = 1, items = '101'",
        "DELETE FROM child",
        "PRAGMA foreign_keys = OFF; DELETE FROM parent",
        "INSERT INTO parent VALUES('a', 3, 0)",
        "UPDATE account SET amount = amount + 1 WHERE node = 'b' AND grp = 2 AND slot = 0",
        "UPDATE batch SET n = 1 WHERE node = 'b' AND slot = 3",
        "DELETE FROM bulk WHERE node = 'a' AND slot = 17",
    ];
    for sql in wrong {
        let conn = fresh();
        conn.execute_batch(sql).expect(sql);
        assert!(!look(&conn, true).expect("a look").wrong.is_empty(), "not seen: {sql}");
    }
    let look = look(&fresh(), true).expect("a look");
    let acknowledged = |n: i64| BTreeMap::from([("counter/a".to_owned(), n)]);
    assert!(look.missing(&acknowledged(1), |_| true).is_empty());
    assert_eq!(look.missing(&acknowledged(2), |_| true).len(), 1);
    assert!(look.missing(&acknowledged(2), |node| node == "b").is_empty());
}
