//! Tells the host's programs of changes over NATS. Invariant: the cursor that is kept never is beyond what our own server
//! has, and the streams that take it; so a kill repeats changes, with the ids that they had, and skips none.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::router::Router;
use super::state_dir::{NodeState, write_durably};
use super::verify::open_reader;
use crate::config::Config;
use crate::core::change::{Change, Cursor};
use crate::core::names::DbName;
use crate::fabric::{Event, Events, Fabric, FabricError};
use crate::replica::ReplicaError;
use crate::replica::changes::ChangesPage;
use crate::replica::verify::Reader;
use crate::replica::worker::WorkerHandle;

/// How long to wait before trying again what failed.
const RETRY: Duration = Duration::from_millis(500);
/// How often it is written down how far they were told, while there is something to tell.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// How often it is seen whether somebody listens: not more often than this while nobody does, nor while somebody does.
const LOOK_QUIET: Duration = Duration::from_millis(200);
const LOOK_BUSY: Duration = Duration::from_secs(2);
/// While nobody listens, a kill may repeat what nobody heard.
const SAVE_QUIET_EVERY: Duration = Duration::from_secs(30);
/// A stream that has taken a subject and answers no more for this long is taken to be gone.
const STREAM_PATIENCE: Duration = Duration::from_secs(60);

/// What is kept from one start to the next.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Told {
    cursor: Cursor,
    /// Subjects that streams take.
    taken: Vec<String>,
}

/// Publishes one database's changes.
struct Publisher {
    db: DbName,
    router: Arc<Router>,
    events: Arc<Events>,
    path: PathBuf,
    told: Option<Told>,
    saved: Instant,
    unsaved: bool,
    /// When it was last seen that somebody listens.
    wanted: Option<Instant>,
    reader: Option<(WorkerHandle, Reader)>,
    trouble: Option<String>,
}

/// Publishes the changes of every database, if that is wanted.
pub fn keep_publishing(
    config: &Config,
    state: &NodeState,
    fabric: &Fabric,
    router: &Arc<Router>,
    tasks: &mut JoinSet<()>,
) {
    if !config.cdc {
        return;
    }
    let events = Arc::new(fabric.events());
    for database in &config.databases {
        let publisher = Publisher {
            db: database.name.clone(),
            router: router.clone(),
            events: events.clone(),
            path: state.told(&database.name),
            told: None,
            saved: Instant::now(),
            unsaved: false,
            wanted: None,
            reader: None,
            trouble: None,
        };
        tasks.spawn(publisher.run());
    }
}

/// Notes where telling begins, if it is wanted and has not begun: before the node is ready, and before the publisher
/// can see the database.
pub fn begin(config: &Config, state: &NodeState, db: &DbName, worker: &WorkerHandle) -> Result<()> {
    let path = state.told(db);
    if !config.cdc || path.exists() {
        return Ok(());
    }
    let cursor = open_reader(worker).map_err(anyhow::Error::msg)?.newest(worker)?;
    write_durably(&path, &serde_json::to_vec(&Told { cursor, taken: Vec::new() })?)?;
    info!(db = %db, "programs are told of changes from now on");
    Ok(())
}

impl Publisher {
    /// Until it is aborted.
    async fn run(mut self) {
        loop {
            match self.turn().await {
                Ok(()) => self.trouble = None,
                Err(error) => {
                    // The file may be another one by now.
                    self.reader = None;
                    let text = format!("{error:#}");
                    if self.trouble.as_deref() != Some(&text) {
                        warn!(db = %self.db, "programs are not told of changes: {text}; trying again");
                    }
                    self.trouble = Some(text);
                    sleep(RETRY).await;
                }
            }
        }
    }

    /// Tells what there is, then waits for more.
    async fn turn(&mut self) -> Result<()> {
        let Some(worker) = self.router.worker(&self.db) else {
            // Not started yet, or detached.
            self.reader = None;
            sleep(RETRY).await;
            return Ok(());
        };
        let mut changed = worker.changed();
        changed.borrow_and_update();
        if self.skip(&worker).await? {
            sleep(LOOK_QUIET).await;
            return self.wait(&mut changed, SAVE_QUIET_EVERY).await;
        }
        let page = self.read(worker).await?;
        if page.gap {
            warn!(
                db = %self.db,
                "deletes may have been forgotten that programs were not told of: those that keep a copy should read it anew"
            );
        }
        self.publish(&page.changes).await?;
        let told = Told { cursor: page.next, taken: self.events.taken().into_iter().collect() };
        self.unsaved |= self.told.as_ref().is_none_or(|before| before.cursor != told.cursor);
        self.told = Some(told);
        if self.unsaved && self.saved.elapsed() >= SAVE_EVERY {
            self.save()?;
        }
        if page.is_last {
            return self.wait(&mut changed, SAVE_EVERY).await;
        }
        Ok(())
    }

    /// Until there is more, or what is not written down yet is due.
    async fn wait(&mut self, changed: &mut watch::Receiver<i64>, save_every: Duration) -> Result<()> {
        if self.unsaved && self.saved.elapsed() >= save_every {
            self.save()?;
        }
        let patience = if self.unsaved { save_every } else { Duration::from_secs(60) };
        // Whatever ends it, the next turn looks.
        if matches!(timeout(patience, changed.changed()).await, Ok(Err(_))) {
            sleep(RETRY).await;
        }
        Ok(())
    }

    /// Passes over what there is if nobody wants it, unread. Who listens is looked at after the place up to which it is
    /// passed over was: whoever listened when a change was made is told of it.
    async fn skip(&mut self, worker: &WorkerHandle) -> Result<bool> {
        if self.wanted.is_some_and(|at| at.elapsed() < LOOK_BUSY) {
            return Ok(false);
        }
        let told = self.told()?;
        let newest = self.with_reader(worker, |reader, worker| reader.newest(worker)).await?;
        if self.events.are_wanted().await {
            self.wanted = Some(Instant::now());
            return Ok(false);
        }
        self.unsaved |= told.cursor != newest;
        self.told = Some(Told { cursor: newest, ..told });
        Ok(true)
    }

    fn told(&mut self) -> Result<Told> {
        if let Some(told) = &self.told {
            return Ok(told.clone());
        }
        let told = load(&self.path)?;
        self.events.expect_taken(told.taken.clone());
        Ok(self.told.insert(told).clone())
    }

    async fn read(&mut self, worker: WorkerHandle) -> Result<ChangesPage> {
        let (told, db) = (self.told()?, self.db.clone());
        let read = move |reader: &mut Reader, worker: &WorkerHandle| {
            reader.changes(worker, db.as_str(), &told.cursor, None)
        };
        self.with_reader(&worker, read).await
    }

    /// Does something with a reader of the file that the worker has, which is kept.
    async fn with_reader<T: Send + 'static>(
        &mut self,
        worker: &WorkerHandle,
        work: impl FnOnce(&mut Reader, &WorkerHandle) -> Result<T, ReplicaError> + Send + 'static,
    ) -> Result<T> {
        let reader = self.reader.take().filter(|(of, _)| of.is_same(worker)).map(|(_, reader)| reader);
        let of = worker.clone();
        let all = move || -> Result<_> {
            let mut reader = match reader {
                Some(reader) => reader,
                None => open_reader(&of).map_err(anyhow::Error::msg)?,
            };
            let done = work(&mut reader, &of)?;
            Ok((of, reader, done))
        };
        let (of, reader, done) = tokio::task::spawn_blocking(all).await??;
        self.reader = Some((of, reader));
        Ok(done)
    }

    async fn publish(&mut self, changes: &[Change]) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let events = changes.iter().map(|c| self.event(c)).collect::<Result<Vec<_>>>()?;
        let mut untaken: Option<Instant> = None;
        loop {
            match self.events.publish(&events).await {
                Ok(()) => return Ok(()),
                Err(FabricError::Untaken { subject }) => {
                    let since = *untaken.get_or_insert_with(Instant::now);
                    if since.elapsed() >= STREAM_PATIENCE {
                        warn!(db = %self.db, subject, "the stream that takes this does not answer: it is not waited for any more");
                        self.events.give_up(&subject);
                    }
                }
                // Our own server is starting again.
                Err(FabricError::NotConnected | FabricError::Stalled) => sleep(RETRY).await,
                Err(e) => bail!(e),
            }
        }
    }

    fn event(&self, change: &Change) -> Result<Event> {
        let mut body = serde_json::to_vec(change)?;
        if body.len() > self.events.max_body_bytes() && change.new.is_some() {
            body = serde_json::to_vec(&Change { new: None, too_large: true, ..change.clone() })?;
        }
        Ok(Event {
            db: self.db.clone(),
            table: change.table.clone(),
            op: change.op.word(),
            id: change.id.clone(),
            body: Bytes::from(body),
        })
    }

    fn save(&mut self) -> Result<()> {
        if let Some(told) = &self.told {
            write_durably(&self.path, &serde_json::to_vec(told)?)?;
        }
        (self.saved, self.unsaved) = (Instant::now(), false);
        Ok(())
    }
}

fn load(path: &Path) -> Result<Told> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| {
        format!("{} is damaged: remove it and start again; changes from then on are told", path.display())
    })
}
