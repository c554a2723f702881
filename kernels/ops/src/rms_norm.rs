//! RMSNorm: y = x · ρ · w with ρ = 1/√(mean(x²) + ε), over the last dimension.
//!
//! Backward, per row of d elements with g = dy·w: dx = ρ·(g − x·ρ²·mean(g·x)); dw = Σ_rows dy·x·ρ, summed in fixed
//! chunks of rows that are added in order. Saved: x and ρ. (§2 of the report's equations; Zhang and Sennrich 2019.)

use rayon::prelude::*;

use crate::elementwise::add_assign;
use crate::isa::{Isa, simd_fn};
use crate::memory::buffer;
use crate::vector::dot;
use crate::{Back, Grads, Job, Param, ParamId, Tape, Tensor, Var, VarId, Weight};

/// Rows a thread normalises at a time.
const CHUNK_ROWS: usize = 32;
/// Rows whose weight gradients are summed before they join the total.
const GRAD_CHUNK_ROWS: usize = 64;

/// Normalises `x` `[.., d]` by `w` `[d]`.
///
/// # Panics
/// When the width of `x` is not that of `w`.
pub fn forward(x: &Tensor, w: &Weight, eps: f32) -> Tensor {
    let w = w.dequantize();
    Tensor::f32(x.shape(), normalise(x, w.as_f32(), eps).0)
}

/// [`forward`] with the gradients of `x` and `w`.
pub fn on_tape(tape: &mut Tape, x: &Var, w: &Param, eps: f32) -> Var {
    let weight = w.compute.dequantize();
    let (out, inverse_rms) = normalise(&x.value, weight.as_f32(), eps);
    let (input, param) = (x.clone(), w.id);
    tape.push(Tensor::f32(x.value.shape(), out), |out| Box::new(RmsNormBack { input, weight, inverse_rms, param, out }))
}

fn normalise(x: &Tensor, w: &[f32], eps: f32) -> (Vec<f32>, Vec<f32>) {
    let (rows, d, data) = (x.rows(), x.cols(), x.as_f32());
    assert_eq!(d, w.len(), "rms_norm of width {d} with a weight of {}", w.len());
    let (mut out, mut inverse_rms) = (buffer(rows * d), vec![0.0; rows]);
    let work = |chunk: usize, out: &mut [f32], inverse_rms: &mut [f32]| {
        let x = &data[chunk * CHUNK_ROWS * d..];
        inverse_rms_chunk(Isa::best(), x, d, eps, inverse_rms);
        scale_chunk(Isa::best(), x, w, inverse_rms, out);
    };
    if rows <= CHUNK_ROWS {
        work(0, &mut out, &mut inverse_rms);
    } else {
        let chunks = out.par_chunks_mut(CHUNK_ROWS * d).zip(inverse_rms.par_chunks_mut(CHUNK_ROWS)).enumerate();
        chunks.for_each(|(chunk, (out, inverse_rms))| work(chunk, out, inverse_rms));
    }
    (out, inverse_rms)
}

simd_fn! {
    fn inverse_rms_chunk(x: &[f32], d: usize, eps: f32, out: &mut [f32]) {
        for (rho, row) in out.iter_mut().zip(x.chunks_exact(d)) {
            *rho = 1.0 / (dot(row, row) / d as f32 + eps).sqrt();
        }
    }
}

simd_fn! {
    fn scale_chunk(x: &[f32], w: &[f32], inverse_rms: &[f32], out: &mut [f32]) {
        let d = w.len();
        for ((y, row), rho) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(inverse_rms) {
            for j in 0..d {
                y[j] = row[j] * rho * w[j];
            }
        }
    }
}

simd_fn! {
    /// dx of some rows.
    fn input_grad_chunk(x: &[f32], dy: &[f32], w: &[f32], inverse_rms: &[f32], dx: &mut [f32]) {
        let d = w.len();
        let rows = dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d)).zip(inverse_rms);
        for (((out, row), grad), rho) in rows {
            for j in 0..d {
                out[j] = grad[j] * w[j];
            }
            let pull = rho * rho * dot(out, row) / d as f32;
            for j in 0..d {
                out[j] = rho * (out[j] - row[j] * pull);
            }
        }
    }
}

simd_fn! {
    /// Adds dw of some rows.
    fn weight_grad_chunk(x: &[f32], dy: &[f32], inverse_rms: &[f32], dw: &mut [f32]) {
        let d = dw.len();
        for ((x, dy), rho) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(inverse_rms) {
            for j in 0..d {
                dw[j] += dy[j] * x[j] * rho;
            }
        }
    }
}

struct RmsNormBack {
    input: Var,
    weight: Tensor,
    inverse_rms: Vec<f32>,
    param: ParamId,
    out: VarId,
}

impl Back for RmsNormBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let dy = grads.take(self.out)?;
        let (d, w) = (self.weight.numel(), self.weight.as_f32());
        let (x, dy_data) = (self.input.value.as_f32(), dy.as_f32());
        let rows = self.inverse_rms.len();
        let (mut dx, mut partials) = (buffer(x.len()), vec![0.0; rows.div_ceil(GRAD_CHUNK_ROWS) * d]);
        // Both gradients of some rows while these lie in a near cache; the job adds the chunks up.
        let chunks = dx.par_chunks_mut(GRAD_CHUNK_ROWS * d).zip(partials.par_chunks_mut(d)).enumerate();
        chunks.for_each(|(chunk, (dx, partial))| {
            let (at, rho) = (chunk * GRAD_CHUNK_ROWS * d, &self.inverse_rms[chunk * GRAD_CHUNK_ROWS..]);
            input_grad_chunk(Isa::best(), &x[at..], &dy_data[at..], w, rho, dx);
            let rho = &rho[..dx.len() / d];
            weight_grad_chunk(Isa::best(), &x[at..], &dy_data[at..], rho, partial);
        });
        grads.add(self.input.id(), Tensor::f32(self.input.value.shape(), dx));
        Some(Job::new(move |weights| {
            let slot = weights.slot(self.param, self.weight.shape());
            partials.chunks_exact(slot.len()).for_each(|partial| add_assign(slot, partial));
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision;
    use crate::testing::{check_gradients, values};

    /// The equation in f64.
    fn reference(x: &[f32], w: &[f32], eps: f64) -> Vec<f64> {
        let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len() as f64;
        x.iter().zip(w).map(|(x, w)| f64::from(*x) / (mean + eps).sqrt() * f64::from(*w)).collect()
    }

    #[test]
    fn follows_the_reference() {
        for d in [1, 7, 16, 33, 100] {
            let (x, w) = (values(&[2, 20, d], 1), values(&[d], 2));
            let y = forward(&x, &Weight::encode(&w, &Precision::F32), 1e-6);
            for (x, y) in x.as_f32().chunks(d).zip(y.as_f32().chunks(d)) {
                for (got, want) in y.iter().zip(reference(x, w.as_f32(), 1e-6)) {
                    assert!((f64::from(*got) - want).abs() < 1e-6, "{got} is not {want}");
                }
            }
        }
    }

    #[test]
    fn gradients() {
        let run = |rows, d| {
            let (x, w) = (values(&[rows, d], 3), values(&[d], 4));
            check_gradients("rms_norm", vec![x], vec![w], |t, x, p| on_tape(t, &x[0], &p[0], 1e-3), 1e-3);
        };
        run(5, 7);
        run(130, 16);
    }
}
