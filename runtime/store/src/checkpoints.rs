//! Checkpoints: `stages/<key>/checkpoints/<seq>.json`, numbered from 1, each a conditional create.
//!
//! A record is either a checkpoint (step, state, files with digests) or a fence, written by whoever takes over an
//! expired lease. Writers count on from the highest record there is; one whose number is taken compares the nonce, and
//! unless the record is its own it stops: it never tries the next number. So a holder that was paused and replaced cannot
//! commit. Readers take the newest checkpoint whose record and files all verify.

use dsv3_core::FileEntry;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Create, Store,
    error::{Result, StoreError},
    record,
};

/// Digits of a sequence number in a path, so that names sort as numbers.
const SEQ_DIGITS: usize = 8;

/// A committed checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Its number among the records of the stage.
    pub seq: u64,
    /// The stage's own count, such as optimiser steps.
    pub step: u64,
    /// Small state as JSON: cursors, counters, lineage.
    pub state: Value,
    /// Blobs, in the order they were saved.
    pub files: Vec<FileEntry>,
}

impl Checkpoint {
    /// The file saved under `name`.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.path == name)
    }
}

/// What a look at the checkpoints of a stage found.
#[derive(Debug)]
pub struct FoundCheckpoint {
    /// The newest valid one.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that cannot be used, and why.
    pub damaged: Vec<StoreError>,
    /// Highest number of any record, fences and damaged ones included; 0 when there is none.
    pub last_seq: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RecordKind {
    Checkpoint,
    Fence,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    kind: RecordKind,
    key: String,
    seq: u64,
    /// Epoch of the lease under which it was written.
    epoch: u64,
    nonce: String,
    step: u64,
    state: Value,
    files: Vec<FileEntry>,
}

fn folder(key: &str) -> String {
    format!("stages/{key}/checkpoints")
}

fn record_path(key: &str, seq: u64) -> String {
    format!("{}/{seq:0width$}.json", folder(key), width = SEQ_DIGITS)
}

impl Store {
    /// Numbers of all records of the stage `key`, rising.
    pub(crate) async fn checkpoint_seqs(&self, key: &str) -> Result<Vec<u64>> {
        let names = self.list(&folder(key)).await?;
        let mut seqs: Vec<u64> = names.iter().filter_map(|name| name.strip_suffix(".json")?.parse().ok()).collect();
        seqs.sort_unstable();
        Ok(seqs)
    }

    /// Finds the newest checkpoint of the stage `key` whose record and files verify.
    ///
    /// # Errors
    /// Only when the store cannot be read at all; damage is reported in the answer.
    pub async fn find_checkpoint(&self, key: &str) -> Result<FoundCheckpoint> {
        let seqs = self.checkpoint_seqs(key).await?;
        let mut found =
            FoundCheckpoint { checkpoint: None, damaged: Vec::new(), last_seq: seqs.last().copied().unwrap_or(0) };
        for seq in seqs.into_iter().rev() {
            match self.load_checkpoint(key, seq).await {
                Ok(None) => {}
                Ok(Some(checkpoint)) => {
                    found.checkpoint = Some(checkpoint);
                    break;
                }
                Err(error @ (StoreError::Damaged { .. } | StoreError::Missing { .. })) => found.damaged.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// One checkpoint, verified with all its files; none when the record is a fence.
    async fn load_checkpoint(&self, key: &str, seq: u64) -> Result<Option<Checkpoint>> {
        let path = record_path(key, seq);
        let record: Record = record::unseal(&self.display_path(&path), &self.read(&path).await?)?;
        if record.key != key || record.seq != seq {
            return Err(StoreError::damaged(self.display_path(&path), "it belongs to another stage or number"));
        }
        if record.kind == RecordKind::Fence {
            return Ok(None);
        }
        for file in &record.files {
            self.verify_blob(file.digest, file.bytes).await.map_err(|error| {
                let file = &file.path;
                let problem = format!("its file {file} cannot be used: {error}");
                match error {
                    StoreError::Damaged { .. } | StoreError::Missing { .. } => {
                        StoreError::damaged(self.display_path(&path), problem)
                    }
                    other => other,
                }
            })?;
        }
        Ok(Some(Checkpoint { seq, step: record.step, state: record.state, files: record.files }))
    }

    /// Commits a checkpoint whose files are stored already.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when another process has taken over the lease, [`StoreError::Taken`] when it did so in this
    /// moment and the number is its own.
    pub async fn commit_checkpoint(&self, key: &str, epoch: u64, checkpoint: &Checkpoint) -> Result<()> {
        self.check_lease(key, epoch).await?;
        let Checkpoint { seq, step, state, files } = checkpoint.clone();
        let kind = RecordKind::Checkpoint;
        let nonce = crate::nonce();
        let record =
            Record { format: record::FORMAT, kind, key: key.to_owned(), seq, epoch, nonce, step, state, files };
        match self.commit_record(&record).await? {
            Create::Created => Ok(()),
            Create::AlreadyExists => Err(StoreError::Taken { path: self.display_path(&record_path(key, seq)) }),
        }
    }

    /// Writes a fence at the next free number, so that the next commit of an earlier holder collides with it.
    pub async fn write_fence(&self, key: &str, epoch: u64) -> Result<u64> {
        let mut seq = self.checkpoint_seqs(key).await?.last().copied().unwrap_or(0) + 1;
        loop {
            let record = Record {
                format: record::FORMAT,
                kind: RecordKind::Fence,
                key: key.to_owned(),
                seq,
                epoch,
                nonce: crate::nonce(),
                step: 0,
                state: Value::Null,
                files: Vec::new(),
            };
            match self.commit_record(&record).await? {
                Create::Created => return Ok(seq),
                // The earlier holder got one more commit in; the fence belongs behind it.
                Create::AlreadyExists => seq += 1,
            }
        }
    }

    /// Creates the record; one that is there with our nonce is ours, from an attempt whose answer was lost.
    async fn commit_record(&self, record: &Record) -> Result<Create> {
        let path = record_path(&record.key, record.seq);
        if self.create(&path, record::seal(&path, record)?).await? == Create::Created {
            return Ok(Create::Created);
        }
        let there = record::unseal::<Record>(&path, &self.read(&path).await?);
        let ours = there.is_ok_and(|there| there.nonce == record.nonce);
        Ok(if ours { Create::Created } else { Create::AlreadyExists })
    }
}
