//! Causal attention of multi-head latent attention in its training form.
//!
//! Per sequence and head: o_i = Σ_{j≤i} softmax_j(scale · q_i·[k_j ; r_j]) v_j, with k_j and v_j halves of `kv` and the
//! rotary key r_j shared by all heads. Shapes: q `[tokens, heads, dn + dr]` (rotated), kv `[tokens, heads, dn + dv]`,
//! k_rope `[tokens, dr]`, o `[tokens, heads · dv]`; no token looks across a [`Spans`] boundary.
//!
//! Work is divided by (sequence, head). Inside, tiles of [`TILE`] queries meet all keys up to their last one, so
//! scores take `TILE` × length floats per thread and never length²; products go by parts of [`PART`] queries, which leave
//! out what none of them sees. Saved: the inputs and log-sum-exp per query; the
//! output is not, D below needs none, so the linear layer after attention holds its only copy.
//! Backward, per tile, with P computed again: D_i = Σ_j P_ij dP_ij, dS = P ∘ (dP − D), dP = dO·Vᵀ; dQ = scale · dS·K,
//! dK += scale · dSᵀ·Q, dV += Pᵀ·dO, tiles in order; the shared key's gradient adds heads in order.
//! Paper: report §2.1.1, `reference/deepseek-v3.md` §2.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::gemm::{self, Mat, Product, Right};
use crate::isa::{Isa, simd_fn};
use crate::memory::buffer;
use crate::panels::Panels;

use crate::vector::{dot, exp_in_place, for_row_chunks, max, scratch};
use crate::{Back, Grads, Job, Spans, Tape, Tensor, Var, VarId};

/// Queries computed together.
const TILE: usize = 64;
/// Queries of a product with the keys up to their last one; a panel's width.
const PART: usize = 32;

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
    /// Scaled keys of one head with the rotary part appended, contiguous: `[len, dq]`.
    fn scaled_keys(&self, first: usize, len: usize, head: usize) -> Tensor {
        let s = self.sizes;
        let mut keys = scratch(len * s.dq());
        let plain = &self.kv[(first * s.heads + head) * s.dkv()..];
        scale_keys(
            Isa::best(),
            (plain, s.heads * s.dkv()),
            &self.k_rope[first * s.dr..],
            s,
            self.scale,
            keys.as_f32_mut(),
        );
        keys
    }

    fn queries(&self, first: usize, head: usize) -> Mat<'a> {
        let s = self.sizes;
        Mat::rows(&self.q[(first * s.heads + head) * s.dq()..], s.heads * s.dq())
    }

    fn values(&self, first: usize, head: usize) -> Mat<'a> {
        let s = self.sizes;
        Mat::rows(&self.kv[(first * s.heads + head) * s.dkv() + s.dn..], s.heads * s.dkv())
    }
}

simd_fn! {
    /// One head's keys, `plain.1` apart, beside the rotary ones, all times `scale`.
    fn scale_keys(plain: (&[f32], usize), rotary: &[f32], s: Sizes, scale: f32, out: &mut [f32]) {
        for (token, out) in out.chunks_exact_mut(s.dq()).enumerate() {
            let (here, rest) = out.split_at_mut(s.dn);
            for (out, k) in here.iter_mut().zip(&plain.0[token * plain.1..][..s.dn]) {
                *out = k * scale;
            }
            for (out, k) in rest.iter_mut().zip(&rotary[token * s.dr..][..s.dr]) {
                *out = k * scale;
            }
        }
    }
}

/// `c[m, n] (+)= a[m, k] · b[k, n]` in the calling thread, rows of `c` being `c_stride` apart.
fn product([m, n, k]: [usize; 3], a: Mat<'_>, b: &dyn Right, c: &mut [f32], c_stride: usize, accumulate: bool) {
    gemm::run_serial(Product { m, n, k, a, b, c, c_stride, accumulate });
}

fn tiles(len: usize) -> impl Iterator<Item = Range<usize>> {
    cut(0..len, TILE)
}

/// Pieces of at most `size`.
fn cut(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(size).map(move |start| start..end.min(start + size))
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
    let mut out = buffer(parts.len());
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
    let mut out = scratch(tokens * heads * dv);
    let mut logsumexp = buffer(tokens * heads);
    by_sequence_and_head(out.as_f32_mut(), spans, heads, dv)
        .into_par_iter()
        .zip(by_sequence_and_head(&mut logsumexp, spans, heads, 1))
        .enumerate()
        .for_each(|(i, (out, logsumexp))| one_head(&inputs, spans.range(i / heads), i % heads, out, logsumexp));
    let out = interleave(out.as_f32(), spans, heads, dv);
    (Tensor::f32(&[tokens, heads * dv], out), logsumexp)
}

fn one_head(inputs: &Inputs<'_>, range: Range<usize>, head: usize, out: &mut [f32], logsumexp: &mut [f32]) {
    let (first, len, dq, dv) = (range.start, range.len(), inputs.sizes.dq(), inputs.sizes.dv);
    let keys = Panels::new(Mat::transposed(inputs.scaled_keys(first, len, head).as_f32(), dq), dq, len);
    let values = Panels::new(inputs.values(first, head), len, dv);
    let mut scores = scratch(TILE.min(len) * len);
    for tile in tiles(len) {
        let (rows, width) = (tile.len(), tile.end);
        let row = |part: &Range<usize>| part.start - tile.start;
        let scores = &mut scores.as_f32_mut()[..rows * width];
        for part in cut(tile.clone(), PART) {
            let (queries, scores) = (inputs.queries(first + part.start, head), &mut scores[row(&part) * width..]);
            product([part.len(), part.end, dq], queries, &keys, scores, width, false);
        }
        let mut inverse_totals = [0.0; TILE];
        let statistics = (&mut logsumexp[tile.clone()], &mut inverse_totals);
        softmax_tile(Isa::best(), scores, width, tile.start, statistics);
        for part in cut(tile.clone(), PART) {
            let (scores, out) = (Mat::rows(&scores[row(&part) * width..], width), &mut out[part.start * dv..]);
            product([part.len(), dv, part.end], scores, &values, out, dv, false);
        }
        let out = &mut out[tile.start * dv..tile.end * dv];
        for (out, inverse) in out.chunks_exact_mut(dv).zip(&inverse_totals) {
            for o in out {
                *o *= inverse;
            }
        }
    }
}

simd_fn! {
    /// Turns scaled scores into e^(score − largest), 0 where a query does not see; writes log-sum-exp and 1 / Σ.
    fn softmax_tile(scores: &mut [f32], width: usize, start: usize, statistics: (&mut [f32], &mut [f32; TILE])) {
        let (logsumexp, inverse_totals) = statistics;
        for (i, row) in scores.chunks_exact_mut(width).enumerate() {
            let (seen, unseen) = row.split_at_mut(start + i + 1);
            let largest = max(seen);
            let total = exp_in_place(seen, largest);
            unseen.fill(0.0);
            inverse_totals[i] = 1.0 / total;
            logsumexp[i] = largest + total.ln();
        }
    }
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
        let mut dq = scratch(q.numel());
        let mut dk = scratch(q.numel());
        let mut dv = scratch(self.spans.tokens() * heads * sizes.dv);
        by_sequence_and_head(dq.as_f32_mut(), &self.spans, heads, sizes.dq())
            .into_par_iter()
            .zip(by_sequence_and_head(dk.as_f32_mut(), &self.spans, heads, sizes.dq()))
            .zip(by_sequence_and_head(dv.as_f32_mut(), &self.spans, heads, sizes.dv))
            .enumerate()
            .for_each(|(i, ((dq, dk), dv))| {
                let range = self.spans.range(i / heads);
                let logsumexp = &self.logsumexp[range.start * heads + i % heads * range.len()..][..range.len()];
                one_head_back(&inputs, range, i % heads, d_out.as_f32(), logsumexp, HeadGrads { dq, dk, dv });
            });
        let dq = interleave(dq.as_f32(), &self.spans, heads, sizes.dq());
        let (d_kv, d_rope) = join_key_grads(dk.as_f32(), dv.as_f32(), &self.spans, sizes);
        grads.add(self.q.id(), Tensor::f32(q.shape(), dq));
        grads.add(self.kv.id(), Tensor::f32(kv.shape(), d_kv));
        grads.add(self.k_rope.id(), Tensor::f32(k_rope.shape(), d_rope));
        crate::memory::give_back(self.logsumexp);
        None
    }
}

/// Where the gradients of one head of one sequence go.
struct HeadGrads<'a> {
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

fn one_head_back(
    inputs: &Inputs<'_>,
    range: Range<usize>,
    head: usize,
    d_out: &[f32],
    logsumexp: &[f32],
    grads: HeadGrads<'_>,
) {
    let s = inputs.sizes;
    let (first, len, dq, dv) = (range.start, range.len(), s.dq(), s.dv);
    let keys = inputs.scaled_keys(first, len, head);
    let keys_by_token = Panels::new(Mat::rows(keys.as_f32(), dq), len, dq);
    let keys_by_column = Panels::new(Mat::transposed(keys.as_f32(), dq), dq, len);
    let values = inputs.values(first, head);
    let values_t = Panels::new(Mat { row_stride: 1, col_stride: values.row_stride, ..values }, dv, len);
    let mut p = scratch(TILE.min(len) * len);
    let mut ds = scratch(TILE.min(len) * len);
    grads.dk.fill(0.0);
    grads.dv.fill(0.0);
    for tile in tiles(len) {
        let (rows, width) = (tile.len(), tile.end);
        let (p, ds) = (&mut p.as_f32_mut()[..rows * width], &mut ds.as_f32_mut()[..rows * width]);
        let row = |part: &Range<usize>| part.start - tile.start;
        let queries = |part: &Range<usize>| inputs.queries(first + part.start, head);
        let d_out =
            |part: &Range<usize>| Mat::rows(&d_out[((first + part.start) * s.heads + head) * dv..], s.heads * dv);
        for part in cut(tile.clone(), PART) {
            let (sizes, at) = ([part.len(), part.end], row(&part) * width);
            product([sizes[0], sizes[1], dq], queries(&part), &keys_by_column, &mut p[at..], width, false);
            product([sizes[0], sizes[1], dv], d_out(&part), &values_t, &mut ds[at..], width, false);
        }
        score_grads_tile(Isa::best(), p, ds, width, tile.start, &logsumexp[tile.clone()]);
        let mut keys_done = 0;
        for part in cut(tile.clone(), PART) {
            let ds_rows = Mat::rows(&ds[row(&part) * width..], width);
            let tile_dq = &mut grads.dq[part.start * dq..];
            product([part.len(), dq, part.end], ds_rows, &keys_by_token, tile_dq, dq, false);
            // Keys that no earlier part sees, and the queries from this part on.
            let (keys, count, at) = (keys_done..part.end, tile.end - part.start, row(&part) * width + keys_done);
            let (dk, dv_rows) = (&mut grads.dk[keys.start * dq..], &mut grads.dv[keys.start * dv..]);
            product([keys.len(), dq, count], Mat::transposed(&ds[at..], width), &queries(&part), dk, dq, true);
            product([keys.len(), dv, count], Mat::transposed(&p[at..], width), &d_out(&part), dv_rows, dv, true);
            keys_done = part.end;
        }
    }
    for d in grads.dk.iter_mut() {
        *d *= inputs.scale;
    }
}

simd_fn! {
    /// Turns scaled scores, and the gradients of their probabilities, into probabilities and gradients of scores; the
    /// tile starts at query `start`, and what a query does not see becomes 0.
    fn score_grads_tile(p: &mut [f32], ds: &mut [f32], width: usize, start: usize, logsumexp: &[f32]) {
        for (i, (p, ds)) in p.chunks_exact_mut(width).zip(ds.chunks_exact_mut(width)).enumerate() {
            let (p, p_unseen) = p.split_at_mut(start + i + 1);
            let (ds, ds_unseen) = ds.split_at_mut(start + i + 1);
            exp_in_place(p, logsumexp[i]);
            let level = dot(p, ds);
            for (d, p) in ds.iter_mut().zip(p.iter()) {
                *d = p * (*d - level);
            }
            p_unseen.fill(0.0);
            ds_unseen.fill(0.0);
        }
    }
}

/// Head-major key and value gradients to those of kv `[tokens, heads, dn + dv]` and of the shared key `[tokens, dr]`.
fn join_key_grads(dk: &[f32], dv: &[f32], spans: &Spans, s: Sizes) -> (Vec<f32>, Vec<f32>) {
    let (heads, dq) = (s.heads, s.dq());
    let mut d_kv = buffer(spans.tokens() * heads * s.dkv());
    let mut d_rope = crate::memory::zeros(spans.tokens() * s.dr);
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
