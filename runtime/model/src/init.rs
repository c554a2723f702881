//! Initial weights: N(0, σ²) for matrices, 1 for norms, 0 for router biases.
//!
//! Every draw is a function of (seed, published tensor name, position), so it does not depend on threads, on how experts
//! are stacked, or on which other parameters exist.

use dsv3_core::Rng;
use dsv3_ops::Tensor;
use rayon::prelude::*;

use crate::weight_names::{ParamInfo, Role};

/// Draws made from one keyed stream.
const CHUNK: usize = 4096;

/// Initial value of one parameter.
pub(crate) fn draw(info: &ParamInfo, sigma: f64, seed: u64) -> Tensor {
    fill(info, seed, |rng| sigma * rng.normal())
}

/// As [`draw`], but level between ±σ·√3, which has the same variance and spares a logarithm and a cosine a value: for
/// models of which only the speed matters.
pub(crate) fn draw_level(info: &ParamInfo, sigma: f64, seed: u64) -> Tensor {
    let width = sigma * 12.0_f64.sqrt();
    fill(info, seed, |rng| width * (rng.uniform() - 0.5))
}

fn fill(info: &ParamInfo, seed: u64, next: impl Fn(&mut Rng) -> f64 + Sync) -> Tensor {
    if info.role == Role::Norm {
        return Tensor::f32(&info.shape, vec![1.0; info.numel()]);
    }
    let len = info.tensor_shape().iter().product::<usize>().max(1);
    let mut values = vec![0.0_f32; info.numel()];
    let root = Rng::new(seed).key("init");
    for (tensor, name) in values.chunks_mut(len).zip(info.tensor_names()) {
        let stream = root.key(name.as_str());
        tensor.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
            let mut rng = stream.key(i);
            chunk.iter_mut().for_each(|value| *value = next(&mut rng) as f32);
        });
    }
    Tensor::f32(&info.shape, values)
}
