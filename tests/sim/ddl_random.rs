//! Random changes of the schema.

use rand::Rng;
use rand::rngs::StdRng;

/// A change of the schema, or of rows in tables that come and go. One name always means one definition: what
/// contradicts itself is for people to settle.
pub fn schema_statement(r: &mut StdRng) -> String {
    let x = r.random_range(0..3);
    let (c, d) = (r.random_range(0..3), r.random_range(0..3));
    let (id, n) = (r.random_range(1..6), r.random_range(0..100));
    match r.random_range(0..23) {
        0..3 => format!("CREATE TABLE IF NOT EXISTS x{x}(id INTEGER PRIMARY KEY, a)"),
        3 => format!("DROP TABLE x{x}"),
        4..7 => format!("ALTER TABLE x{x} ADD COLUMN c{c} TEXT DEFAULT 'none'"),
        7 => format!("ALTER TABLE x{x} DROP COLUMN c{c}"),
        8 => format!("ALTER TABLE x{x} RENAME COLUMN c{c} TO c{d}"),
        9 => format!("ALTER TABLE x{x} RENAME TO x{c}"),
        10 => format!("CREATE INDEX IF NOT EXISTS i{x} ON x{x}(a)"),
        11 => format!("DROP INDEX IF EXISTS i{x}"),
        12 => format!("CREATE VIEW IF NOT EXISTS v{x} AS SELECT {x}"),
        13 => format!("DROP VIEW v{x}"),
        14 => format!("UPDATE x{x} SET c{c} = 'w{n}' WHERE id = {id}"),
        15 => format!("DELETE FROM x{x} WHERE id = {id}"),
        16 => format!("ALTER TABLE r{x} RENAME TO r{c}"),
        17 => format!(
            "ALTER TABLE x{c} RENAME TO y; ALTER TABLE x{d} RENAME TO x{c}; ALTER TABLE y RENAME TO x{d}"
        ),
        _ => format!("INSERT OR REPLACE INTO x{x}(id, a) VALUES({id}, {n})"),
    }
}
