//! The kill matrix: trials counted by stage and kind of operation.

use std::collections::BTreeMap;

use dsv3_store::faults::Fault;
use serde::Serialize;

use super::{ChaosTrial, TrialEnd};

/// All trials of a chaos run.
#[derive(Clone, Debug)]
pub struct ChaosReport {
    /// The seed they were drawn with.
    pub seed: u64,
    /// Stages in order, with the operations of their undisturbed runs.
    pub stages: Vec<(String, usize)>,
    /// Points there are; the trials are all of them or a sample.
    pub points: usize,
    /// Figures, as `stage.metric`, that are a clock's and not compared: two undisturbed runs gave different ones.
    pub clocked: Vec<String>,
    /// The trials, in the order of stages, operations and faults.
    pub trials: Vec<ChaosTrial>,
}

/// A row of the matrix.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ChaosRow {
    /// Name of the stage.
    pub stage: String,
    /// Operation and what it is of, such as `create checkpoint`.
    pub operation: String,
    /// Points tried.
    pub points: usize,
    /// Of these, met by no operation.
    pub not_met: usize,
    /// Disturbed attempts that went on to their end.
    pub survived: usize,
    /// Attempts in all.
    pub attempts: u32,
    /// Attempts that went on from a checkpoint.
    pub resumed: u32,
    /// Crashes after the first.
    pub further_crashes: u32,
    /// Trials that ended as the undisturbed run did.
    pub identical: usize,
}

impl ChaosReport {
    /// Trials that did not end as the undisturbed run did.
    pub fn failed(&self) -> impl Iterator<Item = &ChaosTrial> {
        self.trials.iter().filter(|trial| trial.problem.is_some())
    }

    /// Trials by stage and operation, in the order of the stages.
    pub fn rows(&self) -> Vec<ChaosRow> {
        self.rows_by(|trial| trial.point.stage.clone())
    }

    /// As [`Self::rows`], over all stages together.
    pub fn totals(&self) -> Vec<ChaosRow> {
        self.rows_by(|_| String::new())
    }

    /// Trials by fault: points, met, ended as undisturbed.
    pub fn faults(&self) -> BTreeMap<Fault, (usize, usize, usize)> {
        let mut faults = BTreeMap::new();
        for trial in &self.trials {
            let row: &mut (usize, usize, usize) = faults.entry(trial.point.fault).or_default();
            row.0 += 1;
            row.1 += usize::from(trial.end != TrialEnd::NotMet);
            row.2 += usize::from(trial.problem.is_none());
        }
        faults
    }

    fn rows_by(&self, stage: impl Fn(&ChaosTrial) -> String) -> Vec<ChaosRow> {
        let place = |name: &str| self.stages.iter().position(|(stage, _)| stage == name);
        let mut rows: BTreeMap<_, ChaosRow> = BTreeMap::new();
        for trial in &self.trials {
            let (stage, operation) = (stage(trial), &trial.point.operation);
            let key = (place(&stage), operation.kind, operation.class());
            let row = rows.entry(key).or_default();
            (row.stage, row.operation) = (stage, format!("{} {}", operation.kind, operation.class()));
            row.points += 1;
            row.not_met += usize::from(trial.end == TrialEnd::NotMet);
            row.survived += usize::from(trial.end == TrialEnd::Survived);
            row.attempts += trial.attempts;
            row.resumed += trial.resumed;
            row.further_crashes += trial.further_crashes;
            row.identical += usize::from(trial.problem.is_none());
        }
        rows.into_values().collect()
    }
}
