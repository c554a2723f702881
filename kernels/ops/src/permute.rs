//! Dispatch of tokens to experts and the weighted way back.
//!
//! A *choice* is (token t, place k), numbered t·K + k. A *slot* is a row of the expert-sorted matrix: slots are sorted
//! by expert, then by choice, so expert e owns `offsets[e]..offsets[e + 1]`. Dispatch: y[slot] = x[token of slot].
//! Combine: y_t = Σ_k gate[t, k] · y[slot of (t, k)], added in order of k. No token is dropped.

use std::sync::Arc;

use crate::isa::{Isa, simd_fn};
use crate::memory::buffer;
use crate::vector::{add_scaled, dot, for_row_chunks};
use crate::{Back, Grads, Job, Tape, Tensor, Var, VarId};

/// Rows a thread moves at a time.
const CHUNK_ROWS: usize = 32;

/// Where every choice goes.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// First slot of every expert, and the number of slots; experts + 1 values.
    pub offsets: Arc<[usize]>,
    /// Token of every slot.
    pub token_of_slot: Arc<[u32]>,
    /// Slot of every choice.
    pub slot_of_choice: Arc<[u32]>,
    /// Choice of every slot.
    pub choice_of_slot: Arc<[u32]>,
    /// Experts per token.
    pub top_k: usize,
}

impl Dispatch {
    /// Sorts the choices `experts` `[tokens, top_k]` (U32) by expert, stably.
    ///
    /// # Panics
    /// When an expert is not below `n_experts`.
    pub fn new(experts: &Tensor, n_experts: usize) -> Self {
        let (chosen, top_k) = (experts.as_u32(), experts.cols());
        let mut offsets = vec![0_usize; n_experts + 1];
        for &expert in chosen {
            offsets[expert as usize + 1] += 1;
        }
        for e in 0..n_experts {
            offsets[e + 1] += offsets[e];
        }
        let mut next = offsets.clone();
        let mut slot_of_choice = vec![0_u32; chosen.len()];
        let mut choice_of_slot = vec![0_u32; chosen.len()];
        for (choice, &expert) in chosen.iter().enumerate() {
            let slot = next[expert as usize];
            next[expert as usize] += 1;
            slot_of_choice[choice] = slot as u32;
            choice_of_slot[slot] = choice as u32;
        }
        let token_of_slot = choice_of_slot.iter().map(|&choice| choice / top_k as u32).collect();
        Self {
            offsets: offsets.into(),
            token_of_slot,
            slot_of_choice: slot_of_choice.into(),
            choice_of_slot: choice_of_slot.into(),
            top_k,
        }
    }

    /// Tokens routed to every expert.
    pub fn loads(&self) -> Vec<u64> {
        self.offsets.windows(2).map(|w| (w[1] - w[0]) as u64).collect()
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.slot_of_choice.len() / self.top_k.max(1)
    }
}

/// Rows of `x` `[tokens, d]` in slot order: `[tokens · top_k, d]`.
pub fn forward(x: &Tensor, dispatch: &Dispatch) -> Tensor {
    let (d, data) = (x.cols(), x.as_f32());
    let mut out = buffer(dispatch.token_of_slot.len() * d);
    for_row_chunks(&mut out, d, CHUNK_ROWS, d, |first, chunk| {
        for (row, &token) in chunk.chunks_exact_mut(d).zip(&dispatch.token_of_slot[first..]) {
            row.copy_from_slice(&data[token as usize * d..][..d]);
        }
    });
    Tensor::f32(&[dispatch.token_of_slot.len(), d], out)
}

/// [`forward`] with its backward pass: dx_t is the sum of its slots' gradients in order of choice.
pub fn on_tape(tape: &mut Tape, x: &Var, dispatch: &Arc<Dispatch>) -> Var {
    let value = forward(&x.value, dispatch);
    let (input, shape, dispatch) = (x.id(), x.value.shape().to_vec(), dispatch.clone());
    tape.push(value, |out| Box::new(PermuteBack { input, shape, dispatch, out }))
}

struct PermuteBack {
    input: VarId,
    shape: Vec<usize>,
    dispatch: Arc<Dispatch>,
    out: VarId,
}

impl Back for PermuteBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let dy = grads.take(self.out)?;
        let (d, dy) = (self.shape.last().copied().unwrap_or(1), dy.as_f32());
        let mut dx = buffer(self.dispatch.tokens() * d);
        sum_slots(&mut dx, d, dy, &self.dispatch, &[]);
        grads.add(self.input, Tensor::f32(&self.shape, dx));
        None
    }
}

/// `out_t = Σ_k gate(t, k) · y[slot of (t, k)]`; no gates at all means 1.
fn sum_slots(out: &mut [f32], d: usize, y: &[f32], dispatch: &Dispatch, gates: &[f32]) {
    let k = dispatch.top_k;
    for_row_chunks(out, d, CHUNK_ROWS, d * k, |first, chunk| {
        let gates = gates.get(first * k..).unwrap_or_default();
        sum_chunk(Isa::best(), chunk, d, y, &dispatch.slot_of_choice[first * k..], gates, k);
    });
}

simd_fn! {
    fn sum_chunk(out: &mut [f32], d: usize, y: &[f32], slots: &[u32], gates: &[f32], k: usize) {
        for (i, row) in out.chunks_exact_mut(d).enumerate() {
            row.fill(0.0);
            for choice in i * k..(i + 1) * k {
                let gate = gates.get(choice).copied().unwrap_or(1.0);
                add_scaled(row, gate, &y[slots[choice] as usize * d..][..d]);
            }
        }
    }
}

simd_fn! {
    /// dy of the slots that hold `choices`.
    fn slot_grad_chunk(dy: &mut [f32], d: usize, d_out: &[f32], choices: &[u32], gates: &[f32], k: usize) {
        for (row, &choice) in dy.chunks_exact_mut(d).zip(choices) {
            let (gate, grad) = (gates[choice as usize], &d_out[choice as usize / k * d..][..d]);
            for j in 0..d {
                row[j] = gate * grad[j];
            }
        }
    }
}

simd_fn! {
    /// Gate gradients of the choices whose slots are `slots`; `d_out` starts at the first choice's token.
    fn gate_grad_chunk(d_gates: &mut [f32], d: usize, d_out: &[f32], slots: &[u32], y: &[f32], k: usize) {
        for (i, (d_gate, &slot)) in d_gates.iter_mut().zip(slots).enumerate() {
            *d_gate = dot(&d_out[i / k * d..][..d], &y[slot as usize * d..][..d]);
        }
    }
}

/// Σ_k gates[t, k] · y[slot of (t, k)]: `[tokens, d]` from `y` `[tokens · top_k, d]` and `gates` `[tokens, top_k]`.
///
/// # Panics
/// When the sizes disagree with `dispatch`.
pub fn combine_forward(y: &Tensor, gates: &Tensor, dispatch: &Dispatch) -> Tensor {
    let (d, tokens) = (y.cols(), dispatch.tokens());
    assert!(
        y.rows() == dispatch.slot_of_choice.len() && gates.numel() == y.rows(),
        "combine of {:?} and {:?} over {} slots",
        y.shape(),
        gates.shape(),
        dispatch.slot_of_choice.len(),
    );
    let mut out = buffer(tokens * d);
    sum_slots(&mut out, d, y.as_f32(), dispatch, gates.as_f32());
    Tensor::f32(&[tokens, d], out)
}

/// [`combine_forward`] with the gradients of `y` and `gates`.
pub fn combine_on_tape(tape: &mut Tape, y: &Var, gates: &Var, dispatch: &Arc<Dispatch>) -> Var {
    let value = combine_forward(&y.value, &gates.value, dispatch);
    let (y, gates, dispatch) = (y.clone(), gates.clone(), dispatch.clone());
    tape.push(value, |out| Box::new(CombineBack { y, gates, dispatch, out }))
}

struct CombineBack {
    y: Var,
    gates: Var,
    dispatch: Arc<Dispatch>,
    out: VarId,
}

impl Back for CombineBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let d_out = grads.take(self.out)?;
        let (d, k, d_out) = (self.y.value.cols(), self.dispatch.top_k, d_out.as_f32());
        let (y, gates) = (self.y.value.as_f32(), self.gates.value.as_f32());
        let mut dy = buffer(y.len());
        for_row_chunks(&mut dy, d, CHUNK_ROWS, d, |first, chunk| {
            slot_grad_chunk(Isa::best(), chunk, d, d_out, &self.dispatch.choice_of_slot[first..], gates, k);
        });
        let mut d_gates = vec![0.0; gates.len()];
        for_row_chunks(&mut d_gates, 1, CHUNK_ROWS * k, d, |first, chunk| {
            let slots = &self.dispatch.slot_of_choice[first..];
            gate_grad_chunk(Isa::best(), chunk, d, &d_out[first / k * d..], slots, y, k);
        });
        grads.add(self.y.id(), Tensor::f32(self.y.value.shape(), dy));
        grads.add(self.gates.id(), Tensor::f32(self.gates.value.shape(), d_gates));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, values};

    fn dispatch() -> Arc<Dispatch> {
        Arc::new(Dispatch::new(&Tensor::u32(&[4, 2], vec![2, 0, 0, 2, 4, 2, 0, 4]), 5))
    }

    #[test]
    fn slots_are_sorted_by_expert_then_choice() {
        let d = dispatch();
        assert_eq!(d.offsets[..], [0, 3, 3, 6, 6, 8]);
        assert_eq!(d.choice_of_slot[..], [1, 2, 6, 0, 3, 5, 4, 7]);
        assert_eq!(d.token_of_slot[..], [0, 1, 3, 0, 1, 2, 2, 3]);
        assert!(d.choice_of_slot.iter().enumerate().all(|(slot, c)| d.slot_of_choice[*c as usize] as usize == slot));
        assert_eq!((d.loads(), d.tokens()), (vec![3, 0, 3, 0, 2], 4));
    }

    #[test]
    fn combining_what_was_dispatched_weighs_every_token_by_its_gates() {
        let (x, gates) = (values(&[4, 3], 1), values(&[4, 2], 2));
        let y = combine_forward(&forward(&x, &dispatch()), &gates, &dispatch());
        for token in 0..4 {
            let weight = gates.as_f32()[2 * token] + gates.as_f32()[2 * token + 1];
            for j in 0..3 {
                assert!((y.as_f32()[token * 3 + j] - weight * x.as_f32()[token * 3 + j]).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn no_tokens() {
        let d = Dispatch::new(&Tensor::u32(&[0, 2], vec![]), 3);
        assert_eq!(forward(&Tensor::zeros(&[0, 4]), &d).shape(), [0, 4]);
        assert_eq!(combine_forward(&Tensor::zeros(&[0, 4]), &Tensor::zeros(&[0, 2]), &d).shape(), [0, 4]);
    }

    #[test]
    fn gradients() {
        let d = dispatch();
        check_gradients("permute", vec![values(&[4, 3], 3)], vec![], |t, x, _| on_tape(t, &x[0], &d), 1e-3);
        let inputs = vec![values(&[8, 3], 4), values(&[4, 2], 5)];
        check_gradients("combine", inputs, vec![], |t, x, _| combine_on_tape(t, &x[0], &x[1], &d), 1e-3);
    }
}
