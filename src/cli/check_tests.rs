//! Tests of `check` over real files. Invariant: one test a code, with a schema that has it and one that has not.

use super::*;

/// The report on a WAL file made by `ddl`.
fn report(ddl: &str) -> Report {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let conn = Connection::open(&path).unwrap();
    conn.pragma_update(None, "journal_mode", "WAL").unwrap();
    conn.execute_batch(ddl).unwrap();
    examine(&path).unwrap()
}

fn found(ddl: &str, code: &str) -> Vec<Finding> {
    report(ddl).findings.into_iter().filter(|f| f.code == code).collect()
}

fn one(ddl: &str, code: &str) -> Finding {
    let mut all = found(ddl, code);
    assert_eq!(all.len(), 1, "{code} in {ddl}: {all:?}");
    all.remove(0)
}

fn text(report: &Report) -> String {
    let mut out = Vec::new();
    write_text(report, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

const SOUND: &str = "CREATE TABLE t(id TEXT NOT NULL PRIMARY KEY, a, b);
    CREATE TABLE w(id PRIMARY KEY, x) WITHOUT ROWID; CREATE INDEX i ON t(a); CREATE VIEW v AS SELECT a FROM t";

#[test]
fn a_sound_schema_has_nothing_fragile() {
    let report = report(SOUND);
    assert_eq!(report.findings, []);
    assert!(text(&report).contains("2 of 2 tables") && text(&report).ends_with("nothing fragile\n"));
    let many: String = (0..100).map(|i| format!(", c{i}")).collect();
    assert_eq!(found(&format!("CREATE TABLE t(id TEXT NOT NULL PRIMARY KEY{many})"), "unique").len(), 0);
}

#[test]
fn a_table_without_a_key() {
    let f = one("CREATE TABLE t(a, b)", "no-primary-key");
    assert_eq!((f.table.as_deref(), f.severity), (Some("t"), Severity::Warning));
    assert!(f.advice.contains("VACUUM"));
    assert_eq!(report("CREATE TABLE t(a, b)").tables[0].key, ["_rowid_"]);
}

#[test]
fn a_key_that_may_be_null() {
    let ddl = "CREATE TABLE t(id TEXT PRIMARY KEY, a)";
    assert_eq!(one(ddl, "nullable-key").severity, Severity::Info);
    let with_row = format!("{ddl}; INSERT INTO t VALUES(NULL, 1)");
    assert_eq!(one(&with_row, "nullable-key").severity, Severity::Warning);
    assert!(one("CREATE TABLE t(a NOT NULL, b, PRIMARY KEY(a, b))", "nullable-key").what.contains("(\"b\")"));
    assert!(found(SOUND, "nullable-key").is_empty());
}

#[test]
fn keys_that_sqlite_assigns() {
    assert!(one("CREATE TABLE t(id INTEGER PRIMARY KEY, a)", "auto-key").what.contains("max + 1"));
    let f = one("CREATE TABLE t(id INTEGER PRIMARY KEY AUTOINCREMENT, a)", "auto-key");
    assert!(f.what.contains("AUTOINCREMENT") && f.what_litemesh_does.contains("later birth"));
    assert!(found("CREATE TABLE t(id INT NOT NULL PRIMARY KEY, a)", "auto-key").is_empty());
}

#[test]
fn other_unique_columns() {
    let table = |rest: &str| format!("CREATE TABLE t(id TEXT NOT NULL PRIMARY KEY, {rest}");
    let f = one(&table("a UNIQUE, b)"), "unique");
    assert_eq!(f.severity, Severity::Info);
    assert!(f.what_litemesh_does.contains("\"a\" becomes NULL"), "{f:?}");
    let f = one(&table("a NOT NULL UNIQUE, b)"), "unique");
    assert_eq!(f.severity, Severity::Warning);
    assert!(f.what_litemesh_does.contains("deleted"), "{f:?}");
    let f = one(&table("a NOT NULL, b, UNIQUE(a, b))"), "unique");
    assert!(f.what_litemesh_does.contains("\"b\" becomes NULL") && f.what.contains("\"a\", \"b\""), "{f:?}");
}

#[test]
fn partial_and_expression_indexes() {
    let table = "CREATE TABLE t(id TEXT NOT NULL PRIMARY KEY, a, b);";
    let f = one(&format!("{table} CREATE UNIQUE INDEX i ON t(a) WHERE b > 0"), "unique-partial");
    assert!(f.what.contains("where b > 0") && f.what_litemesh_does.contains("becomes NULL"), "{f:?}");
    let f = one(&format!("{table} CREATE UNIQUE INDEX i ON t(lower(a))"), "unique-expression");
    assert!(f.what.contains("lower(a)") && f.what_litemesh_does.contains("deleted"), "{f:?}");
}

#[test]
fn foreign_keys_are_named() {
    let ddl = "CREATE TABLE p(id INTEGER PRIMARY KEY); CREATE TABLE q(a TEXT NOT NULL, b NOT NULL, PRIMARY KEY(a, b));
        CREATE TABLE c(id TEXT NOT NULL PRIMARY KEY, p REFERENCES p, a, b, FOREIGN KEY(a, b) REFERENCES q)";
    let mut all = found(ddl, "foreign-key");
    all.sort_by(|x, y| x.what.cmp(&y.what));
    assert_eq!(all[0].what, "\"a\", \"b\" refers to \"q\"");
    assert_eq!(all[1].what, "\"p\" refers to \"p\"");
    assert!(all[1].advice.contains("assigned by SQLite") && !all[0].advice.contains("assigned"));
}

#[test]
fn triggers_are_told_apart_by_what_they_write() {
    let base =
        "CREATE TABLE t(id TEXT NOT NULL PRIMARY KEY, a); CREATE TABLE log(id TEXT NOT NULL PRIMARY KEY);
        CREATE VIRTUAL TABLE f USING fts5(a); CREATE VIEW v AS SELECT id, a FROM t;";
    let with = |rest: &str| format!("{base} CREATE TRIGGER x {rest}");
    let fts = with("AFTER INSERT ON t BEGIN INSERT INTO f(a) VALUES(NEW.a); END");
    assert!(one(&fts, "trigger-everywhere").what.contains("(f)"));
    assert_eq!(one(&fts, "virtual-table").severity, Severity::Info);
    let origin = with("AFTER UPDATE OF a ON t BEGIN INSERT INTO log VALUES(NEW.a); END");
    assert!(one(&origin, "trigger-origin").what.contains("(log)"));
    assert_eq!(one(&origin, "virtual-table").severity, Severity::Warning);
    let check = with("BEFORE DELETE ON t BEGIN SELECT RAISE(ABORT, 'no'); END");
    assert!(one(&check, "trigger-origin").what.contains("writes nothing"));
    let mixed = with("AFTER DELETE ON t BEGIN DELETE FROM f; DELETE FROM log; END");
    assert_eq!(one(&mixed, "trigger-mixed").severity, Severity::Warning);
    let view = with("INSTEAD OF UPDATE ON v BEGIN UPDATE t SET a = NEW.a WHERE id = NEW.id; END");
    assert_eq!(one(&view, "trigger-origin").table.as_deref(), Some("v"));
    let view = with("INSTEAD OF INSERT ON v BEGIN INSERT INTO f(a) VALUES(NEW.a); END");
    assert_eq!(one(&view, "trigger-mixed").table.as_deref(), Some("v"));
    assert!(
        one(&with("AFTER INSERT ON t BEGIN SELECT mine(NEW.a); END"), "trigger-unknown")
            .what
            .contains("mine")
    );
}

#[test]
fn what_only_the_application_has() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let conn = Connection::open(&path).unwrap();
    let flags = rusqlite::functions::FunctionFlags::SQLITE_DETERMINISTIC;
    conn.create_scalar_function("mine", 1, flags, |c| c.get::<i64>(0)).unwrap();
    let ddl = "CREATE TABLE k(id TEXT COLLATE NOCASE NOT NULL PRIMARY KEY);
        CREATE TABLE e(id TEXT NOT NULL PRIMARY KEY, a); CREATE INDEX i ON e(mine(a));
        CREATE TABLE c(id TEXT NOT NULL PRIMARY KEY, a CHECK(mine(a) > 0));
        PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = replace(sql, 'NOCASE', 'CUSTOM')";
    conn.execute_batch(ddl).unwrap();
    let report = examine(&path).unwrap();
    let code = |table: &str| {
        let of_table = |f: &&Finding| f.table.as_deref() == Some(table);
        report.findings.iter().filter(of_table).map(|f| f.code).collect::<Vec<_>>()
    };
    assert_eq!(code("k"), ["unknown-collation"]);
    assert_eq!(code("e"), ["needs-application"]);
    assert_eq!(code("c"), [""; 0], "CHECK is not enforced on apply");
    assert!(report.has_errors());
    let replicated: Vec<bool> = report.tables.iter().map(|t| t.replicated).collect();
    assert_eq!(replicated, [true, true, false]);
}

#[test]
fn keys_that_are_real() {
    assert!(one("CREATE TABLE t(x REAL NOT NULL PRIMARY KEY)", "real-key").what.contains("(\"x\")"));
}

#[test]
fn a_file_that_is_not_in_wal_mode() {
    let f = one(&format!("PRAGMA journal_mode = DELETE; {SOUND}"), "journal-mode");
    assert_eq!((f.table, f.severity), (None, Severity::Info));
    assert!(f.what.contains("delete"));
}

#[test]
fn an_adopted_file_gives_the_same_findings() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let conn = Connection::open(&path).unwrap();
    conn.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, a UNIQUE)").unwrap();
    let before = examine(&path).unwrap();
    let site = crate::core::version::SiteId(7);
    crate::replica::adopt::install(&conn, 1, site).unwrap();
    conn.execute_batch(
        "CREATE TRIGGER __litemesh_i_1 AFTER INSERT ON t BEGIN INSERT INTO __litemesh_log(tbl) VALUES(1); END",
    )
    .unwrap();
    assert_eq!(examine(&path).unwrap(), before);
}

#[test]
fn the_command_writes_text_or_json_and_leaves_the_file_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let ddl = "CREATE TABLE \"we\u{1b}ird\"(id INTEGER PRIMARY KEY, a NOT NULL UNIQUE)";
    Connection::open(&path).unwrap().execute_batch(ddl).unwrap();
    let before = std::fs::read(&path).unwrap();
    let run_with = |json| {
        let mut out = Vec::new();
        assert_eq!(run(&CheckArgs { database: path.clone(), json }, &mut out).unwrap(), 0);
        String::from_utf8(out).unwrap()
    };
    let text = run_with(false);
    assert!(text.contains("\nthe file\n") && text.contains("\n  warning [auto-key]\n"), "{text}");
    assert!(text.ends_with("0 errors, 2 warnings, 1 to know\n") && !text.contains('\u{1b}'), "{text}");
    assert!(text.lines().all(|l| l.chars().count() <= 80), "{text}");
    let json: serde_json::Value = serde_json::from_str(&run_with(true)).unwrap();
    assert_eq!(json["findings"][1]["code"], "auto-key");
    assert_eq!(json["findings"][1]["severity"], "warning");
    assert!(json["findings"][0]["table"].is_null() && json["tables"][0]["replicated"] == true);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let missing = CheckArgs { database: dir.path().join("none.db"), json: false };
    assert!(matches!(run(&missing, &mut Vec::new()), Err(CheckError::Open(_))));
}
