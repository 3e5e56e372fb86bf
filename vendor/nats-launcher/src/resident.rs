//! Gives memory back that holds a part of the program's own file. Invariant: the bytes stay what they are.
#![allow(unsafe_code)] // `madvise` takes a pointer; the pages are the program's file, read-only, and are read again on use.

/// Whoever looks at `bytes` later has them read from the file again. `bytes` must be a constant of the program.
#[cfg(target_os = "linux")]
pub(crate) fn give_back(bytes: &'static [u8]) {
    use rustix::mm::{Advice, madvise};

    let page = rustix::param::page_size();
    let begin = bytes.as_ptr().addr().next_multiple_of(page);
    let end = (bytes.as_ptr().addr() + bytes.len()) / page * page;
    if begin >= end {
        return;
    }
    let first = bytes.as_ptr().with_addr(begin).cast_mut().cast();
    // SAFETY: the whole pages lie within a constant, which is mapped from the program's file and never written to: the next
    // access finds the file's bytes, as the first did. Nothing else is on these pages.
    // Without it the system takes them itself when it needs the memory.
    let _ = unsafe { madvise(first, end - begin, Advice::LinuxDontNeed) };
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn give_back(_: &'static [u8]) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::give_back;

    static PART: [u8; 1 << 16] = {
        let mut part = [0; 1 << 16];
        let mut n = 0;
        while n < part.len() {
            part[n] = (n % 251) as u8;
            n += 1;
        }
        part
    };

    /// How much of the program's file is resident, in KiB.
    fn resident() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("a status");
        let line = status.lines().find(|line| line.starts_with("RssFile:")).expect("a line");
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
    }

    #[test]
    fn what_is_given_back_is_there_when_it_is_read_again() {
        let is_whole = || PART.iter().enumerate().all(|(n, byte)| *byte == (n % 251) as u8);
        assert!(is_whole());
        let before = resident();
        give_back(&PART);
        assert!(resident() < before, "{} KiB, {before} before", resident());
        give_back(&PART[..100]);
        assert!(is_whole());
    }
}
