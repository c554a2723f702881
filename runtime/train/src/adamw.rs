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

/// Factors of one update, the same for every element of a parameter.
#[derive(Clone, Copy)]
struct Factors {
    clip: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    correction1: f32,
    correction2: f32,
    eps: f32,
    lr: f32,
    decay: f32,
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
        let decays: Vec<bool> = model.infos().iter().map(|info| info.decays()).collect();
        let shapes: Vec<Vec<usize>> = model.infos().iter().map(|info| info.shape.clone()).collect();
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((id, param), (m, v)) in model.params_mut().iter_mut().enumerate().zip(moments) {
            let Some(master) = &mut param.master else { continue };
            let g = &*grads.slot(id as u32, &shapes[id]);
            let factors = Factors { decay: if decays[id] { factors.decay } else { 0.0 }, ..factors };
            match m.dtype() {
                DType::Bf16 => update(master.as_f32_mut(), m.as_bf16_mut(), v.as_bf16_mut(), g, factors),
                _ => update(master.as_f32_mut(), m.as_f32_mut(), v.as_f32_mut(), g, factors),
            }
        }
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
    let squares: f64 = model.params().iter().filter_map(|param| grads.get(param.id)).map(square_sum).sum();
    squares.sqrt()
}

fn square_sum(grad: &Tensor) -> f64 {
    let chunks: Vec<f64> = grad.as_f32().par_chunks(CHUNK).map(chunk_square_sum).collect();
    chunks.iter().sum()
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

/// A stored moment.
trait Stored: Copy + Send + Sync {
    fn read(self) -> f32;
    fn round(x: f32) -> Self;
}

impl Stored for f32 {
    fn read(self) -> f32 {
        self
    }
    fn round(x: f32) -> Self {
        x
    }
}

impl Stored for bf16 {
    fn read(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    fn round(x: f32) -> Self {
        // Round to nearest even without a branch; moments are finite because the guard refuses other gradients.
        let bits = x.to_bits();
        bf16::from_bits((bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16)
    }
}

fn update<S: Stored>(p: &mut [f32], m: &mut [S], v: &mut [S], g: &[f32], f: Factors) {
    let chunks = p.par_chunks_mut(CHUNK).zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK));
    chunks.zip(g.par_chunks(CHUNK)).for_each(|(((p, m), v), g)| {
        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
            let g = *g * f.clip;
            let first = f.beta1 * m.read() + f.one_minus_beta1 * g;
            let second = f.beta2 * v.read() + f.one_minus_beta2 * (g * g);
            let step = (first * f.correction1) / ((second * f.correction2).sqrt() + f.eps);
            *p -= f.lr * (step + f.decay * *p);
            (*m, *v) = (S::round(first), S::round(second));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Factors = Factors {
        clip: 1.0,
        beta1: 0.9,
        one_minus_beta1: 0.1,
        beta2: 0.95,
        one_minus_beta2: 0.05,
        correction1: 10.0,
        correction2: 20.0,
        eps: 1e-8,
        lr: 0.5,
        decay: 0.1,
    };

    #[test]
    fn first_update_moves_by_the_sign_and_decays() {
        let (mut p, mut m, mut v) = (vec![1.0, 1.0], vec![0.0_f32; 2], vec![0.0_f32; 2]);
        update(&mut p, &mut m, &mut v, &[2.0, 0.0], PLAIN);
        assert!((p[0] - (1.0 - 0.5 * 1.1)).abs() < 1e-6 && (p[1] - 0.95).abs() < 1e-6, "{p:?}");
    }

    #[test]
    fn bf16_moments_round_to_nearest_even_after_use() {
        for x in [1.0_f32, 1.003_906_3, 1.011_718_8, -3.3e-5, 7.1e20, 1e-40] {
            assert_eq!(<bf16 as Stored>::round(x), bf16::from_f32(x), "{x}");
        }
        let (mut p, mut q) = (vec![1.0], vec![1.0]);
        update(&mut p, &mut [bf16::ZERO], &mut [bf16::ZERO], &[0.3], PLAIN);
        update(&mut q, &mut [0.0_f32], &mut [0.0_f32], &[0.3], PLAIN);
        assert_eq!(p, q);
    }

    #[test]
    fn powers() {
        assert_eq!((power(0.9, 0), power(0.5, 10)), (1.0, 1.0 / 1024.0));
    }
}
