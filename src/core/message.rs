//! What nodes say to each other besides rows, and how a commit is cut into pieces. Invariant: every message starts
//! with its format's version, and one of a later version is refused as such.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frame::WireError;
use super::names::{DbName, NodeName};
use super::vector::Vector;
use super::verify::VerifyMessage;
use super::version::{Hlc, SiteId};

/// The format this litemesh writes, and the latest that it reads.
pub const WIRE_VERSION: u8 = 1;

/// How many bytes of a commit travel in one message: well below the server's `max_payload`, large enough to keep
/// the cost a message small.
pub const FRAGMENT_BYTES: usize = 512 * 1024;

/// What stands before the rows of a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitHeader {
    /// The number before the first that this commit covers: it takes a feed from `from` to `to`.
    pub from: u64,
    /// The commit's number.
    pub to: u64,
    /// A random id.
    pub id: u64,
    /// The id of commit `from`.
    pub prev: u64,
    /// The commit's clock.
    pub hlc: Hlc,
    /// What the writer had applied from other sites: number and clock.
    pub seen: Vec<(SiteId, u64, Hlc)>,
    /// How many rows follow.
    pub rows: u64,
}

/// A piece of a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fragment {
    /// A random number that pieces of one sending share.
    pub attempt: u64,
    /// Its place, from 0.
    pub index: u32,
    /// Whether it is the last.
    pub last: bool,
    /// The bytes.
    pub data: Bytes,
}

impl Fragment {
    /// The header of the commit that this piece begins; `None` if it is not a first piece, or none that can be read.
    pub fn begins(&self) -> Option<CommitHeader> {
        if self.index != 0 {
            return None;
        }
        let (len, rest) = self.data.split_first_chunk::<4>()?;
        let header = rest.get(..u32::from_be_bytes(*len) as usize)?;
        decode(header).ok()
    }
}

/// Everything else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// "I am here": every few seconds, from every node.
    Hello(Hello),
    /// "This is what I hold": sent regularly and when asked.
    Holding(Holding),
    /// Asks every node that has the database for its [`Message::Holding`].
    Ask {
        /// The database.
        db: DbName,
    },
    /// Asks for rows.
    SyncRequest(SyncRequest),
    /// Rows, in answer.
    SyncPage(SyncPage),
    /// Asks for a copy of the file, or for a part of the copy that was made.
    CopyRequest(CopyRequest),
    /// A part of a copy, in answer.
    CopyPart(CopyPart),
    /// The answer to a request that cannot be met now; says why.
    Refused {
        /// The request's number.
        request: u64,
        /// For a person to read.
        why: String,
    },
    /// "I am leaving": nobody needs to wait for me.
    Bye,
    /// Comparing and repairing rows.
    Verify(VerifyMessage),
}

/// See [`Message::Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The sender's release.
    pub version: String,
    /// The sender's wall clock, in milliseconds since 1970.
    pub now_ms: u64,
    /// The databases it replicates.
    pub dbs: Vec<DbName>,
}

/// See [`Message::Holding`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// The database.
    pub db: DbName,
    /// What all files of the database in this mesh share.
    pub lineage: u64,
    /// The sender's site.
    pub site: SiteId,
    /// What it holds.
    pub vector: Vector,
    /// The sender's own counter of changes, read with the vector.
    pub lsn: u64,
    /// Whether the sender wants to hear the same of the others.
    pub answer: bool,
    /// What the sender has forgotten deletes of: it has no rows for whoever holds less.
    pub collected: Vector,
    /// Nodes that got a copy of the sender's file and were not heard since, with what the copy held.
    pub joining: Vec<(NodeName, Vector)>,
    /// Sites that the sender's file has left because they had forked.
    pub left: Vec<SiteId>,
}

/// Asks for the rows that changed at the addressee.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncRequest {
    /// The database.
    pub db: DbName,
    /// See [`Holding::lineage`].
    pub lineage: u64,
    /// A number the answer repeats.
    pub request: u64,
    /// What the asker holds: rows whose every version is covered are left out.
    pub vector: Vector,
    /// Only rows that changed after this lsn of the addressee.
    pub after_lsn: u64,
}

/// Rows of a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncPage {
    /// The database.
    pub db: DbName,
    /// The request's number.
    pub request: u64,
    /// The sender's site.
    pub site: SiteId,
    /// Frames of rows.
    pub frames: Vec<Bytes>,
    /// Where the next page starts.
    pub next_lsn: u64,
    /// On the last page: what the sender held when it was read.
    pub complete: Option<Vector>,
}

/// Asks for a copy of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyRequest {
    /// The database.
    pub db: DbName,
    /// A number the answer repeats.
    pub request: u64,
    /// The copy, 0 to have one made.
    pub copy: u64,
    /// Where the part starts, in bytes; at the end of the copy or beyond: it is not needed any more.
    pub offset: u64,
    /// BLAKE3 of what the asker has there already, of a copy that it did not get whole.
    pub have: Option<[u8; 32]>,
}

/// A part of a copy of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyPart {
    /// The request's number.
    pub request: u64,
    /// The copy.
    pub copy: u64,
    /// Its whole size in bytes.
    pub size: u64,
    /// Where this part starts.
    pub offset: u64,
    /// The part; empty if the asker has it.
    pub data: Bytes,
    /// Whether what the asker has there is the part.
    pub same: bool,
    /// BLAKE3 of the part.
    pub hash: [u8; 32],
}

/// Encodes a message or a piece.
pub fn encode<T: Serialize>(message: &T) -> Bytes {
    encode_into(message, Vec::new())
}

/// The same for what has about so many bytes: growing a buffer to them costs as much as copying them once more.
pub fn encode_large<T: Serialize>(message: &T, len: usize) -> Bytes {
    encode_into(message, Vec::with_capacity(len + 128))
}

fn encode_into<T: Serialize>(message: &T, mut bytes: Vec<u8>) -> Bytes {
    bytes.push(WIRE_VERSION);
    rmp_serde::encode::write(&mut bytes, message).expect("messages hold nothing that MessagePack cannot");
    bytes.into()
}

/// Decodes what [`encode`] made.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    match bytes.split_first() {
        None => Err(WireError::Truncated),
        Some((&WIRE_VERSION, rest)) => {
            rmp_serde::from_slice(rest).map_err(|_| WireError::Malformed("not a message of this format"))
        }
        Some((v, _)) => Err(WireError::Version(*v, WIRE_VERSION)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_format_is_refused_as_such() {
        let piece = Fragment { attempt: 1, index: 0, last: true, data: Bytes::from_static(b"x") };
        let mut bytes = encode(&piece).to_vec();
        assert_eq!(decode::<Fragment>(&bytes), Ok(piece));
        bytes[0] = 2;
        assert_eq!(decode::<Fragment>(&bytes), Err(WireError::Version(2, 1)));
        assert!(decode::<Fragment>(&bytes[..1]).is_err());
    }
}
