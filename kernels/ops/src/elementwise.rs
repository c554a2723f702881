//! Small elementwise operations: sums of gradients and the residual addition y = a + b.

use crate::isa::{Isa, simd_fn};
use crate::memory::buffer;
use crate::vector::for_row_chunks;
use crate::{Back, Grads, Job, Tape, Tensor, Var, VarId};

/// Elements a thread takes at a time.
const CHUNK: usize = 1 << 14;

/// `acc[i] += x[i]`.
///
/// # Panics
/// When the lengths differ.
pub fn add_assign(acc: &mut [f32], x: &[f32]) {
    assert_eq!(acc.len(), x.len(), "gradients of one value differ in size");
    for_row_chunks(acc, 1, CHUNK, 1, |first, chunk| {
        add_chunk(Isa::best(), chunk, &x[first..]);
    });
}

simd_fn! {
    fn add_chunk(acc: &mut [f32], x: &[f32]) {
        for (a, b) in acc.iter_mut().zip(x) {
            *a += b;
        }
    }
}

/// `a + b`, elementwise; the shape is that of `a`.
///
/// # Panics
/// When the sizes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Tensor {
    let (x, y) = (a.as_f32(), b.as_f32());
    assert_eq!(x.len(), y.len(), "add of {:?} and {:?}", a.shape(), b.shape());
    let mut out = buffer(x.len());
    for_row_chunks(&mut out, 1, CHUNK, 1, |first, chunk| {
        for (out, (x, y)) in chunk.iter_mut().zip(x[first..].iter().zip(&y[first..])) {
            *out = x + y;
        }
    });
    Tensor::f32(a.shape(), out)
}

/// [`add`] with its backward pass: dy flows to both.
pub fn add_on_tape(tape: &mut Tape, a: &Var, b: &Var) -> Var {
    let (a_id, b_id) = (a.id(), b.id());
    tape.push(add(&a.value, &b.value), |out| Box::new(AddBack { a: a_id, b: b_id, out }))
}

struct AddBack {
    a: VarId,
    b: VarId,
    out: VarId,
}

impl Back for AddBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let dy = grads.take(self.out)?;
        grads.add(self.a, dy.clone());
        grads.add(self.b, dy);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, values};

    #[test]
    fn gradients() {
        let inputs = vec![values(&[2, 5], 1), values(&[2, 5], 2)];
        check_gradients("add", inputs.clone(), vec![], |t, x, _| add_on_tape(t, &x[0], &x[1]), 1e-3);
        check_gradients("add to itself", inputs, vec![], |t, x, _| add_on_tape(t, &x[0], &x[0]), 1e-3);
    }
}
