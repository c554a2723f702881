//! Writing an old blob again, so that a collection which knows nothing of its new owner leaves it alone.

use std::{
    fs::File,
    time::{Duration, UNIX_EPOCH},
};

use dsv3_core::{Cancel, Digest, SystemClock};

use super::RENEW_AFTER_MS;
use crate::{
    Store,
    blobs::blob_path,
    error::{Result, StoreError},
};

impl Store {
    /// Called by a writer that has found its blob already there and intact. Answers whether it may be kept: one that a
    /// collection could take is given the present as its time, and is looked for again once no collection is under way.
    pub(crate) async fn renew_blob(&self, digest: Digest) -> Result<bool> {
        let path = blob_path(digest);
        let Some(modified) = self.modified_ms(&path).await? else { return Ok(false) };
        let now_ms = match self.time().await {
            Ok(time) if time.now_ms() - modified < RENEW_AFTER_MS => return Ok(true),
            Ok(time) => time.now_ms(),
            // Nothing can be removed from a store that takes no writes.
            Err(StoreError::Denied { .. }) => return Ok(true),
            Err(error) => return Err(error),
        };
        match self.local_blob(digest) {
            Some(file) => {
                let now = UNIX_EPOCH + Duration::from_millis(u64::try_from(now_ms).unwrap_or(0));
                let touch = move || File::open(file)?.set_modified(now);
                match tokio::task::spawn_blocking(touch).await? {
                    Ok(()) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
                    // Of another owner: then it is copied.
                    Err(_) => self.write_again(&path).await?,
                }
            }
            None => self.write_again(&path).await?,
        }
        self.wait_for_collection(&SystemClock::default(), &Cancel::new(), |_| {}).await?;
        Ok(self.length(&path).await?.is_some())
    }

    async fn write_again(&self, path: &str) -> Result<()> {
        match self.read(path).await {
            Ok(bytes) => self.overwrite(path, bytes).await,
            Err(StoreError::Missing { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
