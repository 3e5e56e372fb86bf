//! Writing a large file past the page cache. Invariant: what cannot be written so is written as usual; the bytes are the
//! same, and so is what an fsync of the file says about them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What offsets, lengths and addresses have to be multiples of: enough for every device.
const ALIGNMENT: usize = 4096;

/// A file that nobody reads soon. A copy of a gigabyte in the page cache would push out what the host's programs use, and
/// to bring it there is a quarter of the processor time that a node's joining takes (`figures join`).
pub struct DirectFile {
    usual: File,
    direct: Option<File>,
}

impl DirectFile {
    /// Opens or makes it, and keeps what is in it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let usual = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
        Ok(Self { usual, direct: open_direct(path) })
    }

    /// The file, to be used as usual.
    pub fn usual(&self) -> &File {
        &self.usual
    }

    /// Writes at an offset.
    pub fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let is_aligned = data.len().is_multiple_of(ALIGNMENT) && offset.is_multiple_of(ALIGNMENT as u64);
        let Some(direct) = self.direct.as_ref().filter(|_| is_aligned) else {
            return self.usual.write_all_at(data, offset);
        };
        let (buffer, at) = aligned(data);
        match direct.write_all_at(&buffer[at..], offset) {
            // The device wants more than others, or the file system cannot do it after all.
            Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
                self.usual.write_all_at(data, offset)
            }
            result => result,
        }
    }
}

/// A copy of the data that begins at such an address, and where in the buffer that is.
fn aligned(data: &[u8]) -> (Vec<u8>, usize) {
    let mut buffer: Vec<u8> = Vec::with_capacity(data.len() + ALIGNMENT);
    let at = buffer.as_ptr().align_offset(ALIGNMENT);
    buffer.resize(at, 0);
    buffer.extend_from_slice(data);
    (buffer, at)
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    // Some file systems do not have it.
    OpenOptions::new().write(true).custom_flags(flags).open(path).ok()
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_path: &Path) -> Option<File> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_either_way_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"what was there").unwrap();
        let content: Vec<u8> = (0..20 * ALIGNMENT + 777).map(|i| (i / 5) as u8).collect();
        let file = DirectFile::open(&path).unwrap();
        let usual = DirectFile { usual: File::create(dir.path().join("usual")).unwrap(), direct: None };
        for file in [&file, &usual] {
            file.usual().set_len(content.len() as u64).unwrap();
            // Aligned in both, in length, in place, in neither; in an order that leaves holes for a while.
            for (from, to) in [(8, 20), (0, 4), (4, 5)].map(|(a, b)| (a * ALIGNMENT, b * ALIGNMENT)) {
                file.write_all_at(&content[from..to], from as u64).unwrap();
            }
            let odd = [
                (5 * ALIGNMENT, 5 * ALIGNMENT + 10),
                (5 * ALIGNMENT + 10, 6 * ALIGNMENT + 10),
                (6 * ALIGNMENT + 10, 8 * ALIGNMENT),
                (20 * ALIGNMENT, content.len()),
            ];
            for (from, to) in odd {
                file.write_all_at(&content[from..to], from as u64).unwrap();
            }
            file.usual().sync_all().unwrap();
        }
        assert!(std::fs::read(&path).unwrap() == content);
        assert!(std::fs::read(dir.path().join("usual")).unwrap() == content);
        let mut read = vec![0; ALIGNMENT];
        file.usual().read_exact_at(&mut read, 9 * ALIGNMENT as u64).unwrap();
        assert!(read[..] == content[9 * ALIGNMENT..10 * ALIGNMENT], "who has read it before sees it");
        file.write_all_at(&[7; ALIGNMENT], 9 * ALIGNMENT as u64).unwrap();
        file.usual().read_exact_at(&mut read, 9 * ALIGNMENT as u64).unwrap();
        assert!(read.iter().all(|b| *b == 7), "and what is written over it");
    }

    #[test]
    fn what_the_file_does_not_take_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(DirectFile::open(&dir.path().join("no").join("such")).is_err());
        let path = dir.path().join("file");
        std::fs::write(&path, b"").unwrap();
        let read_only = || Some(File::open(&path).unwrap());
        let file = DirectFile { usual: File::open(&path).unwrap(), direct: read_only() };
        assert!(file.write_all_at(&[1; ALIGNMENT], 0).is_err());
        assert!(file.write_all_at(&[1; 10], 0).is_err());
    }
}
