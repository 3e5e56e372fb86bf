//! What a node says to its peers and hears from them, whatever carries it.
//! Invariant: nothing here promises delivery, order or uniqueness; whoever uses it must not need them.

use bytes::Bytes;

use crate::core::names::{DbName, NodeName};

/// A message to be sent.
#[derive(Debug, Clone)]
pub enum Outgoing {
    /// A piece of a commit of one of our own sites, to every node and into this node's log.
    Commit {
        /// The database it belongs to.
        db: DbName,
        /// The site whose feed it is part of.
        site: u64,
        /// Encoded piece.
        payload: Bytes,
    },
    /// To every other node.
    Broadcast {
        /// Encoded message.
        payload: Bytes,
    },
    /// To one node.
    Direct {
        /// The addressee.
        to: NodeName,
        /// Encoded message.
        payload: Bytes,
    },
    /// Reads a node's log.
    ReadLog(LogRequest),
}

/// What to read of a node's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRequest {
    /// Whose log.
    pub node: NodeName,
    /// The database.
    pub db: DbName,
    /// The site whose feed is wanted.
    pub site: u64,
    /// The first commit wanted is the one that follows this number.
    pub after: u64,
    /// Where an earlier reading stopped: then this one goes on there, whatever `after` says.
    pub position: Option<u64>,
    /// About how many bytes to read.
    pub max_bytes: usize,
    /// A number that the answer repeats.
    pub request: u64,
}

/// What a log had.
#[derive(Debug, Clone)]
pub struct Logged {
    /// What was asked for.
    pub asked: LogRequest,
    /// Encoded pieces of commits, in the order in which they were published.
    pub pieces: Vec<Bytes>,
    /// How it ended.
    pub end: LogEnd,
}

/// Why a reading of a log ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogEnd {
    /// It was long enough; there is more from this position on.
    More(u64),
    /// There is no more.
    End,
    /// The log does not have what was asked for, or nobody answers for it; why, for people.
    Gone(String),
}

/// A message that arrived. Our own messages never come back to us.
#[derive(Debug, Clone)]
pub enum Incoming {
    /// A piece of a commit of another node's site.
    Commit {
        /// The node whose site it is.
        from: NodeName,
        /// The database it belongs to.
        db: DbName,
        /// The site whose feed it is part of.
        site: u64,
        /// Encoded piece.
        payload: Bytes,
    },
    /// A broadcast or direct message.
    Message {
        /// Who sent it.
        from: NodeName,
        /// Encoded message.
        payload: Bytes,
    },
    /// What was read of a log.
    Logged(Logged),
}
