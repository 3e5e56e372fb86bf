//! The stand-in for a parent-death signal where the system has none (macOS): a shell that waits for the end of a
//! pipe only we hold, and then kills the server. Invariant: it is ended before the server's process id is free for
//! another process.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// `read` returns only when our end of the pipe is gone, whichever way we died.
const SCRIPT: &str = "read -r _; kill -9 \"$1\" 2>/dev/null";

pub(crate) struct Guard(Child);

impl Guard {
    /// Starts to watch over `pid`.
    pub(crate) fn start(pid: u32) -> io::Result<Self> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", SCRIPT, "sh", &pid.to_string()]).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map(Self)
    }

    #[cfg(test)]
    fn let_go(mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
        std::mem::forget(self);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Killed first: closing the pipe is what it takes for our death.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").spawn().expect("sleep is everywhere")
    }

    #[test]
    fn kills_when_the_pipe_ends_and_only_then() {
        let mut watched = sleeper();
        let guard = Guard::start(watched.id()).expect("a shell");
        drop(guard);
        assert!(watched.try_wait().expect("our child").is_none(), "an ended guard must not kill");

        Guard::start(watched.id()).expect("a shell").let_go();
        let status = watched.wait().expect("our child");
        assert!(!status.success());
    }
}
