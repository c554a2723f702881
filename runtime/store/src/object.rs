//! Objects by path: open by URL, conditional create, read, list, with retries of what passes by itself.

use std::{
    collections::BTreeSet,
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use dsv3_core::Digest;
use futures::{FutureExt, TryStreamExt, future::BoxFuture};
use object_store::{
    Error, GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    multipart::MultipartStore, path::Path as ObjectPath,
};
use tokio::sync::OnceCell;

use crate::{
    StoreOptions,
    connect::{Connected, connect},
    error::{Result, StoreError},
    gc::StoreTime,
    local,
    retry::{Retry, is_transient, short_body},
};

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
    connected: Connected,
    options: StoreOptions,
    retry: Retry,
    /// What the probe found, once it was asked.
    honoured: OnceCell<bool>,
    /// Whether a create looks and then writes: see [`crate::CreateMode::SingleWriter`].
    single_writer: AtomicBool,
    digests: Mutex<SeenDigests>,
    /// The store's clock, once it was asked.
    time: OnceCell<StoreTime>,
}

/// Blobs whose bytes this process has compared with their digest.
#[derive(Default)]
struct SeenDigests {
    right: BTreeSet<Digest>,
    wrong: BTreeSet<Digest>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.inner.url)
    }
}

impl Store {
    /// Opens `file://FOLDER` (`file://./FOLDER` is relative to the current directory; a plain path means the same),
    /// `memory://`, `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or `az://CONTAINER/PREFIX`. Credentials, and whatever else
    /// the `object_store` crate reads from the environment, come from there. A missing local folder is created.
    ///
    /// # Errors
    /// [`StoreError::Url`] for an unknown scheme, [`StoreError::Unavailable`] for a folder that cannot be made.
    pub fn open(url: &str) -> Result<Self> {
        Self::open_with(url, &StoreOptions::default(), &[])
    }

    /// [`Self::open`] with options. `vars` are names and values that count as if they stood in the environment, for a
    /// host that keeps credentials elsewhere.
    ///
    /// # Errors
    /// As [`Self::open`]; [`StoreError::Url`] for an option that the scheme does not have.
    pub fn open_with(url: &str, options: &StoreOptions, vars: &[(String, String)]) -> Result<Self> {
        let connected = connect(url, options, vars)?;
        let near = options.is_default() && (connected.local.is_some() || url.starts_with("memory://"));
        Ok(Self::with_connected(url, connected, if near { StoreOptions::near() } else { options.clone() }))
    }

    /// A fresh store in memory.
    pub fn with_memory() -> Self {
        Self::with_connected("memory://", Connected::memory(), StoreOptions::near())
    }

    /// A store over any object store, for a host that has its own or a test that injects faults. A `url` that begins with
    /// `memory://` promises conditional create.
    pub fn with_objects(url: &str, objects: Arc<dyn ObjectStore>) -> Self {
        Self::with_objects_and(url, objects, ObjectPath::default(), StoreOptions::near())
    }

    pub(crate) fn with_objects_and(
        url: &str,
        objects: Arc<dyn ObjectStore>,
        prefix: ObjectPath,
        options: StoreOptions,
    ) -> Self {
        Self::with_connected(url, Connected::objects(objects, prefix), options)
    }

    fn with_connected(url: &str, connected: Connected, options: StoreOptions) -> Self {
        let retry = Retry::new(&options);
        let (url, honoured, single_writer) = (url.to_owned(), OnceCell::new(), AtomicBool::new(false));
        let (digests, time) = (Mutex::default(), OnceCell::new());
        Self { inner: Arc::new(Inner { url, connected, options, retry, honoured, single_writer, digests, time }) }
    }

    /// The URL it was opened by.
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// Root folder of a `file://` store.
    pub fn local_root(&self) -> Option<&std::path::Path> {
        self.local_files().map(local::Root::path)
    }

    pub(crate) fn local_files(&self) -> Option<&local::Root> {
        self.inner.connected.local.as_ref()
    }

    /// Whether files of a local store are read as they lie: no test stands between.
    pub(crate) fn reads_directly(&self) -> bool {
        self.local_files().is_some_and(local::Root::is_plain)
    }

    /// `path` as a person finds it: below the root folder or the URL.
    pub fn display_path(&self, path: &str) -> String {
        match self.local_root() {
            Some(root) => root.join(path).display().to_string(),
            None if self.inner.url.ends_with("://") => format!("{}{path}", self.inner.url),
            None => format!("{}/{path}", self.inner.url.trim_end_matches('/')),
        }
    }

    pub(crate) fn location(&self, path: &str) -> Result<ObjectPath> {
        let bad = |_| StoreError::BadPath { path: path.to_owned() };
        let relative = ObjectPath::parse(path).map_err(bad)?;
        Ok(self.inner.connected.prefix.parts().chain(relative.parts()).collect())
    }

    /// Creates the object `path` unless it exists; on a local disk it is synced before this returns. Of any number of
    /// racing creates exactly one is [`Create::Created`].
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] or [`StoreError::Io`] when the store is full, read-only or out of reach.
    pub async fn create(&self, path: &str, bytes: Bytes) -> Result<Create> {
        let location = self.location(path)?;
        if path.is_empty() {
            return Err(StoreError::BadPath { path: String::new() });
        }
        if let Some(root) = self.local_files() {
            let (root, relative) = (root.clone(), path.to_owned());
            let error = StoreError::io("create", self.display_path(path));
            let created = tokio::task::spawn_blocking(move || local::create(&root, &relative, &bytes)).await?;
            return created.map_err(error);
        }
        if self.inner.single_writer.load(Ordering::Relaxed) {
            if self.length(path).await?.is_some() {
                return Ok(Create::AlreadyExists);
            }
            return self.put("create", path, bytes).await.map(|()| Create::Created);
        }
        let mut tries = self.inner.retry.tries();
        // Whether an attempt may have arrived though its answer did not.
        let mut unsure = false;
        loop {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let payload = PutPayload::from_bytes(bytes.clone());
            let Err(error) = self.objects().put_opts(&location, payload, options).await else {
                return Ok(Create::Created);
            };
            let taken = matches!(error, Error::AlreadyExists { .. } | Error::Precondition { .. });
            if taken && let Some(outcome) = self.settle(path, &bytes, unsure).await? {
                return Ok(outcome);
            }
            unsure |= is_transient(&error);
            if !(taken || is_transient(&error)) || !tries.wait(&error).await {
                return Err(StoreError::object("create", &self.display_path(path), error));
            }
        }
    }

    /// What it means that the store refused to create `path`. After an attempt without an answer the bytes tell whose the
    /// object is: records hold a nonce. None when there is no object: S3 also answers 409 while another writer is under
    /// way, who may yet fail.
    async fn settle(&self, path: &str, bytes: &Bytes, unsure: bool) -> Result<Option<Create>> {
        if !unsure {
            return Ok(self.length(path).await?.map(|_| Create::AlreadyExists));
        }
        let there = self.read_if_exists(path).await?;
        Ok(there.map(|there| if there == *bytes { Create::Created } else { Create::AlreadyExists }))
    }

    /// Writes `path`, replacing what is there, without syncing. Only for heartbeats, which hold no truth.
    pub(crate) async fn overwrite(&self, path: &str, bytes: Bytes) -> Result<()> {
        self.put("write", path, bytes).await
    }

    async fn put(&self, op: &'static str, path: &str, bytes: Bytes) -> Result<()> {
        let location = self.location(path)?;
        let put = || self.objects().put(&location, PutPayload::from_bytes(bytes.clone())).boxed();
        let done = self.retry(put).await;
        done.map(drop).map_err(|error| StoreError::object(op, &self.display_path(path), error))
    }

    /// The bytes of the object `path`.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when there is none.
    pub async fn read(&self, path: &str) -> Result<Bytes> {
        let location = self.location(path)?;
        let get = || async { whole(self.objects().get(&location).await?).await }.boxed();
        self.retry(get).await.map_err(|error| StoreError::object("read", &self.display_path(path), error))
    }

    /// The bytes of the object `path` in `range`, cut at its end: beyond it there are none.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when there is no such object.
    pub async fn read_range(&self, path: &str, range: Range<u64>) -> Result<Bytes> {
        let length = self.length_to_read(path).await?;
        let range = range.start..range.end.min(length);
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let location = self.location(path)?;
        let read = self.get_range(&location, range).await;
        read.map_err(|error| StoreError::object("read", &self.display_path(path), error))
    }

    /// A range that lies inside an object; one that arrives short is asked for again.
    pub(crate) async fn get_range(&self, location: &ObjectPath, range: Range<u64>) -> object_store::Result<Bytes> {
        let get = || {
            let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
            async move { whole(self.objects().get_opts(location, options).await?).await }.boxed()
        };
        self.retry(get).await
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
        let location = self.location(path)?;
        match self.retry(|| self.objects().head(&location).boxed()).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(StoreError::object("look up", &self.display_path(path), error)),
        }
    }

    /// Names directly below the folder `prefix`, sorted: objects as they are, folders with a final `/`.
    pub async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        let location = self.location(prefix)?;
        let list = || self.objects().list_with_delimiter(Some(&location));
        let listed = self.retry(list).await;
        let listed = listed.map_err(|error| StoreError::object("list", &self.display_path(prefix), error))?;
        let objects = listed.objects.iter().filter_map(|meta| meta.location.filename()).map(str::to_owned);
        let folders = listed.common_prefixes.iter().filter_map(|path| path.filename()).map(|name| format!("{name}/"));
        let mut names: Vec<String> = objects.chain(folders).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Paths of all objects below the folder `prefix`, sorted.
    pub async fn list_all(&self, prefix: &str) -> Result<Vec<String>> {
        let location = self.location(prefix)?;
        let list = || self.objects().list(Some(&location)).try_collect::<Vec<_>>().boxed();
        let listed = self.retry(list).await;
        let listed = listed.map_err(|error| StoreError::object("list", &self.display_path(prefix), error))?;
        let skip = self.inner.connected.prefix.parts().count();
        let relative =
            |meta: object_store::ObjectMeta| meta.location.parts().skip(skip).collect::<ObjectPath>().to_string();
        let mut paths: Vec<String> = listed.into_iter().map(relative).collect();
        paths.sort_unstable();
        Ok(paths)
    }

    /// A store beside this one: reads see both, writes go to memory and end with it.
    #[must_use]
    pub fn beside(&self) -> Self {
        let objects = Arc::new(crate::overlay::Overlay::new(self.shared_objects()));
        Self::with_objects_and(&self.inner.url, objects, self.inner.connected.prefix.clone(), StoreOptions::near())
    }

    /// Deletes the object `path`; fine when there is none.
    pub async fn delete(&self, path: &str) -> Result<()> {
        let location = self.location(path)?;
        match self.retry(|| self.objects().delete(&location).boxed()).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(StoreError::object("delete", &self.display_path(path), error)),
        }
    }

    pub(crate) fn objects(&self) -> &dyn ObjectStore {
        self.inner.connected.objects.as_ref()
    }

    pub(crate) fn shared_objects(&self) -> Arc<dyn ObjectStore> {
        self.inner.connected.objects.clone()
    }

    /// Another handle on the same place: over `objects`, with the steps of local creates told to `steps`.
    pub(crate) fn over(&self, objects: Arc<dyn ObjectStore>, steps: Option<Arc<dyn local::Steps>>) -> Self {
        let Inner { url, connected, options, .. } = &*self.inner;
        let local = connected.local.as_ref().map(|root| root.with_steps(steps));
        let connected = Connected { local, ..Connected::objects(objects, connected.prefix.clone()) };
        Self::with_connected(url, connected, options.clone())
    }

    /// The store's own multipart uploads, by which single parts can be tried again.
    pub(crate) fn parts(&self) -> Option<&dyn MultipartStore> {
        self.inner.connected.parts.as_deref()
    }

    pub(crate) fn options(&self) -> &StoreOptions {
        &self.inner.options
    }

    pub(crate) fn retries(&self) -> &Retry {
        &self.inner.retry
    }

    pub(crate) fn honoured(&self) -> &OnceCell<bool> {
        &self.inner.honoured
    }

    pub(crate) fn set_single_writer(&self) {
        self.inner.single_writer.store(true, Ordering::Relaxed);
    }

    pub(crate) async fn retry<'a, T>(
        &self,
        attempt: impl Fn() -> BoxFuture<'a, object_store::Result<T>>,
    ) -> object_store::Result<T> {
        self.inner.retry.run(attempt).await
    }

    /// The store's time, asked for once.
    pub(crate) async fn time(&self) -> Result<StoreTime> {
        self.inner.time.get_or_try_init(|| self.ask_time()).await.copied()
    }

    pub(crate) fn is_verified(&self, digest: Digest) -> bool {
        self.inner.digests.lock().unwrap_or_else(PoisonError::into_inner).right.contains(&digest)
    }

    /// Whether this process has seen the blob with other bytes and has not replaced it since.
    pub fn is_damaged(&self, digest: Digest) -> bool {
        self.inner.digests.lock().unwrap_or_else(PoisonError::into_inner).wrong.contains(&digest)
    }

    /// Notes what a comparison of the bytes of a blob gave.
    pub(crate) fn set_verified(&self, digest: Digest, verified: bool) {
        let mut seen = self.inner.digests.lock().unwrap_or_else(PoisonError::into_inner);
        if verified {
            seen.wrong.remove(&digest);
            seen.right.insert(digest);
        } else {
            seen.right.remove(&digest);
            seen.wrong.insert(digest);
        }
    }

    /// Forgets what was seen of a blob.
    pub(crate) fn forget_blob(&self, digest: Digest) {
        let mut seen = self.inner.digests.lock().unwrap_or_else(PoisonError::into_inner);
        seen.wrong.remove(&digest);
        seen.right.remove(&digest);
    }
}

/// All bytes that a read promised. Fewer, without an error, are a broken connection that nobody noticed.
async fn whole(found: GetResult) -> object_store::Result<Bytes> {
    let promised = found.range.end - found.range.start;
    let bytes = found.bytes().await?;
    if bytes.len() as u64 == promised { Ok(bytes) } else { Err(short_body("object", bytes.len() as u64, promised)) }
}
