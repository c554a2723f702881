//! One pre-norm layer: x ← x + attention(norm(x)); x ← x + feedforward(norm(x)).

use dsv3_ops::{Param, ParamId, Tape, Var, elementwise, rms_norm};

use crate::context::{Context, Shape};
use crate::mla::Mla;
use crate::mlp::Mlp;
use crate::moe::{Moe, Routing};

/// Parameters of one layer.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    /// Its number; prediction modules count on from the main layers.
    pub(crate) layer: usize,
    pub(crate) input_norm: ParamId,
    pub(crate) attention: Mla,
    pub(crate) post_norm: ParamId,
    pub(crate) feedforward: Feedforward,
}

/// Second half of a layer.
#[derive(Clone, Debug)]
pub(crate) enum Feedforward {
    /// One MLP for every token.
    Dense(Mlp),
    /// Routed and shared experts.
    Moe(Moe),
}

impl Block {
    /// The layer on `x` `[T, d]`; `biases` are the model's router biases.
    pub(crate) fn forward(
        &self,
        tape: &mut Tape,
        w: &[Param],
        biases: &[Vec<f32>],
        x: &Var,
        ctx: &Context,
    ) -> (Var, Option<Routing>) {
        let h = rms_norm::on_tape(tape, x, &w[self.input_norm as usize], ctx.shape.eps);
        let h = self.attention.forward(tape, w, &h, ctx);
        let x = elementwise::add_on_tape(tape, x, &h);
        let h = rms_norm::on_tape(tape, &x, &w[self.post_norm as usize], ctx.shape.eps);
        let (h, routing) = self.feedforward.forward(tape, w, biases, &h, &ctx.shape);
        (elementwise::add_on_tape(tape, &x, &h), routing)
    }
}

impl Feedforward {
    /// The normalised input `x` `[T, d]` through the MLP or the experts.
    pub(crate) fn forward(
        &self,
        tape: &mut Tape,
        w: &[Param],
        biases: &[Vec<f32>],
        x: &Var,
        shape: &Shape,
    ) -> (Var, Option<Routing>) {
        match self {
            Self::Dense(mlp) => (mlp.forward(tape, w, x), None),
            Self::Moe(moe) => {
                let (y, routing) = moe.forward(tape, w, &biases[moe.bias], &shape.router, x);
                (y, Some(routing))
            }
        }
    }
}
