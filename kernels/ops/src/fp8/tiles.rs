//! Quantisation of whole matrices: the three tile shapes, in place, in parallel over rows or tiles.
//!
//! The rounding functions leave in `values` what a product reads, code · scale, because forward products need the values at once
//! and the codes only later.

use rayon::prelude::*;

use super::codec::{amax_bits, decode_lanes, decode_run, max_bits, round_lanes, round_run};
use super::{Encoding, Fp8, Fp8Scales, TILE, Tile};
use crate::Tensor;
use crate::isa::{Isa, simd_fn};

/// Columns measured and rounded together; their 128 rows stay in the second-level cache.
const STRIP: usize = 256;
/// Columns of one step: one vector, or two or four narrow ones.
const LANES: usize = 16;
/// Fewer elements than this are not worth a second thread.
const SERIAL_ELEMENTS_MAX: usize = 1 << 14;

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
            let quotient = (amax / top).to_bits();
            let exponent = (quotient >> 23) + u32::from(quotient & 0x7f_ffff != 0);
            // The smallest UE8M0 value, 2^-127, is an f32 subnormal.
            let scale = if exponent == 0 { f32::from_bits(0x40_0000) } else { f32::from_bits(exponent << 23) };
            (scale, 1.0 / scale)
        }
    };
    (if empty { 1.0 } else { scale }, if empty { 1.0 } else { inv })
}

simd_fn! {
    /// Rounds rows of `cols` values in tiles of 128 columns.
    fn rows_body(values: &mut [f32], codes: &mut [u8], scales: &mut [f32], cols: usize, encoding: Encoding, kind: Fp8Scales) {
        let tiles = cols.div_ceil(TILE);
        for ((row, codes), scales) in values.chunks_mut(cols).zip(codes.chunks_mut(cols)).zip(scales.chunks_mut(tiles)) {
            for ((run, codes), scale) in row.chunks_mut(TILE).zip(codes.chunks_mut(TILE)).zip(scales) {
                let amax = amax_bits(run);
                let (s, inv) = factors(amax, encoding, kind);
                *scale = s;
                round_run(run, codes, encoding, inv, s);
            }
        }
    }
}

simd_fn! {
    /// As `rows_body`, without codes and scales.
    fn rows_values_body(values: &mut [f32], cols: usize, encoding: Encoding, kind: Fp8Scales) {
        for row in values.chunks_mut(cols) {
            for run in row.chunks_mut(TILE) {
                let amax = amax_bits(run);
                let (s, inv) = factors(amax, encoding, kind);
                round_run(run, &mut [], encoding, inv, s);
            }
        }
    }
}

/// Rows per parallel task, so that a task is worth its start.
fn rows_per_task(cols: usize) -> usize {
    (SERIAL_ELEMENTS_MAX / cols.max(1)).max(1)
}

/// Rounds `values` `[rows, cols]` in tiles of one row by 128 columns; returns the dequantised values and the codes.
pub(crate) fn round_rows(
    isa: Isa,
    mut values: Vec<f32>,
    cols: usize,
    encoding: Encoding,
    kind: Fp8Scales,
) -> (Vec<f32>, Fp8) {
    let rows = values.len() / cols.max(1);
    let tiles = cols.div_ceil(TILE);
    let mut codes = vec![0; values.len()];
    let mut scales = vec![0.0; rows * tiles];
    let step = rows_per_task(cols);
    if rows <= step {
        if cols > 0 {
            rows_body(isa, &mut values, &mut codes, &mut scales, cols, encoding, kind);
        }
    } else {
        (values.par_chunks_mut(step * cols), codes.par_chunks_mut(step * cols), scales.par_chunks_mut(step * tiles))
            .into_par_iter()
            .for_each(|(values, codes, scales)| rows_body(isa, values, codes, scales, cols, encoding, kind));
    }
    let fp8 = Fp8 {
        codes: Tensor::u8(&[rows, cols], codes),
        scales: Tensor::f32(&[rows, tiles], scales),
        tile: Tile::Row128,
        encoding,
        offsets: std::sync::Arc::new([]),
    };
    (values, fp8)
}

/// As [`round_rows`], for a product that keeps no codes.
pub(crate) fn round_rows_values(isa: Isa, values: &mut [f32], cols: usize, encoding: Encoding, kind: Fp8Scales) {
    let step = rows_per_task(cols);
    if cols == 0 || values.len() <= step * cols {
        if cols > 0 {
            rows_values_body(isa, values, cols, encoding, kind);
        }
    } else {
        values.par_chunks_mut(step * cols).for_each(|values| rows_values_body(isa, values, cols, encoding, kind));
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

/// Rounds `values` `[rows, cols]` in tiles of 128 rows by one column that start anew at each of `offsets`; `codes` may
/// be empty. Returns the scales `[tiles, cols]`.
pub(crate) fn round_columns(
    isa: Isa,
    values: &mut [f32],
    codes: &mut [u8],
    cols: usize,
    offsets: &[usize],
    encoding: Encoding,
    kind: Fp8Scales,
) -> Vec<f32> {
    let rows = values.len() / cols.max(1);
    assert!(offsets.first() == Some(&0) && offsets.last() == Some(&rows), "offsets must run from 0 to {rows}");
    let lens: Vec<usize> = tile_rows(offsets).map(|range| range.len()).collect();
    let mut scales = vec![0.0; lens.len() * cols];
    if cols == 0 {
        return scales;
    }
    let keep_codes = !codes.is_empty();
    let mut tasks = Vec::with_capacity(lens.len());
    let (mut values, mut codes) = (&mut *values, codes);
    for (len, scales) in lens.iter().zip(scales.chunks_mut(cols)) {
        let (here, rest) = values.split_at_mut(len * cols);
        let (here_codes, rest_codes) = codes.split_at_mut(if keep_codes { len * cols } else { 0 });
        tasks.push((here, here_codes, scales));
        (values, codes) = (rest, rest_codes);
    }
    let work = |(values, codes, scales): (&mut [f32], &mut [u8], &mut [f32])| {
        columns_body(isa, values, codes, scales, cols, encoding, kind);
    };
    if rows * cols <= SERIAL_ELEMENTS_MAX {
        tasks.into_iter().for_each(work);
    } else {
        tasks.into_par_iter().for_each(work);
    }
    scales
}

/// Row ranges of the column tiles of `offsets`.
fn tile_rows(offsets: &[usize]) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
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
    let (codes, scales) = (fp8.codes.as_u8(), fp8.scales.as_f32());
    let cols = fp8.codes.cols();
    let mut out = vec![0.0; codes.len()];
    if codes.is_empty() {
        return out;
    }
    let across = cols.div_ceil(TILE);
    let scale_row: Box<dyn Fn(usize) -> usize + Sync> = match fp8.tile {
        Tile::Row128 => Box::new(|row| row),
        Tile::Block128 => {
            let rows = fp8.codes.shape()[fp8.codes.shape().len() - 2];
            Box::new(move |row| (row / rows) * rows.div_ceil(TILE) + row % rows / TILE)
        }
        Tile::Col128 => {
            let of_row: Vec<usize> =
                tile_rows(&fp8.offsets).enumerate().flat_map(|(tile, range)| range.map(move |_| tile)).collect();
            Box::new(move |row| of_row[row])
        }
    };
    out.par_chunks_mut(cols).zip(codes.par_chunks(cols)).with_min_len(rows_per_task(cols)).enumerate().for_each(
        |(row, (out, codes))| {
            let at = scale_row(row);
            if fp8.tile == Tile::Col128 {
                decode_lanes(isa, codes, fp8.encoding, &scales[at * cols..(at + 1) * cols], out);
            } else {
                let scales = &scales[at * across..(at + 1) * across];
                for ((out, codes), scale) in out.chunks_mut(TILE).zip(codes.chunks(TILE)).zip(scales) {
                    decode_run(isa, codes, fp8.encoding, *scale, out);
                }
            }
        },
    );
    out
}
