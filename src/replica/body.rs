//! The rows of a commit on their way: frames one after the other, in memory while small, else in a temporary file.
//! Invariant: memory stays bounded however large a transaction is.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use tempfile::SpooledTempFile;

use super::Result;
use crate::core::frame::WireError;

/// Commits up to this size stay in memory.
const IN_MEMORY_BYTES: usize = 4 * 1024 * 1024;

/// A sequence of bytes that is written once and then read, perhaps more than once.
pub struct Body {
    file: SpooledTempFile,
    len: u64,
}

impl Body {
    /// An empty body that overflows into `spool_dir`.
    pub fn new(spool_dir: &Path) -> Self {
        Self { file: SpooledTempFile::new_in(IN_MEMORY_BYTES, spool_dir), len: 0 }
    }

    /// How many bytes it holds.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends bytes as they are.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Appends one block: its length, then the bytes.
    pub fn append_block(&mut self, block: &[u8]) -> io::Result<()> {
        let len = u32::try_from(block.len()).map_err(|_| io::Error::other("a block beyond 4 GiB"))?;
        self.append(&len.to_be_bytes())?;
        self.append(block)
    }

    /// Where reading stands.
    pub fn position(&mut self) -> io::Result<u64> {
        self.file.stream_position()
    }

    /// Goes to where reading stood.
    pub fn seek(&mut self, position: u64) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(position)).map(|_| ())
    }

    /// Goes back to the first byte.
    pub fn rewind(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(0)).map(|_| ())
    }

    /// The next block; `None` at the end. What a peer cut short is its fault, not the disk's.
    pub fn next_block(&mut self) -> Result<Option<Vec<u8>>> {
        let left = self.len.saturating_sub(self.file.stream_position()?);
        if left == 0 {
            return Ok(None);
        }
        let mut len = [0; 4];
        if left < len.len() as u64 {
            return Err(WireError::Truncated.into());
        }
        self.file.read_exact(&mut len)?;
        let len = u64::from(u32::from_be_bytes(len));
        if len > left - 4 {
            return Err(WireError::Truncated.into());
        }
        let mut block = vec![0; len as usize];
        self.file.read_exact(&mut block)?;
        Ok(Some(block))
    }

    /// Up to `limit` bytes from where reading stands; empty at the end.
    pub fn next_bytes(&mut self, limit: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        (&mut self.file).take(limit as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_back_from_memory_and_from_disk() {
        for size in [10, IN_MEMORY_BYTES] {
            let mut body = Body::new(&std::env::temp_dir());
            let block = vec![7; size];
            for _ in 0..3 {
                body.append_block(&block).unwrap();
            }
            body.rewind().unwrap();
            for _ in 0..3 {
                assert_eq!(body.next_block().unwrap().unwrap(), block);
            }
            assert_eq!(body.next_block().unwrap(), None);
        }
    }

    #[test]
    fn a_block_that_promises_too_much_is_an_error() {
        let mut body = Body::new(&std::env::temp_dir());
        body.append(&[0xff, 0xff, 0xff, 0xff, 1]).unwrap();
        body.rewind().unwrap();
        assert!(body.next_block().is_err());
    }
}
