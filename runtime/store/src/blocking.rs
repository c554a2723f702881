//! The store as a stage thread sees it: every call blocks on the engine's runtime. Never call these from a task of that
//! runtime or from inside a rayon job.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use dsv3_core::{Artifact, Digest, Event, Events, FileEntry, Kind, Level, Manifest};
use futures::{StreamExt, TryStreamExt};
use serde_json::Value;
use tokio::runtime::Handle;

use crate::{
    Checkpoint, Sources, Store,
    blobs::{blob_path, check_path, hash_file, source_path},
    error::{Result, StoreError},
};

/// Files stored at the same time by one checkpoint.
const PARALLEL_PUTS: usize = 4;

/// Artifacts and their files.
#[derive(Clone, Debug)]
pub struct Blobs {
    store: Store,
    runtime: Handle,
    sources: Arc<Sources>,
    scratch: PathBuf,
}

impl Blobs {
    /// Handles on `store`; `sources` are the external inputs of the plan, `scratch` is a folder for downloaded copies.
    pub fn new(store: Store, runtime: Handle, sources: Arc<Sources>, scratch: PathBuf) -> Self {
        Self { store, runtime, sources, scratch }
    }

    /// The store behind it.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Where the plan says that the content of `digest` lies outside the store: an absolute path or a URI.
    pub fn source(&self, digest: Digest) -> Option<&str> {
        self.sources.get(&digest).map(String::as_str)
    }

    /// Stores `bytes` as the file `path` of an artifact to be published.
    pub fn put(&self, path: &str, bytes: impl Into<Bytes>) -> Result<FileEntry> {
        check_path(path)?;
        let bytes = bytes.into();
        let length = bytes.len() as u64;
        let digest = self.runtime.block_on(self.store.put_blob(bytes))?;
        Ok(FileEntry { path: path.to_owned(), digest, bytes: length })
    }

    /// Stores the content of a local file as the file `path` of an artifact.
    pub fn put_file(&self, path: &str, file: &Path) -> Result<FileEntry> {
        check_path(path)?;
        let (digest, bytes) = self.runtime.block_on(self.store.put_blob_file(file))?;
        Ok(FileEntry { path: path.to_owned(), digest, bytes })
    }

    /// The content of a file, verified.
    pub fn get(&self, entry: &FileEntry) -> Result<Bytes> {
        self.runtime.block_on(self.store.get_file(entry, &self.sources))
    }

    /// A local path that holds the content, verified: the external file or the blob itself where they lie on a local
    /// disk, otherwise a copy under the scratch folder. Do not write to it.
    pub fn local_path(&self, entry: &FileEntry) -> Result<PathBuf> {
        if let Some(path) = self.sources.get(&entry.digest).and_then(|source| source_path(source))
            && path.is_file()
            && self.runtime.block_on(hash_file(&path))? == (entry.digest, entry.bytes)
        {
            return Ok(path);
        }
        if let Some(path) = self.store.local_blob(entry.digest)
            && (path.is_file() || !self.sources.contains_key(&entry.digest))
        {
            self.runtime.block_on(self.store.verify_blob(entry.digest, entry.bytes))?;
            return Ok(path);
        }
        self.download(entry)
    }

    fn download(&self, entry: &FileEntry) -> Result<PathBuf> {
        let folder = self.scratch.join("blobs");
        let path = folder.join(entry.digest.to_string());
        if path.is_file() && self.runtime.block_on(hash_file(&path))? == (entry.digest, entry.bytes) {
            return Ok(path);
        }
        fs::create_dir_all(&folder).map_err(StoreError::io("create", &folder))?;
        let io = |op| StoreError::io(op, &path);
        if self.sources.contains_key(&entry.digest) {
            fs::write(&path, self.get(entry)?).map_err(io("write"))?;
        } else {
            let file = fs::File::create(&path).map_err(io("create"))?;
            self.runtime.block_on(self.store.stream_blob(entry.digest, file))?;
        }
        Ok(path)
    }

    /// The manifest of an artifact whatever its kind.
    pub fn manifest(&self, digest: Digest) -> Result<Manifest> {
        self.runtime.block_on(self.store.manifest(digest))
    }

    /// The manifest of an artifact, with its kind compared.
    ///
    /// # Errors
    /// [`StoreError::Kind`] when the manifest is of another kind.
    pub fn manifest_of<K: Kind>(&self, artifact: &Artifact<K>) -> Result<Manifest> {
        let manifest = self.manifest(artifact.digest())?;
        if manifest.kind == K::NAME {
            return Ok(manifest);
        }
        Err(StoreError::Kind { digest: artifact.digest(), expected: K::NAME.to_owned(), found: manifest.kind })
    }

    /// Publishes an artifact: checks that its files are there, stores the manifest, answers its digest.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when a file was never stored.
    pub fn publish(&self, manifest: &Manifest) -> Result<Digest> {
        self.runtime.block_on(async {
            for file in &manifest.files {
                check_path(&file.path)?;
                if !self.sources.contains_key(&file.digest) && !self.store.blob_exists(file.digest).await? {
                    let path = format!("{} ({})", self.store.display_path(&blob_path(file.digest)), file.path);
                    return Err(StoreError::Missing { op: "publish", path });
                }
            }
            self.store.put_manifest(manifest).await
        })
    }
}

/// The checkpoints of one stage under one lease.
#[derive(Debug)]
pub struct Checkpoints {
    store: Store,
    runtime: Handle,
    key: String,
    epoch: u64,
    stage: String,
    events: Events,
    /// Number of the last record; none before the first look.
    last_seq: Mutex<Option<u64>>,
}

impl Checkpoints {
    /// Checkpoints of the stage key `key`, written under the lease `epoch`; `stage` names it in events.
    pub fn new(store: Store, runtime: Handle, key: &str, epoch: u64, stage: &str, events: Events) -> Self {
        let (key, stage) = (key.to_owned(), stage.to_owned());
        Self { store, runtime, key, epoch, stage, events, last_seq: Mutex::new(None) }
    }

    /// The newest valid checkpoint. Damaged newer ones are named in a warning event and skipped.
    pub fn latest(&self) -> Result<Option<Checkpoint>> {
        let found = self.runtime.block_on(self.store.find_checkpoint(&self.key))?;
        for error in &found.damaged {
            let message = format!("skipping a checkpoint: {error}");
            self.events.emit(Event::Log { stage: self.stage.clone(), level: Level::Warn, message });
        }
        self.last_seq.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(found.last_seq);
        Ok(found.checkpoint)
    }

    /// Stores `files` and commits a checkpoint; durable when this returns its number.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] or [`StoreError::Taken`] when another process has taken over the stage.
    pub fn save(&self, step: u64, files: Vec<(String, Vec<u8>)>, state: Value) -> Result<u64> {
        // A holder that was replaced stores nothing more; it need not find out after gigabytes.
        self.runtime.block_on(self.store.check_lease(&self.key, self.epoch))?;
        let stored = self.runtime.block_on(
            futures::stream::iter(files)
                .map(async |(path, bytes)| {
                    let length = bytes.len() as u64;
                    let digest = self.store.put_blob(Bytes::from(bytes)).await?;
                    Ok::<_, StoreError>(FileEntry { path, digest, bytes: length })
                })
                .buffered(PARALLEL_PUTS)
                .try_collect::<Vec<_>>(),
        )?;
        self.save_entries(step, stored, state)
    }

    /// Commits a checkpoint whose files are stored already.
    ///
    /// # Errors
    /// As [`Self::save`].
    pub fn save_entries(&self, step: u64, files: Vec<FileEntry>, state: Value) -> Result<u64> {
        let mut last_seq = self.last_seq.lock().unwrap_or_else(PoisonError::into_inner);
        let last = match *last_seq {
            Some(last) => last,
            None => self.runtime.block_on(self.store.checkpoint_seqs(&self.key))?.last().copied().unwrap_or(0),
        };
        let checkpoint = Checkpoint { seq: last + 1, step, state, files };
        self.runtime.block_on(self.store.commit_checkpoint(&self.key, self.epoch, &checkpoint))?;
        *last_seq = Some(checkpoint.seq);
        self.events.emit(Event::Checkpoint { stage: self.stage.clone(), seq: checkpoint.seq, step });
        Ok(checkpoint.seq)
    }

    /// The content of a checkpoint's file, verified.
    pub fn read(&self, entry: &FileEntry) -> Result<Bytes> {
        self.runtime.block_on(self.store.get_blob(entry.digest))
    }

    /// Number of the last record this handle knows of; 0 before the first.
    pub fn last_seq(&self) -> u64 {
        self.last_seq.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or(0)
    }
}
