//! Splitting and joining the last dimension: `[.., a + b]` <-> `[.., a]`, `[.., b]`. Pure copies; each is the other's
//! backward pass.

use crate::memory::buffer;
use crate::vector::for_row_chunks;
use crate::{Back, Grads, Job, Tape, Tensor, Var, VarId};

/// Rows a thread copies at a time.
const CHUNK_ROWS: usize = 64;

fn with_cols(shape: &[usize], cols: usize) -> Vec<usize> {
    let mut shape = shape.to_vec();
    if let Some(last) = shape.last_mut() {
        *last = cols;
    }
    shape
}

fn slice(x: &Tensor, start: usize, len: usize) -> Tensor {
    let (cols, data) = (x.cols(), x.as_f32());
    assert!(start + len <= cols, "columns {start}..{} of {:?}", start + len, x.shape());
    let mut out = buffer(x.rows() * len);
    for_row_chunks(&mut out, len, CHUNK_ROWS, len, |first, chunk| {
        for (i, row) in chunk.chunks_exact_mut(len).enumerate() {
            row.copy_from_slice(&data[(first + i) * cols + start..][..len]);
        }
    });
    Tensor::f32(&with_cols(x.shape(), len), out)
}

/// The first `at` columns of `x` and the others.
///
/// # Panics
/// When `x` has fewer than `at` columns.
pub fn split(x: &Tensor, at: usize) -> (Tensor, Tensor) {
    (slice(x, 0, at), slice(x, at, x.cols() - at))
}

/// The columns of `a`, then those of `b`.
///
/// # Panics
/// When the row counts differ.
pub fn cat(a: &Tensor, b: &Tensor) -> Tensor {
    assert_eq!(a.rows(), b.rows(), "cat of {:?} and {:?}", a.shape(), b.shape());
    let (a_cols, b_cols) = (a.cols(), b.cols());
    let (a_data, b_data) = (a.as_f32(), b.as_f32());
    let cols = a_cols + b_cols;
    let mut out = buffer(a.rows() * cols);
    for_row_chunks(&mut out, cols, CHUNK_ROWS, cols, |first, chunk| {
        for (i, row) in chunk.chunks_exact_mut(cols).enumerate() {
            row[..a_cols].copy_from_slice(&a_data[(first + i) * a_cols..][..a_cols]);
            row[a_cols..].copy_from_slice(&b_data[(first + i) * b_cols..][..b_cols]);
        }
    });
    Tensor::f32(&with_cols(a.shape(), cols), out)
}

/// [`split`] with its backward pass; a part that received no gradient counts as zero.
pub fn split_on_tape(tape: &mut Tape, x: &Var, at: usize) -> (Var, Var) {
    let (a, b) = split(&x.value, at);
    let (a_shape, b_shape) = (a.shape().to_vec(), b.shape().to_vec());
    let (a, b) = (tape.leaf(a), tape.leaf(b));
    let back = SplitBack { input: x.id(), a: (a.id(), a_shape), b: (b.id(), b_shape) };
    tape.record(|| Box::new(back));
    (a, b)
}

/// [`cat`] with its backward pass.
pub fn cat_on_tape(tape: &mut Tape, a: &Var, b: &Var) -> Var {
    let value = cat(&a.value, &b.value);
    let (a, b, a_cols, shape) = (a.id(), b.id(), a.value.cols(), value.shape().to_vec());
    tape.push(value, |out| Box::new(CatBack { a, b, a_cols, shape, out }))
}

struct SplitBack {
    input: VarId,
    a: (VarId, Vec<usize>),
    b: (VarId, Vec<usize>),
}

impl Back for SplitBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let (da, db) = (grads.take(self.a.0), grads.take(self.b.0));
        if da.is_none() && db.is_none() {
            return None;
        }
        // Gradients are kept flat: the op that made one may have known the value under another shape.
        let part = |grad: Option<Tensor>, shape: &[usize]| {
            grad.map_or_else(|| Tensor::zeros(shape), |grad| grad.reshape(shape))
        };
        grads.add(self.input, cat(&part(da, &self.a.1), &part(db, &self.b.1)));
        None
    }
}

struct CatBack {
    a: VarId,
    b: VarId,
    a_cols: usize,
    shape: Vec<usize>,
    out: VarId,
}

impl Back for CatBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let (da, db) = split(&grads.take(self.out)?.reshape(&self.shape), self.a_cols);
        grads.add(self.a, da);
        grads.add(self.b, db);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, values};

    #[test]
    fn split_and_cat_are_inverses() {
        let x = values(&[3, 5, 7], 1);
        for at in [0, 2, 7] {
            let (a, b) = split(&x, at);
            assert_eq!((a.shape(), b.shape()), (&[3, 5, at][..], &[3, 5, 7 - at][..]));
            let joined = cat(&a, &b);
            assert_eq!((joined.shape(), joined.as_f32()), (x.shape(), x.as_f32()));
        }
    }

    #[test]
    fn gradients() {
        let inputs = || vec![values(&[3, 5], 2), values(&[3, 2], 3)];
        check_gradients("cat", inputs(), vec![], |t, x, _| cat_on_tape(t, &x[0], &x[1]), 1e-3);
        let swap = |t: &mut Tape, x: &[Var], _: &[crate::Param]| {
            let (a, b) = split_on_tape(t, &x[0], 2);
            cat_on_tape(t, &b, &a)
        };
        check_gradients("split", inputs(), vec![], swap, 1e-3);
        let second_only = |t: &mut Tape, x: &[Var], _: &[crate::Param]| split_on_tape(t, &x[0], 2).1;
        check_gradients("split, one part unused", inputs(), vec![], second_only, 1e-3);
    }
}
