//! Bit-level conversion between f32 and the FP8 formats E4M3 (finite only, NaN = S.1111.111) and E5M2; `e5m6.rs` adds a
//! wider grid to the same arithmetic.
//!
//! Codes are round-to-nearest-even, saturating. Above the smallest normal value rounding is an integer addition on
//! the f32 bits; below it, adding 2^(23 - p), p the exponent of the format's step, lets the FPU round at that step.
//! Branch-free, so that loops over a tile vectorise. The test holds every BF16 input to a plain search.

use super::Encoding;
use crate::gemm::pair;
use crate::isa::simd_fn;

/// One format's constants.
pub(super) trait Grid {
    /// Explicit mantissa bits.
    const MANTISSA: u32;
    /// Exponent bias.
    const BIAS: u32;
    /// Bits of the largest finite value.
    const TOP: u32;
    /// Magnitude code of NaN.
    const NAN: u32;
    /// Magnitude codes from here on are not finite.
    const FINITE_END: u32;
    /// Magnitude code of infinity; no code at all where the format has none.
    const INFINITY_CODE: u32;

    const SHIFT: u32 = 23 - Self::MANTISSA;
    /// Exponent fields differ by this much, in units of the code.
    const REBIAS: u32 = (127 - Self::BIAS) << Self::MANTISSA;
    /// Bits of the smallest normal value, 2^(1 - bias).
    const MIN_NORMAL: u32 = (128 - Self::BIAS) << 23;
    /// Bits of 2^(23 + 1 - bias - mantissa): its unit in the last place is the subnormal step.
    const ROUNDER: u32 = (128 + 23 - Self::BIAS - Self::MANTISSA) << 23;
    /// Bits of 2^(127 - bias), which takes a code's bits, read as an f32 subnormal or normal, to its value.
    const LIFT: u32 = (254 - Self::BIAS) << 23;
}

struct E4m3;
impl Grid for E4m3 {
    const MANTISSA: u32 = 3;
    const BIAS: u32 = 7;
    const TOP: u32 = 448f32.to_bits();
    const NAN: u32 = 0x7f;
    const FINITE_END: u32 = 0x7f;
    const INFINITY_CODE: u32 = u32::MAX;
}

struct E5m2;
impl Grid for E5m2 {
    const MANTISSA: u32 = 2;
    const BIAS: u32 = 15;
    const TOP: u32 = 57344f32.to_bits();
    const NAN: u32 = 0x7f;
    const FINITE_END: u32 = 0x7c;
    const INFINITY_CODE: u32 = 0x7c;
}

const INFINITY: u32 = f32::INFINITY.to_bits();

/// Rounds a magnitude, given as f32 bits, to the grid: its code and the bits of that code's value.
#[inline(always)]
pub(super) fn round_magnitude<G: Grid>(magnitude: u32) -> (u32, u32) {
    let clamped = if magnitude > G::TOP { G::TOP } else { magnitude };
    let half_minus_one = (1 << (G::SHIFT - 1)) - 1;
    let rounded = clamped.wrapping_add(half_minus_one).wrapping_add((clamped >> G::SHIFT) & 1);
    let normal_code = (rounded >> G::SHIFT).wrapping_sub(G::REBIAS);
    let normal_value = rounded & !((1 << G::SHIFT) - 1);
    let lifted = f32::from_bits(clamped) + f32::from_bits(G::ROUNDER);
    let small_code = lifted.to_bits().wrapping_sub(G::ROUNDER);
    let small_value = (lifted - f32::from_bits(G::ROUNDER)).to_bits();
    let small = clamped < G::MIN_NORMAL;
    let code = if small { small_code } else { normal_code };
    let value = if small { small_value } else { normal_value };
    let nan = magnitude > INFINITY;
    (if nan { G::NAN } else { code }, if nan { magnitude } else { value })
}

/// Rounds `y` to the grid: its code and the value of that code.
#[inline(always)]
fn round<G: Grid>(y: f32) -> (u8, f32) {
    let bits = y.to_bits();
    let sign = bits & 0x8000_0000;
    let (code, value) = round_magnitude::<G>(bits & 0x7fff_ffff);
    ((code | (sign >> 24)) as u8, f32::from_bits(value | sign))
}

/// Bits of the value of a magnitude code.
#[inline(always)]
pub(super) fn magnitude_value<G: Grid>(magnitude: u32) -> u32 {
    let finite = f32::from_bits(magnitude << G::SHIFT) * f32::from_bits(G::LIFT);
    if magnitude < G::FINITE_END {
        finite.to_bits()
    } else {
        // What follows the finite codes: infinity where there is one, then NaN.
        if magnitude == G::INFINITY_CODE { INFINITY } else { INFINITY | 0x40_0000 }
    }
}

#[inline(always)]
fn value<G: Grid>(code: u8) -> f32 {
    let code = u32::from(code);
    f32::from_bits(magnitude_value::<G>(code & 0x7f) | ((code & 0x80) << 24))
}

pub(super) fn encode_one(y: f32, encoding: Encoding) -> u8 {
    match encoding {
        Encoding::E4m3 => round::<E4m3>(y).0,
        Encoding::E5m2 => round::<E5m2>(y).0,
    }
}

pub(super) fn decode_one(code: u8, encoding: Encoding) -> f32 {
    match encoding {
        Encoding::E4m3 => value::<E4m3>(code),
        Encoding::E5m2 => value::<E5m2>(code),
    }
}

/// Largest magnitude, NaN left out, as bits: integer order is float order without the sign, and vectorises.
#[inline(always)]
pub(super) fn max_bits(acc: u32, x: f32) -> u32 {
    let magnitude = x.to_bits() & 0x7fff_ffff;
    acc.max(if magnitude > INFINITY { 0 } else { magnitude })
}

/// Largest magnitude of a run, as bits. Sixteen running maxima, so that the loop vectorises.
#[inline(always)]
pub(super) fn amax_bits(run: &[f32]) -> u32 {
    let mut lanes = [0u32; 16];
    let chunks = run.chunks_exact(16);
    let rest = chunks.remainder().iter().fold(0, |acc, x| max_bits(acc, *x));
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = max_bits(*lane, *x);
        }
    }
    lanes.iter().fold(rest, |acc, lane| acc.max(*lane))
}

/// `values[i]` becomes the value of the code of `values[i] * inv[i]`, times `scale[i]`; codes go to `codes` unless empty.
#[inline(always)]
fn round_each<G: Grid>(values: &mut [f32], codes: &mut [u8], inv: impl Fn(usize) -> f32, scale: impl Fn(usize) -> f32) {
    if codes.is_empty() {
        for (i, x) in values.iter_mut().enumerate() {
            *x = round::<G>(*x * inv(i)).1 * scale(i);
        }
    } else {
        for (i, (x, code)) in values.iter_mut().zip(codes).enumerate() {
            let (c, v) = round::<G>(*x * inv(i));
            *code = c;
            *x = v * scale(i);
        }
    }
}

/// One scale for a run of values.
#[inline(always)]
pub(super) fn round_run(values: &mut [f32], codes: &mut [u8], encoding: Encoding, inv: f32, scale: f32) {
    match encoding {
        Encoding::E4m3 => round_each::<E4m3>(values, codes, |_| inv, |_| scale),
        Encoding::E5m2 => round_each::<E5m2>(values, codes, |_| inv, |_| scale),
    }
}

/// A scale per value.
#[inline(always)]
pub(super) fn round_lanes<const N: usize>(
    values: &mut [f32; N],
    codes: &mut [u8],
    encoding: Encoding,
    inv: &[f32; N],
    scale: &[f32; N],
) {
    match encoding {
        Encoding::E4m3 => round_each::<E4m3>(values, codes, |i| inv[i], |i| scale[i]),
        Encoding::E5m2 => round_each::<E5m2>(values, codes, |i| inv[i], |i| scale[i]),
    }
}

simd_fn! {
    /// `out[i] = value(codes[i]) * scale`.
    pub(crate) fn decode_run(codes: &[u8], encoding: Encoding, scale: f32, out: &mut [f32]) {
        match encoding {
            Encoding::E4m3 => for (o, c) in out.iter_mut().zip(codes) { *o = value::<E4m3>(*c) * scale; },
            Encoding::E5m2 => for (o, c) in out.iter_mut().zip(codes) { *o = value::<E5m2>(*c) * scale; },
        }
    }
}

simd_fn! {
    /// `out[i] = value(codes[i]) * scales[i]`.
    pub(crate) fn decode_lanes(codes: &[u8], encoding: Encoding, scales: &[f32], out: &mut [f32]) {
        match encoding {
            Encoding::E4m3 => for ((o, c), s) in out.iter_mut().zip(codes).zip(scales) { *o = value::<E4m3>(*c) * s; },
            Encoding::E5m2 => for ((o, c), s) in out.iter_mut().zip(codes).zip(scales) { *o = value::<E5m2>(*c) * s; },
        }
    }
}

simd_fn! {
    /// Words of pairs (`gemm/codes.rs`) of neighbouring codes, zero past an odd end; `swapped` says that the second code
    /// of two is that of the smaller k.
    pub(crate) fn pairs_along(codes: &[u8], encoding: Encoding, swapped: bool, out: &mut [f32]) {
        match (encoding, swapped) {
            (Encoding::E4m3, false) => along::<E4m3, false>(codes, out),
            (Encoding::E4m3, true) => along::<E4m3, true>(codes, out),
            (Encoding::E5m2, false) => along::<E5m2, false>(codes, out),
            (Encoding::E5m2, true) => along::<E5m2, true>(codes, out),
        }
    }
}

#[inline(always)]
fn along<G: Grid, const SWAPPED: bool>(codes: &[u8], out: &mut [f32]) {
    let chunks = codes.chunks_exact(2);
    let last = chunks.remainder().first().copied();
    for (word, codes) in out.iter_mut().zip(chunks) {
        let (first, second) = if SWAPPED { (codes[1], codes[0]) } else { (codes[0], codes[1]) };
        *word = pair(value::<G>(first), value::<G>(second));
    }
    if let (Some(code), Some(word)) = (last, out.get_mut(codes.len() / 2)) {
        *word = pair(value::<G>(code), 0.0);
    }
}

simd_fn! {
    /// Words of pairs of `first`, codes of k, and `second`, codes of k + 1 or none past the end.
    pub(crate) fn pairs_across(first: &[u8], second: &[u8], encoding: Encoding, out: &mut [f32]) {
        match encoding {
            Encoding::E4m3 => across::<E4m3>(first, second, out),
            Encoding::E5m2 => across::<E5m2>(first, second, out),
        }
    }
}

#[inline(always)]
fn across<G: Grid>(first: &[u8], second: &[u8], out: &mut [f32]) {
    if second.is_empty() {
        for (word, code) in out.iter_mut().zip(first) {
            *word = pair(value::<G>(*code), 0.0);
        }
    } else {
        for ((word, first), second) in out.iter_mut().zip(first).zip(second) {
            *word = pair(value::<G>(*first), value::<G>(*second));
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// Nearest finite code by search, ties to the even code; the definition, slowly.
    fn search(y: f32, encoding: Encoding, values: &[f64]) -> u8 {
        let finite_end = if encoding == Encoding::E4m3 { 0x7f } else { 0x7c };
        let sign = if y.is_sign_negative() { 0x80 } else { 0 };
        let target = f64::from(y.abs());
        let mut best = 0u8;
        for code in 1..finite_end {
            let distance = |c: u8| (values[usize::from(c)] - target).abs();
            if distance(code) < distance(best) || (distance(code) == distance(best) && code % 2 == 0) {
                best = code;
            }
        }
        sign | best
    }

    fn plain_value(code: u8, encoding: Encoding) -> f64 {
        let (mantissa_bits, bias) = if encoding == Encoding::E4m3 { (3, 7) } else { (2, 15) };
        let exponent = i32::from(code & 0x7f) >> mantissa_bits;
        let fraction = f64::from(code & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
        if exponent == 0 { fraction * 2f64.powi(1 - bias) } else { (1.0 + fraction) * 2f64.powi(exponent - bias) }
    }

    #[test]
    fn every_bf16_value_encodes_as_the_definition_says() {
        for encoding in [Encoding::E4m3, Encoding::E5m2] {
            let values: Vec<f64> = (0..128).map(|code| plain_value(code, encoding)).collect();
            for bits in 0..=u16::MAX {
                let y = bf16::from_bits(bits).to_f32();
                let code = encode_one(y, encoding);
                if y.is_nan() {
                    assert!(decode_one(code, encoding).is_nan(), "{encoding:?} {y}");
                } else {
                    let top = if encoding == Encoding::E4m3 { 448.0 } else { 57344.0 };
                    let expected = search(y.clamp(-top, top), encoding, &values);
                    assert_eq!(code, expected, "{encoding:?} {y:e}");
                }
            }
        }
    }

    #[test]
    fn every_code_decodes_to_its_value_and_back() {
        for encoding in [Encoding::E4m3, Encoding::E5m2] {
            for code in 0..=255u8 {
                let v = decode_one(code, encoding);
                let magnitude = code & 0x7f;
                if magnitude == 0x7f || (encoding == Encoding::E5m2 && magnitude > 0x7c) {
                    assert!(v.is_nan());
                } else if encoding == Encoding::E5m2 && magnitude == 0x7c {
                    assert!(v.is_infinite());
                } else {
                    assert_eq!(f64::from(v.abs()), plain_value(code, encoding));
                    assert_eq!(encode_one(v, encoding), code);
                }
            }
        }
    }
}
