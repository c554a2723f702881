//! What the kept records name. Every digest that stands anywhere in a kept JSON record is taken as named, whatever field it
//! stands in, and so is everything that a named manifest names: a new field of a record can only keep more, never less. A
//! digest that stands beside a path and a length is that of a file, which names nothing.

use std::collections::BTreeSet;

use dsv3_core::Digest;
use futures::{StreamExt, TryStreamExt};
use serde_json::Value;

use crate::{
    Store,
    blobs::blob_path,
    error::{Result, StoreError},
};

/// Records read at the same time.
const PARALLEL_READS: usize = 16;

/// Digests found so far.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    pub(crate) named: BTreeSet<Digest>,
    /// Named ones that may be manifests and were not opened yet.
    open: BTreeSet<Digest>,
    /// Those that were.
    followed: BTreeSet<Digest>,
}

impl Marks {
    /// Marks what the records at `paths` name. One that vanishes meanwhile names nothing; one that is no JSON is damaged, and
    /// nothing that reads it believes it.
    pub(crate) async fn records(&mut self, store: &Store, paths: Vec<String>) -> Result<()> {
        let reads = futures::stream::iter(paths).map(|path| async move { store.read_if_exists(&path).await });
        let read: Vec<_> = reads.buffer_unordered(PARALLEL_READS).try_collect().await?;
        for bytes in read.into_iter().flatten() {
            if let Ok(value) = serde_json::from_slice(&bytes) {
                self.value(&value);
            }
        }
        Ok(())
    }

    /// Marks all digests in a JSON value, keys of maps included.
    fn value(&mut self, value: &Value) {
        match value {
            Value::String(text) => self.text(text),
            Value::Array(items) => items.iter().for_each(|item| self.value(item)),
            Value::Object(map) => {
                let is_file = map.contains_key("path") && map.contains_key("bytes");
                for (key, value) in map {
                    self.text(key);
                    match value {
                        Value::String(text) if is_file && key == "digest" => self.named.extend(text.parse::<Digest>()),
                        value => self.value(value),
                    }
                }
            }
            _ => {}
        }
    }

    fn text(&mut self, text: &str) {
        if let Ok(digest) = text.parse::<Digest>() {
            self.named.insert(digest);
            if !self.followed.contains(&digest) {
                self.open.insert(digest);
            }
        }
    }

    /// Follows named blobs that may be manifests to what they name, to the end.
    pub(crate) async fn follow(&mut self, store: &Store) -> Result<()> {
        loop {
            let open: Vec<Digest> = std::mem::take(&mut self.open).into_iter().collect();
            if open.is_empty() {
                return Ok(());
            }
            self.followed.extend(&open);
            let reads = futures::stream::iter(open).map(|digest| async move { manifest_at(store, digest).await });
            let read: Vec<Option<Value>> = reads.buffer_unordered(PARALLEL_READS).try_collect().await?;
            read.iter().flatten().for_each(|value| self.value(value));
        }
    }
}

/// The blob as JSON when it looks like a manifest. A key or another digest that is no blob names nothing.
async fn manifest_at(store: &Store, digest: Digest) -> Result<Option<Value>> {
    let bytes = match store.read_if_exists(&blob_path(digest)).await {
        Ok(Some(bytes)) if bytes.first() == Some(&b'{') => bytes,
        Ok(_) | Err(StoreError::Missing { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(serde_json::from_slice::<Value>(&bytes).ok().filter(|value| value.get("files").is_some()))
}
