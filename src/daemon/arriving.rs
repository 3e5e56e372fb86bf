//! A copy on its way: its file, and what of it is there. Invariant: a part counts as there when its bytes are those that
//! the peer read, and are written; writing never holds up receiving.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use tokio::task::{JoinHandle, JoinSet};
use tracing::warn;

use super::direct_file::DirectFile;
use super::serve_copy::PART_BYTES;
use crate::core::message::CopyPart;

/// How many damaged parts there may be before it is given up.
const DAMAGED_TRIES: u32 = 8;
/// Bytes after which what came is brought to the disk: all at once in the end would take long, and hold up others.
const SYNC_BYTES: u64 = 64 << 20;

/// What became of a part that came.
#[derive(Debug, PartialEq, Eq)]
pub enum Written {
    /// It is there.
    Whole,
    /// Its bytes are not those that were read: it is to be asked for again.
    Damaged(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Missing,
    BeingWritten,
    There,
}

/// See the module.
pub struct Arriving {
    file: Arc<DirectFile>,
    path: String,
    /// How much of another try's file there was.
    before: u64,
    copy: u64,
    size: u64,
    parts: Vec<Part>,
    done: u64,
    same_bytes: u64,
    damaged: u32,
    /// Parts that are being checked and written: their index, and whether they were whole.
    writes: JoinSet<std::io::Result<(u64, bool)>>,
    unsynced: u64,
    syncing: Option<JoinHandle<std::io::Result<()>>>,
    progress: ProgressBar,
}

impl Arriving {
    /// Opens the file, and keeps what another try has left in it.
    pub fn open(dest: &Path) -> Result<Self> {
        let path = dest.display().to_string();
        let file = DirectFile::open(dest).with_context(|| format!("cannot write {path}"))?;
        let before = file.usual().metadata()?.len();
        Ok(Self {
            file: Arc::new(file),
            path,
            before,
            copy: 0,
            size: 0,
            parts: Vec::new(),
            done: 0,
            same_bytes: 0,
            damaged: 0,
            writes: JoinSet::new(),
            unsynced: 0,
            syncing: None,
            progress: ProgressBar::hidden(),
        })
    }

    /// The room that it has already.
    pub fn allocated(&self) -> Result<u64> {
        Ok(self.file.usual().metadata()?.blocks() * 512)
    }

    /// Says which copy it is to be, and of what size.
    pub fn begin(&mut self, copy: u64, size: u64, progress: ProgressBar) -> Result<()> {
        self.file.usual().set_len(size).with_context(|| format!("cannot write {}", self.path))?;
        (self.copy, self.size, self.progress) = (copy, size, progress);
        self.parts = vec![Part::Missing; size.div_ceil(PART_BYTES as u64) as usize];
        Ok(())
    }

    /// The copy's number, at the peer.
    pub fn copy(&self) -> u64 {
        self.copy
    }

    /// Of how many parts it consists, of a mebibyte each.
    pub fn parts(&self) -> u64 {
        self.parts.len() as u64
    }

    /// How many of them are there.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Whether all are there.
    pub fn is_whole(&self) -> bool {
        self.done == self.parts()
    }

    /// How many bytes were there already.
    pub fn same_bytes(&self) -> u64 {
        self.same_bytes
    }

    /// The first parts, of so many, that are neither there nor on their way to the disk.
    pub fn missing(&self, of: u64, at_most: usize) -> Vec<u64> {
        let parts = self.parts.iter().take(of as usize).enumerate();
        let missing = parts.filter(|(_, part)| **part == Part::Missing);
        missing.map(|(index, _)| index as u64).take(at_most).collect()
    }

    fn part_len(&self, offset: u64, size: u64) -> usize {
        size.saturating_sub(offset).min(PART_BYTES as u64) as usize
    }

    /// BLAKE3 of what is there of a part from before.
    pub fn have(&self, index: u64) -> Result<Option<[u8; 32]>> {
        let offset = index * PART_BYTES as u64;
        if offset >= self.before || self.parts.get(index as usize) == Some(&Part::There) {
            return Ok(None);
        }
        // Before the copy's size is known a part is as long as the file lets it be.
        let size = if self.copy == 0 { self.before } else { self.size };
        let mut data = vec![0; self.part_len(offset, size)];
        self.file
            .usual()
            .read_exact_at(&mut data, offset)
            .with_context(|| format!("cannot read {}", self.path))?;
        Ok(Some(*blake3::hash(&data).as_bytes()))
    }

    /// Takes a part that came, if it is wanted: what becomes of it [`Arriving::written`] tells.
    pub fn take(&mut self, part: CopyPart) {
        let index = part.offset / PART_BYTES as u64;
        let len = self.part_len(part.offset, self.size);
        let fits = part.offset.is_multiple_of(PART_BYTES as u64) && (part.same || part.data.len() == len);
        let wanted = self.parts.get(index as usize) == Some(&Part::Missing);
        if part.copy != self.copy || !fits || !wanted {
            return;
        }
        self.parts[index as usize] = Part::BeingWritten;
        if part.same {
            self.same_bytes += len as u64;
        } else {
            self.unsynced += len as u64;
        }
        let file = self.file.clone();
        self.writes.spawn_blocking(move || {
            let whole = part.same || blake3::hash(&part.data) == part.hash;
            if whole && !part.same {
                file.write_all_at(&part.data, part.offset)?;
            }
            Ok((index, whole))
        });
    }

    /// What became of a part, as soon as one is done; `None` if none is being written.
    pub async fn written(&mut self) -> Option<Result<Written>> {
        let result = self.writes.join_next().await?;
        let result = result.map_err(std::io::Error::other).and_then(|written| written);
        let written = result.with_context(|| format!("cannot write {}", self.path));
        Some(written.and_then(|(index, whole)| self.note(index, whole)))
    }

    fn note(&mut self, index: u64, whole: bool) -> Result<Written> {
        if !whole {
            self.parts[index as usize] = Part::Missing;
            self.damaged += 1;
            if self.damaged > DAMAGED_TRIES {
                bail!(
                    "the copy is damaged on its way, again and again: check memory and disks of both hosts"
                );
            }
            warn!("a part of the copy was damaged on its way: it is asked for again");
            return Ok(Written::Damaged(index));
        }
        self.parts[index as usize] = Part::There;
        self.done += 1;
        self.progress.inc(self.part_len(index * PART_BYTES as u64, self.size) as u64);
        if self.unsynced >= SYNC_BYTES && self.syncing.as_ref().is_none_or(JoinHandle::is_finished) {
            self.unsynced = 0;
            let file = self.file.clone();
            // If it fails, so does the one at the end.
            self.syncing = Some(tokio::task::spawn_blocking(move || file.usual().sync_data()));
        }
        Ok(Written::Whole)
    }

    /// Waits until nothing is being written any more: what is left of this try must not be written into the next.
    pub async fn settle(&mut self) {
        while self.writes.join_next().await.is_some() {}
    }

    /// Brings all of it to the disk.
    pub async fn finish(self) -> Result<()> {
        self.progress.finish_and_clear();
        if let Some(syncing) = self.syncing {
            syncing.await??;
        }
        let synced = tokio::task::spawn_blocking(move || self.file.usual().sync_all()).await?;
        synced.with_context(|| format!("cannot bring {} to the disk", self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    const COPY: u64 = 7;

    fn part(index: u64, data: &[u8]) -> CopyPart {
        let hash = *blake3::hash(data).as_bytes();
        let (offset, data) = (index * PART_BYTES as u64, Bytes::copy_from_slice(data));
        CopyPart { request: 1, copy: COPY, size: 0, offset, data, same: false, hash }
    }

    fn content() -> Vec<u8> {
        (0..2 * PART_BYTES + 100).map(|i| (i / 3) as u8).collect()
    }

    fn begun(path: &Path) -> Arriving {
        let mut arriving = Arriving::open(path).unwrap();
        arriving.begin(COPY, content().len() as u64, ProgressBar::hidden()).unwrap();
        arriving
    }

    #[tokio::test]
    async fn parts_come_in_any_order_more_than_once_and_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copy");
        let (content, mut arriving) = (content(), begun(&path));
        let of = |i: usize| &content[i * PART_BYTES..content.len().min((i + 1) * PART_BYTES)];
        let mut flipped = part(1, of(1));
        let mut bytes = flipped.data.to_vec();
        bytes[500] ^= 1;
        flipped.data = Bytes::from(bytes);
        arriving.take(flipped.clone());
        assert_eq!(arriving.written().await.unwrap().unwrap(), Written::Damaged(1));
        assert_eq!(arriving.missing(3, 16), [0, 1, 2], "nothing of it counts");
        // Of another copy, beside a part's beginning, too short, beyond the end.
        let strange = [
            CopyPart { copy: COPY + 1, ..part(0, of(0)) },
            CopyPart { offset: 5, ..part(0, of(0)) },
            part(0, &of(0)[1..]),
            part(3, &[]),
            part(u64::MAX / PART_BYTES as u64, of(0)),
        ];
        for part in strange {
            arriving.take(part);
            assert!(arriving.written().await.is_none());
        }
        for index in [2, 0, 0, 1, 2] {
            arriving.take(part(index as u64, of(index)));
        }
        while let Some(written) = arriving.written().await {
            assert_eq!(written.unwrap(), Written::Whole);
        }
        assert!(arriving.is_whole());
        arriving.finish().await.unwrap();
        assert!(std::fs::read(&path).unwrap() == content);
    }

    #[tokio::test]
    async fn damage_without_an_end_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut arriving = begun(&dir.path().join("copy"));
        let damaged = CopyPart { hash: [0; 32], ..part(2, &[1; 100]) };
        for _ in 0..DAMAGED_TRIES {
            arriving.take(damaged.clone());
            assert_eq!(arriving.written().await.unwrap().unwrap(), Written::Damaged(2));
        }
        arriving.take(damaged);
        let told = arriving.written().await.unwrap().unwrap_err().to_string();
        assert!(told.contains("damaged on its way, again and again"), "{told}");
    }

    #[tokio::test]
    async fn what_another_try_left_is_not_fetched_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copy");
        let content = content();
        std::fs::write(&path, &content[..PART_BYTES + 10]).unwrap();
        let mut arriving = begun(&path);
        let first = *blake3::hash(&content[..PART_BYTES]).as_bytes();
        assert_eq!(arriving.have(0).unwrap(), Some(first));
        assert!(
            arriving
                .have(1)
                .unwrap()
                .is_some_and(|h| h != *blake3::hash(&content[PART_BYTES..2 * PART_BYTES]).as_bytes())
        );
        assert_eq!(arriving.have(2).unwrap(), None, "nothing was there");
        arriving.take(CopyPart { same: true, data: Bytes::new(), ..part(0, &content[..PART_BYTES]) });
        assert_eq!(arriving.written().await.unwrap().unwrap(), Written::Whole);
        assert_eq!((arriving.same_bytes(), arriving.done()), (PART_BYTES as u64, 1));
        assert_eq!(arriving.have(0).unwrap(), None);
    }
}
