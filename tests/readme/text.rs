//! README as text: its sections, fenced blocks and tables.

use std::path::{Path, PathBuf};

/// The repository's directory.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

pub fn readme() -> String {
    std::fs::read_to_string(root().join("README.md")).unwrap()
}

/// A fenced block: what stands behind the fence, and its lines.
pub struct Block {
    pub kind: String,
    pub lines: Vec<String>,
}

/// The text under the heading, to the next one of the same or a higher level.
pub fn section(heading: &str) -> String {
    let level = heading.split(' ').next().unwrap();
    let all = readme();
    let mut lines = all.lines().skip_while(|l| *l != heading);
    assert!(lines.next().is_some(), "README has no {heading:?}");
    let mut in_block = false;
    let inside = lines.take_while(|l| {
        in_block ^= l.starts_with("```");
        let hashes = l.split(' ').next().unwrap_or_default();
        let is_heading = !in_block && !hashes.is_empty() && hashes.chars().all(|c| c == '#');
        !(is_heading && hashes.len() <= level.len())
    });
    inside.map(|l| format!("{l}\n")).collect()
}

/// The fenced blocks of a text.
pub fn blocks(text: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut open = false;
    for line in text.lines() {
        match line.strip_prefix("```") {
            Some(_) if open => open = false,
            Some(kind) => {
                open = true;
                found.push(Block { kind: kind.to_owned(), lines: Vec::new() });
            }
            None if open => found.last_mut().unwrap().lines.push(line.to_owned()),
            None => {}
        }
    }
    assert!(!open, "a fence is not closed");
    found
}

/// The rows of the table whose first row begins with these titles; cells without their spaces.
pub fn table(titles: &[&str]) -> Vec<Vec<String>> {
    let head = format!("| {} |", titles.join(" | "));
    let all = readme();
    let mut lines = all.lines().skip_while(|l| *l != head);
    assert!(lines.next().is_some(), "README has no table {head:?}");
    let rows = lines.skip(1).take_while(|l| l.starts_with('|'));
    let cells = |l: &str| {
        let inner = l.trim_matches('|').replace("\\|", "\u{1}");
        inner.split('|').map(|c| c.trim_matches(' ').replace('\u{1}', "|")).collect::<Vec<_>>()
    };
    let rows: Vec<_> = rows.map(cells).collect();
    assert!(rows.iter().all(|r| r.len() == titles.len()), "a row of {head:?} has other cells: {rows:?}");
    rows
}

/// What stands between backticks, outside fenced blocks.
pub fn code_spans(text: &str) -> Vec<String> {
    let mut in_block = false;
    let prose = text.lines().filter(|l| {
        let fence = l.starts_with("```");
        in_block ^= fence;
        !in_block && !fence
    });
    let prose = prose.collect::<Vec<_>>().join("\n");
    prose.split('`').skip(1).step_by(2).map(|s| s.replace('\n', " ")).collect()
}

/// The words of a text that begin with `prefix`, with what may belong to such a word.
pub fn words(text: &str, prefix: &str) -> std::collections::BTreeSet<String> {
    let belongs = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let starts = text.match_indices(prefix).map(|(at, _)| at);
    let whole = starts.filter(|at| !text[..*at].ends_with(belongs));
    let word = |at: usize| text[at..].chars().take_while(|c| belongs(*c)).collect::<String>();
    whole.map(word).filter(|w| w.len() > prefix.len()).collect()
}

/// Whether a line is as shown, where `…` stands for anything.
pub fn matches(shown: &str, line: &str) -> bool {
    let mut parts = shown.split('…');
    let first = parts.next().unwrap();
    let Some(mut rest) = line.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[test]
fn the_scanners_find_what_they_look_for() {
    assert!(matches("a … c … e", "a b c d e") && matches("…", "") && matches("x", "x"));
    assert!(!matches("a … c", "a b") && !matches("x", "xy") && !matches("…y", "x"));
    let found = blocks("one\n```sh\nls\n```\ntwo\n```\nx\ny\n```\n");
    assert_eq!((found.len(), found[0].kind.as_str(), found[1].lines.len()), (2, "sh", 2));
    assert_eq!(words("`--a-b` x--no --c,", "--").into_iter().collect::<Vec<_>>(), ["--a-b", "--c"]);
    assert_eq!(code_spans("a `b` c\n```\n`no`\n```\n`d e`"), ["b", "d e"]);
}
