//! Stored runs: listing them, finding one by the beginning of its id, reading its plan.

use std::collections::BTreeMap;

use dsv3_core::Error;
use dsv3_store::Store;
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

impl Engine {
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
