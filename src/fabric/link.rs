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
}
