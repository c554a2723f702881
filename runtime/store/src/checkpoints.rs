//! Checkpoints: `stages/<key>/checkpoints/<seq>.json`, numbered from 1, each a conditional create.
//!
//! A record is a checkpoint (step, state, files with digests, and what slices of which tensors they hold), a fence,
//! written by whoever takes over an expired lease, or a rewind: from here on the stage goes on from an earlier number,
//! and the records between count no more, though they stay. Writers count on from the highest record there is; one whose
//! number is taken compares the nonce, and unless the record is its own it stops: it never tries the next number. So a
//! holder that was paused and replaced cannot commit. Readers take the newest checkpoint whose record and files all
//! verify.
//!
//! Format 1 has no tensors and no rewinds; a record is of format 2 only if it has either, and both are read.

use std::collections::VecDeque;

use dsv3_core::FileEntry;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Create, Store, TensorEntry,
    error::{Result, StoreError},
    record, shards,
};

/// Digits of a sequence number in a path, so that names sort as numbers.
const SEQ_DIGITS: usize = 8;
/// Version of a record with tensors or a rewind.
const FORMAT: u32 = record::NEWEST;

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
    /// What the files hold; empty for a stage without tensors and in format 1.
    pub tensors: Vec<TensorEntry>,
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

/// A record of a stage, read and believed; the files of a checkpoint are not looked at.
#[derive(Clone, Debug, PartialEq)]
pub enum CheckpointRecord {
    /// A checkpoint.
    Checkpoint(Checkpoint),
    /// Written by whoever took the stage over, under this epoch.
    Fence {
        /// Epoch of the new lease.
        epoch: u64,
    },
    /// The stage goes on from an earlier checkpoint.
    Rewind {
        /// Number of that checkpoint.
        to: u64,
        /// Run that asked for it.
        run: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RecordKind {
    Checkpoint,
    Fence,
    Rewind,
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
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<TensorEntry>,
    /// Of a rewind: where to, and which run asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rewind: Option<Rewind>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Rewind {
    to: u64,
    run: String,
}

impl Record {
    /// A record without content.
    fn new(kind: RecordKind, key: &str, seq: u64, epoch: u64) -> Self {
        let (key, nonce) = (key.to_owned(), crate::nonce());
        let (files, tensors) = (Vec::new(), Vec::new());
        let format = record::FORMAT;
        Self { format, kind, key, seq, epoch, nonce, step: 0, state: Value::Null, files, tensors, rewind: None }
    }
}

fn folder(key: &str) -> String {
    format!("stages/{key}/checkpoints")
}

fn record_path(key: &str, seq: u64) -> String {
    format!("{}/{seq:0width$}.json", folder(key), width = SEQ_DIGITS)
}

impl Store {
    /// Numbers of all records of the stage `key`, rising.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn checkpoint_seqs(&self, key: &str) -> Result<Vec<u64>> {
        let names = self.list(&folder(key)).await?;
        let mut seqs: Vec<u64> = names.iter().filter_map(|name| name.strip_suffix(".json")?.parse().ok()).collect();
        seqs.sort_unstable();
        Ok(seqs)
    }

    /// Finds the newest checkpoint of the stage `key` whose record and files verify; a rewind sends the search back to
    /// where it goes.
    ///
    /// # Errors
    /// When the store cannot be read at all, or holds a record of a newer build; damage is reported in the answer.
    pub async fn find_checkpoint(&self, key: &str) -> Result<FoundCheckpoint> {
        let mut seqs = VecDeque::from(self.checkpoint_seqs(key).await?);
        let mut found =
            FoundCheckpoint { checkpoint: None, damaged: Vec::new(), last_seq: seqs.back().copied().unwrap_or(0) };
        while let Some(seq) = seqs.pop_back() {
            match self.load_checkpoint(key, seq).await {
                Ok(CheckpointRecord::Checkpoint(checkpoint)) => {
                    found.checkpoint = Some(checkpoint);
                    break;
                }
                Ok(CheckpointRecord::Fence { .. }) => {}
                Ok(CheckpointRecord::Rewind { to, .. }) => seqs.retain(|seq| *seq <= to),
                Err(error @ (StoreError::Damaged { .. } | StoreError::Missing { .. })) => found.damaged.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// The checkpoint `seq`, verified with all its files, rewound or not.
    ///
    /// # Errors
    /// [`StoreError::NoCheckpoint`] when there is none, [`StoreError::Damaged`] when it cannot be used.
    pub async fn checkpoint_at(&self, key: &str, seq: u64) -> Result<Checkpoint> {
        let seqs = self.checkpoint_seqs(key).await?;
        if seqs.contains(&seq)
            && let CheckpointRecord::Checkpoint(checkpoint) = self.load_checkpoint(key, seq).await?
        {
            return Ok(checkpoint);
        }
        let mut there = Vec::new();
        for other in seqs {
            match self.checkpoint_record(key, other).await {
                Ok(CheckpointRecord::Fence { .. } | CheckpointRecord::Rewind { .. }) => {}
                Ok(CheckpointRecord::Checkpoint(_)) | Err(StoreError::Damaged { .. }) => there.push(other),
                // Removed since it was listed.
                Err(StoreError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::NoCheckpoint { seq, there })
    }

    /// The record `seq` of the stage `key`; the files of a checkpoint are not looked at.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Damaged`], [`StoreError::Newer`].
    pub async fn checkpoint_record(&self, key: &str, seq: u64) -> Result<CheckpointRecord> {
        let path = record_path(key, seq);
        let shown = self.display_path(&path);
        let record: Record = record::unseal_up_to(FORMAT, &shown, &self.read(&path).await?)?;
        if record.key != key || record.seq != seq {
            return Err(StoreError::damaged(shown, "it belongs to another stage or number"));
        }
        match record.kind {
            RecordKind::Fence => Ok(CheckpointRecord::Fence { epoch: record.epoch }),
            RecordKind::Rewind => match record.rewind {
                Some(Rewind { to, run }) if to < seq => Ok(CheckpointRecord::Rewind { to, run }),
                _ => Err(StoreError::damaged(shown, "it does not say where to go back to")),
            },
            RecordKind::Checkpoint => {
                let Record { seq, step, state, files, tensors, .. } = record;
                shards::check_table(&tensors, &files).map_err(|problem| StoreError::damaged(shown, problem))?;
                Ok(CheckpointRecord::Checkpoint(Checkpoint { seq, step, state, files, tensors }))
            }
        }
    }

    /// One record; a checkpoint is verified with all its files.
    async fn load_checkpoint(&self, key: &str, seq: u64) -> Result<CheckpointRecord> {
        let record = self.checkpoint_record(key, seq).await?;
        let CheckpointRecord::Checkpoint(checkpoint) = &record else { return Ok(record) };
        for file in &checkpoint.files {
            self.verify_blob(file.digest, file.bytes).await.map_err(|error| {
                let file = &file.path;
                let problem = format!("its file {file} cannot be used: {error}");
                match error {
                    StoreError::Damaged { .. } | StoreError::Missing { .. } => {
                        StoreError::damaged(self.display_path(&record_path(key, seq)), problem)
                    }
                    other => other,
                }
            })?;
        }
        Ok(record)
    }

    /// Commits a checkpoint whose files are stored already.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when another process has taken over the lease, [`StoreError::Taken`] when it did so in this
    /// moment and the number is its own, [`StoreError::Table`] when the slices do not tile the tensors.
    pub async fn commit_checkpoint(&self, key: &str, epoch: u64, checkpoint: &Checkpoint) -> Result<()> {
        self.check_lease(key, epoch).await?;
        let Checkpoint { seq, step, state, files, tensors } = checkpoint.clone();
        shards::check_table(&tensors, &files).map_err(|problem| StoreError::Table { step, problem })?;
        let format = if tensors.is_empty() { record::FORMAT } else { FORMAT };
        let record =
            Record { format, step, state, files, tensors, ..Record::new(RecordKind::Checkpoint, key, seq, epoch) };
        self.commit_or_stop(&record).await
    }

    /// Writes that the stage goes on from the checkpoint `to`; what was committed after it stays and counts no more.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] and [`StoreError::Taken`] when another process was first; as [`Self::checkpoint_at`] when `to` cannot be used.
    pub async fn rewind_checkpoints(&self, key: &str, epoch: u64, to: u64, run: &str) -> Result<u64> {
        self.check_lease(key, epoch).await?;
        self.checkpoint_at(key, to).await?;
        let seq = self.checkpoint_seqs(key).await?.last().copied().unwrap_or(0) + 1;
        let rewind = Some(Rewind { to, run: run.to_owned() });
        let record = Record { format: FORMAT, rewind, ..Record::new(RecordKind::Rewind, key, seq, epoch) };
        self.commit_or_stop(&record).await?;
        Ok(seq)
    }

    /// Writes a fence at the next free number, so that the next commit of an earlier holder collides with it.
    pub async fn write_fence(&self, key: &str, epoch: u64) -> Result<u64> {
        let mut seq = self.checkpoint_seqs(key).await?.last().copied().unwrap_or(0) + 1;
        loop {
            // Whoever writes a fence may have been replaced meanwhile; its fence would only stand in its successor's way.
            self.check_lease(key, epoch).await?;
            match self.commit_record(&Record::new(RecordKind::Fence, key, seq, epoch)).await? {
                Create::Created => return Ok(seq),
                // The earlier holder got one more commit in; the fence belongs behind it.
                Create::AlreadyExists => seq += 1,
            }
        }
    }

    async fn commit_or_stop(&self, record: &Record) -> Result<()> {
        match self.commit_record(record).await? {
            Create::Created => Ok(()),
            Create::AlreadyExists => {
                Err(StoreError::Taken { path: self.display_path(&record_path(&record.key, record.seq)) })
            }
        }
    }

    /// Creates the record; one that is there with our nonce is ours, from an attempt whose answer was lost.
    async fn commit_record(&self, record: &Record) -> Result<Create> {
        let path = record_path(&record.key, record.seq);
        if self.create(&path, record::seal(&path, record)?).await? == Create::Created {
            return Ok(Create::Created);
        }
        let there = record::unseal_up_to::<Record>(FORMAT, &path, &self.read(&path).await?);
        let ours = there.is_ok_and(|there| there.nonce == record.nonce);
        Ok(if ours { Create::Created } else { Create::AlreadyExists })
    }
}
