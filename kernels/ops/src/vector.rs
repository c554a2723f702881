//! Vectorised scalar functions and fixed-order reductions shared by the ops.
//!
//! **Invariant**: everything here is plain multiplication and addition in a written order (16 lanes, folded pairwise),
//! never contracted and never reordered by the compiler, so wider instructions change the speed and not one bit.
//! All are inlined into the loops that use them, which `simd_fn!` compiles once per instruction set.

use rayon::prelude::*;

use crate::Tensor;
use crate::memory::buffer;

/// Lanes of a reduction.
pub(crate) const LANES: usize = 16;

/// Below this many elementary operations a loop stays in the calling thread.
const PARALLEL_WORK_MIN: usize = 1 << 15;

/// e^x, relative error below 2e-7 in [-87.3, 88.3]; 0 below, saturating above, NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits.
    let bounded = if x > 88.37 { 88.37 } else { x };
    let bounded = if bounded < -87.33 { -87.33 } else { bounded };
    let shifted = bounded * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = bounded - n * 0.693_359_4;
    let r = r - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4_f32;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * (r * r) + r + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32).wrapping_add(127);
    let value = p * f32::from_bits((exponent as u32) << 23);
    if x < -87.33 { 0.0 } else { value }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Sum of the lanes, folded pairwise.
#[inline(always)]
pub(crate) fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Σ x[i]·y[i] in 16 lanes.
#[inline(always)]
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (x_chunks, y_chunks) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let (x_rest, y_rest) = (x_chunks.remainder(), y_chunks.remainder());
    for (a, b) in x_chunks.zip(y_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for (i, (a, b)) in x_rest.iter().zip(y_rest).enumerate() {
        lanes[i] += a * b;
    }
    fold(lanes)
}

/// Σ x[i] in 16 lanes.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for a in chunks {
        for i in 0..LANES {
            lanes[i] += a[i];
        }
    }
    for (i, a) in rest.iter().enumerate() {
        lanes[i] += a;
    }
    fold(lanes)
}

/// The largest element, -inf of nothing.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for a in chunks {
        for i in 0..LANES {
            lanes[i] = if a[i] > lanes[i] { a[i] } else { lanes[i] };
        }
    }
    for (i, a) in rest.iter().enumerate() {
        lanes[i] = if *a > lanes[i] { *a } else { lanes[i] };
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, |best, v| if v > best { v } else { best })
}

/// `acc[i] += scale * x[i]`.
#[inline(always)]
pub(crate) fn add_scaled(acc: &mut [f32], scale: f32, x: &[f32]) {
    for (a, b) in acc.iter_mut().zip(x) {
        *a += scale * b;
    }
}

/// Turns `x` into e^(x - shift) and returns their sum, in 16 lanes.
#[inline(always)]
pub(crate) fn exp_in_place(x: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let mut chunks = x.chunks_exact_mut(LANES);
    for a in &mut chunks {
        for i in 0..LANES {
            a[i] = exp(a[i] - shift);
            lanes[i] += a[i];
        }
    }
    for (i, a) in chunks.into_remainder().iter_mut().enumerate() {
        *a = exp(*a - shift);
        lanes[i] += *a;
    }
    fold(lanes)
}

/// Space for intermediate results, of unspecified content; it goes back to the pool when dropped.
pub(crate) fn scratch(len: usize) -> Tensor {
    Tensor::f32(&[len], buffer(len))
}

/// Calls `work(first_row, chunk)` for chunks of `chunk_rows` rows of `out`, in parallel when rows × `row_work` is large.
/// The chunks are the same either way.
pub(crate) fn for_row_chunks(
    out: &mut [f32],
    cols: usize,
    chunk_rows: usize,
    row_work: usize,
    work: impl Fn(usize, &mut [f32]) + Sync + Send,
) {
    if out.is_empty() {
        return;
    }
    let len = cols * chunk_rows;
    if out.len() / cols * row_work < PARALLEL_WORK_MIN {
        out.chunks_mut(len).enumerate().for_each(|(i, chunk)| work(i * chunk_rows, chunk));
    } else {
        out.par_chunks_mut(len).enumerate().for_each(|(i, chunk)| work(i * chunk_rows, chunk));
    }
}

/// Sets every element, on several threads when there are many.
pub(crate) fn fill(out: &mut [f32], value: f32) {
    for_row_chunks(out, 1, 1 << 16, 1, |_, chunk| chunk.fill(value));
}

/// `map(i)` for every i, in order; in parallel when `count` × `item_work` is large.
pub(crate) fn collect<R: Send>(count: usize, item_work: usize, map: impl Fn(usize) -> R + Sync + Send) -> Vec<R> {
    if count * item_work < PARALLEL_WORK_MIN {
        (0..count).map(map).collect()
    } else {
        (0..count).into_par_iter().map(map).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_follows_the_library() {
        for i in -8700..=8830 {
            let x = i as f32 * 0.01 + 0.0037;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - want).abs() <= 2e-7 * want, "exp({x}) = {got}, not {want}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(1e9).is_finite());
        assert_eq!(sigmoid(-200.0), sigmoid(-200.0).abs());
    }

    crate::isa::simd_fn! {
        fn everything(x: &[f32], scratch: &mut [f32], results: &mut [f32; 4]) {
            scratch.copy_from_slice(x);
            *results = [dot(x, x), sum(x), max(x), exp_in_place(scratch, 1.5)];
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let x: Vec<f32> = (0..77).map(|i| (i as f32 * 0.7).sin() * 9.0).collect();
        let run = |isa| {
            let (mut scratch, mut results) = (vec![0.0; x.len()], [0.0; 4]);
            everything(isa, &x, &mut scratch, &mut results);
            (scratch, results)
        };
        let all: Vec<_> = crate::isa::Isa::all().into_iter().map(run).collect();
        assert!(all.iter().all(|found| *found == all[0]));
        assert_eq!(all[0].1[2], x.iter().copied().fold(f32::MIN, f32::max));
    }
}
