//! The subjects of the mesh's account. Invariant: the one place that knows how they are made and read.

use std::fmt;

use super::link::{Incoming, Outgoing};
use crate::core::names::{DbName, NodeName};
use bytes::Bytes;

/// What carries a message.
#[derive(Debug)]
pub(super) struct Envelope {
    pub(super) subject: String,
    pub(super) payload: Bytes,
    /// The node's stream captures it.
    pub(super) logged: bool,
}

/// All commits.
pub(super) const ALL_COMMITS: &str = "lm.c.>";
/// All broadcasts.
pub(super) const ALL_BROADCASTS: &str = "lm.b.*";
/// What nodes say of where they listen.
pub(super) const ALL_HELLOS: &str = "lm.m.*";

/// Changes of rows on `node`, for its programs: their account imports them below [`PROGRAMS`].
pub(super) fn all_changes(node: &str) -> String {
    format!("lm.e.{node}.>")
}

/// Where the host's programs find changes of rows.
pub(super) const PROGRAMS: &str = "cdc.>";

/// A change of a row on `node`.
pub(super) fn change(node: &NodeName, db: &DbName, table: &str, op: &str) -> String {
    format!("lm.e.{node}.{db}.{}.{op}", token(table))
}

/// Where streams of the host's programs answer to changes.
pub(super) fn all_answers(node: &str) -> String {
    format!("lm.a.{node}.>")
}

/// Where a stream answers to one change.
pub(super) fn answer(node: &NodeName, run: u32, number: u64) -> String {
    format!("lm.a.{node}.{run:08x}.{number}")
}

/// A name as one token of a subject: what is no ASCII letter, digit, `_` or `-` is written as `%` and two digits.
fn token(name: &str) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    name.bytes().map(|b| if plain(&b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// Everything for `node` alone.
pub(super) fn all_direct(node: &NodeName) -> String {
    format!("lm.d.{node}.*")
}

/// Where `node` says where it listens.
pub(super) fn hello(node: &NodeName) -> String {
    format!("lm.m.{node}")
}

/// The feed of one of `node`'s sites.
pub(super) fn commits_of(node: &NodeName, db: &DbName, site: u64) -> String {
    format!("lm.c.{node}.{db}.{}", SiteToken(site))
}

/// A message of `node`'s log that is no commit.
pub(super) fn probe(node: &NodeName) -> String {
    format!("lm.c.{node}.probe")
}

/// What nodes say of their keys.
pub(super) const ALL_KEYS: &str = "lm.k.*";

/// Where `node` says how new its key is.
pub(super) fn key_of(node: &NodeName) -> String {
    format!("lm.k.{node}")
}

/// Who says how new its key is.
pub(super) fn key_from(subject: &str) -> Option<NodeName> {
    subject.strip_prefix("lm.k.")?.parse().ok()
}

/// Keys for `node`, from anybody.
pub(super) fn keys_for(node: &NodeName) -> String {
    format!("lm.k.{node}.*")
}

/// A key for one node.
pub(super) fn key_for(from: &NodeName, to: &NodeName) -> String {
    format!("lm.k.{to}.{from}")
}

/// Who gave a key.
pub(super) fn key_giver(subject: &str) -> Option<NodeName> {
    subject.rsplit('.').next()?.parse().ok()
}

/// Who says where it listens.
pub(super) fn hello_from(subject: &str) -> Option<NodeName> {
    subject.strip_prefix("lm.m.")?.parse().ok()
}

impl Envelope {
    /// `None` for what is no message.
    pub(super) fn seal(node: &NodeName, out: Outgoing) -> Option<Self> {
        let (subject, payload, logged) = match out {
            Outgoing::Commit { db, site, payload } => (commits_of(node, &db, site), payload, true),
            Outgoing::Broadcast { payload } => (format!("lm.b.{node}"), payload, false),
            Outgoing::Direct { to, payload } => (format!("lm.d.{to}.{node}"), payload, false),
            Outgoing::ReadLog(_) => return None,
        };
        Some(Self { subject, payload, logged })
    }
}

struct SiteToken(u64);

impl fmt::Display for SiteToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Reads a message that arrived at `node`; `None` when it is our own or none of ours.
pub(super) fn open(node: &NodeName, subject: &str, payload: Bytes) -> Option<Incoming> {
    let mut tokens = subject.split('.');
    if tokens.next() != Some("lm") {
        return None;
    }
    let incoming = match tokens.next()? {
        "c" => {
            let from: NodeName = tokens.next()?.parse().ok()?;
            let db: DbName = tokens.next()?.parse().ok()?;
            let site = tokens.next().filter(|token| token.len() == 16)?;
            Incoming::Commit { from, db, site: u64::from_str_radix(site, 16).ok()?, payload }
        }
        "b" => Incoming::Message { from: tokens.next()?.parse().ok()?, payload },
        "d" if tokens.next()? == node.as_str() => {
            Incoming::Message { from: tokens.next()?.parse().ok()?, payload }
        }
        _ => return None,
    };
    let is_own = match &incoming {
        Incoming::Commit { from, .. } | Incoming::Message { from, .. } => from == node,
        Incoming::Logged(_) => true,
    };
    (tokens.next().is_none() && !is_own).then_some(incoming)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NodeName {
        text.parse().expect("a name")
    }

    #[test]
    fn what_is_sealed_is_opened_by_the_others_only() {
        let (a, b, c) = (name("a"), name("b"), name("c"));
        let payload = Bytes::from_static(b"x");
        let db: DbName = "app".parse().expect("a name");
        let commit =
            Envelope::seal(&a, Outgoing::Commit { db, site: 0xab, payload: payload.clone() }).unwrap();
        assert_eq!(commit.subject, "lm.c.a.app.00000000000000ab");
        assert!(commit.logged);
        assert!(matches!(
            open(&b, &commit.subject, payload.clone()),
            Some(Incoming::Commit { from, site: 0xab, .. }) if from == a
        ));
        assert!(open(&a, &commit.subject, payload.clone()).is_none(), "our own");
        let direct =
            Envelope::seal(&a, Outgoing::Direct { to: b.clone(), payload: payload.clone() }).unwrap();
        assert!(
            matches!(open(&b, &direct.subject, payload.clone()), Some(Incoming::Message { from, .. }) if from == a)
        );
        assert!(open(&c, &direct.subject, payload.clone()).is_none(), "for another");
        let broadcast = Envelope::seal(&a, Outgoing::Broadcast { payload: payload.clone() }).unwrap();
        assert!(open(&b, &broadcast.subject, payload.clone()).is_some() && !broadcast.logged);
        assert_eq!(hello_from(&hello(&a)), Some(a));
    }

    #[test]
    fn any_name_of_a_table_is_one_token() {
        let (a, db) = (name("a"), "app".parse().expect("a name"));
        assert_eq!(change(&a, &db, "order_items", "insert"), "lm.e.a.app.order_items.insert");
        assert_eq!(token("a.b *>%"), "a%2Eb%20%2A%3E%25");
        assert_eq!(token("Größe"), "Gr%C3%B6%C3%9Fe");
    }

    #[test]
    fn what_is_not_ours_is_not_opened() {
        let a = name("a");
        for subject in [
            "",
            "lm",
            "lm.c",
            "lm.c.b.app",
            "lm.c.b.app.1",
            "lm.c.b.app.000000000000000g",
            "lm.x.b",
            "x.b.b",
            "lm.b.b.c",
            "lm.c.b.app.00000000000000ab.more",
        ] {
            assert!(open(&a, subject, Bytes::new()).is_none(), "{subject}");
        }
    }
}
