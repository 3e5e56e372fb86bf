//! One engine for histories that are written out: every message is moved by hand.

use bytes::Bytes;
use litemesh::core::message::{Fragment, Message, decode};
use litemesh::core::names::NodeName;
use litemesh::core::schema::SchemaMode;
use litemesh::core::version::SiteId;
use litemesh::fabric::link::{LogEnd, Logged};
use litemesh::replica::adopt;
use litemesh::replica::conflict::Retention;
use litemesh::replica::engine::{Action, Engine};
use litemesh::replica::send::commit_pieces;
use litemesh::replica::store::Store;
use rusqlite::Connection;

pub const START_MS: u64 = 1_900_000_000_000;

pub struct Site {
    pub name: NodeName,
    pub uri: String,
    pub app: Connection,
    pub engine: Engine,
    /// Commits that were published and not delivered: pieces.
    pub commits: Vec<Vec<Bytes>>,
    pub messages: Vec<(Option<NodeName>, Message)>,
    pub warnings: Vec<String>,
}

impl Site {
    /// A site whose operator changes the schema by hand.
    pub fn new(test: &str, name: &str, site: u64, lineage: u64, schema: &str) -> Self {
        Self::with_mode(test, name, (site, lineage), schema, SchemaMode::Manual)
    }

    pub fn with_mode(
        test: &str,
        name: &str,
        (site, lineage): (u64, u64),
        schema: &str,
        mode: SchemaMode,
    ) -> Self {
        let uri = format!("file:scripted-{test}-{name}?mode=memory&cache=shared");
        let app = Connection::open(&uri).unwrap();
        app.execute_batch(schema).unwrap();
        adopt::install(&app, lineage, SiteId(site)).unwrap();
        Self::open(&uri, name, mode)
    }

    /// A node that has such a file.
    pub fn open(uri: &str, name: &str, mode: SchemaMode) -> Self {
        let app = Connection::open(uri).unwrap();
        let spool = std::env::temp_dir();
        let store =
            Store::with_connection(Connection::open(uri).unwrap(), &spool, Box::new(|_| true), mode).unwrap();
        let mut engine = Engine::new("app".parse().unwrap(), store, &spool);
        // The clock of these histories is years ahead of that of SQLite.
        engine.keep_conflicts(Retention { age_ms: u64::MAX, ..Retention::default() });
        let name = name.parse().unwrap();
        let uri = uri.to_owned();
        Self { name, uri, app, engine, commits: Vec::new(), messages: Vec::new(), warnings: Vec::new() }
    }

    pub fn site(&self) -> SiteId {
        self.engine.store().head().site
    }

    pub fn settle(&mut self, now_ms: u64) {
        self.engine.settle(now_ms).unwrap();
        let mut readings = Vec::new();
        for action in self.engine.take_actions() {
            match action {
                Action::Publish(mut own) => {
                    let mut pieces = Vec::new();
                    commit_pieces(&mut own, |p| pieces.push(p)).unwrap();
                    self.commits.push(pieces);
                }
                Action::Broadcast(m) => self.messages.push((None, m)),
                Action::Send(to, m) => self.messages.push((Some(to), m)),
                Action::ReadLog(asked) => readings.push(asked),
                Action::Warn(text) => self.warnings.push(text),
            }
        }
        // Here nobody keeps a log.
        for asked in readings {
            let logged = Logged { asked, pieces: Vec::new(), end: LogEnd::Gone("there is none".to_owned()) };
            self.engine.on_logged(&logged, now_ms).unwrap();
            self.settle(now_ms);
        }
    }

    /// One application transaction.
    pub fn run(&self, sql: &str) {
        self.app.execute_batch(&format!("BEGIN; {sql}; COMMIT")).unwrap();
    }

    /// Why anything stands still.
    pub fn stopped(&self) -> String {
        self.engine.stopped().join("; ")
    }

    /// The schema without our own tables: what each object is, spelling apart.
    pub fn shape(&self) -> Vec<String> {
        let sql = "SELECT lower(type || ' ' || name || ' ' || coalesce((SELECT group_concat(i.name || ' ' || i.pk || \"notnull\")
            FROM pragma_table_info(s.name) AS i), replace(sql, '\"', '')))
            FROM sqlite_schema AS s WHERE name NOT LIKE '\\_\\_%' ESCAPE '\\' AND name NOT LIKE 'sqlite%' ORDER BY 1";
        let mut statement = self.app.prepare(sql).unwrap();
        statement.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect()
    }

    /// One application transaction, absorbed into one commit.
    pub fn write(&mut self, sql: &str) -> Vec<Bytes> {
        self.app.execute_batch(&format!("BEGIN; {sql}; COMMIT")).unwrap();
        self.settle(START_MS);
        self.commits.pop().expect("a commit")
    }

    pub fn take(&mut self, from: SiteId, commit: &[Bytes]) {
        for piece in commit {
            self.engine.on_fragment(from, &decode::<Fragment>(piece).unwrap()).unwrap();
        }
    }

    pub fn hear(&mut self, from: &NodeName, message: Message, now_ms: u64) {
        self.engine.on_message(from, message, now_ms).unwrap();
    }

    pub fn text(&self, sql: &str) -> String {
        let value = self.app.query_row(sql, [], |r| r.get::<_, rusqlite::types::Value>(0)).unwrap();
        match value {
            rusqlite::types::Value::Text(t) => t,
            rusqlite::types::Value::Integer(i) => i.to_string(),
            rusqlite::types::Value::Null => String::new(),
            other => format!("{other:?}"),
        }
    }

    pub fn rows(&self) -> String {
        self.text("SELECT group_concat(id || '=' || v, ' ') FROM (SELECT * FROM t ORDER BY id)")
    }
}

pub const SCHEMA: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, v)";

pub fn duo(test: &str) -> (Site, Site) {
    (Site::new(test, "a", 1, 7, SCHEMA), Site::new(test, "b", 2, 7, SCHEMA))
}

/// Moves messages between the two until there are none.
pub fn talk(a: &mut Site, b: &mut Site, now_ms: u64) {
    for _ in 0..50 {
        let (from_a, from_b) = (std::mem::take(&mut a.messages), std::mem::take(&mut b.messages));
        if from_a.is_empty() && from_b.is_empty() {
            return;
        }
        from_a.into_iter().for_each(|(_, m)| b.hear(&a.name, m, now_ms));
        from_b.into_iter().for_each(|(_, m)| a.hear(&b.name, m, now_ms));
        a.settle(now_ms);
        b.settle(now_ms);
    }
    panic!("they never stop talking");
}
