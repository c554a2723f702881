//! One run of a report, put together from its plan, its status, the results of its stages and the logs of the store.

use std::collections::{BTreeMap, BTreeSet};

use dsv3_core::{Event, Outcome};
use dsv3_store::{Store, StoreError, parse_events};
use serde_json::Value;

use super::{
    ReportedRun, ReportedStage, Standing,
    log::{Trace, scan},
};
use crate::{
    Engine,
    error::EngineError,
    explain::State,
    plan::{Plan, PlannedStage},
    run::floors,
    runs::{RunSummary, summary},
};

/// Other runs whose logs are searched for the stages of this one, newest first.
const RUNS_SEARCHED_MAX: usize = 500;

/// Gathers the run `id`.
pub(super) async fn run(engine: &Engine, store: &Store, id: &str, plan: &Plan) -> Result<ReportedRun, EngineError> {
    let known = summary(store, id.to_owned()).await?;
    let own = store.read_events(id).await?;
    let mut stages: Vec<ReportedStage> = plan.stages.iter().map(|stage| begin(stage, &own, &known)).collect();
    lend(engine, store, plan, &own, &mut stages).await;
    let mut traces = search(store, id, &own, &stages).await?;
    for (stage, planned) in stages.iter_mut().zip(&plan.stages) {
        let trace = stage.key.as_ref().and_then(|key| traces.remove(key)).unwrap_or_default();
        finish(store, stage, planned, trace).await?;
    }
    let mut machines = known.machines;
    let elsewhere: BTreeSet<&str> =
        stages.iter().flat_map(|stage| &stage.attempts).map(|one| one.run.as_str()).collect();
    for other in elsewhere.into_iter().filter(|other| *other != id) {
        machines.extend(summary(store, other.to_owned()).await?.machines);
    }
    machines.sort();
    machines.dedup();
    Ok(ReportedRun {
        run: id.to_owned(),
        store: store.url().to_owned(),
        pipeline: plan.name.clone(),
        seed: plan.seed,
        state: known.state,
        unix_millis: known.unix_millis,
        machines,
        command: known.command,
        stages,
    })
}

/// A stage as its own run's log and status know it.
fn begin(planned: &PlannedStage, own: &[Event], known: &RunSummary) -> ReportedStage {
    let (mut standing, mut key, mut ran) = (Standing::Waiting, known.keys.get(&planned.name).cloned(), false);
    for event in own {
        match event {
            Event::StageStarted { stage, key: begun, .. } if *stage == planned.name => {
                (standing, key) = (Standing::Begun, Some(begun.clone()));
            }
            Event::StageFinished { stage, outcome, .. } if *stage == planned.name => {
                ran |= *outcome == Outcome::Done;
                standing = match outcome {
                    Outcome::Done => Standing::Ran,
                    // A later walk of the same run finds what an earlier one ran.
                    Outcome::Cached if ran => Standing::Ran,
                    Outcome::Cached => Standing::Cached,
                    Outcome::Cancelled => Standing::Cancelled,
                    Outcome::Failed { messages, .. } => Standing::Failed { messages: messages.clone() },
                };
            }
            _ => {}
        }
    }
    ReportedStage {
        stage: planned.name.clone(),
        kind: planned.kind.clone(),
        key,
        standing,
        attempts: Vec::new(),
        unlogged: false,
        warnings: Vec::new(),
        figures: BTreeMap::new(),
        incidents: Vec::new(),
        lineage: Value::Null,
        series: BTreeMap::new(),
    }
}

/// Finds finished results of stages that the run was not asked for.
async fn lend(engine: &Engine, store: &Store, plan: &Plan, own: &[Event], stages: &mut [ReportedStage]) {
    let asked: BTreeSet<&String> = own
        .iter()
        .filter_map(|event| match event {
            Event::RunStarted { stages, .. } => Some(stages),
            _ => None,
        })
        .flatten()
        .collect();
    let lent = |stage: &ReportedStage| stage.key.is_none() && !asked.contains(&stage.stage);
    if !stages.iter().any(lent) {
        return;
    }
    // A plan of another version of the program, or of a host's own stages, is reported without them.
    let mut known = engine.know(store, plan, None).await.unwrap_or_default().into_iter();
    for stage in stages {
        let found = known.next().filter(|known| known.state.state == State::Cached);
        if lent(stage) {
            stage.standing = if found.is_some() { Standing::Lent } else { Standing::Unasked };
            stage.key = found.and_then(|known| known.state.key);
        }
    }
}

/// What the logs of the store say of the stages' keys. A stage that has not finished has nothing to do with later runs.
async fn search(
    store: &Store,
    id: &str,
    own: &[Event],
    stages: &[ReportedStage],
) -> Result<BTreeMap<String, Trace>, EngineError> {
    let keyed = || stages.iter().filter_map(|stage| Some((stage.key.as_deref()?, stage.has_finished())));
    let all: BTreeSet<&str> = keyed().map(|(key, _)| key).collect();
    let finished: BTreeSet<&str> = keyed().filter(|(_, finished)| *finished).map(|(key, _)| key).collect();
    let mut traces = BTreeMap::new();
    let runs = store.list_runs().await?;
    let skipped = runs.len().saturating_sub(RUNS_SEARCHED_MAX);
    for (i, run) in runs.iter().enumerate() {
        if run == id {
            scan(id, own, &|key| all.contains(key), &mut traces);
            continue;
        }
        let wanted = if run.as_str() < id { &all } else { &finished };
        if wanted.is_empty() || i < skipped {
            continue;
        }
        let segments = store.read_event_segments(run).await?;
        // A long log is parsed only when it names one of the keys.
        if segments.iter().any(|segment| mentions(segment, wanted)) {
            scan(run, &parse_events(&segments), &|key| wanted.contains(key), &mut traces);
        }
    }
    Ok(traces)
}

/// Whether a segment has the beginning of a stage under one of these keys.
fn mentions(segment: &[u8], keys: &BTreeSet<&str>) -> bool {
    let started = |line: &&[u8]| line.starts_with(br#"{"event":"stage_started""#);
    segment.split(|byte| *byte == b'\n').filter(started).any(|line| {
        let text = String::from_utf8_lossy(line);
        keys.iter().any(|key| text.contains(key))
    })
}

/// Adds what the logs and the stage's result say.
async fn finish(
    store: &Store,
    stage: &mut ReportedStage,
    planned: &PlannedStage,
    trace: Trace,
) -> Result<(), EngineError> {
    stage.series = trace.series.into_iter().map(|(name, values)| (name, values.into_iter().collect())).collect();
    (stage.attempts, stage.warnings) = (trace.attempts, trace.warnings);
    let Some(key) = stage.key.as_ref().filter(|_| stage.has_finished()) else { return Ok(()) };
    stage.unlogged = stage.attempts.is_empty();
    match store.read_result(key).await {
        Ok(Some(result)) => {
            stage.figures = floors::judge(planned, &result.metrics);
            stage.incidents = result.incidents();
            stage.lineage = result.lineage;
        }
        Ok(None) => stage.warnings.push("its result is no longer in the store".to_owned()),
        Err(error @ StoreError::Damaged { .. }) => stage.warnings.push(error.to_string()),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
