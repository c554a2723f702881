//! Settings and closing figures that all training stages share.

use dsv3_core::Error;
use dsv3_model::{Fp8Exceptions, Model};
use dsv3_ops::Precision;
use dsv3_stage::{Ctx, Problems};
use dsv3_train::{
    AdamWConfig, CheckpointEvery, GuardConfig, GuardRecord, RunOptions, Schedules, TrainHost, Trainer, TrainerConfig,
    schedule::Horizon,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::shared::tokens;

/// Length of a run. Schedules given as fractions are shares of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Length {
    /// Optimiser steps.
    Steps(u64),
    /// Tokens consumed, as `1600000` or `14.8e12`.
    Tokens(f64),
    /// Passes over the data.
    Epochs(f64),
}

impl Length {
    /// In steps or tokens, for data of `epoch_tokens` a pass.
    pub(crate) fn horizon(self, epoch_tokens: u64) -> Horizon {
        match self {
            Self::Steps(steps) => Horizon::Steps(steps),
            Self::Tokens(tokens) => Horizon::Tokens(tokens as u64),
            Self::Epochs(epochs) => Horizon::Tokens((epochs * epoch_tokens as f64) as u64),
        }
    }

    /// Problems of the number itself.
    pub(crate) fn check(self, at: &str, problems: &mut Problems) {
        let bad = match self {
            Self::Steps(steps) => steps == 0,
            Self::Tokens(count) | Self::Epochs(count) => !(count > 0.0 && count < 1e18),
        };
        if bad {
            problems.push(at, "a run needs a positive length", "");
        }
    }
}

/// How a training stage runs: optimiser, memory, checkpoints, guard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TrainingOptions {
    /// Precision of the products of linear layers: `f32`, `bf16`, or `fp8: {format, scales}`.
    pub(crate) precision: Precision,
    /// Exceptions of the report's FP8 recipe. Where there is none the key of the stage does not mention them.
    #[serde(skip_serializing_if = "Fp8Exceptions::is_none")]
    pub(crate) fp8_exceptions: Fp8Exceptions,
    /// AdamW.
    pub(crate) optimizer: AdamWConfig,
    /// Weight α of the sequence-wise balance loss.
    pub(crate) balance_alpha: f64,
    /// When checkpoints are written, besides the one at the end and the one on being stopped.
    #[schemars(extend("x-key" = "performance"))]
    pub(crate) checkpoint: CheckpointEvery,
    /// Steps between validations, besides those at the start and the end.
    pub(crate) validate_steps: Option<u64>,
    /// Skips steps that are not finite and goes back past loss spikes.
    pub(crate) guard: GuardConfig,
    /// Largest number of tokens of one forward pass; a step of more is split and its gradients are added.
    #[schemars(extend("x-key" = "numerics"))]
    pub(crate) micro_batch_tokens: usize,
    /// Rows whose logits are made at one time.
    #[schemars(extend("x-key" = "numerics"))]
    pub(crate) logit_rows: usize,
    /// Keeps layer inputs only and runs layers again in the backward pass.
    #[schemars(extend("x-key" = "performance"))]
    pub(crate) recompute: bool,
}

impl Default for TrainingOptions {
    fn default() -> Self {
        let trainer = TrainerConfig::default();
        Self {
            precision: Precision::Bf16,
            fp8_exceptions: Fp8Exceptions::default(),
            optimizer: AdamWConfig::default(),
            balance_alpha: 1e-4,
            checkpoint: CheckpointEvery::default(),
            validate_steps: None,
            guard: GuardConfig::default(),
            micro_batch_tokens: 4096,
            logit_rows: trainer.logit_rows,
            recompute: trainer.recompute,
        }
    }
}

impl TrainingOptions {
    /// Settings of the trainer.
    pub(crate) fn trainer(&self) -> TrainerConfig {
        TrainerConfig {
            adamw: self.optimizer,
            balance_alpha: self.balance_alpha,
            recompute: self.recompute,
            logit_rows: self.logit_rows,
        }
    }

    /// `model`, which has this precision already, as this configuration trains it.
    pub(crate) fn model(&self, mut model: Model) -> Model {
        model.set_fp8_exceptions(self.fp8_exceptions);
        model
    }

    /// Settings of the loop.
    pub(crate) fn run(&self, horizon: Horizon) -> RunOptions {
        RunOptions { horizon, checkpoint: self.checkpoint, validate_steps: self.validate_steps, guard: self.guard }
    }

    /// Problems that can be seen without data.
    pub(crate) fn check(&self, at: &str, problems: &mut Problems) {
        for (field, value) in [("micro_batch_tokens", self.micro_batch_tokens), ("logit_rows", self.logit_rows)] {
            if value == 0 {
                problems.push(format!("{at}.{field}"), "0 is refused: at least one is needed", "");
            }
        }
        if !(self.balance_alpha >= 0.0 && self.balance_alpha.is_finite()) {
            problems.push(format!("{at}.balance_alpha"), "a weight is 0 or more", "");
        }
        if !matches!(self.precision, Precision::Fp8 { .. }) {
            for (name, _) in self.fp8_exceptions.by_name().into_iter().filter(|(_, on)| *on) {
                let at = format!("{at}.fp8_exceptions.{name}");
                problems.push(at, "an exception to the FP8 recipe needs FP8", "set `precision: { fp8: {} }` beside it");
            }
        }
    }
}

/// Problems of schedules for a run of this length. How many tokens an epoch has is not known yet: what is wrong must be
/// wrong for a short and for a long one.
pub(crate) fn check_schedules(schedules: &Schedules, length: Length, at: &str, problems: &mut Problems) {
    let mut found = schedules.check(length.horizon(1));
    if matches!(length, Length::Epochs(_)) {
        let long = schedules.check(Horizon::Tokens(u64::MAX >> 8));
        found.retain(|problem| long.contains(problem));
    }
    for problem in found {
        problems.push(format!("{at}.{}", problem.path), problem.message, "");
    }
}

/// The context as the training loop wants it.
pub(crate) fn host(ctx: &Ctx) -> TrainHost<'_> {
    TrainHost {
        stage: ctx.stage(),
        events: ctx.events(),
        cancel: ctx.cancel(),
        clock: ctx.clock().as_ref(),
        checkpoints: ctx.checkpoints(),
        as_it_is: ctx.as_it_is(),
    }
}

/// Metrics of a step that follow from its schedules alone.
const SCHEDULED: [&str; 4] = ["lr", "sequences", "mtp_weight", "bias_speed"];

/// Publishes first, last and late values of the run's metrics and records what the guard did.
pub(crate) fn close(ctx: &Ctx, trainer: &Trainer) -> Result<(), Error> {
    let state = &trainer.state;
    ctx.set_metric("steps", (state.earlier_steps + state.step) as f64);
    ctx.set_metric("tokens", state.tokens as f64);
    for (name, figure) in state.figures.iter() {
        // Per-layer series and what schedules prescribe stay in the events; the closing table holds what was measured.
        if name.contains('.') || SCHEDULED.contains(&name) {
            continue;
        }
        // A count up to here has no first or late value worth telling.
        if name == tokens::ROWS_READ {
            ctx.set_metric(name, figure.last);
            continue;
        }
        ctx.set_metric(&format!("{name}_first"), figure.first);
        ctx.set_metric(&format!("{name}_last"), figure.last);
        if name.starts_with("val_loss") {
            ctx.set_metric(&format!("{name}_ratio"), figure.last / figure.first);
        }
        if name == "load_max_mean" {
            ctx.set_metric("load_max_mean_late", figure.late_mean());
        }
    }
    let records = serde_json::to_value(state.guard.lineage().collect::<Vec<_>>())
        .map_err(|source| Error::internal("the guard's records cannot be written").source(source))?;
    if records.as_array().is_some_and(|list| !list.is_empty()) {
        ctx.record_lineage(GuardRecord::SUBJECT, records);
    }
    Ok(())
}
