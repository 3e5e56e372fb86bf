//! Getting a database from the mesh. Invariant: until a copy is whole and its hash is right, nothing here has
//! changed; an existing file is never overwritten.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::databases::remove_copy;
use super::router::{CopyAnswer, Router};
use super::serve_copy::PART_BYTES;
use crate::core::message::{CopyPart, CopyRequest, Message};
use crate::core::names::{DbName, NodeName};
use crate::replica::clock::steady_ms;
use crate::replica::copy::remove_side_files;

/// How long a peer may take to make a copy (large files take a while), and how often to ask whether it still does.
const MAKE_PATIENCE: Duration = Duration::from_secs(600);
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// How long it may be away meanwhile.
const AWAY_PATIENCE: Duration = Duration::from_secs(60);
/// How long to wait for parts before asking for them again, and how often.
const PART_PATIENCE: Duration = Duration::from_secs(3);
const PART_TRIES: u32 = 40;
/// Parts asked for at once: enough to keep the line busy.
const WINDOW: u64 = 16;
/// Bytes after which what came is brought to the disk: all at once in the end would take long, and hold up others.
const SYNC_BYTES: u64 = 64 << 20;
/// How long to wait before asking for the hash of the whole again.
const HASH_PAUSE: Duration = Duration::from_millis(50);
/// How often it is begun anew, from what is here, when a peer has no copy any more or does not answer.
const ATTEMPTS: u32 = 4;
const ATTEMPT_PAUSE: Duration = Duration::from_secs(1);

/// The live peers that have a database.
pub fn peers_with(router: &Router, db: &DbName, now_ms: u64) -> Vec<NodeName> {
    let peers = router.peers();
    let having = peers.iter().filter(|(_, p)| p.is_live(now_ms) && p.hello.dbs.contains(db));
    having.map(|(name, _)| name.clone()).collect()
}

/// Why a copy did not come.
enum FetchError {
    /// What is here is worth going on from.
    Cut(anyhow::Error),
    /// Trying again would end the same way.
    Failed(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for FetchError {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

fn cut(why: impl std::fmt::Display) -> FetchError {
    FetchError::Cut(anyhow!("{why}"))
}

/// Fetches a copy of a database from a peer into a file at `dest`. What is there of a copy that was cut off is compared
/// part by part, and only what differs is fetched; if this one is cut off, it is left for the next.
pub async fn fetch_copy(router: &Arc<Router>, peer: &NodeName, db: &DbName, dest: &Path) -> Result<()> {
    // A copy that was being installed may have left them; they would be taken for a part of this one.
    remove_side_files(dest).with_context(|| format!("cannot remove what is beside {}", dest.display()))?;
    let context = || format!("cannot get database {db} from node {peer}");
    for attempt in 1.. {
        let request = rand::random::<u64>() >> 1;
        let (sender, answers) = mpsc::channel(64);
        router.expect_copy(request, sender);
        let result = Fetch { router, peer, db, dest, request, answers }.run().await;
        router.forget_copy(request);
        match result {
            Ok(()) => break,
            Err(FetchError::Cut(why)) if attempt < ATTEMPTS => {
                warn!(db = %db, node = %peer, "a copy was cut off: {why:#}; goes on from what is here");
                tokio::time::sleep(ATTEMPT_PAUSE).await;
            }
            Err(FetchError::Cut(why)) => return Err(why).with_context(context),
            Err(FetchError::Failed(why)) => {
                remove_copy(dest);
                return Err(why).with_context(context);
            }
        }
    }
    Ok(())
}

/// One request for a copy.
struct Fetch<'a> {
    router: &'a Router,
    peer: &'a NodeName,
    db: &'a DbName,
    dest: &'a Path,
    request: u64,
    answers: mpsc::Receiver<CopyAnswer>,
}

impl Fetch<'_> {
    async fn run(mut self) -> Result<(), FetchError> {
        let started = Instant::now();
        let mut arriving = Arriving::open(self.dest)?;
        let first = self.first(&arriving).await?;
        let (copy, size) = (first.copy, first.size);
        has_room(self.dest, size.saturating_sub(arriving.allocated()?))?;
        arriving.begin(copy, size, progress_bar(self.db, size))?;
        self.parts(&mut arriving, first).await?;
        let hash = self.hash(&arriving).await?;
        let same = arriving.same_bytes;
        if arriving.finish().await? != hash {
            return Err(anyhow!("the copy was damaged on its way: start again").into());
        }
        // Its copy is not needed any more.
        self.ask(copy, size, None).await;
        let mib_per_s = size as f64 / (1 << 20) as f64 / started.elapsed().as_secs_f64().max(0.001);
        info!(db = %self.db, node = %self.peer, "fetched {size} bytes at {mib_per_s:.0} MiB/s; {same} of them were here already");
        Ok(())
    }

    async fn ask(&self, copy: u64, offset: u64, have: Option<[u8; 32]>) {
        let (db, request) = (self.db.clone(), self.request);
        self.router
            .send(self.peer, &Message::CopyRequest(CopyRequest { db, request, copy, offset, have }))
            .await;
    }

    /// The first part, once the copy is made. The peer may have been started anew meanwhile: it is asked now and then.
    async fn first(&mut self, arriving: &Arriving) -> Result<CopyPart, FetchError> {
        let (started, mut heard) = (Instant::now(), Instant::now());
        let have = arriving.have(0)?;
        while started.elapsed() < MAKE_PATIENCE && heard.elapsed() < AWAY_PATIENCE {
            self.ask(0, 0, have).await;
            if let Some(part) = self.next(ASK_AGAIN).await? {
                return Ok(part);
            }
            if peers_with(self.router, self.db, steady_ms()).contains(self.peer) {
                heard = Instant::now();
            }
        }
        Err(cut("it does not answer"))
    }

    async fn parts(&mut self, arriving: &mut Arriving, first: CopyPart) -> Result<(), FetchError> {
        let (mut asked, mut tries) = (1, 0);
        let mut part = Some(first);
        loop {
            if let Some(p) = part.take()
                && arriving.take(&p)?
            {
                tries = 0;
            }
            if arriving.done == arriving.parts() {
                return Ok(());
            }
            while asked < arriving.parts() && asked < arriving.done + WINDOW {
                self.ask_part(arriving, asked).await?;
                asked += 1;
            }
            part = self.next(PART_PATIENCE).await?;
            if part.is_none() {
                tries += 1;
                if tries > PART_TRIES {
                    let (done, parts) = (arriving.done, arriving.parts());
                    return Err(cut(format!("it has stopped sending after {done} of {parts} MiB")));
                }
                let missing = (0..asked).filter(|i| !arriving.have[*i as usize]).take(WINDOW as usize);
                for index in missing.collect::<Vec<_>>() {
                    self.ask_part(arriving, index).await?;
                }
            }
        }
    }

    /// The hash of the whole, which the peer computes while it sends.
    async fn hash(&mut self, arriving: &Arriving) -> Result<[u8; 32], FetchError> {
        for _ in 0..PART_TRIES {
            if let Some(hash) = arriving.whole {
                return Ok(hash);
            }
            let have = arriving.part_hash(0)?;
            self.ask(arriving.copy, 0, Some(have)).await;
            let part = self.next(PART_PATIENCE).await?;
            if let Some(hash) = part.filter(|p| p.copy == arriving.copy).and_then(|p| p.hash) {
                return Ok(hash);
            }
            tokio::time::sleep(HASH_PAUSE).await;
        }
        Err(cut("it sent no hash"))
    }

    async fn ask_part(&self, arriving: &Arriving, index: u64) -> Result<(), FetchError> {
        self.ask(arriving.copy, index * PART_BYTES as u64, arriving.have(index)?).await;
        Ok(())
    }

    /// The next answer; `None` when none comes in time.
    async fn next(&mut self, patience: Duration) -> Result<Option<CopyPart>, FetchError> {
        match tokio::time::timeout(patience, self.answers.recv()).await {
            Ok(Some(Ok(part))) => Ok(Some(part)),
            Ok(Some(Err(why))) => Err(cut(why)),
            Ok(None) => Err(anyhow!("this node is ending").into()),
            Err(_) => Ok(None),
        }
    }
}

/// A copy on its way: its file, and what of it is there.
struct Arriving {
    file: Arc<File>,
    path: String,
    /// How much of another try's file there was.
    before: u64,
    copy: u64,
    size: u64,
    have: Vec<bool>,
    done: u64,
    same_bytes: u64,
    /// What is there from the beginning on without a gap, hashed.
    hashed: u64,
    hasher: blake3::Hasher,
    /// What the hash of the whole is to be.
    whole: Option<[u8; 32]>,
    unsynced: u64,
    syncing: Option<JoinHandle<std::io::Result<()>>>,
    progress: ProgressBar,
}

impl Arriving {
    fn open(dest: &Path) -> Result<Self> {
        let path = dest.display().to_string();
        let mut options = File::options();
        let file = options.create(true).truncate(false).read(true).write(true).open(dest);
        let file = file.with_context(|| format!("cannot write {path}"))?;
        let before = file.metadata()?.len();
        Ok(Self {
            file: Arc::new(file),
            path,
            before,
            copy: 0,
            size: 0,
            have: Vec::new(),
            done: 0,
            same_bytes: 0,
            hashed: 0,
            hasher: blake3::Hasher::new(),
            whole: None,
            unsynced: 0,
            syncing: None,
            progress: ProgressBar::hidden(),
        })
    }

    /// The room that it has already.
    fn allocated(&self) -> Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn begin(&mut self, copy: u64, size: u64, progress: ProgressBar) -> Result<()> {
        self.file.set_len(size).with_context(|| format!("cannot write {}", self.path))?;
        (self.copy, self.size, self.progress) = (copy, size, progress);
        self.have = vec![false; size.div_ceil(PART_BYTES as u64) as usize];
        Ok(())
    }

    fn parts(&self) -> u64 {
        self.have.len() as u64
    }

    fn part_len(&self, offset: u64, size: u64) -> usize {
        size.saturating_sub(offset).min(PART_BYTES as u64) as usize
    }

    /// What is there of a part from before.
    fn have(&self, index: u64) -> Result<Option<[u8; 32]>> {
        if index * PART_BYTES as u64 >= self.before || self.have.get(index as usize) == Some(&true) {
            return Ok(None);
        }
        self.part_hash(index).map(Some)
    }

    fn part_hash(&self, index: u64) -> Result<[u8; 32]> {
        Ok(*blake3::hash(&self.read(index)?).as_bytes())
    }

    fn read(&self, index: u64) -> Result<Vec<u8>> {
        let offset = index * PART_BYTES as u64;
        // Before the copy's size is known a part is as long as the file lets it be.
        let size = if self.copy == 0 { self.before } else { self.size };
        let mut data = vec![0; self.part_len(offset, size)];
        self.file.read_exact_at(&mut data, offset).with_context(|| format!("cannot read {}", self.path))?;
        Ok(data)
    }

    /// Hashes what goes on from what is hashed: `data` is part `index`, which is there now.
    fn hash_on(&mut self, index: u64, data: &[u8]) -> Result<()> {
        if index == self.hashed && !data.is_empty() {
            self.hasher.update(data);
            self.hashed += 1;
        }
        // Parts that came before their turn.
        while self.have.get(self.hashed as usize) == Some(&true) {
            let data = self.read(self.hashed)?;
            self.hasher.update(&data);
            self.hashed += 1;
        }
        Ok(())
    }

    /// Takes a part; whether it is new.
    fn take(&mut self, part: &CopyPart) -> Result<bool> {
        let index = (part.offset / PART_BYTES as u64) as usize;
        let len = self.part_len(part.offset, self.size);
        let fits = part.offset.is_multiple_of(PART_BYTES as u64) && (part.same || part.data.len() == len);
        if part.copy != self.copy || !fits || self.have.get(index) != Some(&false) {
            return Ok(false);
        }
        if part.same {
            self.same_bytes += len as u64;
        } else {
            let written = self.file.write_all_at(&part.data, part.offset);
            written.with_context(|| format!("cannot write {}", self.path))?;
            self.unsynced += len as u64;
        }
        self.have[index] = true;
        self.done += 1;
        self.whole = self.whole.or(part.hash);
        self.hash_on(index as u64, &part.data)?;
        self.progress.inc(len as u64);
        if self.unsynced >= SYNC_BYTES && self.syncing.as_ref().is_none_or(JoinHandle::is_finished) {
            self.unsynced = 0;
            let file = self.file.clone();
            // If it fails, so does the one at the end.
            self.syncing = Some(tokio::task::spawn_blocking(move || file.sync_data()));
        }
        Ok(true)
    }

    /// Brings all of it to the disk; returns the hash of what came.
    async fn finish(self) -> Result<[u8; 32]> {
        self.progress.finish_and_clear();
        if let Some(syncing) = self.syncing {
            syncing.await??;
        }
        tokio::task::spawn_blocking(move || self.file.sync_all()).await??;
        Ok(*self.hasher.finalize().as_bytes())
    }
}

/// Whether a copy of that size fits: better said at once than after an hour.
fn has_room(dest: &Path, size: u64) -> Result<()> {
    let directory = dest.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A size is a peer's word: nothing is done by it that this host has no room for.
    let disk = rustix::fs::statvfs(directory)
        .with_context(|| format!("cannot learn how much room {} has", directory.display()))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if size > free {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        bail!(
            "the copy needs {} MiB, and {} has {} MiB left: make room, then start again",
            mib(size),
            directory.display(),
            mib(free)
        );
    }
    Ok(())
}

fn progress_bar(db: &DbName, size: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}");
    let bar = ProgressBar::new(size).with_message(format!("fetching {db}"));
    // Without a terminal nothing is drawn.
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_does_not_fit_or_may_not_is_refused_before_it_begins() {
        let nowhere = has_room(Path::new("/no/such/directory/app.db"), 1).unwrap_err();
        assert!(
            format!("{nowhere:#}").starts_with("cannot learn how much room /no/such/directory has: "),
            "{nowhere:#}"
        );
        let dir = tempfile::tempdir().unwrap();
        let large = has_room(&dir.path().join("app.db"), u64::MAX).unwrap_err().to_string();
        assert!(large.contains("make room, then start again"), "{large}");
        assert!(has_room(&dir.path().join("app.db"), 1).is_ok());
    }
}
