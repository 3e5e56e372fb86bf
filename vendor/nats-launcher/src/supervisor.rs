//! Keeps one server running. Invariant: at most one server runs at a time, every one that was started is reaped, and
//! none outlives this process.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use tracing::warn;

use crate::error::LaunchError;
use crate::guard::Guard;
use crate::log_line::{Level, LogLine};
use crate::spawn::spawn;

/// How long to wait between a death and the next start: doubled each time, back to the first after a long life.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// After the first death.
    pub first: Duration,
    /// Never longer than this.
    pub most: Duration,
    /// A server that lived this long was well.
    pub reset_after: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(50),
            most: Duration::from_secs(5),
            reset_after: Duration::from_secs(30),
        }
    }
}

/// The line that says that the client listener and the storage are open.
pub const READY: &str = "Server is ready";

/// The line that says that the listener for other servers is open. It may come after [`READY`].
pub const ROUTES_READY: &str = "Listening for route connections on ";

/// What to run.
#[derive(Debug, Clone)]
pub struct ServerSpec {
    /// A name for the log.
    pub name: String,
    /// The program, from [`crate::Bundle::install`].
    pub binary: PathBuf,
    /// Its arguments. They are visible to everybody on the host: no secrets.
    pub args: Vec<OsString>,
    /// The size at which Go's runtime begins to collect hard.
    pub memory_limit_mib: Option<u64>,
    /// It is ready when it has written lines that begin with each of these, in any order: see [`READY`].
    pub ready_when: Vec<&'static str>,
    /// Lines that begin with one of these are of no interest to an operator: they are told at debug level. `""` is
    /// every line.
    pub hushed: Vec<&'static str>,
    /// Lines that contain one of these are handed over as [`ServerEvent::Said`]; in the log they are told at debug level.
    pub overheard: Vec<&'static str>,
    /// Time between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// Time between a death and the next start.
    pub backoff: Backoff,
}

/// Why a server ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitCause {
    /// It was asked to.
    Stopped,
    /// Another process listens on an address it needs.
    PortTaken {
        /// The address, as `host:port`.
        address: String,
    },
    /// It gave up before it was ready; its last words are in [`Exit::message`].
    NeverReady,
    /// It said that the system gave it no more memory.
    OutOfMemory,
    /// It hung, and was to be replaced.
    Replaced,
    /// It was running.
    Died,
}

/// The end of one server.
#[derive(Debug, Clone)]
pub struct Exit {
    /// Why.
    pub cause: ExitCause,
    /// How; `None` when it could not even be started.
    pub status: Option<ExitStatus>,
    /// The gravest of its last log lines, or what the system said.
    pub message: Option<String>,
}

/// What happens to the server. Told from the supervisor's own thread: return soon.
#[derive(Debug, Clone)]
pub enum ServerEvent {
    /// A process was started.
    Started {
        /// Its id.
        pid: u32,
    },
    /// It has written all lines of [`ServerSpec::ready_when`].
    Ready {
        /// Its id.
        pid: u32,
    },
    /// It has written a line of [`ServerSpec::overheard`].
    Said {
        /// The line, without its time and level.
        text: String,
    },
    /// It has ended, and is reaped.
    Exited {
        /// How and why.
        exit: Exit,
        /// When the next one starts; `None` when it was stopped for good.
        restart_in: Option<Duration>,
    },
}

enum Message {
    Stop,
    Kill,
    Replace,
    Reload,
    Ready,
    Said(String),
    Exited(LastWords),
}

#[derive(Default)]
struct LastWords {
    message: Option<String>,
    port_taken: Option<String>,
    out_of_memory: bool,
}

#[derive(Default)]
struct Vitals {
    /// 0 when none runs.
    pid: AtomicU32,
    starts: AtomicU64,
}

/// A running server and what keeps it running. Dropped, it kills the server; [`Supervisor::stop`] is the gentle way.
pub struct Supervisor {
    mailbox: Sender<Message>,
    vitals: Arc<Vitals>,
    thread: Option<JoinHandle<()>>,
}

impl Supervisor {
    /// Starts the server and goes on starting it until it is stopped. What happens is told to `on_event`.
    pub fn start(
        spec: ServerSpec,
        on_event: impl FnMut(ServerEvent) + Send + 'static,
    ) -> Result<Self, LaunchError> {
        let (mailbox, inbox) = mpsc::channel();
        let vitals = Arc::new(Vitals::default());
        let binary = spec.binary.clone();
        let run = Run {
            spec,
            mailbox: mailbox.clone(),
            inbox,
            vitals: vitals.clone(),
            on_event: Box::new(on_event),
        };
        // This thread starts the server and lives as long: the parent-death signal is tied to it.
        let thread = thread::Builder::new()
            .name("nats-supervisor".to_owned())
            .spawn(move || run.run())
            .map_err(|source| LaunchError::Spawn { path: binary, source })?;
        Ok(Self { mailbox, vitals, thread: Some(thread) })
    }

    /// The running server's process id.
    pub fn pid(&self) -> Option<u32> {
        Some(self.vitals.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    /// How often the server had to be started again.
    pub fn restarts(&self) -> u64 {
        self.vitals.starts.load(Ordering::Relaxed).saturating_sub(1)
    }

    /// Makes the server read its configuration again (SIGHUP).
    pub fn reload(&self) {
        self.tell(Message::Reload);
    }

    /// Kills a server that hangs. The next one is started as after any death.
    pub fn kill_and_restart(&self) {
        self.tell(Message::Replace);
    }

    /// SIGTERM, the grace period, SIGKILL. Blocks until the server is gone.
    pub fn stop(mut self) {
        self.tell(Message::Stop);
        self.join();
    }

    /// A supervisor that no longer listens has already stopped its server.
    fn tell(&self, message: Message) {
        let _ = self.mailbox.send(message);
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.tell(Message::Kill);
            self.join();
        }
    }
}

struct Run {
    spec: ServerSpec,
    mailbox: Sender<Message>,
    inbox: Receiver<Message>,
    vitals: Arc<Vitals>,
    on_event: Box<dyn FnMut(ServerEvent) + Send>,
}

impl Run {
    fn run(mut self) {
        let mut delay = self.spec.backoff.first;
        loop {
            let started = Instant::now();
            let exit = match self.launch() {
                Ok((child, guard)) => self.watch(child, guard),
                Err(e) => Exit { cause: ExitCause::NeverReady, status: None, message: Some(e.to_string()) },
            };
            self.vitals.pid.store(0, Ordering::Relaxed);
            if exit.cause == ExitCause::Stopped {
                (self.on_event)(ServerEvent::Exited { exit, restart_in: None });
                return;
            }
            if started.elapsed() >= self.spec.backoff.reset_after {
                delay = self.spec.backoff.first;
            }
            (self.on_event)(ServerEvent::Exited { exit, restart_in: Some(delay) });
            if self.told_to_stop_within(delay) {
                let exit = Exit { cause: ExitCause::Stopped, status: None, message: None };
                (self.on_event)(ServerEvent::Exited { exit, restart_in: None });
                return;
            }
            delay = (delay * 2).min(self.spec.backoff.most);
        }
    }

    fn launch(&mut self) -> io::Result<(Child, Option<Guard>)> {
        let mut command = Command::new(&self.spec.binary);
        // Our environment may hold secrets, and the server's configuration can refer to variables.
        command.args(&self.spec.args).env_clear();
        if let Some(limit) = self.spec.memory_limit_mib {
            command.env("GOMEMLIMIT", format!("{limit}MiB"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = spawn(&mut command)?;
        let guard = if cfg!(target_os = "linux") { None } else { Guard::start(child.id()).ok() };
        let stderr = child.stderr.take().expect("stderr is piped");
        let listener = Listener {
            pid: pid_of(&child),
            name: self.spec.name.clone(),
            awaited: self.spec.ready_when.clone(),
            hushed: self.spec.hushed.clone(),
            overheard: self.spec.overheard.clone(),
            mailbox: self.mailbox.clone(),
        };
        let thread = thread::Builder::new().name("nats-log".to_owned());
        if let Err(e) = thread.spawn(move || listener.run(stderr)) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(e);
        }
        self.vitals.pid.store(child.id(), Ordering::Relaxed);
        self.vitals.starts.fetch_add(1, Ordering::Relaxed);
        (self.on_event)(ServerEvent::Started { pid: child.id() });
        Ok((child, guard))
    }

    /// Until the server has ended. Signals are sent from here alone, and only before the process is reaped: its id
    /// cannot belong to another one.
    fn watch(&mut self, mut child: Child, guard: Option<Guard>) -> Exit {
        let pid = pid_of(&child);
        let (mut ready, mut kill_at, mut stopping, mut replaced) = (false, None::<Instant>, false, false);
        let words = loop {
            let message = match kill_at {
                None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => self.inbox.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match message {
                Ok(Message::Ready) => {
                    ready = true;
                    (self.on_event)(ServerEvent::Ready { pid: child.id() });
                }
                Ok(Message::Said(text)) => (self.on_event)(ServerEvent::Said { text }),
                Ok(Message::Reload) => signal(pid, Signal::HUP),
                Ok(Message::Replace) => {
                    replaced = true;
                    signal(pid, Signal::KILL);
                }
                Ok(Message::Stop) => {
                    stopping = true;
                    signal(pid, Signal::TERM);
                    kill_at = Some(Instant::now() + self.spec.grace);
                }
                Ok(Message::Kill) | Err(_) => {
                    stopping = true;
                    signal(pid, Signal::KILL);
                    kill_at = None;
                }
                Ok(Message::Exited(words)) => break words,
            }
        };
        drop(guard);
        let status = child.wait().ok();
        let cause = match words.port_taken {
            _ if stopping => ExitCause::Stopped,
            Some(address) => ExitCause::PortTaken { address },
            None if replaced => ExitCause::Replaced,
            None if words.out_of_memory => ExitCause::OutOfMemory,
            None if ready => ExitCause::Died,
            None => ExitCause::NeverReady,
        };
        Exit { cause, status, message: words.message }
    }

    fn told_to_stop_within(&self, delay: Duration) -> bool {
        let until = Instant::now() + delay;
        loop {
            match self.inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Message::Stop | Message::Kill) | Err(RecvTimeoutError::Disconnected) => return true,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

fn signal(pid: Pid, signal: Signal) {
    if let Err(e) = kill_process(pid, signal) {
        warn!(pid = pid.as_raw_nonzero().get(), signal = signal.as_raw(), "cannot signal nats-server: {e}");
    }
}

/// Reads one server's log.
struct Listener {
    pid: Pid,
    name: String,
    /// What it still has to say to be ready.
    awaited: Vec<&'static str>,
    hushed: Vec<&'static str>,
    overheard: Vec<&'static str>,
    mailbox: Sender<Message>,
}

impl Listener {
    /// Relays the log until the server closes it, then waits for its end without reaping it.
    fn run(mut self, stderr: ChildStderr) {
        let mut words = LastWords::default();
        let mut reader = BufReader::new(stderr);
        let mut raw = Vec::new();
        while reader.read_until(b'\n', &mut raw).is_ok_and(|n| n > 0) {
            self.take_in(&LogLine::parse(String::from_utf8_lossy(&raw).trim_end()), &mut words);
            raw.clear();
        }
        while waitid(WaitId::Pid(self.pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
            .is_err_and(|e| e == rustix::io::Errno::INTR)
        {}
        self.tell(Message::Exited(words));
    }

    fn take_in(&mut self, line: &LogLine<'_>, words: &mut LastWords) {
        let hushed = self.hushed.iter().any(|beginning| line.text.starts_with(beginning));
        let overheard = self.overheard.iter().any(|part| line.text.contains(part));
        line.relay(&self.name, hushed || overheard);
        if overheard {
            self.tell(Message::Said(line.text.to_owned()));
        }
        if matches!(line.level, Level::Error | Level::Fatal) {
            words.out_of_memory |= line.is_out_of_memory();
            words.port_taken = line.port_taken().or(words.port_taken.take());
            words.message = Some(line.text.to_owned());
        }
        if line.level == Level::Info && !self.awaited.is_empty() {
            self.awaited.retain(|beginning| !line.text.starts_with(beginning));
            if self.awaited.is_empty() {
                self.tell(Message::Ready);
            }
        }
    }

    /// A supervisor that no longer listens has reaped its server.
    fn tell(&self, message: Message) {
        let _ = self.mailbox.send(message);
    }
}
