//! Drafting with the multi-token prediction head (depth 1).
//!
//! The head reads, at position j, the main model's hidden state h_j and the next token t_{j+1}, and predicts t_{j+2}. It
//! has its own cache, which must cover every position the main cache covers, the prompt's included. The draft of the
//! token at position n is drawn from the head's logits with the sampling and the noise of position n, exactly as the main
//! model will draw it. The next main step feeds the last token *and* the draft; its first row chooses the true token n; if
//! that is the draft, the second row is valid too and chooses token n + 1, else the draft's cache entry is dropped.
//! **Invariant:** tokens are always drawn from the main model's logits, so drafting changes speed and nothing else.

use std::ops::Range;

use dsv3_ops::Tensor;
use rayon::prelude::*;

use crate::{Decoder, Error, Step, sampling, scheduler::gather, sequence::Sequence};

/// Rows of the step's hidden states that stand for accepted tokens of running sequence `index`.
pub(crate) struct Rows {
    pub(crate) index: usize,
    pub(crate) rows: Range<usize>,
}

/// Extends the head's cache over `accepted` and sets the draft of every sequence that can use one.
pub(crate) fn draft<D: Decoder>(
    decoder: &D,
    cache: &mut D::Cache,
    running: &mut [Sequence],
    accepted: &[Rows],
    hidden: &Tensor,
) -> Result<(), Error> {
    let accepted: Vec<&Rows> =
        accepted.iter().filter(|rows| !rows.rows.is_empty() && running[rows.index].wants_draft()).collect();
    if accepted.is_empty() {
        return Ok(());
    }
    let steps: Vec<Step<'_>> = accepted
        .iter()
        .map(|rows| {
            let sequence = &running[rows.index];
            let next = sequence.fed + 1 - rows.rows.len()..sequence.fed + 1;
            Step { seq: sequence.seq, ids: &sequence.tokens[next] }
        })
        .collect();
    let all: Vec<usize> = accepted.iter().flat_map(|rows| rows.rows.clone()).collect();
    let states = decoder.draft(cache, &gather(hidden, &all), &steps)?;
    let mut end = 0;
    let mut last = Vec::new();
    let mut indices = Vec::new();
    for rows in &accepted {
        end += rows.rows.len();
        if !running[rows.index].is_prefill() {
            last.push(end - 1);
            indices.push(rows.index);
        }
    }
    if last.is_empty() {
        return Ok(());
    }
    let logits = decoder.logits(&gather(&states, &last));
    let drafts: Vec<Option<u32>> = logits
        .as_f32()
        .par_chunks_exact(decoder.vocab_size())
        .zip(&indices)
        .map(|(row, index)| {
            let sequence = &running[*index];
            sampling::sample(row, &sequence.request.sampling, sequence.tokens.len())
        })
        .collect();
    for (index, draft) in indices.into_iter().zip(drafts) {
        running[index].draft = draft;
    }
    Ok(())
}
