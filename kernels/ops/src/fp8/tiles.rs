//! Quantisation of whole matrices: the three tile shapes, in place, in parallel over rows or tiles.
//!
//! The rounding functions leave what a product reads, words or values, because products need them at once and the codes
//! only later.

mod columns;

use std::ops::Range;

use rayon::prelude::*;

use super::codec::{amax_bits, decode_lanes, decode_run, round_run};
use super::{Encoding, Fp8, Fp8Scales, TILE, Tile};
use crate::gemm::{Form, pair};
use crate::isa::{Isa, simd_fn};
use crate::{memory, scratch};
pub(crate) use columns::{round_columns, tile_rows};

/// Fewer elements than this are not worth a second thread.
const SERIAL_ELEMENTS_MAX: usize = 1 << 14;

/// Biased exponent of the smallest power of two that is not below `quotient`: what a UE8M0 byte holds.
#[inline(always)]
pub(super) fn exponent_at_least(quotient: f32) -> u32 {
    let bits = quotient.to_bits();
    (bits >> 23) + u32::from(bits & 0x7f_ffff != 0)
}

/// The power of two with this biased exponent. The smallest UE8M0 value, 2^-127, is an f32 subnormal.
#[inline(always)]
pub(super) fn power_of_two(exponent: u32) -> f32 {
    if exponent == 0 { f32::from_bits(0x40_0000) } else { f32::from_bits(exponent << 23) }
}

/// Scale of a tile and the factor its values are multiplied by before rounding.
#[inline(always)]
fn factors(amax_bits: u32, encoding: Encoding, kind: Fp8Scales) -> (f32, f32) {
    let amax = f32::from_bits(amax_bits);
    let top = match encoding {
        Encoding::E4m3 => 448.0,
        Encoding::E5m2 => 57344.0,
    };
    let empty = amax_bits == 0;
    let (scale, inv) = match kind {
        // Below 1e-33 the quotient could overflow, and 0 · ∞ is NaN.
        Fp8Scales::F32 => (amax / top, (top / amax).min(f32::MAX)),
        Fp8Scales::Ue8m0 => {
            let scale = power_of_two(exponent_at_least(amax / top));
            (scale, 1.0 / scale)
        }
    };
    (if empty { 1.0 } else { scale }, if empty { 1.0 } else { inv })
}

/// Writes the elements of a range, whole rows, to a buffer of its length.
pub(crate) type Fill<'a> = &'a (dyn Fn(Range<usize>, &mut [f32]) + Sync);

/// Where rounding gets its values from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    /// Row-major values.
    Plain(&'a [f32]),
    /// Values that are computed as they are needed.
    Computed(Fill<'a>),
}

impl Source<'_> {
    /// Calls `work` with the values of a range.
    fn with<R>(self, range: Range<usize>, work: impl FnOnce(&[f32]) -> R) -> R {
        match self {
            Source::Plain(values) => work(&values[range]),
            Source::Computed(fill) => scratch::with_f32(range.len(), |values| {
                fill(range, values);
                work(values)
            }),
        }
    }
}

/// What rounding leaves besides codes and scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    /// Values, code · scale.
    Values,
    /// Codes as words of a product.
    Words(Form),
}

impl View {
    /// Words of `len` elements along k.
    pub(crate) fn words(self, len: usize) -> usize {
        match self {
            View::Values => len,
            View::Words(form) => form.words(len),
        }
    }
}

/// Rule by which a matrix is rounded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    pub(crate) encoding: Encoding,
    pub(crate) scales: Fp8Scales,
    pub(crate) view: View,
}

/// Where a rounded matrix goes.
pub(crate) struct Rounded<'a> {
    /// As the rule's view says, k of which runs along the tiles.
    pub(crate) words: &'a mut [f32],
    /// `[rows, cols]`, or empty.
    pub(crate) codes: &'a mut [u8],
    /// One a tile.
    pub(crate) scales: &'a mut [f32],
}

impl<'a> Rounded<'a> {
    /// Cuts off the first part.
    fn split(self, words: usize, elements: usize, scales: usize) -> (Self, Self) {
        let (words, words_after) = self.words.split_at_mut(words);
        let (codes, codes_after) = self.codes.split_at_mut(if self.codes.is_empty() { 0 } else { elements });
        let (scales, scales_after) = self.scales.split_at_mut(scales);
        let after = Self { words: words_after, codes: codes_after, scales: scales_after };
        (Self { words, codes, scales }, after)
    }
}

simd_fn! {
    /// Rounds rows of `cols` values in tiles of 128 columns.
    fn rows_body(values: &[f32], out: Rounded<'_>, cols: usize, rule: Rule) {
        let Rounded { words, codes, scales } = out;
        let (tiles, width) = (cols.div_ceil(TILE), rule.view.words(cols));
        let rows = values.chunks(cols).zip(words.chunks_mut(width)).zip(scales.chunks_mut(tiles));
        for (i, ((row, words), scales)) in rows.enumerate() {
            let words = words.chunks_mut(rule.view.words(TILE));
            for (tile, ((source, words), scale)) in row.chunks(TILE).zip(words).zip(scales).enumerate() {
                let inv;
                (*scale, inv) = factors(amax_bits(source), rule.encoding, rule.scales);
                let mut run = [0f32; TILE];
                run[..source.len()].copy_from_slice(source);
                let (run, start) = (&mut run, i * cols + tile * TILE);
                let codes = if codes.is_empty() { &mut [][..] } else { &mut codes[start..start + source.len()] };
                let factor = if rule.view == View::Values { *scale } else { 1.0 };
                round_run(&mut run[..source.len()], codes, rule.encoding, inv, factor);
                if rule.view == View::Words(Form::Pairs) {
                    for (word, two) in words.iter_mut().zip(run.chunks_exact(2)) {
                        *word = pair(two[0], two[1]);
                    }
                } else {
                    words.copy_from_slice(&run[..source.len()]);
                }
            }
        }
    }
}

/// Rows per parallel task, so that a task is worth its start.
pub(super) fn rows_per_task(cols: usize) -> usize {
    (SERIAL_ELEMENTS_MAX / cols.max(1)).max(1)
}

/// Rounds `source` `[rows, cols]` in tiles of one row by 128 columns; scales are `[rows, ⌈cols/128⌉]`.
pub(crate) fn round_rows(isa: Isa, source: Source<'_>, rows: usize, cols: usize, rule: Rule, out: Rounded<'_>) {
    if rows * cols == 0 {
        return;
    }
    let (tiles, width) = (cols.div_ceil(TILE), rule.view.words(cols));
    let step = rows_per_task(cols);
    let work = |(range, out): (Range<usize>, Rounded<'_>)| {
        source.with(range.start * cols..range.end * cols, |values| rows_body(isa, values, out, cols, rule));
    };
    if rows <= step {
        return work((0..rows, out));
    }
    let (mut tasks, mut rest) = (Vec::with_capacity(rows.div_ceil(step)), out);
    for first in (0..rows).step_by(step) {
        let range = first..(first + step).min(rows);
        let here;
        (here, rest) = rest.split(range.len() * width, range.len() * cols, range.len() * tiles);
        tasks.push((range, here));
    }
    tasks.into_par_iter().for_each(work);
}

simd_fn! {
    /// Rounds up to 128 rows of `cols` values in blocks of 128 by 128.
    fn block_row_body(w: &[f32], codes: &mut [u8], scales: &mut [f32], cols: usize, encoding: Encoding, kind: Fp8Scales) {
        for (block, scale) in scales.iter_mut().enumerate() {
            let range = block * TILE..((block + 1) * TILE).min(cols);
            let mut amax = 0;
            for row in w.chunks(cols) {
                amax = amax.max(amax_bits(&row[range.clone()]));
            }
            let (s, inv) = factors(amax, encoding, kind);
            *scale = s;
            for (row, codes) in w.chunks(cols).zip(codes.chunks_mut(cols)) {
                let mut run = [0f32; TILE];
                let run = &mut run[..range.len()];
                run.copy_from_slice(&row[range.clone()]);
                round_run(run, &mut codes[range.clone()], encoding, inv, s);
            }
        }
    }
}

/// Codes and scales of a stack of `[rows, cols]` matrices in blocks of 128 by 128.
pub(crate) fn round_blocks(
    isa: Isa,
    w: &[f32],
    rows: usize,
    cols: usize,
    encoding: Encoding,
    kind: Fp8Scales,
) -> (Vec<u8>, Vec<f32>) {
    let mut codes = memory::buffer(w.len());
    let across = cols.div_ceil(TILE);
    let count = w.len() / (rows * cols).max(1);
    let mut scales = vec![0.0; count * rows.div_ceil(TILE) * across];
    if w.is_empty() {
        return (codes, scales);
    }
    let pieces = w.chunks(rows * cols).flat_map(|m| m.chunks(TILE * cols));
    let code_pieces = codes.chunks_mut(rows * cols).flat_map(|m| m.chunks_mut(TILE * cols));
    let tasks: Vec<_> = pieces.zip(code_pieces).zip(scales.chunks_mut(across)).collect();
    tasks.into_par_iter().for_each(|((w, codes), scales)| block_row_body(isa, w, codes, scales, cols, encoding, kind));
    (codes, scales)
}

/// The values of `fp8`, in the order of its codes.
pub(super) fn dequantize(isa: Isa, fp8: &Fp8) -> Vec<f32> {
    let cols = fp8.codes.cols();
    let mut out = memory::buffer(fp8.codes.numel());
    if out.is_empty() {
        return out;
    }
    let step = rows_per_task(cols);
    if fp8.tile == Tile::Col128 {
        let (codes, scales) = (fp8.codes.as_u8(), fp8.scales.as_f32());
        for (range, scales) in tile_rows(&fp8.offsets).zip(scales.chunks(cols)) {
            for row in range {
                let row = row * cols..(row + 1) * cols;
                decode_lanes(isa, &codes[row.clone()], fp8.encoding, scales, &mut out[row]);
            }
        }
    } else {
        let chunks = out.par_chunks_mut(step * cols).enumerate();
        chunks.for_each(|(i, out)| decode_rows(isa, fp8, i * step, out));
    }
    out
}

/// Values of whole rows from `first` on, for tiles along a row.
pub(crate) fn decode_rows(isa: Isa, fp8: &Fp8, first: usize, out: &mut [f32]) {
    let (codes, scales) = (fp8.codes.as_u8(), fp8.scales.as_f32());
    let cols = fp8.codes.cols();
    let across = cols.div_ceil(TILE);
    for (row, out) in (first..).zip(out.chunks_mut(cols)) {
        let scale_row = match fp8.tile {
            Tile::Block128 => {
                let rows = fp8.codes.shape()[fp8.codes.shape().len() - 2];
                (row / rows) * rows.div_ceil(TILE) + row % rows / TILE
            }
            Tile::Row128 | Tile::Col128 => row,
        };
        let scales = &scales[scale_row * across..(scale_row + 1) * across];
        let codes = &codes[row * cols..(row + 1) * cols];
        for ((out, codes), scale) in out.chunks_mut(TILE).zip(codes.chunks(TILE)).zip(scales) {
            decode_run(isa, codes, fp8.encoding, *scale, out);
        }
    }
}

#[cfg(test)]
mod tests;
