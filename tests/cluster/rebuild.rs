//! Tables that tools build anew: create, copy, drop, rename in one transaction, during which nothing is captured.

use crate::support::{pair, wait_equal, wait_for};

const SCHEMA: &str = "
    CREATE TABLE person(id INTEGER PRIMARY KEY, name TEXT, age);
    CREATE INDEX person_name ON person(name);
    CREATE TABLE pet(id INTEGER PRIMARY KEY, owner INTEGER REFERENCES person(id), name);
    INSERT INTO person VALUES(1, 'Ann', 30), (2, 'Bob', NULL), (3, 'Cid', 50), (4, 'Dee', 60);
    INSERT INTO pet VALUES(1, 1, 'Rex');";

/// What a table holds on a node.
fn rows(node: &crate::support::Node) -> String {
    node.text(
        "app.db",
        "SELECT group_concat(id || name || coalesce(age, '-'), ' ') FROM (SELECT * FROM person ORDER BY id)",
    )
}

#[test]
fn what_changed_while_a_table_was_rebuilt_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), SCHEMA);
    // Rows that were there at adoption, and have no state of their own: changed, left out, added, all in the gap.
    a.exec(
        "app.db",
        "PRAGMA foreign_keys = OFF; BEGIN IMMEDIATE;
         CREATE TABLE new_person(id INTEGER PRIMARY KEY, name TEXT NOT NULL, age INTEGER NOT NULL DEFAULT 18);
         INSERT INTO new_person SELECT id, upper(name), coalesce(age, 18) FROM person WHERE id <> 3;
         DROP TABLE person; ALTER TABLE new_person RENAME TO person;
         CREATE INDEX person_name ON person(name);
         INSERT INTO person VALUES(9, 'NEW', 9); UPDATE person SET age = 61 WHERE id = 4;
         COMMIT;",
    );
    wait_for("the rebuilt rows at b", || rows(&b) == "1ANN30 2BOB18 4DEE61 9NEW9");
    wait_equal(&[&a, &b], "app.db");
    b.exec(
        "app.db",
        "INSERT INTO person(id, name) VALUES(20, 'of b'); UPDATE person SET age = 31 WHERE id = 1",
    );
    wait_for("b's write at a", || rows(&a) == "1ANN31 2BOB18 4DEE61 9NEW9 20of b18");
}

#[test]
fn the_other_node_writes_while_tables_are_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path(), SCHEMA);
    for round in 0..10 {
        // The ways of Knex and Prisma, of Alembic's batch mode, and of sqlite-utils.
        let (temporary, quoted) = [
            ("_knex_temp_person", "`person`"),
            ("new_person", "\"person\""),
            ("_alembic_tmp_person", "person"),
            ("person_new_x", "[person]"),
        ][round % 4];
        a.exec(
            "app.db",
            &format!(
                "PRAGMA foreign_keys = OFF; BEGIN IMMEDIATE;
                 CREATE TABLE \"{temporary}\"(\"id\" INTEGER NOT NULL PRIMARY KEY, \"name\" VARCHAR({}), \"age\", c{round} DEFAULT {round});
                 INSERT INTO \"{temporary}\"(id, name, age) SELECT id, name, age FROM {quoted};
                 DROP TABLE {quoted}; ALTER TABLE \"{temporary}\" RENAME TO {quoted};
                 CREATE INDEX person_name ON person(name); COMMIT; PRAGMA foreign_key_check;",
                round + 20
            ),
        );
        b.exec("app.db", &format!("INSERT INTO person(name, age) VALUES('b{round}', {round}); UPDATE person SET age = {round} WHERE id = 1"));
        b.exec("app.db", &format!("INSERT INTO pet(owner, name) VALUES(1, 'pet {round}')"));
        a.exec("app.db", &format!("UPDATE person SET name = 'a{round}' WHERE id = 2"));
    }
    let all = |node: &crate::support::Node| {
        node.text("app.db", "SELECT (SELECT count(*) FROM person WHERE name LIKE 'b%') || ' ' || (SELECT count(*) FROM pet) || ' '
            || (SELECT group_concat(name || age, ' ') FROM person WHERE id IN (1, 2)) || ' ' || (SELECT group_concat(name) FROM pragma_table_info('person'))")
    };
    wait_for("all of both at a", || all(&a).starts_with("10 11 Ann9"));
    wait_equal(&[&a, &b], "app.db");
    assert_eq!(all(&a), all(&b));
    assert!(all(&a).ends_with("id,name,age,c9"), "{}", all(&a));
}
