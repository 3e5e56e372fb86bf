//! Every table shape, key, value and way of writing arrives exactly, in both directions.

use crate::support::{Node, dump, pair, wait_equal};

const SCHEMA: &str = r#"
CREATE TABLE plain(id INTEGER PRIMARY KEY, v);
CREATE TABLE counted(id INTEGER PRIMARY KEY AUTOINCREMENT, v TEXT DEFAULT 'none');
CREATE TABLE strict_table(id INTEGER PRIMARY KEY, i INTEGER, r REAL, t TEXT, b BLOB, a ANY) STRICT;
CREATE TABLE worded(k TEXT PRIMARY KEY NOT NULL, v) WITHOUT ROWID;
CREATE TABLE composite(a TEXT, b INTEGER, c BLOB, v, PRIMARY KEY(a, b, c));
CREATE TABLE nocase(k TEXT COLLATE NOCASE PRIMARY KEY NOT NULL, v) WITHOUT ROWID;
CREATE TABLE blobkey(k BLOB PRIMARY KEY NOT NULL, v);
CREATE TABLE realkey(k REAL PRIMARY KEY NOT NULL, v);
CREATE TABLE descending(id INTEGER PRIMARY KEY DESC, v);
CREATE TABLE keyless(v, w);
CREATE TABLE "od""d ""table" ("sel""ect" INTEGER PRIMARY KEY, "group by" TEXT, "größe" REAL, [from] TEXT);
CREATE TABLE generated(id INTEGER PRIMARY KEY, a INTEGER, twice AS (a * 2) STORED, thrice AS (a * 3));
CREATE TABLE parent(id INTEGER PRIMARY KEY, name TEXT);
CREATE TABLE child(id INTEGER PRIMARY KEY, parent INTEGER REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE, v);
CREATE TABLE uniq(id INTEGER PRIMARY KEY, mail TEXT UNIQUE, seat INTEGER, n);
CREATE UNIQUE INDEX seat ON uniq(seat) WHERE seat > 0;
CREATE TABLE audit(id INTEGER PRIMARY KEY, what TEXT);
CREATE TRIGGER audited AFTER UPDATE ON plain BEGIN INSERT INTO audit(what) VALUES('plain ' || NEW.id); END;
CREATE TABLE doc(id INTEGER PRIMARY KEY, body TEXT);
CREATE VIRTUAL TABLE search USING fts5(body, content='doc', content_rowid='id');
CREATE TRIGGER doc_i AFTER INSERT ON doc BEGIN INSERT INTO search(rowid, body) VALUES(NEW.id, NEW.body); END;
CREATE TRIGGER doc_d AFTER DELETE ON doc BEGIN
  INSERT INTO search(search, rowid, body) VALUES('delete', OLD.id, OLD.body); END;
CREATE TRIGGER doc_u AFTER UPDATE ON doc BEGIN
  INSERT INTO search(search, rowid, body) VALUES('delete', OLD.id, OLD.body);
  INSERT INTO search(rowid, body) VALUES(NEW.id, NEW.body); END;
"#;

/// Statements that touch every shape; `base` keeps two writers' keys apart.
fn writes(base: i64) -> String {
    let values = [
        "NULL",
        "0",
        "1",
        "-1",
        "9223372036854775807",
        "-9223372036854775808",
        "1.0",
        "0.1",
        "1e308",
        "9e999",
        "-9e999",
        "5e-324",
        "''",
        "x''",
        "'text'",
        "x'74657874'",
        "CAST(x'ff00fe' AS TEXT)",
        "'ä€😀'",
        "'a' || char(0) || 'b'",
        "'1'",
        "CAST('1' AS BLOB)",
    ];
    let mut sql = String::new();
    for (i, value) in values.iter().enumerate() {
        let id = base + i as i64;
        sql += &format!("INSERT INTO plain VALUES({id}, {value});");
        sql += &format!("INSERT INTO strict_table(id, a) VALUES({id}, {value});");
        sql += &format!("INSERT INTO keyless VALUES({value}, {id});");
        sql += &format!("INSERT INTO composite VALUES('a', {id}, x'00', {value});");
        if i % 2 == 0 {
            sql += &format!("UPDATE plain SET v = {} WHERE id = {id};", values[(i + 1) % values.len()]);
        }
    }
    sql + &format!(
        r#"
        INSERT INTO counted(v) VALUES('one'), ('two'); INSERT INTO counted DEFAULT VALUES;
        INSERT INTO worded VALUES('k{base}', 1), ('key ''quoted'' {base}', 2);
        INSERT INTO nocase VALUES('Key{base}', 1); UPDATE nocase SET k = 'KEY{base}' WHERE k = 'key{base}';
        INSERT INTO blobkey VALUES(x'00{base}', 1), (CAST('{base}' AS BLOB), 2);
        INSERT INTO realkey VALUES({base}.5, 1); UPDATE realkey SET k = k + 10000 WHERE k = {base}.5;
        INSERT INTO descending VALUES({base}, 'd');
        INSERT INTO "od""d ""table" VALUES({base}, 'g', 1.5, 'f'); UPDATE "od""d ""table" SET "größe" = 2.5, [from] = NULL;
        INSERT INTO generated(id, a) VALUES({base}, 21); UPDATE generated SET a = 5 WHERE id = {base};
        INSERT INTO parent VALUES({base}, 'p'), ({base} + 1, 'q'), ({base} + 2, 'r');
        INSERT INTO child VALUES({base}, {base}, 'c'), ({base} + 1, {base}, 'd'), ({base} + 2, {base} + 1, 'e');
        UPDATE parent SET id = id + 5000 WHERE id = {base};
        DELETE FROM parent WHERE id = {base} + 1;
        INSERT INTO uniq VALUES({base}, 'm{base}', {base}, 1), ({base} + 1, 'n{base}', {base} + 1, 2), ({base} + 2, NULL, 0, 3);
        INSERT OR REPLACE INTO uniq VALUES({base} + 3, 'm{base}', {base} + 1, 4);
        UPDATE OR REPLACE uniq SET mail = 'm{base}' WHERE id = {base} + 2;
        INSERT OR IGNORE INTO uniq VALUES({base} + 4, 'm{base}', 0, 5);
        INSERT INTO plain VALUES({base}, 'up') ON CONFLICT(id) DO UPDATE SET v = excluded.v || 'sert';
        REPLACE INTO plain VALUES({base} + 1, 'replaced');
        SAVEPOINT s; DELETE FROM worded; INSERT INTO worded VALUES('gone', 1); ROLLBACK TO s; RELEASE s;
        UPDATE plain SET v = v WHERE id = {base} + 2;
        INSERT INTO doc VALUES({base}, 'hello world {base}'), ({base} + 1, 'another text'), ({base} + 2, 'to be deleted');
        UPDATE doc SET body = 'changed text {base}' WHERE id = {base} + 1;
        DELETE FROM doc WHERE id = {base} + 2;
        "#
    )
}

fn write(node: &Node, base: i64, settings: &str) {
    let app = node.app("app.db");
    app.execute_batch(settings).unwrap();
    app.execute_batch(&format!("BEGIN; {} COMMIT;", writes(base))).unwrap();
}

fn search(node: &Node, word: &str) -> Vec<i64> {
    let app = node.app("app.db");
    let mut statement = app.prepare("SELECT rowid FROM search WHERE search MATCH ?1 ORDER BY 1").unwrap();
    let rows = statement.query_map([word], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
    app.execute("INSERT INTO search(search) VALUES('integrity-check')", []).unwrap();
    rows
}

#[test]
fn every_shape_and_value_arrives_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), SCHEMA);
    write(&a, 1_000, "PRAGMA trusted_schema = OFF; PRAGMA foreign_keys = ON");
    a.sync();
    let expected = dump(&a.file("app.db"));
    assert_eq!(expected, dump(&b.file("app.db")), "from a to b");
    assert!(expected.iter().any(|l| l.starts_with("audit: ")), "the application's trigger wrote");
    write(&b, 2_000, "PRAGMA trusted_schema = OFF; PRAGMA foreign_keys = ON; PRAGMA recursive_triggers = ON");
    b.sync();
    assert_eq!(dump(&a.file("app.db")), dump(&b.file("app.db")), "from b to a");
    for node in [&a, &b] {
        assert_eq!(search(node, "hello"), [1_000, 2_000], "{}", node.name);
        assert_eq!(search(node, "changed"), [1_001, 2_001]);
        assert_eq!(search(node, "another"), Vec::<i64>::new());
        assert_eq!(search(node, "deleted"), Vec::<i64>::new());
    }
    for (node, table) in [(&a, "plain"), (&b, "doc"), (&a, "child"), (&b, "keyless"), (&a, "composite")] {
        node.exec("app.db", &format!("DELETE FROM {table}"));
    }
    wait_equal(&[&a, &b], "app.db");
    a.exec("app.db", "PRAGMA foreign_keys = ON; DELETE FROM parent");
    wait_equal(&[&a, &b], "app.db");
    assert!(search(&a, "hello").is_empty() && search(&b, "hello").is_empty());
    let left = dump(&b.file("app.db"));
    assert!(!left.iter().any(|l| l.starts_with("plain:") || l.starts_with("parent:")), "{left:?}");
}

#[test]
fn wide_tables_and_large_rows_arrive() {
    let dir = tempfile::tempdir().unwrap();
    let columns = (0..150).map(|i| format!("c{i} INTEGER")).collect::<Vec<_>>().join(", ");
    let schema = format!(
        "CREATE TABLE wide(id TEXT, {columns}, kind TEXT, PRIMARY KEY(kind, id)); CREATE TABLE large(id INTEGER PRIMARY KEY, v);"
    );
    let (a, b) = pair(dir.path(), &schema);
    a.exec("app.db", "INSERT INTO wide(id, kind, c0, c149) VALUES('x', 'k', 1, 149), ('y', 'k', 2, 150)");
    a.exec("app.db", "UPDATE wide SET c61 = 61, c62 = 62, c63 = 63, c124 = 124, c149 = -1 WHERE id = 'x'");
    a.exec(
        "app.db",
        "INSERT INTO large VALUES(1, randomblob(5000000)), (2, zeroblob(9000000)), (3, 'small')",
    );
    a.sync();
    assert_eq!(dump(&a.file("app.db")), dump(&b.file("app.db")));
    // Different columns of one row, far apart, at once: both stay.
    a.exec("app.db", "UPDATE wide SET c100 = 7 WHERE id = 'y'");
    b.exec("app.db", "UPDATE wide SET c5 = 8 WHERE id = 'y'");
    b.exec("app.db", "UPDATE large SET v = randomblob(3000000) WHERE id = 1");
    a.sync();
    b.sync();
    wait_equal(&[&a, &b], "app.db");
    let sum: i64 =
        a.app("app.db").query_row("SELECT c100 + c5 FROM wide WHERE id = 'y'", [], |r| r.get(0)).unwrap();
    assert_eq!(sum, 15);
}
