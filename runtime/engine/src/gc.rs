//! What a store's collection must keep: the runs, and what their plans, statuses and logs name.
//!
//! A run names the stages whose keys follow from its plan and the results that are there, those in its statuses, and those
//! that its log says were begun. A plan that cannot be read would make everything of its run look unnamed, so nothing is
//! collected then.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use dsv3_core::{Cancel, Event};
use dsv3_store::{
    CollectOptions, Collected, ConditionalCreate, CreateMode, Holder, Retention, Roots, StageResult, Store,
    parse_events,
};

use crate::{
    Engine, cached,
    error::EngineError,
    plan::{Plan, PlannedStage},
    run::weaker_mode,
    runs::summary,
    spec::RetentionSpec,
};

/// What a caller decides about a collection.
#[derive(Clone, Debug)]
pub struct GcOptions {
    /// Look and remove nothing.
    pub dry_run: bool,
    /// Unnamed objects younger than this are left alone.
    pub grace: Duration,
    /// Full ids of runs to remove.
    pub drop_runs: Vec<String>,
    /// Asks to stop waiting for another collection.
    pub cancel: Cancel,
}

/// What a collection found.
#[derive(Clone, Debug, PartialEq)]
pub struct GcReport {
    /// Runs that are kept.
    pub runs_kept: usize,
    /// What the store found.
    pub collected: Collected,
    /// Said when the store does not honour conditional create and whoever opened it promised to be alone.
    pub warning: Option<String>,
}

impl Engine {
    /// Removes what no kept run of a store names, or says what would go. `on_wait` is told of another collection that is
    /// waited for.
    ///
    /// # Errors
    /// Invalid when the store does not honour conditional create; Data when a plan cannot be read; Cancelled when a run to remove is being worked on; of the store.
    pub async fn collect(
        &self,
        store: &Store,
        options: &GcOptions,
        on_wait: impl Fn(&Holder),
    ) -> Result<GcReport, EngineError> {
        let mode = store.probe(ConditionalCreate::Required).await?;
        let warning = (mode == CreateMode::SingleWriter).then(|| weaker_mode(store));
        let collection = store.begin_collection(self.clock.clone(), &options.cancel, on_wait).await?;
        let roots = match self.roots(store, options).await {
            Ok(roots) => roots,
            Err(error) => {
                collection.give_up().await?;
                return Err(error);
            }
        };
        let runs_kept = roots.runs.len();
        let grace = CollectOptions { dry_run: options.dry_run, grace: options.grace };
        Ok(GcReport { runs_kept, collected: collection.collect(&roots, grace).await?, warning })
    }

    async fn roots(&self, store: &Store, options: &GcOptions) -> Result<Roots, EngineError> {
        let mut roots = Roots { dropped: options.drop_runs.iter().cloned().collect(), ..Roots::default() };
        for run in store.list_runs().await? {
            let Some(bytes) = store.read_if_exists(&format!("runs/{run}/plan.json")).await? else { continue };
            if roots.dropped.contains(&run) {
                continue;
            }
            let plan = Plan::from_bytes(&bytes).map_err(|error| {
                let help =
                    format!("what run {run} needs is not known, so nothing was removed; --drop-run {run} gives it up");
                error.context(format!("run {run}")).help(help)
            })?;
            for (stage, key) in self.keys_of(store, &run, &plan).await? {
                let policy = plan.stages.iter().find(|planned| planned.name == stage).map(policy_of);
                roots.keys.entry(key).or_default().push(policy.flatten());
            }
            roots.runs.insert(run);
        }
        Ok(roots)
    }

    /// Keys of the stages that a run names, with the name of the stage.
    async fn keys_of(&self, store: &Store, run: &str, plan: &Plan) -> Result<BTreeSet<(String, String)>, EngineError> {
        let known = summary(store, run.to_owned()).await?;
        let mut keys: BTreeSet<(String, String)> = known.keys.into_iter().collect();
        let mut results: BTreeMap<String, StageResult> = BTreeMap::new();
        let mut all_known = true;
        for stage in &plan.stages {
            let Ok(entry) = self.entry(&stage.kind, stage.version) else {
                all_known = false;
                continue;
            };
            let Ok(inputs) = cached::inputs(stage, &results) else { continue };
            let Ok(record) = cached::key_record(plan, stage, &entry, &inputs) else {
                all_known = false;
                continue;
            };
            let key = record.key().to_string();
            // One that cannot be read is made anew by a run, under the same key.
            if let Ok(Some(result)) = store.read_result(&key).await {
                results.insert(stage.name.clone(), result);
            }
            keys.insert((stage.name.clone(), key));
        }
        if !all_known {
            // Of a plan that this program cannot follow, the log tells what was begun.
            let events = parse_events(&store.read_event_segments(run).await?);
            keys.extend(events.into_iter().filter_map(|event| match event {
                Event::StageStarted { stage, key, .. } => Some((stage, key)),
                _ => None,
            }));
        }
        Ok(keys)
    }
}

fn policy_of(stage: &PlannedStage) -> Option<Retention> {
    stage.retention.as_ref().map(RetentionSpec::to_store)
}
