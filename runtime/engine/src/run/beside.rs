//! One stage of a stored run done beside its store: from one of its checkpoints, without a lease, every write into memory.
//!
//! `verify --replay` does some steps again and compares; `export` publishes a checkpoint as the stage would publish its
//! end. Neither leaves anything behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::AtomicBool,
};

use dsv3_core::{Cancel, Error, Event, Events};
use dsv3_store::{Checkpoint, StageResult, Store, nonce};
use serde_json::Value;

use super::{
    Run, RunOptions,
    stage::{Place, Scratch, inputs_json},
};
use crate::{
    Engine,
    cached::{self, Found, Inputs, Missing},
    plan::{Plan, PlannedStage},
};

/// Later than every lease: what is written beside the store competes with nobody.
const EPOCH: u64 = u64::MAX;

/// What is to be done with the stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Go on from the checkpoint.
    GoOn,
    /// Publish the checkpoint as it is.
    Publish,
}

/// A stage that can be done beside its store.
pub(crate) struct Beside<'a> {
    engine: &'a Engine,
    plan: &'a Plan,
    store: Store,
    run: &'a str,
    /// The stage.
    pub(crate) stage: &'a PlannedStage,
    /// Its key.
    pub(crate) key: String,
    inputs: Inputs,
    results: BTreeMap<String, StageResult>,
}

impl<'a> Beside<'a> {
    /// Finds the stage `name` and what it reads, all from the store.
    pub(crate) async fn find(
        engine: &'a Engine,
        store: &Store,
        plan: &'a Plan,
        run: &'a str,
        name: &str,
    ) -> Result<Self, Error> {
        let wanted = plan.stage(name)?;
        let above = plan.ancestors(name);
        let mut results = BTreeMap::new();
        for stage in plan.stages.iter().filter(|stage| stage.name != name && above.contains(&stage.name)) {
            let entry = engine.entry(&stage.kind, stage.version)?;
            let Ok(inputs) = cached::inputs(stage, &results) else { continue };
            let key = cached::key_record(plan, stage, &entry, &inputs)?.key();
            match cached::find(store, plan, key).await? {
                Found::Whole(result) => drop(results.insert(stage.name.clone(), result)),
                Found::Broken(why) => {
                    return Err(Error::data(format!("the result of stage `{}` cannot be used: {why}", stage.name)));
                }
                Found::Nothing => {}
            }
        }
        let inputs = cached::inputs(wanted, &results).map_err(|missing| {
            let (Missing::Stage(from) | Missing::Output(from, _)) = missing;
            Error::invalid(format!("stage `{name}` reads from stage `{from}`, which has not finished"))
        })?;
        let entry = engine.entry(&wanted.kind, wanted.version)?;
        let key = cached::key_record(plan, wanted, &entry, &inputs)?.key().to_string();
        Ok(Self { engine, plan, store: store.clone(), run, stage: wanted, key, inputs, results })
    }

    /// The checkpoint `at`, or the newest.
    pub(crate) async fn checkpoint(&self, at: Option<u64>) -> Result<Checkpoint, Error> {
        let found = match at {
            Some(seq) => Some(self.store.checkpoint_at(&self.key, seq).await?),
            None => self.store.find_checkpoint(&self.key).await?.checkpoint,
        };
        let none = || Error::invalid(format!("stage `{}` of run {} has no checkpoint", self.stage.name, self.run));
        found.ok_or_else(|| none().help("only stages that train write checkpoints"))
    }

    /// Does the stage from `checkpoint` on. Answers its outputs, or why it stopped, and the store that holds what it
    /// wrote.
    pub(crate) async fn run(
        &self,
        checkpoint: u64,
        purpose: Purpose,
        threads: Option<usize>,
        cancel: &Cancel,
        events: Events,
    ) -> Result<(Result<Value, Error>, Store), Error> {
        let beside = self.store.beside();
        let options = RunOptions { threads, ..RunOptions::default() };
        let (reports, results) = (Vec::new(), self.results.clone());
        let run = Run {
            engine: self.engine,
            plan: self.plan,
            store: &beside,
            id: self.run,
            options: &options,
            events: events.clone(),
            reports,
            results,
            selected: BTreeSet::new(),
            broken: BTreeMap::new(),
            healed: BTreeSet::new(),
            handed_over: AtomicBool::new(false),
        };
        let entry = self.engine.entry(&self.stage.kind, self.stage.version)?;
        let scratch = Scratch(std::env::temp_dir().join(format!("dsv3-{}", nonce())));
        let place = Place { key: &self.key, epoch: EPOCH, at: Some(checkpoint), as_it_is: purpose == Purpose::Publish };
        let ctx = run.context(self.stage, place, (cancel.clone(), events), scratch.0.clone()).await?;
        let inputs = inputs_json(&entry, &self.inputs);
        let (outputs, ctx) = entry.run_on_thread(self.stage.config.clone(), inputs, ctx).await?;
        ctx.checkpoints().settle().await;
        Ok((outputs, beside))
    }
}

/// Name, step and value of a metric event.
pub(crate) fn metric(event: &Event) -> Option<(&str, u64, f64)> {
    match event {
        Event::Metric { name, step, value, .. } => Some((name, *step, *value)),
        _ => None,
    }
}
