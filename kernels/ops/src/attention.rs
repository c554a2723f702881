//! Causal attention of multi-head latent attention in its training form.
//!
//! Per sequence and head: o_i = Σ_{j≤i} softmax_j(scale · q_i·[k_j ; r_j]) v_j, with k_j and v_j halves of `kv` and the
//! rotary key r_j shared by all heads. Shapes: q `[tokens, heads, dn + dr]` (rotated), kv `[tokens, heads, dn + dv]`,
//! k_rope `[tokens, dr]`, o `[tokens, heads · dv]`; no token looks across a [`Spans`] boundary.
//!
//! Work is divided by (sequence, head). Inside, tiles of [`TILE`] queries meet all keys up to their last one, so
//! scores take `TILE` × length floats per thread and never length². Saved: the inputs and log-sum-exp per query.
//! Backward, per tile, with P computed again: D_i = Σ_j P_ij dP_ij, dS = scale · P ∘ (dP − D), dP = dO·Vᵀ; dQ = dS·K,
//! dK += dSᵀ·Q, dV += Pᵀ·dO, tiles in order; the shared key's gradient adds heads in order.
//! Paper: report §2.1.1, `reference/deepseek-v3.md` §2.

use std::sync::Arc;

use rayon::prelude::*;

use crate::gemm::{Mat, gemm_serial};

use crate::vector::{dot, exp, exp_in_place, for_row_chunks, max, wide};
use crate::{Back, Grads, Job, Spans, Tape, Tensor, Var, VarId};

/// Queries computed together.
const TILE: usize = 64;

/// Sizes of one call.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    heads: usize,
    /// Key width without rotation.
    dn: usize,
    /// Rotary width.
    dr: usize,
    /// Value width.
    dv: usize,
}

impl Sizes {
    fn of(q: &Tensor, kv: &Tensor, k_rope: &Tensor, spans: &Spans) -> Self {
        let &[tokens, heads, dq] = q.shape() else { panic!("attention queries of shape {:?}", q.shape()) };
        let dr = k_rope.cols();
        let fits = tokens == spans.tokens() && kv.shape()[..2] == [tokens, heads] && k_rope.rows() == tokens;
        assert!(
            fits && dr <= dq && kv.cols() >= dq - dr,
            "attention of q {:?}, kv {:?}, k_rope {:?} over {} tokens",
            q.shape(),
            kv.shape(),
            k_rope.shape(),
            spans.tokens()
        );
        Self { heads, dn: dq - dr, dr, dv: kv.cols() - (dq - dr) }
    }

    fn dq(&self) -> usize {
        self.dn + self.dr
    }

    fn dkv(&self) -> usize {
        self.dn + self.dv
    }
}

/// The inputs of one call, flat.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    q: &'a [f32],
    kv: &'a [f32],
    k_rope: &'a [f32],
    sizes: Sizes,
    scale: f32,
}

impl<'a> Inputs<'a> {
    /// Keys of one head with the rotary part appended, contiguous: `[len, dq]`.
    fn keys(&self, first: usize, len: usize, head: usize) -> Vec<f32> {
        let s = self.sizes;
        let mut keys = Vec::with_capacity(len * s.dq());
        for token in first..first + len {
            keys.extend_from_slice(&self.kv[(token * s.heads + head) * s.dkv()..][..s.dn]);
            keys.extend_from_slice(&self.k_rope[token * s.dr..][..s.dr]);
        }
        keys
    }

    fn queries(&self, first: usize, head: usize) -> Mat<'a> {
        let s = self.sizes;
        Mat::rows(&self.q[(first * s.heads + head) * s.dq()..], s.heads * s.dq())
    }

    fn values(&self, first: usize, head: usize) -> Mat<'a> {
        let s = self.sizes;
        Mat {
            data: &self.kv[(first * s.heads + head) * s.dkv() + s.dn..],
            row_stride: s.heads * s.dkv(),
            col_stride: 1,
        }
    }

    /// Scaled scores of queries `tile` of a sequence that starts at `first` against keys `0..tile.end`.
    fn scores(&self, first: usize, tile: &std::ops::Range<usize>, head: usize, keys: &[f32], into: &mut Vec<f32>) {
        let width = tile.end;
        into.resize(tile.len() * width, 0.0);
        let q = self.queries(first + tile.start, head);
        let k = Mat::transposed(keys, self.sizes.dq());
        gemm_serial(tile.len(), width, self.sizes.dq(), q, k, into, width, false);
    }
}

fn tiles(len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..len.div_ceil(TILE)).map(move |i| i * TILE..len.min((i + 1) * TILE))
}

/// Attention output `[tokens, heads · dv]`.
///
/// # Panics
/// When shapes disagree.
pub fn forward(q: &Tensor, kv: &Tensor, k_rope: &Tensor, spans: &Spans, scale: f32) -> Tensor {
    evaluate(q, kv, k_rope, spans, scale).0
}

/// [`forward`] with the gradients of the three inputs.
pub fn on_tape(tape: &mut Tape, q: &Var, kv: &Var, k_rope: &Var, spans: &Arc<Spans>, scale: f32) -> Var {
    let (value, logsumexp) = evaluate(&q.value, &kv.value, &k_rope.value, spans, scale);
    let (q, kv, k_rope, spans) = (q.clone(), kv.clone(), k_rope.clone(), spans.clone());
    tape.push(value, |out| Box::new(AttentionBack { q, kv, k_rope, spans, scale, logsumexp, out }))
}

/// Splits `data` into one part per (sequence, head), each of length × `width`, sequence by sequence.
fn by_sequence_and_head<'a>(mut data: &'a mut [f32], spans: &Spans, heads: usize, width: usize) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(spans.count() * heads);
    for range in spans.iter() {
        for _ in 0..heads {
            let (part, rest) = data.split_at_mut(range.len() * width);
            parts.push(part);
            data = rest;
        }
    }
    parts
}

/// Reorders head-major parts (see [`by_sequence_and_head`]) into `[tokens, heads, width]`.
fn interleave(parts: &[f32], spans: &Spans, heads: usize, width: usize) -> Vec<f32> {
    let mut out = vec![0.0; parts.len()];
    for range in spans.iter() {
        let (first, len) = (range.start, range.len());
        let rows = &mut out[first * heads * width..range.end * heads * width];
        let parts = &parts[first * heads * width..range.end * heads * width];
        for_row_chunks(rows, heads * width, TILE, heads * width, |start, chunk| {
            for (i, row) in chunk.chunks_exact_mut(heads * width).enumerate() {
                for (head, row) in row.chunks_exact_mut(width).enumerate() {
                    row.copy_from_slice(&parts[(head * len + start + i) * width..][..width]);
                }
            }
        });
    }
    out
}

/// Output, and log-sum-exp of scaled scores in head-major order.
fn evaluate(q: &Tensor, kv: &Tensor, k_rope: &Tensor, spans: &Spans, scale: f32) -> (Tensor, Vec<f32>) {
    let sizes = Sizes::of(q, kv, k_rope, spans);
    let inputs = Inputs { q: q.as_f32(), kv: kv.as_f32(), k_rope: k_rope.as_f32(), sizes, scale };
    let (tokens, heads, dv) = (spans.tokens(), sizes.heads, sizes.dv);
    let mut out = vec![0.0; tokens * heads * dv];
    let mut logsumexp = vec![0.0; tokens * heads];
    by_sequence_and_head(&mut out, spans, heads, dv)
        .into_par_iter()
        .zip(by_sequence_and_head(&mut logsumexp, spans, heads, 1))
        .enumerate()
        .for_each(|(i, (out, logsumexp))| one_head(&inputs, spans.range(i / heads), i % heads, out, logsumexp));
    let out = interleave(&out, spans, heads, dv);
    (Tensor::f32(&[tokens, heads * dv], out), logsumexp)
}

fn one_head(inputs: &Inputs<'_>, range: std::ops::Range<usize>, head: usize, out: &mut [f32], logsumexp: &mut [f32]) {
    let (len, dv) = (range.len(), inputs.sizes.dv);
    let keys = inputs.keys(range.start, len, head);
    let mut scores = Vec::new();
    for tile in tiles(len) {
        let width = tile.end;
        inputs.scores(range.start, &tile, head, &keys, &mut scores);
        wide(|| {
            for (i, row) in tile.clone().zip(scores.chunks_exact_mut(width)) {
                let (seen, unseen) = row.split_at_mut(i + 1);
                logsumexp[i] = softmax(seen, inputs.scale);
                unseen.fill(0.0);
            }
        });
        let out = &mut out[tile.start * dv..tile.end * dv];
        let values = inputs.values(range.start, head);
        gemm_serial(tile.len(), dv, width, Mat::rows(&scores, width), values, out, dv, false);
    }
}

/// Turns scores into probabilities of `scale · scores`; returns their log-sum-exp.
#[inline(always)]
fn softmax(scores: &mut [f32], scale: f32) -> f32 {
    for s in scores.iter_mut() {
        *s *= scale;
    }
    let largest = max(scores);
    let total = exp_in_place(scores, largest);
    let inverse = 1.0 / total;
    for p in scores.iter_mut() {
        *p *= inverse;
    }
    largest + total.ln()
}

struct AttentionBack {
    q: Var,
    kv: Var,
    k_rope: Var,
    spans: Arc<Spans>,
    scale: f32,
    logsumexp: Vec<f32>,
    out: VarId,
}

impl Back for AttentionBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let d_out = grads.take(self.out)?;
        let (q, kv, k_rope) = (&self.q.value, &self.kv.value, &self.k_rope.value);
        let sizes = Sizes::of(q, kv, k_rope, &self.spans);
        let inputs = Inputs { q: q.as_f32(), kv: kv.as_f32(), k_rope: k_rope.as_f32(), sizes, scale: self.scale };
        let heads = sizes.heads;
        let mut dq = vec![0.0; q.numel()];
        let mut dk = vec![0.0; q.numel()];
        let mut dv = vec![0.0; self.spans.tokens() * heads * sizes.dv];
        by_sequence_and_head(&mut dq, &self.spans, heads, sizes.dq())
            .into_par_iter()
            .zip(by_sequence_and_head(&mut dk, &self.spans, heads, sizes.dq()))
            .zip(by_sequence_and_head(&mut dv, &self.spans, heads, sizes.dv))
            .enumerate()
            .for_each(|(i, ((dq, dk), dv))| {
                let range = self.spans.range(i / heads);
                let logsumexp = &self.logsumexp[range.start * heads + i % heads * range.len()..][..range.len()];
                one_head_back(&inputs, range, i % heads, d_out.as_f32(), logsumexp, HeadGrads { dq, dk, dv });
            });
        let dq = interleave(&dq, &self.spans, heads, sizes.dq());
        let (d_kv, d_rope) = join_key_grads(&dk, &dv, &self.spans, sizes);
        grads.add(self.q.id(), Tensor::f32(q.shape(), dq));
        grads.add(self.kv.id(), Tensor::f32(kv.shape(), d_kv));
        grads.add(self.k_rope.id(), Tensor::f32(k_rope.shape(), d_rope));
        None
    }
}

/// Gradients of one head of one sequence, zero at first.
struct HeadGrads<'a> {
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

fn one_head_back(
    inputs: &Inputs<'_>,
    range: std::ops::Range<usize>,
    head: usize,
    d_out: &[f32],
    logsumexp: &[f32],
    grads: HeadGrads<'_>,
) {
    let s = inputs.sizes;
    let (first, len, dq, dv) = (range.start, range.len(), s.dq(), s.dv);
    let keys = inputs.keys(first, len, head);
    let values = inputs.values(first, head);
    let values_t = Mat { row_stride: values.col_stride, col_stride: values.row_stride, ..values };
    let (mut p, mut ds) = (Vec::new(), Vec::new());
    for tile in tiles(len) {
        let (width, rows) = (tile.end, tile.len());
        let d_out = Mat::rows(&d_out[((first + tile.start) * s.heads + head) * dv..], s.heads * dv);
        inputs.scores(first, &tile, head, &keys, &mut p);
        ds.resize(rows * width, 0.0);
        gemm_serial(rows, width, dv, d_out, values_t, &mut ds, width, false);
        wide(|| {
            for ((i, p), ds) in tile.clone().zip(p.chunks_exact_mut(width)).zip(ds.chunks_exact_mut(width)) {
                score_grads(&mut p[..=i], &mut ds[..=i], inputs.scale, logsumexp[i]);
                p[i + 1..].fill(0.0);
                ds[i + 1..].fill(0.0);
            }
        });
        let queries = inputs.queries(first + tile.start, head);
        let tile_dq = &mut grads.dq[tile.start * dq..tile.end * dq];
        gemm_serial(rows, dq, width, Mat::rows(&ds, width), Mat::rows(&keys, dq), tile_dq, dq, false);
        gemm_serial(width, dq, rows, Mat::transposed(&ds, width), queries, &mut grads.dk[..width * dq], dq, true);
        gemm_serial(width, dv, rows, Mat::transposed(&p, width), d_out, &mut grads.dv[..width * dv], dv, true);
    }
}

/// Turns scores into probabilities and the probabilities' gradients into those of the unscaled scores.
#[inline(always)]
fn score_grads(p: &mut [f32], ds: &mut [f32], scale: f32, logsumexp: f32) {
    for p in p.iter_mut() {
        *p = exp(*p * scale - logsumexp);
    }
    let level = dot(p, ds);
    for (d, p) in ds.iter_mut().zip(p.iter()) {
        *d = scale * p * (*d - level);
    }
}

/// Head-major key and value gradients to those of kv `[tokens, heads, dn + dv]` and of the shared key `[tokens, dr]`.
fn join_key_grads(dk: &[f32], dv: &[f32], spans: &Spans, s: Sizes) -> (Vec<f32>, Vec<f32>) {
    let (heads, dq) = (s.heads, s.dq());
    let mut d_kv = vec![0.0; spans.tokens() * heads * s.dkv()];
    let mut d_rope = vec![0.0; spans.tokens() * s.dr];
    for range in spans.iter() {
        let (first, len) = (range.start, range.len());
        let (dk, dv) = (&dk[first * heads * dq..], &dv[first * heads * s.dv..]);
        let rows = &mut d_kv[first * heads * s.dkv()..range.end * heads * s.dkv()];
        for_row_chunks(rows, heads * s.dkv(), TILE, heads * s.dkv(), |start, chunk| {
            for (i, row) in chunk.chunks_exact_mut(heads * s.dkv()).enumerate() {
                for (head, row) in row.chunks_exact_mut(s.dkv()).enumerate() {
                    let at = head * len + start + i;
                    row[..s.dn].copy_from_slice(&dk[at * dq..][..s.dn]);
                    row[s.dn..].copy_from_slice(&dv[at * s.dv..][..s.dv]);
                }
            }
        });
        for_row_chunks(&mut d_rope[first * s.dr..range.end * s.dr], s.dr, TILE, heads * s.dr, |start, chunk| {
            for (i, row) in chunk.chunks_exact_mut(s.dr).enumerate() {
                for head in 0..heads {
                    let part = &dk[(head * len + start + i) * dq + s.dn..][..s.dr];
                    for (sum, d) in row.iter_mut().zip(part) {
                        *sum += d;
                    }
                }
            }
        });
    }
    (d_kv, d_rope)
}

#[cfg(test)]
mod tests;
