//! Running a plan: stages in order, each cached, resumed or run, with one stream of events.
//!
//! There is one execution path: [`Engine::run`] walks the stages of a new run, [`Engine::resume`] those of a stored one,
//! [`Engine::exec`] exactly one stage of a stored run, in whatever process a batch queue or another engine calls it.

pub(crate) mod beside;
pub(crate) mod floors;
mod heal;
mod select;
mod stage;
mod status;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicBool, Ordering},
};

use dsv3_core::{Cancel, Digest, Error, ErrorKind, Event, Events, Figure, Level, Outcome, run_id};
use dsv3_store::{CreateMode, EventLog, RunStatus, StageResult, Store, nonce};
use serde_json::Value;

pub use select::Selection;

use crate::{
    Engine,
    cached::{self, Found, Missing},
    error::{EngineError, chain},
    machine::Machine,
    plan::{Plan, PlannedStage},
    spec::LeaseSettings,
};

/// A checkpoint of a stage of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At {
    /// Name of the stage.
    pub stage: String,
    /// Number of the checkpoint.
    pub seq: u64,
}

/// What a caller decides about a run; nothing here changes results.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Which stages may run.
    pub select: Selection,
    /// Where events go, on the thread where they happen.
    pub events: Events,
    /// Asks the run to checkpoint and stop.
    pub cancel: Cancel,
    /// Compute threads told to stages; the plan's, else the machine's cores, when absent.
    pub threads: Option<usize>,
    /// Whether a serving stage keeps running until it is cancelled.
    pub stay: bool,
    /// How a person would start this run again, for its status and `report`.
    pub command: Option<String>,
    /// How runners keep apart, over what the plan says.
    pub lease: LeaseSettings,
    /// Does this stage again from this checkpoint, finished or not. It must come out the same.
    pub at: Option<At>,
}

impl Default for RunOptions {
    fn default() -> Self {
        let (events, cancel, lease) = (Events::none(), Cancel::new(), LeaseSettings::default());
        Self { select: Selection::All, events, cancel, threads: None, stay: false, command: None, lease, at: None }
    }
}

/// How one stage of a run went.
#[derive(Clone, Debug, PartialEq)]
pub struct StageReport {
    /// Name in the pipeline.
    pub stage: String,
    /// Its key.
    pub key: String,
    /// How it ended.
    pub outcome: Outcome,
    /// What it left behind; none unless it is done or was cached.
    pub result: Option<StageResult>,
}

/// How a run went.
#[derive(Clone, Debug, PartialEq)]
pub struct RunReport {
    /// Id of the run.
    pub run: String,
    /// The stages that were looked at, in order.
    pub stages: Vec<StageReport>,
    /// Closing figures by `stage.metric`.
    pub figures: BTreeMap<String, Figure>,
}

/// The names of outcomes in stored statuses.
fn state_name(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Done => "done",
        Outcome::Cached => "cached",
        Outcome::Cancelled => "cancelled",
        Outcome::Failed { .. } => "failed",
    }
}

fn outcome_of(error: &Error) -> Outcome {
    match error.kind {
        ErrorKind::Cancelled => Outcome::Cancelled,
        kind => Outcome::Failed { kind, messages: chain(error), help: error.help.clone() },
    }
}

/// Everything that the stages of one run share.
pub(crate) struct Run<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) plan: &'a Plan,
    pub(crate) store: &'a Store,
    pub(crate) id: &'a str,
    pub(crate) options: &'a RunOptions,
    /// The caller's events and the run's log.
    pub(crate) events: Events,
    reports: Vec<StageReport>,
    results: BTreeMap<String, StageResult>,
    /// Stages that may run.
    selected: BTreeSet<String>,
    /// Why the result of a stage that may not run cannot be used.
    broken: BTreeMap<String, String>,
    /// Stages that ran again because what they had made was damaged.
    healed: BTreeSet<String>,
    /// Whether another process of this very run goes on with a stage that this one gave up: what it says of the run counts.
    handed_over: AtomicBool,
}

impl Engine {
    /// Runs a plan as a new run.
    ///
    /// # Errors
    /// The error of the stage that failed, after everything committed was kept and `RunFinished` was sent; kind
    /// `Cancelled` when the run was asked to stop.
    pub async fn run(&self, plan: &Plan, options: &RunOptions) -> Result<RunReport, EngineError> {
        let store = self.open_store_with(&plan.store, &plan.store_options)?;
        let weaker = self.probe(&store, plan).await?;
        let random = u128::from_str_radix(&nonce(), 16).unwrap_or_default();
        let id = run_id(self.clock.unix_millis(), random);
        let names = options.select.names(plan)?;
        for (digest, bytes) in &plan.blobs {
            // Wrong digests cannot come from our own planning; the store names what it stored.
            let stored = store.put_blob(bytes.clone()).await?;
            debug_assert_eq!(stored, *digest);
        }
        store.create_run(&id, plan.to_bytes().into()).await?;
        // A collection may have taken what no run named until now.
        for bytes in plan.blobs.values() {
            store.put_blob(bytes.clone()).await?;
        }
        self.walk(&store, plan, &id, names, options, weaker).await
    }

    /// Goes on with a stored run under its own id.
    ///
    /// # Errors
    /// As [`Engine::run`]; Data when there is no such run.
    pub async fn resume(&self, store: &Store, id: &str, options: &RunOptions) -> Result<RunReport, EngineError> {
        let plan = self.stored_plan(store, id).await?;
        let names = options.select.names(&plan)?;
        let weaker = self.probe(store, &plan).await?;
        self.walk(store, &plan, id, names, options, weaker).await
    }

    /// Runs one stage of a stored run, from the store alone. Its upstream must be finished.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub async fn exec(
        &self,
        store: &Store,
        id: &str,
        stage: &str,
        options: &RunOptions,
    ) -> Result<RunReport, EngineError> {
        let plan = self.stored_plan(store, id).await?;
        plan.stage(stage)?;
        let names = vec![stage.to_owned()];
        let weaker = self.probe(store, &plan).await?;
        self.walk(store, &plan, id, names, options, weaker).await
    }

    /// Finds out whether the store honours conditional create; answers what a run says when it goes on without.
    async fn probe(&self, store: &Store, plan: &Plan) -> Result<Option<String>, EngineError> {
        let mode = store.probe(plan.store_options.conditional_create).await?;
        Ok((mode == CreateMode::SingleWriter).then(|| weaker_mode(store)))
    }

    async fn walk(
        &self,
        store: &Store,
        plan: &Plan,
        id: &str,
        names: Vec<String>,
        options: &RunOptions,
        weaker: Option<String>,
    ) -> Result<RunReport, EngineError> {
        let log = EventLog::start(store.clone(), id);
        let (to_log, to_caller) = (log.sink(), options.events.clone());
        let events = Events::new(move |event: Event| {
            to_log.emit(event.clone());
            to_caller.emit(event);
        });
        let started = self.clock.monotonic();
        let (reports, results) = (Vec::new(), BTreeMap::new());
        let handed_over = AtomicBool::new(false);
        let (selected, broken, healed) = (names.iter().cloned().collect(), BTreeMap::new(), BTreeSet::new());
        let mut run = Run {
            engine: self,
            plan,
            store,
            id,
            options,
            events,
            reports,
            results,
            selected,
            broken,
            healed,
            handed_over,
        };
        let ended = run.all(&names, weaker).await;
        let outcome = ended.as_ref().map_or_else(outcome_of, |()| Outcome::Done);
        let status = match run.handed_over.load(Ordering::SeqCst) {
            true => Ok(()),
            false => run.write_status(state_name(&outcome), None).await,
        };
        let figures = run.figures();
        let metrics = figures.iter().map(|(name, figure)| (name.clone(), figure_json(figure))).collect();
        let seconds = (self.clock.monotonic().saturating_sub(started)).as_secs_f64();
        run.events.emit(Event::RunFinished { run: id.to_owned(), outcome, seconds, metrics });
        let reports = run.reports;
        // The stage's own error matters more than one of the log.
        let closed = log.close().await;
        ended?;
        status?;
        closed?;
        Ok(RunReport { run: id.to_owned(), stages: reports, figures })
    }
}

/// `{"value", "floor", "ok"}` and what else a figure says.
/// What is said of a store that is used without conditional create.
pub(crate) fn weaker_mode(store: &Store) -> String {
    format!(
        "{} does not honour conditional create, and `conditional_create: single_writer` promises that no other process \
         works on it: two at a time could both commit",
        store.url()
    )
}

pub(crate) fn figure_json(figure: &Figure) -> Value {
    serde_json::to_value(figure).unwrap_or_default()
}

impl Run<'_> {
    async fn all(&mut self, names: &[String], weaker: Option<String>) -> Result<(), Error> {
        let (run, pipeline) = (self.id.to_owned(), self.plan.name.clone());
        self.events.emit(Event::RunStarted { run, pipeline, stages: names.to_vec() });
        if let Some(message) = weaker {
            self.warn("store", message);
        }
        self.write_status("running", None).await?;
        for stage in &self.plan.stages {
            let selected = names.contains(&stage.name);
            let needed = selected || self.needed_later(stage, names);
            if needed {
                self.one(stage, selected).await?;
            }
        }
        Ok(())
    }

    /// Whether a selected stage reads from this one.
    fn needed_later(&self, stage: &PlannedStage, names: &[String]) -> bool {
        names.iter().any(|name| self.plan.ancestors(name).contains(&stage.name))
    }

    /// One stage: cached, or run when it is selected. Stages that are not selected only lend their results.
    async fn one(&mut self, stage: &PlannedStage, selected: bool) -> Result<(), Error> {
        if self.options.cancel.is_cancelled() {
            return Err(Error::cancelled());
        }
        let entry = self.engine.entry(&stage.kind, stage.version)?;
        // What is finished now stays: this run's plan is there, so a later collection knows what it names.
        self.wait_for_collection(&stage.name).await?;
        let inputs = match cached::inputs(stage, &self.results) {
            Ok(inputs) => inputs,
            // An unselected stage whose own upstream was never run has no result either; whoever needs it will say so.
            Err(Missing::Stage(from)) if !selected => {
                // What a damaged result hides of later stages is hidden by it.
                if let Some(why) = self.broken.get(&from).cloned() {
                    self.broken.insert(stage.name.clone(), why);
                }
                return Ok(());
            }
            Err(Missing::Stage(from)) => return Err(self.lacks(stage, &from)),
            Err(Missing::Output(from, port)) => {
                let message =
                    format!("stage `{}` needs output `{port}`, which stage `{from}` did not make", stage.name);
                return Err(Error::invalid(message));
            }
        };
        let record = cached::key_record(self.plan, stage, &entry, &inputs)?;
        let key = record.key();
        let started = self.engine.clock.monotonic();
        let found = cached::find(self.store, self.plan, key).await?;
        let (outcome, result) = match found {
            Found::Whole(result) if !selected => {
                self.results.insert(stage.name.clone(), result);
                return Ok(());
            }
            Found::Whole(result) if self.again_from(stage).is_none() => (Ok(Outcome::Cached), Some(result)),
            Found::Broken(why) if !selected => {
                self.broken.insert(stage.name.clone(), why);
                return Ok(());
            }
            _ if !selected => return Ok(()),
            found => {
                if let Found::Broken(why) = &found {
                    self.warn(
                        &stage.name,
                        format!("the finished result cannot be used, so the stage runs again: {why}"),
                    );
                }
                // Its key is known from now on, also to a reader of the store whose run never comes to the end of it.
                self.write_status("running", Some((&stage.name, key))).await?;
                match self.execute_healed(stage, &entry, &record, &inputs).await {
                    Ok((outcome, result)) => (Ok(outcome), Some(result)),
                    Err(error) => (Err(error.context(format!("stage `{}`", stage.name))), None),
                }
            }
        };
        let seconds = self.engine.clock.monotonic().saturating_sub(started).as_secs_f64();
        self.finish(stage, key, outcome, result, seconds).await
    }

    async fn finish(
        &mut self,
        stage: &PlannedStage,
        key: Digest,
        outcome: Result<Outcome, Error>,
        result: Option<StageResult>,
        seconds: f64,
    ) -> Result<(), Error> {
        let said = outcome.as_ref().map_or_else(outcome_of, Clone::clone);
        let closing = result.as_ref().map(|result| floors::judge(stage, &result.metrics)).unwrap_or_default();
        let metrics = closing.iter().map(|(name, figure)| (name.clone(), figure_json(figure))).collect();
        let name = stage.name.clone();
        self.events.emit(Event::StageFinished { stage: name.clone(), outcome: said.clone(), seconds, metrics });
        if let Some(result) = &result {
            self.results.insert(name.clone(), result.clone());
        }
        self.reports.push(StageReport { stage: name, key: key.to_string(), outcome: said, result });
        let failed = outcome.err();
        if failed.is_none() {
            self.write_status("running", None).await?;
        }
        failed.map_or(Ok(()), Err)
    }

    pub(crate) async fn wait_for_collection(&self, stage: &str) -> Result<(), Error> {
        let told = |holder: &str| self.warn(stage, format!("waiting for {holder}, which removes what no run names"));
        let (clock, cancel) = (self.engine.clock.as_ref(), &self.options.cancel);
        Ok(self.store.wait_for_collection(clock, cancel, told).await?)
    }

    pub(crate) fn warn(&self, stage: &str, message: String) {
        self.events.emit(Event::Log { stage: stage.to_owned(), level: Level::Warn, message });
    }

    /// Writes what is known of the run; `begun` is a stage that starts now.
    async fn write_status(&self, state: &str, begun: Option<(&str, Digest)>) -> Result<(), Error> {
        let machine = Machine::this(self.options.threads.or(self.plan.threads));
        let command = self.options.command.as_deref();
        let unix_millis = self.engine.clock.unix_millis();
        let next = |before: Option<RunStatus>| {
            let before = before.map(|status| status.detail);
            let detail = status::detail(before, &self.plan.name, command, &machine, &self.reports, begun);
            RunStatus { format: RunStatus::FORMAT, state: state.to_owned(), unix_millis, detail }
        };
        Ok(self.store.update_status(self.id, next).await?)
    }

    /// Closing figures of the stages that ended well, by `stage.metric`.
    fn figures(&self) -> BTreeMap<String, Figure> {
        let mut figures = BTreeMap::new();
        for report in &self.reports {
            let stage = self.plan.stages.iter().find(|stage| stage.name == report.stage);
            let (Some(stage), Some(result)) = (stage, &report.result) else { continue };
            for (name, figure) in floors::judge(stage, &result.metrics) {
                figures.insert(format!("{}.{name}", report.stage), figure);
            }
        }
        figures
    }
}
