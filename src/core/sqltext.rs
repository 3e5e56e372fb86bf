//! SQL text: quoting, and just enough of SQLite's lexical rules to rewrite what applications wrote.
//! Invariant: whatever the names hold, the text made here means what it should.

/// An identifier in double quotes.
pub fn ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text literal in single quotes.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// `f` of every item, separated by commas.
pub fn list<T>(items: impl IntoIterator<Item = T>, f: impl FnMut(T) -> String) -> String {
    items.into_iter().map(f).collect::<Vec<_>>().join(", ")
}

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A bare or quoted identifier, or a keyword.
    Word,
    /// White space or a comment.
    Space,
    /// A string, blob or number literal.
    Literal,
    /// Anything else, one character.
    Punctuation,
}

/// One token of a SQL text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token<'a> {
    /// What it is.
    pub kind: Kind,
    /// Its text as written.
    pub text: &'a str,
}

impl Token<'_> {
    /// Whether this is the bare keyword `word` (given in upper case).
    pub fn is_keyword(&self, word: &str) -> bool {
        self.kind == Kind::Word && self.text.eq_ignore_ascii_case(word)
    }

    /// The name that a word stands for, without its quotes.
    pub fn name(&self) -> String {
        // A quote that is not closed is an error to SQLite, but not to be relied on here: peers send such texts too.
        let inner = |end: char| {
            let text = &self.text[1..];
            text.strip_suffix(end).unwrap_or(text)
        };
        match self.text.chars().next() {
            Some(q @ ('"' | '`')) => inner(q).replace(&String::from_iter([q, q]), &q.to_string()),
            Some('[') => inner(']').to_owned(),
            _ => self.text.to_owned(),
        }
    }
}

/// Splits a SQL text into its tokens; joined again they are the text.
pub fn tokens(sql: &str) -> Vec<Token<'_>> {
    let mut out = Vec::new();
    let mut rest = sql;
    while let Some(first) = rest.chars().next() {
        let (kind, len) = token(first, rest);
        out.push(Token { kind, text: &rest[..len] });
        rest = &rest[len..];
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '$' || !c.is_ascii()
}

fn token(first: char, rest: &str) -> (Kind, usize) {
    let run = |f: &dyn Fn(char) -> bool| rest.find(|c| !f(c)).unwrap_or(rest.len());
    let until = |end: &str| rest[2..].find(end).map_or(rest.len(), |i| i + 2 + end.len());
    match first {
        c if c.is_whitespace() => (Kind::Space, run(&char::is_whitespace)),
        '-' if rest.starts_with("--") => (Kind::Space, until("\n")),
        '/' if rest.starts_with("/*") => (Kind::Space, until("*/")),
        '\'' => (Kind::Literal, quoted(rest, '\'')),
        'x' | 'X' if rest[1..].starts_with('\'') => (Kind::Literal, 1 + quoted(&rest[1..], '\'')),
        '"' | '`' => (Kind::Word, quoted(rest, first)),
        '[' => (Kind::Word, rest.find(']').map_or(rest.len(), |i| i + 1)),
        c if c.is_ascii_digit() => (Kind::Literal, run(&|c| is_word(c) || c == '.')),
        c if is_word(c) => (Kind::Word, run(&is_word)),
        c => (Kind::Punctuation, c.len_utf8()),
    }
}

fn quoted(rest: &str, quote: char) -> usize {
    let mut chars = rest.char_indices().skip(1).peekable();
    while let Some((i, c)) = chars.next() {
        if c == quote {
            match chars.peek() {
                Some((_, next)) if *next == quote => {
                    chars.next();
                }
                _ => return i + 1,
            }
        }
    }
    rest.len()
}

/// The expression with every mention of one of `columns` replaced by `prefix."column"`.
pub fn with_row(expression: &str, columns: &[&str], prefix: &str) -> String {
    let all = tokens(expression);
    let solid: Vec<usize> = (0..all.len()).filter(|i| all[*i].kind != Kind::Space).collect();
    let mut out: Vec<String> = all.iter().map(|t| t.text.to_owned()).collect();
    for (at, &i) in solid.iter().enumerate() {
        let neighbour = |step: isize| solid.get(at.wrapping_add_signed(step)).map(|i| all[*i]);
        let after_dot_or_collate = neighbour(-1).is_some_and(|t| t.text == "." || t.is_keyword("COLLATE"));
        let called = neighbour(1).is_some_and(|t| t.text == "(");
        if all[i].kind != Kind::Word || (at > 0 && after_dot_or_collate) || called {
            continue;
        }
        let name = all[i].name();
        if let Some(column) = columns.iter().find(|c| c.eq_ignore_ascii_case(&name)) {
            out[i] = format!("{prefix}.{}", ident(column));
        }
    }
    out.concat()
}

/// The terms and the WHERE clause of a `CREATE INDEX` text, as written.
pub fn index_parts(sql: &str) -> Option<(Vec<String>, Option<String>)> {
    let all = tokens(sql);
    let on = all.iter().position(|t| t.is_keyword("ON"))?;
    let open = on + all[on..].iter().position(|t| t.text == "(")?;
    let (mut depth, mut terms, mut term, mut end) = (0, Vec::new(), String::new(), all.len());
    for (i, t) in all.iter().enumerate().skip(open) {
        match t.text {
            "(" if t.kind == Kind::Punctuation => depth += 1,
            ")" if t.kind == Kind::Punctuation => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            end = i;
            break;
        }
        if depth == 1 && t.text == "," {
            terms.push(std::mem::take(&mut term));
        } else if i > open {
            term.push_str(t.text);
        }
    }
    terms.push(term);
    let rest = &all[(end + 1).min(all.len())..];
    let condition = rest.iter().position(|t| t.is_keyword("WHERE"));
    let condition = condition.map(|i| rest[i + 1..].iter().map(|t| t.text).collect::<String>());
    Some((terms.iter().map(|t| without_direction(t)).collect(), condition))
}

/// An index term without its ASC or DESC.
fn without_direction(term: &str) -> String {
    let trimmed = term.trim();
    for direction in ["ASC", "DESC"] {
        let all = tokens(trimmed);
        if all.len() > 1 && all.last().is_some_and(|t| t.is_keyword(direction)) {
            return trimmed[..trimmed.len() - direction.len()].trim().to_owned();
        }
    }
    trimmed.to_owned()
}

/// A trigger's text from its timing on (`AFTER INSERT ON …`), without `CREATE TRIGGER name`.
pub fn trigger_body(sql: &str) -> Option<&str> {
    let all = tokens(sql);
    let mut at = 0;
    let mut offset = 0;
    let mut next = || {
        while let Some(t) = all.get(at) {
            at += 1;
            offset += t.text.len();
            if t.kind != Kind::Space {
                return Some((*t, offset));
            }
        }
        None
    };
    while !next()?.0.is_keyword("TRIGGER") {}
    let (mut name, mut end) = next()?;
    if name.is_keyword("IF") {
        next()?;
        next()?;
        (name, end) = next()?;
    }
    debug_assert_eq!(name.kind, Kind::Word);
    // A schema may stand before the name.
    if let Some((dot, _)) = next()
        && dot.text == "."
    {
        end = next()?.1;
    }
    Some(sql[end..].trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_survives_quotes() {
        assert_eq!(ident("a\"b"), "\"a\"\"b\"");
        assert_eq!(literal("it's"), "'it''s'");
    }

    #[test]
    fn tokens_joined_are_the_text() {
        for sql in
            ["select 'a''b', \"c\"\"d\" /* x */ from [t 1] -- end\n where x'00'=1.5e3", "", "'open", "ä+`ö`"]
        {
            assert_eq!(tokens(sql).iter().map(|t| t.text).collect::<String>(), sql);
        }
    }

    #[test]
    fn columns_in_expressions_are_found() {
        let columns = ["name", "lower", "a b"];
        let expression = "lower(Name) || x.name || 'name' COLLATE name || \"a b\"";
        let expected = "lower(NEW.\"name\") || x.name || 'name' COLLATE name || NEW.\"a b\"";
        assert_eq!(with_row(expression, &columns, "NEW"), expected);
    }

    #[test]
    fn index_terms_and_conditions_are_found() {
        let sql = "CREATE UNIQUE INDEX \"i(x\" ON t(lower(a), b COLLATE NOCASE DESC) WHERE c > 0";
        let (terms, condition) = index_parts(sql).unwrap();
        assert_eq!(terms, ["lower(a)", "b COLLATE NOCASE"]);
        assert_eq!(condition.unwrap().trim(), "c > 0");
    }

    #[test]
    fn a_triggers_body_follows_its_name() {
        assert_eq!(
            trigger_body("CREATE TRIGGER a AFTER INSERT ON t BEGIN").unwrap(),
            "AFTER INSERT ON t BEGIN"
        );
        let sql = "create trigger if not exists main.\"x y\"\n after update of c on t";
        assert_eq!(trigger_body(sql).unwrap(), "after update of c on t");
    }
}
