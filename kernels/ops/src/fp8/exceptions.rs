//! What one linear layer does otherwise than its FP8 precision says. DeepSeek-V3 report §3.3.3; reference §5 and §14.
//!
//! Power-of-two scales are s = 2^⌈log₂(amax / top)⌉ with code = RNE(x / s), the rule of UE8M0, and belong to an operand: its
//! 1×128 tiles and its 128×1 tiles have them. So requantising the input for the weight gradient moves only exponents:
//! a value loses bits where its new tile makes it subnormal, and nowhere else. The output gradient is quantised from its
//! f32 values in both shapes, as it always is. A layer in another precision than FP8 takes no notice.

use super::Fp8Scales;

/// Exceptions of one layer; none by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Exceptions {
    /// Scales of the layer's input are powers of two.
    pub input_power_of_two: bool,
    /// Scales of the gradient of its output are powers of two.
    pub gradient_power_of_two: bool,
    /// The input is kept as E5M6 ([`super::E5m6`]) instead of the codes that the forward product reads. The weight gradient
    /// requantises it in 128×1 tiles with power-of-two scales.
    pub input_e5m6: bool,
    /// The input is a SwiGLU output: its two inputs are kept in FP8 and the weight gradient computes it from them again.
    /// A mark for whoever builds the layer: [`crate::swiglu::on_tape_cached`], then
    /// [`crate::grouped_linear::on_tape_recomputed`].
    pub swiglu_recomputed: bool,
}

impl Exceptions {
    /// Scales of the input in a layer whose precision says `scales`.
    pub(crate) fn input_scales(self, scales: Fp8Scales) -> Fp8Scales {
        if self.input_power_of_two { Fp8Scales::Ue8m0 } else { scales }
    }

    /// Scales of the output gradient in a layer whose precision says `scales`.
    pub(crate) fn gradient_scales(self, scales: Fp8Scales) -> Fp8Scales {
        if self.gradient_power_of_two { Fp8Scales::Ue8m0 } else { scales }
    }
}

#[cfg(test)]
mod tests;
