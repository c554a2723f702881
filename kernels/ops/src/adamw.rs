//! The elementwise part of AdamW, one chunk of a parameter at a time.
//!
//! g ← clip·g; m ← β₁m + (1 − β₁)g; v ← β₂v + (1 − β₂)g²; p ← p − lr·( m·c₁ / (√(v·c₂) + ε) + wd·p ), with the bias
//! corrections c and p on the right the value before the step. All in f32, in this order, never contracted; BF16 moments
//! are read, updated, used unrounded, then stored rounded to nearest even.
//!
//! **Invariant**: every element is updated alone, so neither chunks nor instruction sets change a bit. Report §4.2.

use half::bf16;

use crate::isa::{Isa, simd_fn};

/// Factors of one update, the same for every element of a parameter.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    /// Multiplier of the gradient.
    pub clip: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Share of the gradient in the first moment.
    pub one_minus_beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Share of the squared gradient in the second moment.
    pub one_minus_beta2: f32,
    /// 1 / (1 − β₁ᵗ).
    pub correction1: f32,
    /// 1 / (1 − β₂ᵗ).
    pub correction2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Learning rate.
    pub lr: f32,
    /// Decoupled weight decay.
    pub decay: f32,
}

/// Both moments of a chunk.
#[derive(Debug)]
pub enum Moments<'a> {
    /// Four bytes each.
    F32(&'a mut [f32], &'a mut [f32]),
    /// Two bytes each.
    Bf16(&'a mut [bf16], &'a mut [bf16]),
}

/// Updates the parameters `p` and their moments by the gradients `g`, in the calling thread.
///
/// # Panics
/// When the lengths differ.
pub fn update(p: &mut [f32], moments: Moments<'_>, g: &[f32], factors: &Factors) {
    assert_eq!(p.len(), g.len(), "adamw: parameters and gradients");
    match moments {
        Moments::F32(m, v) => {
            assert!(m.len() == p.len() && v.len() == p.len(), "adamw: parameters and moments");
            update_f32(Isa::best(), p, m, v, g, factors);
        }
        Moments::Bf16(m, v) => {
            assert!(m.len() == p.len() && v.len() == p.len(), "adamw: parameters and moments");
            update_bf16(Isa::best(), p, m, v, g, factors);
        }
    }
}

/// A stored moment.
trait Stored: Copy {
    fn read(self) -> f32;
    fn round(x: f32) -> Self;
}

impl Stored for f32 {
    #[inline(always)]
    fn read(self) -> f32 {
        self
    }
    #[inline(always)]
    fn round(x: f32) -> Self {
        x
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn read(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn round(x: f32) -> Self {
        // Without a branch: moments are finite because the guard refuses other gradients.
        let bits = x.to_bits();
        bf16::from_bits((bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16)
    }
}

#[inline(always)]
fn update_each<S: Stored>(p: &mut [f32], m: &mut [S], v: &mut [S], g: &[f32], f: &Factors) {
    for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
        let g = *g * f.clip;
        let first = f.beta1 * m.read() + f.one_minus_beta1 * g;
        let second = f.beta2 * v.read() + f.one_minus_beta2 * (g * g);
        let step = (first * f.correction1) / ((second * f.correction2).sqrt() + f.eps);
        *p -= f.lr * (step + f.decay * *p);
        (*m, *v) = (S::round(first), S::round(second));
    }
}

simd_fn! {
    fn update_f32(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], f: &Factors) {
        update_each(p, m, v, g, f);
    }
}

simd_fn! {
    fn update_bf16(p: &mut [f32], m: &mut [bf16], v: &mut [bf16], g: &[f32], f: &Factors) {
        update_each(p, m, v, g, f);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;

    const PLAIN: Factors = Factors {
        clip: 1.0,
        beta1: 0.9,
        one_minus_beta1: 0.1,
        beta2: 0.95,
        one_minus_beta2: 0.05,
        correction1: 10.0,
        correction2: 20.0,
        eps: 1e-8,
        lr: 0.5,
        decay: 0.1,
    };

    #[test]
    fn first_update_moves_by_the_sign_and_decays() {
        let (mut p, mut m, mut v) = (vec![1.0, 1.0], vec![0.0_f32; 2], vec![0.0_f32; 2]);
        update(&mut p, Moments::F32(&mut m, &mut v), &[2.0, 0.0], &PLAIN);
        assert!((p[0] - (1.0 - 0.5 * 1.1)).abs() < 1e-6 && (p[1] - 0.95).abs() < 1e-6, "{p:?}");
    }

    #[test]
    fn bf16_moments_round_to_nearest_even_after_use() {
        for x in [1.0_f32, 1.003_906_3, 1.011_718_8, -3.3e-5, 7.1e20, 1e-40] {
            assert_eq!(<bf16 as Stored>::round(x), bf16::from_f32(x), "{x}");
        }
        let (mut p, mut q) = (vec![1.0], vec![1.0]);
        update(&mut p, Moments::Bf16(&mut [bf16::ZERO], &mut [bf16::ZERO]), &[0.3], &PLAIN);
        update(&mut q, Moments::F32(&mut [0.0_f32], &mut [0.0_f32]), &[0.3], &PLAIN);
        assert_eq!(p, q);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let n = 77;
        let (p, g, v) = (values(&[n], 1), values(&[n], 2), values(&[n], 3));
        let run = |isa| {
            let (mut p, mut m) = (p.as_f32().to_vec(), vec![bf16::from_f32(0.3); n]);
            let mut v: Vec<bf16> = v.as_f32().iter().map(|v| bf16::from_f32(v.abs())).collect();
            update_bf16(isa, &mut p, &mut m, &mut v, g.as_f32(), &PLAIN);
            let (mut q, mut m32, mut v32) = (p.clone(), vec![0.2; n], vec![0.01; n]);
            update_f32(isa, &mut q, &mut m32, &mut v32, g.as_f32(), &PLAIN);
            (p, m, v, q, m32, v32)
        };
        let all: Vec<_> = Isa::all().into_iter().map(run).collect();
        assert!(all.iter().all(|found| *found == all[0]));
    }
}
