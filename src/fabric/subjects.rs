//! The subjects of the mesh's account. Invariant: the one place that knows how they are made and read.

use std::fmt;
use std::sync::Arc;

use super::link::{Incoming, Outgoing};
use crate::core::names::{DbName, MeshName, NodeName};
use bytes::Bytes;

/// What carries a message.
#[derive(Debug)]
pub(super) struct Envelope {
    pub(super) subject: String,
    pub(super) payload: Bytes,
    /// The node's stream captures it.
    pub(super) logged: bool,
}

/// Where the host's programs find changes of rows.
pub(super) const PROGRAMS: &str = "cdc.>";

/// The subjects of one mesh: its own account's on bundled servers, or those under its name in an account of another NATS
/// system.
#[derive(Debug, Clone)]
pub(super) struct Subjects {
    root: Arc<str>,
    /// The mesh's name, where it is not alone in its account.
    mesh: Option<MeshName>,
}

impl Subjects {
    /// In an account that is the mesh's alone.
    pub(super) fn bundled() -> Self {
        Self { root: "lm".into(), mesh: None }
    }

    /// In an account that it may share with others.
    pub(super) fn of_mesh(mesh: &MeshName) -> Self {
        Self { root: format!("lm-{mesh}").into(), mesh: Some(mesh.clone()) }
    }

    /// All commits.
    pub(super) fn all_commits(&self) -> String {
        format!("{}.c.>", self.root)
    }

    /// All commits of a node.
    pub(super) fn all_commits_of(&self, node: &NodeName) -> String {
        format!("{}.c.{node}.>", self.root)
    }

    /// All broadcasts.
    pub(super) fn all_broadcasts(&self) -> String {
        format!("{}.b.*", self.root)
    }

    /// What nodes say of where they listen.
    pub(super) fn all_hellos(&self) -> String {
        format!("{}.m.*", self.root)
    }

    /// Changes of rows on `node`, for its programs: their account imports them below [`PROGRAMS`].
    pub(super) fn all_changes(&self, node: &str) -> String {
        format!("{}.e.{node}.>", self.root)
    }

    /// A change of a row on `node`.
    pub(super) fn change(&self, node: &NodeName, db: &DbName, table: &str, op: &str) -> String {
        let table = token(table);
        match self.mesh {
            None => format!("{}.e.{node}.{db}.{table}.{op}", self.root),
            // There programs share the account: nothing is imported.
            Some(_) => format!("cdc.{db}.{table}.{op}"),
        }
    }

    /// Where streams of the host's programs answer to changes.
    pub(super) fn all_answers(&self, node: &str) -> String {
        format!("{}.a.{node}.>", self.root)
    }

    /// Where a stream answers to one change.
    pub(super) fn answer(&self, node: &NodeName, run: u32, number: u64) -> String {
        format!("{}.a.{node}.{run:08x}.{number}", self.root)
    }

    /// Everything for `node` alone.
    pub(super) fn all_direct(&self, node: &NodeName) -> String {
        format!("{}.d.{node}.*", self.root)
    }

    /// Where `node` says where it listens.
    pub(super) fn hello(&self, node: &NodeName) -> String {
        format!("{}.m.{node}", self.root)
    }

    /// Who says where it listens.
    pub(super) fn hello_from(&self, subject: &str) -> Option<NodeName> {
        self.after(subject, "m")?.parse().ok()
    }

    /// Where `node` answers that it is there.
    pub(super) fn presence(&self, node: &NodeName) -> String {
        format!("{}.p.{node}", self.root)
    }

    /// The feed of one of `node`'s sites.
    pub(super) fn commits_of(&self, node: &NodeName, db: &DbName, site: u64) -> String {
        format!("{}.c.{node}.{db}.{}", self.root, SiteToken(site))
    }

    /// A message of `node`'s log that is no commit.
    pub(super) fn probe(&self, node: &NodeName) -> String {
        format!("{}.c.{node}.probe", self.root)
    }

    /// What nodes say of their keys.
    pub(super) fn all_keys(&self) -> String {
        format!("{}.k.*", self.root)
    }

    /// Where `node` says how new its key is.
    pub(super) fn key_of(&self, node: &NodeName) -> String {
        format!("{}.k.{node}", self.root)
    }

    /// Who says how new its key is.
    pub(super) fn key_from(&self, subject: &str) -> Option<NodeName> {
        self.after(subject, "k")?.parse().ok()
    }

    /// Keys for `node`, from anybody.
    pub(super) fn keys_for(&self, node: &NodeName) -> String {
        format!("{}.k.{node}.*", self.root)
    }

    /// A key for one node.
    pub(super) fn key_for(&self, from: &NodeName, to: &NodeName) -> String {
        format!("{}.k.{to}.{from}", self.root)
    }

    /// The name of a node's stream.
    pub(super) fn stream(&self, node: &NodeName) -> String {
        match &self.mesh {
            None => format!("{STREAMS}{node}"),
            // No name has an @.
            Some(mesh) => format!("{STREAMS}{node}@{mesh}"),
        }
    }

    /// Whose log a stream is.
    pub(super) fn node_of_stream(&self, stream: &str) -> Option<NodeName> {
        let rest = stream.strip_prefix(STREAMS)?;
        let (node, mesh) = rest.split_once('@').map_or((rest, None), |(node, mesh)| (node, Some(mesh)));
        (mesh == self.mesh.as_ref().map(MeshName::as_str)).then(|| node.parse().ok())?
    }

    fn after<'s>(&self, subject: &'s str, kind: &str) -> Option<&'s str> {
        subject.strip_prefix(&*self.root)?.strip_prefix('.')?.strip_prefix(kind)?.strip_prefix('.')
    }

    /// `None` for what is no message.
    pub(super) fn seal(&self, node: &NodeName, out: Outgoing) -> Option<Envelope> {
        let root = &self.root;
        let (subject, payload, logged) = match out {
            Outgoing::Commit { db, site, payload } => (self.commits_of(node, &db, site), payload, true),
            Outgoing::Broadcast { payload } => (format!("{root}.b.{node}"), payload, false),
            Outgoing::Direct { to, payload } => (format!("{root}.d.{to}.{node}"), payload, false),
            Outgoing::ReadLog(_) => return None,
        };
        Some(Envelope { subject, payload, logged })
    }

    /// Reads a message that arrived at `node`; `None` when it is our own or none of ours.
    pub(super) fn open(&self, node: &NodeName, subject: &str, payload: Bytes) -> Option<Incoming> {
        let mut tokens = subject.split('.');
        if tokens.next() != Some(&*self.root) {
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
}

/// What the names of logs begin with.
pub(super) const STREAMS: &str = "LM_";

/// A name as one token of a subject: what is no ASCII letter, digit, `_` or `-` is written as `%` and two digits.
fn token(name: &str) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    name.bytes().map(|b| if plain(&b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// Who gave a key.
pub(super) fn key_giver(subject: &str) -> Option<NodeName> {
    subject.rsplit('.').next()?.parse().ok()
}

struct SiteToken(u64);

impl fmt::Display for SiteToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NodeName {
        text.parse().expect("a name")
    }

    #[test]
    fn what_is_sealed_is_opened_by_the_others_only() {
        let (a, b, c, ours) = (name("a"), name("b"), name("c"), Subjects::bundled());
        let payload = Bytes::from_static(b"x");
        let db: DbName = "app".parse().expect("a name");
        let commit = ours.seal(&a, Outgoing::Commit { db, site: 0xab, payload: payload.clone() }).unwrap();
        assert_eq!(commit.subject, "lm.c.a.app.00000000000000ab");
        assert!(commit.logged);
        assert!(matches!(
            ours.open(&b, &commit.subject, payload.clone()),
            Some(Incoming::Commit { from, site: 0xab, .. }) if from == a
        ));
        assert!(ours.open(&a, &commit.subject, payload.clone()).is_none(), "our own");
        let direct = ours.seal(&a, Outgoing::Direct { to: b.clone(), payload: payload.clone() }).unwrap();
        assert!(
            matches!(ours.open(&b, &direct.subject, payload.clone()), Some(Incoming::Message { from, .. }) if from == a)
        );
        assert!(ours.open(&c, &direct.subject, payload.clone()).is_none(), "for another");
        let broadcast = ours.seal(&a, Outgoing::Broadcast { payload: payload.clone() }).unwrap();
        assert!(ours.open(&b, &broadcast.subject, payload.clone()).is_some() && !broadcast.logged);
        assert_eq!(ours.hello_from(&ours.hello(&a)), Some(a));
    }

    #[test]
    fn any_name_of_a_table_is_one_token() {
        let (a, db) = (name("a"), "app".parse().expect("a name"));
        assert_eq!(
            Subjects::bundled().change(&a, &db, "order_items", "insert"),
            "lm.e.a.app.order_items.insert"
        );
        assert_eq!(token("a.b *>%"), "a%2Eb%20%2A%3E%25");
        assert_eq!(token("Größe"), "Gr%C3%B6%C3%9Fe");
    }

    #[test]
    fn what_is_not_ours_is_not_opened() {
        let (a, ours) = (name("a"), Subjects::bundled());
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
            assert!(ours.open(&a, subject, Bytes::new()).is_none(), "{subject}");
        }
    }

    #[test]
    fn meshes_of_one_account_do_not_hear_each_other() {
        let (a, b, db) = (name("a"), name("b"), "app".parse().expect("a name"));
        let mesh = |text: &str| Subjects::of_mesh(&text.parse().expect("a name"));
        let (one, two) = (mesh("one"), mesh("one-2"));
        let payload = Bytes::from_static(b"x");
        let said = one.seal(&a, Outgoing::Broadcast { payload: payload.clone() }).unwrap();
        assert_eq!(said.subject, "lm-one.b.a");
        assert!(one.open(&b, &said.subject, payload.clone()).is_some());
        for other in [&two, &Subjects::bundled()] {
            assert!(other.open(&b, &said.subject, payload.clone()).is_none());
            assert_eq!(other.hello_from(&one.hello(&a)), None);
            assert_eq!(other.node_of_stream(&one.stream(&a)), None);
        }
        assert_eq!(one.stream(&a), "LM_a@one");
        assert_eq!(one.node_of_stream("LM_a@one"), Some(a.clone()));
        assert_eq!(Subjects::bundled().node_of_stream("LM_a"), Some(a.clone()));
        assert_eq!(one.change(&a, &db, "t", "insert"), "cdc.app.t.insert");
    }
}
