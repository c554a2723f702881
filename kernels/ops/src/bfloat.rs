//! Conversion between f32 and BF16 (the upper half of an f32): round to nearest, ties to even; NaN becomes quiet.

use half::bf16;
use rayon::prelude::*;

use crate::isa::{Isa, simd_fn};

/// Elements a thread takes at a time.
const CHUNK: usize = 1 << 14;

#[inline(always)]
fn rounded_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff).wrapping_add((bits >> 16) & 1);
    let quiet = bits | 0x40_0000;
    if bits & 0x7fff_ffff > f32::INFINITY.to_bits() { quiet } else { rounded }
}

simd_fn! {
    /// Rounds to BF16 values in place.
    pub(crate) fn round(values: &mut [f32]) {
        for x in values {
            *x = f32::from_bits(rounded_bits(*x) & 0xffff_0000);
        }
    }
}

simd_fn! {
    /// f32 to BF16.
    pub(crate) fn narrow(values: &[f32], out: &mut [bf16]) {
        for (o, x) in out.iter_mut().zip(values) {
            *o = bf16::from_bits((rounded_bits(*x) >> 16) as u16);
        }
    }
}

simd_fn! {
    /// BF16 to f32.
    pub(crate) fn widen(x: &[bf16], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }
}

/// [`narrow`] on several threads.
pub(crate) fn narrowed(values: &[f32]) -> Vec<bf16> {
    let mut out = crate::memory::buffer(values.len());
    let chunks = out.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
    chunks.for_each(|(out, values)| narrow(Isa::best(), values, out));
    out
}

/// [`widen`] on several threads.
pub(crate) fn widened(values: &[bf16]) -> Vec<f32> {
    let mut out = crate::memory::buffer(values.len());
    let chunks = out.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
    chunks.for_each(|(out, values)| widen(Isa::best(), values, out));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        // Every upper half with lower halves around the tie.
        for upper in 0..=u16::MAX {
            for lower in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(upper) << 16 | lower);
                let mut out = [bf16::ZERO];
                narrow(Isa::best(), &[x], &mut out);
                assert_eq!(out[0].to_bits(), bf16::from_f32(x).to_bits(), "{:08x}", x.to_bits());
            }
        }
        let x: Vec<f32> = (0..40_000).map(|i| (i as f32).sin()).collect();
        let mut rounded = x.clone();
        round(Isa::best(), &mut rounded);
        assert_eq!(widened(&narrowed(&x)), rounded);
    }
}
