//! Log-probabilities of given continuations, for choice by likelihood, recall under teacher forcing, and tests.

use dsv3_core::Cancel;

use crate::{Decoder, Error, GenerateOptions, Request, Update, generate::run};

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
/// [`Error::Invalid`] for an empty prompt or one that is too long, [`Error::Cancelled`], [`Error::NonFinite`].
pub fn score<D: Decoder>(decoder: &D, items: &[Continuation], cancel: &Cancel) -> Result<Vec<Score>, Error> {
    let requests = items
        .iter()
        .map(|item| {
            if item.prompt.is_empty() {
                return Err(Error::invalid("prompt", "a continuation is scored after at least one token"));
            }
            let ids = item.prompt.iter().chain(&item.continuation).copied().collect();
            let echo_from = Some(item.prompt.len());
            Ok(Request { top_logprobs: 1, echo_from, ..Request::greedy(ids, 0, Vec::new()) })
        })
        .collect::<Result<Vec<_>, Error>>()?;
    let mut scores = vec![Score::default(); items.len()];
    run(decoder, requests, GenerateOptions::default(), cancel, |index, update| {
        if let Update::Prompt(tokens) = update {
            for token in tokens {
                scores[index].logprobs.push(token.logprob.unwrap_or(f32::NAN));
                scores[index].greedy.push(token.top.first().map_or(token.id, |top| top.0));
            }
        }
    })?;
    Ok(scores)
}
