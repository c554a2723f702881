//! Gated MLP: y = W_down (SiLU(W_gate x) ⊙ W_up x), dense or for all routed experts at once.
//!
//! Where the down projection's exceptions say so, SwiGLU keeps its inputs in FP8 and the down projection keeps nothing.

use std::sync::Arc;

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
        let [gate, up, down] = [self.gate, self.up, self.down].map(|id| &w[id as usize]);
        let inner = grouped_linear::on_tape_many(tape, x, offsets, &[gate, up]);
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
