//! Mixture of experts: y = shared(u) + Σ_i g_i · expert_i(u) over the experts a sigmoid router chooses per token.
//!
//! No token is dropped and no expert computes a token it was not chosen for: rows are sorted by expert, each expert
//! multiplies its own rows, and the results are added back in the order of the choice. Report §2.1.2.

use std::sync::Arc;

use dsv3_ops::permute::Dispatch;
use dsv3_ops::{Param, ParamId, Tape, Tensor, Var, elementwise, permute, router};

use crate::mlp::Mlp;

/// Parameters of one layer's experts.
#[derive(Clone, Debug)]
pub(crate) struct Moe {
    /// `[experts, d]`.
    pub(crate) router: ParamId,
    /// Index among the model's router biases.
    pub(crate) bias: usize,
    /// Stacks `[experts, out, in]`.
    pub(crate) experts: Mlp,
    /// All shared experts as one MLP.
    pub(crate) shared: Option<Mlp>,
}

/// Where a layer's tokens went.
#[derive(Clone, Debug)]
pub(crate) struct Routing {
    /// Unbiased scores, `[T, experts]`; the balance loss reads them.
    pub(crate) scores: Var,
    /// Experts of every token, `[T, top_k]` U32, by falling biased score.
    pub(crate) chosen: Tensor,
    /// Tokens sent to every expert.
    pub(crate) loads: Vec<u64>,
}

impl Moe {
    /// The layer on `x` `[T, d]`, with this layer's router `bias`.
    pub(crate) fn forward(
        &self,
        tape: &mut Tape,
        w: &[Param],
        bias: &[f32],
        config: &router::Config,
        x: &Var,
    ) -> (Var, Routing) {
        let scores = router::scores_on_tape(tape, x, &w[self.router as usize]);
        let chosen = router::select(&scores.value, bias, config);
        let gates = router::gates_on_tape(tape, &scores, &chosen, config);
        let dispatch = Arc::new(Dispatch::new(&chosen, config.experts));
        let slots = permute::on_tape(tape, x, &dispatch);
        let slots = self.experts.dispatched(tape, w, &slots, x, &dispatch);
        let mut y = permute::combine_on_tape(tape, &slots, &gates, &dispatch);
        if let Some(shared) = &self.shared {
            let shared = shared.forward(tape, w, x);
            y = elementwise::add_on_tape(tape, &y, &shared);
        }
        (y, Routing { scores, chosen, loads: dispatch.loads() })
    }
}
