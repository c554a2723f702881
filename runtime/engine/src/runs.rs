//! Stored runs: listing them, finding one by the beginning of its id, reading its plan.

use std::collections::{BTreeMap, BTreeSet};

use dsv3_core::{Digest, Error};
use dsv3_store::{CheckpointRecord, Store};
use serde::Serialize;

use crate::{Engine, error::EngineError, machine::Machine, plan::Plan};

/// One stored run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunSummary {
    /// Its id; ids sort by the time the run began.
    pub run: String,
    /// Name of the pipeline.
    pub pipeline: String,
    /// `running`, `done`, `cancelled` or `failed`; `unknown` when no status can be read.
    pub state: String,
    /// Milliseconds since 1970 of the last status.
    pub unix_millis: u64,
    /// Outcome by stage, as far as the run came.
    pub stages: BTreeMap<String, String>,
    /// Key by stage, as far as the run came.
    pub keys: BTreeMap<String, String>,
    /// Machines of the processes that worked on it; empty when it does not say.
    pub machines: Vec<Machine>,
    /// How a person would start it again, if whoever started it said so.
    pub command: Option<String>,
}

/// A run beside what the store shows of it now.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunListing {
    /// What its statuses say.
    #[serde(flatten)]
    pub summary: RunSummary,
    /// Stages that are done or were cached.
    pub stages_done: usize,
    /// Stages of its plan; absent when the plan cannot be read.
    pub stages_total: Option<usize>,
    /// Bytes of the outputs and checkpoints that its stages name, each content once; runs may share them.
    pub bytes: u64,
    /// Process that holds one of its stages for it.
    pub holder: Option<String>,
    /// Milliseconds since 1970, by the store's clock, of that process's last heartbeat.
    pub beat_unix_millis: Option<u64>,
}

impl RunListing {
    /// Its state, told from the leases too: a run that says it is running and holds no stage was interrupted.
    pub fn state(&self) -> &str {
        match (self.summary.state.as_str(), &self.holder) {
            ("running", None) => "interrupted",
            (state, _) => state,
        }
    }

    /// When something last happened, in milliseconds since 1970.
    pub fn last_unix_millis(&self) -> u64 {
        self.summary.unix_millis.max(self.beat_unix_millis.unwrap_or(0))
    }
}

impl Engine {
    /// All runs of a store with stages, sizes and holders, oldest first.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn list_runs(&self, store: &Store) -> Result<Vec<RunListing>, EngineError> {
        let mut contents: BTreeMap<String, BTreeMap<Digest, u64>> = BTreeMap::new();
        let mut listings = Vec::new();
        for summary in self.runs(store).await? {
            let finished = |outcome: &&String| matches!(outcome.as_str(), "done" | "cached");
            let stages_done = summary.stages.values().filter(finished).count();
            let plan = self.stored_plan(store, &summary.run).await.ok();
            let (mut holder, mut beat_unix_millis) = (None, None);
            for (stage, key) in &summary.keys {
                if summary.stages.get(stage).is_some_and(|outcome| finished(&outcome)) {
                    continue;
                }
                if let Some(seen) = store.lease_seen(key).await?.filter(|seen| seen.holder.run == summary.run) {
                    (holder, beat_unix_millis) = (Some(seen.holder.to_string()), seen.beat_unix_millis);
                }
            }
            let mut content = BTreeMap::new();
            for key in summary.keys.values().collect::<BTreeSet<_>>() {
                if !contents.contains_key(key) {
                    contents.insert(key.clone(), content_of(store, key).await?);
                }
                content.extend(contents.get(key).into_iter().flatten().map(|(digest, bytes)| (*digest, *bytes)));
            }
            let (bytes, stages_total) = (content.values().sum(), plan.map(|plan| plan.stages.len()));
            listings.push(RunListing { summary, stages_done, stages_total, bytes, holder, beat_unix_millis });
        }
        Ok(listings)
    }

    /// All runs of a store, oldest first.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn runs(&self, store: &Store) -> Result<Vec<RunSummary>, EngineError> {
        let mut runs = Vec::new();
        for run in store.list_runs().await? {
            runs.push(summary(store, run).await?);
        }
        Ok(runs)
    }

    /// The full id of a run: `text` is an id, the beginning of exactly one, or `last` (or `latest`).
    ///
    /// # Errors
    /// Invalid when there is no such run, or when several begin like this.
    pub async fn find_run(&self, store: &Store, text: &str) -> Result<String, EngineError> {
        let runs = store.list_runs().await?;
        let url = store.url();
        if matches!(text, "last" | "latest") {
            let none = || Error::invalid(format!("the store {url} holds no runs"));
            let help =
                || format!("`dsv3-pipeline run PIPELINE --store {url}` makes one; `--store` names another store");
            return runs.last().cloned().ok_or_else(|| none().help(help()).into());
        }
        let begins: Vec<&String> = runs.iter().filter(|run| !text.is_empty() && run.starts_with(text)).collect();
        match begins.as_slice() {
            _ if runs.iter().any(|run| run == text) => Ok(text.to_owned()),
            [one] => Ok((*one).clone()),
            [] => Err(Error::invalid(format!("the store {url} holds no run `{text}`"))
                .help("`dsv3-pipeline runs` lists them; `--store` names another store")
                .into()),
            many => Err(Error::invalid(format!("{} runs of {url} begin with `{text}`", many.len())).into()),
        }
    }

    /// The plan of a stored run.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub async fn stored_plan(&self, store: &Store, run: &str) -> Result<Plan, EngineError> {
        Ok(Plan::from_bytes(&store.read_plan(run).await?)?)
    }
}

pub(crate) async fn summary(store: &Store, run: String) -> Result<RunSummary, EngineError> {
    let status = store.read_status(&run).await?;
    let detail = status.as_ref().map(|status| status.detail.clone()).unwrap_or_default();
    let words = |field: &str| -> BTreeMap<String, String> {
        let stages = detail["stages"].as_object().into_iter().flatten();
        stages.filter_map(|(name, stage)| Some((name.clone(), stage.get(field)?.as_str()?.to_owned()))).collect()
    };
    Ok(RunSummary {
        pipeline: detail["pipeline"].as_str().unwrap_or_default().to_owned(),
        state: status.as_ref().map_or_else(|| "unknown".to_owned(), |status| status.state.clone()),
        unix_millis: status.map_or(0, |status| status.unix_millis),
        stages: words("outcome"),
        keys: words("key"),
        machines: serde_json::from_value(detail["machines"].clone()).unwrap_or_default(),
        command: detail["command"].as_str().map(str::to_owned),
        run,
    })
}

/// Digest and length of what a stage's result and checkpoints name. What cannot be read counts nothing.
async fn content_of(store: &Store, key: &str) -> Result<BTreeMap<Digest, u64>, EngineError> {
    let mut content = BTreeMap::new();
    if let Ok(Some(result)) = store.read_result(key).await {
        content.extend(result.outputs.iter().map(|output| (output.digest, output.bytes)));
    }
    for seq in store.checkpoint_seqs(key).await? {
        if let Ok(CheckpointRecord::Checkpoint(checkpoint)) = store.checkpoint_record(key, seq).await {
            content.extend(checkpoint.files.iter().map(|file| (file.digest, file.bytes)));
        }
    }
    Ok(content)
}
