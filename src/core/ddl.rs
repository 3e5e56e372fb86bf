//! What a `CREATE TABLE` text is made of, and when two pieces of DDL mean the same. Invariant: names in whatever
//! quotes or case, white space, comments and the spelling of a type never make a difference; keys, affinities,
//! defaults and constraints do.

use super::schema::Affinity;
use super::sqltext::{Kind, Token, ident, list, tokens};

/// Words that begin a constraint of a table.
const TABLE_CONSTRAINTS: [&str; 5] = ["CONSTRAINT", "PRIMARY", "UNIQUE", "CHECK", "FOREIGN"];
/// Words that begin a constraint of a column, and so end its type.
const COLUMN_CONSTRAINTS: [&str; 11] = [
    "CONSTRAINT",
    "PRIMARY",
    "NOT",
    "NULL",
    "UNIQUE",
    "CHECK",
    "DEFAULT",
    "COLLATE",
    "REFERENCES",
    "GENERATED",
    "AS",
];

/// The parts of a `CREATE TABLE` text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableDdl {
    /// Its columns: name and definition, which begins with the name.
    pub columns: Vec<(String, String)>,
    /// Constraints of the whole table, as written.
    pub constraints: Vec<String>,
    /// What stands behind the closing parenthesis: `STRICT`, `WITHOUT ROWID`.
    pub options: String,
}

/// Takes a `CREATE TABLE` text apart, as `sqlite_schema` has it; `None` if it is none.
pub fn parse_table(sql: &str) -> Option<TableDdl> {
    let all = tokens(sql);
    let open = all.iter().position(|t| t.kind == Kind::Punctuation && t.text == "(")?;
    let (mut depth, mut items, mut item, mut end) = (0, Vec::new(), Vec::new(), None);
    for (i, t) in all.iter().enumerate().skip(open) {
        let punctuation = t.kind == Kind::Punctuation;
        match t.text {
            "(" if punctuation => depth += 1,
            ")" if punctuation => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            end = Some(i);
            break;
        }
        if depth == 1 && punctuation && t.text == "," {
            items.push(std::mem::take(&mut item));
        } else if i > open {
            item.push(*t);
        }
    }
    items.push(item);
    let mut table = TableDdl { options: text(&all[end? + 1..]), ..TableDdl::default() };
    for item in items {
        let first = item.iter().find(|t| t.kind != Kind::Space)?;
        if TABLE_CONSTRAINTS.iter().any(|w| first.is_keyword(w)) {
            table.constraints.push(text(&item));
        } else {
            table.columns.push((first.name(), text(&item)));
        }
    }
    Some(table)
}

/// The tokens as one text that fits on one line: what was white space or a comment is one space.
fn text(all: &[Token<'_>]) -> String {
    let parts = all.iter().map(|t| if t.kind == Kind::Space { " " } else { t.text });
    parts.collect::<String>().trim().to_owned()
}

/// A `CREATE TABLE` text of these parts.
pub fn create_table(name: &str, columns: &[&str], constraints: &[String], options: &str) -> String {
    let parts = columns.iter().copied().chain(constraints.iter().map(String::as_str));
    format!("CREATE TABLE {}({}) {options}", ident(name), list(parts, str::to_owned)).trim_end().to_owned()
}

/// The tokens that mean something, names without quotes and in lower case, separated by spaces.
pub fn normal(sql: &str) -> String {
    let solid = tokens(sql).into_iter().filter(|t| t.kind != Kind::Space && t.text != ";");
    let words = solid.map(|t| match t.kind {
        Kind::Word => t.name().to_lowercase(),
        _ => t.text.to_owned(),
    });
    words.collect::<Vec<_>>().join(" ")
}

/// What a column's definition means: two definitions with one shape agree.
pub fn column_shape(definition: &str) -> String {
    let all: Vec<Token<'_>> = tokens(definition).into_iter().filter(|t| t.kind != Kind::Space).collect();
    let rest = all.get(1..).unwrap_or_default();
    let ends = |t: &Token<'_>| COLUMN_CONSTRAINTS.iter().any(|w| t.is_keyword(w));
    let at = rest.iter().position(ends).unwrap_or(rest.len());
    let declared = rest[..at].iter().map(Token::name).collect::<Vec<_>>().join(" ");
    let constraints = rest[at..].iter().map(|t| t.text).collect::<Vec<_>>().join(" ");
    let key = constraints.to_ascii_uppercase().contains("PRIMARY");
    // `INTEGER PRIMARY KEY` is the rowid, `INT PRIMARY KEY` is not.
    let rowid = key && declared.eq_ignore_ascii_case("INTEGER");
    format!(
        "{:?}{} {}",
        Affinity::of(&declared, false),
        if rowid { " rowid" } else { "" },
        normal(&constraints)
    )
}

/// What a table's constraints and options mean, apart from its columns.
pub fn table_shape(constraints: &[String], options: &str) -> String {
    let mut parts: Vec<String> = constraints.iter().map(|c| normal(c)).collect();
    parts.sort();
    let mut options: Vec<String> = options.split(',').map(normal).collect();
    options.sort();
    format!("{} / {}", parts.join(", "), options.join(", "))
}

/// The table or view that a `CREATE INDEX` or `CREATE TRIGGER` text is about.
pub fn on_table(sql: &str) -> Option<String> {
    let all = tokens(sql);
    let solid: Vec<&Token<'_>> = all.iter().filter(|t| t.kind != Kind::Space).collect();
    let on = solid.iter().position(|t| t.is_keyword("ON"))?;
    let qualified = solid.get(on + 2).is_some_and(|t| t.text == ".");
    Some(solid.get(on + if qualified { 3 } else { 1 })?.name())
}

/// Whether a default, as `pragma_table_xinfo` tells it, is the same whenever it is evaluated.
pub fn is_constant(default: &str) -> bool {
    let all = tokens(default);
    let mut solid = all.iter().filter(|t| t.kind != Kind::Space && !["+", "-", "(", ")"].contains(&t.text));
    solid.all(|t| {
        t.kind == Kind::Literal
            || ["NULL", "TRUE", "FALSE"].iter().any(|w| t.is_keyword(w))
            || t.text.starts_with('"')
    })
}

/// The names that columns have in an update trigger of ours, by the numbers that its comments give.
pub fn numbered_columns(trigger: &str) -> Vec<(u32, String)> {
    let all = tokens(trigger);
    let solid: Vec<&Token<'_>> =
        all.iter().filter(|t| t.kind != Kind::Space || t.text.starts_with("/*")).collect();
    let mut found = Vec::new();
    for (i, t) in solid.iter().enumerate() {
        let number = t.text.strip_prefix("/*").and_then(|t| t.strip_suffix("*/"));
        let Some(number) = number.and_then(|n| n.parse().ok()) else { continue };
        let mut after = solid[i + 1..].iter().skip_while(|t| t.text == "(");
        if let (Some(old), Some(dot), Some(name)) = (after.next(), after.next(), after.next())
            && old.is_keyword("OLD")
            && dot.text == "."
        {
            found.push((number, name.name()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_comes_apart_and_together() {
        let sql = "CREATE TABLE \"a(b\" (id INTEGER PRIMARY KEY, -- the key\n [x,y] TEXT DEFAULT 'a,b)' , n DECIMAL(10, 2)
            CHECK (n > (1)), CONSTRAINT u UNIQUE(n), FOREIGN KEY(n) REFERENCES o(p)) WITHOUT ROWID, STRICT";
        let table = parse_table(sql).unwrap();
        assert_eq!(table.columns.iter().map(|c| c.0.as_str()).collect::<Vec<_>>(), ["id", "x,y", "n"]);
        assert_eq!(table.columns[1].1, "[x,y] TEXT DEFAULT 'a,b)'");
        assert_eq!(table.constraints.len(), 2);
        assert_eq!(table.options, "WITHOUT ROWID, STRICT");
        let columns: Vec<&str> = table.columns.iter().map(|c| c.1.as_str()).collect();
        let again = create_table("a(b", &columns, &table.constraints, &table.options);
        assert_eq!(parse_table(&again).unwrap(), table);
    }

    #[test]
    fn spelling_makes_no_difference_and_meaning_does() {
        let shape = |d: &str| column_shape(d);
        assert_eq!(shape("\"Name\" varchar(30) NOT NULL"), shape("name VARCHAR( 99 )  not null"));
        assert_eq!(shape("a TEXT DEFAULT 'x'"), shape("[a] text default /* so */ 'x'"));
        assert_ne!(shape("a TEXT DEFAULT 'x'"), shape("a TEXT DEFAULT 'y'"));
        assert_ne!(shape("a TEXT"), shape("a INTEGER"));
        assert_ne!(shape("a INTEGER PRIMARY KEY"), shape("a INT PRIMARY KEY"));
        assert_eq!(table_shape(&[], "STRICT, WITHOUT ROWID"), table_shape(&[], "without rowid,strict"));
    }

    #[test]
    fn a_default_is_constant_or_not() {
        for (text, constant) in [
            ("'a'", true),
            ("-5", true),
            ("NULL", true),
            ("(1)", true),
            ("CURRENT_TIMESTAMP", false),
            ("(random())", false),
        ] {
            assert_eq!(is_constant(text), constant, "{text}");
        }
    }
}
