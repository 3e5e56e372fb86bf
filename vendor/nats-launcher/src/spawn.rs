//! Starts the server so that it cannot outlive us. Invariant: only the thread that stays for the server's whole life
//! may call [`spawn`], because the parent-death signal is sent when that *thread* ends.
#![allow(unsafe_code)] // `pre_exec` has no safe form; the closure makes two system calls and allocates nothing.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

/// Another thread that forks at the wrong moment holds the freshly unpacked file open for writing until its exec.
const BUSY_RETRIES: u32 = 20;
const BUSY_PAUSE: Duration = Duration::from_millis(10);

pub(crate) fn spawn(command: &mut Command) -> io::Result<Child> {
    // Its own process group: a Ctrl-C at the terminal is for us, we stop the server in our own order.
    command.process_group(0);
    bind_to_parent(command);
    for _ in 0..BUSY_RETRIES {
        match command.spawn() {
            Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy => thread::sleep(BUSY_PAUSE),
            result => return result,
        }
    }
    command.spawn()
}

#[cfg(target_os = "linux")]
fn bind_to_parent(command: &mut Command) {
    use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

    let parent = getpid();
    let bind = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the call above: then no signal will ever come.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::Error::from(rustix::io::Errno::SRCH)) }
    };
    // SAFETY: between fork and exec the closure makes only async-signal-safe system calls and touches no heap.
    unsafe { command.pre_exec(bind) };
}

#[cfg(not(target_os = "linux"))]
fn bind_to_parent(_command: &mut Command) {}
