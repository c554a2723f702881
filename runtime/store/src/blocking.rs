//! The store as a stage thread sees it: every call blocks on the engine's runtime. Never call these from a task of that
//! runtime or from inside a rayon job.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use dsv3_core::{Artifact, Digest, FileEntry, Kind, Manifest};
use tokio::runtime::Handle;

pub use crate::saver::{Checkpoints, Save};
use crate::{
    Sources, Store,
    blobs::{blob_path, check_path, hash_file, source_path},
    error::{Result, StoreError},
};

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
