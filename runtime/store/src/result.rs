//! The finished stage: `stages/<key>/result.json`.

use std::collections::BTreeMap;

use bytes::Bytes;
use dsv3_core::{Digest, Figure, GuardRecord};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Create, Store,
    error::{Result, StoreError},
    record,
};

/// One output of a finished stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputEntry {
    /// Port, `port[i]` for the elements of a port that takes many.
    pub name: String,
    /// Kind of the artifact.
    pub kind: String,
    /// Digest of its manifest. Covers deterministic content only.
    pub digest: Digest,
    /// Sum of its file lengths.
    pub bytes: u64,
}

/// What a stage left behind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageResult {
    /// Version of this record: 1.
    pub format: u32,
    /// Key of the stage.
    pub key: String,
    /// Type of the stage.
    #[serde(rename = "type")]
    pub stage_type: String,
    /// Outputs in the order of the ports.
    pub outputs: Vec<OutputEntry>,
    /// Closing figures by name, without the stage's name.
    pub metrics: BTreeMap<String, Figure>,
    /// Last checkpoint or fence; 0 when there was none.
    pub last_seq: u64,
    /// What happened on the way (skipped steps, rewinds, mixed profiles).
    pub lineage: Value,
    /// Numerics profile: the values of the numerics fields.
    pub profile: Value,
}

impl StageResult {
    /// Version written by this build.
    pub const FORMAT: u32 = record::FORMAT;

    /// What the guard of a training stage did, from the lineage; `Display` says each in one line.
    pub fn incidents(&self) -> Vec<GuardRecord> {
        let records = self.lineage.get(GuardRecord::SUBJECT).and_then(Value::as_array);
        records.into_iter().flatten().filter_map(|record| GuardRecord::deserialize(record).ok()).collect()
    }
}

fn result_path(key: &str) -> String {
    format!("stages/{key}/result.json")
}

impl Store {
    /// The result of the stage `key`, if it has finished.
    ///
    /// # Errors
    /// [`crate::StoreError::Damaged`] when the record is not what was written.
    pub async fn read_result(&self, key: &str) -> Result<Option<StageResult>> {
        let path = result_path(key);
        match self.read_if_exists(&path).await? {
            Some(bytes) => record::unseal(&self.display_path(&path), &bytes).map(Some),
            None => Ok(None),
        }
    }

    /// Commits `result` and answers the committed one: the first wins, and equal keys have equal outputs. A damaged record
    /// in the way says nothing and is replaced.
    pub async fn commit_result(&self, key: &str, result: &StageResult) -> Result<StageResult> {
        let path = result_path(key);
        let bytes: Bytes = record::seal(&path, result)?;
        if self.create(&path, bytes.clone()).await? == Create::Created {
            return Ok(result.clone());
        }
        match self.read_result(key).await {
            Ok(Some(committed)) => return Ok(committed),
            Ok(None) => {}
            Err(StoreError::Damaged { path, problem }) => {
                tracing::warn!(path, problem, "replacing a damaged result");
                self.delete(&result_path(key)).await?;
            }
            Err(error) => return Err(error),
        }
        match self.create(&path, bytes).await? {
            Create::Created => Ok(result.clone()),
            Create::AlreadyExists => record::unseal(&self.display_path(&path), &self.read(&path).await?),
        }
    }
}
