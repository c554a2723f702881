//! Output head and log-softmax in one: logp_t = z_t[target_t] − logsumexp(z_t), z = h·Wᵀ, chunk by chunk.
//!
//! Shapes: h `[tokens, d]`, W `[vocab, d]` (F32 or BF16 values, product in F32), targets `[tokens]`, logp `[tokens]`.
//! Logits are made `chunk_rows` rows at a time. Those of a call that takes at most [`KEPT_BYTES_MAX`] are kept for the
//! backward pass; of a larger one no more than a chunk ever exists, and the backward pass computes them again. Rows without
//! a target are not multiplied at all: their logp and entropy are 0 and they receive no gradient.
//! Backward: dz_t = dlogp_t·(onehot − softmax(z_t)); dh = dz·W; dW = dzᵀ·h, chunks added in order.
//! Entropy is logsumexp(z) − Σ_v softmax(z)_v z_v, in nats; it carries no gradient.

use std::sync::Arc;

use crate::gemm::{self, Mat, Product, Right, gemm};
use crate::isa::{Isa, simd_fn};
use crate::memory::{self, buffer, give_back};
use crate::scratch::with_f32;
use crate::vector::{LANES, exp, exp_in_place, fold, for_row_chunks, max, scratch};
use crate::weight::Operand;
use crate::{Back, Grads, Job, Param, ParamId, Tape, Tensor, Var, VarId, Weight};

/// The target of a row that has none.
pub const NO_TARGET: u32 = u32::MAX;

/// Logits of at most this many bytes are kept for the backward pass, which otherwise takes half as long again.
pub const KEPT_BYTES_MAX: usize = 256 << 20;

/// How the head is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Rows whose logits are made at one time.
    pub chunk_rows: usize,
    /// Whether to compute the entropy of every row's distribution too.
    pub want_entropy: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { chunk_rows: 256, want_entropy: false }
    }
}

/// What the head says of every token.
#[derive(Clone, Debug)]
pub struct Out {
    /// Log-probability of the target, `[tokens]`.
    pub logp: Tensor,
    /// Entropy of the distribution, `[tokens]`, when asked for.
    pub entropy: Option<Tensor>,
}

/// Log-probabilities of `targets` after `h` `[tokens, d]` under `head` `[vocab, d]`.
///
/// # Panics
/// When sizes disagree or a target is neither below the vocabulary nor [`NO_TARGET`].
pub fn forward(h: &Tensor, head: &Weight, targets: &[u32], options: Options) -> Out {
    evaluate(h, head, targets, options, false).0
}

/// [`forward`] with the gradients of `h` and of the head: logp as a variable, entropy as a plain value.
pub fn on_tape(
    tape: &mut Tape,
    h: &Var,
    head: &Param,
    targets: &Arc<[u32]>,
    options: Options,
) -> (Var, Option<Tensor>) {
    let weight = head.compute.clone();
    let (out, logsumexp, logits) = evaluate(&h.value, &weight, targets, options, tape.is_recording());
    let (h, targets, param) = (h.clone(), targets.clone(), head.id);
    let logp = tape.push(out.logp, |out| {
        Box::new(HeadBack { h, weight, targets, logsumexp, logits, chunk_rows: options.chunk_rows, param, out })
    });
    (logp, out.entropy)
}

/// Indices of rows that have a target and satisfy `wanted`, in order.
fn active_rows(targets: &[u32], wanted: impl Fn(usize) -> bool) -> Vec<u32> {
    (0..targets.len()).filter(|&row| targets[row] != NO_TARGET && wanted(row)).map(|row| row as u32).collect()
}

/// Copies the chosen rows of `h` next to each other.
fn gather(h: &[f32], d: usize, rows: &[u32], into: &mut Vec<f32>) {
    into.clear();
    for &row in rows {
        into.extend_from_slice(&h[row as usize * d..][..d]);
    }
}

/// Results, log-sum-exp of every row, and the logits of the active rows by chunk if they are wanted and small enough.
fn evaluate(
    h: &Tensor,
    weight: &Weight,
    targets: &[u32],
    options: Options,
    keep: bool,
) -> (Out, Vec<f32>, Vec<Tensor>) {
    let (tokens, d, vocab) = (h.rows(), weight.inputs(), weight.outputs());
    assert!(tokens == targets.len() && d == h.cols(), "head {:?} on {:?}", weight.shape(), h.shape());
    let (h, w) = (h.as_f32(), Operand::forward(weight, 0));
    let mut logp = vec![0.0; tokens];
    let mut entropy = vec![0.0; if options.want_entropy { tokens } else { 0 }];
    let mut logsumexp = memory::zeros(tokens);
    let rows = active_rows(targets, |_| true);
    let keep = keep && rows.len() * vocab * size_of::<f32>() <= KEPT_BYTES_MAX;
    let chunk_rows = options.chunk_rows.max(1);
    let (mut kept, mut buffer) = (Vec::new(), None);
    let mut packed = memory::buffer(rows.len().min(chunk_rows) * d);
    for chunk in rows.chunks(chunk_rows) {
        gather(h, d, chunk, &mut packed);
        let mut all = buffer.take().unwrap_or_else(|| scratch(rows.len().min(chunk_rows) * vocab));
        let logits = &mut all.as_f32_mut()[..chunk.len() * vocab];
        product(chunk.len(), vocab, d, &packed, &w, logits);
        let logits = &*logits;
        let mut results = vec![0.0; chunk.len() * 3];
        for_row_chunks(&mut results, 3, 4, 8 * vocab, |first, results| {
            with_f32(vocab, |scratch| {
                for (i, result) in results.chunks_exact_mut(3).enumerate() {
                    let z = &logits[(first + i) * vocab..][..vocab];
                    let target = targets[chunk[first + i] as usize] as usize;
                    row_statistics(Isa::best(), z, target, options.want_entropy, scratch, result);
                }
            });
        });
        for (&row, result) in chunk.iter().zip(results.chunks_exact(3)) {
            logp[row as usize] = result[0];
            logsumexp[row as usize] = result[1];
            if options.want_entropy {
                entropy[row as usize] = result[2];
            }
        }
        if keep { kept.push(all) } else { buffer = Some(all) }
    }
    give_back(packed);
    let entropy = options.want_entropy.then(|| Tensor::f32(&[tokens], entropy));
    (Out { logp: Tensor::f32(&[tokens], logp), entropy }, logsumexp, kept)
}

/// `c[m, n] = a[m, k] · b`.
fn product(m: usize, n: usize, k: usize, a: &[f32], b: &dyn Right, c: &mut [f32]) {
    let product = Product { m, n, k, a: Mat::rows(a, k), b, c, c_stride: n, accumulate: false };
    gemm::run(Isa::best(), &mut [product]);
}

simd_fn! {
    /// `result` = log-probability of the target, logsumexp, entropy (0 unless wanted).
    fn row_statistics(z: &[f32], target: usize, want_entropy: bool, scratch: &mut [f32], result: &mut [f32]) {
        let largest = max(z);
        scratch.copy_from_slice(z);
        let total = exp_in_place(scratch, largest);
        let log_total = total.ln();
        result[0] = z[target] - largest - log_total;
        result[1] = largest + log_total;
        // Relative to the largest logit, so that large common offsets do not cancel.
        result[2] = if want_entropy { log_total - shifted_dot(scratch, z, largest) / total } else { 0.0 };
    }
}

/// Σ p_v · (z_v − shift); a probability of 0 adds nothing, whatever its logit.
#[inline(always)]
fn shifted_dot(p: &[f32], z: &[f32], shift: f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for (p, z) in p.chunks(LANES).zip(z.chunks(LANES)) {
        for (lane, (p, z)) in lanes.iter_mut().zip(p.iter().zip(z)) {
            *lane += if *p > 0.0 { p * (z - shift) } else { 0.0 };
        }
    }
    fold(lanes)
}

struct HeadBack {
    h: Var,
    weight: Weight,
    targets: Arc<[u32]>,
    logsumexp: Vec<f32>,
    /// Of all rows with a target by chunk, or none.
    logits: Vec<Tensor>,
    chunk_rows: usize,
    param: ParamId,
    out: VarId,
}

impl Back for HeadBack {
    fn inputs(mut self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let d_logp = grads.take(self.out)?;
        let (d_logp, h) = (d_logp.as_f32(), self.h.value.as_f32());
        let (vocab, d) = (self.weight.outputs(), self.weight.inputs());
        let rows = active_rows(&self.targets, |row| d_logp[row] != 0.0);
        let mut dh = buffer(h.len());
        dh.fill(0.0);
        // Logits are computed once for both gradients; the job only adds the finished sum.
        let mut dw = buffer(vocab * d);
        if rows.is_empty() {
            dw.fill(0.0);
        }
        let chunk_rows = self.chunk_rows.max(1);
        // Rows whose gradient is exactly zero shift the chunks; then none of what was kept fits.
        let all_rows = self.targets.iter().filter(|target| **target != NO_TARGET).count();
        let mut kept = std::mem::take(&mut self.logits).into_iter().filter(|_| rows.len() == all_rows);
        let mut buffer = None;
        let most = rows.len().min(chunk_rows) * d;
        let (mut packed, mut dh_packed) = (memory::buffer(most), memory::buffer(most));
        for (index, chunk) in rows.chunks(chunk_rows).enumerate() {
            gather(h, d, chunk, &mut packed);
            let n = chunk.len();
            let kept = kept.next();
            let computed = kept.is_some();
            let mut all = kept.or_else(|| buffer.take()).unwrap_or_else(|| scratch(rows.len().min(chunk_rows) * vocab));
            let logits = &mut all.as_f32_mut()[..n * vocab];
            if !computed {
                product(n, vocab, d, &packed, &Operand::forward(&self.weight, 0), logits);
            }
            self.to_logit_grads(logits, chunk, d_logp);
            dh_packed.resize(n * d, 0.0);
            product(n, d, vocab, logits, &Operand::backward(&self.weight, 0), &mut dh_packed);
            for (&row, grad) in chunk.iter().zip(dh_packed.chunks_exact(d)) {
                dh[row as usize * d..][..d].copy_from_slice(grad);
            }
            gemm(vocab, d, n, Mat::transposed(logits, vocab), Mat::rows(&packed, d), &mut dw, d, index > 0);
            buffer = Some(all);
        }
        grads.add(self.h.id(), Tensor::f32(self.h.value.shape(), dh));
        [packed, dh_packed, std::mem::take(&mut self.logsumexp)].into_iter().for_each(give_back);
        let dw = Tensor::f32(self.weight.shape(), dw);
        let param = self.param;
        Some(Job::new(move |weights| weights.add(param, dw)))
    }
}

simd_fn! {
    fn logit_grads(z: &mut [f32], target: usize, grad: f32, logsumexp: f32) {
        for v in z.iter_mut() {
            *v = -grad * exp(*v - logsumexp);
        }
        z[target] += grad;
    }
}

impl HeadBack {
    /// Turns logits of the rows `chunk` into their gradients.
    fn to_logit_grads(&self, logits: &mut [f32], chunk: &[u32], d_logp: &[f32]) {
        let vocab = self.weight.outputs();
        for_row_chunks(logits, vocab, 4, 8 * vocab, |first, block| {
            for (i, z) in block.chunks_exact_mut(vocab).enumerate() {
                let row = chunk[first + i] as usize;
                logit_grads(Isa::best(), z, self.targets[row] as usize, d_logp[row], self.logsumexp[row]);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision;
    use crate::testing::{check_gradients, values};

    /// Log-probability and entropy of one row, in f64.
    fn reference(h: &[f32], w: &[f32], target: usize) -> (f64, f64) {
        let dot = |w: &[f32]| h.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let z: Vec<f64> = w.chunks(h.len()).map(dot).collect();
        let total: f64 = z.iter().map(|v| v.exp()).sum();
        let entropy = z.iter().map(|v| -(v.exp() / total) * (v - total.ln())).sum();
        (z[target] - total.ln(), entropy)
    }

    #[test]
    fn follows_the_reference_in_any_chunks() {
        let (h, w) = (values(&[9, 11], 1), values(&[37, 11], 2));
        let targets = [0, 36, NO_TARGET, 5, 5, NO_TARGET, 7, 1, 2];
        let run = |chunk_rows, w: &Weight| forward(&h, w, &targets, Options { chunk_rows, want_entropy: true });
        let plain = Weight::encode(&w, &Precision::F32);
        let out = run(4, &plain);
        let entropy = out.entropy.expect("asked for");
        for (row, &target) in targets.iter().enumerate() {
            let want = match target {
                NO_TARGET => (0.0, 0.0),
                target => reference(&h.as_f32()[row * 11..][..11], w.as_f32(), target as usize),
            };
            assert!((f64::from(out.logp.as_f32()[row]) - want.0).abs() < 1e-5);
            assert!((f64::from(entropy.as_f32()[row]) - want.1).abs() < 1e-5);
        }
        for chunk_rows in [1, 256] {
            assert_eq!(run(chunk_rows, &plain).logp.as_f32(), out.logp.as_f32());
        }
        assert_eq!(run(4, &plain.prepack()).logp.as_f32(), out.logp.as_f32());
        let rounded = Weight::encode(&w.to_bf16().to_f32(), &Precision::F32);
        let bf16 = Weight::encode(&w, &Precision::Bf16);
        assert_eq!(run(4, &bf16).logp.as_f32(), run(4, &rounded).logp.as_f32());
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let h = Tensor::f32(&[1, 1], vec![1.0]);
        let w = Weight::encode(&Tensor::f32(&[3, 1], vec![1000.0, 999.0, -1000.0]), &Precision::F32);
        let out = forward(&h, &w, &[0], Options { chunk_rows: 1, want_entropy: true });
        let p = 1.0 / (1.0 + (-1.0_f32).exp());
        assert!((out.logp.as_f32()[0] - p.ln()).abs() < 1e-6);
        let entropy = -(p * p.ln() + (1.0 - p) * (1.0 - p).ln());
        assert!((out.entropy.expect("asked for").as_f32()[0] - entropy).abs() < 1e-5);
    }

    #[test]
    fn kept_logits_and_repeated_ones_give_the_same_bits() {
        let (h, w) = (values(&[300, 5], 5), crate::testing::param(0, &values(&[9, 5], 6)));
        let targets: Arc<[u32]> = (0..300).map(|i| if i % 7 == 0 { NO_TARGET } else { i % 9 }).collect();
        // Rows whose gradient is zero are left out, so that a weight of zero for row 8 makes the pass compute logits again.
        let run = |chunk_rows, zero: Option<usize>| {
            let mut tape = Tape::new();
            let h = tape.leaf(h.clone());
            let options = Options { chunk_rows, want_entropy: false };
            let (logp, _) = on_tape(&mut tape, &h, &w, &targets, options);
            let mut weights = crate::WeightGrads::default();
            let mut upstream = values(&[300], 7).as_f32().to_vec();
            zero.into_iter().for_each(|row| upstream[row] = 0.0);
            let mut grads = tape.backward(vec![(logp.id(), Tensor::f32(&[300], upstream))], &mut weights);
            let dh = grads.take(h.id()).expect("a gradient");
            (dh.into_f32(), weights.get(0).expect("a gradient").as_f32().to_vec())
        };
        let kept = run(128, None);
        assert_eq!(kept, run(1000, None));
        // Row 0 has no target: its gradient counts for nothing either way.
        assert_eq!(kept, run(128, Some(0)));
        let (dh, dw) = run(128, Some(8));
        assert_eq!(dh[..40], kept.0[..40]);
        assert!(dh[40..45].iter().all(|x| *x == 0.0));
        assert_eq!((&dh[45..], dw.len()), (&kept.0[45..], kept.1.len()));
        assert_ne!(dw, kept.1);
    }

    #[test]
    fn gradients() {
        let targets: Arc<[u32]> = [4, NO_TARGET, 0, 4, 2].into();
        for chunk_rows in [2, 100] {
            let options = Options { chunk_rows, want_entropy: false };
            let run = |t: &mut Tape, x: &[Var], p: &[Param]| on_tape(t, &x[0], &p[0], &targets, options).0;
            check_gradients("token_logprob", vec![values(&[5, 7], 3)], vec![values(&[6, 7], 4)], run, 1e-3);
        }
    }
}
