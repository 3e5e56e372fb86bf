//! Getting a database from the mesh. Invariant: until a copy is whole and its hash is right, nothing here has
//! changed; an existing file is never overwritten.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::arriving::{Arriving, Written};
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
        let result = self.parts(&mut arriving, first).await;
        arriving.settle().await;
        result?;
        let same = arriving.same_bytes();
        arriving.finish().await?;
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
            if let Some(part) = Self::next(&mut self.answers, ASK_AGAIN).await? {
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
        arriving.take(first);
        while !arriving.is_whole() {
            while asked < arriving.parts() && asked < arriving.done() + WINDOW {
                self.ask_part(arriving, asked).await?;
                asked += 1;
            }
            tokio::select! {
                Some(written) = arriving.written() => match written? {
                    Written::Whole => tries = 0,
                    Written::Damaged(index) => self.ask_part(arriving, index).await?,
                },
                part = Self::next(&mut self.answers, PART_PATIENCE) => match part? {
                    Some(part) => arriving.take(part),
                    None if tries == PART_TRIES => {
                        let (done, parts) = (arriving.done(), arriving.parts());
                        return Err(cut(format!("it has stopped sending after {done} of {parts} MiB")));
                    }
                    None => {
                        tries += 1;
                        for index in arriving.missing(asked, WINDOW as usize) {
                            self.ask_part(arriving, index).await?;
                        }
                    }
                },
            }
        }
        Ok(())
    }

    async fn ask_part(&self, arriving: &Arriving, index: u64) -> Result<(), FetchError> {
        self.ask(arriving.copy(), index * PART_BYTES as u64, arriving.have(index)?).await;
        Ok(())
    }

    /// The next answer; `None` when none comes in time.
    async fn next(
        answers: &mut mpsc::Receiver<CopyAnswer>,
        patience: Duration,
    ) -> Result<Option<CopyPart>, FetchError> {
        match tokio::time::timeout(patience, answers.recv()).await {
            Ok(Some(Ok(part))) => Ok(Some(part)),
            Ok(Some(Err(why))) => Err(cut(why)),
            Ok(None) => Err(anyhow!("this node is ending").into()),
            Err(_) => Ok(None),
        }
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
