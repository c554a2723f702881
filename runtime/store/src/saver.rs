//! Checkpoints of one stage as its thread sees them: found, read, and saved in the background.
//!
//! [`Checkpoints::start`] takes what is to be saved and returns; hashing, upload and commit go on as a task of the
//! engine's runtime. At most one save is in flight: the next `start` waits for it, so commits keep their order and at most
//! one copy of the state is held. An error of a save is told by the next call, [`Checkpoints::poll`] after every step and
//! [`Checkpoints::finish`] at the end at the latest; a crash loses only what was not committed.
//!
//! Invariant: what is committed depends on what was handed over alone, never on when the task ran.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use bytes::Bytes;
use dsv3_core::{Clock, Digest, Event, Events, FileEntry, Level};
use futures::{StreamExt, TryStreamExt};
use serde_json::Value;
use tokio::{runtime::Handle, task::JoinHandle};

use crate::{
    Checkpoint, CheckpointRecord, Retention, Retired, Store, TensorEntry,
    error::{Result, StoreError},
};

/// Files stored at the same time by one checkpoint.
const PARALLEL_PUTS: usize = 4;

/// Metric of a save: seconds from the hand-over to the commit.
const SAVE_SECONDS: &str = "checkpoint_save_seconds";

/// What a stage hands over to be saved.
#[derive(Clone, Debug, Default)]
pub struct Save {
    /// The stage's own count, such as optimiser steps.
    pub step: u64,
    /// Name and content of each file.
    pub files: Vec<(String, Bytes)>,
    /// What the files hold; digests of slices are filled in on the way. Empty for a stage without tensors.
    pub tensors: Vec<TensorEntry>,
    /// Small state as JSON.
    pub state: Value,
}

/// The checkpoints of one stage under one lease.
#[derive(Debug)]
pub struct Checkpoints {
    shared: Arc<Shared>,
    runtime: Handle,
    /// Only the checkpoint of this number is to be found.
    at: Option<u64>,
    in_flight: Mutex<Option<JoinHandle<Result<u64>>>>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    key: String,
    epoch: u64,
    stage: String,
    events: Events,
    /// Number of the last record; none before the first look.
    last_seq: Mutex<Option<u64>>,
    retention: Option<Retain>,
}

/// What is kept, and by which clock a collection elsewhere is judged.
struct Retain {
    policy: Retention,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for Retain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.policy.fmt(f)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Checkpoints {
    /// Checkpoints of the stage key `key`, written under the lease `epoch`; `stage` names it in events.
    pub fn new(store: Store, runtime: Handle, key: &str, epoch: u64, stage: &str, events: Events) -> Self {
        let (key, stage) = (key.to_owned(), stage.to_owned());
        let last_seq = Mutex::new(None);
        let shared = Arc::new(Shared { store, key, epoch, stage, events, last_seq, retention: None });
        Self { shared, runtime, at: None, in_flight: Mutex::new(None) }
    }

    /// Removes superseded checkpoints after each commit; `None` keeps all.
    #[must_use]
    pub fn retain(mut self, policy: Option<Retention>, clock: Arc<dyn Clock>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.retention = policy.map(|policy| Retain { policy, clock });
        }
        self
    }

    /// Finds the checkpoint of number `seq` and no other; `None` finds the newest.
    #[must_use]
    pub fn at(mut self, seq: Option<u64>) -> Self {
        self.at = seq;
        self
    }

    /// The newest valid checkpoint, after the save in flight. Damaged newer ones are named in a warning event and
    /// skipped.
    ///
    /// # Errors
    /// Those of a save that failed; [`StoreError::Damaged`] when the one asked for by [`Self::at`] cannot be used.
    pub fn latest(&self) -> Result<Option<Checkpoint>> {
        self.finish()?;
        let Shared { store, key, stage, events, last_seq, .. } = &*self.shared;
        if let Some(seq) = self.at {
            return self.runtime.block_on(store.checkpoint_at(key, seq)).map(Some);
        }
        let found = self.runtime.block_on(store.find_checkpoint(key))?;
        for error in &found.damaged {
            let message = format!("skipping a checkpoint: {error}");
            events.emit(Event::Log { stage: stage.clone(), level: Level::Warn, message });
        }
        lock(last_seq).get_or_insert(found.last_seq);
        Ok(found.checkpoint)
    }

    /// Stores `files` and commits a checkpoint; durable when this returns its number.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] or [`StoreError::Taken`] when another process has taken over the stage.
    pub fn save(&self, step: u64, files: Vec<(String, Vec<u8>)>, state: Value) -> Result<u64> {
        let files = files.into_iter().map(|(path, bytes)| (path, Bytes::from(bytes))).collect();
        self.finish()?;
        let save = self.shared.commit(Save { step, files, tensors: Vec::new(), state });
        self.runtime.block_on(save)
    }

    /// Takes what is to be saved and goes on in the background; waits for the save before it.
    ///
    /// # Errors
    /// Those of the save before it.
    pub fn start(&self, save: Save) -> Result<()> {
        self.finish()?;
        let shared = self.shared.clone();
        let commit = async move {
            let (started, step) = (Instant::now(), save.step);
            let seq = shared.commit(save).await?;
            let (stage, name) = (shared.stage.clone(), SAVE_SECONDS.to_owned());
            shared.tell(Event::Metric { stage, name, step, value: started.elapsed().as_secs_f64() }).await;
            Ok(seq)
        };
        *lock(&self.in_flight) = Some(self.runtime.spawn(commit));
        Ok(())
    }

    /// Tells the error of a save that has ended; never waits for one that has not.
    ///
    /// # Errors
    /// Those of the save in flight.
    pub fn poll(&self) -> Result<()> {
        let ended = lock(&self.in_flight).as_ref().is_some_and(JoinHandle::is_finished);
        if ended { self.finish() } else { Ok(()) }
    }

    /// Waits until the save in flight, if there is one, is committed.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] or [`StoreError::Taken`] when another process has taken over the stage, or whatever the store refused.
    pub fn finish(&self) -> Result<()> {
        let task = lock(&self.in_flight).take();
        match task {
            Some(task) => self.runtime.block_on(task)?.map(drop),
            None => Ok(()),
        }
    }

    /// [`Self::finish`] for an async caller whose stage has ended in an error that matters more.
    pub async fn settle(&self) {
        let task = lock(&self.in_flight).take();
        if let Some(task) = task
            && let Err(error) = task.await.map_err(StoreError::from).flatten()
        {
            tracing::warn!(%error, stage = self.shared.stage, "the last checkpoint was not committed");
        }
    }

    /// The content of a checkpoint's file, verified.
    pub fn read(&self, entry: &FileEntry) -> Result<Bytes> {
        self.runtime.block_on(self.shared.store.get_blob(entry.digest))
    }

    /// The bytes of some rows of a checkpoint's tensor, verified: see [`Store::read_rows`].
    pub fn read_rows(&self, checkpoint: &Checkpoint, name: &str, rows: std::ops::Range<u64>) -> Result<Vec<u8>> {
        self.runtime.block_on(self.shared.store.read_rows(checkpoint, name, rows))
    }

    /// Number of the last record this handle knows of; 0 before the first.
    pub fn last_seq(&self) -> u64 {
        lock(&self.shared.last_seq).unwrap_or(0)
    }
}

impl Shared {
    async fn commit(&self, save: Save) -> Result<u64> {
        let Save { step, files, mut tensors, state } = save;
        // A holder that was replaced stores nothing more; it need not find out after gigabytes.
        self.store.check_lease(&self.key, self.epoch).await?;
        let hashed = files.clone();
        let digests = tokio::task::spawn_blocking(move || {
            hash_slices(&mut tensors, &hashed);
            tensors
        });
        let stored = futures::stream::iter(files)
            .map(async |(path, bytes)| {
                let length = bytes.len() as u64;
                let digest = self.store.put_blob(bytes).await?;
                Ok::<_, StoreError>(FileEntry { path, digest, bytes: length })
            })
            .buffered(PARALLEL_PUTS)
            .try_collect::<Vec<_>>();
        let (files, tensors) = (stored.await?, digests.await?);
        let known = *lock(&self.last_seq);
        let last = match known {
            Some(last) => last,
            None => self.store.checkpoint_seqs(&self.key).await?.last().copied().unwrap_or(0),
        };
        let mut checkpoint = Checkpoint { seq: last + 1, step, state, files, tensors };
        loop {
            match self.store.commit_checkpoint(&self.key, self.epoch, &checkpoint).await {
                Ok(()) => break,
                // Of a holder before this one that was paused while it wrote its fence: it stops nobody but itself.
                Err(StoreError::Taken { .. }) if self.is_stale_fence(checkpoint.seq).await? => checkpoint.seq += 1,
                Err(error) => return Err(error),
            }
        }
        let seq = checkpoint.seq;
        *lock(&self.last_seq) = Some(seq);
        self.tell(Event::Checkpoint { stage: self.stage.clone(), seq, step }).await;
        self.retire().await;
        Ok(seq)
    }

    async fn is_stale_fence(&self, seq: u64) -> Result<bool> {
        let record = self.store.checkpoint_record(&self.key, seq).await?;
        Ok(matches!(record, CheckpointRecord::Fence { epoch } if epoch < self.epoch))
    }

    /// Emits an event from a thread that may block: a slow reader of events must not hold up heartbeats and connections,
    /// which run on the same threads as this task.
    async fn tell(&self, event: Event) {
        let events = self.events.clone();
        // It fails only when the runtime ends, and then nobody listens.
        let _ = tokio::task::spawn_blocking(move || events.emit(event)).await;
    }

    /// Removes what the commit before has superseded. Saves come one after another, so nothing of this stage is under way.
    async fn retire(&self) {
        let Some(Retain { policy, clock }) = &self.retention else { return };
        let say = |level, message| self.tell(Event::Log { stage: self.stage.clone(), level, message });
        match self.store.retire_checkpoints(&self.key, self.epoch, policy, clock.clone()).await {
            Ok(retired) if retired.seqs.is_empty() => {}
            Ok(Retired { seqs, bytes }) => {
                let seqs: Vec<String> = seqs.iter().map(u64::to_string).collect();
                say(Level::Info, format!("removed superseded checkpoints {}: {bytes} bytes", seqs.join(", "))).await;
            }
            // What was committed stays so, and superseded checkpoints stay until the next commit.
            Err(error) => say(Level::Warn, format!("superseded checkpoints stay until the next commit: {error}")).await,
        }
    }
}

/// Fills in the digest of every slice. A slice outside its file is left without: the commit refuses it by name.
fn hash_slices(tensors: &mut [TensorEntry], files: &[(String, Bytes)]) {
    for slice in tensors.iter_mut().flat_map(|tensor| &mut tensor.slices) {
        let file = files.iter().find(|(path, _)| *path == slice.file);
        let [begin, end] = slice.bytes;
        let held = file.and_then(|(_, bytes)| bytes.get(begin as usize..end as usize));
        slice.digest = held.map(Digest::of);
    }
}
