//! Linear layers, y = x·wᵀ, `x` `[.., in]`, `w` `[out, in]`: a group of one expert (`grouped_linear.rs`).
//!
//! Backward: dx = dy·w, dw = dyᵀ·x. Operands are rounded as the weight's precision says.

use std::sync::Arc;

use crate::activation::{self, Rows};
use crate::{Param, Tape, Tensor, Var, Weight, grouped_linear};

fn one_group(x: &Tensor) -> [usize; 2] {
    [0, x.numel() / x.cols().max(1)]
}

/// `[rows, in]` → `[rows, out]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn forward(x: &Tensor, w: &Weight) -> Tensor {
    grouped_linear::forward(x, &one_group(x), w)
}

/// The values that a product of `x` with `w` reads: `x` rounded as the precision of `w` says, each row by itself. A form of
/// the product that associates otherwise starts from these.
pub fn rounded_input(x: &Tensor, w: &Weight) -> Tensor {
    activation::input_values(x, w.rounding())
}

/// As [`forward`], but `x` is not rounded whatever the weight's precision: logits from a BF16 head.
///
/// # Panics
/// When the shapes do not fit.
pub fn forward_unrounded(x: &Tensor, w: &Weight) -> Tensor {
    grouped_linear::multiply(x.shape(), &Rows::Values(x.clone()), &one_group(x), w)
}

/// As [`forward`], recorded.
///
/// # Panics
/// When the shapes do not fit.
pub fn on_tape(tape: &mut Tape, x: &Var, w: &Param) -> Var {
    let mut outputs = on_tape_many(tape, x, &[w]);
    outputs.swap_remove(0)
}

/// One input through several weights of one precision; it is quantised once, and its gradient is the sum over the outputs in order.
///
/// # Panics
/// When the shapes do not fit or the precisions differ.
pub fn on_tape_many(tape: &mut Tape, x: &Var, ws: &[&Param]) -> Vec<Var> {
    let offsets: Arc<[usize]> = Arc::new(one_group(&x.value));
    grouped_linear::on_tape_many(tape, x, &offsets, ws)
}
