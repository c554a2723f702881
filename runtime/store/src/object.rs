//! Objects by path: open by URL, conditional create, read, list, with retries of what passes by itself.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use dsv3_core::Digest;
use futures::{FutureExt, TryStreamExt, future::BoxFuture};
use object_store::{
    GetResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder, local::LocalFileSystem, memory::InMemory,
    path::Path as ObjectPath,
};

use crate::{
    error::{Result, StoreError},
    local,
};

/// Waits between the attempts of one operation. Cloud clients retry by themselves before this sees an error.
const RETRY_WAITS: [Duration; 3] = [Duration::from_millis(20), Duration::from_millis(100), Duration::from_millis(500)];

/// How a conditional create ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Create {
    /// The object is ours.
    Created,
    /// Somebody was first.
    AlreadyExists,
}

/// A store. Cheap to clone; clones share one connection.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    url: String,
    objects: Arc<dyn ObjectStore>,
    prefix: ObjectPath,
    /// Root folder of a `file://` store.
    local: Option<local::Root>,
    /// Blobs whose digest this process has seen to be right.
    verified: Mutex<BTreeSet<Digest>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.inner.url)
    }
}

impl Store {
    /// Opens `file://FOLDER` (`file://./FOLDER` is relative to the current directory; a plain path means the same),
    /// `memory://`, `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or `az://CONTAINER/PREFIX`. Credentials come from the
    /// environment variables of each cloud's own tools. A missing local folder is created.
    ///
    /// # Errors
    /// [`StoreError::Url`] for an unknown scheme, [`StoreError::Unavailable`] for a folder that cannot be made.
    pub fn open(url: &str) -> Result<Self> {
        let bad = |problem: String| StoreError::Url { url: url.to_owned(), problem };
        let (scheme, rest) = url.split_once("://").unwrap_or(("file", url));
        if scheme == "file" {
            return Self::open_folder(url, rest);
        }
        if scheme == "memory" {
            return Ok(Self::with_objects(url, Arc::new(InMemory::new())));
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(bad("it names no bucket".into()));
        }
        let prefix = ObjectPath::parse(prefix.trim_end_matches('/')).map_err(|error| bad(error.to_string()))?;
        let root = format!("{scheme}://{bucket}");
        let objects = match scheme {
            "s3" | "s3a" => {
                AmazonS3Builder::from_env().with_url(root).build().map(|s| Arc::new(s) as Arc<dyn ObjectStore>)
            }
            "gs" => GoogleCloudStorageBuilder::from_env().with_url(root).build().map(|s| Arc::new(s) as _),
            "az" | "azure" | "abfs" | "abfss" => {
                MicrosoftAzureBuilder::from_env().with_url(root).build().map(|s| Arc::new(s) as _)
            }
            other => return Err(bad(format!("the scheme {other} is unknown"))),
        };
        let objects = objects.map_err(|error| bad(error.to_string()))?;
        Ok(Self::with_parts(url, objects, prefix, None))
    }

    fn open_folder(url: &str, folder: &str) -> Result<Self> {
        if folder.is_empty() {
            return Err(StoreError::Url { url: url.to_owned(), problem: "it names no folder".into() });
        }
        let open = |folder: &str| -> io::Result<PathBuf> {
            let folder = std::path::absolute(folder)?;
            fs::create_dir_all(&folder)?;
            fs::canonicalize(folder)
        };
        let root = open(folder).map_err(|source| match source.kind() {
            // `/proc` says "not found" of what may not be made in it.
            io::ErrorKind::NotFound => StoreError::Io { op: "open the store", path: folder.to_owned(), source },
            _ => StoreError::io("open the store", folder)(source),
        })?;
        let objects = LocalFileSystem::new_with_prefix(&root)
            .map_err(|error| StoreError::object("open the store", &root.display().to_string(), error))?;
        Ok(Self::with_parts(url, Arc::new(objects), ObjectPath::default(), Some(local::Root::new(root))))
    }

    /// A fresh store in memory.
    pub fn with_memory() -> Self {
        Self::with_objects("memory://", Arc::new(InMemory::new()))
    }

    /// A store over any object store, for a host that has its own or a test that injects faults.
    pub fn with_objects(url: &str, objects: Arc<dyn ObjectStore>) -> Self {
        Self::with_parts(url, objects, ObjectPath::default(), None)
    }

    pub(crate) fn with_parts(
        url: &str,
        objects: Arc<dyn ObjectStore>,
        prefix: ObjectPath,
        local: Option<local::Root>,
    ) -> Self {
        let inner = Inner { url: url.to_owned(), objects, prefix, local, verified: Mutex::default() };
        Self { inner: Arc::new(inner) }
    }

    /// The URL it was opened by.
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// Root folder of a `file://` store.
    pub fn local_root(&self) -> Option<&std::path::Path> {
        self.inner.local.as_ref().map(local::Root::path)
    }

    pub(crate) fn local_files(&self) -> Option<&local::Root> {
        self.inner.local.as_ref()
    }

    /// `path` as a person finds it: below the root folder or the URL.
    pub fn display_path(&self, path: &str) -> String {
        match &self.inner.local {
            Some(root) => root.path().join(path).display().to_string(),
            None if self.inner.url.ends_with("://") => format!("{}{path}", self.inner.url),
            None => format!("{}/{path}", self.inner.url.trim_end_matches('/')),
        }
    }

    fn object_path(&self, path: &str) -> Result<ObjectPath> {
        let bad = |_| StoreError::BadPath { path: path.to_owned() };
        let relative = ObjectPath::parse(path).map_err(bad)?;
        Ok(self.inner.prefix.parts().chain(relative.parts()).collect())
    }

    /// Creates the object `path` unless it exists; on a local disk it is synced before this returns. Of any number of
    /// racing creates exactly one is [`Create::Created`].
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] or [`StoreError::Io`] when the store is full, read-only or out of reach.
    pub async fn create(&self, path: &str, bytes: Bytes) -> Result<Create> {
        if let Some(root) = self.inner.local.clone() {
            let relative = path.to_owned();
            let error = StoreError::io("create", self.display_path(path));
            let created = tokio::task::spawn_blocking(move || local::create(&root, &relative, &bytes)).await?;
            return created.map_err(error);
        }
        let location = self.object_path(path)?;
        let put = || {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            self.inner.objects.put_opts(&location, PutPayload::from_bytes(bytes.clone()), options)
        };
        let (outcome, attempts) = retry(put).await;
        match outcome {
            Ok(_) => Ok(Create::Created),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                // An earlier attempt may have arrived though its answer did not.
                let ours = attempts > 1 && self.read(path).await? == bytes;
                Ok(if ours { Create::Created } else { Create::AlreadyExists })
            }
            Err(error) => Err(StoreError::object("create", &self.display_path(path), error)),
        }
    }

    /// Writes `path`, replacing what is there, without syncing. Only for heartbeats, which hold no truth.
    pub(crate) async fn overwrite(&self, path: &str, bytes: Bytes) -> Result<()> {
        let location = self.object_path(path)?;
        let put = || self.inner.objects.put(&location, PutPayload::from_bytes(bytes.clone())).boxed();
        retry(put).await.0.map(drop).map_err(|error| StoreError::object("write", &self.display_path(path), error))
    }

    /// The bytes of the object `path`.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when there is none.
    pub async fn read(&self, path: &str) -> Result<Bytes> {
        let location = self.object_path(path)?;
        let get = || async { whole(self.inner.objects.get(&location).await?).await }.boxed();
        retry(get).await.0.map_err(|error| StoreError::object("read", &self.display_path(path), error))
    }

    /// [`Self::read`], or none when there is no such object.
    pub async fn read_if_exists(&self, path: &str) -> Result<Option<Bytes>> {
        match self.read(path).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(StoreError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Length of the object `path`, or none when there is no such object.
    pub async fn length(&self, path: &str) -> Result<Option<u64>> {
        let location = self.object_path(path)?;
        match retry(|| self.inner.objects.head(&location).boxed()).await.0 {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(StoreError::object("look up", &self.display_path(path), error)),
        }
    }

    /// Names directly below the folder `prefix`, sorted: objects as they are, folders with a final `/`.
    pub async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let location = self.object_path(prefix)?;
        let list = || self.inner.objects.list_with_delimiter(Some(&location));
        let listed = retry(list).await.0;
        let listed = listed.map_err(|error| StoreError::object("list", &self.display_path(prefix), error))?;
        let objects = listed.objects.iter().filter_map(|meta| meta.location.filename()).map(str::to_owned);
        let folders = listed.common_prefixes.iter().filter_map(|path| path.filename()).map(|name| format!("{name}/"));
        let mut names: Vec<String> = objects.chain(folders).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Paths of all objects below the folder `prefix`, sorted.
    pub async fn list_all(&self, prefix: &str) -> Result<Vec<String>> {
        let location = self.object_path(prefix)?;
        let list = || self.inner.objects.list(Some(&location)).try_collect::<Vec<_>>().boxed();
        let listed = retry(list).await.0;
        let listed = listed.map_err(|error| StoreError::object("list", &self.display_path(prefix), error))?;
        let skip = self.inner.prefix.parts().count();
        let relative =
            |meta: object_store::ObjectMeta| meta.location.parts().skip(skip).collect::<ObjectPath>().to_string();
        let mut paths: Vec<String> = listed.into_iter().map(relative).collect();
        paths.sort_unstable();
        Ok(paths)
    }

    /// Deletes the object `path`; fine when there is none.
    pub async fn delete(&self, path: &str) -> Result<()> {
        let location = self.object_path(path)?;
        match retry(|| self.inner.objects.delete(&location).boxed()).await.0 {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(StoreError::object("delete", &self.display_path(path), error)),
        }
    }

    pub(crate) fn objects(&self) -> &dyn ObjectStore {
        self.inner.objects.as_ref()
    }

    pub(crate) fn shared_objects(&self) -> Arc<dyn ObjectStore> {
        self.inner.objects.clone()
    }

    /// Another handle on the same place: over `objects`, with the steps of local creates told to `steps`.
    pub(crate) fn over(&self, objects: Arc<dyn ObjectStore>, steps: Option<Arc<dyn local::Steps>>) -> Self {
        let Inner { url, prefix, local, .. } = &*self.inner;
        Self::with_parts(url, objects, prefix.clone(), local.as_ref().map(|root| root.with_steps(steps)))
    }

    pub(crate) fn location(&self, path: &str) -> Result<ObjectPath> {
        self.object_path(path)
    }

    pub(crate) fn is_verified(&self, digest: Digest) -> bool {
        self.inner.verified.lock().unwrap_or_else(PoisonError::into_inner).contains(&digest)
    }

    pub(crate) fn set_verified(&self, digest: Digest, verified: bool) {
        let mut set = self.inner.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if verified {
            set.insert(digest);
        } else {
            set.remove(&digest);
        }
    }
}

/// All bytes that a read promised. Fewer, without an error, are a broken connection that nobody noticed.
pub(crate) async fn whole(found: GetResult) -> object_store::Result<Bytes> {
    let promised = found.range.end - found.range.start;
    let bytes = found.bytes().await?;
    if bytes.len() as u64 == promised {
        return Ok(bytes);
    }
    let problem = format!("a read gave {} bytes of {promised}", bytes.len());
    let source = io::Error::new(io::ErrorKind::UnexpectedEof, problem);
    Err(object_store::Error::Generic { store: "read", source: Box::new(source) })
}

/// Tries `attempt` again while it fails in a way that passes by itself; also answers how often it was tried.
async fn retry<'a, T>(
    attempt: impl Fn() -> BoxFuture<'a, object_store::Result<T>>,
) -> (object_store::Result<T>, usize) {
    for (i, wait) in RETRY_WAITS.iter().enumerate() {
        match attempt().await {
            Err(error) if is_transient(&error) => {
                tracing::warn!(%error, "trying again in {wait:?}");
                tokio::time::sleep(*wait).await;
            }
            outcome => return (outcome, i + 1),
        }
    }
    (attempt().await, RETRY_WAITS.len() + 1)
}

fn is_transient(error: &object_store::Error) -> bool {
    let object_store::Error::Generic { source, .. } = error else {
        return false;
    };
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(source.as_ref());
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            use io::ErrorKind as K;
            return matches!(
                error.kind(),
                K::Interrupted
                    | K::TimedOut
                    | K::WouldBlock
                    | K::ConnectionReset
                    | K::ConnectionAborted
                    | K::BrokenPipe
                    | K::UnexpectedEof
            );
        }
        cause = error.source();
    }
    false
}
