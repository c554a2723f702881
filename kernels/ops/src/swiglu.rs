//! SwiGLU's gate: y = SiLU(g) · u, SiLU(g) = g·σ(g), elementwise.
//!
//! Backward: du = dy·g·σ; dg = dy·u·σ·(1 + g·(1 − σ)). Saved: g and u; σ is computed again. [`on_tape_cached`] keeps g and
//! u as FP8 codes in tiles of 1×128 instead, and backward reads their values ĝ and û; the layer after it then need
//! not keep y, whose values for the weight gradient are SiLU(ĝ) · û. DeepSeek-V3 report §3.3.3.

use std::ops::Range;

use rayon::prelude::*;

use crate::fp8::{Fp8, decode_rows};
use crate::isa::{Isa, simd_fn};
use crate::memory::buffer;
use crate::vector::{for_row_chunks, sigmoid};
use crate::{Back, Grads, Job, Precision, Tape, Tensor, Var, VarId, scratch};

/// Elements a thread takes at a time.
const CHUNK: usize = 1 << 13;
/// Cost of a sigmoid in units of an addition, for the choice between serial and parallel.
const WORK: usize = 8;

/// SiLU(`gate`) · `up`, of one shape.
///
/// # Panics
/// When the sizes differ.
pub fn forward(gate: &Tensor, up: &Tensor) -> Tensor {
    assert_eq!(gate.numel(), up.numel(), "swiglu of {:?} and {:?}", gate.shape(), up.shape());
    let (g, u) = (gate.as_f32(), up.as_f32());
    let mut out = buffer(g.len());
    for_row_chunks(&mut out, 1, CHUNK, WORK, |first, chunk| {
        forward_chunk(Isa::best(), &g[first..], &u[first..], chunk);
    });
    Tensor::f32(gate.shape(), out)
}

simd_fn! {
    fn forward_chunk(g: &[f32], u: &[f32], out: &mut [f32]) {
        for ((out, g), u) in out.iter_mut().zip(g).zip(u) {
            *out = g * sigmoid(*g) * u;
        }
    }
}

simd_fn! {
    /// Turns gate and up into their gradients.
    fn grad_chunk(g: &mut [f32], u: &mut [f32], dy: &[f32]) {
        for ((g, u), dy) in g.iter_mut().zip(u).zip(dy) {
            let s = sigmoid(*g);
            let (d_gate, d_up) = (dy * *u * s * (1.0 + *g * (1.0 - s)), dy * *g * s);
            (*g, *u) = (d_gate, d_up);
        }
    }
}

/// [`forward`] with the gradients of both inputs.
pub fn on_tape(tape: &mut Tape, gate: &Var, up: &Var) -> Var {
    let value = forward(&gate.value, &up.value);
    let kept = Kept::Plain(gate.value.clone(), up.value.clone());
    let (gate, up) = (gate.id(), up.id());
    tape.push(value, |out| Box::new(SwigluBack { gate, up, kept, out }))
}

/// Both inputs `[rows, cols]` as FP8 codes in tiles of 1×128. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Cached {
    gate: Fp8,
    up: Fp8,
}

impl Cached {
    /// Shape of the output.
    pub(crate) fn shape(&self) -> &[usize] {
        self.gate.codes.shape()
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes()
    }

    /// Elements `range` of the output, whole rows, computed again.
    pub(crate) fn output(&self, range: Range<usize>, out: &mut [f32]) {
        let (isa, cols) = (Isa::best(), self.gate.codes.cols().max(1));
        scratch::with_f32(2 * cols, |both| {
            let (g, u) = both.split_at_mut(cols);
            for (row, out) in (range.start / cols..).zip(out.chunks_mut(cols)) {
                decode_rows(isa, &self.gate, row, g);
                decode_rows(isa, &self.up, row, u);
                forward_chunk(isa, g, u, out);
            }
        });
    }
}

/// As [`on_tape`], keeping both inputs in the FP8 of `precision`; the output is exact. Another precision than FP8, and a
/// tape that does not record, keep no codes and give none.
pub fn on_tape_cached(tape: &mut Tape, gate: &Var, up: &Var, precision: Precision) -> (Var, Option<Cached>) {
    let Precision::Fp8 { format, scales } = precision else { return (on_tape(tape, gate, up), None) };
    let value = forward(&gate.value, &up.value);
    if !tape.is_recording() {
        return (tape.leaf(value), None);
    }
    let codes = |x: &Var| Fp8::quantize_rows(&x.value, format.forward(), scales);
    let cached = Cached { gate: codes(gate), up: codes(up) };
    let kept = Kept::Fp8(cached.clone());
    let (gate, up) = (gate.id(), up.id());
    (tape.push(value, |out| Box::new(SwigluBack { gate, up, kept, out })), Some(cached))
}

/// The inputs as backward finds them.
enum Kept {
    Plain(Tensor, Tensor),
    Fp8(Cached),
}

struct SwigluBack {
    gate: VarId,
    up: VarId,
    kept: Kept,
    out: VarId,
}

impl Back for SwigluBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let dy = grads.take(self.out)?;
        // Each gradient takes the place of what it is made of.
        let (mut gate, mut up) = match self.kept {
            Kept::Plain(gate, up) => (gate, up),
            Kept::Fp8(cached) => (cached.gate.dequantize(), cached.up.dequantize()),
        };
        let (g, u, dy) = (gate.as_f32_mut(), up.as_f32_mut(), dy.as_f32());
        if g.len() <= CHUNK {
            grad_chunk(Isa::best(), g, u, dy);
        } else {
            let chunks = g.par_chunks_mut(CHUNK).zip(u.par_chunks_mut(CHUNK)).zip(dy.par_chunks(CHUNK));
            chunks.for_each(|((g, u), dy)| grad_chunk(Isa::best(), g, u, dy));
        }
        grads.add(self.gate, gate);
        grads.add(self.up, up);
        None
    }

    fn saved_swiglu_bytes(&self) -> usize {
        match &self.kept {
            Kept::Plain(gate, up) => gate.bytes() + up.bytes(),
            Kept::Fp8(cached) => cached.bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, values};

    #[test]
    fn follows_the_reference() {
        let (g, u) = (values(&[3, 37], 1), values(&[3, 37], 2));
        let y = forward(&g, &u);
        for ((g, u), y) in g.as_f32().iter().zip(u.as_f32()).zip(y.as_f32()) {
            let (g, u) = (f64::from(*g), f64::from(*u));
            let want = g / (1.0 + (-g).exp()) * u;
            assert!((f64::from(*y) - want).abs() < 1e-6, "{y} is not {want}");
        }
    }

    #[test]
    fn large_gates_saturate() {
        let y = forward(&Tensor::f32(&[3], vec![-1e4, 0.0, 1e4]), &Tensor::f32(&[3], vec![1.0; 3]));
        assert!(y.as_f32()[0].abs() < 1e-30);
        assert_eq!(y.as_f32()[1..], [0.0, 1e4]);
    }

    #[test]
    fn gradients() {
        let inputs = vec![values(&[3, 5], 3), values(&[3, 5], 4)];
        check_gradients("swiglu", inputs, vec![], |t, x, _| on_tape(t, &x[0], &x[1]), 1e-3);
    }
}
