//! Serving copies of files to nodes that join. Invariant: a copy is made once and read in parts; it is gone when
//! nobody has asked for a part for a while.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{info, warn};

use super::router::Router;
use crate::core::message::{CopyPart, CopyRequest, Message};
use crate::core::names::NodeName;
use crate::replica::clock::steady_ms;
use crate::replica::copy::write_copy;

/// The size of a part.
pub const PART_BYTES: usize = 1024 * 1024;
/// A copy that nobody asks for is deleted after this time.
const KEEP: Duration = Duration::from_secs(120);
/// Copies at hand at once; who asks for one more waits until another is not needed any more.
const AT_ONCE: usize = 8;

struct Made {
    path: PathBuf,
    size: u64,
    hash: [u8; 32],
    used: Instant,
    _place: OwnedSemaphorePermit,
}

/// The copies at hand.
pub struct Copies {
    spool: PathBuf,
    made: Mutex<HashMap<u64, Made>>,
    places: Arc<Semaphore>,
}

impl Copies {
    /// No copies yet; they will be in `spool`.
    pub fn new(spool: PathBuf) -> Self {
        Self { spool, made: Mutex::default(), places: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Deletes what nobody asks for.
    pub fn expire(&self) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.retain(|_, m| {
            let keep = m.used.elapsed() < KEEP;
            if !keep && let Err(e) = std::fs::remove_file(&m.path) {
                warn!("cannot delete {}: {e}", m.path.display());
            }
            keep
        });
    }

    /// Answers a request.
    pub async fn serve(&self, router: &Router, to: &NodeName, ask: CopyRequest) {
        let request = ask.request;
        let answer = match self.part(router, to, ask).await {
            Ok(part) => Message::CopyPart(part),
            Err(why) => Message::Refused { request, why },
        };
        router.send(to, &answer).await;
    }

    async fn part(&self, router: &Router, to: &NodeName, ask: CopyRequest) -> Result<CopyPart, String> {
        let copy = if ask.copy == 0 { self.make(router, to, &ask).await? } else { ask.copy };
        let (path, size, hash) = {
            let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
            let made = made.get_mut(&copy).ok_or("the copy is gone: ask for a new one")?;
            made.used = Instant::now();
            (made.path.clone(), made.size, made.hash)
        };
        let (offset, len) = (ask.offset, size.saturating_sub(ask.offset).min(PART_BYTES as u64) as usize);
        let read = tokio::task::spawn_blocking(move || -> std::io::Result<Vec<u8>> {
            let mut data = vec![0; len];
            std::fs::File::open(&path)?.read_exact_at(&mut data, offset)?;
            Ok(data)
        });
        let data =
            read.await.map_err(|e| e.to_string())?.map_err(|e| format!("the copy cannot be read: {e}"))?;
        Ok(CopyPart { request: ask.request, copy, size, offset, data: Bytes::from(data), hash: Some(hash) })
    }

    async fn make(&self, router: &Router, to: &NodeName, ask: &CopyRequest) -> Result<u64, String> {
        let worker = router.worker(&ask.db).ok_or("this node does not have that database")?;
        let place = self.places.clone().acquire_owned().await.map_err(|e| e.to_string())?;
        let copy = (rand::random::<u64>() >> 1).max(1);
        let path = self.spool.join(format!("copy-{copy}.db"));
        let dest = path.clone();
        let joiner = to.clone();
        info!(db = %ask.db, node = %to, "makes a copy for a node that joins");
        let made = tokio::task::spawn_blocking(move || {
            let reader = worker
                .call(move |engine| engine.snapshot_for(&joiner, steady_ms()))
                .ok_or("the database is being detached")?;
            let reader = reader.map_err(|e| format!("no copy can be made: {e}"))?;
            write_copy(&reader, &dest).map_err(|e| {
                // The disk may be full of it. What cannot be removed now goes at the next start.
                drop(std::fs::remove_file(&dest));
                format!("no copy can be made: {e}")
            })
        });
        let (hash, size) = made.await.map_err(|e| e.to_string())??;
        let made = Made { path, size, hash, used: Instant::now(), _place: place };
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(copy, made);
        Ok(copy)
    }
}
