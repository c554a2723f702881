//! Every object of a run: its plan, statuses, events; of each stage the key's record, result, outputs with their files,
//! profiles, leases, and every checkpoint with its files and slices.
//!
//! External input files are not the store's: they are compared where they can be read and left alone where they cannot.

use std::collections::BTreeMap;

use dsv3_core::{Digest, Error, FileEntry, json_digest};
use dsv3_store::{Checkpoint, CheckpointRecord, Store, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Engine,
    cached::{self, Found},
    error::EngineError,
    plan::{InputRef, Plan, key::KeyRecord},
    runs::summary,
};

/// One thing that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// Which object, as a person finds it.
    pub path: String,
    /// How it shows.
    pub problem: String,
}

/// One stage that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifiedStage {
    /// Name in the pipeline.
    pub stage: String,
    /// Its key.
    pub key: String,
    /// Whether it has a result.
    pub finished: bool,
    /// Artifacts it made.
    pub outputs: u64,
    /// Numbers of its checkpoints.
    pub checkpoints: Vec<u64>,
}

/// A look at everything.
pub(super) struct Look<'a> {
    store: &'a Store,
    run: &'a str,
    pub(super) objects: u64,
    pub(super) bytes: u64,
    pub(super) damaged: Vec<Damage>,
    pub(super) stages: Vec<VerifiedStage>,
    /// Blobs that were read, and whether they were right: many are named more than once.
    seen: BTreeMap<Digest, bool>,
}

impl Engine {
    /// Stages of the run in the plan's order with their keys: from the results before them, or from what the run's status
    /// says where these cannot be used.
    pub(super) async fn keys(
        &self,
        store: &Store,
        id: &str,
        plan: &Plan,
    ) -> Result<Vec<(String, String)>, EngineError> {
        let said = summary(store, id.to_owned()).await?.keys;
        let (mut results, mut keys) = (BTreeMap::new(), Vec::new());
        for stage in &plan.stages {
            let mut key = said.get(&stage.name).cloned();
            // A stage type that this program does not know is looked up by what the status says.
            if let (Ok(entry), Ok(inputs)) = (self.entry(&stage.kind, stage.version), cached::inputs(stage, &results)) {
                let computed = cached::key_record(plan, stage, &entry, &inputs)?.key();
                if let Found::Whole(result) = cached::find(store, plan, computed).await? {
                    results.insert(stage.name.clone(), result);
                }
                key = Some(computed.to_string());
            }
            keys.extend(key.map(|key| (stage.name.clone(), key)));
        }
        Ok(keys)
    }
}

impl<'a> Look<'a> {
    pub(super) fn new(store: &'a Store, run: &'a str) -> Self {
        let (damaged, stages, seen) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { store, run, objects: 0, bytes: 0, damaged, stages, seen }
    }

    fn damage(&mut self, path: &str, problem: impl Into<String>) {
        self.damaged.push(Damage { path: self.store.display_path(path), problem: problem.into() });
    }

    /// Notes damage; any other error ends the look.
    fn judge<T>(&mut self, path: &str, outcome: Result<T, StoreError>) -> Result<Option<T>, Error> {
        match outcome {
            Ok(value) => Ok(Some(value)),
            Err(StoreError::Damaged { path, problem }) => {
                self.damaged.push(Damage { path, problem });
                Ok(None)
            }
            Err(StoreError::Missing { .. }) => {
                self.damage(path, "it does not exist");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn read(&mut self, path: &str) -> Result<Option<bytes::Bytes>, Error> {
        let read = self.store.read(path).await;
        let bytes = self.judge(path, read)?;
        if let Some(bytes) = &bytes {
            (self.objects, self.bytes) = (self.objects + 1, self.bytes + bytes.len() as u64);
        }
        Ok(bytes)
    }

    /// Whether a blob is sound; it is read and hashed once, however often it is named.
    async fn blob(&mut self, digest: Digest, bytes: Option<u64>, named: &str) -> Result<bool, Error> {
        if let Some(sound) = self.seen.get(&digest) {
            return Ok(*sound);
        }
        let path = format!("blobs/{digest}");
        let length = match bytes {
            Some(bytes) => Some(bytes),
            None => self.store.length(&path).await?,
        };
        let verified = self.store.verify_blob(digest, length.unwrap_or_default()).await;
        let sound = self.judge(&path, verified)?.is_some();
        if sound {
            (self.objects, self.bytes) = (self.objects + 1, self.bytes + length.unwrap_or_default());
        } else if let Some(damage) = self.damaged.last_mut() {
            damage.problem = format!("{} ({named})", damage.problem);
        }
        self.seen.insert(digest, sound);
        Ok(sound)
    }

    /// The run's own records; its plan when that can be read.
    pub(super) async fn run_records(&mut self) -> Result<Option<Plan>, Error> {
        let folder = format!("runs/{}", self.run);
        let path = format!("{folder}/plan.json");
        let mut plan = None;
        if let Some(bytes) = self.read(&path).await? {
            match Plan::from_bytes(&bytes) {
                Ok(read) => plan = Some(read),
                Err(error) => self.damage(&path, crate::error::chain(&error).join(": ")),
            }
        }
        for kind in ["status", "certificates"] {
            for name in self.store.list(&format!("{folder}/{kind}")).await? {
                self.sealed(&format!("{folder}/{kind}/{name}")).await?;
            }
        }
        for name in self.store.list(&format!("{folder}/events")).await? {
            let path = format!("{folder}/events/{name}");
            let Some(bytes) = self.read(&path).await? else { continue };
            if let Some(problem) = dsv3_store::segment_problem(&bytes) {
                self.damage(&path, problem);
            }
        }
        Ok(plan)
    }

    async fn sealed(&mut self, path: &str) -> Result<Option<Value>, Error> {
        let Some(bytes) = self.read(path).await? else { return Ok(None) };
        let opened = self.store.open_record(path, &bytes);
        self.judge(path, opened)
    }

    /// Manifests of external inputs, hooks, and such external files as can be read.
    pub(super) async fn plan_blobs(&mut self, plan: &Plan, only: Option<&str>) -> Result<(), Error> {
        for hook in plan.hooks.values() {
            self.blob(hook.digest, None, "a hook").await?;
        }
        for stage in plan.stages.iter().filter(|stage| only.is_none_or(|only| only == stage.name)) {
            for value in stage.inputs.iter().flat_map(|input| &input.values) {
                if let InputRef::External { digest, .. } = value {
                    self.artifact(*digest, &format!("input of {}", stage.name), plan).await?;
                }
            }
        }
        Ok(())
    }

    /// A manifest and its files.
    async fn artifact(&mut self, digest: Digest, named: &str, plan: &Plan) -> Result<(), Error> {
        if !self.blob(digest, None, &format!("manifest of {named}")).await? {
            return Ok(());
        }
        let manifest = self.store.manifest(digest).await;
        let Some(manifest) = self.judge(&format!("blobs/{digest}"), manifest)? else { return Ok(()) };
        for file in &manifest.files {
            if plan.sources.contains_key(&file.digest) && !self.store.blob_exists(file.digest).await? {
                self.source(file, plan).await?;
                continue;
            }
            self.blob(file.digest, Some(file.bytes), &format!("file {} of {named}", file.path)).await?;
        }
        Ok(())
    }

    /// An external file; one that is not there is not the store's concern.
    async fn source(&mut self, file: &FileEntry, plan: &Plan) -> Result<(), Error> {
        match self.store.get_file(file, &plan.sources).await {
            Ok(_) | Err(StoreError::SourceMissing { .. }) => Ok(()),
            Err(StoreError::SourceChanged { path }) => {
                self.damaged.push(Damage { path, problem: "it has changed since the plan was made".to_owned() });
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Everything under a stage's key.
    pub(super) async fn stage(&mut self, name: &str, key: &str, plan: &Plan) -> Result<(), Error> {
        let folder = format!("stages/{key}");
        let path = format!("{folder}/key.json");
        if self.store.length(&path).await?.is_some()
            && let Some(bytes) = self.read(&path).await?
        {
            let record = KeyRecord::from_bytes(&bytes);
            if record.is_none_or(|record| record.key().to_string() != key) {
                self.damage(&path, "its digest is not the key it lies under");
            }
        }
        for name in self.store.list(&format!("{folder}/profiles")).await? {
            self.profile(&format!("{folder}/profiles/{name}"), name.trim_end_matches(".json")).await?;
        }
        for name in self.store.list(&format!("{folder}/leases")).await? {
            if name.ends_with(".json") {
                self.sealed(&format!("{folder}/leases/{name}")).await?;
            }
        }
        let mut stage = VerifiedStage {
            stage: name.to_owned(),
            key: key.to_owned(),
            finished: false,
            outputs: 0,
            checkpoints: vec![],
        };
        let path = format!("{folder}/result.json");
        if self.store.length(&path).await?.is_some() && self.read(&path).await?.is_some() {
            let result = self.store.read_result(key).await;
            if let Some(Some(result)) = self.judge(&path, result)? {
                if result.key != key {
                    self.damage(&path, format!("it belongs to the key {}", result.key));
                }
                (stage.finished, stage.outputs) = (true, result.outputs.len() as u64);
                for output in &result.outputs {
                    self.artifact(output.digest, &format!("{name}.{}", output.name), plan).await?;
                }
            }
        }
        stage.checkpoints = self.checkpoints(name, key).await?;
        self.stages.push(stage);
        Ok(())
    }

    async fn profile(&mut self, path: &str, digest: &str) -> Result<(), Error> {
        let Some(bytes) = self.read(path).await? else { return Ok(()) };
        let value: Option<Value> = serde_json::from_slice(&bytes).ok();
        if value.is_none_or(|value| json_digest(&cached::without_format(value)).to_string() != digest) {
            self.damage(path, "its digest is not its name");
        }
        Ok(())
    }

    /// Every record under the key, rewound ones too, with files and slices; numbers of the checkpoints among them.
    async fn checkpoints(&mut self, name: &str, key: &str) -> Result<Vec<u64>, Error> {
        let mut numbers = Vec::new();
        for seq in self.store.checkpoint_seqs(key).await? {
            let path = format!("stages/{key}/checkpoints/{seq:08}.json");
            if self.read(&path).await?.is_none() {
                continue;
            }
            let record = self.store.checkpoint_record(key, seq).await;
            let Some(CheckpointRecord::Checkpoint(checkpoint)) = self.judge(&path, record)? else { continue };
            let mut sound = true;
            for file in &checkpoint.files {
                let named = format!("file {} of checkpoint {seq} of {name}", file.path);
                sound &= self.blob(file.digest, Some(file.bytes), &named).await?;
            }
            if sound {
                self.slices(&path, &checkpoint).await?;
            }
            numbers.push(seq);
        }
        Ok(numbers)
    }

    /// The digest of every slice.
    async fn slices(&mut self, path: &str, checkpoint: &Checkpoint) -> Result<(), Error> {
        for tensor in &checkpoint.tensors {
            let rows = self.store.read_rows(checkpoint, &tensor.name, 0..tensor.rows()).await;
            self.judge(path, rows)?;
        }
        Ok(())
    }
}
