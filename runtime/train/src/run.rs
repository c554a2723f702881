//! The loop every kind of training shares: resume, step, guard, metrics, validation, checkpoints, stop.
//!
//! What a step does is [`Work`]: supervised steps over a data source here, rollouts and updates in reinforcement
//! learning. A run may have phases, such as the two of context extension; a checkpoint names its phase.
//!
//! **Invariant**: a step depends on the trainer's state and the configuration only. So a run that was killed and resumed
//! ends with the same bits as one that was not, and its first step is that of the checkpoint plus one.

use std::time::Duration;

use dsv3_core::Level;
use dsv3_model::Model;
use dsv3_store::Buffers;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::Snapshot,
    error::{Error, Result},
    guard::{GuardConfig, GuardRecord, StepFacts, Verdict},
    host::TrainHost,
    schedule::Horizon,
    trainer::{Trainer, TrainerState},
};

/// When checkpoints are written, besides the one at the end and the one on being stopped.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointEvery {
    /// Steps between two.
    pub steps: Option<u64>,
    /// Minutes between two.
    pub minutes: Option<f64>,
    /// Shards in which a checkpoint is written, each with its slice of every tensor; any number of them is read back.
    #[schemars(range(min = 1, max = 4096))]
    pub shards: u32,
}

impl Default for CheckpointEvery {
    fn default() -> Self {
        Self { steps: None, minutes: Some(5.0), shards: 1 }
    }
}

/// Settings of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunOptions {
    /// Where it ends.
    pub horizon: Horizon,
    /// When checkpoints are written.
    pub checkpoint: CheckpointEvery,
    /// Steps between validations, besides those at the start and the end.
    pub validate_steps: Option<u64>,
    /// When the guard steps in.
    pub guard: GuardConfig,
}

impl RunOptions {
    /// A run of this length with default checkpoints and guard.
    pub fn new(horizon: Horizon) -> Self {
        let checkpoint = CheckpointEvery::default();
        Self { horizon, checkpoint, validate_steps: None, guard: GuardConfig::default() }
    }
}

/// What a step did, for the loop.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Loss the guard watches.
    pub loss: f64,
    /// Updates that were not applied because loss or gradient was not finite.
    pub skipped: u32,
    /// All updates of the step.
    pub updates: u32,
    /// Tokens consumed.
    pub tokens: u64,
    /// Position in the loading order after it.
    pub cursor: u64,
    /// Name and value of every metric; no clock, no rate.
    pub metrics: Vec<(String, f64)>,
}

/// A kind of training.
pub trait Work {
    /// Does step `trainer.state.step + 1`. `None` when the data has ended.
    ///
    /// # Errors
    /// When data cannot be read, or the model cannot take it; [`Error::Cancelled`] if the trainer is unchanged.
    fn step(&mut self, trainer: &mut Trainer, horizon: Horizon) -> Result<Option<StepReport>>;

    /// Figures of the model on data it does not train on.
    ///
    /// # Errors
    /// When data cannot be read, or the model cannot take it.
    fn validate(&mut self, _model: &Model) -> Result<Vec<(String, f64)>> {
        Ok(Vec::new())
    }
}

/// Phase of the newest checkpoint of the stage, if there is one: phases before it need not run again.
///
/// # Errors
/// When checkpoints cannot be read.
pub fn stored_phase(host: &TrainHost<'_>) -> Result<Option<u32>> {
    let phase = |state: &serde_json::Value| state.pointer("/state/phase").and_then(serde_json::Value::as_u64);
    Ok(host.latest()?.map(|checkpoint| phase(&checkpoint.state).unwrap_or(0) as u32))
}

/// Trains until `options.horizon` or the end of the data, from the newest checkpoint if there is one of this phase.
/// The trainer then holds the result; its state has the figures and the guard's records.
///
/// Checkpoints are committed while the run goes on; whichever way it ends, it waits for the last of them.
///
/// # Errors
/// [`Error::Cancelled`] after a checkpoint when the host asks to stop; otherwise whatever the step, the guard or the
/// store reports.
pub fn run_training(
    trainer: &mut Trainer,
    work: &mut dyn Work,
    host: &TrainHost<'_>,
    options: &RunOptions,
) -> Result<()> {
    let ended = train(trainer, work, host, options);
    let saved = host.finish();
    match ended {
        // A stop that left no checkpoint is no orderly stop.
        Ok(()) | Err(Error::Cancelled) => saved.and(ended),
        Err(error) => Err(error),
    }
}

fn train(trainer: &mut Trainer, work: &mut dyn Work, host: &TrainHost<'_>, options: &RunOptions) -> Result<()> {
    let buffers = trainer.snapshot_buffers(options.checkpoint.shards as usize)?;
    let mut run = Run { host, options, saved_step: None, saved_at: host.clock.monotonic(), origin: None, buffers };
    run.resume(trainer)?;
    if host.as_it_is {
        return Ok(());
    }
    if trainer.state.step == 0 {
        run.validate(trainer, work)?;
    }
    if run.saved_step.is_none() && options.guard.spike_steps > 0 {
        run.origin = Some(trainer.snapshot_into(&run.buffers, options.checkpoint.shards as usize)?);
    } else {
        run.buffers.prepare();
    }
    loop {
        let state = &trainer.state;
        if options.horizon.is_over(state.step, state.tokens) {
            break;
        }
        if host.cancel.is_cancelled() {
            run.save_unless_suspicious(trainer)?;
            return Err(Error::Cancelled);
        }
        host.poll()?;
        let started = host.clock.monotonic();
        let report = match work.step(trainer, options.horizon) {
            // A step that stops half-way has changed nothing yet.
            Err(Error::Cancelled) => {
                run.save_unless_suspicious(trainer)?;
                return Err(Error::Cancelled);
            }
            report => report?,
        };
        let Some(report) = report else { break };
        let state = &trainer.state;
        let facts = StepFacts {
            step: state.earlier_steps + state.step + 1,
            samples: state.cursor..report.cursor,
            loss: report.loss,
            skipped: report.skipped,
            updates: report.updates,
        };
        run.advance(trainer, &report, started);
        if run.obey(trainer, facts)? {
            continue;
        }
        if options.validate_steps.is_some_and(|every| trainer.state.step.is_multiple_of(every.max(1))) {
            run.validate(trainer, work)?;
        }
        if run.checkpoint_is_due(trainer) {
            run.save(trainer)?;
        }
    }
    if options.validate_steps.is_none_or(|every| !trainer.state.step.is_multiple_of(every.max(1))) {
        run.validate_once(trainer, work)?;
    }
    if run.saved_step != Some(trainer.state.step) { run.save(trainer) } else { Ok(()) }
}

struct Run<'a> {
    host: &'a TrainHost<'a>,
    options: &'a RunOptions,
    saved_step: Option<u64>,
    saved_at: Duration,
    /// The start of the run, to go back to while there is no checkpoint.
    origin: Option<Snapshot>,
    /// Memory of one copy of the trainer: the start of the run, then each checkpoint until it is committed.
    buffers: Buffers,
}

impl Run<'_> {
    fn resume(&mut self, trainer: &mut Trainer) -> Result<()> {
        let latest = self.host.latest()?.filter(|checkpoint| {
            let phase = checkpoint.state.pointer("/state/phase").and_then(serde_json::Value::as_u64);
            phase == Some(u64::from(trainer.state.phase))
        });
        if let Some(checkpoint) = latest {
            self.host.restore(trainer, &checkpoint)?;
            self.saved_step = Some(trainer.state.step);
        }
        Ok(())
    }

    /// Counts a step and tells what it did.
    fn advance(&self, trainer: &mut Trainer, report: &StepReport, started: Duration) {
        let state = &mut trainer.state;
        let share = progress(state, self.options.horizon);
        state.step += 1;
        state.cursor = report.cursor;
        state.tokens += report.tokens;
        let step = state.earlier_steps + state.step;
        for (name, value) in &report.metrics {
            state.figures.note(name, *value, share);
            self.host.metric(name, step, *value);
        }
        let seconds = (self.host.clock.monotonic().saturating_sub(started)).as_secs_f64();
        if seconds > 0.0 {
            self.host.metric("tokens_per_second", step, report.tokens as f64 / seconds);
        }
        match self.options.horizon {
            Horizon::Tokens(total) => self.host.progress(state.tokens.min(total), total, "tokens"),
            Horizon::Steps(total) => self.host.progress(state.step, total, "steps"),
        }
    }

    /// Does what the guard says; true when the run went back to a checkpoint.
    fn obey(&mut self, trainer: &mut Trainer, facts: StepFacts) -> Result<bool> {
        let step = facts.step;
        match trainer.state.guard.judge(&self.options.guard, &facts) {
            Verdict::Fine => Ok(false),
            Verdict::Skipped(record) => {
                self.host.log(Level::Warn, record.to_string());
                Ok(false)
            }
            Verdict::Rewind(record) => self.rewind(trainer, record).map(|()| true),
            Verdict::TooManySkips(record, count) => {
                self.host.log(Level::Warn, record.to_string());
                Err(Error::NotFinite { step, count })
            }
            Verdict::TooManyRewinds(count) => Err(Error::Spikes { step, count }),
        }
    }

    fn rewind(&mut self, trainer: &mut Trainer, mut record: GuardRecord) -> Result<()> {
        // The checkpoint does not know of what was left out after it.
        let before = std::mem::take(&mut trainer.state.guard.records);
        match (&self.origin, self.saved_step) {
            (Some(origin), None) => trainer.restore(&origin.state, &origin.tensors, |name| origin.read(name))?,
            _ => {
                let checkpoint = self.host.latest()?.ok_or_else(|| {
                    let problem = "there is none to go back to";
                    Error::Checkpoint { file: "latest".to_owned(), problem: problem.to_owned() }
                })?;
                self.host.restore(trainer, &checkpoint)?;
            }
        }
        let state = &mut trainer.state;
        record.back_to_step = Some(state.earlier_steps + state.step);
        self.host.log(Level::Warn, record.to_string());
        state.guard.keep_rewinds(before);
        state.guard.note(record);
        Ok(())
    }

    fn validate(&self, trainer: &mut Trainer, work: &mut dyn Work) -> Result<()> {
        let figures = work.validate(&trainer.model)?;
        let state = &mut trainer.state;
        let share = progress(state, self.options.horizon);
        for (name, value) in figures {
            state.figures.note(&name, value, share);
            self.host.metric(&name, state.earlier_steps + state.step, value);
        }
        state.validated_step = Some(state.step);
        Ok(())
    }

    /// The validation at the end, unless the checkpoint resumed from has it already.
    fn validate_once(&self, trainer: &mut Trainer, work: &mut dyn Work) -> Result<()> {
        if trainer.state.validated_step == Some(trainer.state.step) {
            return Ok(());
        }
        self.validate(trainer, work)
    }

    fn checkpoint_is_due(&self, trainer: &Trainer) -> bool {
        if trainer.state.guard.is_suspicious() {
            return false;
        }
        let CheckpointEvery { steps, minutes, .. } = self.options.checkpoint;
        let by_steps = steps.is_some_and(|every| trainer.state.step.is_multiple_of(every.max(1)));
        let waited = self.host.clock.monotonic().saturating_sub(self.saved_at).as_secs_f64();
        by_steps || minutes.is_some_and(|minutes| waited >= minutes * 60.0)
    }

    fn save(&mut self, trainer: &Trainer) -> Result<()> {
        // From here on there is a checkpoint to go back to, or the run ends; its memory is what the copy needs.
        self.origin = None;
        self.host.save(trainer, &self.buffers, self.options.checkpoint.shards as usize)?;
        self.saved_step = Some(trainer.state.step);
        self.saved_at = self.host.clock.monotonic();
        Ok(())
    }

    /// The checkpoint on being stopped. Under suspicion none is written: the run goes on from the one before.
    fn save_unless_suspicious(&mut self, trainer: &Trainer) -> Result<()> {
        if trainer.state.guard.is_suspicious() || self.saved_step == Some(trainer.state.step) {
            return Ok(());
        }
        self.save(trainer)
    }
}

/// Share of the run done.
fn progress(state: &TrainerState, horizon: Horizon) -> f64 {
    let done = match horizon {
        Horizon::Steps(_) => state.step,
        Horizon::Tokens(_) => state.tokens,
    };
    done as f64 / horizon.total().max(1) as f64
}

#[cfg(test)]
mod tests;
