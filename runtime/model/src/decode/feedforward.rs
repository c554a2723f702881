//! The second half of a layer in the inference form: the products of `mlp` and `moe`, those of one depth in one call.
//!
//! y = shared(u) + Σ_i g_i · expert_i(u). Gates and ups of the chosen experts and of the shared ones are taken together,
//! then all down projections: two regions of parallel work instead of six.
//!
//! **Invariant**: the values are those of [`Mlp::forward`] and [`Moe::forward`], bit for bit.

use dsv3_ops::layers::{self, Layer};
use dsv3_ops::permute::{self, Dispatch};
use dsv3_ops::{Param, ParamId, Tensor, elementwise, router, swiglu};

use crate::mlp::Mlp;
use crate::moe::Moe;

/// An MLP, or a stack of experts, on its rows.
#[derive(Clone, Copy)]
struct Part<'a> {
    mlp: &'a Mlp,
    x: &'a Tensor,
    offsets: Option<&'a [usize]>,
}

impl<'a> Part<'a> {
    /// The layer of weight `id` on this part's rows of `x`.
    fn layer<'b>(self, x: &'b Tensor, w: &'b [Param], id: ParamId) -> Layer<'b>
    where
        'a: 'b,
    {
        Layer { x, offsets: self.offsets, w: &w[id as usize].compute }
    }
}

/// Every part's output.
fn together(w: &[Param], parts: &[Part<'_>]) -> Vec<Tensor> {
    let first = parts.iter().flat_map(|p| [p.layer(p.x, w, p.mlp.gate), p.layer(p.x, w, p.mlp.up)]);
    let both = layers::forward(&first.collect::<Vec<_>>());
    let inner: Vec<Tensor> = both.chunks_exact(2).map(|both| swiglu::forward(&both[0], &both[1])).collect();
    let last = parts.iter().zip(&inner).map(|(p, x)| p.layer(x, w, p.mlp.down));
    layers::forward(&last.collect::<Vec<_>>())
}

impl Mlp {
    /// The MLP on `x` `[T, d]`.
    pub(crate) fn infer(&self, w: &[Param], x: &Tensor) -> Tensor {
        together(w, &[Part { mlp: self, x, offsets: None }]).swap_remove(0)
    }
}

impl Moe {
    /// The layer on `x` `[T, d]`, with this layer's router `bias`, and how many routed experts had rows.
    pub(crate) fn infer(&self, w: &[Param], bias: &[f32], config: &router::Config, x: &Tensor) -> (Tensor, usize) {
        let scores = router::scores_forward(x, &w[self.router as usize].compute);
        let chosen = router::select(&scores, bias, config);
        let gates = router::gates_forward(&scores, &chosen, config);
        let dispatch = Dispatch::new(&chosen, config.experts);
        let slots = permute::forward(x, &dispatch);
        let mut parts = vec![Part { mlp: &self.experts, x: &slots, offsets: Some(&dispatch.offsets) }];
        parts.extend(self.shared.iter().map(|mlp| Part { mlp, x, offsets: None }));
        let outputs = together(w, &parts);
        let y = permute::combine_forward(&outputs[0], &gates, &dispatch);
        let y = outputs.get(1).map_or_else(|| y.clone(), |shared| elementwise::add(&y, shared));
        (y, dispatch.offsets.windows(2).filter(|rows| rows[1] > rows[0]).count())
    }
}
