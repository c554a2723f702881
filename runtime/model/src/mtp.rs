//! Multi-token prediction: module k predicts token t_{i+k+1} from position i.
//!
//! h'ᵏ_i = eh_proj [enorm(Emb(t_{i+k})) ; hnorm(hᵏ⁻¹_i)], embedding first; then one layer with experts over positions
//! 0..T−k−1 of each sequence; then `shared_head.norm`. The normed output feeds the shared head and is hᵏ for the next
//! module; h⁰ is the main model's output after `model.norm`. Training calls [`MtpModule::forward`], speculation its
//! cached twin in `decode`. Report §2.2, `reference/deepseek-v3.md` §4 and §14.

use dsv3_ops::{Param, ParamId, Spans, Tape, Var, columns, linear, rms_norm};

use crate::block::Block;

/// Parameters of one module.
#[derive(Clone, Debug)]
pub(crate) struct MtpModule {
    /// `enorm`.
    pub(crate) embedding_norm: ParamId,
    /// `hnorm`.
    pub(crate) hidden_norm: ParamId,
    /// `eh_proj`, `[d, 2d]`.
    pub(crate) projection: ParamId,
    pub(crate) block: Block,
    /// `shared_head.norm`.
    pub(crate) norm: ParamId,
}

/// What one depth of prediction says of a batch.
#[derive(Clone, Debug)]
pub struct MtpOut {
    /// Depth, from 1.
    pub depth: usize,
    /// After `shared_head.norm`, `[rows, d]`.
    pub hidden: Var,
    /// Log-probability of the token `depth` + 1 after the input, `[rows]`; 0 where it is no target.
    pub logp: Var,
    /// Batch position of each row's input token; its target is that of position row + `depth`.
    pub rows: Vec<u32>,
    /// Targets of the rows.
    pub targets: std::sync::Arc<[u32]>,
}

impl MtpModule {
    /// eh_proj of the two normed halves, `[T, d]`: the block's input.
    pub(crate) fn combine(&self, tape: &mut Tape, w: &[Param], embedding: &Var, hidden: &Var, eps: f32) -> Var {
        let embedding = rms_norm::on_tape(tape, embedding, &w[self.embedding_norm as usize], eps);
        let hidden = rms_norm::on_tape(tape, hidden, &w[self.hidden_norm as usize], eps);
        let both = columns::cat_on_tape(tape, &embedding, &hidden);
        linear::on_tape(tape, &both, &w[self.projection as usize])
    }
}

/// Which rows depth k reads: of each sequence of `previous` (depth k − 1) all but the last.
pub(crate) struct Shifted {
    /// Sequences of this depth.
    pub(crate) spans: Spans,
    /// Row of the previous depth behind each row.
    pub(crate) sources: Vec<u32>,
}

impl Shifted {
    pub(crate) fn of(previous: &Spans) -> Self {
        let lens = previous.iter().map(|span| span.len().saturating_sub(1)).filter(|len| *len > 0);
        let sources = previous.iter().flat_map(|span| span.start..span.end.max(span.start + 1) - 1);
        Self { spans: Spans::from_lens(lens), sources: sources.map(|row| row as u32).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_depth_drops_the_last_row_of_every_sequence() {
        let first = Shifted::of(&Spans::from_lens([3, 0, 1, 2]));
        assert_eq!(first.spans.offsets(), [0, 2, 3]);
        assert_eq!(first.sources, [0, 1, 4]);
        let second = Shifted::of(&first.spans);
        assert_eq!((second.spans.offsets(), &second.sources[..]), (&[0, 1][..], &[0][..]));
        assert_eq!(Shifted::of(&second.spans).spans.tokens(), 0);
    }
}
