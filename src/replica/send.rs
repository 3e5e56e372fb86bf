//! Messages and commits into what the fabric carries. Invariant: what is sent was committed before.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::Result;
use super::absorb::OwnCommit;
use crate::core::frame::WireError;
use crate::core::message::{FRAGMENT_BYTES, Fragment, Message, decode, encode, encode_large};
use crate::core::names::NodeName;

/// What may be held of one unfinished message: a page of rows near SQLite's limit.
const MAX_MESSAGE_BYTES: usize = 1_200_000_000;
/// How many messages may be on their way at once; the one that waits longest goes for one more. A node sends several at
/// a time: parts of copies, and pages of rows of each of its databases.
const MAX_PARTIAL: usize = 128;
/// What may be held of all of them, besides the longest: so that one beyond this comes whole, too.
const PARTIAL_BYTES: usize = 32 * 1024 * 1024;
/// A message of which nothing more has come for so long has lost a piece.
const LOST: Duration = Duration::from_secs(120);

/// Cuts a commit into pieces and hands each to `send`.
pub fn commit_pieces(own: &mut OwnCommit, mut send: impl FnMut(Bytes)) -> Result<()> {
    let attempt = rand::random();
    let header = encode(&own.header);
    let mut data = (header.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(&header);
    own.body.rewind()?;
    let mut left = own.body.len();
    for index in 0.. {
        let more = own.body.next_bytes(FRAGMENT_BYTES.saturating_sub(data.len()))?;
        left -= more.len() as u64;
        data.extend_from_slice(&more);
        let piece =
            Fragment { attempt, index, last: left == 0, data: Bytes::from(std::mem::take(&mut data)) };
        send(encode_large(&piece, piece.data.len()));
        if left == 0 {
            break;
        }
    }
    Ok(())
}

/// Cuts a message into pieces and hands each to `send`.
pub fn message_pieces(message: &Message, mut send: impl FnMut(Bytes)) {
    let len = match message {
        Message::CopyPart(part) => part.data.len(),
        Message::SyncPage(page) => page.frames.iter().map(|f| f.len() + 8).sum(),
        _ => 0,
    };
    let whole = encode_large(message, len);
    let attempt = rand::random();
    let count = whole.len().div_ceil(FRAGMENT_BYTES);
    for index in 0..count {
        let data = whole.slice(index * FRAGMENT_BYTES..whole.len().min((index + 1) * FRAGMENT_BYTES));
        let piece = Fragment { attempt, index: index as u32, last: index + 1 == count, data };
        send(encode_large(&piece, piece.data.len()));
    }
}

/// A message that is not whole yet.
struct Partial {
    next: u32,
    data: Vec<u8>,
    /// When its last piece came.
    touched: Instant,
}

/// Puts pieces of messages together again, those of one message each for itself: they come mixed with those of others
/// by the same sender.
#[derive(Default)]
pub struct MessageAssembler {
    partial: HashMap<(NodeName, u64), Partial>,
}

impl MessageAssembler {
    /// Takes a piece; returns the message when it is whole.
    pub fn push<T: DeserializeOwned>(
        &mut self,
        from: &NodeName,
        payload: &[u8],
    ) -> Result<Option<T>, WireError> {
        let piece: Fragment = decode(payload)?;
        if piece.index == 0 && piece.last {
            return decode(&piece.data).map(Some);
        }
        let (key, touched) = ((from.clone(), piece.attempt), Instant::now());
        if piece.index == 0 {
            self.partial.insert(key.clone(), Partial { next: 0, data: Vec::new(), touched });
        }
        let Some(partial) = self.partial.get_mut(&key) else { return Ok(None) };
        let fits = partial.data.len() + piece.data.len() <= MAX_MESSAGE_BYTES;
        if partial.next != piece.index || !fits {
            self.partial.remove(&key);
            return if fits { Ok(None) } else { Err(WireError::TooLarge) };
        }
        partial.data.extend_from_slice(&piece.data);
        partial.next += 1;
        partial.touched = touched;
        if piece.last {
            let whole = self.partial.remove(&key).map(|p| p.data).unwrap_or_default();
            return decode(&whole).map(Some);
        }
        self.keep_within_bounds(touched);
        Ok(None)
    }

    /// What is asked for and does not come is asked for again.
    fn keep_within_bounds(&mut self, now: Instant) {
        self.partial.retain(|_, p| now.duration_since(p.touched) < LOST);
        loop {
            let longest = self.partial.iter().max_by_key(|(_, p)| p.data.len()).map(|(key, _)| key.clone());
            let others = || self.partial.iter().filter(|(key, _)| Some(*key) != longest.as_ref());
            let held: usize = others().map(|(_, p)| p.data.len()).sum();
            if self.partial.len() <= MAX_PARTIAL && held <= PARTIAL_BYTES {
                return;
            }
            let oldest = others().min_by_key(|(_, p)| p.touched).map(|(key, _)| key.clone());
            oldest.and_then(|key| self.partial.remove(&key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::message::CopyPart;

    #[test]
    fn messages_that_never_end_do_not_pile_up() {
        for len in [FRAGMENT_BYTES, 100] {
            let data = Bytes::from(vec![3; len]);
            let endless = encode(&Fragment { attempt: 1, index: 0, last: false, data });
            let mut assembler = MessageAssembler::default();
            for n in 0..1_000 {
                let from: NodeName = format!("ghost{n}").parse().unwrap();
                assert!(assembler.push::<Message>(&from, &endless).unwrap().is_none());
            }
            let kept = MAX_PARTIAL.min(PARTIAL_BYTES / len + 1);
            assert_eq!(assembler.partial.len(), kept, "of {len} bytes");
            let held: usize = assembler.partial.values().map(|p| p.data.len()).sum();
            assert!(held <= PARTIAL_BYTES + len, "{held} bytes");
            let last: NodeName = "ghost999".parse().unwrap();
            assert!(assembler.partial.contains_key(&(last, 1)), "who waits longest goes");
        }
    }

    fn long_message(fill: u8) -> (Message, Vec<Bytes>) {
        let data = Bytes::from(vec![fill; FRAGMENT_BYTES * 2 + 17]);
        let part = CopyPart { request: 1, copy: 2, size: 3, offset: 4, data, same: false, hash: [0; 32] };
        let message = Message::CopyPart(part);
        let mut pieces = Vec::new();
        message_pieces(&message, |p| pieces.push(p));
        assert_eq!(pieces.len(), 3);
        (message, pieces)
    }

    #[test]
    fn long_messages_of_one_sender_come_back_whole_though_they_are_mixed() {
        let ((first, a), (second, b)) = (long_message(1), long_message(2));
        let mut assembler = MessageAssembler::default();
        let from: NodeName = "a".parse().unwrap();
        let mut whole = Vec::new();
        // A piece that comes twice spoils its own message only.
        let (spoilt, c) = long_message(3);
        for piece in [&a[0], &c[0], &b[0], &c[1], &c[1], &a[1], &b[1], &c[2], &b[2], &a[2]] {
            whole.extend(assembler.push::<Message>(&from, piece).unwrap());
        }
        assert!(whole == [second, first], "{} came", whole.len());
        assert!(!whole.contains(&spoilt) && assembler.partial.is_empty());
    }

    #[test]
    fn the_longest_comes_whole_beside_any_number_of_others() {
        let data = Bytes::from(vec![5; FRAGMENT_BYTES]);
        let piece = |attempt, index| encode(&Fragment { attempt, index, last: false, data: data.clone() });
        let mut assembler = MessageAssembler::default();
        let from: NodeName = "a".parse().unwrap();
        let pieces = 3 * PARTIAL_BYTES / FRAGMENT_BYTES;
        for index in 0..pieces {
            assert!(assembler.push::<Message>(&from, &piece(0, index as u32)).unwrap().is_none());
            assert!(assembler.push::<Message>(&from, &piece(1 + index as u64, 0)).unwrap().is_none());
        }
        let lengths: Vec<usize> = assembler.partial.values().map(|p| p.data.len()).collect();
        assert!(lengths.contains(&(pieces * FRAGMENT_BYTES)), "{lengths:?}");
        let held: usize = lengths.iter().sum();
        assert!(held <= pieces * FRAGMENT_BYTES + PARTIAL_BYTES && lengths.len() <= MAX_PARTIAL);
    }

    #[test]
    fn what_lost_a_piece_goes_after_a_while() {
        let (_, pieces) = long_message(1);
        let mut assembler = MessageAssembler::default();
        let from: NodeName = "a".parse().unwrap();
        assert!(assembler.push::<Message>(&from, &pieces[0]).unwrap().is_none());
        assembler.keep_within_bounds(Instant::now() + LOST / 2);
        assert_eq!(assembler.partial.len(), 1);
        assembler.keep_within_bounds(Instant::now() + LOST);
        assert!(assembler.partial.is_empty());
    }

    #[test]
    fn a_long_message_comes_back_whole() {
        let (message, pieces) = long_message(3);
        let mut assembler = MessageAssembler::default();
        let from: NodeName = "a".parse().unwrap();
        let got: Vec<_> = pieces.iter().map(|p| assembler.push::<Message>(&from, p).unwrap()).collect();
        assert_eq!(got, [None, None, Some(message)]);
    }
}
