//! The store's own clock. Ages of objects are differences of times that the same store gave: the last-modified time of a
//! small object written now, and that of the object in question. No clock of any host takes part.

use std::time::Instant;

use bytes::Bytes;
use futures::{FutureExt, TryStreamExt};
use object_store::{ObjectStoreExt, path::Path as ObjectPath};

use crate::{
    Store,
    error::{Result, StoreError},
};

/// The object that is written to learn the time; it stays.
const MARKER: &str = "gc/clock";

/// An object with its length and the store's time of its last write, in milliseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    pub(crate) path: String,
    pub(crate) bytes: u64,
    pub(crate) modified_ms: i64,
}

/// The store's time at one moment; later moments follow by this process's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoreTime {
    at: Instant,
    millis: i64,
}

impl StoreTime {
    pub(crate) fn now_ms(self) -> i64 {
        self.millis + self.at.elapsed().as_millis() as i64
    }
}

impl Store {
    /// Asks the store for its time by writing a marker and reading when that was.
    pub(crate) async fn ask_time(&self) -> Result<StoreTime> {
        self.overwrite(MARKER, Bytes::from_static(b"{}\n")).await?;
        let at = Instant::now();
        let modified = self.modified_ms(MARKER).await?;
        let missing = || StoreError::Missing { op: "read the time of", path: self.display_path(MARKER) };
        Ok(StoreTime { at, millis: modified.ok_or_else(missing)? })
    }

    /// When the object `path` was last written, by the store's clock; none when there is no such object.
    pub(crate) async fn modified_ms(&self, path: &str) -> Result<Option<i64>> {
        let location = self.location(path)?;
        match self.retry(|| self.objects().head(&location).boxed()).await {
            Ok(meta) => Ok(Some(meta.last_modified.timestamp_millis())),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(StoreError::object("look up", &self.display_path(path), error)),
        }
    }

    /// All objects below the folder `prefix`, by path.
    pub(crate) async fn list_objects(&self, prefix: &str) -> Result<Vec<Object>> {
        let location = self.location(prefix)?;
        let list = || self.objects().list(Some(&location)).try_collect::<Vec<_>>().boxed();
        let listed = self.retry(list).await;
        let listed = listed.map_err(|error| StoreError::object("list", &self.display_path(prefix), error))?;
        let skip = location.parts().count() - prefix.split('/').filter(|part| !part.is_empty()).count();
        let object = |meta: object_store::ObjectMeta| Object {
            path: meta.location.parts().skip(skip).collect::<ObjectPath>().to_string(),
            bytes: meta.size,
            modified_ms: meta.last_modified.timestamp_millis(),
        };
        let mut objects: Vec<Object> = listed.into_iter().map(object).collect();
        objects.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Ok(objects)
    }
}
