//! Token embedding: y_t = W[id_t].
//!
//! Shapes: ids `[tokens]`, W `[vocab, d]`, y `[tokens, d]` F32. The gradient dW[id_t] += dy_t is added in token order,
//! so repeated tokens give the same bits on any number of threads.

use std::sync::Arc;

use crate::elementwise::add_assign;
use crate::{Back, Grads, Job, Param, ParamId, Tape, Tensor, Var, VarId, Weight};

/// Rows `ids` of `w`.
///
/// # Panics
/// When an id is not below the number of rows, or `w` is prepacked.
pub fn forward(ids: &[u32], w: &Weight) -> Tensor {
    w.gather_rows(ids)
}

/// [`forward`] with the gradient of `w`.
pub fn on_tape(tape: &mut Tape, ids: &[u32], w: &Param) -> Var {
    let value = forward(ids, &w.compute);
    let (param, shape) = (w.id, w.compute.shape().to_vec());
    tape.push(value, |out| Box::new(EmbeddingBack { ids: ids.into(), param, shape, out }))
}

struct EmbeddingBack {
    ids: Arc<[u32]>,
    param: ParamId,
    shape: Vec<usize>,
    out: VarId,
}

impl Back for EmbeddingBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let dy = grads.take(self.out)?;
        Some(Job::new(move |weights| {
            let d = self.shape[1];
            let slot = weights.slot(self.param, &self.shape);
            for (&id, row) in self.ids.iter().zip(dy.as_f32().chunks_exact(d)) {
                add_assign(&mut slot[id as usize * d..][..d], row);
            }
        }))
    }
}
