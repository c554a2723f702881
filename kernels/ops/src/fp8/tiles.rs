//! Quantisation of whole matrices: the three tile shapes, in place, in parallel over rows or tiles.
//!
//! The rounding functions leave in `values` what a product reads, code · scale, because forward products need the values at once
//! and the codes only later.

use std::ops::Range;

use rayon::prelude::*;

use super::codec::{amax_bits, decode_lanes, decode_run, max_bits, round_lanes, round_run};
use super::{Encoding, Fp8, Fp8Scales, TILE, Tile};
use crate::isa::{Isa, simd_fn};
use crate::memory;

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

/// Writes the elements of a range to a buffer of its length: where rounding gets its values from.
pub(crate) type Fill<'a> = &'a (dyn Fn(Range<usize>, &mut [f32]) + Sync);

simd_fn! {
    /// Rounds rows of `cols` values in tiles of 128 columns; `codes` and `scales` may both be empty.
    fn rows_body(
        values: &mut [f32],
        codes: &mut [u8],
        scales: &mut [f32],
        cols: usize,
        encoding: Encoding,
        kind: Fp8Scales,
    ) {
        let tiles = cols.div_ceil(TILE);
        for (i, row) in values.chunks_mut(cols).enumerate() {
            for (tile, run) in row.chunks_mut(TILE).enumerate() {
                let (scale, inv) = factors(amax_bits(run), encoding, kind);
                if codes.is_empty() {
                    round_run(run, &mut [], encoding, inv, scale);
                } else {
                    scales[i * tiles + tile] = scale;
                    let start = i * cols + tile * TILE;
                    round_run(run, &mut codes[start..start + run.len()], encoding, inv, scale);
                }
            }
        }
    }
}

/// Rows per parallel task, so that a task is worth its start.
pub(super) fn rows_per_task(cols: usize) -> usize {
    (SERIAL_ELEMENTS_MAX / cols.max(1)).max(1)
}

/// Fills `values` `[rows, cols]` and rounds them in tiles of one row by 128 columns. `codes` and `scales`
/// `[rows, ⌈cols/128⌉]` may both be empty.
pub(crate) fn round_rows(
    isa: Isa,
    values: &mut [f32],
    codes: &mut [u8],
    scales: &mut [f32],
    cols: usize,
    encoding: Encoding,
    kind: Fp8Scales,
    fill: Fill<'_>,
) {
    if values.is_empty() {
        return;
    }
    let tiles = cols.div_ceil(TILE);
    let step = rows_per_task(cols);
    let work = |first: usize, values: &mut [f32], codes: &mut [u8], scales: &mut [f32]| {
        fill(first..first + values.len(), values);
        rows_body(isa, values, codes, scales, cols, encoding, kind);
    };
    if values.len() <= step * cols {
        work(0, values, codes, scales);
    } else if codes.is_empty() {
        let chunks = values.par_chunks_mut(step * cols).enumerate();
        chunks.for_each(|(i, values)| work(i * step * cols, values, &mut [], &mut []));
    } else {
        (values.par_chunks_mut(step * cols), codes.par_chunks_mut(step * cols), scales.par_chunks_mut(step * tiles))
            .into_par_iter()
            .enumerate()
            .for_each(|(i, (values, codes, scales))| work(i * step * cols, values, codes, scales));
    }
}

simd_fn! {
    /// Rounds up to 128 rows of `cols` values in tiles of one column; `codes` may be empty.
    fn columns_body(
        values: &mut [f32],
        codes: &mut [u8],
        scales: &mut [f32],
        cols: usize,
        encoding: Encoding,
        kind: Fp8Scales,
    ) {
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
            let (mut scale, mut inv) = ([[0f32; LANES]; STRIP / LANES], [[0f32; LANES]; STRIP / LANES]);
            let used = range.len().div_ceil(LANES);
            for ((amax, scale), inv) in amax[..used].iter().zip(&mut scale).zip(&mut inv) {
                for lane in 0..LANES {
                    (scale[lane], inv[lane]) = factors(amax[lane], encoding, kind);
                }
            }
            scales[range.clone()].copy_from_slice(&scale.as_flattened()[..range.len()]);
            for (i, row) in values.chunks_mut(cols).enumerate() {
                let row = &mut row[range.clone()];
                if codes.is_empty() {
                    for ((x, scale), inv) in row.chunks_mut(LANES).zip(&scale).zip(&inv) {
                        let mut lanes = load_lanes(x);
                        round_lanes(&mut lanes, &mut [], encoding, inv, scale);
                        store_lanes(x, &lanes);
                    }
                } else {
                    let codes = &mut codes[i * cols + range.start..i * cols + range.end];
                    for (((x, codes), scale), inv) in row.chunks_mut(LANES).zip(codes.chunks_mut(LANES)).zip(&scale).zip(&inv) {
                        let mut lanes = load_lanes(x);
                        let mut strip = [0u8; LANES];
                        round_lanes(&mut lanes, &mut strip, encoding, inv, scale);
                        store_lanes(x, &lanes);
                        codes.copy_from_slice(&strip[..codes.len()]);
                    }
                }
            }
            first += STRIP;
        }
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

/// Fills `values` `[rows, cols]` and rounds them in tiles of 128 rows by one column that start anew at each of
/// `offsets`; `codes` may be empty. Returns the scales `[tiles, cols]`.
pub(crate) fn round_columns(
    isa: Isa,
    values: &mut [f32],
    codes: &mut [u8],
    cols: usize,
    offsets: &[usize],
    encoding: Encoding,
    kind: Fp8Scales,
    fill: Fill<'_>,
) -> Vec<f32> {
    let rows = values.len() / cols.max(1);
    assert!(offsets.first() == Some(&0) && offsets.last() == Some(&rows), "offsets must run from 0 to {rows}");
    let ranges: Vec<Range<usize>> = tile_rows(offsets).collect();
    let mut scales = vec![0.0; ranges.len() * cols];
    if values.is_empty() {
        return scales;
    }
    let (keep_codes, serial) = (!codes.is_empty(), values.len() <= SERIAL_ELEMENTS_MAX);
    let mut tasks = Vec::with_capacity(ranges.len());
    let (mut values, mut codes) = (values, codes);
    for (range, scales) in ranges.into_iter().zip(scales.chunks_mut(cols)) {
        let len = range.len() * cols;
        let (here, rest) = values.split_at_mut(len);
        let (here_codes, rest_codes) = codes.split_at_mut(if keep_codes { len } else { 0 });
        tasks.push((range.start * cols, here, here_codes, scales));
        (values, codes) = (rest, rest_codes);
    }
    let work = |(first, values, codes, scales): (usize, &mut [f32], &mut [u8], &mut [f32])| {
        fill(first..first + values.len(), values);
        columns_body(isa, values, codes, scales, cols, encoding, kind);
    };
    if serial {
        tasks.into_iter().for_each(work);
    } else {
        tasks.into_par_iter().for_each(work);
    }
    scales
}

/// Row ranges of the column tiles of `offsets`.
fn tile_rows(offsets: &[usize]) -> impl Iterator<Item = Range<usize>> + '_ {
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
                let (mut out, mut codes) = (vec![0.0; x.len()], vec![0; x.len()]);
                let mut scales = vec![0.0; rows * cols.div_ceil(TILE)];
                round_rows(isa, &mut out, &mut codes, &mut scales, cols, encoding, kind, fill);
                let tiles = x.chunks(cols).flat_map(|row| row.chunks(TILE));
                let code_tiles = codes.chunks(cols).flat_map(|row| row.chunks(TILE));
                for ((tile, codes), scale) in tiles.zip(code_tiles).zip(&scales) {
                    assert_eq!((*scale, codes.to_vec()), plain(tile, encoding, kind), "{isa:?} {encoding:?} {kind:?}");
                }
                let mut silent = vec![0.0; x.len()];
                round_rows(isa, &mut silent, &mut [], &mut [], cols, encoding, kind, fill);
                assert_eq!(silent, out);

                let scales = round_columns(isa, &mut out, &mut codes, cols, &offsets, encoding, kind, fill);
                for (range, scales) in tile_rows(&offsets).zip(scales.chunks(cols)) {
                    for col in 0..cols {
                        let column = |of: &[f32]| range.clone().map(|row| of[row * cols + col]).collect::<Vec<_>>();
                        let column_codes: Vec<u8> = range.clone().map(|row| codes[row * cols + col]).collect();
                        assert_eq!((scales[col], column_codes.clone()), plain(&column(&x), encoding, kind));
                        let decoded: Vec<f32> =
                            column_codes.iter().map(|c| encoding.decode(*c) * scales[col]).collect();
                        assert_eq!(column(&out), decoded);
                    }
                }
            }
        }
    }

    #[test]
    fn the_tiniest_tiles_stay_finite_and_nan_stays_nan() {
        for tiny in [1e-38f32, f32::from_bits(1), f32::MIN_POSITIVE] {
            for (encoding, kind) in ENCODINGS.into_iter().flat_map(|e| KINDS.map(|k| (e, k))) {
                let fill: Fill<'_> = &|_, out| out.copy_from_slice(&[tiny, 0.0, -0.0]);
                let mut out = vec![0.0; 3];
                round_rows(Isa::best(), &mut out, &mut [], &mut [], 3, encoding, kind, fill);
                assert!(out.iter().all(|x| x.is_finite()), "{tiny:e} {encoding:?} {kind:?}: {out:?}");
            }
        }
        let fill: Fill<'_> = &|_, out| out.copy_from_slice(&[f32::NAN, 1.0]);
        let mut out = vec![0.0; 2];
        round_rows(Isa::best(), &mut out, &mut [], &mut [], 2, Encoding::E4m3, Fp8Scales::F32, fill);
        assert!(out[0].is_nan() && out[1] == 1.0);
    }
}
