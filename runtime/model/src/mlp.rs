//! Gated MLP: y = W_down (SiLU(W_gate x) ⊙ W_up x), dense or for all routed experts at once.

use std::sync::Arc;

use dsv3_ops::{Param, ParamId, Tape, Var, grouped_linear, linear, swiglu};

/// Parameters of one MLP, or of a stack of experts (each `[experts, out, in]`).
#[derive(Clone, Debug)]
pub(crate) struct Mlp {
    pub(crate) gate: ParamId,
    pub(crate) up: ParamId,
    pub(crate) down: ParamId,
}

impl Mlp {
    /// One MLP on `x` `[T, d]`.
    pub(crate) fn forward(&self, tape: &mut Tape, w: &[Param], x: &Var) -> Var {
        let inner = linear::on_tape_many(tape, x, &[&w[self.gate as usize], &w[self.up as usize]]);
        let inner = swiglu::on_tape(tape, &inner[0], &inner[1]);
        linear::on_tape(tape, &inner, &w[self.down as usize])
    }

    /// Expert e on rows `offsets[e]..offsets[e + 1]` of `x` `[slots, d]`.
    pub(crate) fn grouped(&self, tape: &mut Tape, w: &[Param], x: &Var, offsets: &Arc<[usize]>) -> Var {
        let inner = grouped_linear::on_tape_many(tape, x, offsets, &[&w[self.gate as usize], &w[self.up as usize]]);
        let inner = swiglu::on_tape(tape, &inner[0], &inner[1]);
        grouped_linear::on_tape(tape, &inner, offsets, &w[self.down as usize])
    }
}
