//! The true history of what was written: who wrote what, having seen what. From it follows, without litemesh, what every
//! row is in the end, which writes were lost to others that had not seen them, and whose children rows are.

use std::collections::{BTreeMap, BTreeSet};

use litemesh::core::vector::Vector;
use litemesh::core::version::{SiteId, Version};
use rusqlite::Connection;
use serde_json::Value as Json;

use crate::history::Effect;
use crate::world::Counts;

/// Values by column, as SQLite quotes them.
type Values = BTreeMap<String, String>;
/// What a writer had seen: site -> number of its last commit.
type Seen = BTreeMap<SiteId, u64>;

/// One statement's effect on one row, not in a numbered commit yet.
pub struct Pending {
    table: &'static str,
    key: String,
    what: Effect,
    changed: BTreeSet<String>,
    after: Option<Values>,
    seen: Seen,
}

impl Pending {
    pub fn new(
        table: &'static str,
        key: &str,
        what: Effect,
        before: Option<Values>,
        after: Option<Values>,
        seen: &Seen,
    ) -> Self {
        let names = after.iter().flatten().map(|(name, _)| name.clone());
        let old = before.unwrap_or_default();
        let changed = names.filter(|n| after.as_ref().is_some_and(|a| a.get(n) != old.get(n))).collect();
        Self { table, key: key.to_owned(), what, changed, after, seen: seen.clone() }
    }
}

impl Pending {
    /// An update of a row that is merged as a whole writes all of it.
    pub fn written_whole(mut self, whole: bool) -> Self {
        if whole && !self.changed.is_empty() {
            self.changed = self.after.iter().flatten().map(|(name, _)| name.clone()).collect();
        }
        self
    }

    /// An update that changes nothing is none.
    pub fn says_something(&self) -> bool {
        self.what != Effect::Update || !self.changed.is_empty()
    }
}

/// What one commit did to one row.
struct Event {
    version: Version,
    n: u64,
    seen: Seen,
    table: &'static str,
    key: String,
    /// The incarnation it is about: its own version if it inserted the row.
    birth: Version,
    dead: bool,
    /// The columns it wrote.
    values: Values,
}

impl Event {
    fn is_insert(&self) -> bool {
        self.birth == self.version
    }

    /// Whether its writer had seen the other event.
    fn saw(&self, other: &Event) -> bool {
        if self.version.site == other.version.site {
            return other.n < self.n;
        }
        self.seen.get(&other.version.site).is_some_and(|n| *n >= other.n)
    }

    fn concurrent(&self, other: &Event) -> bool {
        !self.saw(other) && !other.saw(self) && self.version != other.version
    }
}

/// A row as events make it.
#[derive(Default)]
struct Row {
    birth: Option<Version>,
    dead: bool,
    columns: BTreeMap<String, (Version, String)>,
}

#[derive(Default)]
pub struct Truth {
    events: Vec<Event>,
}

fn columns(table: &str) -> (&'static [&'static str], &'static [&'static str]) {
    match table {
        "cell" => (&["id"], &["a", "b"]),
        "kid" => (&["id"], &["cell", "v"]),
        _ => (&["cell", "n"], &["v"]),
    }
}

impl Truth {
    /// What a file holds of every feed.
    pub fn vector(app: &Connection) -> Seen {
        let mut statement = app.prepare_cached("SELECT site, n FROM __litemesh_site").unwrap();
        let rows =
            statement.query_map([], |r| Ok((SiteId(r.get::<_, i64>(0)? as u64), r.get::<_, i64>(1)? as u64)));
        rows.unwrap().map(Result::unwrap).collect()
    }

    /// A row as it is in a file.
    pub fn row(app: &Connection, table: &str, key: &str) -> Option<Values> {
        let (keys, values) = columns(table);
        let shown = values.iter().map(|v| format!("quote({v})")).collect::<Vec<_>>().join(", ");
        let key_sql = keys.iter().map(|k| (*k).to_owned()).collect::<Vec<_>>().join(" || '/' || ");
        let sql = format!("SELECT {shown} FROM {table} WHERE {key_sql} = ?1");
        let mut statement = app.prepare_cached(&sql).unwrap();
        let mut rows = statement.query([key]).unwrap();
        let row = rows.next().unwrap()?;
        Some(values.iter().enumerate().map(|(i, v)| ((*v).to_owned(), row.get(i).unwrap())).collect())
    }

    /// What was pending became this commit.
    pub fn commit(&mut self, version: Version, n: u64, pending: Vec<Pending>) {
        let mut by_row: BTreeMap<(&'static str, String), Vec<Pending>> = BTreeMap::new();
        for p in pending {
            by_row.entry((p.table, p.key.clone())).or_default().push(p);
        }
        for ((table, key), all) in by_row {
            let seen = all[0].seen.clone();
            assert!(
                all.iter().all(|p| p.seen == seen),
                "rows came between writes that were absorbed at once"
            );
            let (mut born, mut dead, mut changed) = (false, false, BTreeSet::new());
            for p in &all {
                match p.what {
                    Effect::Insert => (born, dead, changed) = (true, false, p.changed.clone()),
                    Effect::Update => changed.extend(p.changed.iter().cloned()),
                    Effect::Delete => dead = true,
                }
            }
            let mut values = all.last().and_then(|p| p.after.clone()).unwrap_or_default();
            if !born {
                values.retain(|name, _| changed.contains(name));
                if values.is_empty() && !dead {
                    continue;
                }
            }
            let probe = Event { version, n, seen, table, key, birth: version, dead, values };
            let known = self.row_of(table, &probe.key, |e| probe.saw(e)).birth;
            let birth = if born { version } else { known.unwrap_or(Version::ZERO) };
            self.events.push(Event { birth, ..probe });
        }
    }

    fn of_row<'a>(&'a self, table: &'a str, key: &'a str) -> impl Iterator<Item = &'a Event> {
        self.events.iter().filter(move |e| e.table == table && e.key == key)
    }

    /// A row as those of its events make it that are known: the rules of merging, said once more.
    fn row_of(&self, table: &str, key: &str, known: impl Fn(&Event) -> bool) -> Row {
        let events: Vec<&Event> = self.of_row(table, key).filter(|e| known(e)).collect();
        let adopted = (table == "cell" && key == "1").then_some(Version::ZERO);
        let birth = events.iter().map(|e| e.birth).max().or(adopted);
        let of_birth = || events.iter().filter(|e| Some(e.birth) == birth);
        let mut row = Row { birth, dead: of_birth().any(|e| e.dead), columns: BTreeMap::new() };
        if birth == Some(Version::ZERO) {
            row.columns.insert("a".to_owned(), (Version::ZERO, "0".to_owned()));
            row.columns.insert("b".to_owned(), (Version::ZERO, "'adopted'".to_owned()));
        }
        for e in of_birth() {
            for (name, value) in &e.values {
                let entry = row.columns.entry(name.clone()).or_insert((e.version, value.clone()));
                if entry.0 < e.version {
                    *entry = (e.version, value.clone());
                }
            }
        }
        row
    }

    /// Compares a file, which holds this vector, with the truth.
    pub fn check(&self, app: &Connection, vector: &Vector) -> Counts {
        let known = |e: &Event| vector.n(e.version.site) >= e.n;
        let rows: BTreeSet<(&str, &str)> =
            self.events.iter().filter(|e| known(e)).map(|e| (e.table, e.key.as_str())).collect();
        let kept = Entries::read(app);
        let mut counts =
            Counts { conflicts: kept.views.len(), children: kept.children.len(), ..Counts::default() };
        for (table, key) in rows {
            let row = self.row_of(table, key, known);
            let expected =
                (!row.dead).then(|| row.columns.iter().map(|(c, v)| (c.clone(), v.1.clone())).collect());
            assert_eq!(Self::row(app, table, key), expected, "{table} {key}: the file and the truth");
            for event in self.of_row(table, key).filter(|e| known(e)) {
                counts.required += self.missed(event, &row, &kept, &known);
            }
        }
        for view in &kept.views {
            self.judge(view);
        }
        self.check_children(&kept, &known);
        counts
    }

    /// Whether each write of an event that was lost is kept; returns how many had to be.
    fn missed(&self, w: &Event, end: &Row, kept: &Entries, known: &impl Fn(&Event) -> bool) -> usize {
        let mut required = 0;
        for (column, value) in &w.values {
            let won = end.birth == Some(w.birth) && !end.dead && end.columns[column].0 == w.version;
            let others = || self.of_row(w.table, &w.key).filter(|e| known(e) && e.version != w.version);
            let beats = |e: &Event| {
                let anew = e.is_insert() && e.birth > w.birth;
                let same = e.birth == w.birth && (e.dead || e.values.contains_key(column));
                anew || same
            };
            let overwritten = others().any(|e| e.saw(w) && beats(e));
            // The same value by a write that had not seen it and beat it: it is there, or is itself what was lost.
            let over = |e: &Event| (e.birth, e.version) > (w.birth, w.version);
            let equal = others().any(|e| e.concurrent(w) && over(e) && e.values.get(column) == Some(value));
            if won || w.dead || overwritten || equal {
                continue;
            }
            required += 1;
            let found = kept.views.iter().any(|v| {
                v.is_of(w) && v.lost.get(column) == Some(&w.version) && v.values.get(column) == Some(value)
            });
            assert!(found, "MISSED: {} {} {column} = {value} of {:?}", w.table, w.key, w.version);
        }
        required
    }

    /// Whether an entry keeps what was lost, to a write that had not seen it.
    fn judge(&self, view: &View) {
        let event = |version: &Version| {
            let found = self.of_row(&view.table, &view.key).find(|e| e.version == *version);
            found.unwrap_or_else(|| panic!("FALSE: {view:?}: nobody wrote {version:?}"))
        };
        let winner = event(&view.winner);
        for (column, version) in &view.lost {
            let loser = event(version);
            assert!(loser.birth == view.birth && winner.concurrent(loser), "FALSE: {view:?}: {column}");
            let beats = (winner.is_insert() && winner.birth > loser.birth)
                || (winner.birth == loser.birth
                    && (winner.dead || (winner.values.contains_key(column) && winner.version > *version)));
            assert!(beats, "FALSE: {view:?}: {column} did not lose to that");
        }
        for (column, value) in &view.values {
            let version = view.versions[column];
            if version != Version::ZERO {
                assert_eq!(event(&version).values.get(column), Some(value), "{view:?}: {column}");
            }
        }
    }

    /// Whether children are written down with the parents that their writers knew.
    fn check_children(&self, kept: &Entries, known: &impl Fn(&Event) -> bool) {
        for w in self.events.iter().filter(|e| e.table != "cell" && known(e)) {
            let by_key = w.table == "line";
            let parent =
                if by_key { w.key.split('/').next() } else { w.values.get("cell").map(String::as_str) };
            let Some(parent) = parent.filter(|_| by_key || w.values.contains_key("cell")) else { continue };
            if by_key && !w.is_insert() {
                continue;
            }
            // The parent may have been inserted in the same commit.
            let saw = |e: &Event| w.saw(e) || w.version == e.version;
            let meant = self.row_of("cell", parent, saw).birth;
            let now = self.row_of("cell", parent, known).birth;
            let lost = kept.rows_lost("cell", parent);
            let links = kept.children.iter();
            let links = links.filter(|c| c.table == w.table && c.key == w.key && c.version == w.version);
            // Of several, the earliest counts.
            let links: Vec<Version> = links.map(|c| c.birth).min().into_iter().collect();
            // The winner's own children are nobody else's. Which of the losers a child belongs to is exact as long as
            // nobody replaced the row by another under its key that he had seen: of such rows a peer may know one only.
            let exact = self.never_replaced("cell", parent, known);
            if Some(&meant) == Some(&now) || (exact && meant.is_some_and(|m| lost.contains(&m))) {
                assert!(
                    links.iter().all(|l| Some(*l) == meant),
                    "FALSE CHILD: {} {} at {:?} of {links:?}, meant {meant:?}, now {now:?}, lost {lost:?}",
                    w.table,
                    w.key,
                    w.version
                );
            }
            let end = self.row_of(w.table, &w.key, known);
            let stands = !end.dead
                && match by_key {
                    true => end.birth == Some(w.version),
                    false => end.columns.get("cell").is_some_and(|c| c.0 == w.version),
                };
            if stands && exact && meant.is_some_and(|m| lost.contains(&m) && Some(m) != now) {
                assert_eq!(
                    links.len(),
                    1,
                    "MISSED CHILD: {} {} of {meant:?}, now {now:?}, lost {lost:?}",
                    w.table,
                    w.key
                );
            }
        }
    }
}

impl Truth {
    /// Whether no row of this key was inserted by anybody who had seen another of it.
    fn never_replaced(&self, table: &str, key: &str, known: &impl Fn(&Event) -> bool) -> bool {
        let inserts = || self.of_row(table, key).filter(|e| known(e) && e.is_insert());
        let adopted = table == "cell" && key == "1";
        !adopted && !inserts().any(|a| inserts().any(|b| a.saw(b)))
    }
}

/// An entry that keeps values.
#[derive(Debug)]
struct View {
    table: String,
    key: String,
    kind: String,
    birth: Version,
    winner: Version,
    lost: BTreeMap<String, Version>,
    versions: BTreeMap<String, Version>,
    values: Values,
}

impl View {
    fn is_of(&self, e: &Event) -> bool {
        self.table == e.table && self.key == e.key && self.birth == e.birth
    }
}

struct ChildEntry {
    table: String,
    key: String,
    birth: Version,
    version: Version,
}

/// What is kept, read by this test's own code.
struct Entries {
    views: Vec<View>,
    children: Vec<ChildEntry>,
}

fn version(text: &str) -> Version {
    litemesh::replica::entry::parse_version(text).unwrap()
}

/// As SQLite's `quote` has it.
fn quoted(value: &Json) -> String {
    match value {
        Json::String(s) => format!("'{s}'"),
        Json::Null => "NULL".to_owned(),
        other => other.to_string(),
    }
}

fn key_of(json: &Json) -> String {
    let parts = json.as_array().unwrap().iter().map(|v| quoted(v).trim_matches('\'').to_owned());
    parts.collect::<Vec<_>>().join("/")
}

impl Entries {
    fn read(app: &Connection) -> Self {
        let mut all = Self { views: Vec::new(), children: Vec::new() };
        let sql = "SELECT tbl, key, kind, birth, loser, winner FROM __litemesh_conflicts";
        let mut statement = app.prepare(sql).unwrap();
        let mut rows = statement.query([]).unwrap();
        while let Some(r) = rows.next().unwrap() {
            let text = |i| r.get::<_, String>(i).unwrap();
            let content: Json = serde_json::from_str(&text(4)).unwrap();
            let (birth, kind) = (version(&text(3)), text(2));
            if kind == "other" {
                continue;
            }
            if kind == "child" {
                all.children.push(ChildEntry {
                    table: content["table"].as_str().unwrap().to_owned(),
                    key: key_of(&content["key"]),
                    birth,
                    version: version(content["version"].as_str().unwrap()),
                });
                continue;
            }
            let versions: BTreeMap<String, Version> = content["versions"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(c, v)| (c.clone(), version(v.as_str().unwrap())))
                .collect();
            let lost = content["lost"].as_array().unwrap().iter().map(|c| c.as_str().unwrap());
            let lost = lost.map(|c| (c.to_owned(), versions[c])).collect();
            let values =
                content["values"].as_object().unwrap().iter().map(|(c, v)| (c.clone(), quoted(v))).collect();
            let key = key_of(&serde_json::from_str(&text(1)).unwrap());
            let winner = version(&text(5));
            all.views.push(View { table: text(0), key, kind, birth, winner, lost, versions, values });
        }
        all
    }

    /// The incarnations of a row that lost whole.
    fn rows_lost(&self, table: &str, key: &str) -> BTreeSet<Version> {
        let rows = self.views.iter().filter(|v| v.table == table && v.key == key && v.kind == "row");
        rows.map(|v| v.birth).collect()
    }
}
