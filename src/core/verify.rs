//! What nodes say to each other to compare their rows and to repair them. Invariant: no message grows with a table:
//! ranges, lists and keys are cut to size by who sends them, and checked again by who reads them.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::digest::{Digest, Hash, Layout, Seen};
use super::names::{DbName, NodeName};
use super::value::{Value, ValueRef};
use super::vector::Vector;

/// How many rows a range has at most, and about how many bytes: read in a few milliseconds.
pub const RANGE_ROWS: usize = 2_000;
/// See [`RANGE_ROWS`].
pub const RANGE_BYTES: usize = 4 * 1024 * 1024;
/// How many keys are looked up at once, and about how many bytes they have.
pub const LOOKUP_KEYS: usize = 200;
/// See [`LOOKUP_KEYS`].
pub const LOOKUP_BYTES: usize = 1024 * 1024;

/// A value that travels.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Cell {
    /// NULL.
    Null,
    /// An integer.
    Int(i64),
    /// A double, by its bits.
    Real(u64),
    /// Text, whatever its bytes.
    Text(Bytes),
    /// Bytes.
    Blob(Bytes),
}

impl From<ValueRef<'_>> for Cell {
    fn from(value: ValueRef<'_>) -> Self {
        match value {
            ValueRef::Null => Self::Null,
            ValueRef::Int(i) => Self::Int(i),
            ValueRef::Real(r) => Self::Real(r.to_bits()),
            ValueRef::Text(b) => Self::Text(Bytes::copy_from_slice(b)),
            ValueRef::Blob(b) => Self::Blob(Bytes::copy_from_slice(b)),
        }
    }
}

impl Cell {
    /// The value.
    pub fn to_value(&self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Int(i) => Value::Int(*i),
            Self::Real(bits) => Value::Real(f64::from_bits(*bits)),
            Self::Text(b) => Value::Text(b.to_vec()),
            Self::Blob(b) => Value::Blob(b.to_vec()),
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::Text(b) | Self::Blob(b) => b.len() + 5,
            _ => 9,
        }
    }
}

/// A row's key.
pub type Key = Vec<Cell>;

/// About how many bytes a key has.
pub fn key_size(key: &Key) -> usize {
    key.iter().map(Cell::size).sum()
}

/// The rows of a table after one key, up to and with another; without bounds, from the first and to the last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// The table and its columns, which must be the same at both.
    pub layout: Layout,
    /// After this key.
    pub after: Option<Key>,
    /// Up to this key.
    pub upto: Option<Key>,
}

/// Asks for single rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lookup {
    /// The table and its columns.
    pub layout: Layout,
    /// The keys.
    pub keys: Vec<Key>,
    /// What is written here after the answer is to be later than this clock (milliseconds since 1970).
    pub later_than_ms: Option<u64>,
}

/// What a node holds at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Held {
    /// Of every site's feed.
    pub vector: Vector,
    /// What is covered by this and was deleted may be forgotten.
    pub collected: Vector,
}

impl Held {
    /// Whether the other has forgotten deletes that were never heard of here: then a row that is here and not there says
    /// nothing.
    pub fn misses_forgotten(&self, other: &Held) -> bool {
        !self.vector.includes(&other.collected)
    }
}

/// A question about rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// Which tables there are.
    Layouts,
    /// Whether a range's rows have this digest; which rows they are, if not.
    Range(Range, Digest),
    /// What is seen of single rows.
    Lookup(Lookup),
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The tables, and what the node holds.
    Layouts(Vec<Layout>, Held),
    /// The range has that digest.
    Same,
    /// The range's rows, up to a key if they are too many.
    Rows(Vec<(Key, Hash)>, Option<Key>),
    /// What is seen of each key, and what the node held then.
    Seen(Vec<Seen>, Held),
    /// It cannot be answered; for a person to read.
    Refused(String),
}

/// What came of comparing, for status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// When it was done, in milliseconds since 1970.
    pub at_ms: u64,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// Rows looked at on the node that compared.
    pub rows: u64,
    /// The node that compared.
    pub by: NodeName,
    /// The nodes it compared with.
    pub nodes: Vec<NodeName>,
    /// Nodes and tables that were not compared, and why.
    pub not_compared: Vec<String>,
    /// Rows that differ.
    pub divergent_rows: u64,
    /// Rows that kept changing.
    pub unsettled_rows: u64,
}

/// What was repaired.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Repaired {
    /// Rows that differed.
    pub differed: u64,
    /// Rows that were written again.
    pub repaired: u64,
    /// The first of them: table and key as JSON, and what was done.
    pub rows: Vec<(String, String, String)>,
    /// Rows that were changed by others meanwhile, or kept changing.
    pub left: u64,
    /// Nodes and tables that were not compared, and why.
    pub not_compared: Vec<String>,
    /// Rows that still differ when they were compared once more.
    pub still_differ: u64,
}

/// Everything that is said about comparing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VerifyMessage {
    /// A question, to one node.
    Ask {
        /// The database.
        db: DbName,
        /// What all its files share.
        lineage: u64,
        /// A number that the answer repeats.
        request: u64,
        /// The question.
        question: Question,
    },
    /// The answer.
    Reply {
        /// The question's number.
        request: u64,
        /// The answer.
        reply: Reply,
    },
    /// Tells the nodes that took part what came of it.
    Outcome {
        /// The database.
        db: DbName,
        /// What all its files share.
        lineage: u64,
        /// What came of it.
        outcome: Outcome,
    },
    /// Asks a node to write its rows again where others differ.
    Repair {
        /// The database.
        db: DbName,
        /// What all its files share.
        lineage: u64,
        /// A number that the answer repeats.
        request: u64,
        /// This table only.
        table: Option<String>,
        /// Only tells what would be done.
        dry_run: bool,
    },
    /// It is at work on it.
    Repairing {
        /// The request's number.
        request: u64,
    },
    /// It is done, or why it is not.
    Repaired {
        /// The request's number.
        request: u64,
        /// What was done.
        result: Result<Repaired, String>,
    },
}
