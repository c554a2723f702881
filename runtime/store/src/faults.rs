//! A store that fails on demand: for tests of what happens when a put is lost, a disk is full or bytes are cut.

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};

use crate::Store;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The operation times out and has no effect.
    Timeout,
    /// The write arrives, its answer times out.
    LostAnswer,
    /// The store is full.
    Full,
    /// Half of the bytes are written and success is reported.
    Cut,
    /// The store takes no write: it is mounted or granted for reading only.
    ReadOnly,
}

/// Faults to come. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Vec<(String, Fault, usize)>>>);

impl Faults {
    /// The next `times` operations on objects whose path contains `path` end in `fault`.
    pub fn plan(&self, path: &str, fault: Fault, times: usize) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((path.to_owned(), fault, times));
    }

    /// Takes back what was planned and has not come yet.
    pub fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// A fresh store in memory that fails as planned here.
    pub fn memory(&self) -> Store {
        Store::with_objects("memory://", Arc::new(FaultyObjects::new(Arc::new(InMemory::new()), self.clone())))
    }

    /// The fault of this operation; only a timeout can meet a read.
    fn take(&self, location: &Path, writes: bool) -> Option<Fault> {
        let mut planned = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rule = planned.iter_mut().find(|(path, fault, left)| {
            *left > 0 && (writes || *fault == Fault::Timeout) && location.as_ref().contains(path.as_str())
        })?;
        rule.2 -= 1;
        Some(rule.1)
    }
}

/// An object store with planned faults.
#[derive(Debug)]
pub struct FaultyObjects {
    objects: Arc<dyn ObjectStore>,
    faults: Faults,
}

impl FaultyObjects {
    /// Wraps `objects`.
    pub fn new(objects: Arc<dyn ObjectStore>, faults: Faults) -> Self {
        Self { objects, faults }
    }
}

impl fmt::Display for FaultyObjects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({})", self.objects)
    }
}

fn error(fault: Fault, location: &Path) -> Error {
    let source = |kind| Box::new(io::Error::from(kind));
    match fault {
        Fault::ReadOnly => {
            Error::PermissionDenied { path: location.to_string(), source: source(io::ErrorKind::ReadOnlyFilesystem) }
        }
        Fault::Full => Error::Generic { store: "faulty", source: source(io::ErrorKind::StorageFull) },
        _ => Error::Generic { store: "faulty", source: source(io::ErrorKind::TimedOut) },
    }
}

// The trait is declared with `async_trait`; these are the signatures it expands to.
impl ObjectStore for FaultyObjects {
    fn put_opts<'s, 'l, 'f>(
        &'s self,
        location: &'l Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> BoxFuture<'f, Result<PutResult>>
    where
        's: 'f,
        'l: 'f,
    {
        async move {
            match self.faults.take(location, true) {
                None => self.objects.put_opts(location, payload, options).await,
                Some(Fault::LostAnswer) => {
                    self.objects.put_opts(location, payload, options).await?;
                    Err(error(Fault::LostAnswer, location))
                }
                Some(Fault::Cut) => {
                    let bytes = Bytes::from(payload);
                    let half = PutPayload::from_bytes(bytes.slice(..bytes.len() / 2));
                    self.objects.put_opts(location, half, options).await
                }
                Some(fault) => Err(error(fault, location)),
            }
        }
        .boxed()
    }

    fn put_multipart_opts<'s, 'l, 'f>(
        &'s self,
        location: &'l Path,
        options: PutMultipartOptions,
    ) -> BoxFuture<'f, Result<Box<dyn MultipartUpload>>>
    where
        's: 'f,
        'l: 'f,
    {
        async move {
            match self.faults.take(location, true) {
                None => self.objects.put_multipart_opts(location, options).await,
                Some(fault) => Err(error(fault, location)),
            }
        }
        .boxed()
    }

    fn get_opts<'s, 'l, 'f>(&'s self, location: &'l Path, options: GetOptions) -> BoxFuture<'f, Result<GetResult>>
    where
        's: 'f,
        'l: 'f,
    {
        async move {
            match self.faults.take(location, false) {
                None => self.objects.get_opts(location, options).await,
                Some(fault) => Err(error(fault, location)),
            }
        }
        .boxed()
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let faults = self.faults.clone();
        let checked = locations.map(move |location| {
            let location = location?;
            match faults.take(&location, true) {
                None => Ok(location),
                Some(fault) => Err(error(fault, &location)),
            }
        });
        self.objects.delete_stream(checked.boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.objects.list(prefix)
    }

    fn list_with_delimiter<'s, 'l, 'f>(&'s self, prefix: Option<&'l Path>) -> BoxFuture<'f, Result<ListResult>>
    where
        's: 'f,
        'l: 'f,
    {
        self.objects.list_with_delimiter(prefix)
    }

    fn copy_opts<'s, 'a, 'b, 'f>(
        &'s self,
        from: &'a Path,
        to: &'b Path,
        options: CopyOptions,
    ) -> BoxFuture<'f, Result<()>>
    where
        's: 'f,
        'a: 'f,
        'b: 'f,
    {
        self.objects.copy_opts(from, to, options)
    }
}
