//! The training loss as seeds of a backward pass.
//!
//! L = L_main + (λ/D)·Σ_k L_k + α·Σ_layers balance, over the whole step:
//! L_main = −Σ w·logp / W with W = Σ w over the step's positions that have a target; L_k = −Σ w·logp_k / W with the
//! same W, so that in a row of T + 1 tokens depth k, which has T − k targets, is divided by T; a balance loss is a mean
//! over the sequences of the step. w is 1 unless a batch brings weights. Micro-batches split a step without changing it.
//! `reference/deepseek-v3.md` §3, §4 and §14.

use dsv3_model::{Batch, TrainOut};
use dsv3_ops::{Tensor, VarId};

/// One micro-batch.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// Tokens, targets, boundaries.
    pub batch: Batch,
    /// Weight of each position's target, `[T]`; all 1 when absent.
    pub weights: Option<Vec<f32>>,
}

impl From<Batch> for MicroBatch {
    fn from(batch: Batch) -> Self {
        Self { batch, weights: None }
    }
}

impl MicroBatch {
    fn weight(&self, position: usize) -> f32 {
        if self.batch.targets[position] == Batch::NO_TARGET {
            return 0.0;
        }
        self.weights.as_ref().map_or(1.0, |weights| weights[position])
    }

    /// Σ w over the positions that have a target.
    pub fn weight_sum(&self) -> f64 {
        (0..self.batch.ids.len()).map(|position| f64::from(self.weight(position))).sum()
    }

    /// Sequences that have any token.
    pub fn sequences(&self) -> usize {
        self.batch.spans.iter().filter(|span| !span.is_empty()).count()
    }
}

/// What the losses of a whole step are divided by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divisors {
    /// Σ w.
    pub weight: f64,
    /// Sequences.
    pub sequences: f64,
}

impl Divisors {
    /// Of all micro-batches of a step.
    pub fn of(micro_batches: &[MicroBatch]) -> Self {
        Self {
            weight: micro_batches.iter().map(MicroBatch::weight_sum).sum(),
            sequences: micro_batches.iter().map(MicroBatch::sequences).sum::<usize>() as f64,
        }
    }
}

/// Weights of the parts of the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossWeights {
    /// λ, spread over the depths.
    pub mtp: f64,
    /// α.
    pub balance: f64,
}

/// Losses of a step, or the share of one micro-batch in them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Losses {
    /// Cross-entropy of the next token.
    pub main: f64,
    /// L_k of each depth, without λ.
    pub mtp: Vec<f64>,
    /// Balance losses of all layers, α included.
    pub balance: f64,
    /// Balance loss of each layer, α included.
    pub balance_layers: Vec<(usize, f64)>,
}

impl Losses {
    /// Adds the share of another micro-batch.
    pub fn add(&mut self, other: &Self) {
        self.main += other.main;
        self.balance += other.balance;
        self.mtp.resize(self.mtp.len().max(other.mtp.len()), 0.0);
        self.mtp.iter_mut().zip(&other.mtp).for_each(|(sum, x)| *sum += x);
        for (layer, x) in &other.balance_layers {
            match self.balance_layers.iter_mut().find(|(there, _)| there == layer) {
                Some((_, sum)) => *sum += x,
                None => self.balance_layers.push((*layer, *x)),
            }
        }
    }

    /// λ/D · Σ_k L_k for a model of `depths` prediction modules.
    pub fn mtp_total(&self, weight: f64, depths: usize) -> f64 {
        self.mtp.iter().sum::<f64>() * weight / depths.max(1) as f64
    }

    /// Everything together.
    pub fn total(&self, mtp_weight: f64, depths: usize) -> f64 {
        self.main + self.mtp_total(mtp_weight, depths) + self.balance
    }
}

/// The share of one micro-batch in the losses of its step, and the gradients that start its backward pass.
pub fn seeds(
    out: &TrainOut,
    micro: &MicroBatch,
    divisors: Divisors,
    weights: LossWeights,
    depths: usize,
) -> (Losses, Vec<(VarId, Tensor)>) {
    let mut losses = Losses { mtp: vec![0.0; depths], ..Losses::default() };
    let mut seeds = Vec::new();
    let mut cross_entropy = |logp: &dsv3_ops::Var, factor: f64, position: &dyn Fn(usize) -> usize| {
        let values = logp.value.as_f32();
        let (mut loss, mut grads) = (0.0, vec![0.0; values.len()]);
        for (row, value) in values.iter().enumerate() {
            let share = f64::from(micro.weight(position(row))) / divisors.weight;
            loss -= share * f64::from(*value);
            grads[row] = (-share * factor) as f32;
        }
        if factor != 0.0 {
            seeds.push((logp.id(), Tensor::f32(logp.value.shape(), grads)));
        }
        loss
    };
    losses.main = cross_entropy(&out.logp, 1.0, &|row| row);
    for mtp in &out.mtp {
        let position = |row: usize| mtp.rows[row] as usize + mtp.depth;
        losses.mtp[mtp.depth - 1] = cross_entropy(&mtp.logp, weights.mtp / depths as f64, &position);
    }
    let factor = weights.balance * micro.sequences() as f64 / divisors.sequences.max(1.0);
    for (layer, loss) in &out.balance {
        let value = factor * f64::from(loss.value.as_f32()[0]);
        losses.balance += value;
        losses.balance_layers.push((*layer, value));
        if factor != 0.0 {
            seeds.push((loss.id(), Tensor::f32(&[1], vec![factor as f32])));
        }
    }
    (losses, seeds)
}
