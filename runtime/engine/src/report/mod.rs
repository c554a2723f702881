//! What runs did, from their stores alone: state, stages, closing figures with mean and spread, metrics, lineage.
//!
//! Several runs of one report are meant to be several seeds of one pipeline. Everything comes from stored plans,
//! statuses, event logs and results; no pipeline file is read and nothing is computed again. Metrics of a cached stage
//! come from the logs of the runs that computed it, found by the stage's key; where no log has them the report says so.

mod families;
mod gather;
mod log;
mod spread;

use std::collections::BTreeMap;

use dsv3_core::{Error, Figure, GuardRecord};
use dsv3_store::Store;
use serde::Serialize;
use serde_json::Value;

use crate::{Engine, error::EngineError, machine::Machine, plan::Plan};

pub use families::{Contrast, Matrix, Variant};
pub use log::Attempt;
pub(crate) use log::scan;
pub use spread::Spread;

/// How far a stage of a run has come.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Standing {
    /// The run ran it to its end.
    Ran,
    /// The run found its result.
    Cached,
    /// It stopped at a checkpoint because it was asked to.
    Cancelled,
    /// It failed.
    Failed {
        /// The chain of causes.
        messages: Vec<String>,
    },
    /// It was begun and has not said how it ended: it runs, or its process is gone.
    Begun,
    /// The run was not asked for it; its result was there.
    Lent,
    /// The run was not asked for it, and nobody has finished it.
    Unasked,
    /// The run has not come to it.
    Waiting,
}

/// One stage of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReportedStage {
    /// Name in the pipeline.
    pub stage: String,
    /// Stage type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its key, once known.
    pub key: Option<String>,
    /// How far it has come.
    #[serde(flatten)]
    pub standing: Standing,
    /// Each time it was begun under this key, in this run or in others of the store.
    pub attempts: Vec<Attempt>,
    /// Whether it has finished and no log of the store says how.
    pub unlogged: bool,
    /// Warnings of those attempts, each once.
    pub warnings: Vec<String>,
    /// Closing figures, judged by the floors of the run's plan; empty until it has finished.
    pub figures: BTreeMap<String, Figure>,
    /// What the guard of a training stage did.
    pub incidents: Vec<GuardRecord>,
    /// What happened on the way, by subject; the guard's records among it.
    pub lineage: Value,
    /// Metrics as `[step, value]` by name, each step once.
    pub series: BTreeMap<String, Vec<(u64, f64)>>,
}

impl ReportedStage {
    /// Whether a result of it is there.
    pub fn has_finished(&self) -> bool {
        matches!(self.standing, Standing::Ran | Standing::Cached | Standing::Lent)
    }

    /// Seconds of all attempts that said how long they took; none when none did.
    pub fn seconds(&self) -> Option<f64> {
        let known: Vec<f64> = self.attempts.iter().filter_map(|attempt| attempt.seconds).collect();
        (!known.is_empty()).then(|| known.iter().sum())
    }
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReportedRun {
    /// Its id.
    pub run: String,
    /// URL of its store.
    pub store: String,
    /// Name of its pipeline.
    pub pipeline: String,
    /// Its seed.
    pub seed: u64,
    /// `running`, `done`, `cancelled` or `failed`; `unknown` when no status can be read.
    pub state: String,
    /// Milliseconds since 1970 of the last status.
    pub unix_millis: u64,
    /// Machines of the runs that computed its stages; empty when none was recorded.
    pub machines: Vec<Machine>,
    /// How a person would start it again, if that was recorded.
    pub command: Option<String>,
    /// Its stages in the order of the plan.
    pub stages: Vec<ReportedStage>,
}

/// A closing figure over all runs of a report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FigureRow {
    /// Stage that measured it.
    pub stage: String,
    /// Its name without the stage's.
    pub metric: String,
    /// What each run measured; none where its stage has not finished.
    pub figures: Vec<Option<Figure>>,
    /// Mean and spread; none when no run measured a finite value.
    pub spread: Option<Spread>,
}

/// What runs did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The runs, in the order they were asked for.
    pub runs: Vec<ReportedRun>,
    /// Closing figures, by stage in the order of the plan, then by name; numbers in names count as such.
    pub figures: Vec<FigureRow>,
    /// Figures by two numbers in their names, such as length and depth.
    pub matrices: Vec<Matrix>,
    /// Shares before and after.
    pub contrasts: Vec<Contrast>,
    /// What a reader of the whole should know, such as that the runs differ in more than their seed.
    pub notes: Vec<String>,
}

impl Report {
    /// Floors met and floors judged, over all runs.
    pub fn floors(&self) -> (usize, usize) {
        let verdicts = || self.figures.iter().flat_map(|row| &row.figures).flatten().filter_map(|figure| figure.ok);
        (verdicts().filter(|ok| *ok).count(), verdicts().count())
    }
}

impl Engine {
    /// Reports on runs, each in its store, from what the stores hold.
    ///
    /// # Errors
    /// Invalid when a run stands twice, or has neither finished a stage nor logged a metric; Data when a stored plan is
    /// missing or damaged; when a store cannot be read.
    pub async fn report(&self, runs: &[(Store, String)]) -> Result<Report, EngineError> {
        let (mut reported, mut plans) = (Vec::new(), Vec::new());
        for (i, (store, run)) in runs.iter().enumerate() {
            if runs[..i].iter().any(|(_, earlier)| earlier == run) {
                return Err(Error::invalid(format!("run {run} stands twice")).help("name each run once").into());
            }
            let plan = self.stored_plan(store, run).await?;
            let one = gather::run(self, store, run, &plan).await?;
            if !one.stages.iter().any(|stage| stage.has_finished() || !stage.series.is_empty()) {
                let message = format!("run {run} of {} has finished no stage and logged no metric yet", store.url());
                let help = format!("`dsv3-pipeline resume {run} --store {}` goes on with it", store.url());
                return Err(Error::invalid(message).help(help).into());
            }
            reported.push(one);
            plans.push(plan);
        }
        let figures = rows(&reported);
        let (matrices, contrasts) = (families::matrices(&figures), families::contrasts(&figures));
        Ok(Report { notes: differences(&reported, &plans), runs: reported, figures, matrices, contrasts })
    }
}

/// Every figure that a run has, in the order of the stages.
fn rows(runs: &[ReportedRun]) -> Vec<FigureRow> {
    let mut names: Vec<&str> = Vec::new();
    for stage in runs.iter().flat_map(|run| &run.stages) {
        if !names.contains(&stage.stage.as_str()) {
            names.push(&stage.stage);
        }
    }
    let mut rows = Vec::new();
    for name in names {
        let of = |run| figures_of(run, name);
        let per_run: Vec<Option<&BTreeMap<String, Figure>>> = runs.iter().map(of).collect();
        let mut metrics: Vec<&String> = per_run.iter().flatten().flat_map(|of| of.keys()).collect();
        metrics.sort_by_cached_key(|metric| families::reading_order(metric));
        metrics.dedup();
        for metric in metrics {
            let figures: Vec<Option<Figure>> =
                per_run.iter().map(|of| of.and_then(|of| of.get(metric).cloned())).collect();
            let spread = Spread::of(figures.iter().flatten().map(|figure| figure.value));
            rows.push(FigureRow { stage: name.to_owned(), metric: metric.clone(), figures, spread });
        }
    }
    rows
}

fn figures_of<'a>(run: &'a ReportedRun, name: &str) -> Option<&'a BTreeMap<String, Figure>> {
    run.stages.iter().find(|stage| stage.stage == name).map(|stage| &stage.figures)
}

/// In what the runs differ besides their seeds: then mean and spread are not those of one experiment.
fn differences(runs: &[ReportedRun], plans: &[Plan]) -> Vec<String> {
    let mut notes = Vec::new();
    let Some((first, others)) = plans.split_first() else { return notes };
    for (plan, run) in others.iter().zip(&runs[1..]) {
        let like = |other: &crate::PlannedStage| {
            let same = first.stages.iter().find(|stage| stage.name == other.name);
            same.is_some_and(|stage| {
                (&stage.kind, stage.version, &stage.config, &stage.inputs, &stage.hooks)
                    == (&other.kind, other.version, &other.config, &other.inputs, &other.hooks)
            })
        };
        let unlike: Vec<&str> =
            plan.stages.iter().filter(|stage| !like(stage)).map(|stage| stage.name.as_str()).collect();
        if !unlike.is_empty() || first.stages.len() != plan.stages.len() {
            let what = if unlike.is_empty() { "it lacks stages".to_owned() } else { unlike.join(", ") };
            notes.push(format!("runs {} and {} differ in more than their seed: {what}", runs[0].run, run.run));
        } else if plan.seed == first.seed {
            notes.push(format!("runs {} and {} have the same seed {}", runs[0].run, run.run, plan.seed));
        }
    }
    notes
}
