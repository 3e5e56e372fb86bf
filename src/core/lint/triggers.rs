//! Rules about triggers and the virtual tables they keep. Invariant: where a trigger runs is told as `replica` does it:
//! by whether the tables it writes travel.

use std::collections::BTreeSet;

use super::{Facts, Finding, Severity, TriggerFacts, TriggerWrites, finding};

pub(super) fn virtual_table(facts: &Facts, name: &str) -> Finding {
    let lower = name.to_lowercase();
    let runs_everywhere = |t: &&TriggerFacts| match &t.writes {
        TriggerWrites::Tables(tables) => {
            tables.contains(&lower)
                && facts.is_replicated(&t.table)
                && kind(facts, tables) == Kind::Everywhere
        }
        TriggerWrites::Unknown(_) => false,
    };
    let keepers: Vec<&str> = facts.triggers.iter().filter(runs_everywhere).map(|t| t.name.as_str()).collect();
    let (severity, does, advice) = match keepers.is_empty() {
        false => (
            Severity::Info,
            format!("It is not replicated; your triggers keep it right on every node ({}).", keepers.join(", ")),
            "Nothing to do. Each node must have filled it once, as for any new copy.",
        ),
        true => (
            Severity::Warning,
            "It is not replicated, and no trigger that writes only such tables fills it: each node has its own."
                .to_owned(),
            "Fill it by triggers on ordinary tables, or rebuild it on each node.",
        ),
    };
    finding(name, "virtual-table", severity, ["it is a virtual table".into(), does, advice.into()])
}

/// Where a trigger's work happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It writes only what does not travel.
    Everywhere,
    /// All it writes travels as rows, or it writes nothing.
    Origin,
    /// Both at once.
    Mixed,
}

fn kind(facts: &Facts, written: &BTreeSet<String>) -> Kind {
    let local = written.iter().filter(|t| !facts.is_replicated(t)).count();
    match local {
        0 => Kind::Origin,
        n if n == written.len() => Kind::Everywhere,
        _ => Kind::Mixed,
    }
}

pub(super) fn on<'f>(facts: &'f Facts, table: &'f str) -> impl Iterator<Item = Finding> + 'f {
    let on = facts.triggers.iter().filter(|t| t.table.eq_ignore_ascii_case(table));
    on.map(|t| trigger(facts, t))
}

fn trigger(facts: &Facts, t: &TriggerFacts) -> Finding {
    let name = &t.name;
    let tables = match &t.writes {
        TriggerWrites::Tables(tables) => tables,
        TriggerWrites::Unknown(why) => {
            return finding(&t.table, "trigger-unknown", Severity::Warning, [
                format!("trigger \"{name}\" cannot be examined: {why}"),
                "It runs only where the write was made. What it writes to replicated tables arrives as rows.".into(),
                "If it keeps a virtual table right, take out the function or module that only the application has."
                    .into(),
            ]);
        }
    };
    let written = tables.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    let on_table = facts.is_replicated(&t.table);
    match kind(facts, tables) {
        Kind::Everywhere if on_table => finding(&t.table, "trigger-everywhere", Severity::Info, [
            format!("trigger \"{name}\" writes only what is not replicated ({written})"),
            "It runs on every node, for rows that arrive as for those written there.".into(),
            "Nothing to do.".into(),
        ]),
        Kind::Origin => finding(&t.table, "trigger-origin", Severity::Info, [
            match written.is_empty() {
                true => format!("trigger \"{name}\" writes nothing: it checks"),
                false => format!("trigger \"{name}\" writes replicated tables ({written})"),
            },
            "It runs only where the write was made; its effects arrive as rows.".into(),
            "Sums and counters that it keeps by column = column + 1 lose one of two updates made at once; compute \
             them when reading."
                .into(),
        ]),
        Kind::Everywhere | Kind::Mixed => finding(&t.table, "trigger-mixed", Severity::Warning, [
            format!("trigger \"{name}\" writes what is not replicated ({written}) and more, or is on no replicated table"),
            "It runs only where the write was made; what it does to unreplicated tables does not happen elsewhere."
                .into(),
            "Split it: one trigger on an ordinary table that writes only unreplicated tables, one for the rest."
                .into(),
        ]),
    }
}
