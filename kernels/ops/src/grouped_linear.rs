//! Linear layers of several experts at once: y_i = x_i · w_eᵀ for the rows i of expert e.
//!
//! `x` `[slots, in]` is sorted by expert; `offsets` (experts + 1 of them) bound each expert's rows; `w` is
//! `[experts, out, in]`, or `[out, in]` for one. Three products: y = x·wᵀ, dx = dy·w, dw = dyᵀ·x, operands rounded as the
//! weight's precision and its exceptions say (`activation.rs`). An expert without rows has y and dx without rows and adds nothing to dw.
//! DeepSeek-V3 report §3.3 for FP8.

use std::sync::Arc;

use crate::activation::{self, Saved};
use crate::gemm::{self, Mat, Product};
use crate::isa::Isa;
use crate::swiglu::Cached;
use crate::weight::Operand;
use crate::{Back, Grads, Job, Param, ParamId, Tape, Tensor, Var, VarId, Weight, WeightGrads, memory};

/// `[slots, in]` → `[slots, out]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn forward(x: &Tensor, offsets: &[usize], w: &Weight) -> Tensor {
    let (values, _) = activation::input(x, w.rounding(), false);
    multiply(&values, offsets, w)
}

/// As [`forward`], recorded.
///
/// # Panics
/// When the shapes do not fit.
pub fn on_tape(tape: &mut Tape, x: &Var, offsets: &Arc<[usize]>, w: &Param) -> Var {
    let mut outputs = on_tape_many(tape, x, offsets, &[w]);
    outputs.swap_remove(0)
}

/// As [`on_tape`] for an input that SwiGLU made of what `cached` holds: nothing of it is kept, the weight gradient computes
/// it again.
///
/// # Panics
/// When the shapes do not fit.
pub fn on_tape_recomputed(tape: &mut Tape, x: &Var, cached: Cached, offsets: &Arc<[usize]>, w: &Param) -> Var {
    assert_eq!(cached.shape(), x.value.shape(), "what is computed again has the shape of the input");
    let (values, _) = activation::input(&x.value, w.compute.rounding(), false);
    let mut outputs = record(tape, x, offsets, &[w], &values, Some(Saved::Swiglu(cached)));
    outputs.swap_remove(0)
}

/// One input through several weights of one precision; it is quantised once, and its gradient is the sum over the outputs in order.
///
/// # Panics
/// When the shapes do not fit or the precisions or exceptions differ.
pub fn on_tape_many(tape: &mut Tape, x: &Var, offsets: &Arc<[usize]>, ws: &[&Param]) -> Vec<Var> {
    let Some(first) = ws.first() else { return Vec::new() };
    let rounding = first.compute.rounding();
    assert!(ws.iter().all(|w| w.compute.rounding() == rounding), "weights that share an input round it differently");
    let (values, saved) = activation::input(&x.value, rounding, tape.is_recording());
    record(tape, x, offsets, ws, &values, saved)
}

/// The outputs of `x`, rounded to `values`, and the backward pass if something was saved for it.
fn record(
    tape: &mut Tape,
    x: &Var,
    offsets: &Arc<[usize]>,
    ws: &[&Param],
    values: &Tensor,
    saved: Option<Saved>,
) -> Vec<Var> {
    let outputs: Vec<Var> = ws.iter().map(|w| tape.leaf(multiply(values, offsets, &w.compute))).collect();
    if let Some(saved) = saved {
        let outputs = outputs.iter().zip(ws).map(|(y, w)| (y.id(), w.id, w.compute.clone())).collect();
        let (x, shape, offsets) = (x.id(), x.value.shape().to_vec(), offsets.clone());
        tape.record(|| Box::new(Backward { x, shape, saved, offsets, outputs }));
    }
    outputs
}

fn check(x: &Tensor, offsets: &[usize], w: &Weight) {
    let (rows, experts) = (x.numel() / x.cols().max(1), w.count());
    assert_eq!(x.cols(), w.inputs(), "linear: input {:?}, weight {:?}", x.shape(), w.shape());
    assert_eq!(offsets.len(), experts + 1, "linear: one offset per expert and one at the end");
    assert!(offsets[0] == 0 && offsets[experts] == rows && offsets.is_sorted(), "linear: offsets must run to {rows}");
}

/// y = x·wᵀ on values that are rounded already, or never.
pub(crate) fn multiply(x: &Tensor, offsets: &[usize], w: &Weight) -> Tensor {
    check(x, offsets, w);
    let (n, k) = (w.outputs(), w.inputs());
    let mut shape = x.shape().to_vec();
    *shape.last_mut().expect("a linear input has columns") = n;
    let mut y = memory::buffer(shape.iter().product());
    let operands: Vec<_> = (0..w.count()).map(|e| Operand::forward(w, e)).collect();
    rows_times(x.as_f32(), offsets, &operands, n, k, &mut y, false);
    Tensor::f32(&shape, y)
}

/// `c[rows of e] (+)= a[rows of e] · b[e]` for every expert e; `a` is `[slots, k]`, `c` `[slots, n]`.
fn rows_times(a: &[f32], offsets: &[usize], b: &[Operand<'_>], n: usize, k: usize, c: &mut [f32], accumulate: bool) {
    let mut products = Vec::with_capacity(b.len());
    let mut rest = c;
    for (range, b) in offsets.windows(2).zip(b) {
        let m = range[1] - range[0];
        let (c, after) = rest.split_at_mut(m * n);
        rest = after;
        if m > 0 {
            let a = Mat::rows(&a[range[0] * k..range[1] * k], k);
            products.push(Product { m, n, k, a, b, c, c_stride: n, accumulate });
        }
    }
    gemm::run(Isa::best(), &mut products);
}

struct Backward {
    x: VarId,
    shape: Vec<usize>,
    saved: Saved,
    offsets: Arc<[usize]>,
    outputs: Vec<(VarId, ParamId, Weight)>,
}

impl Back for Backward {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let Self { x, shape, saved, offsets, outputs } = *self;
        let slots = offsets.last().copied().unwrap_or(0);
        // The op that made a gradient may have known the output under another shape; FP8 tiles need this one.
        let mut arrived: Vec<_> = outputs
            .into_iter()
            .filter_map(|(y, id, w)| grads.take(y).map(|dy| (dy.reshape(&[slots, w.outputs()]), id, w)))
            .collect();
        if arrived.is_empty() {
            return None;
        }
        let mut dx = memory::buffer(shape.iter().product());
        for (i, (dy, _, w)) in arrived.iter_mut().enumerate() {
            let rows = activation::gradient_rows(dy, w.rounding());
            let operands: Vec<_> = (0..w.count()).map(|e| Operand::backward(w, e)).collect();
            rows_times(rows.as_f32(), &offsets, &operands, w.inputs(), w.outputs(), &mut dx, i > 0);
            *dy = activation::gradient_to_keep(dy.clone(), rows, w.precision());
        }
        grads.add(x, Tensor::f32(&shape, dx));
        Some(Job::new(move |weights| weight_gradients(&saved, &offsets, arrived, weights)))
    }

    fn saved_input_bytes(&self) -> usize {
        self.saved.bytes()
    }
}

/// dw[e] += dyᵀ[e]·x[e] for every weight; the sum runs over tokens in order.
fn weight_gradients(
    saved: &Saved,
    offsets: &[usize],
    arrived: Vec<(Tensor, ParamId, Weight)>,
    weights: &mut WeightGrads,
) {
    let Some((_, _, first)) = arrived.first() else { return };
    let x = activation::saved_columns(saved, first.rounding(), offsets);
    for (dy, id, w) in arrived {
        let dy = activation::gradient_columns(&dy, w.rounding(), offsets);
        let (n, k) = (w.outputs(), w.inputs());
        let slot = weights.slot(id, w.shape());
        let xs: Vec<_> = offsets.windows(2).map(|r| Mat::rows(&x.as_f32()[r[0] * k..r[1] * k], k)).collect();
        let mut products = Vec::with_capacity(xs.len());
        for ((range, b), c) in offsets.windows(2).zip(&xs).zip(slot.chunks_mut(n * k)) {
            let tokens = range[1] - range[0];
            if tokens > 0 {
                let a = Mat::transposed(&dy.as_f32()[range[0] * n..range[1] * n], n);
                products.push(Product { m: n, n: k, k: tokens, a, b, c, c_stride: k, accumulate: true });
            }
        }
        gemm::run(Isa::best(), &mut products);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, param, values};
    use crate::{Fp8Format, Fp8Scales, Precision, linear};

    #[test]
    fn gradients_match_differences() {
        let offsets: Arc<[usize]> = Arc::new([0, 4, 4, 9]);
        let (x, w, v) = (values(&[9, 6], 1), values(&[3, 5, 6], 2), values(&[3, 5, 6], 3));
        let grouped = offsets.clone();
        check_gradients(
            "grouped_linear",
            vec![x.clone()],
            vec![w.clone()],
            |t, x, p| on_tape(t, &x[0], &grouped, &p[0]),
            1e-3,
        );
        let merged = |t: &mut Tape, x: &[Var], p: &[Param]| {
            // The second layer reads what the first two made of one input, so dx sums two outputs.
            let y = on_tape_many(t, &x[0], &offsets, &[&p[0], &p[1]]);
            let flat = linear::on_tape(t, &y[0], &p[2]);
            let other = linear::on_tape(t, &y[1], &p[2]);
            crate::elementwise::add_on_tape(t, &flat, &other)
        };
        check_gradients("linear after grouped", vec![x], vec![w, v, values(&[4, 5], 4)], merged, 1e-3);
    }

    /// The products of the FP8 recipe, from the public quantisers and plain loops.
    fn expected_gradients(
        x: &Tensor,
        w: &Tensor,
        dy: &Tensor,
        offsets: &Arc<[usize]>,
        precision: Precision,
    ) -> [Vec<f64>; 2] {
        let Precision::Fp8 { format, scales } = precision else { panic!("an FP8 recipe") };
        let (n, k) = (w.shape()[1], w.shape()[2]);
        let row_x = crate::Fp8::quantize_rows(x, format.forward(), scales).dequantize();
        let col_x = crate::Fp8::quantize_columns(&row_x, offsets, format.forward(), scales).dequantize();
        let col_dy = crate::Fp8::quantize_columns(dy, offsets, format.backward(), scales).dequantize();
        let row_dy = crate::Fp8::quantize_rows(dy, format.backward(), scales).dequantize();
        let w_values = crate::Fp8::quantize_blocks(w, format.forward(), scales).dequantize();
        let (mut dx, mut dw) = (vec![0f64; x.numel()], vec![0f64; w.numel()]);
        for e in 0..offsets.len() - 1 {
            for row in offsets[e]..offsets[e + 1] {
                for (j, i) in (0..n).flat_map(|j| (0..k).map(move |i| (j, i))) {
                    let at = (e * n + j) * k + i;
                    dx[row * k + i] += f64::from(row_dy.as_f32()[row * n + j]) * f64::from(w_values.as_f32()[at]);
                    dw[at] += f64::from(col_dy.as_f32()[row * n + j]) * f64::from(col_x.as_f32()[row * k + i]);
                }
            }
        }
        [dx, dw]
    }

    #[test]
    fn fp8_gradients_follow_the_recipe() {
        let offsets: Arc<[usize]> = Arc::new([0, 150, 150, 151, 300]);
        for (format, scales) in [
            (Fp8Format::E4m3, Fp8Scales::F32),
            (Fp8Format::Hybrid, Fp8Scales::F32),
            (Fp8Format::E4m3, Fp8Scales::Ue8m0),
        ] {
            let precision = Precision::Fp8 { format, scales };
            let (x, w, dy) = (values(&[300, 140], 1), values(&[4, 33, 140], 2), values(&[300, 33], 3));
            let [dx, dw] = expected_gradients(&x, &w, &dy, &offsets, precision);
            let mut tape = Tape::new();
            let input = tape.leaf(x);
            let p = Param { compute: Weight::encode(&w, &precision), ..param(0, &w) };
            let y = on_tape(&mut tape, &input, &offsets, &p);
            let mut weights = WeightGrads::default();
            let mut grads = tape.backward(vec![(y.id(), dy)], &mut weights);
            let close = |computed: &Tensor, expected: &[f64]| {
                let error: f64 = computed.as_f32().iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
                let norm: f64 = expected.iter().map(|b| b * b).sum();
                assert!((error / norm).sqrt() < 1e-6, "{format:?} {scales:?}");
            };
            close(&grads.take(input.id()).expect("dx"), &dx);
            close(weights.get(0).expect("dw"), &dw);
        }
    }

    #[test]
    fn threads_and_deferred_jobs_do_not_change_bits() {
        let offsets: Arc<[usize]> = Arc::new([0, 700, 700, 701, 1100]);
        let (x, w, dy) = (values(&[1100, 140], 1), values(&[4, 72, 140], 2), values(&[1100, 72], 3));
        let fp8 = Precision::Fp8 { format: Fp8Format::Hybrid, scales: Fp8Scales::F32 };
        for precision in [Precision::F32, Precision::Bf16, fp8] {
            let p = Param { compute: Weight::encode(&w, &precision), ..param(0, &w) };
            let step = |threads: usize, split: bool| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
                pool.install(|| {
                    let mut tape = Tape::new();
                    let input = tape.leaf(x.clone());
                    let ys = on_tape_many(&mut tape, &input, &offsets, &[&p, &p]);
                    let mut weights = WeightGrads::default();
                    let seeds = ys.iter().map(|y| (y.id(), dy.clone())).collect();
                    let mut grads =
                        if split { tape.backward_inputs(seeds) } else { tape.backward(seeds, &mut weights) };
                    tape.run_deferred(usize::MAX, &mut weights);
                    let dx = grads.take(input.id()).expect("dx").into_f32();
                    let dw = weights.get(0).expect("dw").clone().into_f32();
                    [ys[0].value.clone().into_f32(), dx, dw].concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                })
            };
            let one = step(1, false);
            assert_eq!(one, step(2, false), "{precision:?} on two threads");
            assert_eq!(one, step(3, true), "{precision:?} in two halves");
        }
    }
}
