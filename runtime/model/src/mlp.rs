//! Gated MLP: y = W_down (SiLU(W_gate x) ⊙ W_up x), dense or for all routed experts at once.
//!
//! Where the down projection's exceptions say so, SwiGLU keeps its inputs in FP8 and the down projection keeps nothing.

use std::sync::Arc;

use dsv3_ops::permute::Dispatch;
use dsv3_ops::{Param, ParamId, Tape, Var, grouped_linear, swiglu};

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
        let all: Arc<[usize]> = Arc::new([0, x.value.rows()]);
        self.grouped(tape, w, x, &all)
    }

    /// Expert e on rows `offsets[e]..offsets[e + 1]` of `x` `[slots, d]`.
    pub(crate) fn grouped(&self, tape: &mut Tape, w: &[Param], x: &Var, offsets: &Arc<[usize]>) -> Var {
        let inner = grouped_linear::on_tape_many(tape, x, offsets, &[&w[self.gate as usize], &w[self.up as usize]]);
        self.down(tape, w, &inner, offsets)
    }

    /// Every expert on its rows of `slots`, which `dispatch` makes of `x` `[T, d]`.
    pub(crate) fn dispatched(
        &self,
        tape: &mut Tape,
        w: &[Param],
        slots: &Var,
        x: &Var,
        dispatch: &Arc<Dispatch>,
    ) -> Var {
        let gate_and_up = [&w[self.gate as usize], &w[self.up as usize]];
        let inner = grouped_linear::on_tape_dispatched(tape, slots, &x.value, dispatch, &gate_and_up);
        self.down(tape, w, &inner, &dispatch.offsets)
    }

    /// SwiGLU of gate and up, and the down projection.
    fn down(&self, tape: &mut Tape, w: &[Param], inner: &[Var], offsets: &Arc<[usize]>) -> Var {
        let down = &w[self.down as usize];
        if !down.compute.exceptions().swiglu_recomputed {
            let inner = swiglu::on_tape(tape, &inner[0], &inner[1]);
            return grouped_linear::on_tape(tape, &inner, offsets, down);
        }
        match swiglu::on_tape_cached(tape, &inner[0], &inner[1], down.compute.precision()) {
            (inner, Some(cached)) => grouped_linear::on_tape_recomputed(tape, &inner, cached, offsets, down),
            (inner, None) => grouped_linear::on_tape(tape, &inner, offsets, down),
        }
    }
}
