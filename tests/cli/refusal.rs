//! What every refusal has in common: an exit code, a message that helps, no process and no change left behind.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::support::{Node, PATIENCE};

/// A file in rollback-journal mode, so that its bytes tell whether anything was changed.
pub const SCHEMA: &str = "CREATE TABLE t(id TEXT PRIMARY KEY NOT NULL, v); INSERT INTO t VALUES('mine', 1)";

/// Runs `command`, which must end by itself with this exit code and a message with all these parts; returns it.
pub fn refused(mut command: Command, code: i32, parts: &[&str]) -> String {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    let (text, out) =
        (String::from_utf8_lossy(&output.stderr).into_owned(), String::from_utf8_lossy(&output.stdout));
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(!out.lines().any(|l| l == "ready"), "{out}");
    let told = text.lines().last().unwrap_or_default();
    assert!(told.starts_with("litemesh: ") || code == 2, "the last line is the message: {text}");
    for part in parts {
        assert!(told.contains(part), "{part:?} is missing in: {text}");
    }
    let secrets =
        text.match_indices("lm1-").filter(|(at, _)| text[at + 4..].starts_with(char::is_alphanumeric));
    assert!(!text.contains("panicked") && secrets.count() == 0, "{text}");
    text
}

/// The same for `up` of a node whose file is there: it is byte for byte as before, and no process is left.
pub fn up_refused(node: &Node, token: Option<&str>, parts: &[&str]) -> String {
    up_refused_with(node, node.up_command(token), 1, parts)
}

pub fn up_refused_with(node: &Node, command: Command, code: i32, parts: &[&str]) -> String {
    let file = node.file("app.db");
    let before = std::fs::read(&file).ok();
    let text = refused(command, code, parts);
    assert_eq!(std::fs::read(&file).ok(), before, "the file was changed");
    assert_no_process(&node.home);
    for entry in std::fs::read_dir(&node.home).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        assert!(!name.contains("litemesh-join"), "{name} is left");
    }
    text
}

/// No process of this node's is left.
pub fn assert_no_process(home: &Path) {
    let left = processes(home.to_str().unwrap());
    assert!(left.is_empty(), "left running: {left:?}");
}

/// The command lines, by process id, that name `text`. Empty where there is no /proc.
pub fn processes(text: &str) -> Vec<(u32, String)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(text).then_some((pid, line))
    })
    .collect()
}
