//! Linear layers of several experts at once: y_i = x_i · w_eᵀ for the rows i of expert e.
//!
//! `x` `[slots, in]` is sorted by expert; `offsets` (experts + 1 of them) bound each expert's rows; `w` is
//! `[experts, out, in]`, or `[out, in]` for one. Three products: y = x·wᵀ, dx = dy·w, dw = dyᵀ·x, operands rounded as the
//! weight's precision says (`activation.rs`). An expert without rows has y and dx without rows and adds nothing to dw.
//! DeepSeek-V3 report §3.3 for FP8.

use std::sync::Arc;

use crate::activation::{self, Saved};
use crate::gemm::{self, Mat, Product};
use crate::isa::Isa;
use crate::weight::Operand;
use crate::{Back, Grads, Job, Param, ParamId, Tape, Tensor, Var, VarId, Weight, WeightGrads};

/// `[slots, in]` → `[slots, out]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn forward(x: &Tensor, offsets: &[usize], w: &Weight) -> Tensor {
    let (values, _) = activation::input(x, w.precision(), false);
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

/// One input through several weights of one precision; it is quantised once, and its gradient is the sum over the outputs in order.
///
/// # Panics
/// When the shapes do not fit or the precisions differ.
pub fn on_tape_many(tape: &mut Tape, x: &Var, offsets: &Arc<[usize]>, ws: &[&Param]) -> Vec<Var> {
    let Some(first) = ws.first() else { return Vec::new() };
    let precision = first.compute.precision();
    assert!(ws.iter().all(|w| w.compute.precision() == precision), "weights that share an input differ in precision");
    let (values, saved) = activation::input(&x.value, precision, tape.is_recording());
    let outputs: Vec<Var> = ws.iter().map(|w| tape.leaf(multiply(&values, offsets, &w.compute))).collect();
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

/// y = x·wᵀ on rounded values.
fn multiply(x: &Tensor, offsets: &[usize], w: &Weight) -> Tensor {
    check(x, offsets, w);
    let (n, k) = (w.outputs(), w.inputs());
    let mut shape = x.shape().to_vec();
    *shape.last_mut().expect("a linear input has columns") = n;
    let mut y = vec![0.0; shape.iter().product()];
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
        let arrived: Vec<_> =
            outputs.into_iter().filter_map(|(y, id, w)| grads.take(y).map(|dy| (dy, id, w))).collect();
        if arrived.is_empty() {
            return None;
        }
        let mut dx = vec![0.0; shape.iter().product()];
        for (i, (dy, _, w)) in arrived.iter().enumerate() {
            let dy = activation::gradient_rows(dy, w.precision());
            let operands: Vec<_> = (0..w.count()).map(|e| Operand::backward(w, e)).collect();
            rows_times(dy.as_f32(), &offsets, &operands, w.inputs(), w.outputs(), &mut dx, i > 0);
        }
        grads.add(x, Tensor::f32(&shape, dx));
        Some(Job::new(move |weights| weight_gradients(&saved, &offsets, arrived, weights)))
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
    let x = activation::saved_columns(saved, first.precision(), offsets);
    for (dy, id, w) in arrived {
        let dy = activation::gradient_columns(dy, w.precision(), offsets);
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
