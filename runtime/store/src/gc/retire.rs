//! Removing superseded checkpoints of a running stage, after the next one has been committed and read back.
//!
//! The records go at once. Their blobs go with them if nothing else in the store names them and no other runner can have
//! found them: those that another living holder may have met are left to `gc`. Runs in turn with collections; when one is
//! under way there is nothing to do now, and the next commit finds the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use dsv3_core::{Clock, Digest};

use super::{RENEWED_MS, checkpoint_item, marks::Marks, seq_of, sweep, turn::Turn};
use crate::{
    Retention, Store,
    blobs::blob_path,
    error::Result,
    gc::{Item, Removed},
    lease::Place,
};

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retired {
    /// Numbers of the checkpoints, rising.
    pub seqs: Vec<u64>,
    /// Bytes of their records and of those files that went with them.
    pub bytes: u64,
}

impl Store {
    /// Removes the checkpoints of the unfinished stage `key` that `policy` does not keep. Call between two saves, under the
    /// lease `epoch`.
    ///
    /// # Errors
    /// Of the store, and [`crate::StoreError::Fenced`]; the stage can go on in any case.
    pub async fn retire_checkpoints(
        &self,
        key: &str,
        epoch: u64,
        policy: &Retention,
        clock: Arc<dyn Clock>,
    ) -> Result<Retired> {
        let superseded = self.superseded(key, &[Some(policy.clone())], true).await?;
        if superseded.is_empty() {
            return Ok(Retired::default());
        }
        let Some(turn) = Turn::begin_if_free(self, clock).await? else { return Ok(Retired::default()) };
        let outcome = self.retire(&turn, key, epoch, superseded).await;
        let ended = turn.end().await;
        let retired = outcome?;
        ended?;
        Ok(retired)
    }

    async fn retire(&self, turn: &Turn, key: &str, epoch: u64, superseded: Vec<crate::Checkpoint>) -> Result<Retired> {
        self.check_lease(key, epoch).await?;
        let spared_from = self.others_from(key).await?;
        let objects = self.list_objects(&format!("stages/{key}")).await?;
        let seqs: BTreeSet<u64> = superseded.iter().map(|checkpoint| checkpoint.seq).collect();
        let mut items: Vec<Item> = seqs.iter().map(|seq| checkpoint_item(key, *seq, &objects)).collect();
        sweep::sweep(turn, &items).await?;
        let mut files: BTreeMap<Digest, u64> =
            superseded.iter().flat_map(|checkpoint| &checkpoint.files).map(|file| (file.digest, file.bytes)).collect();
        let named = self.named_elsewhere(key, &seqs).await?;
        files.retain(|digest, _| !named.contains(digest));
        let mut blobs = Vec::new();
        for (digest, bytes) in files {
            let path = blob_path(digest);
            if self.modified_ms(&path).await?.is_some_and(|modified| modified < spared_from) {
                blobs.push(Item { what: Removed::Blob, path: path.clone(), bytes, objects: vec![path] });
            }
        }
        sweep::sweep(turn, &blobs).await?;
        items.append(&mut blobs);
        let bytes = items.iter().map(|item| item.bytes).sum();
        Ok(Retired { seqs: seqs.into_iter().collect(), bytes })
    }

    /// What another holder may have written or found begins here, by the store's clock. An open lease counts as alive.
    async fn others_from(&self, own: &str) -> Result<i64> {
        let mut from = i64::MAX;
        for name in self.list("stages").await? {
            let Some(key) = name.strip_suffix('/').filter(|key| *key != own) else { continue };
            let place = Place::stage(key);
            let Some(last) = self.last_lease(&place).await?.filter(|last| last.is_open() && !last.is_gone()) else {
                continue;
            };
            let taken = self.modified_ms(&place.path(last.epoch, "json")).await?.unwrap_or(0);
            from = from.min(taken.saturating_sub(RENEWED_MS));
        }
        Ok(from)
    }

    /// Everything that a record of the store names, whoever keeps it, but for the checkpoints `gone` of the stage `key`.
    async fn named_elsewhere(&self, key: &str, gone: &BTreeSet<u64>) -> Result<BTreeSet<Digest>> {
        let own = format!("stages/{key}/checkpoints/");
        let mut paths = self.list_all("stages").await?;
        paths.retain(|path| {
            let is_gone = path.starts_with(&own) && seq_of(path).is_some_and(|seq| gone.contains(&seq));
            path.ends_with(".json") && !path.contains("/leases/") && !is_gone
        });
        let plans = self.list("runs").await?.into_iter().map(|run| format!("runs/{run}plan.json"));
        paths.extend(plans);
        let mut marks = Marks::default();
        marks.records(self, paths).await?;
        marks.follow(self).await?;
        Ok(marks.named)
    }
}
