//! Messages and commits into what the fabric carries. Invariant: what is sent was committed before.

use std::collections::HashMap;

use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::Result;
use super::absorb::OwnCommit;
use crate::core::frame::WireError;
use crate::core::message::{FRAGMENT_BYTES, Fragment, Message, decode, encode, encode_large};
use crate::core::names::NodeName;

/// What may be held of unfinished messages: a page of rows near SQLite's limit.
const MAX_MESSAGE_BYTES: usize = 1_200_000_000;
/// How many senders may be in the middle of one; the one that waits longest goes for one more.
const MAX_PARTIAL: usize = 64;
/// Until this much is held, nobody's goes.
const PARTIAL_BYTES: usize = 64 * 1024 * 1024;

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
    attempt: u64,
    next: u32,
    data: Vec<u8>,
    /// When its last piece came, counted in pieces.
    touched: u64,
}

/// Puts pieces of messages together again, one message a sender and attempt.
#[derive(Default)]
pub struct MessageAssembler {
    partial: HashMap<NodeName, Partial>,
    pushed: u64,
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
        self.pushed += 1;
        if piece.index == 0 {
            let (attempt, touched) = (piece.attempt, self.pushed);
            self.partial.insert(from.clone(), Partial { attempt, next: 0, data: Vec::new(), touched });
        }
        let Some(partial) = self.partial.get_mut(from) else { return Ok(None) };
        let fits = partial.data.len() + piece.data.len() <= MAX_MESSAGE_BYTES;
        if partial.attempt != piece.attempt || partial.next != piece.index || !fits {
            self.partial.remove(from);
            return if fits { Ok(None) } else { Err(WireError::TooLarge) };
        }
        partial.data.extend_from_slice(&piece.data);
        partial.next += 1;
        partial.touched = self.pushed;
        if piece.last {
            let whole = self.partial.remove(from).map(|p| p.data).unwrap_or_default();
            return decode(&whole).map(Some);
        }
        self.keep_within_bounds();
        Ok(None)
    }

    /// What is asked for and does not come is asked for again.
    fn keep_within_bounds(&mut self) {
        let held = |all: &HashMap<_, Partial>| all.values().map(|p| p.data.len()).sum::<usize>();
        while self.partial.len() > 1
            && (self.partial.len() > MAX_PARTIAL || held(&self.partial) > PARTIAL_BYTES)
        {
            let oldest = self.partial.iter().min_by_key(|(_, p)| p.touched).map(|(name, _)| name.clone());
            oldest.and_then(|name| self.partial.remove(&name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::message::CopyPart;

    #[test]
    fn messages_that_never_end_do_not_pile_up() {
        let data = Bytes::from(vec![3; FRAGMENT_BYTES]);
        let endless = encode(&Fragment { attempt: 1, index: 0, last: false, data });
        let mut assembler = MessageAssembler::default();
        for n in 0..1_000 {
            let from: NodeName = format!("ghost{n}").parse().unwrap();
            assert!(assembler.push::<Message>(&from, &endless).unwrap().is_none());
        }
        assert_eq!(assembler.partial.len(), MAX_PARTIAL);
        let held: usize = assembler.partial.values().map(|p| p.data.len()).sum();
        assert!(held <= PARTIAL_BYTES);
    }

    #[test]
    fn a_long_message_comes_back_whole() {
        let data = Bytes::from(vec![3; FRAGMENT_BYTES * 2 + 17]);
        let part = CopyPart { request: 1, copy: 2, size: 3, offset: 4, data, same: false, hash: [0; 32] };
        let message = Message::CopyPart(part);
        let mut pieces = Vec::new();
        message_pieces(&message, |p| pieces.push(p));
        assert_eq!(pieces.len(), 3);
        let mut assembler = MessageAssembler::default();
        let from: NodeName = "a".parse().unwrap();
        let got: Vec<_> = pieces.iter().map(|p| assembler.push::<Message>(&from, p).unwrap()).collect();
        assert_eq!(got, [None, None, Some(message)]);
    }
}
