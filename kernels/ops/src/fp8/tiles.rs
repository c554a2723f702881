//! Quantisation of whole matrices: the three tile shapes, in place, in parallel over rows or tiles.
//!
//! The rounding functions leave what a product reads, words or values, because products need them at once and the codes
//! only later.

use std::ops::Range;

use rayon::prelude::*;

use super::codec::{amax_bits, decode_lanes, decode_run, max_bits, round_lanes, round_run};
use super::{Encoding, Fp8, Fp8Scales, TILE, Tile};
use crate::gemm::{Form, pair};
use crate::isa::{Isa, simd_fn};
use crate::{memory, scratch};

/// Columns measured and rounded together; their 128 rows stay in the second-level cache.
const STRIP: usize = 256;
/// Columns of one step: one vector, or two or four narrow ones.
const LANES: usize = 16;
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
    let mut codes = vec![0; w.len()];
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
mod tests {
    use super::*;
    use crate::testing::values;

    const ENCODINGS: [Encoding; 2] = [Encoding::E4m3, Encoding::E5m2];
    const KINDS: [Fp8Scales; 2] = [Fp8Scales::F32, Fp8Scales::Ue8m0];

    /// One tile by its definition.
    fn plain(tile: &[f32], encoding: Encoding, kind: Fp8Scales) -> (f32, Vec<u8>) {
        let amax = tile.iter().fold(0f32, |acc, x| acc.max(x.abs()));
        let top = encoding.top();
        if amax == 0.0 {
            return (1.0, tile.iter().map(|x| encoding.encode(*x)).collect());
        }
        match kind {
            Fp8Scales::F32 => (amax / top, tile.iter().map(|x| encoding.encode(x * (top / amax))).collect()),
            Fp8Scales::Ue8m0 => {
                let scale = f64::from(amax / top).log2().ceil().exp2() as f32;
                (scale, tile.iter().map(|x| encoding.encode(x / scale)).collect())
            }
        }
    }

    #[test]
    fn every_instruction_set_rounds_tiles_by_the_definition() {
        for (rows, cols) in [(1, 1), (3, 300), (130, 17), (257, 40), (40, 520)] {
            let mut x = values(&[rows, cols], 9).into_f32();
            for (i, x) in x.iter_mut().enumerate() {
                // Magnitudes over many binades, and some tiles of zeros.
                *x *= if (i / 700) % 3 == 1 { 0.0 } else { 2f32.powi((i % 41) as i32 - 20) };
            }
            let offsets = [0, rows / 3, rows / 3, rows];
            let fill: Fill<'_> = &|range, out| out.copy_from_slice(&x[range]);
            for (isa, encoding, kind) in Isa::all()
                .into_iter()
                .flat_map(|isa| ENCODINGS.map(|e| (isa, e)))
                .flat_map(|(isa, e)| KINDS.map(|kind| (isa, e, kind)))
            {
                let rule = |view| Rule { encoding, scales: kind, view };
                let mut codes = vec![0; x.len()];
                let rounded = |view: View, codes: &mut [u8]| {
                    let mut words = vec![0.0; rows * view.words(cols)];
                    let mut scales = vec![0.0; rows * cols.div_ceil(TILE)];
                    let out = Rounded { words: &mut words, codes, scales: &mut scales };
                    round_rows(isa, Source::Computed(fill), rows, cols, rule(view), out);
                    (words, scales)
                };
                let (out, scales) = rounded(View::Values, &mut codes);
                let tiles = x.chunks(cols).flat_map(|row| row.chunks(TILE));
                let code_tiles = codes.chunks(cols).flat_map(|row| row.chunks(TILE));
                for ((tile, codes), scale) in tiles.zip(code_tiles).zip(&scales) {
                    assert_eq!((*scale, codes.to_vec()), plain(tile, encoding, kind), "{isa:?} {encoding:?} {kind:?}");
                }
                assert_eq!(rounded(View::Values, &mut []), (out, scales));
                let value = |code: Option<&u8>| code.map_or(0.0, |code| encoding.decode(*code));
                let (words, _) = rounded(View::Words(Form::F32), &mut []);
                assert_eq!(words, codes.iter().map(|code| value(Some(code))).collect::<Vec<_>>());
                let (words, _) = rounded(View::Words(Form::Pairs), &mut []);
                let pairs = codes.chunks(cols).flat_map(|row| row.chunks(2));
                let pairs: Vec<_> = pairs.map(|two| pair(value(two.first()), value(two.get(1))).to_bits()).collect();
                assert_eq!(words.iter().map(|word| word.to_bits()).collect::<Vec<_>>(), pairs);

                let rounded = |view: View, codes: &mut [u8]| {
                    let word_rows = tile_rows(&offsets).map(|range| view.words(range.len())).sum::<usize>();
                    let mut words = vec![0.0; word_rows * cols];
                    let mut scales = vec![0.0; tile_rows(&offsets).count() * cols];
                    let out = Rounded { words: &mut words, codes, scales: &mut scales };
                    round_columns(isa, Source::Plain(&x), cols, &offsets, rule(view), out);
                    (words, scales)
                };
                let (out, scales) = rounded(View::Values, &mut codes);
                let mut pairs = Vec::new();
                for (range, scales) in tile_rows(&offsets).zip(scales.chunks(cols)) {
                    for col in 0..cols {
                        let column = |of: &[f32]| range.clone().map(|row| of[row * cols + col]).collect::<Vec<_>>();
                        let column_codes: Vec<u8> = range.clone().map(|row| codes[row * cols + col]).collect();
                        assert_eq!((scales[col], column_codes.clone()), plain(&column(&x), encoding, kind));
                        let decoded: Vec<f32> =
                            column_codes.iter().map(|c| encoding.decode(*c) * scales[col]).collect();
                        assert_eq!(column(&out), decoded);
                    }
                    for row in range.clone().step_by(2) {
                        let code = |row: usize, col| value(codes[..range.end * cols].get(row * cols + col));
                        pairs.extend((0..cols).map(|col| pair(code(row, col), code(row + 1, col)).to_bits()));
                    }
                }
                assert_eq!(rounded(View::Values, &mut []).0, out);
                let (words, _) = rounded(View::Words(Form::F32), &mut []);
                assert_eq!(words, codes.iter().map(|code| value(Some(code))).collect::<Vec<_>>());
                let (words, _) = rounded(View::Words(Form::Pairs), &mut []);
                assert_eq!(words.iter().map(|word| word.to_bits()).collect::<Vec<_>>(), pairs);
            }
        }
    }

    #[test]
    fn the_tiniest_tiles_stay_finite_and_nan_stays_nan() {
        let values = |x: &[f32], encoding, scales| {
            let rule = Rule { encoding, scales, view: View::Values };
            let (mut words, mut scales) = (vec![0.0; x.len()], [0.0]);
            let out = Rounded { words: &mut words, codes: &mut [], scales: &mut scales };
            round_rows(Isa::best(), Source::Plain(x), 1, x.len(), rule, out);
            words
        };
        for tiny in [1e-38f32, f32::from_bits(1), f32::MIN_POSITIVE] {
            for (encoding, kind) in ENCODINGS.into_iter().flat_map(|e| KINDS.map(|k| (e, k))) {
                let out = values(&[tiny, 0.0, -0.0], encoding, kind);
                assert!(out.iter().all(|x| x.is_finite()), "{tiny:e} {encoding:?} {kind:?}: {out:?}");
            }
        }
        let out = values(&[f32::NAN, 1.0], Encoding::E4m3, Fp8Scales::F32);
        assert!(out[0].is_nan() && out[1] == 1.0);
    }
}
