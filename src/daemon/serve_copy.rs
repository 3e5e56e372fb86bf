//! Serving copies of files to nodes that join. Invariant: a copy is made once and read in parts; it is gone when
//! nobody has asked for a part for a while.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tracing::{info, warn};

use super::router::{Router, held};
use crate::core::message::{CopyPart, CopyRequest, Message};
use crate::core::names::{DbName, NodeName};
use crate::replica::clock::steady_ms;
use crate::replica::copy::{hash_file, write_copy};

/// The size of a part.
pub const PART_BYTES: usize = 1024 * 1024;
/// A copy that nobody asks for is deleted after this time: long enough to come back after a cut, or a restart.
const KEEP: Duration = Duration::from_secs(600);
/// Copies at hand at once; who asks for one more waits until another is not needed any more.
const AT_ONCE: usize = 8;

/// How much such work gives way.
const BACKGROUND_NICE: i32 = 10;

/// For whom a copy is: a node has one of a database, or none.
type Joiner = (NodeName, DbName);

struct Made {
    joiner: Joiner,
    /// The request that it was made for.
    request: u64,
    path: PathBuf,
    size: u64,
    /// Computed while the first parts are on their way.
    hash: Arc<OnceLock<[u8; 32]>>,
    used: Instant,
    _place: OwnedSemaphorePermit,
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_file(&self.path) {
            warn!("cannot delete {}: {e}", self.path.display());
        }
    }
}

/// The copies at hand.
pub struct Copies {
    spool: PathBuf,
    made: Mutex<HashMap<u64, Made>>,
    /// Requests for which a copy is being made: they are asked again.
    making: Mutex<HashSet<u64>>,
    places: Arc<Semaphore>,
}

impl Copies {
    /// No copies yet; they will be in `spool`.
    pub fn new(spool: PathBuf) -> Self {
        let places = Arc::new(Semaphore::new(AT_ONCE));
        Self { spool, made: Mutex::default(), making: Mutex::default(), places }
    }

    /// Deletes what nobody asks for.
    pub fn expire(&self) {
        held(self.made.lock()).retain(|_, m| m.used.elapsed() < KEEP);
    }

    /// Answers a request.
    pub async fn serve(&self, router: &Router, to: &NodeName, ask: CopyRequest) {
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
            copy => self.part(copy, &ask).await,
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
        let (path, size, hash) = {
            let mut all = held(self.made.lock());
            let made = all.get_mut(&copy).ok_or("the copy is gone")?;
            if ask.offset >= made.size {
                all.remove(&copy);
                return Ok(None);
            }
            made.used = Instant::now();
            (made.path.clone(), made.size, made.hash.get().copied())
        };
        let (offset, have) = (ask.offset, ask.have);
        let len = size.saturating_sub(offset).min(PART_BYTES as u64) as usize;
        let read = tokio::task::spawn_blocking(move || -> std::io::Result<(Vec<u8>, bool)> {
            let mut data = vec![0; len];
            std::fs::File::open(&path)?.read_exact_at(&mut data, offset)?;
            let same = have.is_some_and(|h| h == *blake3::hash(&data).as_bytes());
            Ok(if same { (Vec::new(), true) } else { (data, false) })
        });
        let (data, same) =
            read.await.map_err(|e| e.to_string())?.map_err(|e| format!("the copy cannot be read: {e}"))?;
        let (request, data) = (ask.request, Bytes::from(data));
        Ok(Some(CopyPart { request, copy, size, offset, data, same, hash }))
    }

    /// The copy for a node that asks for one: the one that it had begun to fetch, if it goes on, or a new one.
    async fn make(&self, router: &Router, to: &NodeName, ask: &CopyRequest) -> Result<u64, String> {
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
        let path = self.spool.join(format!("copy-{copy}.db"));
        let dest = path.clone();
        let node = to.clone();
        info!(db = %ask.db, node = %to, "makes a copy for a node that joins");
        let made = in_background(move || {
            let reader = worker
                .call(move |engine| engine.snapshot_for(&node, steady_ms()))
                .ok_or("the database is being detached")?;
            let reader = reader.map_err(|e| format!("no copy can be made: {e}"))?;
            write_copy(&reader, &dest).map_err(|e| {
                // The disk may be full of it. What cannot be removed now goes at the next start.
                drop(std::fs::remove_file(&dest));
                format!("no copy can be made: {e}")
            })
        });
        let size = made.await.map_err(|e| e.to_string())??;
        let hash = Arc::new(OnceLock::new());
        let (source, told, request) = (path.clone(), hash.clone(), ask.request);
        drop(in_background(move || match hash_file(&source) {
            Ok(hash) => drop(told.set(hash)),
            // It is asked for until the joiner gives up, and told why by then.
            Err(e) => warn!("cannot read {}: {e}", source.display()),
        }));
        let made = Made { joiner, request, path, size, hash, used: Instant::now(), _place: place };
        held(self.made.lock()).insert(copy, made);
        Ok(copy)
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
