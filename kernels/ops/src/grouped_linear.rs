//! Linear layers of several experts at once: y_i = x_i · w_eᵀ for the rows i of expert e.
//!
//! `x` `[slots, in]` is sorted by expert; `offsets` (experts + 1 of them) bound each expert's rows; `w` is
//! `[experts, out, in]`, or `[out, in]` for one. Three products: y = x·wᵀ, dx = dy·w, dw = dyᵀ·x, operands rounded as the
//! weight's precision and its exceptions say (`activation.rs`). An expert without rows has y and dx without rows and adds nothing to dw.
//! DeepSeek-V3 report §3.3 for FP8.

use std::ops::Range;
use std::sync::Arc;

use crate::activation::{self, Columns, Rows, Saved};
use crate::fp8::TILE;
use crate::gemm::{self, CodeProduct, Mat, Product, Right, RowScales, Scaled};
use crate::isa::Isa;
use crate::permute::Dispatch;
use crate::swiglu::Cached;
use crate::weight::{CodeOperand, Operand};
use crate::{Back, Grads, Job, Param, ParamId, Precision, Tape, Tensor, Var, VarId, Weight, WeightGrads, memory};

/// `[slots, in]` → `[slots, out]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn forward(x: &Tensor, offsets: &[usize], w: &Weight) -> Tensor {
    let (rows, _) = activation::input(x, w.rounding(), false);
    multiply(x.shape(), &rows, offsets, w)
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
    let (rows, _) = activation::input(&x.value, w.compute.rounding(), false);
    let mut outputs = record(tape, x, offsets, &[w], &rows, Some(Saved::Swiglu(cached)));
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
    let (rows, saved) = activation::input(&x.value, rounding, tape.is_recording());
    record(tape, x, offsets, ws, &rows, saved)
}

/// As [`on_tape_many`] for the rows `slots` that `dispatch` makes of `x`. In F32 they are not kept: the weight gradients
/// gather them from `x` again.
///
/// # Panics
/// When the shapes do not fit or the precisions or exceptions differ.
pub fn on_tape_dispatched(
    tape: &mut Tape,
    slots: &Var,
    x: &Tensor,
    dispatch: &Arc<Dispatch>,
    ws: &[&Param],
) -> Vec<Var> {
    if !tape.is_recording() || ws.iter().any(|w| w.compute.precision() != Precision::F32) {
        return on_tape_many(tape, slots, &dispatch.offsets, ws);
    }
    let rows = Rows::Values(slots.value.clone());
    record(tape, slots, &dispatch.offsets, ws, &rows, Some(Saved::Gathered(x.clone(), dispatch.clone())))
}

/// The outputs of `x`, which rounds to `rows`, and the backward pass if something was saved for it.
fn record(
    tape: &mut Tape,
    x: &Var,
    offsets: &Arc<[usize]>,
    ws: &[&Param],
    rows: &Rows,
    saved: Option<Saved>,
) -> Vec<Var> {
    let shape = x.value.shape();
    let outputs: Vec<Var> = ws.iter().map(|w| tape.leaf(multiply(shape, rows, offsets, &w.compute))).collect();
    if let Some(saved) = saved {
        let outputs = outputs.iter().zip(ws).map(|(y, w)| (y.id(), w.id, w.compute.clone())).collect();
        let (x, shape, offsets) = (x.id(), shape.to_vec(), offsets.clone());
        tape.record(|| Box::new(Backward { x, shape, saved, offsets, outputs }));
    }
    outputs
}

/// # Panics
/// When an input of `shape` and these offsets do not fit the weight.
pub(crate) fn check(shape: &[usize], offsets: &[usize], w: &Weight) {
    let (cols, experts) = (shape.last().copied().unwrap_or(1), w.count());
    let rows: usize = shape.iter().rev().skip(1).product();
    assert_eq!(cols, w.inputs(), "linear: input {shape:?}, weight {:?}", w.shape());
    assert_eq!(offsets.len(), experts + 1, "linear: one offset per expert and one at the end");
    assert!(offsets[0] == 0 && offsets[experts] == rows && offsets.is_sorted(), "linear: offsets must run to {rows}");
}

/// y = x·wᵀ of what `x` of `shape` rounds to.
pub(crate) fn multiply(shape: &[usize], x: &Rows, offsets: &[usize], w: &Weight) -> Tensor {
    check(shape, offsets, w);
    let (n, k) = (w.outputs(), w.inputs());
    let mut shape = shape.to_vec();
    *shape.last_mut().expect("a linear input has columns") = n;
    let mut y = memory::buffer(shape.iter().product());
    rows_times(x, offsets, w, true, [n, k], &mut y, false);
    Tensor::f32(&shape, y)
}

/// `c[rows of e] (+)= a[rows of e] · b[e]` for every expert e, where b is `w`, `transposed` or not; `a` is `[slots, k]`,
/// `c` `[slots, n]`.
fn rows_times(
    a: &Rows,
    offsets: &[usize],
    w: &Weight,
    transposed: bool,
    [n, k]: [usize; 2],
    c: &mut [f32],
    accumulate: bool,
) {
    let group = Group::new(a, offsets, w, transposed, [n, k]);
    let (mut plain, mut codes) = (Vec::new(), Vec::new());
    group.products(c, accumulate, &mut plain, &mut codes);
    gemm::run_mixed(Isa::best(), &mut plain, &mut codes);
}

/// The products of a layer's experts that have any row.
pub(crate) struct Group<'a> {
    a: &'a Rows,
    /// Rows and matrix of each.
    parts: Vec<(Range<usize>, Box<dyn Right + 'a>)>,
    n: usize,
    k: usize,
}

impl<'a> Group<'a> {
    /// For the rows `offsets` bound, with `w` `transposed` (k over its inputs) or not.
    pub(crate) fn new(a: &'a Rows, offsets: &[usize], w: &'a Weight, transposed: bool, [n, k]: [usize; 2]) -> Self {
        let some = offsets.windows(2).enumerate().filter(|(_, range)| range[1] > range[0]);
        let parts = some.map(|(e, range)| {
            let right: Box<dyn Right + 'a> = match a {
                Rows::Values(_) if transposed => Box::new(Operand::forward(w, e)),
                Rows::Values(_) => Box::new(Operand::backward(w, e)),
                Rows::Codes { form, .. } => Box::new(CodeOperand::new(w, e, transposed, *form)),
            };
            (range[0]..range[1], right)
        });
        Self { a, parts: parts.collect(), n, k }
    }

    /// Adds the products to `plain` or `codes`; `c` is `[slots, n]`.
    pub(crate) fn products<'b>(
        &'b self,
        c: &'b mut [f32],
        accumulate: bool,
        plain: &mut Vec<Product<'b>>,
        codes: &mut Vec<CodeProduct<'b>>,
    ) {
        let n = self.n;
        let mut rest = c;
        for (range, b) in &self.parts {
            let (c, after) = rest.split_at_mut(range.len() * n);
            rest = after;
            let product = |a: &'b [f32], k: usize, c| {
                let a = Mat::rows(&a[range.start * k..range.end * k], k);
                Product { m: range.len(), n, k, a, b: &**b, c, c_stride: n, accumulate }
            };
            match self.a {
                Rows::Values(values) => plain.push(product(values.as_f32(), self.k, c)),
                Rows::Codes { words, scales, form } => {
                    let tiles = self.k.div_ceil(TILE);
                    let data = &scales[range.start * tiles..];
                    let row_scales = RowScales { data, row_stride: tiles, block_stride: 1 };
                    let product = product(words.as_f32(), form.words(self.k), c);
                    codes.push(CodeProduct { product, form: *form, row_scales });
                }
            }
        }
    }
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
            rows_times(&rows, &offsets, w, false, [w.inputs(), w.outputs()], &mut dx, i > 0);
            *dy = activation::gradient_to_keep(dy.clone(), rows);
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
        let (slot, accumulate) = weights.slot_or_new(id, w.shape());
        columns_times(&dy, &x, offsets, [w.outputs(), w.inputs()], slot, accumulate);
    }
}

/// `c[e] (+)= aᵀ·b` over the tokens of every expert e; `a` is `[tokens, n]`, `b` `[tokens, k]`, `c` `[experts, n, k]`.
fn columns_times(a: &Columns, b: &Columns, offsets: &[usize], [n, k]: [usize; 2], c: &mut [f32], accumulate: bool) {
    let empty = offsets.windows(2).zip(c.chunks_mut(n * k)).filter(|(range, _)| !accumulate && range[1] == range[0]);
    empty.for_each(|(_, c)| c.fill(0.0));
    let experts = offsets.windows(2).zip(c.chunks_mut(n * k)).filter(|(range, _)| range[1] > range[0]);
    match (a, b) {
        (Columns::Values(a), Columns::Values(b)) => {
            let (a, b) = (a.as_f32(), b.as_f32());
            let bs: Vec<_> = offsets.windows(2).map(|r| Mat::rows(&b[r[0] * k..r[1] * k], k)).collect();
            let bs = bs.iter().zip(offsets.windows(2)).filter(|(_, range)| range[1] > range[0]);
            let products = experts.zip(bs).map(|((range, c), (b, _))| {
                let a = Mat::transposed(&a[range[0] * n..range[1] * n], n);
                Product { m: n, n: k, k: range[1] - range[0], a, b, c, c_stride: k, accumulate }
            });
            gemm::run(Isa::best(), &mut products.collect::<Vec<_>>());
        }
        (Columns::Codes(a), Columns::Codes(b)) => {
            let form = a.form;
            let bs = b.segments(k, offsets).into_iter();
            let bs: Vec<_> = bs.map(|(words, scales)| Scaled { words: Mat::rows(words, k), scales, n: k }).collect();
            let pairs = a.segments(n, offsets).into_iter().zip(&bs).filter(|((a, _), _)| !a.is_empty());
            let products = experts.zip(pairs).map(|((_, c), ((words, scales), b))| {
                let (m, tokens, a) = (n, words.len() / n, Mat::transposed(words, n));
                let product = Product { m, n: k, k: tokens, a, b, c, c_stride: k, accumulate };
                let row_scales = RowScales { data: scales, row_stride: 1, block_stride: n };
                CodeProduct { product, form, row_scales }
            });
            gemm::run_codes(Isa::best(), &mut products.collect::<Vec<_>>());
        }
        _ => unreachable!("input and gradient of one layer are rounded alike"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, param, values};
    use crate::{Fp8Format, Fp8Scales, linear};

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
