//! Getting a database from the mesh. Invariant: until a copy is whole and its hash is right, nothing here has
//! changed; an existing file is never overwritten.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;
use tracing::info;

use super::router::{CopyAnswer, Router};
use super::serve_copy::PART_BYTES;
use crate::core::message::{CopyPart, CopyRequest, Message};
use crate::core::names::{DbName, NodeName};
use crate::replica::copy::hash_file;

/// How long a peer may take to make a copy: large files take a while.
const MAKE_PATIENCE: Duration = Duration::from_secs(600);
/// How long to wait for parts before asking for them again, and how often.
const PART_PATIENCE: Duration = Duration::from_secs(3);
const PART_TRIES: u32 = 40;
/// Parts asked for at once: enough to keep the line busy.
const WINDOW: u64 = 16;

/// The live peers that have a database.
pub fn peers_with(router: &Router, db: &DbName, now_ms: u64) -> Vec<NodeName> {
    let peers = router.peers();
    let having = peers.iter().filter(|(_, p)| p.is_live(now_ms) && p.hello.dbs.contains(db));
    having.map(|(name, _)| name.clone()).collect()
}

/// Fetches a copy of a database from a peer into a new file at `dest`.
pub async fn fetch_copy(router: &Arc<Router>, peer: &NodeName, db: &DbName, dest: &Path) -> Result<()> {
    let request = rand::random::<u64>() >> 1;
    let (sender, mut answers) = mpsc::channel(64);
    router.expect_copy(request, sender);
    let result = fetch(router, peer, db, dest, request, &mut answers).await;
    router.forget_copy(request);
    result.with_context(|| format!("cannot get database {db} from node {peer}"))
}

async fn fetch(
    router: &Router,
    peer: &NodeName,
    db: &DbName,
    dest: &Path,
    request: u64,
    answers: &mut mpsc::Receiver<CopyAnswer>,
) -> Result<()> {
    let ask = |copy, offset| Message::CopyRequest(CopyRequest { db: db.clone(), request, copy, offset });
    router.send(peer, &ask(0, 0)).await;
    let started = Instant::now();
    let first = next(answers, MAKE_PATIENCE).await?.context("it does not answer")?;
    let (copy, size) = (first.copy, first.size);
    has_room(dest, size)?;
    let file = std::fs::File::create(dest).with_context(|| format!("cannot write {}", dest.display()))?;
    let progress = progress_bar(db, size);
    let parts = size.div_ceil(PART_BYTES as u64);
    let mut have = vec![false; parts as usize];
    let (mut done, mut asked, mut tries) = (0, 1, 0);
    let hash = first.hash.context("it sent no hash")?;
    let mut part = Some(first);
    while done < parts {
        if let Some(p) = part.take() {
            let index = p.offset / PART_BYTES as u64;
            if p.copy == copy && index < parts && !have[index as usize] {
                file.write_all_at(&p.data, p.offset)
                    .with_context(|| format!("cannot write {}", dest.display()))?;
                have[index as usize] = true;
                done += 1;
                tries = 0;
                progress.inc(p.data.len() as u64);
            }
        }
        while asked < parts && asked < done + WINDOW {
            router.send(peer, &ask(copy, asked * PART_BYTES as u64)).await;
            asked += 1;
        }
        if done == parts {
            break;
        }
        part = next(answers, PART_PATIENCE).await?;
        if part.is_none() {
            tries += 1;
            if tries > PART_TRIES {
                bail!("it has stopped sending after {done} of {parts} MiB");
            }
            let missing = (0..asked).filter(|i| !have[*i as usize]).take(WINDOW as usize);
            for index in missing {
                router.send(peer, &ask(copy, index * PART_BYTES as u64)).await;
            }
        }
    }
    progress.finish_and_clear();
    file.sync_all()?;
    drop(file);
    let path = dest.to_owned();
    let (got, _) = tokio::task::spawn_blocking(move || hash_file(&path)).await??;
    if got != hash {
        bail!("the copy was damaged on its way: start again");
    }
    let mib_per_s = size as f64 / (1 << 20) as f64 / started.elapsed().as_secs_f64().max(0.001);
    info!(db = %db, node = %peer, "fetched {size} bytes at {mib_per_s:.0} MiB/s");
    Ok(())
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
            "the copy has {} MiB, and {} has {} MiB left: make room, then start again",
            mib(size),
            directory.display(),
            mib(free)
        );
    }
    Ok(())
}

/// The next answer; `None` when none comes in time.
async fn next(answers: &mut mpsc::Receiver<CopyAnswer>, patience: Duration) -> Result<Option<CopyPart>> {
    match tokio::time::timeout(patience, answers.recv()).await {
        Ok(Some(Ok(part))) => Ok(Some(part)),
        Ok(Some(Err(why))) => bail!("{why}"),
        Ok(None) => bail!("this node is ending"),
        Err(_) => Ok(None),
    }
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
