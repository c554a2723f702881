//! What would happen to each stage now, and why: the table of `plan`, and `explain` field by field.

use std::collections::{BTreeMap, BTreeSet};

use dsv3_core::{Digest, Error};
use dsv3_stage::StageEntry;
use dsv3_store::{StageResult, Store};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    Engine,
    cached::{self, Found, Missing},
    check::{CheckedStage, Spec},
    error::EngineError,
    plan::{InputRef, Plan, PlannedStage, key::KeyRecord},
    runs::summary,
};

/// Older runs looked at for the last result of a stage's name.
const RUNS_SEARCHED_MAX: usize = 200;

/// What a run would do with a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Its result is there.
    Cached,
    /// It goes on after this step of an unfinished attempt.
    Resumes {
        /// Step of the newest checkpoint.
        step: u64,
    },
    /// It runs from its start.
    Runs,
    /// Its result is there but not whole; it runs again.
    Broken {
        /// What is missing.
        why: String,
    },
    /// Nobody looked: its inputs lie in object stores, which are read when the pipeline runs.
    Unread,
    /// Its key is known once this stage has finished.
    Waits {
        /// The stage it waits for. Beside the stage's own name in one JSON object, so it has another name there.
        #[serde(rename = "waits_for")]
        stage: String,
    },
}

/// One stage of a plan and what would happen to it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageState {
    /// Name in the pipeline.
    pub stage: String,
    /// Stage type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its key, once known.
    pub key: Option<String>,
    /// What would happen.
    #[serde(flatten)]
    pub state: State,
    /// What the stage says of itself before it runs, as names and values.
    pub facts: Vec<(String, String)>,
}

/// Why a stage is or is not cached.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// What would happen.
    #[serde(flatten)]
    pub stage: StageState,
    /// The reasons, one sentence or field each.
    pub reasons: Vec<String>,
    /// What the key is made of, as far as it is known.
    pub key_fields: Value,
    /// Run and key of the last result of this stage's name that has another key.
    pub previous: Option<(String, String)>,
}

/// What is known of one stage.
pub(crate) struct Known {
    pub(crate) state: StageState,
    record: Option<KeyRecord>,
    result: Option<StageResult>,
}

impl Spec {
    /// The stages without a look at any store or external file.
    pub fn outline(&self) -> Vec<StageState> {
        let describe = |stage: &CheckedStage| StageState {
            stage: stage.name.clone(),
            kind: stage.entry.name.to_owned(),
            key: None,
            state: State::Unread,
            facts: stage.facts.clone(),
        };
        self.stages.iter().map(describe).collect()
    }
}

impl Engine {
    /// What a run would do with each stage of a plan.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn states(&self, plan: &Plan) -> Result<Vec<StageState>, EngineError> {
        let store = self.open_store_with(&plan.store, &plan.store_options)?;
        let known = self.know(&store, plan, None).await?;
        Ok(known.into_iter().map(|known| known.state).collect())
    }

    /// Why the stage called `name` is or is not cached, against the last result of that name.
    ///
    /// # Errors
    /// Invalid when there is no such stage; when the store cannot be read.
    pub async fn explain(&self, plan: &Plan, name: &str) -> Result<Explanation, EngineError> {
        let store = self.open_store_with(&plan.store, &plan.store_options)?;
        let stage = plan.stage(name)?;
        let needed = plan.ancestors(name);
        let known = self.know(&store, plan, Some(&needed)).await?;
        let results = known.iter().filter_map(|known| Some((known.state.stage.clone(), known.result.clone()?)));
        let results: BTreeMap<String, StageResult> = results.collect();
        let Some(this) = known.into_iter().find(|known| known.state.stage == name) else {
            return Err(Error::internal(format!("stage `{name}` was not looked at")).into());
        };
        let entry = self.entry(&stage.kind, stage.version)?;
        let record = match this.record {
            Some(record) => record,
            None => partial_record(plan, stage, &entry, &results)?,
        };
        let (mut reasons, mut previous) = (Vec::new(), None);
        match &this.state.state {
            State::Cached => reasons.push("every field of its key is that of the stored result".to_owned()),
            State::Broken { why } => reasons.push(format!("its result is stored but not whole: {why}")),
            other => {
                match other {
                    State::Resumes { step } => {
                        reasons.push(format!("it was interrupted; the newest checkpoint is of step {step}"));
                    }
                    State::Waits { stage } => reasons.push(format!("stage `{stage}` has to run first")),
                    _ => {}
                }
                match last_record(&store, name, this.state.key.as_deref()).await? {
                    Some((run, key, before)) => {
                        reasons.push(format!("against the result of run {run}:"));
                        let lines = record.differences(&before);
                        reasons.extend(lines.into_iter().map(|line| with_origin(line, stage)));
                        previous = Some((run, key));
                    }
                    None => {
                        reasons.push(format!("no run of this store has a result of a stage `{name}` to compare with"))
                    }
                }
            }
        }
        Ok(Explanation { stage: this.state, reasons, key_fields: record.value().clone(), previous })
    }

    /// Looks at the stages in order; with `only`, at those alone.
    pub(crate) async fn know(
        &self,
        store: &Store,
        plan: &Plan,
        only: Option<&BTreeSet<String>>,
    ) -> Result<Vec<Known>, EngineError> {
        let mut results: BTreeMap<String, StageResult> = BTreeMap::new();
        let mut all = Vec::new();
        for stage in plan.stages.iter().filter(|stage| only.is_none_or(|only| only.contains(&stage.name))) {
            let entry = self.entry(&stage.kind, stage.version)?;
            let known = match cached::inputs(stage, &results) {
                Ok(inputs) => {
                    let record = cached::key_record(plan, stage, &entry, &inputs)?;
                    let key = record.key();
                    let (state, result) = self.look(store, plan, key).await?;
                    Known { state: describe(stage, Some(key), state), record: Some(record), result }
                }
                Err(Missing::Stage(from) | Missing::Output(from, _)) => {
                    Known { state: describe(stage, None, State::Waits { stage: from }), record: None, result: None }
                }
            };
            if let Some(result) = &known.result {
                results.insert(stage.name.clone(), result.clone());
            }
            all.push(known);
        }
        Ok(all)
    }

    async fn look(&self, store: &Store, plan: &Plan, key: Digest) -> Result<(State, Option<StageResult>), EngineError> {
        Ok(match cached::find(store, plan, key).await? {
            Found::Whole(result) => (State::Cached, Some(result)),
            Found::Broken(why) => (State::Broken { why }, None),
            Found::Nothing => match store.find_checkpoint(&key.to_string()).await?.checkpoint {
                Some(checkpoint) => (State::Resumes { step: checkpoint.step }, None),
                None => (State::Runs, None),
            },
        })
    }
}

fn describe(stage: &PlannedStage, key: Option<Digest>, state: State) -> StageState {
    let (name, kind, facts) = (stage.name.clone(), stage.kind.clone(), stage.facts.clone());
    StageState { stage: name, kind, key: key.map(|key| key.to_string()), state, facts }
}

/// The record of a stage that waits: what its upstream will make is said in words.
fn partial_record(
    plan: &Plan,
    stage: &PlannedStage,
    entry: &StageEntry,
    results: &BTreeMap<String, StageResult>,
) -> Result<KeyRecord, Error> {
    let mut known = stage.clone();
    let mut unknown = BTreeMap::new();
    known.inputs.retain(|input| {
        let waits = input.values.iter().find_map(|value| match value {
            InputRef::Stage { stage, .. } if !results.contains_key(stage) => Some(stage.clone()),
            _ => None,
        });
        let waiting = waits.is_some();
        unknown.extend(waits.map(|from| (input.port.clone(), from)));
        !waiting
    });
    let inputs = cached::inputs(&known, results).unwrap_or_default();
    let record = cached::key_record(plan, stage, entry, &inputs)?;
    let mut value = record.value().clone();
    for (port, from) in unknown {
        value["inputs"][port] = json!(format!("known once `{from}` has finished"));
    }
    Ok(KeyRecord::from_value(value))
}

/// The newest stored record of a stage called `name` with another key than `key`.
async fn last_record(
    store: &Store,
    name: &str,
    key: Option<&str>,
) -> Result<Option<(String, String, KeyRecord)>, EngineError> {
    for run in store.list_runs().await?.into_iter().rev().take(RUNS_SEARCHED_MAX) {
        let summary = summary(store, run).await?;
        let Some(other) = summary.keys.get(name).filter(|other| Some(other.as_str()) != key) else { continue };
        let bytes = store.read_if_exists(&format!("stages/{other}/key.json")).await?;
        // A record is named by its digest; a damaged one explains nothing.
        let record = bytes.and_then(|bytes| KeyRecord::from_bytes(&bytes));
        if let Some(record) = record.filter(|record| record.key().to_string() == other.as_str()) {
            return Ok(Some((summary.run, other.clone(), record)));
        }
    }
    Ok(None)
}

/// Names the stage that made a changed input.
fn with_origin(line: String, stage: &PlannedStage) -> String {
    let made = stage.inputs.iter().find_map(|input| {
        let prefix = format!("inputs.{}", input.port);
        let rest = line.strip_prefix(&prefix)?;
        let from = match input.values.first()? {
            InputRef::Stage { stage, port } => format!("made by {stage}.{port}"),
            InputRef::External { .. } => "the files have changed".to_owned(),
        };
        rest.starts_with(['[', ':', '.']).then_some(from)
    });
    match made {
        Some(from) => format!("{line} ({from})"),
        None => line,
    }
}
