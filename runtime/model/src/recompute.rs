//! Activation recomputation of one layer: keep its input, run it again in the backward pass.
//!
//! A layer has two outputs that gradients flow to, its result and the router scores the balance loss reads, so this is
//! the two-output form of [`Tape::recompute`]. The second run reads the same weights and biases and therefore routes
//! every token to the same experts: the gradients have the same bits as without recomputation.

use std::sync::Arc;

use dsv3_ops::{Back, Grads, Job, Param, Tape, Var, VarId};

use crate::block::Block;
use crate::context::Context;
use crate::moe::Routing;

/// What a layer reads besides its input; shared by all layers of one pass.
#[derive(Clone)]
pub(crate) struct Weights {
    pub(crate) params: Arc<[Param]>,
    pub(crate) biases: Arc<[Vec<f32>]>,
}

/// [`Block::forward`] that saves only `x` for the backward pass.
pub(crate) fn forward(
    tape: &mut Tape,
    block: &Block,
    weights: &Weights,
    x: &Var,
    ctx: &Context,
) -> (Var, Option<Routing>) {
    let mut quiet = Tape::inference();
    let input = quiet.leaf(x.value.clone());
    let (y, routing) = block.forward(&mut quiet, &weights.params, &weights.biases, &input, ctx);
    let y = tape.leaf(y.value);
    let routing = routing.map(|routing| Routing { scores: tape.leaf(routing.scores.value), ..routing });
    let (out, scores) = (y.id(), routing.as_ref().map(|routing| routing.scores.id()));
    let (block, weights, x, ctx) = (block.clone(), weights.clone(), x.clone(), ctx.clone());
    tape.record(|| Box::new(Replay { block, weights, x, ctx, out, scores }));
    (y, routing)
}

struct Replay {
    block: Block,
    weights: Weights,
    x: Var,
    ctx: Context,
    out: VarId,
    scores: Option<VarId>,
}

impl Back for Replay {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let (dy, d_scores) = (grads.take(self.out), self.scores.and_then(|id| grads.take(id)));
        if dy.is_none() && d_scores.is_none() {
            return None;
        }
        let mut tape = Tape::new();
        let x = tape.leaf(self.x.value.clone());
        let (y, routing) = self.block.forward(&mut tape, &self.weights.params, &self.weights.biases, &x, &self.ctx);
        let mut seeds = Vec::new();
        seeds.extend(dy.map(|dy| (y.id(), dy)));
        seeds.extend(d_scores.zip(routing).map(|(d_scores, routing)| (routing.scores.id(), d_scores)));
        drop(y);
        if let Some(dx) = tape.backward_inputs(seeds).take(x.id()) {
            grads.add(self.x.id(), dx);
        }
        Some(Job::new(move |weights| {
            tape.run_deferred(usize::MAX, weights);
        }))
    }
}
