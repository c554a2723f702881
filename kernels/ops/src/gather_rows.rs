//! Chosen rows of a matrix: y_i = x[rows_i]. Backward: dx[rows_i] += dy_i, in order of i.

use std::sync::Arc;

use crate::elementwise::add_assign;
use crate::memory::buffer;
use crate::{Back, Grads, Job, Tape, Tensor, Var, VarId};

/// Rows `rows` of `x` `[n, d]`: `[rows, d]`.
///
/// # Panics
/// When a row index is out of range.
pub fn forward(x: &Tensor, rows: &[u32]) -> Tensor {
    let (d, data) = (x.cols(), x.as_f32());
    let mut out = buffer(rows.len() * d);
    if d > 0 {
        for (out, &row) in out.chunks_exact_mut(d).zip(rows) {
            out.copy_from_slice(&data[row as usize * d..][..d]);
        }
    }
    Tensor::f32(&[rows.len(), d], out)
}

/// [`forward`] with the gradient of `x`.
pub fn on_tape(tape: &mut Tape, x: &Var, rows: &[u32]) -> Var {
    let value = forward(&x.value, rows);
    let (input, shape) = (x.id(), x.value.shape().to_vec());
    tape.push(value, |out| Box::new(GatherBack { input, shape, rows: rows.into(), out }))
}

struct GatherBack {
    input: VarId,
    shape: Vec<usize>,
    rows: Arc<[u32]>,
    out: VarId,
}

impl Back for GatherBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let dy = grads.take(self.out)?;
        let d = self.shape.last().copied().unwrap_or(1);
        let mut dx = crate::memory::zeros(self.shape.iter().product());
        for (&row, grad) in self.rows.iter().zip(dy.as_f32().chunks_exact(d)) {
            add_assign(&mut dx[row as usize * d..][..d], grad);
        }
        grads.add(self.input, Tensor::f32(&self.shape, dx));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, values};

    #[test]
    fn rows_in_the_order_asked_for() {
        let x = values(&[4, 2], 1);
        let y = forward(&x, &[3, 3, 0]);
        assert_eq!(y.as_f32(), [&x.as_f32()[6..], &x.as_f32()[6..], &x.as_f32()[..2]].concat());
    }

    #[test]
    fn gradients() {
        check_gradients("gather", vec![values(&[4, 3], 2)], vec![], |t, x, _| on_tape(t, &x[0], &[2, 0, 2]), 1e-3);
    }
}
