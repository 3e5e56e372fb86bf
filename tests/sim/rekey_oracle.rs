//! What must be true of tables that keep both rows of an id collision: the oracle sees every write of every
//! application as it is made, and knows nothing of how litemesh does it.
//!
//! Every row has a number of its own (`uid`) that no write changes, and says which row it means by its reference
//! (`meant`, written together with `p`). In the end a row is there once, on every node, unless an application deleted
//! or replaced that very row, and its reference shows the row that its writer meant, if that is there.

use std::collections::BTreeSet;

use rand::Rng;
use rand::rngs::StdRng;
use rusqlite::{Connection, OptionalExtension};

/// A tree in itself, three levels below it, the last one not rekeyed itself: with an index and without, ids handed
/// out with AUTOINCREMENT and without. Some rows are there from the start.
pub const SCHEMA: &str = "
    CREATE TABLE l0(id INTEGER PRIMARY KEY, uid INTEGER, val, p INTEGER REFERENCES l0(id), meant INTEGER);
    CREATE TABLE l1(id INTEGER PRIMARY KEY AUTOINCREMENT, uid INTEGER, val, p INTEGER REFERENCES l0, meant INTEGER);
    CREATE TABLE l2(val, p INTEGER REFERENCES l1(id), meant INTEGER, id INTEGER PRIMARY KEY, uid INTEGER);
    CREATE INDEX l2_p ON l2(p);
    CREATE TABLE a3(id TEXT PRIMARY KEY NOT NULL, uid INTEGER, val, p INTEGER REFERENCES l2(id), meant INTEGER);
    INSERT INTO l0 VALUES(1, -1, 'old', NULL, 0), (2, -2, 'old', 1, -1);
    INSERT INTO l1 VALUES(1, -11, 'old', 1, -1), (2, -12, 'old', 2, -2);
    INSERT INTO l2(id, uid, val, p, meant) VALUES(1, -21, 'old', 1, -11), (2, -22, 'old', 2, -12);
    INSERT INTO a3 VALUES('1', -31, 'old', 1, -21), ('2', -32, 'old', 2, -22);";
/// Tables and what they refer to.
const TABLES: [(&str, &str); 4] = [("l0", "l0"), ("l1", "l0"), ("l2", "l1"), ("a3", "l2")];

#[derive(Default, Clone)]
pub struct Oracle {
    next_uid: i64,
    made: BTreeSet<(usize, i64)>,
    dead: BTreeSet<i64>,
}

type Row = (rusqlite::types::Value, i64);

impl Oracle {
    pub fn new() -> Self {
        let made = (0..4).flat_map(|t| [(t, -(t as i64 * 10 + 1)), (t, -(t as i64 * 10 + 2))]).collect();
        Self { made, ..Self::default() }
    }

    /// One transaction of an application, at a time of its own (a julian day); some are rolled back.
    pub fn write(&mut self, random: &mut StdRng, app: &Connection, day: f64) {
        let before = self.clone();
        app.execute_batch("BEGIN").unwrap();
        let logged = "SELECT coalesce(max(seq), 0) FROM __litemesh_log";
        let first: i64 = app.prepare_cached(logged).unwrap().query_row([], |r| r.get(0)).unwrap();
        for _ in 0..random.random_range(1..5) {
            let t = random.random_range(0..4);
            let kept = self.clone();
            app.execute_batch("SAVEPOINT s").unwrap();
            // Constraint errors are the application's own affair.
            if self.statement(random, app, t).is_err() {
                *self = Self { next_uid: self.next_uid, ..kept };
                app.execute_batch("ROLLBACK TO s").unwrap();
            }
            app.execute_batch("RELEASE s").unwrap();
        }
        // A seed repeats itself whatever the time is.
        let date = "UPDATE __litemesh_log SET ms = ?1 WHERE seq > ?2";
        app.prepare_cached(date).unwrap().execute((day, first)).unwrap();
        if random.random_bool(0.1) {
            app.execute_batch("ROLLBACK").unwrap();
            *self = Self { next_uid: self.next_uid, ..before };
        } else if app.execute_batch("COMMIT").is_err() {
            panic!("no constraint of these is deferred");
        }
    }

    fn statement(&mut self, random: &mut StdRng, app: &Connection, t: usize) -> rusqlite::Result<()> {
        let (table, above) = TABLES[t];
        let any = |table: &str, draw: i64| -> rusqlite::Result<Option<Row>> {
            let count: i64 =
                app.prepare_cached(&format!("SELECT count(*) FROM {table}"))?.query_row([], |r| r.get(0))?;
            let sql = format!("SELECT id, uid FROM {table} ORDER BY uid LIMIT 1 OFFSET ?1");
            app.prepare_cached(&sql)?
                .query_row([draw % count.max(1)], |r| Ok((r.get(0)?, r.get(1)?)))
                .optional()
        };
        self.next_uid += 1;
        let uid = self.next_uid;
        let (parent, meant) = match any(above, random.random_range(0..1 << 30))? {
            Some((id, uid)) if random.random_bool(0.9) => (id, uid),
            _ => (rusqlite::types::Value::Null, 0),
        };
        let victim = any(table, random.random_range(0..1 << 30))?;
        let small = random.random_range(1..7i64);
        let key = |id: i64| if t == 3 { id.to_string().into() } else { rusqlite::types::Value::Integer(id) };
        let fresh = if t == 3 { format!("k{uid}").into() } else { rusqlite::types::Value::Null };
        let insert = format!("INTO {table}(id, uid, val, p, meant) VALUES(?1, ?2, 'new', ?3, ?4)");
        let at = |id: &rusqlite::types::Value| -> rusqlite::Result<Option<i64>> {
            app.prepare_cached(&format!("SELECT uid FROM {table} WHERE id = ?1"))?
                .query_row([id], |r| r.get(0))
                .optional()
        };
        match (random.random_range(0..16), victim) {
            (0..6, _) => {
                app.prepare_cached(&format!("INSERT {insert}"))?.execute((fresh, uid, parent, meant))?;
                self.made.insert((t, uid));
            }
            (6, _) if t < 3 => {
                app.prepare_cached(&format!("INSERT {insert}"))?.execute((key(small), uid, parent, meant))?;
                self.made.insert((t, uid));
            }
            (7, Some((id, old))) if t < 3 => {
                app.prepare_cached(&format!("INSERT OR REPLACE {insert}"))?
                    .execute((id, uid, parent, meant))?;
                self.dead.insert(old);
                self.made.insert((t, uid));
            }
            (8, Some((id, old))) => {
                app.prepare_cached(&format!("DELETE FROM {table} WHERE id = ?1"))?.execute([id])?;
                self.dead.insert(old);
            }
            (9, Some((id, old))) if t < 3 => {
                // Deleted and made again at once.
                app.prepare_cached(&format!("DELETE FROM {table} WHERE id = ?1"))?.execute([&id])?;
                self.dead.insert(old);
                app.prepare_cached(&format!("INSERT {insert}"))?.execute((id, uid, parent, meant))?;
                self.made.insert((t, uid));
            }
            (10, Some((id, old))) if t < 3 && id != key(small) => {
                // Another id is another row; whom REPLACE displaces is gone.
                let displaced = at(&key(small))?;
                let sql = format!("UPDATE OR REPLACE {table} SET id = ?2, uid = ?3 WHERE id = ?1");
                app.prepare_cached(&sql)?.execute((&id, small, uid))?;
                self.dead.extend(displaced);
                self.dead.insert(old);
                self.made.insert((t, uid));
            }
            (11 | 12, Some((id, _))) => {
                // By way of NULL: what is set to the value it has is no write to SQLite, and the two columns must
                // be one.
                app.prepare_cached(&format!("UPDATE {table} SET p = NULL, meant = NULL WHERE id = ?1"))?
                    .execute([&id])?;
                let sql = format!("UPDATE {table} SET p = ?2, meant = ?3 WHERE id = ?1");
                app.prepare_cached(&sql)?.execute((id, parent, meant))?;
            }
            (13, _) => {
                app.prepare_cached(&format!("UPDATE {table} SET val = ?1 WHERE uid % 3 = ?2"))?
                    .execute((uid, small % 3))?;
            }
            (_, Some((id, _))) => {
                app.prepare_cached(&format!("UPDATE {table} SET val = ?2 WHERE id = ?1"))?
                    .execute((id, uid))?;
            }
            _ => {}
        }
        Ok(())
    }

    /// What is wrong with a file in the end.
    pub fn check(&self, app: &Connection) -> Result<(), String> {
        for (t, (table, above)) in TABLES.into_iter().enumerate() {
            let mut statement = app.prepare(&format!("SELECT uid FROM {table}")).unwrap();
            let uids: Vec<i64> = statement.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
            if let Some(back) = uids.iter().find(|u| self.dead.contains(u)) {
                return Err(format!("row {back} of {table} was deleted and is back"));
            }
            for (_, uid) in self.made.iter().filter(|(of, uid)| *of == t && !self.dead.contains(uid)) {
                let count = uids.iter().filter(|u| *u == uid).count();
                if count != 1 {
                    return Err(format!("row {uid} of {table} is there {count} times"));
                }
            }
            let sql = format!(
                "SELECT c.uid, c.p, c.meant, p.uid FROM {table} AS c LEFT JOIN {above} AS p ON p.id = c.p
                 WHERE c.meant <> 0 AND p.uid IS NOT c.meant"
            );
            let mut statement = app.prepare(&sql).unwrap();
            let wrong = statement.query_map([], |r| {
                Ok((
                    r.get::<_, i64>(0)?,
                    r.get::<_, Option<i64>>(1)?,
                    r.get::<_, i64>(2)?,
                    r.get::<_, Option<i64>>(3)?,
                ))
            });
            for (uid, p, meant, found) in wrong.unwrap().map(Result::unwrap) {
                if !self.dead.contains(&meant) {
                    return Err(format!(
                        "row {uid} of {table} means {meant}, and refers to {p:?}: {found:?}"
                    ));
                }
            }
        }
        Ok(())
    }
}
