//! Large objects on the way to and from a store: uploads in parts, downloads in ranges, several of them at a time, hashed
//! while they pass.
//!
//! Invariants: an upload that fails is aborted; one whose content is not that of its digest is never completed; a range
//! that arrives short is asked for again; a download is believed only when the digest of the whole is right.

use std::{
    io::{self, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use dsv3_core::Digest;
use futures::{FutureExt, StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{Error, ObjectStoreExt, PutPayload, multipart::PartId, path::Path as ObjectPath};
use tokio::sync::mpsc;

use crate::{
    Store,
    error::{Result, StoreError},
    retry::is_transient,
};

/// Parts that S3 takes in one upload.
const PARTS_MAX: u64 = 10_000;
/// Chunks of a download that wait for the hasher.
const CHUNKS_WAITING: usize = 4;

/// What is uploaded.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// Bytes in memory.
    Bytes(Bytes),
    /// A local file and its length.
    File(PathBuf, u64),
}

impl Content {
    fn length(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, bytes) => *bytes,
        }
    }

    async fn part(&self, range: Range<u64>) -> Result<Bytes> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.slice(range.start as usize..range.end as usize)),
            Self::File(path, _) => {
                let (file, error) = (path.clone(), StoreError::io("read", path));
                tokio::task::spawn_blocking(move || read_part(&file, range)).await?.map_err(error).map(Bytes::from)
            }
        }
    }
}

fn read_part(path: &Path, range: Range<u64>) -> io::Result<Vec<u8>> {
    use std::io::{Read, Seek};
    let mut file = std::fs::File::open(path)?;
    file.seek(io::SeekFrom::Start(range.start))?;
    let mut part = vec![0; (range.end - range.start) as usize];
    file.read_exact(&mut part)?;
    Ok(part)
}

/// The ranges of `part_bytes` that make up an object, in order.
fn ranges(bytes: u64, part_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    (0..bytes.div_ceil(part_bytes)).map(move |i| i * part_bytes..bytes.min((i + 1) * part_bytes))
}

impl Store {
    /// Uploads `content`, whose digest is known, to `path` in parts, replacing what is there.
    ///
    /// # Errors
    /// [`StoreError::SourceChanged`] when a file no longer has that content.
    pub(crate) async fn upload(&self, path: &str, content: &Content, digest: Digest) -> Result<()> {
        let location = self.location(path)?;
        if self.parts().is_some() {
            return self.upload_parts(path, &location, content, digest).await;
        }
        let mut tries = self.retries().tries();
        loop {
            match self.upload_whole(path, &location, content, digest).await? {
                Ok(()) => return Ok(()),
                Err(error) if is_transient(&error) && tries.wait(&error).await => {}
                Err(error) => return Err(StoreError::object("create", &self.display_path(path), error)),
            }
        }
    }

    /// Parts in order. Each is hashed before it is handed out, so that the last one comes with the digest of all.
    fn parts_of<'a>(&self, content: &'a Content, digest: Digest) -> BoxStream<'a, Result<(usize, Bytes)>> {
        let part_bytes = self.options().part_bytes().max(content.length().div_ceil(PARTS_MAX));
        let hasher = match content {
            // What lies in memory stays as it was hashed.
            Content::Bytes(_) => None,
            Content::File(..) => Some(blake3::Hasher::new()),
        };
        let count = content.length().div_ceil(part_bytes) as usize;
        let ranges = ranges(content.length(), part_bytes).enumerate();
        let next = move |(mut ranges, mut hasher): (_, Option<blake3::Hasher>)| async move {
            let Some((i, range)) = Iterator::next(&mut ranges) else { return Ok(None) };
            let part = content.part(range).await?;
            if let Some(hasher) = &mut hasher {
                hasher.update(&part);
                if i + 1 == count && hasher.finalize().as_bytes() != digest.as_bytes() {
                    let path =
                        if let Content::File(path, _) = content { path.display().to_string() } else { String::new() };
                    return Err(StoreError::SourceChanged { path });
                }
            }
            Ok(Some(((i, part), (ranges, hasher))))
        };
        futures::stream::try_unfold((ranges, hasher), next).boxed()
    }

    /// By the store's own multipart uploads: each part is tried again by itself.
    async fn upload_parts(&self, path: &str, location: &ObjectPath, content: &Content, digest: Digest) -> Result<()> {
        let error = |error| StoreError::object("create", &self.display_path(path), error);
        let Some(store) = self.parts() else { return Ok(()) };
        let id = self.retries().run(|| store.create_multipart(location)).await.map_err(error)?;
        let put = |(i, part): (usize, Bytes)| {
            let id = &id;
            async move {
                let part = PutPayload::from_bytes(part);
                self.retries().run(|| store.put_part(location, id, i, part.clone())).await.map(|part| (i, part))
            }
        };
        let parts = self.parts_of(content, digest).map_ok(move |part| put(part).map(move |done| done.map_err(error)));
        let uploaded: Result<Vec<(usize, PartId)>> =
            parts.try_buffer_unordered(self.options().parallel).try_collect().await;
        let ended = match uploaded {
            Ok(mut parts) => {
                parts.sort_unstable_by_key(|(i, _)| *i);
                let parts: Vec<PartId> = parts.into_iter().map(|(_, part)| part).collect();
                self.complete(path, location, &id, parts, content.length()).await
            }
            Err(error) => Err(error),
        };
        if ended.is_err()
            && let Err(error) = self.retries().run(|| store.abort_multipart(location, &id)).await
            && !matches!(error, Error::NotFound { .. })
        {
            tracing::warn!(%error, path, "an upload was left unfinished; its parts take room until they are removed");
        }
        ended
    }

    async fn complete(
        &self,
        path: &str,
        location: &ObjectPath,
        id: &str,
        parts: Vec<PartId>,
        bytes: u64,
    ) -> Result<()> {
        let Some(store) = self.parts() else { return Ok(()) };
        let (mut tries, mut unsure) = (self.retries().tries(), false);
        let id = id.to_owned();
        loop {
            let Err(error) = store.complete_multipart(location, &id, parts.clone()).await else { return Ok(()) };
            let transient = is_transient(&error);
            // An upload that is gone after an attempt without an answer was completed by that attempt.
            if unsure && !transient && self.length(path).await? == Some(bytes) {
                return Ok(());
            }
            unsure |= transient;
            if !transient || !tries.wait(&error).await {
                return Err(StoreError::object("create", &self.display_path(path), error));
            }
        }
    }

    /// By the uploads that every object store has, whose parts are tried once. The outer error is one of the content.
    async fn upload_whole(
        &self,
        path: &str,
        location: &ObjectPath,
        content: &Content,
        digest: Digest,
    ) -> Result<object_store::Result<()>> {
        let mut upload = match self.objects().put_multipart(location).await {
            Ok(upload) => upload,
            Err(error) => return Ok(Err(error)),
        };
        let mut parts = self.parts_of(content, digest);
        let mut waiting = futures::stream::FuturesUnordered::new();
        let sent: Result<object_store::Result<()>> = async {
            while let Some((_, part)) = parts.try_next().await? {
                waiting.push(upload.put_part(PutPayload::from_bytes(part)));
                if waiting.len() >= self.options().parallel
                    && let Some(Err(error)) = waiting.next().await
                {
                    return Ok(Err(error));
                }
            }
            while let Some(done) = waiting.next().await {
                if let Err(error) = done {
                    return Ok(Err(error));
                }
            }
            Ok(upload.complete().await.map(drop))
        }
        .await;
        drop(waiting);
        if !matches!(sent, Ok(Ok(())))
            && let Err(error) = upload.abort().await
        {
            tracing::warn!(%error, path, "an upload was left unfinished; its parts take room until they are removed");
        }
        sent
    }

    /// Length of the object `path`, which must be there.
    pub(crate) async fn length_to_read(&self, path: &str) -> Result<u64> {
        let missing = || StoreError::Missing { op: "read", path: self.display_path(path) };
        self.length(path).await?.ok_or_else(missing)
    }

    /// Reads all of `path`, `bytes` long, into `sink`, in order, with several ranges under way; answers the sink and the
    /// digest.
    pub(crate) async fn download<W: Write + Send + 'static>(
        &self,
        path: &str,
        bytes: u64,
        sink: W,
    ) -> Result<(W, Digest)> {
        let (location, shown) = (self.location(path)?, self.display_path(path));
        let error = |error| StoreError::object("read", &shown, error);
        let (sender, receiver) = mpsc::channel::<Bytes>(CHUNKS_WAITING);
        let hashing = tokio::task::spawn_blocking(move || hash_chunks(receiver, sink));
        let fetched = futures::stream::iter(ranges(bytes, self.options().part_bytes()))
            .map(|range| self.get_range(&location, range))
            .buffered(self.options().parallel)
            .map_err(error)
            // The hasher ends early only when it cannot write: its own error says so.
            .try_for_each(async |chunk| {
                let _ = sender.send(chunk).await;
                Ok(())
            })
            .await;
        drop(sender);
        let (sink, digest) = hashing.await?.map_err(StoreError::io("write a copy of", &shown))?;
        fetched.map(|()| (sink, digest))
    }
}

fn hash_chunks<W: Write>(mut chunks: mpsc::Receiver<Bytes>, mut sink: W) -> io::Result<(W, Digest)> {
    let mut hasher = blake3::Hasher::new();
    while let Some(chunk) = chunks.blocking_recv() {
        hasher.update(&chunk);
        sink.write_all(&chunk)?;
    }
    Ok((sink, Digest::from_bytes(*hasher.finalize().as_bytes())))
}
