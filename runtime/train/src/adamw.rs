//! AdamW with FP32 masters, BF16 or F32 moments, and clipping by the global norm.
//!
//! g *= min(1, clip / (norm + 1e-6)); m = β₁m + (1 − β₁)g; v = β₂v + (1 − β₂)g²;
//! p −= lr·( (m/(1 − β₁ᵗ)) / (√(v/(1 − β₂ᵗ)) + ε) + wd·p ), p on the right being the value before the step.
//! Everything is computed in f32; BF16 moments are read, updated, used unrounded, then stored rounded to nearest even.
//! Weight decay falls on published tensors of two or more dimensions only. A parameter nobody reached has g = 0: its
//! moments fade and its weight decays. Report §3.3.2 and §4.2, `reference/deepseek-v3.md` §14.
//!
//! **Invariant**: the norm adds fixed chunks in order, and every element is updated alone, so the bits do not depend on
//! the number of threads.

use dsv3_model::Model;
use dsv3_ops::adamw::{self, Factors, Moments as Moment};
use dsv3_ops::{DType, Tensor, WeightGrads};
use half::bf16;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Elements a thread takes at a time.
const CHUNK: usize = 1 << 14;
/// Added to the norm before dividing by it.
const NORM_EPS: f64 = 1e-6;

/// How moments are stored between steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// Two bytes each, rounded to nearest even after the update; the report's choice.
    #[default]
    Bf16,
    /// Four bytes each.
    F32,
}

/// Settings of the optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, on matrices only.
    pub weight_decay: f64,
    /// Largest norm of the gradient of all parameters together; larger ones are scaled down to it.
    pub clip_norm: f64,
    /// Storage of the moments.
    pub moments: Moments,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip_norm: 1.0, moments: Moments::Bf16 }
    }
}

/// The optimiser's state for one model.
#[derive(Clone, Debug)]
pub struct AdamW {
    /// Its settings.
    pub config: AdamWConfig,
    pub(crate) updates: u64,
    /// By [`dsv3_ops::ParamId`], each in the shape of its parameter.
    pub(crate) first: Vec<Tensor>,
    pub(crate) second: Vec<Tensor>,
}

impl AdamW {
    /// Zero moments for every parameter of `model`.
    pub fn new(config: AdamWConfig, model: &Model) -> Self {
        let zeros = || -> Vec<Tensor> { model.infos().iter().map(|p| zeros(&p.shape, config.moments)).collect() };
        Self { config, updates: 0, first: zeros(), second: zeros() }
    }

    /// Updates applied so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// First and second moments by [`dsv3_ops::ParamId`].
    pub fn moments(&self) -> (&[Tensor], &[Tensor]) {
        (&self.first, &self.second)
    }

    /// Updates the masters of `model` by `grads`, whose norm is `norm`, and encodes them anew.
    /// Answers whether the gradient was scaled down.
    ///
    /// # Errors
    /// When a parameter has no master; nothing is changed then.
    pub fn step(&mut self, model: &mut Model, grads: &mut WeightGrads, norm: f64, lr: f64) -> Result<bool> {
        if let Some(at) = model.params().iter().position(|param| param.master.is_none()) {
            return Err(Error::NotTrainable { name: model.infos()[at].name.clone() });
        }
        self.updates += 1;
        let clip = (self.config.clip_norm / (norm + NORM_EPS)).min(1.0);
        let factors = self.factors(clip, lr);
        let infos: Vec<_> = model.infos().iter().map(|info| (info.id, info.shape.clone())).collect();
        for (id, shape) in &infos {
            // Zeros where nothing arrived.
            grads.slot(*id, shape);
        }
        let mut chunks = Vec::new();
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((info, master), (m, v)) in model.masters_mut().zip(moments) {
            let Some(g) = grads.get(info.id) else { continue };
            let factors = Factors { decay: if info.decays() { factors.decay } else { 0.0 }, ..factors };
            let p = master.as_f32_mut().chunks_mut(CHUNK).zip(g.as_f32().chunks(CHUNK));
            let both: &mut dyn Iterator<Item = Moment<'_>> = match m.dtype() {
                DType::Bf16 => {
                    let pairs = m.as_bf16_mut().chunks_mut(CHUNK).zip(v.as_bf16_mut().chunks_mut(CHUNK));
                    &mut pairs.map(|(m, v)| Moment::Bf16(m, v))
                }
                _ => {
                    let pairs = m.as_f32_mut().chunks_mut(CHUNK).zip(v.as_f32_mut().chunks_mut(CHUNK));
                    &mut pairs.map(|(m, v)| Moment::F32(m, v))
                }
            };
            chunks.extend(p.zip(both).map(|((p, g), moments)| (p, moments, g, factors)));
        }
        chunks.into_par_iter().for_each(|(p, moments, g, factors)| adamw::update(p, moments, g, &factors));
        model.encode();
        Ok(clip < 1.0)
    }

    fn factors(&self, clip: f64, lr: f64) -> Factors {
        let c = &self.config;
        Factors {
            clip: clip as f32,
            beta1: c.beta1 as f32,
            one_minus_beta1: (1.0 - c.beta1) as f32,
            beta2: c.beta2 as f32,
            one_minus_beta2: (1.0 - c.beta2) as f32,
            correction1: (1.0 / (1.0 - power(c.beta1, self.updates))) as f32,
            correction2: (1.0 / (1.0 - power(c.beta2, self.updates))) as f32,
            eps: c.eps as f32,
            lr: lr as f32,
            decay: c.weight_decay as f32,
        }
    }
}

fn zeros(shape: &[usize], moments: Moments) -> Tensor {
    match moments {
        Moments::F32 => Tensor::zeros(shape),
        Moments::Bf16 => Tensor::bf16(shape, vec![bf16::ZERO; shape.iter().product()]),
    }
}

/// `base` to the power `exponent` by squaring; the library function may differ between targets.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

/// L2 norm of the gradients of all parameters of `model`, shared ones once.
pub fn gradient_norm(model: &Model, grads: &WeightGrads) -> f64 {
    let of_parameters = model.params().iter().filter_map(|param| grads.get(param.id));
    let chunks: Vec<(usize, &[f32])> =
        of_parameters.enumerate().flat_map(|(i, grad)| grad.as_f32().chunks(CHUNK).map(move |c| (i, c))).collect();
    let sums: Vec<(usize, f64)> = chunks.into_par_iter().map(|(i, chunk)| (i, chunk_square_sum(chunk))).collect();
    // The chunks of each parameter in order, then the parameters.
    let squares: f64 =
        sums.chunk_by(|a, b| a.0 == b.0).map(|of_one| of_one.iter().map(|(_, sum)| sum).sum::<f64>()).sum();
    squares.sqrt()
}

fn chunk_square_sum(chunk: &[f32]) -> f64 {
    // Eight sums, so that the adds do not wait for each other.
    let mut lanes = [0.0_f64; 8];
    let (blocks, rest) = chunk.as_chunks::<8>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane += f64::from(*x) * f64::from(*x);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers() {
        assert_eq!((power(0.9, 0), power(0.5, 10)), (1.0, 1.0 / 1024.0));
    }
}
