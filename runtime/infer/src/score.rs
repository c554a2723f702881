//! Log-probabilities of given continuations, for choice by likelihood, recall under teacher forcing, and tests.
//!
//! Whole texts are read at once without a cache ([`Decoder::read`]), and logits exist for the continuations' rows only.
//! **Invariant:** a score is the same bits whatever else is scored in the same call.

use std::ops::Range;

use dsv3_core::Cancel;
use rayon::prelude::*;

use crate::{Decoder, Error, Request, sampling, scheduler};

/// Tokens read in one call of the model, unless a single text is longer.
const READ_TOKENS: usize = 4096;

/// A continuation to score.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// What comes before; at least one token.
    pub prompt: Vec<u32>,
    /// The tokens to score.
    pub continuation: Vec<u32>,
}

/// What the model thinks of a continuation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Score {
    /// Log-probability of each token given everything before it.
    pub logprobs: Vec<f32>,
    /// The most likely token at each place, given the true tokens before it.
    pub greedy: Vec<u32>,
}

impl Score {
    /// Mean log-probability per token (0 for an empty continuation).
    pub fn mean(&self) -> f64 {
        let sum: f64 = self.logprobs.iter().map(|logprob| f64::from(*logprob)).sum();
        sum / self.logprobs.len().max(1) as f64
    }
}

/// Scores every continuation, in order.
///
/// # Errors
/// [`Error::Invalid`] for an empty prompt or one that is too long, [`Error::Cancelled`], [`Error::NonFinite`],
/// [`Error::Model`].
pub fn score<D: Decoder>(decoder: &D, items: &[Continuation], cancel: &Cancel) -> Result<Vec<Score>, Error> {
    let mut texts = Vec::with_capacity(items.len());
    for item in items {
        if item.prompt.is_empty() {
            return Err(Error::invalid("prompt", "a continuation is scored after at least one token"));
        }
        let ids: Vec<u32> = item.prompt.iter().chain(&item.continuation).copied().collect();
        let whole = Request::greedy(ids, 0, Vec::new());
        scheduler::validate(&whole, decoder, usize::MAX / decoder.page_tokens())?;
        texts.push(whole.ids);
    }
    let mut scores = Vec::with_capacity(items.len());
    while scores.len() < items.len() {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let group = next_group(&texts, scores.len());
        scores.extend(score_group(decoder, items, &texts, group)?);
    }
    Ok(scores)
}

/// The texts from `start` on that are read together.
fn next_group(texts: &[Vec<u32>], start: usize) -> Range<usize> {
    let (mut end, mut tokens) = (start, 0);
    while end < texts.len() && (end == start || tokens + texts[end].len() <= READ_TOKENS) {
        tokens += texts[end].len();
        end += 1;
    }
    start..end
}

fn score_group<D: Decoder>(
    decoder: &D,
    items: &[Continuation],
    texts: &[Vec<u32>],
    group: Range<usize>,
) -> Result<Vec<Score>, Error> {
    // The last token speaks about nothing that is scored.
    let read: Vec<&[u32]> = texts[group.clone()].iter().map(|text| &text[..text.len() - 1]).collect();
    if read.iter().all(|text| text.is_empty()) {
        return Ok(vec![Score::default(); group.len()]);
    }
    let hidden = decoder.read(&read)?;
    let mut places = Vec::new();
    let mut row = 0;
    for (index, text) in group.clone().zip(&read) {
        let first = items[index].prompt.len() - 1;
        places.extend((first..text.len()).map(|position| (index, row + position, position + 1)));
        row += text.len();
    }
    let vocab = decoder.vocab_size();
    let mut scores = vec![Score::default(); group.len()];
    for places in places.chunks(scheduler::logit_rows_max(vocab)) {
        let rows: Vec<usize> = places.iter().map(|(_, row, _)| *row).collect();
        let logits = decoder.logits(&scheduler::gather(&hidden, &rows));
        let tokens = logits.as_f32().par_chunks_exact(vocab).zip(places).map(|(row, (index, _, position))| {
            let not_finite = Error::NonFinite { request: *index, position: *position };
            let greedy = sampling::argmax(row).ok_or(not_finite)?;
            let logprob = f64::from(row[texts[*index][*position] as usize]) - sampling::log_sum_exp(row);
            Ok((*index, logprob as f32, greedy))
        });
        for token in tokens.collect::<Result<Vec<_>, Error>>()? {
            scores[token.0 - group.start].logprobs.push(token.1);
            scores[token.0 - group.start].greedy.push(token.2);
        }
    }
    Ok(scores)
}
