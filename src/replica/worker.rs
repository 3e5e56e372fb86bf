//! The thread of one database: it alone uses the file, takes in what arrives, and hands out what is to be sent.
//! Invariant: what cannot be done now (disk full, file busy) is tried again and never ends the thread.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::ReplicaError;
use super::clock::{SharedClocks, steady_ms};
use super::engine::{Action, Engine};
use super::mark::{Mark, Position};
use super::parts::PART_ROWS;
use super::send::{commit_pieces, message_pieces};
use crate::core::message::{Fragment, Message};
use crate::core::names::{DbName, NodeName};
use crate::core::version::SiteId;
use crate::fabric::link::{Logged, Outgoing};

/// How often the file is looked at when nothing hints at a change.
const TICK: Duration = Duration::from_millis(250);
/// After a commit of many rows: how long to gather before the next one, and what counts as many.
const GATHER: Duration = Duration::from_millis(10);
const MANY_ROWS: u64 = 300;
/// How often to look at the log meanwhile: where it ends for a reader, a transaction ends.
const LOOK: Duration = Duration::from_millis(1);
/// Inputs that may wait. Each is a message; what they weigh is bounded separately.
const QUEUE: usize = 16 * 1024;
/// Bytes that may wait: what comes beyond is dropped and fetched from a peer later.
const QUEUE_BYTES: usize = 256 * 1024 * 1024;
/// How long to wait after a failure before the next try.
const RETRY: Duration = Duration::from_millis(500);

/// Something for the thread to do.
pub enum Input {
    /// The file may have been written.
    Wake,
    /// A piece of a commit.
    Fragment(SiteId, Fragment),
    /// A message about this database.
    Message(NodeName, Message),
    /// What was read of a peer's log.
    Logged(Logged),
    /// A peer has come (back).
    Greet(NodeName),
    /// Anything else, in the thread.
    Do(Box<dyn FnOnce(&mut Engine) + Send>),
    /// Absorb and publish what there is, then end.
    Stop,
}

/// Where to send work for the thread.
#[derive(Clone)]
pub struct WorkerHandle {
    inputs: SyncSender<Input>,
    woken: Arc<AtomicBool>,
    queued_bytes: Arc<AtomicUsize>,
    replaced: Arc<Mutex<Option<String>>>,
    gives_way: Arc<AtomicBool>,
    changed: tokio::sync::watch::Receiver<i64>,
}

impl WorkerHandle {
    /// Tells whenever rows of the file have changed: its counter of changes.
    pub fn changed(&self) -> tokio::sync::watch::Receiver<i64> {
        self.changed.clone()
    }

    /// Whether programs write the file, so that other work is to give way to them.
    pub fn gives_way(&self) -> bool {
        self.gives_way.load(Ordering::Relaxed)
    }

    /// Whether both are handles of one thread: the file may have been opened anew.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.woken, &other.woken)
    }

    /// What happened to the file, if the thread has ended because of that.
    pub fn replaced(&self) -> Option<String> {
        self.replaced.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Hints that the file may have been written.
    pub fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) && self.inputs.try_send(Input::Wake).is_err() {
            self.woken.store(false, Ordering::Release);
        }
    }

    /// Hands over what arrived; `false` if there is too much already, and it was dropped.
    pub fn offer(&self, input: Input) -> bool {
        let size = weight(&input);
        if self.queued_bytes.load(Ordering::Relaxed) + size > QUEUE_BYTES {
            return false;
        }
        self.queued_bytes.fetch_add(size, Ordering::Relaxed);
        match self.inputs.try_send(input) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.queued_bytes.fetch_sub(size, Ordering::Relaxed);
                false
            }
        }
    }

    /// Runs something in the thread and returns its result; `None` if the thread has ended.
    pub fn call<T: Send + 'static>(&self, work: impl FnOnce(&mut Engine) -> T + Send + 'static) -> Option<T> {
        let (answer, answered) = mpsc::sync_channel(1);
        let work = Box::new(move |engine: &mut Engine| drop(answer.send(work(engine))));
        self.inputs.send(Input::Do(work)).ok()?;
        answered.recv().ok()
    }

    /// Asks the thread to end.
    pub fn stop(&self) {
        // An error says that it has ended already.
        drop(self.inputs.send(Input::Stop));
    }
}

fn weight(input: &Input) -> usize {
    match input {
        Input::Fragment(_, piece) => piece.data.len() + 100,
        Input::Message(_, Message::SyncPage(page)) => page.frames.iter().map(bytes::Bytes::len).sum(),
        Input::Logged(logged) => logged.pieces.iter().map(bytes::Bytes::len).sum(),
        _ => 0,
    }
}

/// What the thread tells of itself after every turn.
pub type Report = Box<dyn FnMut(&Engine, Option<&str>) + Send>;

/// The thread's own side.
pub struct Worker {
    db: DbName,
    engine: Engine,
    inputs: Receiver<Input>,
    woken: Arc<AtomicBool>,
    queued_bytes: Arc<AtomicUsize>,
    replaced: Arc<Mutex<Option<String>>>,
    gives_way: Arc<AtomicBool>,
    outgoing: tokio::sync::mpsc::Sender<Outgoing>,
    report: Report,
    clocks: SharedClocks,
    mark: Option<Mark>,
    trouble: Option<String>,
    gather_until: Option<Instant>,
    changed: tokio::sync::watch::Sender<i64>,
}

impl Worker {
    /// A worker that has not started.
    pub fn new(
        db: DbName,
        engine: Engine,
        outgoing: tokio::sync::mpsc::Sender<Outgoing>,
        report: Report,
        clocks: SharedClocks,
    ) -> (Self, WorkerHandle) {
        let (sender, inputs) = mpsc::sync_channel(QUEUE);
        let (woken, queued_bytes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let replaced = Arc::new(Mutex::new(None));
        let ours = replaced.clone();
        let gives_way = Arc::new(AtomicBool::new(false));
        let (tell, changed) = tokio::sync::watch::channel(engine.store().head().lsn);
        let handle = WorkerHandle {
            inputs: sender,
            woken: woken.clone(),
            queued_bytes: queued_bytes.clone(),
            replaced,
            gives_way: gives_way.clone(),
            changed,
        };
        let worker = Self {
            db,
            engine,
            inputs,
            woken,
            queued_bytes,
            replaced: ours,
            gives_way,
            outgoing,
            report,
            clocks,
            mark: None,
            trouble: None,
            gather_until: None,
            changed: tell,
        };
        (worker, handle)
    }

    /// Notes outside of the file how far it is, whenever it went on.
    pub fn keep_mark(&mut self, mark: Mark) {
        self.mark = Some(mark);
    }

    /// Works until it is stopped.
    pub fn run(mut self) {
        let span = tracing::info_span!("replica", db = %self.db);
        let _entered = span.enter();
        loop {
            let more = self.take_inputs();
            if !more {
                self.last_turn();
                return;
            }
            if let Err(error) = self.turn() {
                if let ReplicaError::Replaced(what) = error {
                    // Nothing more can be written into it under its site: it has to be opened again.
                    tracing::warn!("{what}");
                    *self.replaced.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
                    return;
                }
                self.note_trouble(&error);
                std::thread::sleep(RETRY);
            } else if self.trouble.take().is_some() {
                tracing::info!("works again");
            }
            (self.report)(&self.engine, self.trouble.as_deref());
        }
    }

    fn note_trouble(&mut self, error: &ReplicaError) {
        let text = error.to_string();
        if self.trouble.as_deref() != Some(&text) {
            tracing::warn!("{text}; nothing is lost, trying again");
        }
        self.trouble = Some(text);
    }

    /// Waits for something to do and takes in what there is; returns whether to go on.
    fn take_inputs(&mut self) -> bool {
        match self.inputs.recv_timeout(TICK) {
            Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
            Ok(input) => self.take(input),
            Err(RecvTimeoutError::Timeout) => return true,
        }
        if !self.gather() {
            return false;
        }
        for _ in 0..QUEUE {
            match self.inputs.try_recv() {
                Ok(Input::Stop) => return false,
                Ok(input) => self.take(input),
                Err(_) => break,
            }
        }
        true
    }

    /// After many rows, waits for more of them, and looks where transactions end; returns whether to go on.
    fn gather(&mut self) -> bool {
        let mut look = Instant::now();
        while let Some(until) = self.gather_until {
            let now = Instant::now();
            if now >= look || now >= until {
                look = now + LOOK;
                // What fails here fails again when it matters, and is told then.
                let rows = self.engine.store().note_end().unwrap_or_default();
                if now >= until || rows >= 8 * PART_ROWS {
                    break;
                }
            }
            match self.inputs.recv_timeout(look.min(until).saturating_duration_since(now)) {
                Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
                Ok(input) => self.take(input),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        self.gather_until = None;
        true
    }

    fn take(&mut self, input: Input) {
        self.queued_bytes
            .fetch_sub(weight(&input).min(self.queued_bytes.load(Ordering::Relaxed)), Ordering::Relaxed);
        let result = match input {
            Input::Wake => {
                self.woken.store(false, Ordering::Release);
                Ok(())
            }
            Input::Fragment(site, piece) => self.engine.on_fragment(site, &piece),
            Input::Message(from, message) => self.engine.on_message(&from, message, steady_ms()),
            Input::Logged(logged) => self.engine.on_logged(&logged, steady_ms()),
            Input::Greet(peer) => {
                self.engine.greet(&peer);
                Ok(())
            }
            Input::Do(work) => {
                work(&mut self.engine);
                Ok(())
            }
            Input::Stop => Ok(()),
        };
        if let Err(error) = result {
            // What the message would have brought is found missing later.
            self.note_trouble(&error);
        }
    }

    fn turn(&mut self) -> Result<(), ReplicaError> {
        let now_ms = steady_ms();
        self.engine.store_mut().look_at_file()?;
        self.engine.set_clocks(self.clocks.get(), now_ms);
        let result = self.engine.settle(now_ms);
        self.engine.announce(now_ms);
        self.perform()?;
        result
    }

    fn perform(&mut self) -> Result<(), ReplicaError> {
        let head = self.engine.store().head();
        let position = Position { site: head.site, n: head.vector.n(head.site), lsn: head.lsn };
        let lsn = head.lsn;
        self.changed.send_if_modified(|known| std::mem::replace(known, lsn) != lsn);
        self.gives_way.store(self.engine.gives_way(), Ordering::Relaxed);
        if let Some(mark) = &mut self.mark {
            mark.note(position)?;
        }
        for action in self.engine.take_actions() {
            let outgoing = &self.outgoing;
            // The receiver is gone only when the process is ending.
            let send = |message: Outgoing| drop(outgoing.blocking_send(message));
            match action {
                Action::Publish(mut own) => {
                    let many = own.header.rows >= MANY_ROWS;
                    let (db, site) = (&self.db, own.site.0);
                    commit_pieces(&mut own, |payload| {
                        send(Outgoing::Commit { db: db.clone(), site, payload })
                    })?;
                    if many {
                        self.engine.store().note_end()?;
                        self.gather_until = Some(Instant::now() + GATHER);
                    }
                }
                Action::Broadcast(message) => {
                    message_pieces(&message, |payload| send(Outgoing::Broadcast { payload }))
                }
                Action::Send(to, message) => message_pieces(&message, |payload| {
                    send(Outgoing::Direct { to: to.clone(), payload });
                }),
                Action::ReadLog(asked) => send(Outgoing::ReadLog(asked)),
                Action::Warn(text) => tracing::warn!("{text}"),
            }
        }
        Ok(())
    }

    fn last_turn(&mut self) {
        let result = self.engine.absorb().and_then(|()| self.perform());
        if let Err(error) = result {
            tracing::warn!("{error}; what the application wrote last is sent after the next start");
        }
        (self.report)(&self.engine, None);
    }
}
