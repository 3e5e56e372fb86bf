//! Reading Rust sources just well enough for the rules. Invariant: what is blanked keeps its lines, so that places are
//! those of the file.

/// The code with comments, strings and characters blanked; lines stay where they are.
pub fn code_of(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out: Vec<char> = Vec::with_capacity(chars.len());
    let mut at = 0;
    while at < chars.len() {
        let end = skipped(&chars, at);
        if end > at {
            out.extend(chars[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        } else {
            out.push(chars[at]);
            at += 1;
        }
    }
    out.into_iter().collect()
}

/// The end of the comment or literal that begins at `at`; `at` if none does.
fn skipped(chars: &[char], at: usize) -> usize {
    let is = |i: usize, c: char| chars.get(i) == Some(&c);
    let word = |i: usize| chars.get(i).is_some_and(|c| c.is_alphanumeric() || *c == '_');
    match chars[at] {
        '/' if is(at + 1, '/') => (at..chars.len()).find(|i| is(*i, '\n')).unwrap_or(chars.len()),
        '/' if is(at + 1, '*') => block_comment(chars, at),
        '"' => string_end(chars, at + 1),
        'r' if at == 0 || !word(at - 1) || is(at - 1, 'b') => raw_string_end(chars, at).unwrap_or(at),
        // A character, unless it is a lifetime.
        '\'' if is(at + 1, '\\') => {
            (at + 3..chars.len()).find(|i| is(*i, '\'')).map_or(chars.len(), |i| i + 1)
        }
        '\'' if is(at + 2, '\'') => at + 3,
        _ => at,
    }
}

fn block_comment(chars: &[char], at: usize) -> usize {
    let (mut depth, mut i) = (0, at);
    while i + 1 < chars.len() {
        match (chars[i], chars[i + 1]) {
            ('/', '*') => (depth, i) = (depth + 1, i + 2),
            ('*', '/') => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            return i;
        }
    }
    chars.len()
}

fn string_end(chars: &[char], mut i: usize) -> usize {
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    chars.len()
}

fn raw_string_end(chars: &[char], at: usize) -> Option<usize> {
    let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
    let open = at + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let closes = |i: &usize| {
        chars[*i] == '"' && chars[i + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes
    };
    Some((open + 1..chars.len()).find(closes).map_or(chars.len(), |i| i + 1 + hashes))
}

/// Where `word` stands by itself in `code`, as byte offsets.
pub fn words<'c>(code: &'c str, word: &'c str) -> impl Iterator<Item = usize> + 'c {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .map(|(i, _)| i)
        .filter(move |i| !code[..*i].ends_with(part) && !code[i + word.len()..].starts_with(part))
}

pub fn line_of(code: &str, at: usize) -> usize {
    1 + code[..at].matches('\n').count()
}

/// The end of the item that begins at `at`: its closing brace, or its semicolon.
fn item_end(code: &str, at: usize) -> usize {
    let (mut nested, mut braces) = (0, 0);
    for (i, c) in code[at..].char_indices() {
        match c {
            '(' | '[' => nested += 1,
            ')' | ']' => nested -= 1,
            '{' => braces += 1,
            '}' => braces -= 1,
            _ => {}
        }
        if nested == 0 && braces == 0 && (c == ';' || c == '}') {
            return at + i + 1;
        }
    }
    code.len()
}

/// The code without what is compiled for tests only.
pub fn without_tests(code: &str) -> String {
    let mut out = code.to_owned();
    while let Some(at) = out.find("#[cfg(test)]") {
        let end = item_end(&out, at + "#[cfg(test)]".len());
        let blank: String = out[at..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        out.replace_range(at..end, &blank);
    }
    out
}

/// Functions with bodies: line, name, how many lines.
pub fn functions(code: &str) -> Vec<(usize, String, usize)> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let each = |at: usize| {
        let rest = code[at + 2..].trim_start();
        let name: String = rest.chars().take_while(|c| is_name(*c)).collect();
        // A type `fn(..)` has no name.
        let body = &code[at..item_end(code, at)];
        (!name.is_empty()).then(|| (line_of(code, at), name, 1 + body.matches('\n').count()))
    };
    words(code, "fn").filter_map(each).collect()
}

/// The first two parts of every path that begins with `crate::`, whether alone or in braces.
pub fn crate_paths(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for at in words(code, "crate") {
        if let Some(tree) = code[at + "crate".len()..].trim_start().strip_prefix("::") {
            found.extend(tree_paths(tree, 2).into_iter().map(|p| (line_of(code, at), p)));
        }
    }
    found
}

/// The paths of a use tree, cut after `depth` parts.
fn tree_paths(tree: &str, depth: usize) -> Vec<String> {
    let tree = tree.trim_start();
    if depth == 0 {
        return vec![String::new()];
    }
    if let Some(group) = tree.strip_prefix('{') {
        let mut found = Vec::new();
        let (mut level, mut start) = (0, 0);
        for (i, c) in group.char_indices() {
            match c {
                '{' => level += 1,
                ',' | '}' if level == 0 => {
                    if !group[start..i].trim().is_empty() {
                        found.extend(tree_paths(&group[start..i], depth));
                    }
                    start = i + 1;
                    if c == '}' {
                        break;
                    }
                }
                '}' => level -= 1,
                _ => {}
            }
        }
        return found;
    }
    let name: String = tree.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    match tree[name.len()..].trim_start().strip_prefix("::") {
        Some(rest) => {
            let join = |p: String| if p.is_empty() { name.clone() } else { format!("{name}::{p}") };
            tree_paths(rest, depth - 1).into_iter().map(join).collect()
        }
        None => vec![name],
    }
}

/// Paths that climb by `super::` to the top of the crate, from a file so deep in it.
pub fn climbing_paths(code: &str, depth: usize) -> Vec<(usize, String)> {
    let climb = "super::".repeat(depth.max(1));
    let starts = code.match_indices(&climb).filter(|(i, _)| !code[..*i].ends_with("super::"));
    let each = |(i, _): (usize, &str)| {
        let tree = code[i..].trim_start_matches("super::");
        tree_paths(tree, 2).into_iter().map(move |p| (line_of(code, i), p)).collect::<Vec<_>>()
    };
    starts.flat_map(each).collect()
}

/// How many modules deep a file is: 1 for `src/core/mod.rs`, 2 for `src/core/merge.rs`.
pub fn depth_of(path: &str) -> usize {
    let parts = path.matches('/').count();
    if path.ends_with("/mod.rs") { parts - 1 } else { parts }
}

pub fn may_import(allowed: &[&str], own: &str, path: &str) -> bool {
    let under = |a: &str| path == a || path.strip_prefix(a).is_some_and(|rest| rest.starts_with("::"));
    under(own) || allowed.iter().any(|a| under(a))
}

/// Tests that are not run.
pub fn ignored(code: &str) -> Vec<(usize, String)> {
    let in_attribute = |at: &usize| {
        let line = code[..*at].rsplit('\n').next().unwrap_or_default();
        line.trim_start().starts_with("#[")
    };
    words(code, "ignore")
        .filter(in_attribute)
        .map(|at| (line_of(code, at), "an ignored test".to_owned()))
        .collect()
}

mod scanning {
    use super::*;

    #[test]
    fn comments_and_literals_are_no_code() {
        let text = "a /* b /* c */ d */ \"e\\\"f\" 'g' '\\'' r#\"h\"i\"# b\"j\" br\"k\" // l\n'm: &'n str";
        let code: String = code_of(text).split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(code, "a b b 'm: &'n str");
        assert_eq!(code_of("\"x\ny\"\nz").lines().count(), 3);
    }

    #[test]
    fn long_functions_are_seen() {
        let code = "fn a(x: [u8; 2]) -> u8 {\n\n}\ntrait T { fn b(); }\ntype F = fn(u8) -> u8;\nfn c() {}";
        assert_eq!(functions(code), [(1, "a".into(), 3), (4, "b".into(), 1), (6, "c".into(), 1)]);
    }

    #[test]
    fn tests_do_not_count() {
        let code =
            "fn a() {}\n#[cfg(test)]\nmod tests {\n fn b() {}\n}\nfn c() {}\n#[cfg(test)]\nmod x;\nfn d() {}";
        let names: Vec<String> = functions(&without_tests(code)).into_iter().map(|f| f.1).collect();
        assert_eq!(names, ["a", "c", "d"]);
    }

    #[test]
    fn imports_are_seen_in_every_form() {
        let code = "use crate::core::names::X;\nuse crate::{core::{a, b::c}, sqlite};\nfn f() { crate :: fabric::nats::g() }";
        let paths: Vec<String> = crate_paths(code).into_iter().map(|(_, p)| p).collect();
        assert_eq!(paths, ["core::names", "core::a", "core::b", "sqlite", "fabric::nats"]);
        let code = "use super::merge; use super::super::sqlite::open;";
        assert_eq!(climbing_paths(code, 2), [(1, "sqlite::open".to_owned())]);
        assert_eq!((depth_of("src/core/mod.rs"), depth_of("src/core/merge.rs")), (1, 2));
    }

    #[test]
    fn the_table_is_applied_by_whole_names() {
        assert!(may_import(&["core", "fabric::link"], "replica", "fabric::link"));
        assert!(may_import(&["core"], "replica", "replica::plan"));
        assert!(!may_import(&["core", "fabric::link"], "replica", "fabric"));
        assert!(!may_import(&["core", "fabric::link"], "replica", "fabric::linked"));
        assert!(!may_import(&["core"], "sqlite", "core2::x"));
    }

    #[test]
    fn ignored_tests_are_seen() {
        for code in ["#[ignore]", "  #[ignore = x]", "#[cfg_attr(unix, ignore)]"] {
            assert_eq!(ignored(code).len(), 1, "{code}");
        }
        assert!(ignored("fn ignore() {}\n#[ignored_by]").is_empty());
    }

    #[test]
    fn words_are_whole() {
        assert_eq!(words("unsafe_code unsafe x_unsafe", "unsafe").collect::<Vec<_>>(), [12]);
    }
}
