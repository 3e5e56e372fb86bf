//! Databases that cannot go on as they are: a node that was away for too long takes in a copy of a peer's file, and a
//! file that was replaced under a running node is opened again as a new site. Invariant: the file that is there is kept
//! beside it before a copy is taken in, and applications keep the file that they have open.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use time::OffsetDateTime;
use time::macros::format_description;
use tracing::{info, warn};

use super::databases::{self, Running, Starter};
use super::joining::fetch_copy;
use super::observe::Observer;
use super::router::Router;
use crate::core::names::{DbName, NodeName};
use crate::replica::clock::{steady_ms, wall_clock_ms};
use crate::replica::copy::{synchronise, write_copy};
use crate::replica::unite::PeerFile;
use crate::replica::worker::WorkerHandle;

/// How often to look whether a database needs a copy.
const EVERY: Duration = Duration::from_secs(1);
/// How long to wait after a copy could not be taken in.
const RETRY: Duration = Duration::from_secs(30);

/// How often it is tried to open a file again.
const REOPEN: Duration = Duration::from_secs(5);

/// Databases whose file was replaced, and that are not open now: since when they are to be tried again.
pub type Closed = BTreeMap<DbName, tokio::time::Instant>;

/// Opens files that were replaced as new sites.
pub async fn look_after(
    starter: &Starter<'_>,
    observer: &Observer,
    running: &mut BTreeMap<DbName, Running>,
    closed: &mut Closed,
) -> Result<()> {
    let replaced: Vec<DbName> =
        running.iter().filter(|(_, r)| r.worker.replaced().is_some()).map(|(n, _)| n.clone()).collect();
    for name in replaced {
        let Some(database) = running.remove(&name) else { continue };
        let what = database.worker.replaced().unwrap_or_default();
        warn!(db = %name, "{}: {what}: it is opened again, as a new site", database.path.display());
        starter.router.remove(&name);
        tokio::task::spawn_blocking(move || database.stop()).await?;
        starter.state.distrust(&name)?;
        closed.insert(name, tokio::time::Instant::now());
    }
    let now = tokio::time::Instant::now();
    let due: Vec<DbName> = closed.iter().filter(|(_, at)| **at <= now).map(|(n, _)| n.clone()).collect();
    for name in due {
        let Some(spec) = starter.config.databases.iter().find(|d| d.name == name).cloned() else { continue };
        let path = spec.path.clone();
        let opened = async {
            let found = databases::find(spec)?;
            starter.start(found, observer.database(&name, &path)).await
        };
        match opened.await {
            Ok(database) => {
                running.insert(name.clone(), database);
                closed.remove(&name);
                starter.router.say_hello().await;
            }
            Err(e) => {
                let why = format!("its file was replaced, and cannot be opened again: {e:#}");
                warn!(db = %name, "{why}");
                observer.fail(&name, &path, why);
                closed.insert(name, tokio::time::Instant::now() + REOPEN);
            }
        }
    }
    Ok(())
}

/// Writes down as which sites files go on: one that left its site would become yet another at the next start.
pub fn note_sites<'a>(starter: &Starter<'_>, observer: &Observer, names: impl Iterator<Item = &'a DbName>) {
    for name in names {
        let Some(site) = observer.site(name) else { continue };
        if let Err(e) = starter.state.note_site(name, site) {
            warn!(db = %name, "{e:#}: tried again");
        }
    }
}

/// Takes in copies for databases that need one, until the node ends.
pub async fn keep_catching_up(router: Arc<Router>, spool: PathBuf) {
    loop {
        tokio::time::sleep(EVERY).await;
        for db in router.databases() {
            let Some(worker) = router.worker(&db) else { continue };
            let ask = worker.clone();
            let needs = tokio::task::spawn_blocking(move || {
                ask.call(|e| e.needs_copy(steady_ms()).map(|p| (p, PathBuf::from(e.store().path()))))
            });
            let Ok(Some(Some((peer, path)))) = needs.await else { continue };
            if let Err(e) = catch_up(&router, &worker, &db, &peer, &path, &spool).await {
                warn!(db = %db, "cannot take in node {peer}'s file: {e:#}; nothing was changed, trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn catch_up(
    router: &Arc<Router>,
    worker: &WorkerHandle,
    db: &DbName,
    peer: &NodeName,
    path: &Path,
    spool: &Path,
) -> Result<()> {
    info!(
        db = %db,
        "this node was away for so long that its peers have forgotten deletes since: fetches a copy of node {peer}'s file"
    );
    let copy = spool.join(format!("back-{db}.db"));
    let result = async {
        fetch_copy(router, peer, db, &copy).await?;
        let kept = beside(path)?;
        let (worker, peer, spool) = (worker.clone(), peer.clone(), spool.to_owned());
        let work = move || {
            let told = take_in(&worker, &peer, &copy, &kept, &spool);
            super::databases::remove_copy(&copy);
            told
        };
        tokio::task::spawn_blocking(work).await?
    }
    .await;
    let told = result?;
    info!(db = %db, "{told}");
    Ok(())
}

/// A name for the file as it was, which nothing has yet.
fn beside(path: &Path) -> Result<PathBuf> {
    let now = OffsetDateTime::from_unix_timestamp((wall_clock_ms() / 1_000) as i64)?;
    let now = now.format(format_description!("[year][month][day]T[hour][minute][second]Z"))?;
    for suffix in 0..100 {
        let mut name = path.to_owned().into_os_string();
        name.push(format!(".diverged-{now}"));
        if suffix > 0 {
            name.push(format!("-{suffix}"));
        }
        let kept = PathBuf::from(name);
        if !kept.exists() {
            return Ok(kept);
        }
    }
    bail!("there are a hundred files like {}.diverged-{now} already", path.display())
}

fn take_in(worker: &WorkerHandle, peer: &NodeName, copy: &Path, kept: &Path, spool: &Path) -> Result<String> {
    let reader = worker.call(|e| e.snapshot()).context("the database is being stopped")??;
    let durable = || write_copy(&reader, kept).and_then(|()| Ok(synchronise(kept)?));
    durable().with_context(|| format!("cannot keep the file as {}", kept.display()))?;
    drop(reader);
    let told = format!(
        "this node was away for too long to be sent what had changed: it has taken in a copy of node {peer}'s file, and \
         what was written here meanwhile is on top of that; the file as it was is kept as {}",
        kept.display()
    );
    let (copy, spool, text) = (copy.to_owned(), spool.to_owned(), told.clone());
    let united = worker.call(move |e| {
        let file = PeerFile::open(&copy, &spool)?;
        e.unite(file, &text, wall_clock_ms(), steady_ms())
    });
    match united.context("the database is being stopped") {
        Ok(Ok(united)) => Ok(format!("{told}; {} rows had been deleted", united.removed)),
        Ok(Err(e)) => {
            super::databases::remove_copy(kept);
            Err(e.into())
        }
        Err(e) => {
            super::databases::remove_copy(kept);
            Err(e)
        }
    }
}
