//! Tiles of 128 rows by one column, which products contract over: measured and rounded a strip of columns at a time.

use std::ops::Range;

use rayon::prelude::*;

use super::{Rounded, Rule, SERIAL_ELEMENTS_MAX, Source, View, factors};
use crate::{
    fp8::{
        TILE,
        codec::{max_bits, round_lanes},
    },
    gemm::{Form, pair},
    isa::{Isa, simd_fn},
};

/// Columns measured and rounded together; their 128 rows stay in the second-level cache.
const STRIP: usize = 256;
/// Columns of one step: one vector, or two or four narrow ones.
const LANES: usize = 16;

/// A vector of values, as [`columns_by`] leaves it for one view.
trait Kept {
    /// Whether values are code · scale.
    const SCALED: bool;
    /// Stores parts, `len` long from column `col` on, of rows 2i and 2i + 1, of which the second may lie past the end.
    fn store(words: &mut [f32], cols: usize, i: usize, col: usize, parts: [&[f32; LANES]; 2], len: usize);
}

struct InValues<const SCALED: bool>;
impl<const SCALED: bool> Kept for InValues<SCALED> {
    const SCALED: bool = SCALED;
    #[inline(always)]
    fn store(words: &mut [f32], cols: usize, i: usize, col: usize, parts: [&[f32; LANES]; 2], len: usize) {
        let at = 2 * i * cols + col;
        store_lanes(&mut words[at..at + len], parts[0]);
        if let Some(second) = words.get_mut(at + cols..at + cols + len) {
            store_lanes(second, parts[1]);
        }
    }
}

struct InPairs;
impl Kept for InPairs {
    const SCALED: bool = false;
    #[inline(always)]
    fn store(words: &mut [f32], cols: usize, i: usize, col: usize, parts: [&[f32; LANES]; 2], len: usize) {
        let at = i * cols + col;
        let mut both = [0.0; LANES];
        for lane in 0..LANES {
            both[lane] = pair(parts[0][lane], parts[1][lane]);
        }
        store_lanes(&mut words[at..at + len], &both);
    }
}

simd_fn! {
    /// Rounds up to 128 rows of `cols` values in tiles of one column.
    fn columns_body(values: &[f32], out: Rounded<'_>, cols: usize, rule: Rule) {
        match rule.view {
            View::Values => columns_by::<InValues<true>>(values, out, cols, rule),
            View::Words(Form::F32) => columns_by::<InValues<false>>(values, out, cols, rule),
            View::Words(Form::Pairs) => columns_by::<InPairs>(values, out, cols, rule),
        }
    }
}

#[inline(always)]
fn columns_by<K: Kept>(values: &[f32], out: Rounded<'_>, cols: usize, rule: Rule) {
    let Rounded { words, codes, scales } = out;
    let mut first = 0;
    while first < cols {
        let range = first..(first + STRIP).min(cols);
        let mut amax = [[0u32; LANES]; STRIP / LANES];
        for row in values.chunks(cols) {
            for (amax, x) in amax.iter_mut().zip(row[range.clone()].chunks(LANES)) {
                let x = load_lanes(x);
                for lane in 0..LANES {
                    amax[lane] = max_bits(amax[lane], x[lane]);
                }
            }
        }
        let (mut scale, mut inv) = ([[1f32; LANES]; STRIP / LANES], [[0f32; LANES]; STRIP / LANES]);
        let used = range.len().div_ceil(LANES);
        for ((amax, scale), inv) in amax[..used].iter().zip(&mut scale).zip(&mut inv) {
            for lane in 0..LANES {
                (scale[lane], inv[lane]) = factors(amax[lane], rule.encoding, rule.scales);
            }
        }
        scales[range.clone()].copy_from_slice(&scale.as_flattened()[..range.len()]);
        if !K::SCALED {
            scale = [[1.0; LANES]; STRIP / LANES];
        }
        for (i, two) in values.chunks(2 * cols).enumerate() {
            for ((at, scale), inv) in range.clone().step_by(LANES).zip(&scale).zip(&inv) {
                let len = LANES.min(range.end - at);
                let mut parts = [[0f32; LANES]; 2];
                for (j, part) in parts.iter_mut().enumerate().take(two.len() / cols) {
                    *part = load_lanes(&two[j * cols + at..j * cols + at + len]);
                    if codes.is_empty() {
                        round_lanes(part, &mut [], rule.encoding, inv, scale);
                    } else {
                        let mut strip = [0u8; LANES];
                        round_lanes(part, &mut strip, rule.encoding, inv, scale);
                        codes[(2 * i + j) * cols + at..][..len].copy_from_slice(&strip[..len]);
                    }
                }
                K::store(words, cols, i, at, [&parts[0], &parts[1]], len);
            }
        }
        first += STRIP;
    }
}

/// Part of a row, zero past its end. The constant length lets the loops over it become vectors.
#[inline(always)]
fn load_lanes(x: &[f32]) -> [f32; LANES] {
    if let Ok(full) = x.try_into() {
        return full;
    }
    let mut lanes = [0.0; LANES];
    lanes[..x.len()].copy_from_slice(x);
    lanes
}

#[inline(always)]
fn store_lanes(x: &mut [f32], lanes: &[f32; LANES]) {
    match <&mut [f32; LANES]>::try_from(&mut *x) {
        Ok(full) => *full = *lanes,
        Err(_) => x.copy_from_slice(&lanes[..x.len()]),
    }
}

/// Rounds `source` `[rows, cols]` in tiles of 128 rows by one column that start anew at each of `offsets`; scales are
/// `[tiles, cols]`, and words of pairs start anew at each of `offsets` too.
pub(crate) fn round_columns(
    isa: Isa,
    source: Source<'_>,
    cols: usize,
    offsets: &[usize],
    rule: Rule,
    out: Rounded<'_>,
) {
    let rows = offsets.last().copied().unwrap_or(0);
    if rows * cols == 0 {
        return;
    }
    let (mut tasks, mut rest) = (Vec::new(), out);
    for range in tile_rows(offsets) {
        let here;
        (here, rest) = rest.split(rule.view.words(range.len()) * cols, range.len() * cols, cols);
        tasks.push((range, here));
    }
    let work = |(range, out): (Range<usize>, Rounded<'_>)| {
        source.with(range.start * cols..range.end * cols, |values| columns_body(isa, values, out, cols, rule));
    };
    if rows * cols <= SERIAL_ELEMENTS_MAX {
        tasks.into_iter().for_each(work);
    } else {
        tasks.into_par_iter().for_each(work);
    }
}

/// Row ranges of the column tiles of `offsets`.
pub(crate) fn tile_rows(offsets: &[usize]) -> impl Iterator<Item = Range<usize>> + '_ {
    offsets.windows(2).flat_map(|w| (w[0]..w[1]).step_by(TILE).map(move |start| start..(start + TILE).min(w[1])))
}
