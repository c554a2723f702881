//! Reinforcement learning as [`Work`]: one step draws completions, scores them, and makes several policy updates.
//!
//! A step's minibatches are disjoint and cover its completions; with at least two, later ones are off-policy and the
//! clip has something to do. The reference of the KL term is the model the stage started from. Router biases stay as
//! they are. What a step does depends on the weights, the moments, the seed and the step's number only, so an
//! interrupted run ends with the same bits. Report §5.2.2, `reference/deepseek-v3.md` §8 and §14.

use std::collections::BTreeMap;

use dsv3_core::{Cancel, Error as CoreError, Rng, mix64, permute_index};
use dsv3_data::Tokenizer;
use dsv3_model::{Model, TrainOptions};
use dsv3_ops::Tensor;
use dsv3_train::{
    Error as TrainError, MicroBatch, StepReport, Trainer, Work,
    grpo::{self, Completion, GrpoConfig, StepSize},
    schedule::{Horizon, LrSchedule, Position},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::Error,
    reward::Scorer,
    rollout::{self, Draw, PathLogprobs, Prompt, Rollout},
    sft::split,
};

/// A run that must learn nothing, to hold an honest one against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// The rewards of each group are exchanged among its completions, by a permutation drawn from the seed, the step and
    /// the group. What the group earned stays, what it earned it for is lost: a run that still gains does not learn from
    /// its reward. Metrics show each completion's own reward.
    PermutedRewards,
}

/// Settings of the policy updates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RlConfig {
    /// Prompts per step.
    pub prompts_per_step: usize,
    /// Completions per prompt.
    pub group: usize,
    /// Updates per step; at least 2, or nothing is ever clipped.
    pub minibatches: usize,
    /// Sampling temperature of rollouts.
    pub temperature: f64,
    /// New tokens of a rollout at most.
    pub tokens_max: usize,
    /// Objective.
    pub objective: GrpoConfig,
    /// Learning rate over the steps.
    pub lr: LrSchedule,
    /// Makes the run a control. Absent: completions are paid their own rewards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<Control>,
    /// Largest number of tokens of a forward pass, unless one row is longer.
    #[schemars(extend("x-key" = "numerics"))]
    pub micro_batch_tokens: usize,
}

impl Default for RlConfig {
    fn default() -> Self {
        Self {
            prompts_per_step: 16,
            group: 8,
            minibatches: 2,
            temperature: 1.0,
            tokens_max: 256,
            objective: GrpoConfig::default(),
            lr: LrSchedule::constant(1e-6),
            control: None,
            micro_batch_tokens: 4096,
        }
    }
}

impl RlConfig {
    /// What is wrong with it: dotted path and message.
    pub fn check(&self, horizon: Horizon) -> Vec<(String, String)> {
        let mut problems: Vec<(String, String)> =
            self.lr.check(horizon).into_iter().map(|p| (format!("lr.{}", p.path), p.message)).collect();
        let mut refuse = |wrong: bool, path: &str, message: &str| {
            if wrong {
                problems.push((path.to_owned(), message.to_owned()));
            }
        };
        refuse(self.prompts_per_step == 0, "prompts_per_step", "a step needs at least one prompt");
        refuse(self.group < 2, "group", "an advantage compares at least two completions of a prompt");
        refuse(self.minibatches < 2, "minibatches", "with fewer than two updates per step nothing is ever clipped");
        refuse(self.tokens_max == 0, "tokens_max", "a completion needs at least one token");
        refuse(self.temperature <= 0.0, "temperature", "rollouts must be drawn, so the temperature is above 0");
        let completions = self.prompts_per_step * self.group;
        refuse(self.minibatches > completions, "minibatches", "there are fewer completions than minibatches");
        problems
    }
}

/// GRPO on a set of prompts.
pub struct Rl<'a> {
    /// Settings.
    pub config: RlConfig,
    /// What rollouts start from.
    pub prompts: Vec<Prompt>,
    /// Scores completions.
    pub scorer: &'a dyn Scorer,
    /// Decodes completions.
    pub tokenizer: &'a Tokenizer,
    /// The model the stage started from.
    pub reference: Model,
    /// Seed of the stage.
    pub seed: u64,
    /// Asks rollouts to stop.
    pub cancel: &'a Cancel,
    /// Figures taken with each validation.
    pub probe: Option<dsv3_train::Probe>,
}

/// What the updates of one step did.
#[derive(Default)]
struct Updates {
    loss: f64,
    kl_sum: f64,
    clipped: usize,
    grad_norms: Vec<f64>,
    skipped: u32,
}

impl Rl<'_> {
    fn prompt(&self, position: u64) -> &Prompt {
        let count = self.prompts.len() as u64;
        let key = mix64(mix64(self.seed) ^ mix64(position / count));
        &self.prompts[permute_index(position % count, count, key) as usize]
    }

    fn roll_out(&self, model: &Model, cursor: u64, step: u64) -> Result<Vec<Rollout>, TrainError> {
        let positions = cursor..cursor + self.config.prompts_per_step as u64;
        let prompts: Vec<&Prompt> = positions.map(|position| self.prompt(position)).collect();
        let RlConfig { group, temperature, tokens_max, control, .. } = self.config;
        let draw = Draw { group, temperature, tokens_max, control, seed: self.seed, step };
        let rollouts = rollout::roll_out(model, &prompts, draw, self.tokenizer, self.scorer, self.cancel);
        rollouts.map_err(|error| match error {
            Error::Generate { source: dsv3_infer::Error::Cancelled } => TrainError::Cancelled,
            error => TrainError::Source { step, source: CoreError::from(error) },
        })
    }

    /// All updates of a step; minibatches are dealt out in an order by (seed, step).
    fn update(
        &self,
        trainer: &mut Trainer,
        rollouts: &[Rollout],
        old: &PathLogprobs,
        reference: Option<&PathLogprobs>,
        lr: f64,
        step: u64,
    ) -> Result<Updates, TrainError> {
        let mut order: Vec<usize> = (0..rollouts.len()).filter(|i| !rollouts[*i].is_empty()).collect();
        Rng::new(self.seed).key("minibatch").key(step).shuffle(&mut order);
        let mut updates = Updates::default();
        let options = trainer.options();
        for first in 0..self.config.minibatches {
            let minibatch: Vec<usize> = order.iter().skip(first).step_by(self.config.minibatches).copied().collect();
            let tokens = minibatch.iter().map(|i| rollouts[*i].len()).sum();
            let size = StepSize { completions: minibatch.len(), tokens };
            let mut loss = 0.0;
            for items in split(&minibatch, self.config.micro_batch_tokens, |i| rollouts[*i].ids.len()) {
                let rows: Vec<&Rollout> = items.iter().map(|i| &rollouts[*i]).collect();
                let (batch, places) = rollout::batch(&rows);
                trainer.accumulate(&MicroBatch::from(batch), options, |out| {
                    let logp = out.logp.value.as_f32();
                    let completions: Vec<Completion> = items
                        .iter()
                        .zip(&places)
                        .map(|(i, place)| Completion {
                            logp: &logp[place.clone()],
                            old: &old.logp[*i],
                            reference: reference.map(|reference| &reference.logp[*i][..]),
                            advantage: rollouts[*i].advantage,
                        })
                        .collect();
                    let outcome = grpo::objective(&completions, size, &self.config.objective);
                    loss += outcome.loss;
                    updates.clipped += outcome.clipped_tokens;
                    updates.kl_sum += outcome.kl.iter().sum::<f64>();
                    let mut seed = vec![0.0; logp.len()];
                    for (place, d_logp) in places.iter().zip(&outcome.d_logp) {
                        seed[place.clone()].copy_from_slice(d_logp);
                    }
                    vec![(out.logp.id(), Tensor::f32(out.logp.value.shape(), seed))]
                })?;
            }
            let update = trainer.update(loss, lr)?;
            updates.loss += loss / self.config.minibatches as f64;
            updates.grad_norms.push(update.grad_norm);
            updates.skipped += u32::from(!update.applied);
        }
        Ok(updates)
    }
}

impl Work for Rl<'_> {
    fn step(&mut self, trainer: &mut Trainer, horizon: Horizon) -> Result<Option<StepReport>, TrainError> {
        let state = &trainer.state;
        let (step, cursor) = (state.step + 1, state.cursor);
        let at = Position { step, tokens: state.tokens, tokens_after: state.tokens };
        let lr = self.config.lr.at(at, horizon);
        let rollouts = self.roll_out(&trainer.model, cursor, step)?;
        let tokens = self.config.micro_batch_tokens;
        let path = |model: &Model, entropy: bool| {
            let options = TrainOptions { entropy, ..trainer.options() };
            rollout::path_logprobs(model, &rollouts, tokens, options)
                .map_err(|source| TrainError::Batch { step, source })
        };
        let old = path(&trainer.model, true)?;
        let needs_reference = self.config.objective.kl_beta != 0.0;
        let reference = needs_reference.then(|| path(&self.reference, false)).transpose()?;
        let updates = self.update(trainer, &rollouts, &old, reference.as_ref(), lr, step)?;
        let mut metrics = rollout_metrics(&rollouts, &old, self.config.group);
        let completions = rollouts.len().max(1) as f64;
        let new_tokens = rollouts.iter().map(Rollout::len).sum::<usize>().max(1) as f64;
        let norms = &updates.grad_norms;
        metrics.extend([
            ("loss".to_owned(), updates.loss),
            ("lr".to_owned(), lr),
            ("kl".to_owned(), updates.kl_sum / completions),
            ("clip_fraction".to_owned(), updates.clipped as f64 / new_tokens),
            ("grad_norm".to_owned(), norms.iter().sum::<f64>() / norms.len().max(1) as f64),
        ]);
        Ok(Some(StepReport {
            loss: updates.loss,
            skipped: updates.skipped,
            updates: updates.grad_norms.len() as u32,
            tokens: rollouts.iter().map(|rollout| rollout.ids.len() as u64).sum(),
            cursor: cursor + self.config.prompts_per_step as u64,
            metrics,
        }))
    }

    fn validate(&mut self, model: &Model) -> Result<Vec<(String, f64)>, TrainError> {
        match &mut self.probe {
            Some(probe) => probe(model).map_err(|source| TrainError::Source { step: 0, source }),
            None => Ok(Vec::new()),
        }
    }
}

/// Rewards, lengths, entropy and the distance between rollout and training path.
fn rollout_metrics(rollouts: &[Rollout], old: &PathLogprobs, group: usize) -> Vec<(String, f64)> {
    let count = rollouts.len().max(1) as f64;
    let mean = |value: &dyn Fn(&Rollout) -> f64| rollouts.iter().map(value).sum::<f64>() / count;
    let reward = mean(&|r| r.score.total);
    let variance = mean(&|r| (r.score.total - reward).powi(2));
    let length = mean(&|r| r.len() as f64);
    let flat = rollouts.chunks(group.max(1)).filter(|group| group.iter().all(|r| r.advantage == 0.0)).count();
    let mut parts: BTreeMap<&str, f64> = BTreeMap::new();
    for (name, value) in rollouts.iter().flat_map(|rollout| &rollout.score.parts) {
        *parts.entry(name).or_default() += value;
    }
    let mut metrics = vec![
        ("reward_mean".to_owned(), reward),
        ("reward_std".to_owned(), variance.sqrt()),
        ("length_mean".to_owned(), length),
        ("finished_share".to_owned(), mean(&|r| f64::from(u8::from(r.finished)))),
        ("flat_group_share".to_owned(), flat as f64 * group as f64 / count),
        ("entropy".to_owned(), old.entropy_sum / (length * count).max(1.0)),
        ("logprob_gap_max".to_owned(), rollout::largest_gap(rollouts, &old.logp)),
    ];
    metrics.extend(parts.into_iter().map(|(name, value)| (format!("reward.{name}"), value / count)));
    metrics
}

#[cfg(test)]
mod tests;
