//! An object store between a [`crate::Store`] and its bytes that fails as planned.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use dsv3_core::Rng;
use futures::{FutureExt, StreamExt, TryStreamExt, future::BoxFuture, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart, path::Path,
};

use super::{Fault, Faults, Met, OperationKind as Kind, STALL, told};

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

impl Faults {
    /// The faults that a write of `bytes` can meet: an error now, or one that is told after the write has arrived.
    async fn before_write(&self, kind: Kind, path: &str, bytes: u64) -> Result<Option<Fault>> {
        match self.meet(kind, path, bytes) {
            Met::Nothing => Ok(None),
            Met::Dead => Err(told(Fault::CrashBefore, path)),
            Met::Fault(Fault::Stall) => {
                tokio::time::sleep(STALL).await;
                Ok(None)
            }
            Met::Fault(fault @ (Fault::LostAnswer | Fault::AlreadyExists | Fault::CrashAfter | Fault::Cut)) => {
                Ok(Some(fault))
            }
            Met::Fault(fault) => Err(told(fault, path)),
        }
    }

    /// As [`Self::before_write`], for a read: the fault is one of what is read.
    async fn before_read(&self, kind: Kind, path: &str) -> Result<Option<Fault>> {
        match self.meet(kind, path, 0) {
            Met::Nothing => Ok(None),
            Met::Dead => Err(told(Fault::CrashBefore, path)),
            Met::Fault(Fault::Stall) => {
                tokio::time::sleep(STALL).await;
                Ok(None)
            }
            Met::Fault(fault @ (Fault::Short | Fault::Flip | Fault::BrokenList)) => Ok(Some(fault)),
            Met::Fault(fault) => Err(told(fault, path)),
        }
    }
}

/// What the writer is told after its write has arrived.
fn answer<T>(fault: Option<Fault>, path: &str, done: T) -> Result<T> {
    match fault {
        None | Some(Fault::Cut) => Ok(done),
        Some(fault) => Err(told(fault, path)),
    }
}

/// Half of the bytes, or all but one bit of them.
fn damaged(fault: Fault, path: &str, bytes: Bytes) -> Bytes {
    if fault == Fault::Short || bytes.is_empty() {
        return bytes.slice(..bytes.len() / 2);
    }
    let bit = Rng::new(bytes.len() as u64).key(path).below(8 * bytes.len() as u64);
    let mut changed = bytes.to_vec();
    changed[(bit / 8) as usize] ^= 1 << (bit % 8);
    Bytes::from(changed)
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
            let kind = if options.mode == PutMode::Create { Kind::Create } else { Kind::Put };
            let path = location.as_ref();
            let fault = self.faults.before_write(kind, path, payload.content_length() as u64).await?;
            let payload = match fault {
                Some(Fault::Cut) => {
                    let bytes = Bytes::from(payload);
                    PutPayload::from_bytes(bytes.slice(..bytes.len() / 2))
                }
                _ => payload,
            };
            let done = self.objects.put_opts(location, payload, options).await?;
            answer(fault, path, done)
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
            let path = location.as_ref();
            let fault = self.faults.before_write(Kind::Multipart, path, 0).await?;
            let upload = self.objects.put_multipart_opts(location, options).await?;
            let (faults, path) = (self.faults.clone(), path.to_owned());
            let upload: Box<dyn MultipartUpload> = Box::new(FaultyUpload { upload, faults, path });
            answer(fault, location.as_ref(), upload)
        }
        .boxed()
    }

    fn get_opts<'s, 'l, 'f>(&'s self, location: &'l Path, options: GetOptions) -> BoxFuture<'f, Result<GetResult>>
    where
        's: 'f,
        'l: 'f,
    {
        async move {
            let kind = if options.head { Kind::Head } else { Kind::Get };
            let fault = self.faults.before_read(kind, location.as_ref()).await?;
            let found = self.objects.get_opts(location, options).await?;
            let Some(fault) = fault else { return Ok(found) };
            let (meta, range, attributes) = (found.meta.clone(), found.range.clone(), found.attributes.clone());
            let bytes = damaged(fault, location.as_ref(), found.bytes().await?);
            let payload = GetResultPayload::Stream(futures::stream::once(async move { Ok(bytes) }).boxed());
            Ok(GetResult { payload, meta, range, attributes })
        }
        .boxed()
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (faults, objects) = (self.faults.clone(), self.objects.clone());
        let delete = move |location: Result<Path>| {
            let (faults, objects) = (faults.clone(), objects.clone());
            async move {
                let location = location?;
                let fault = faults.before_write(Kind::Delete, location.as_ref(), 0).await?;
                objects.delete(&location).await?;
                answer(fault, location.clone().as_ref(), location)
            }
        };
        locations.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (faults, listed) = (self.faults.clone(), self.objects.list(prefix));
        let path = prefix.map_or_else(String::new, Path::to_string);
        let checked = async move {
            match faults.before_read(Kind::List, &path).await {
                Err(error) => futures::stream::once(async { Err(error) }).boxed(),
                Ok(Some(Fault::BrokenList)) => {
                    let mut items: Vec<Result<ObjectMeta>> = listed.into_stream().collect().await;
                    items.truncate(items.len() / 2);
                    items.push(Err(told(Fault::BrokenList, &path)));
                    futures::stream::iter(items).boxed()
                }
                Ok(_) => listed,
            }
        };
        checked.into_stream().flatten().boxed()
    }

    fn list_with_delimiter<'s, 'l, 'f>(&'s self, prefix: Option<&'l Path>) -> BoxFuture<'f, Result<ListResult>>
    where
        's: 'f,
        'l: 'f,
    {
        async move {
            let path = prefix.map_or_else(String::new, Path::to_string);
            match self.faults.before_read(Kind::List, &path).await? {
                Some(fault) => Err(told(fault, &path)),
                None => self.objects.list_with_delimiter(prefix).await,
            }
        }
        .boxed()
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
        async move {
            let fault = self.faults.before_write(Kind::Put, to.as_ref(), 0).await?;
            self.objects.copy_opts(from, to, options).await?;
            answer(fault, to.as_ref(), ())
        }
        .boxed()
    }
}

/// An upload in parts whose parts and end may fail.
#[derive(Debug)]
struct FaultyUpload {
    upload: Box<dyn MultipartUpload>,
    faults: Faults,
    path: String,
}

impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (faults, path) = (self.faults.clone(), self.path.clone());
        let bytes = data.content_length() as u64;
        let part = self.upload.put_part(data);
        async move {
            let fault = faults.before_write(Kind::Part, &path, bytes).await?;
            part.await?;
            answer(fault, &path, ())
        }
        .boxed()
    }

    fn complete<'s, 'f>(&'s mut self) -> BoxFuture<'f, Result<PutResult>>
    where
        's: 'f,
    {
        async move {
            let fault = self.faults.before_write(Kind::Complete, &self.path, 0).await?;
            let done = self.upload.complete().await?;
            answer(fault, &self.path, done)
        }
        .boxed()
    }

    fn abort<'s, 'f>(&'s mut self) -> BoxFuture<'f, Result<()>>
    where
        's: 'f,
    {
        async move {
            self.faults.before_write(Kind::Delete, &self.path, 0).await?;
            self.upload.abort().await
        }
        .boxed()
    }
}
