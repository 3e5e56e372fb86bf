//! Bytes that were once right, made wrong: what is generated shrinks to as few changes as possible.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// One change.
#[derive(Debug, Clone)]
enum Change {
    Flip(Index, u8),
    Set(Index, u8),
    Cut(Index),
    Remove(Index, usize),
    Insert(Index, Vec<u8>),
    Repeat(Index, usize),
    /// Numbers near where integers end.
    Number(Index, u64),
    /// The rest of another sample.
    Splice(Index, Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    let ends = prop_oneof![
        Just(0),
        Just(1),
        Just(0x7f),
        Just(0xff),
        Just(0xffff),
        Just(u64::from(u32::MAX)),
        Just(i64::MAX as u64),
        Just(u64::MAX),
        any::<u64>()
    ];
    prop_oneof![
        4 => (any::<Index>(), 0..8u8).prop_map(|(at, bit)| Change::Flip(at, 1 << bit)),
        4 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        1 => any::<Index>().prop_map(Change::Cut),
        1 => (any::<Index>(), 1..20usize).prop_map(|(at, n)| Change::Remove(at, n)),
        1 => (any::<Index>(), vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        1 => (any::<Index>(), 1..200usize).prop_map(|(at, n)| Change::Repeat(at, n)),
        2 => (any::<Index>(), ends).prop_map(|(at, n)| Change::Number(at, n)),
        1 => (any::<Index>(), any::<Index>(), any::<Index>()).prop_map(|(at, of, from)| Change::Splice(at, of, from)),
    ]
}

/// One of the samples with some changes, or just noise.
pub fn mutated(samples: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let changed = (any::<Index>(), vec(change(), 0..6)).prop_map(move |(which, changes)| {
        let mut bytes = samples[which.index(samples.len())].clone();
        for change in changes {
            apply(&mut bytes, change, &samples);
        }
        bytes
    });
    prop_oneof![9 => changed, 1 => vec(any::<u8>(), 0..300)]
}

fn apply(bytes: &mut Vec<u8>, change: Change, samples: &[Vec<u8>]) {
    let len = bytes.len();
    if len == 0 {
        return;
    }
    match change {
        Change::Flip(at, bits) => bytes[at.index(len)] ^= bits,
        Change::Set(at, byte) => bytes[at.index(len)] = byte,
        Change::Cut(at) => bytes.truncate(at.index(len)),
        Change::Remove(at, n) => {
            let at = at.index(len);
            bytes.drain(at..len.min(at + n));
        }
        Change::Insert(at, new) => {
            let at = at.index(len);
            bytes.splice(at..at, new);
        }
        Change::Repeat(at, n) => {
            let at = at.index(len);
            let again = bytes[at..len.min(at + n)].to_vec();
            bytes.splice(at..at, again);
        }
        Change::Number(at, n) => {
            let at = at.index(len);
            let n = n.to_be_bytes();
            let end = len.min(at + n.len());
            bytes[at..end].copy_from_slice(&n[..end - at]);
        }
        Change::Splice(at, of, from) => {
            let other = &samples[of.index(samples.len())];
            bytes.truncate(at.index(len));
            if !other.is_empty() {
                bytes.extend_from_slice(&other[from.index(other.len())..]);
            }
        }
    }
}
