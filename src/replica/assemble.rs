//! Pieces of commits become commits again. Invariant: pieces of two sendings never mix, and what is not whole is
//! never seen by anyone.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::Result;
use super::apply::PeerCommit;
use super::body::Body;
use crate::core::frame::WireError;
use crate::core::message::{CommitHeader, Fragment, decode};
use crate::core::version::SiteId;

/// Commits that may be on their way at once, one a site; the one that waits longest goes for one more. Each node sends
/// its commits one after the other.
const MAX_PARTIAL: usize = 64;

/// A commit that is not whole yet.
struct Partial {
    attempt: u64,
    next: u32,
    body: Body,
    /// When its last piece came, counted in pieces.
    touched: u64,
}

/// Puts pieces together, one commit a site at a time.
pub struct Assembler {
    spool_dir: PathBuf,
    partial: HashMap<SiteId, Partial>,
    pushed: u64,
}

impl Assembler {
    /// An assembler that keeps large commits in `spool_dir` until they are whole.
    pub fn new(spool_dir: &Path) -> Self {
        Self { spool_dir: spool_dir.to_owned(), partial: HashMap::new(), pushed: 0 }
    }

    /// Drops what is there of a site's commit.
    pub fn forget(&mut self, site: SiteId) {
        self.partial.remove(&site);
    }

    /// Takes a piece; returns the commit when it is whole. A piece out of turn drops what was there: the hole that
    /// leaves is found and repaired like any other.
    pub fn push(&mut self, site: SiteId, piece: &Fragment) -> Result<Option<PeerCommit>> {
        self.pushed += 1;
        if piece.index == 0 {
            let (body, touched) = (Body::new(&self.spool_dir), self.pushed);
            self.partial.insert(site, Partial { attempt: piece.attempt, next: 0, body, touched });
            self.keep_within_bounds();
        }
        let Some(partial) = self.partial.get_mut(&site) else { return Ok(None) };
        if partial.attempt != piece.attempt || partial.next != piece.index {
            self.partial.remove(&site);
            return Ok(None);
        }
        if let Err(e) = partial.body.append(&piece.data) {
            // What cannot become whole must not keep the room that others need.
            self.partial.remove(&site);
            return Err(e.into());
        }
        partial.next += 1;
        partial.touched = self.pushed;
        if !piece.last {
            return Ok(None);
        }
        let Some(Partial { mut body, .. }) = self.partial.remove(&site) else { return Ok(None) };
        body.rewind()?;
        let header = body.next_block()?.ok_or(WireError::Truncated)?;
        let header: CommitHeader = decode(&header)?;
        if header.from.checked_add(1) != Some(header.to) || i64::try_from(header.to).is_err() {
            return Err(WireError::Malformed("a commit whose numbers cannot be").into());
        }
        Ok(Some(PeerCommit { site, header, body }))
    }

    fn keep_within_bounds(&mut self) {
        if self.partial.len() > MAX_PARTIAL
            && let Some(oldest) = self.partial.iter().min_by_key(|(_, p)| p.touched).map(|(site, _)| *site)
        {
            self.partial.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::core::message::encode;
    use crate::core::version::Hlc;

    fn pieces(attempt: u64) -> Vec<Fragment> {
        let header = CommitHeader { from: 0, to: 1, id: 1, prev: 0, hlc: Hlc(1), seen: vec![], rows: 0 };
        let header = encode(&header);
        let mut bytes = (header.len() as u32).to_be_bytes().to_vec();
        bytes.extend_from_slice(&header);
        let half = bytes.len() / 2;
        let piece =
            |index, last, data: &[u8]| Fragment { attempt, index, last, data: Bytes::copy_from_slice(data) };
        vec![piece(0, false, &bytes[..half]), piece(1, true, &bytes[half..])]
    }

    #[test]
    fn pieces_of_two_attempts_never_mix() {
        let mut assembler = Assembler::new(&std::env::temp_dir());
        let (a, b) = (pieces(1), pieces(2));
        let site = SiteId(9);
        assert!(assembler.push(site, &a[0]).unwrap().is_none());
        assert!(assembler.push(site, &b[1]).unwrap().is_none());
        assert!(assembler.push(site, &a[1]).unwrap().is_none(), "the first attempt was given up");
        assert!(assembler.push(site, &b[0]).unwrap().is_none());
        assert_eq!(assembler.push(site, &b[1]).unwrap().unwrap().header.to, 1);
    }

    #[test]
    fn commits_that_never_end_do_not_pile_up() {
        let mut assembler = Assembler::new(&std::env::temp_dir());
        let pieces = pieces(1);
        for site in 0..1_000 {
            assert!(assembler.push(SiteId(site), &pieces[0]).unwrap().is_none());
        }
        assert_eq!(assembler.partial.len(), MAX_PARTIAL);
        assert!(assembler.push(SiteId(0), &pieces[1]).unwrap().is_none(), "given up");
        assert!(assembler.push(SiteId(999), &pieces[1]).unwrap().is_some());
    }

    #[test]
    fn what_has_no_room_is_given_up() {
        let mut assembler = Assembler::new(Path::new("/nowhere"));
        let data = Bytes::from(vec![0; 5 << 20]);
        let piece = Fragment { attempt: 1, index: 0, last: false, data };
        assert!(matches!(assembler.push(SiteId(1), &piece), Err(super::super::ReplicaError::Spool(_))));
        assert!(assembler.partial.is_empty());
    }

    #[test]
    fn numbers_that_cannot_be_are_an_error() {
        for (from, to) in [(0, 0), (0, 2), (5, 3), (0, u64::MAX), (u64::MAX, 0), (u64::MAX - 1, u64::MAX)] {
            let header = CommitHeader { from, to, id: 1, prev: 0, hlc: Hlc(1), seen: vec![], rows: 0 };
            let header = encode(&header);
            let data = [&(header.len() as u32).to_be_bytes()[..], &header].concat().into();
            let piece = Fragment { attempt: 1, index: 0, last: true, data };
            let pushed = Assembler::new(&std::env::temp_dir()).push(SiteId(1), &piece);
            assert!(pushed.is_err(), "{from} to {to}");
        }
    }

    #[test]
    fn a_malformed_header_is_an_error() {
        let mut assembler = Assembler::new(&std::env::temp_dir());
        let data = Bytes::from_static(&[0, 0, 0, 2, 1, 0xc1]);
        assert!(assembler.push(SiteId(1), &Fragment { attempt: 1, index: 0, last: true, data }).is_err());
    }
}
