//! E5M6: 12-bit codes in tiles of one row by 128 columns, the report's cache of the input of the linear after attention.
//!
//! A code is s·eeeee·mmmmmm, the upper 12 bits of a binary16: bias 15, e = 0 subnormal with step 2^-20, largest finite
//! value 65024, e = 31 infinity (m = 0) or NaN. Rounding is to nearest even, saturating: ±inf and what lies beyond ±65024
//! become ±65024, so infinity is never written; zero keeps its sign; NaN becomes 0x7ff under its sign. A tile with
//! largest magnitude amax has the scale s = 2^⌈log₂(amax / 65024)⌉ (1 when amax = 0), and value = RNE(x / s) · s.
//!
//! Layout: codes a, b of a row's columns 2i, 2i + 1 are the three bytes `a & 255`, `a >> 8 | (b & 15) << 4`, `b >> 4`; a last
//! odd code takes two bytes. Scales are UE8M0, one byte each, the biased exponent. So an element takes
//! 1.5 bytes and 1/128 for its scale. DeepSeek-V3 report §3.3.3.

use rayon::prelude::*;

use super::TILE;
use super::codec::{Grid, amax_bits, magnitude_value, round_magnitude};
use super::tiles::{exponent_at_least, power_of_two, rows_per_task};
use crate::isa::{Isa, simd_fn};
use crate::{Tensor, memory};

/// Largest finite magnitude.
pub const TOP: f32 = 65024.0;
/// UE8M0 exponent of 1, the scale of a tile of zeros.
const ONE: u32 = 127;
/// Bytes of a full tile.
const TILE_BYTES: usize = TILE * 3 / 2;

struct E5m6Grid;
impl Grid for E5m6Grid {
    const MANTISSA: u32 = 6;
    const BIAS: u32 = 15;
    const TOP: u32 = TOP.to_bits();
    const NAN: u32 = 0x7ff;
    const FINITE_END: u32 = 0x7c0;
    const INFINITY_CODE: u32 = 0x7c0;
}

/// Code of `value` at scale 1, in the lower 12 bits.
#[inline(always)]
pub fn encode(value: f32) -> u16 {
    let bits = value.to_bits();
    let (code, _) = round_magnitude::<E5m6Grid>(bits & 0x7fff_ffff);
    (code | (bits & 0x8000_0000) >> 20) as u16
}

/// Value of a 12-bit code at scale 1.
#[inline(always)]
pub fn decode(code: u16) -> f32 {
    let code = u32::from(code);
    f32::from_bits(magnitude_value::<E5m6Grid>(code & 0x7ff) | (code & 0x800) << 20)
}

/// Packed codes of a matrix with their scales.
#[derive(Clone, Debug)]
pub struct E5m6 {
    shape: Vec<usize>,
    /// `[rows, row_bytes(cols)]`, U8.
    packed: Tensor,
    /// UE8M0, `[rows, ⌈cols/128⌉]`, U8.
    exponents: Tensor,
}

/// Bytes of a packed row.
fn row_bytes(cols: usize) -> usize {
    cols / 2 * 3 + cols % 2 * 2
}

impl E5m6 {
    /// Quantises `x` `[.., cols]`.
    ///
    /// # Panics
    /// When `x` is not F32.
    pub fn quantize_rows(x: &Tensor) -> Self {
        let (cols, rows) = (x.cols(), x.numel() / x.cols().max(1));
        let (bytes, tiles) = (row_bytes(cols), cols.div_ceil(TILE));
        let (mut packed, mut exponents) = (vec![0; rows * bytes], vec![0; rows * tiles]);
        if x.numel() > 0 {
            let step = rows_per_task(cols);
            (
                x.as_f32().par_chunks(step * cols),
                packed.par_chunks_mut(step * bytes),
                exponents.par_chunks_mut(step * tiles),
            )
                .into_par_iter()
                .for_each(|(x, packed, exponents)| encode_rows(Isa::best(), x, packed, exponents, cols));
        }
        let (packed, exponents) = (Tensor::u8(&[rows, bytes], packed), Tensor::u8(&[rows, tiles], exponents));
        Self { shape: x.shape().to_vec(), packed, exponents }
    }

    /// The values, F32, in the shape of what was quantised.
    pub fn dequantize(&self) -> Tensor {
        let cols = self.cols();
        let mut values = memory::buffer(self.shape.iter().product());
        if !values.is_empty() {
            let step = rows_per_task(cols);
            let chunks = values.par_chunks_mut(step * cols).enumerate();
            chunks.for_each(|(i, values)| self.decode_rows(Isa::best(), i * step, values));
        }
        Tensor::f32(&self.shape, values)
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.packed.bytes() + self.exponents.bytes()
    }

    /// Shape of the values.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Values of whole rows from `first` on.
    pub(crate) fn decode_rows(&self, isa: Isa, first: usize, out: &mut [f32]) {
        let (bytes, tiles) = (row_bytes(self.cols()), self.cols().div_ceil(TILE));
        let (packed, exponents) = (&self.packed.as_u8()[first * bytes..], &self.exponents.as_u8()[first * tiles..]);
        decode_rows(isa, packed, exponents, out, self.cols());
    }
}

simd_fn! {
    /// Packs rows of `cols` values tile by tile; a full tile ends at a whole byte.
    fn encode_rows(x: &[f32], packed: &mut [u8], exponents: &mut [u8], cols: usize) {
        let rows = x.chunks(cols).zip(packed.chunks_mut(row_bytes(cols)));
        for ((x, packed), exponents) in rows.zip(exponents.chunks_mut(cols.div_ceil(TILE))) {
            for ((x, packed), exponent) in x.chunks(TILE).zip(packed.chunks_mut(TILE_BYTES)).zip(exponents) {
                let amax = amax_bits(x);
                let biased = if amax == 0 { ONE } else { exponent_at_least(f32::from_bits(amax) / TOP) };
                *exponent = biased as u8;
                let inverse = 1.0 / power_of_two(biased);
                // Past the end of a short tile zeros are encoded and not stored.
                let mut codes = [0u16; TILE];
                for (code, x) in codes.iter_mut().zip(x) {
                    *code = encode(*x * inverse);
                }
                for (bytes, codes) in packed.chunks_mut(3).zip(codes.chunks_exact(2)) {
                    let (a, b) = (codes[0], codes[1]);
                    let three = [a as u8, (a >> 8) as u8 | (b << 4) as u8, (b >> 4) as u8];
                    bytes.copy_from_slice(&three[..bytes.len()]);
                }
            }
        }
    }
}

simd_fn! {
    /// The reverse of packing.
    fn decode_rows(packed: &[u8], exponents: &[u8], out: &mut [f32], cols: usize) {
        let rows = out.chunks_mut(cols).zip(packed.chunks(row_bytes(cols)));
        for ((out, packed), exponents) in rows.zip(exponents.chunks(cols.div_ceil(TILE))) {
            for ((out, packed), exponent) in out.chunks_mut(TILE).zip(packed.chunks(TILE_BYTES)).zip(exponents) {
                let mut codes = [0u16; TILE];
                for (codes, bytes) in codes.chunks_exact_mut(2).zip(packed.chunks(3)) {
                    let byte = |at: usize| u16::from(bytes.get(at).copied().unwrap_or(0));
                    codes[0] = byte(0) | (byte(1) & 15) << 8;
                    codes[1] = byte(1) >> 4 | byte(2) << 4;
                }
                let scale = power_of_two(u32::from(*exponent));
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = decode(code) * scale;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::testing::values;

    /// Values of the finite magnitude codes in order, from an outside binary16.
    fn table() -> Vec<f32> {
        (0..0x7c0_u16).map(|code| f16::from_bits(code << 4).to_f32()).collect()
    }

    /// Nearest code by search, ties to even; the definition, slowly.
    fn plain(y: f32, table: &[f32]) -> u16 {
        let sign = if y.is_sign_negative() { 0x800 } else { 0 };
        if y.is_nan() {
            return sign | 0x7ff;
        }
        let target = f64::from(y.abs().min(TOP));
        let above = table.partition_point(|v| f64::from(*v) < target).min(table.len() - 1);
        let below = above.saturating_sub(1);
        let distance = |code: usize| (f64::from(table[code]) - target).abs();
        let best = match distance(below).total_cmp(&distance(above)) {
            std::cmp::Ordering::Less => below,
            std::cmp::Ordering::Greater => above,
            std::cmp::Ordering::Equal => below + below % 2,
        };
        sign | best as u16
    }

    #[test]
    fn all_4096_codes_decode_to_their_binary16_and_back() {
        assert_eq!(table().last(), Some(&TOP));
        for code in 0..4096_u16 {
            let (value, outside) = (decode(code), f16::from_bits(code << 4).to_f32());
            match code & 0x7ff {
                0x7c0 => {
                    assert!(value.is_infinite() && value == outside);
                    assert_eq!(encode(value), code - 1, "infinity saturates");
                }
                0x7c1.. => assert!(value.is_nan() && outside.is_nan() && decode(encode(value)).is_nan()),
                _ => {
                    assert_eq!(value.to_bits(), outside.to_bits(), "{code:03x}");
                    assert_eq!(encode(value), code, "{code:03x}");
                }
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_at_every_boundary_and_between() {
        let table = table();
        let check = |y: f32| assert_eq!(encode(y), plain(y, &table), "{y:e} ({:08x})", y.to_bits());
        for pair in table.windows(2) {
            // The middle of two neighbours has one bit more than either, so f32 holds it.
            let middle = pair[0] + (pair[1] - pair[0]) / 2.0;
            for y in [middle.next_down(), middle, middle.next_up()] {
                check(y);
                check(-y);
            }
        }
        for y in [0.0, -0.0, TOP, TOP.next_up(), 65536.0, f32::MAX, f32::MIN_POSITIVE, f32::from_bits(1), f32::NAN] {
            check(y);
        }
        assert_eq!((encode(f32::INFINITY), encode(f32::NEG_INFINITY)), (0x7bf, 0xfbf));
        // Bit patterns all over f32, more of them inside the format's range.
        for i in 0..400_000_u32 {
            let bits = i.wrapping_mul(0x9e37_79b9) ^ (i >> 7);
            check(f32::from_bits(bits));
            check(f32::from_bits((bits & 0x807f_ffff) | (100 + bits % 45) << 23));
        }
    }

    #[test]
    fn tiles_have_power_of_two_scales_and_take_a_byte_and_a_half() {
        let table = table();
        for (rows, cols) in [(1, 1), (3, 300), (130, 17), (5, 128), (70, 384), (1, 259)] {
            let mut x = values(&[rows, cols], 5).into_f32();
            for (i, x) in x.iter_mut().enumerate() {
                *x *= if (i / 500) % 3 == 1 { 0.0 } else { 2f32.powi((i % 29) as i32 - 14) };
            }
            let x = Tensor::f32(&[rows, cols], x);
            let cached = E5m6::quantize_rows(&x);
            let tiles = rows * cols.div_ceil(TILE);
            assert_eq!(cached.bytes(), rows * (3 * cols).div_ceil(2) + tiles);
            let back = cached.dequantize();
            let tile_pairs = x.as_f32().chunks(cols).zip(back.as_f32().chunks(cols));
            for (x, back) in tile_pairs.flat_map(|(x, back)| x.chunks(TILE).zip(back.chunks(TILE))) {
                let amax = x.iter().fold(0f32, |acc, x| acc.max(x.abs()));
                let scale = if amax == 0.0 { 1.0 } else { f64::from(amax / TOP).log2().ceil().exp2() as f32 };
                let expected: Vec<u32> =
                    x.iter().map(|x| (decode(plain(x / scale, &table)) * scale).to_bits()).collect();
                assert_eq!(back.iter().map(|b| b.to_bits()).collect::<Vec<_>>(), expected, "{rows} x {cols}");
            }
            for isa in Isa::all() {
                let (mut packed, mut exponents) = (vec![0; rows * row_bytes(cols)], vec![0; tiles]);
                encode_rows(isa, x.as_f32(), &mut packed, &mut exponents, cols);
                assert!(packed == cached.packed.as_u8() && exponents == cached.exponents.as_u8(), "{isa:?}");
                let mut values = vec![0.0; rows * cols];
                decode_rows(isa, &packed, &exponents, &mut values, cols);
                assert!(values == back.as_f32(), "{isa:?}");
            }
        }
        let none = E5m6::quantize_rows(&Tensor::zeros(&[0, 40]));
        assert_eq!((none.bytes(), none.dequantize().shape()), (0, &[0, 40][..]));
    }

    #[test]
    fn a_code_is_packed_as_the_layout_says() {
        // 65024 makes the scale 1: codes 7bf, 001 (2^-20), 8c0 | ... for -2^-12, then a last odd one of two bytes.
        let x = [TOP, 2f32.powi(-20), -(2f32.powi(-12)), 1.5, 1.0];
        let codes = [0x7bf_u16, 0x001, 0x8c0, 0x3e0, 0x3c0];
        assert_eq!(x.map(encode), codes);
        let cached = E5m6::quantize_rows(&Tensor::f32(&[1, 5], x.to_vec()));
        assert_eq!(cached.packed.as_u8(), [0xbf, 0x17, 0x00, 0xc0, 0x08, 0x3e, 0xc0, 0x03]);
        assert_eq!(cached.exponents.as_u8(), [127]);
        assert_eq!(cached.dequantize().as_f32(), x);
    }

    #[test]
    fn nan_spoils_itself_only_and_tiny_tiles_stay_finite() {
        let x = Tensor::f32(&[1, 3], vec![f32::NAN, 3.0, -0.0]);
        let back = E5m6::quantize_rows(&x).dequantize().into_f32();
        assert!(back[0].is_nan() && back[1] == 3.0 && back[2].to_bits() == (-0f32).to_bits());
        for tiny in [1e-38f32, f32::from_bits(1), f32::MIN_POSITIVE] {
            let back = E5m6::quantize_rows(&Tensor::f32(&[1, 2], vec![tiny, 0.0])).dequantize();
            assert!(back.as_f32().iter().all(|x| x.is_finite()), "{tiny:e}: {back:?}");
        }
    }
}
