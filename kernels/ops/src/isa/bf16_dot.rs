//! The self-check of VDPBF16PS: for pairs a, b of BF16 and c of f32 the instruction must give
//! fma(a₀, b₀, fma(a₁, b₁, c)), each step rounded to nearest, ties to even, to the last bit.
//!
//! Processors differ here (some round differently, or keep more bits between both steps), and the manual of none of
//! them is binding for another; so 512 fixed random cases decide. Exponents are close enough to each other for every
//! kind of rounding to occur, and far from subnormals, which the instruction takes for zero.

#![allow(unsafe_code)]

use std::arch::x86_64::{_mm512_castps_si512, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_storeu_ps};

/// f32 lanes of a vector.
const LANES: usize = 16;
/// Vectors that are compared.
const ROUNDS: usize = 32;

/// Whether the processor has the instruction, byte permutations with it, and adds as the file's head says.
pub(super) fn follows_the_rule() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512vbmi")
        // SAFETY: both features were detected.
        && unsafe { agrees() }
}

#[target_feature(enable = "avx512f,avx512bf16,fma")]
fn agrees() -> bool {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..ROUNDS).all(|_| {
        // Pairs of BF16 as the words of a vector: the first element in the lower half.
        let a: [u32; LANES] = std::array::from_fn(|_| pair(&mut state));
        let b: [u32; LANES] = std::array::from_fn(|_| pair(&mut state));
        let c: [f32; LANES] = std::array::from_fn(|_| f32::from_bits(random(&mut state, 119, 135)));
        let got = dot(&a, &b, &c);
        (0..LANES).all(|i| {
            let [(a0, a1), (b0, b1)] = [a[i], b[i]].map(|w| (f32::from_bits(w << 16), f32::from_bits(w & 0xffff_0000)));
            a0.mul_add(b0, a1.mul_add(b1, c[i])).to_bits() == got[i].to_bits()
        })
    })
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn dot(a: &[u32; LANES], b: &[u32; LANES], c: &[f32; LANES]) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    // SAFETY: every array has the 64 bytes of a vector; unaligned is allowed. Transmuting renames the lanes' type.
    unsafe {
        let load =
            |words: &[u32; LANES]| std::mem::transmute(_mm512_castps_si512(_mm512_loadu_ps(words.as_ptr().cast())));
        let sum = _mm512_dpbf16_ps(_mm512_loadu_ps(c.as_ptr()), load(a), load(b));
        _mm512_storeu_ps(out.as_mut_ptr(), sum);
    }
    out
}

/// The bits of an f32 with a random sign and mantissa and an exponent of that range.
fn random(state: &mut u64, low: u32, high: u32) -> u32 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    let bits = (*state >> 32) as u32;
    (bits & 0x807f_ffff) | ((low + (*state as u32) % (high - low)) << 23)
}

fn pair(state: &mut u64) -> u32 {
    (random(state, 123, 131) >> 16) | (random(state, 123, 131) & 0xffff_0000)
}
