//! A store beside another: reads see both, writes go to memory and end with the process. So a stage can be done again
//! from a checkpoint without leaving a trace, also in a store that cannot be written.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::{FutureExt, StreamExt, TryFutureExt, TryStreamExt, future::BoxFuture, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};

/// Objects over other objects.
#[derive(Debug)]
pub(crate) struct Overlay {
    base: Arc<dyn ObjectStore>,
    top: Arc<InMemory>,
    /// Objects of the base that were deleted here.
    hidden: Arc<Mutex<BTreeSet<Path>>>,
}

impl Overlay {
    /// An empty layer over `base`.
    pub(crate) fn new(base: Arc<dyn ObjectStore>) -> Self {
        Self { base, top: Arc::new(InMemory::new()), hidden: Arc::default() }
    }

    fn hidden(&self) -> MutexGuard<'_, BTreeSet<Path>> {
        self.hidden.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an operation on `location` concerns the base.
    async fn is_below(&self, location: &Path) -> Result<bool> {
        match self.top.head(location).await {
            Ok(_) => Ok(false),
            Err(Error::NotFound { .. }) => Ok(!self.hidden().contains(location)),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Display for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Overlay({})", self.base)
    }
}

// The trait is declared with `async_trait`; these are the signatures it expands to.
impl ObjectStore for Overlay {
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
            if matches!(options.mode, PutMode::Create) && self.is_below(location).await? {
                match self.base.head(location).await {
                    Ok(_) => {
                        let source = "it lies in the store below".into();
                        return Err(Error::AlreadyExists { path: location.to_string(), source });
                    }
                    Err(Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            self.top.put_opts(location, payload, options).await
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
        self.top.put_multipart_opts(location, options)
    }

    fn get_opts<'s, 'l, 'f>(&'s self, location: &'l Path, options: GetOptions) -> BoxFuture<'f, Result<GetResult>>
    where
        's: 'f,
        'l: 'f,
    {
        async move {
            match self.is_below(location).await? {
                true => self.base.get_opts(location, options).await,
                false => self.top.get_opts(location, options).await,
            }
        }
        .boxed()
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (top, hidden) = (self.top.clone(), self.hidden.clone());
        let deleted = locations.then(move |location| {
            let (top, hidden) = (top.clone(), hidden.clone());
            async move {
                let location = location?;
                match top.delete(&location).await {
                    Ok(()) | Err(Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
                hidden.lock().unwrap_or_else(PoisonError::into_inner).insert(location.clone());
                Ok(location)
            }
        });
        deleted.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (top, base, hidden) = (self.top.list(prefix), self.base.list(prefix), self.hidden.clone());
        let both = async move {
            let mut all: Vec<ObjectMeta> = top.try_collect().await?;
            let own: BTreeSet<Path> = all.iter().map(|meta| meta.location.clone()).collect();
            let below: Vec<ObjectMeta> = base.try_collect().await?;
            let hidden = hidden.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(
                below.into_iter().filter(|meta| !own.contains(&meta.location) && !hidden.contains(&meta.location)),
            );
            Ok(futures::stream::iter(all.into_iter().map(Ok)))
        };
        both.try_flatten_stream().boxed()
    }

    fn list_with_delimiter<'s, 'l, 'f>(&'s self, prefix: Option<&'l Path>) -> BoxFuture<'f, Result<ListResult>>
    where
        's: 'f,
        'l: 'f,
    {
        async move {
            let mut both = self.top.list_with_delimiter(prefix).await?;
            let below = self.base.list_with_delimiter(prefix).await?;
            let own: BTreeSet<Path> = both.objects.iter().map(|meta| meta.location.clone()).collect();
            let hidden = self.hidden();
            let seen = |meta: &ObjectMeta| !own.contains(&meta.location) && !hidden.contains(&meta.location);
            both.objects.extend(below.objects.into_iter().filter(seen));
            both.common_prefixes.extend(below.common_prefixes);
            both.common_prefixes.sort();
            both.common_prefixes.dedup();
            Ok(both)
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
            // What lies below is brought up first.
            if self.is_below(from).await? {
                let bytes = self.base.get(from).await?.bytes().await?;
                self.top.put(from, PutPayload::from_bytes(bytes)).await?;
            }
            self.top.copy_opts(from, to, options).await
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use crate::{Create, Store, tests::TempFolder};

    #[tokio::test]
    async fn writes_stay_beside_the_store_and_reads_see_both() {
        let folder = TempFolder::new();
        for base in [Store::with_memory(), folder.store()] {
            let old = base.put_blob(Bytes::from_static(b"old")).await.unwrap();
            base.create("stages/k/a.json", Bytes::from_static(b"a")).await.unwrap();
            let before = base.list_all("").await.unwrap();
            let beside = base.beside();
            assert_eq!(beside.get_blob(old).await.unwrap(), "old");
            assert_eq!(
                beside.create("stages/k/a.json", Bytes::from_static(b"x")).await.unwrap(),
                Create::AlreadyExists
            );
            assert_eq!(beside.create("stages/k/b.json", Bytes::from_static(b"b")).await.unwrap(), Create::Created);
            assert_eq!(beside.list("stages/k").await.unwrap(), ["a.json", "b.json"]);
            let new = beside.put_blob(Bytes::from_static(b"new")).await.unwrap();
            assert_eq!(beside.put_blob(Bytes::from_static(b"old")).await.unwrap(), old);
            beside.verify_blob(new, 3).await.unwrap();
            beside.verify_blob(old, 3).await.unwrap();
            beside.delete("stages/k/a.json").await.unwrap();
            assert_eq!(beside.read_if_exists("stages/k/a.json").await.unwrap(), None);
            assert_eq!(beside.list("stages/k").await.unwrap(), ["b.json"]);
            assert_eq!(beside.create("stages/k/a.json", Bytes::from_static(b"x")).await.unwrap(), Create::Created);
            assert_eq!(beside.read("stages/k/a.json").await.unwrap(), "x");
            assert_eq!(base.list_all("").await.unwrap(), before);
            assert_eq!(base.read("stages/k/a.json").await.unwrap(), "a");
        }
    }
}
