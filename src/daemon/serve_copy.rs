//! Serving copies of files to nodes that join. Invariant: a copy is made once and read in parts; it is gone when
//! nobody has asked for a part for a while.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tracing::{info, warn};

use super::router::{Router, held};
use crate::core::message::{CopyPart, CopyRequest, Message};
use crate::core::names::{DbName, NodeName};
use crate::replica;
use crate::replica::clock::steady_ms;
use crate::replica::copy::write_copy;
use crate::replica::held::{HeldPages, Snapshot};

/// The size of a part.
pub const PART_BYTES: usize = 1024 * 1024;
/// A copy that nobody asks for is deleted after this time: long enough to come back after a cut, or a restart.
const KEEP: Duration = Duration::from_secs(600);
/// Copies at hand at once; who asks for one more waits until another is not needed any more.
const AT_ONCE: usize = 8;

/// How far parts are apart, on one processor, while programs write the file: else they wait for a processor as long as
/// the copy lasts. Both nodes and their servers take about 8 ms of processor time for a part.
const PACE_ONE_PROCESSOR: Duration = Duration::from_micros(11_400);

/// How much such work gives way.
const BACKGROUND_NICE: i32 = 10;

/// For whom a copy is: a node has one of a database, or none.
type Joiner = (NodeName, DbName);

/// Where a copy is read from.
enum Source {
    /// The file itself.
    Held(Box<HeldPages>),
    /// A file of the spool directory, which has no name any more.
    Spooled(File),
}

impl Source {
    fn read(&self, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let mut data = vec![0; len];
        match self {
            Self::Held(pages) => pages.read_exact_at(&mut data, offset)?,
            Self::Spooled(file) => file.read_exact_at(&mut data, offset)?,
        }
        Ok(data)
    }
}

struct Made {
    joiner: Joiner,
    /// The request that it was made for.
    request: u64,
    /// Who reads a part has a share: pages are held until the last has read.
    source: Arc<Source>,
    size: u64,
    /// It is being put into the spool directory.
    is_moving: bool,
    used: Instant,
    _place: OwnedSemaphorePermit,
}

/// When things are done that are to have some distance.
struct Pace {
    apart: Duration,
    next: Mutex<Instant>,
}

impl Pace {
    fn new(one_processor: Duration) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        Self { apart: one_processor / processors, next: Mutex::new(Instant::now()) }
    }

    /// When the next one's turn is.
    fn turn(&self, now: Instant) -> Instant {
        let mut next = held(self.next.lock());
        let turn = now.max(*next);
        *next = turn + self.apart;
        turn
    }
}

/// The copies at hand.
pub struct Copies {
    spool: PathBuf,
    made: Mutex<HashMap<u64, Made>>,
    /// Requests for which a copy is being made: they are asked again.
    making: Mutex<HashSet<u64>>,
    places: Arc<Semaphore>,
    pace: Pace,
}

impl Copies {
    /// No copies yet; they will be in `spool`.
    pub fn new(spool: PathBuf) -> Arc<Self> {
        let places = Arc::new(Semaphore::new(AT_ONCE));
        let pace = Pace::new(PACE_ONE_PROCESSOR);
        Arc::new(Self { spool, made: Mutex::default(), making: Mutex::default(), places, pace })
    }

    /// Throws away what nobody asks for, and what databases that are not here any more have left; copies what was held
    /// for long.
    pub fn expire(self: &Arc<Self>, databases: &[DbName]) {
        let mut long = Vec::new();
        held(self.made.lock()).retain(|copy, made| {
            if !made.is_moving && matches!(&*made.source, Source::Held(pages) if pages.is_long()) {
                made.is_moving = true;
                long.push((*copy, made.source.clone()));
            }
            made.used.elapsed() < KEEP && databases.contains(&made.joiner.1)
        });
        for (copy, source) in long {
            let copies = self.clone();
            drop(in_background(move || copies.spill(copy, &source)));
        }
    }

    /// Copies pages that are held, and lets them go.
    fn spill(&self, copy: u64, source: &Source) {
        let Source::Held(pages) = source else { return };
        let spooled = self.spool_file(copy, |path| {
            let file = File::options().create_new(true).read(true).write(true).open(path)?;
            pages.copy_to(&file)
        });
        let mut all = held(self.made.lock());
        match spooled {
            Ok(file) => {
                if let Some(made) = all.get_mut(&copy) {
                    made.source = Arc::new(Source::Spooled(file));
                }
            }
            Err(e) => {
                all.remove(&copy);
                warn!(
                    "a copy for a node that joins takes long, and cannot be kept in {}: {e}",
                    self.spool.display()
                );
            }
        }
    }

    /// A file of the spool directory that is gone when nobody has it open.
    fn spool_file<E: From<std::io::Error>>(
        &self,
        copy: u64,
        write: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<File, E> {
        let path = self.spool.join(format!("copy-{copy}.db"));
        let written = write(&path).and_then(|()| Ok(File::open(&path)?));
        // The disk may be full of it. What cannot be removed now goes at the next start.
        drop(std::fs::remove_file(&path));
        written
    }

    /// Answers a request.
    pub async fn serve(self: &Arc<Self>, router: &Router, to: &NodeName, ask: CopyRequest) {
        let request = ask.request;
        let part = match ask.copy {
            0 if !held(self.making.lock()).insert(request) => return,
            0 => {
                let copy = self.make(router, to, &ask).await;
                held(self.making.lock()).remove(&request);
                match copy {
                    Ok(copy) => self.part(copy, &ask).await,
                    Err(why) => Err(why),
                }
            }
            copy => {
                if router.worker(&ask.db).is_some_and(|worker| worker.gives_way()) {
                    tokio::time::sleep_until(self.pace.turn(Instant::now()).into()).await;
                }
                self.part(copy, &ask).await
            }
        };
        let answer = match part {
            Ok(None) => return,
            Ok(Some(part)) => Message::CopyPart(part),
            Err(why) => Message::Refused { request, why },
        };
        router.send(to, &answer).await;
    }

    /// A part of a copy; nothing if it is told that the copy is not needed any more.
    async fn part(&self, copy: u64, ask: &CopyRequest) -> Result<Option<CopyPart>, String> {
        let (source, size) = {
            let mut all = held(self.made.lock());
            let made = all.get_mut(&copy).ok_or("the copy is gone")?;
            if ask.offset >= made.size {
                all.remove(&copy);
                return Ok(None);
            }
            made.used = Instant::now();
            (made.source.clone(), made.size)
        };
        let (request, offset, have) = (ask.request, ask.offset, ask.have);
        let len = size.saturating_sub(offset).min(PART_BYTES as u64) as usize;
        let read = tokio::task::spawn_blocking(move || -> std::io::Result<CopyPart> {
            let data = source.read(offset, len)?;
            let hash = *blake3::hash(&data).as_bytes();
            let same = have == Some(hash);
            let data = if same { Bytes::new() } else { Bytes::from(data) };
            Ok(CopyPart { request, copy, size, offset, data, same, hash })
        });
        let part = read.await.map_err(|e| e.to_string())?;
        part.map(Some).map_err(|e| format!("the copy cannot be read: {e}"))
    }

    /// The copy for a node that asks for one: the one that it had begun to fetch, if it goes on, or a new one.
    async fn make(
        self: &Arc<Self>,
        router: &Router,
        to: &NodeName,
        ask: &CopyRequest,
    ) -> Result<u64, String> {
        let joiner: Joiner = (to.clone(), ask.db.clone());
        let worker = router.worker(&ask.db).ok_or("this node does not have that database")?;
        if let Some(copy) = self.begun(&joiner, ask) {
            let node = to.clone();
            let noted = move || worker.call(move |engine| engine.note_joining(&node, steady_ms()));
            tokio::task::spawn_blocking(noted).await.map_err(|e| e.to_string())?;
            info!(db = %ask.db, node = %to, "goes on with a copy for a node that joins");
            return Ok(copy);
        }
        let place = self.places.clone().acquire_owned().await.map_err(|e| e.to_string())?;
        let copy = (rand::random::<u64>() >> 1).max(1);
        let (node, copies) = (to.clone(), self.clone());
        info!(db = %ask.db, node = %to, "makes a copy for a node that joins");
        let made = in_background(move || {
            let snapshot = worker.call(move |engine| engine.snapshot_for(&node, steady_ms()));
            let snapshot = snapshot.ok_or("the database is being detached")?;
            copies.source(copy, snapshot).map_err(|e| format!("no copy can be made: {e}"))
        });
        let (source, size) = made.await.map_err(|e| e.to_string())??;
        let (source, used) = (Arc::new(source), Instant::now());
        let made = Made { joiner, request: ask.request, source, size, is_moving: false, used, _place: place };
        held(self.made.lock()).insert(copy, made);
        Ok(copy)
    }

    fn source(&self, copy: u64, snapshot: replica::Result<Snapshot>) -> replica::Result<(Source, u64)> {
        let reader = match snapshot? {
            Snapshot::Held(pages) => {
                let size = pages.size();
                return Ok((Source::Held(pages), size));
            }
            Snapshot::Reader(reader) => reader,
        };
        let file = self.spool_file(copy, |path| write_copy(&reader, path))?;
        let size = file.metadata()?.len();
        Ok((Source::Spooled(file), size))
    }

    /// The copy that was made for this node, if it asks once more or goes on with it; else that one goes.
    fn begun(&self, joiner: &Joiner, ask: &CopyRequest) -> Option<u64> {
        let mut all = held(self.made.lock());
        let (copy, made) = all.iter_mut().find(|(_, m)| m.joiner == *joiner)?;
        let copy = *copy;
        if ask.have.is_some() || ask.request == made.request {
            made.used = Instant::now();
            return Some(copy);
        }
        all.remove(&copy);
        None
    }
}

/// Runs long work in a thread of its own that gives way to others: an application must not wait for a node that joins.
fn in_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> oneshot::Receiver<T> {
    let (done, result) = oneshot::channel();
    std::thread::spawn(move || {
        // Of this thread alone, as Linux has it. It is a wish.
        let _ = rustix::process::nice(BACKGROUND_NICE);
        drop(done.send(work()));
    });
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_pace_is_apart_and_saves_nothing_up() {
        let apart = Duration::from_millis(5);
        let start = Instant::now();
        let pace = Pace { apart, next: Mutex::new(start) };
        let turns: Vec<_> = (0..4).map(|_| pace.turn(start) - start).collect();
        assert_eq!(turns, [Duration::ZERO, apart, apart * 2, apart * 3]);
        let later = start + Duration::from_secs(60);
        assert_eq!((pace.turn(later), pace.turn(later)), (later, later + apart));
        assert!(Pace::new(apart).apart <= apart);
    }
}
