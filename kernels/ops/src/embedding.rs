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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, param, values};
    use crate::{Precision, WeightGrads};

    #[test]
    fn rows_are_looked_up_in_every_precision() {
        let table = values(&[5, 3], 1);
        let y = forward(&[4, 0, 4], &Weight::encode(&table, &Precision::F32));
        assert_eq!(y.shape(), [3, 3]);
        assert_eq!(y.as_f32()[..3], table.as_f32()[12..]);
        let y = forward(&[2], &Weight::encode(&table, &Precision::Bf16));
        assert_eq!(y.as_f32(), &table.to_bf16().to_f32().as_f32()[6..9]);
    }

    #[test]
    fn gradients() {
        let ids = [3, 1, 3, 0, 3];
        check_gradients("embedding", vec![], vec![values(&[4, 7], 2)], |t, _, p| on_tape(t, &ids, &p[0]), 1e-4);
    }

    #[test]
    fn two_lookups_add_into_one_gradient() {
        let table = param(0, &values(&[3, 2], 3));
        let mut tape = Tape::new();
        let (a, b) = (on_tape(&mut tape, &[1], &table), on_tape(&mut tape, &[1, 2], &table));
        let mut weights = WeightGrads::default();
        let ones = |rows: usize| Tensor::f32(&[rows, 2], vec![1.0; rows * 2]);
        tape.backward(vec![(a.id(), ones(1)), (b.id(), ones(2))], &mut weights);
        assert_eq!(weights.get(0).map(Tensor::as_f32), Some(&[0.0, 0.0, 2.0, 2.0, 1.0, 1.0][..]));
    }
}
