//! Weights as products read them: F32, BF16 or block-scaled FP8.

use crate::Tensor;

/// How a weight is stored and its products taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// Plain f32.
    #[default]
    F32,
    /// Operands rounded to BF16, product in f32.
    Bf16,
}

/// An encoded weight, `[out, in]` or `[experts, out, in]`.
#[derive(Clone, Debug)]
pub struct Weight {
    plain: Tensor,
}

impl Weight {
    /// Shape, `[.., out, in]`.
    pub fn shape(&self) -> &[usize] {
        self.plain.shape()
    }
}
