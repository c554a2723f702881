//! One optimiser step: forward and backward over micro-batches, norm, clip, update, router biases.
//!
//! Everything a later step depends on is the model (masters, router biases), the optimiser (moments, update count) and
//! [`TrainerState`]; a checkpoint holds exactly these, so a restored trainer takes the same next step, bit for bit.

use dsv3_model::{Model, TrainOptions, TrainOut};
use dsv3_ops::{Tape, Tensor, VarId, WeightGrads};
use serde::{Deserialize, Serialize};

use crate::{
    adamw::{AdamW, AdamWConfig, gradient_norm},
    error::{Error, Result},
    figures::Figures,
    guard::GuardState,
    loss::{self, Divisors, LossWeights, Losses, MicroBatch},
    router_bias::{self, Loads},
};

/// What a run has done, besides weights and moments. Holds no clock and no rate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Which phase of the stage this is, from 0.
    pub phase: u32,
    /// Steps of the phases before it.
    pub earlier_steps: u64,
    /// Steps done in this phase; the next one is `step + 1`.
    pub step: u64,
    /// Position in the loading order after the last step.
    pub cursor: u64,
    /// Tokens consumed.
    pub tokens: u64,
    /// What the guard remembers.
    pub guard: GuardState,
    /// First, last and late values of every metric.
    pub figures: Figures,
    /// Step after which the model was last validated.
    pub validated_step: Option<u64>,
}

/// Settings of a trainer that do not change during a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainerConfig {
    /// Optimiser.
    pub adamw: AdamWConfig,
    /// α of the balance loss.
    pub balance_alpha: f64,
    /// Keep layer inputs only and run layers again in the backward pass.
    pub recompute: bool,
    /// Rows whose logits are made at one time.
    pub logit_rows: usize,
}

impl Default for TrainerConfig {
    fn default() -> Self {
        Self { adamw: AdamWConfig::default(), balance_alpha: 1e-4, recompute: false, logit_rows: 256 }
    }
}

/// What the schedules say about one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Learning rate.
    pub lr: f64,
    /// λ; 0 leaves the prediction modules out.
    pub mtp_weight: f64,
    /// γ; 0 leaves the biases alone.
    pub bias_speed: f64,
}

/// A model being trained.
#[derive(Clone)]
pub struct Trainer {
    /// The model.
    pub model: Model,
    /// Its optimiser.
    pub optimizer: AdamW,
    /// What the run has done.
    pub state: TrainerState,
    config: TrainerConfig,
    grads: WeightGrads,
}

/// What an optimiser update did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// L2 norm of the gradient of all parameters, before clipping.
    pub grad_norm: f64,
    /// Whether it was scaled down.
    pub clipped: bool,
    /// Whether the update was applied: false when loss or norm is not finite.
    pub applied: bool,
}

/// What one step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepMetrics {
    /// Its losses, before the update.
    pub losses: Losses,
    /// Main + λ/D·ΣL_k + balance.
    pub total: f64,
    /// The update.
    pub update: Update,
    /// Tokens sent to every expert, by layer.
    pub loads: Loads,
    /// Learning rate.
    pub lr: f64,
}

impl Trainer {
    /// A trainer at step 0 with zero moments.
    ///
    /// # Errors
    /// When the model has no masters.
    pub fn new(model: Model, config: TrainerConfig) -> Result<Self> {
        if let Some(at) = model.params().iter().position(|param| param.master.is_none()) {
            return Err(Error::NotTrainable { name: model.infos()[at].name.clone() });
        }
        let optimizer = AdamW::new(config.adamw, &model);
        Ok(Self { model, optimizer, state: TrainerState::default(), config, grads: WeightGrads::default() })
    }

    /// The trainer of the next phase: same weights, zero moments, step 0; figures and records are kept.
    #[must_use]
    pub fn next_phase(mut self, config: TrainerConfig) -> Self {
        self.optimizer = AdamW::new(config.adamw, &self.model);
        self.config = config;
        let before = std::mem::take(&mut self.state);
        self.state = TrainerState {
            phase: before.phase + 1,
            earlier_steps: before.earlier_steps + before.step,
            guard: before.guard.next_phase(),
            figures: before.figures,
            ..TrainerState::default()
        };
        self
    }

    /// Settings.
    pub fn config(&self) -> &TrainerConfig {
        &self.config
    }

    /// One step over `micro_batches`: means over all of them, one update, then the router biases.
    /// Counts nothing; the caller advances [`TrainerState`].
    ///
    /// # Errors
    /// When the model cannot take a batch, or no position has a target.
    pub fn train_step(&mut self, micro_batches: &[MicroBatch], rates: Rates) -> Result<StepMetrics> {
        // On a thread of the pool: one outside it would sleep and be woken around every parallel loop.
        rayon::scope(|_| self.step_in_pool(micro_batches, rates))
    }

    fn step_in_pool(&mut self, micro_batches: &[MicroBatch], rates: Rates) -> Result<StepMetrics> {
        let depths = self.model.config.num_nextn_predict_layers;
        let divisors = Divisors::of(micro_batches);
        if divisors.weight <= 0.0 {
            return Err(Error::NoTargets { step: self.state.step + 1 });
        }
        let weights = LossWeights { mtp: rates.mtp_weight, balance: self.config.balance_alpha };
        let options =
            TrainOptions { mtp: rates.mtp_weight != 0.0, balance: self.config.balance_alpha != 0.0, ..self.options() };
        let (mut losses, mut loads) = (Losses::default(), Loads::new());
        for micro in micro_batches {
            self.accumulate(micro, options, |out| {
                let (share, seeds) = loss::seeds(out, micro, divisors, weights, depths);
                losses.add(&share);
                router_bias::add_loads(&mut loads, &out.loads);
                seeds
            })?;
        }
        let total = losses.total(rates.mtp_weight, depths);
        let update = self.update(total, rates.lr)?;
        if update.applied {
            router_bias::update(&mut self.model, &loads, rates.bias_speed);
        }
        Ok(StepMetrics { losses, total, update, loads, lr: rates.lr })
    }

    /// Options of a training pass by this trainer's settings, without losses.
    pub fn options(&self) -> TrainOptions {
        let TrainerConfig { recompute, logit_rows, .. } = self.config;
        TrainOptions { mtp: false, balance: false, recompute, logit_rows, ..TrainOptions::default() }
    }

    /// Forward and backward over one micro-batch; `seeds` makes the gradients the backward pass starts from.
    /// Weight gradients add up until [`Trainer::update`].
    ///
    /// # Errors
    /// When the model cannot take the batch.
    pub fn accumulate(
        &mut self,
        micro: &MicroBatch,
        options: TrainOptions,
        seeds: impl FnOnce(&TrainOut) -> Vec<(VarId, Tensor)>,
    ) -> Result<()> {
        let mut tape = Tape::new();
        let step = self.state.step + 1;
        let out = self.model.forward_train(&mut tape, &micro.batch, options);
        let out = out.map_err(|source| Error::Batch { step, source })?;
        let seeds = seeds(&out);
        // Activations go as soon as their op has run backwards; only the tape still holds them.
        drop(out);
        tape.backward(seeds, &mut self.grads);
        Ok(())
    }

    /// Applies the gradients gathered so far, unless they or `loss` are not finite, and clears them.
    ///
    /// # Errors
    /// When a parameter has no master.
    pub fn update(&mut self, loss: f64, lr: f64) -> Result<Update> {
        let grad_norm = gradient_norm(&self.model, &self.grads);
        let applied = loss.is_finite() && grad_norm.is_finite();
        let clipped = applied && self.optimizer.step(&mut self.model, &mut self.grads, grad_norm, lr)?;
        self.grads.clear();
        Ok(Update { grad_norm, clipped, applied })
    }

    /// Gradients gathered since the last update.
    pub fn gradients(&self) -> &WeightGrads {
        &self.grads
    }

    /// Main and prediction losses of `micro_batches` without training; one value per depth.
    ///
    /// # Errors
    /// When the model cannot take a batch.
    pub fn evaluate(model: &Model, micro_batches: &[MicroBatch]) -> Result<Losses> {
        let depths = model.config.num_nextn_predict_layers;
        let divisors = Divisors::of(micro_batches);
        let weights = LossWeights { mtp: 0.0, balance: 0.0 };
        let options = TrainOptions { balance: false, ..TrainOptions::default() };
        let mut losses = Losses::default();
        for micro in micro_batches {
            let out = model.forward_train(&mut Tape::inference(), &micro.batch, options);
            let out = out.map_err(|source| Error::Batch { step: 0, source })?;
            losses.add(&loss::seeds(&out, micro, divisors, weights, depths).0);
        }
        Ok(losses)
    }
}
