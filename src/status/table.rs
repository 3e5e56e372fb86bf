//! The snapshot as text for a terminal. Invariant: no line is wider than the width given as long as the names fit,
//! and nothing a peer or a file sends reaches the terminal as a control character.

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, Width, presets};

use super::model::{CatchingUp, DatabaseStatus, FabricStatus, PeerStatus, Status, Verified};

/// The width used when the terminal does not tell its own.
pub const DEFAULT_WIDTH: u16 = 80;
/// The width of the words at the left of the first lines.
const LABEL_WIDTH: u16 = 10;
/// How many events of a file are shown, the newest.
const EVENTS_SHOWN: usize = 3;

/// The status as lines of text.
pub fn render(status: &Status, width: u16) -> String {
    let mut out = summary(status, width);
    if !status.peers.is_empty() {
        out.push_str(&peers(&status.peers, width));
    }
    if !status.databases.is_empty() {
        out.push_str(&databases(&status.databases, width));
    }
    out.push_str(&notes(&status.databases, width));
    out
}

fn summary(status: &Status, width: u16) -> String {
    let mut lines = labelled(width);
    let up = duration(status.uptime_s as f64);
    let who = format!("{} (litemesh {}, pid {}), up {up}", status.node, status.version, status.pid);
    lines.add_row(["node".to_owned(), clean(&who)]);
    match (status.ready, status.not_ready_because.as_slice()) {
        (true, _) => drop(lines.add_row(["ready", "yes"])),
        (false, []) => drop(lines.add_row(["ready", "NO: the node is starting"])),
        (false, reasons) => reasons.iter().for_each(|r| {
            lines.add_row(["ready".to_owned(), format!("NO: {}", clean(r))]);
        }),
    }
    lines.add_row(["fabric".to_owned(), clean(&fabric(&status.fabric))]);
    if !status.fabric.log.copies.is_empty() {
        lines.add_row(["log".to_owned(), clean(&log(&status.fabric))]);
    }
    for warning in &status.warnings {
        lines.add_row(["warning".to_owned(), clean(warning)]);
    }
    finish(&lines)
}

fn fabric(f: &FabricStatus) -> String {
    let log = match f.log_unacked {
        0 => String::new(),
        n => format!("; {n} commits not in the log yet"),
    };
    if f.external {
        return match f.connected {
            true => format!("NATS system at {} (nats-server {}){log}", f.client_url, f.server_version),
            false => format!("NOT connected to the NATS system at {}; writes go on locally", f.client_url),
        };
    }
    if !f.connected {
        return format!(
            "NOT connected to the bundled nats-server {}; writes go on locally",
            f.server_version
        );
    }
    let routes = if f.routes.is_empty() { "no other server".to_owned() } else { f.routes.join(", ") };
    let restarts = match f.server_restarts {
        0 => String::new(),
        n => format!("; {n} restarts"),
    };
    format!("nats-server {} at {}, routes: {routes}{restarts}{log}", f.server_version, f.client_url)
}

fn log(f: &FabricStatus) -> String {
    let l = &f.log;
    let leader = l.leader.as_ref().map_or("led by nobody now".to_owned(), |n| format!("led by {n}"));
    let moving = match (l.moving, l.behind.is_empty()) {
        (false, _) => String::new(),
        (true, true) => format!("; moves to {}", l.wanted.join(", ")),
        (true, false) => {
            format!("; moves to {}, being copied to {}", l.wanted.join(", "), l.behind.join(", "))
        }
    };
    let all = format!("; this server leads {} of {} logs that it holds", f.logs_led, f.logs_held);
    format!("on {}, {leader}{moving}{all}", l.copies.join(", "))
}

fn peers(peers: &[PeerStatus], width: u16) -> String {
    let mut table = columns(&["PEER", "LIVE", "HEARD", "CLOCK", "VERSION", "DATABASES"], &[2, 3], width);
    for p in peers {
        let heard = p.last_heard_s.map_or("never".to_owned(), |s| format!("{} ago", duration(s)));
        let clock = p.clock_offset_ms.map_or("-".to_owned(), |ms| format!("{ms:+.1} ms"));
        table.add_row([
            clean(&p.node),
            if p.live { "yes" } else { "NO" }.to_owned(),
            heard,
            clock,
            clean(p.version.as_deref().unwrap_or("-")),
            clean(&p.databases.join(", ")),
        ]);
    }
    finish(&table)
}

fn databases(databases: &[DatabaseStatus], width: u16) -> String {
    let titles = ["DATABASE", "STATE", "PEER", "BEHIND", "MISSING", "PENDING", "CONFLICTS"];
    let mut table = columns(&titles, &[3, 4, 5, 6], width);
    for d in databases {
        let of_database = [
            clean(&d.name),
            d.state.as_str().to_owned(),
            d.pending_commits.to_string(),
            d.conflicts.to_string(),
        ];
        let mut of_database = Some(of_database);
        let mut row = |peer: [String; 3]| {
            // What is the database's own stands in its first row only.
            let [name, state, pending, conflicts] = of_database.take().unwrap_or_default();
            let [node, behind, missing] = peer;
            table.add_row([name, state, node, behind, missing, pending, conflicts]);
        };
        if d.peers.is_empty() {
            row(["-".to_owned(), String::new(), String::new()]);
        }
        for p in &d.peers {
            row([clean(&p.node), p.behind_commits.to_string(), p.missing_commits.to_string()]);
        }
    }
    finish(&table)
}

fn notes(databases: &[DatabaseStatus], width: u16) -> String {
    let mut lines = labelled(width);
    for d in databases {
        for reason in &d.stopped {
            lines.add_row(["stopped".to_owned(), format!("{}: {}", clean(&d.name), clean(reason))]);
        }
        if let Some(c) = &d.catching_up {
            let text = format!("{}: {}", clean(&d.name), clean(&catching_up(c)));
            lines.add_row(["catches up".to_owned(), text]);
        }
        if let Some(node) = &d.needs_copy {
            let text =
                "was away for too long to be sent what has changed: takes in a copy of the file of node";
            lines.add_row(["copy".to_owned(), format!("{}: {text} {}", clean(&d.name), clean(node))]);
        }
        for event in d.events.iter().rev().take(EVENTS_SHOWN) {
            let text = format!("{}: {}: {}", clean(&d.name), clean(&event.at), clean(&event.what));
            lines.add_row(["event".to_owned(), text]);
        }
        if d.null_key_rows > 0 {
            let text = format!("{}: {} rows stay here: their key is NULL", clean(&d.name), d.null_key_rows);
            lines.add_row(["local".to_owned(), text]);
        }
        for (table, moved) in &d.moved_rows {
            let text = format!(
                "{}: {} keeps both rows of an id collision; {moved} rows have another id than they were given",
                clean(&d.name),
                clean(table)
            );
            lines.add_row(["both rows".to_owned(), text]);
        }
        if let Some(v) = &d.verified {
            lines.add_row(["verified".to_owned(), format!("{}: {}", clean(&d.name), clean(&verified(v)))]);
        }
    }
    if lines.is_empty() { String::new() } else { finish(&lines) }
}

fn catching_up(c: &CatchingUp) -> String {
    let mib = |bytes: f64| bytes / (1024.0 * 1024.0);
    format!(
        "{} commits are missing; reads the {} of {} for {}: {:.1} MiB ({:.1} MiB/s), {} commits applied ({:.0}/s)",
        c.missing_commits,
        c.via,
        c.node,
        duration(c.for_s),
        mib(c.bytes as f64),
        mib(c.bytes_per_s),
        c.commits,
        c.commits_per_s
    )
}

fn verified(v: &Verified) -> String {
    let nodes = v.nodes.join(", ");
    let what = match (v.nodes.is_empty(), v.divergent_rows) {
        (true, _) => "no other node was there to compare with".to_owned(),
        (false, 0) => format!("{} rows are the same on {nodes} and {}", v.rows, v.by),
        (false, n) => format!("{n} of {} rows DIFFER between {nodes} and {}", v.rows, v.by),
    };
    format!("{what}, {} ago", duration(v.age_s))
}

/// A table of a word and a text that may take several lines.
fn labelled(width: u16) -> Table {
    let mut table = columns(&[], &[], width);
    let text = width.saturating_sub(LABEL_WIDTH).max(20);
    table.set_constraints([
        ColumnConstraint::Absolute(Width::Fixed(LABEL_WIDTH)),
        ColumnConstraint::UpperBoundary(Width::Fixed(text)),
    ]);
    table
}

fn columns(titles: &[&str], right: &[usize], width: u16) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    if !titles.is_empty() {
        table.set_header(titles.to_vec());
    }
    for column in right {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// The table's lines without the space around them, and an empty line after the last.
fn finish(table: &Table) -> String {
    let lines = table.lines().map(|l| l.strip_prefix(' ').unwrap_or(&l).trim_end().to_owned() + "\n");
    lines.chain(["\n".to_owned()]).collect()
}

/// The text without control characters, which could make a terminal lie.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A duration in its two largest units.
fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0);
    match s as u64 {
        0..=9 => format!("{s:.1} s"),
        n @ 10..=119 => format!("{n} s"),
        n @ 120..=7199 => format!("{} min", n / 60),
        n @ 7200..=172_799 => format!("{} h {} min", n / 3600, n % 3600 / 60),
        n => format!("{} d {} h", n / 86_400, n % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::model::example;

    #[test]
    fn it_fits_a_terminal_of_80_columns() {
        let text = render(&example(), DEFAULT_WIDTH);
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line:?} in\n{text}");
        }
        let row = |start: &str| {
            let line =
                text.lines().find(|l| l.starts_with(start)).unwrap_or_else(|| panic!("{start}\n{text}"));
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(row("node"), "node n1 (litemesh 0.1.0, pid 4711), up 26 h 3 min");
        assert_eq!(row("n2"), "n2 yes 0.4 s ago -1.2 ms 0.1.0 app, orders");
        assert_eq!(row("n3"), "n3 NO 5 min ago - -");
        assert_eq!(row("app"), "app ok n2 0 0 0 3");
        assert_eq!(row("orders"), "orders stopped n3 120 4 0 3");
        assert!(row("stopped").starts_with("stopped orders: table \"invoice\""));
        assert!(row("ready").starts_with("ready NO: database orders"));
        assert!(row("copy").starts_with("copy orders: was away for too long"));
        assert_eq!(row("event"), "event app: 2026-01-04T03:00:00Z: event 4", "the newest first");
        let shown = |day: u32| text.contains(&format!("event {day}"));
        assert!(shown(3) && shown(2) && !shown(1), "{text}");
    }

    #[test]
    fn a_node_alone_has_no_empty_tables() {
        let status = Status { ready: true, ..Status::default() };
        let text = render(&status, DEFAULT_WIDTH);
        assert!(text.contains("yes") && !text.contains("PEER") && !text.contains("DATABASE"), "{text}");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let status = Status { warnings: vec!["\u{1b}[2Jgone".into()], ..Status::default() };
        assert!(!render(&status, DEFAULT_WIDTH).contains('\u{1b}'));
    }

    #[test]
    fn durations_are_short() {
        for (s, text) in
            [(0.44, "0.4 s"), (61.0, "61 s"), (301.0, "5 min"), (7300.0, "2 h 1 min"), (2e5, "2 d 7 h")]
        {
            assert_eq!(duration(s), text);
        }
    }
}
