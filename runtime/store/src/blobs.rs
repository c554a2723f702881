//! Content-addressed blobs: `blobs/<digest>`, hashed while they are written and again before they are trusted.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::{
    Store,
    error::{Result, StoreError},
    hashing::{self, copy_hashed},
    local,
    transfer::Content,
};
use bytes::Bytes;
use dsv3_core::{Digest, FileEntry};

/// External input files: where the content of a digest lies outside the store, as an absolute path or a URI.
pub type Sources = BTreeMap<Digest, String>;

/// A blob that is there already and is not longer than this is read and compared before it is kept; what a longer one
/// holds is seen when it is loaded.
const COMPARED_BYTES_MAX: u64 = 1 << 20;

pub(crate) fn blob_path(digest: Digest) -> String {
    format!("blobs/{digest}")
}

/// Digest and length of a local file.
pub(crate) async fn hash_file(path: &Path) -> Result<(Digest, u64)> {
    let file = path.to_owned();
    tokio::task::spawn_blocking(move || hashing::hash_file(&file)).await?.map_err(StoreError::io("read", path))
}

impl Store {
    /// Stores `bytes`; durable when this returns. A blob that is already there is kept when it is intact and replaced
    /// when it is not: on a local disk all of it is compared, elsewhere its length, its bytes up to 1 MiB, and what this
    /// process saw when it loaded it.
    pub async fn put_blob(&self, bytes: Bytes) -> Result<Digest> {
        if let Some(root) = self.local_files().filter(|_| bytes.len() >= hashing::THREAD_BYTES) {
            return self.put_blob_local(root.clone(), bytes).await;
        }
        let hashed = bytes.clone();
        let digest = tokio::task::spawn_blocking(move || Digest::of(&hashed)).await?;
        if self.keep_existing(digest, bytes.len() as u64).await? {
            return Ok(digest);
        }
        let path = blob_path(digest);
        if self.local_root().is_none() && bytes.len() as u64 > self.options().part_bytes() {
            self.upload(&path, &Content::Bytes(bytes), digest).await?;
        } else {
            // Another writer of the same digest wrote the same bytes.
            self.create(&path, bytes).await?;
        }
        Ok(digest)
    }

    /// Writes and hashes at the same time, then gives the file its name.
    async fn put_blob_local(&self, root: local::Root, bytes: Bytes) -> Result<Digest> {
        let error = StoreError::io("create", self.display_path("blobs"));
        let work = move || {
            let (digest, staged) = hashing::hash_beside(&bytes, || {
                local::stage(&root, "blobs", |file| hashing::write_through(file, &bytes))
            })?;
            Ok((digest, staged, root, bytes.len() as u64))
        };
        let (digest, staged, root, bytes) = tokio::task::spawn_blocking(work).await?.map_err(error)?;
        self.name_staged(root, staged, digest, bytes).await?;
        Ok(digest)
    }

    /// Gives a staged file its name as a blob, unless an intact one is there.
    async fn name_staged(&self, root: local::Root, staged: local::Staged, digest: Digest, bytes: u64) -> Result<()> {
        if self.keep_existing(digest, bytes).await? {
            return Ok(());
        }
        let target = blob_path(digest);
        let error = StoreError::io("create", self.display_path(&target));
        tokio::task::spawn_blocking(move || local::link(&root, &staged, &target)).await?.map_err(error)?;
        Ok(())
    }

    /// Stores the content of a local file, in constant memory.
    pub async fn put_blob_file(&self, path: &Path) -> Result<(Digest, u64)> {
        let Some(root) = self.local_files().cloned() else {
            let read = StoreError::io("read", path);
            if tokio::fs::metadata(path).await.is_ok_and(|found| found.len() <= self.options().part_bytes()) {
                let bytes = Bytes::from(tokio::fs::read(path).await.map_err(read)?);
                let length = bytes.len() as u64;
                return Ok((self.put_blob(bytes).await?, length));
            }
            let (digest, bytes) = hash_file(path).await?;
            if !self.keep_existing(digest, bytes).await? {
                self.upload(&blob_path(digest), &Content::File(path.to_owned(), bytes), digest).await?;
            }
            return Ok((digest, bytes));
        };
        let file = path.to_owned();
        let copy = move || {
            let mut copied = None;
            let staged = local::stage(&root, "tmp", |to| {
                copied = Some(copy_hashed(&mut File::open(&file)?, to)?);
                Ok(())
            })?;
            Ok((root, staged, copied.ok_or(io::ErrorKind::UnexpectedEof)?))
        };
        let error = StoreError::io("store", path);
        let (root, staged, (digest, bytes)) = tokio::task::spawn_blocking(copy).await?.map_err(error)?;
        self.name_staged(root, staged, digest, bytes).await?;
        Ok((digest, bytes))
    }

    /// Whether a good blob is there already. One that is not good is removed, so that the caller can write it.
    async fn keep_existing(&self, digest: Digest, bytes: u64) -> Result<bool> {
        let path = blob_path(digest);
        let Some(found) = self.length(&path).await? else {
            return Ok(false);
        };
        let intact = match self.local_blob(digest) {
            _ if found != bytes => false,
            Some(file) => match hash_file(&file).await {
                Ok((found, _)) => found == digest,
                // A collection was faster.
                Err(StoreError::Missing { .. }) => return Ok(false),
                Err(error) => return Err(error),
            },
            None if self.is_damaged(digest) => false,
            None if bytes > COMPARED_BYTES_MAX || self.is_verified(digest) => true,
            None => match self.read_if_exists(&path).await? {
                Some(found) => Digest::of(&found) == digest,
                None => return Ok(false),
            },
        };
        if !intact {
            tracing::warn!(path = self.display_path(&path), "replacing a damaged blob");
            self.delete(&path).await?;
            self.forget_blob(digest);
            return Ok(false);
        }
        self.renew_blob(digest).await
    }

    /// The bytes of a blob, after their digest has been compared.
    ///
    /// # Errors
    /// [`StoreError::Missing`], or [`StoreError::Damaged`] when the bytes are not those of the digest.
    pub async fn get_blob(&self, digest: Digest) -> Result<Bytes> {
        let path = blob_path(digest);
        let (bytes, found) = match self.local_blob(digest).filter(|_| self.reads_directly()) {
            Some(file) => {
                let error = StoreError::io("read", file.clone());
                tokio::task::spawn_blocking(move || hashing::read_hashed(&file)).await?.map_err(error)?
            }
            None => {
                let length = self.length_to_read(&path).await?;
                let room = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
                let (bytes, found) = self.download(&path, length, room).await?;
                (Bytes::from(bytes), found)
            }
        };
        self.set_verified(digest, found == digest);
        if found != digest {
            return Err(self.wrong_digest(&path, bytes.len() as u64, None));
        }
        Ok(bytes)
    }

    /// Whether a blob is there, without reading it.
    pub async fn blob_exists(&self, digest: Digest) -> Result<bool> {
        Ok(self.length(&blob_path(digest)).await?.is_some())
    }

    /// Path of a blob on the disk of a `file://` store, whether or not it is there.
    pub fn local_blob(&self, digest: Digest) -> Option<PathBuf> {
        self.local_root().map(|root| root.join("blobs").join(digest.to_string()))
    }

    /// Compares the length of a blob and, unless this process has done so before, its digest.
    ///
    /// # Errors
    /// As [`Self::get_blob`].
    pub async fn verify_blob(&self, digest: Digest, bytes: u64) -> Result<()> {
        if self.is_verified(digest) && self.local_root().is_none() {
            return Ok(());
        }
        let path = blob_path(digest);
        match self.length(&path).await? {
            None => return Err(StoreError::Missing { op: "read", path: self.display_path(&path) }),
            Some(found) if found != bytes => {
                self.set_verified(digest, false);
                return Err(self.wrong_digest(&path, found, Some(bytes)));
            }
            Some(_) if self.is_verified(digest) => return Ok(()),
            Some(_) => {}
        }
        match self.local_blob(digest) {
            Some(file) => {
                if hash_file(&file).await?.0 != digest {
                    self.set_verified(digest, false);
                    return Err(self.wrong_digest(&path, bytes, Some(bytes)));
                }
                self.set_verified(digest, true);
            }
            None => self.stream_blob(digest, io::sink()).await?,
        }
        Ok(())
    }

    /// Streams a blob into `to`, comparing the digest at the end: on an error what was written is worthless.
    pub(crate) async fn stream_blob(&self, digest: Digest, to: impl Write + Send + 'static) -> Result<()> {
        let path = blob_path(digest);
        let bytes = self.length_to_read(&path).await?;
        let (_, found) = self.download(&path, bytes, to).await?;
        self.set_verified(digest, found == digest);
        if found == digest { Ok(()) } else { Err(self.wrong_digest(&path, bytes, None)) }
    }

    fn wrong_digest(&self, path: &str, found: u64, expected: Option<u64>) -> StoreError {
        let problem = match expected {
            Some(expected) if expected != found => format!("it has {found} bytes instead of {expected}"),
            _ => format!("its {found} bytes have another digest"),
        };
        StoreError::damaged(self.display_path(path), problem)
    }

    /// The content of a file of an artifact: the source the plan names, or the blob.
    ///
    /// # Errors
    /// [`StoreError::SourceChanged`] or [`StoreError::SourceMissing`] when neither holds the content of the digest.
    pub async fn get_file(&self, entry: &FileEntry, sources: &Sources) -> Result<Bytes> {
        let Some(source) = sources.get(&entry.digest) else {
            return self.get_blob(entry.digest).await.map_err(|error| in_file(error, entry));
        };
        let read = read_source(source).await;
        match read {
            Ok(bytes) if Digest::of(&bytes) == entry.digest => Ok(bytes),
            // A copy in the store serves as well.
            read => match self.get_blob(entry.digest).await {
                Ok(bytes) => Ok(bytes),
                Err(StoreError::Missing { .. }) => Err(match read {
                    Ok(_) => StoreError::SourceChanged { path: source.clone() },
                    Err(StoreError::Missing { .. }) => StoreError::SourceMissing { path: source.clone() },
                    Err(error) => error,
                }),
                Err(error) => Err(error),
            },
        }
    }

    /// Stores a manifest and answers its digest, which is the artifact's identity.
    pub async fn put_manifest(&self, manifest: &dsv3_core::Manifest) -> Result<Digest> {
        self.put_blob(Bytes::from(manifest.to_bytes())).await
    }

    /// The manifest of an artifact.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when the blob is no manifest of a known format.
    pub async fn manifest(&self, digest: Digest) -> Result<dsv3_core::Manifest> {
        let damaged = |problem| StoreError::damaged(self.display_path(&blob_path(digest)), problem);
        let bytes = self.get_blob(digest).await?;
        let manifest: dsv3_core::Manifest =
            serde_json::from_slice(&bytes).map_err(|error| damaged(format!("it is no manifest: {error}")))?;
        if manifest.format != dsv3_core::Manifest::FORMAT {
            return Err(damaged(format!("its format is {}, this build reads 1", manifest.format)));
        }
        manifest.files.iter().try_for_each(|file| check_path(&file.path))?;
        Ok(manifest)
    }
}

/// Refuses a path that would leave the artifact's folder.
pub(crate) fn check_path(path: &str) -> Result<()> {
    let good = !path.is_empty()
        && !path.contains(['\\', '\0', ':'])
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    if good { Ok(()) } else { Err(StoreError::BadPath { path: path.to_owned() }) }
}

/// Local path of a source, none for a URI of an object store.
pub(crate) fn source_path(source: &str) -> Option<PathBuf> {
    match source.split_once("://") {
        None => Some(PathBuf::from(source)),
        Some(("file", path)) => Some(PathBuf::from(path)),
        Some(_) => None,
    }
}

async fn read_source(source: &str) -> Result<Bytes> {
    if let Some(path) = source_path(source) {
        let bytes = tokio::fs::read(&path).await.map_err(StoreError::io("read input file", &path))?;
        return Ok(Bytes::from(bytes));
    }
    let (folder, name) = source
        .rsplit_once('/')
        .ok_or_else(|| StoreError::Url { url: source.to_owned(), problem: "it names no file".into() })?;
    Store::open(folder)?.read(name).await
}

/// Says which file of an artifact a blob was wanted for.
fn in_file(error: StoreError, entry: &FileEntry) -> StoreError {
    match error {
        StoreError::Damaged { path, problem } => {
            StoreError::Damaged { path: format!("{path} (file {})", entry.path), problem }
        }
        other => other,
    }
}
