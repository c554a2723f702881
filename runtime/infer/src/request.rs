//! What a caller asks for and what it gets back, in token ids. Text belongs to the callers.

use crate::sampling::Sampling;

/// One sequence to continue, to score, or both.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The prompt; at least one token.
    pub ids: Vec<u32>,
    /// New tokens at most; 0 only scores the prompt.
    pub max_tokens: usize,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// Ids that end the sequence; the one that did is the last id of the completion.
    pub stop_ids: Vec<u32>,
    /// Number of alternatives to report beside each token's own log-probability.
    pub top_logprobs: usize,
    /// Reports the prompt's log-probabilities from this index on (index 0 has none).
    pub echo_from: Option<usize>,
    /// Lets the multi-token prediction head draft; never changes a token.
    pub speculate: bool,
}

impl Request {
    /// Greedy continuation of `ids` by at most `max_tokens`, ended by any of `stop_ids`.
    pub fn greedy(ids: Vec<u32>, max_tokens: usize, stop_ids: Vec<u32>) -> Self {
        Self {
            ids,
            max_tokens,
            sampling: Sampling::default(),
            stop_ids,
            top_logprobs: 0,
            echo_from: None,
            speculate: false,
        }
    }

    /// The same with another way to choose.
    #[must_use]
    pub fn sampled(mut self, sampling: Sampling) -> Self {
        self.sampling = sampling;
        self
    }
}

/// A token with what the model thought of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// The token.
    pub id: u32,
    /// Log-probability at temperature 1 before any top-p; `None` for the first token of a prompt.
    pub logprob: Option<f32>,
    /// The most likely alternatives with their log-probabilities, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// One of the stop ids came.
    Stop,
    /// `max_tokens` came.
    Length,
    /// The caller cancelled or went away.
    Cancelled,
    /// The logits that should have chosen the token at this position were not finite.
    NonFinite {
        /// Index in the sequence, prompt included.
        position: usize,
    },
}

/// News about one request, in order; [`Update::Finished`] is the last.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// Prompt tokens that were asked for by [`Request::echo_from`].
    Prompt(Vec<Token>),
    /// New tokens; several when a draft was accepted.
    Tokens(Vec<Token>),
    /// The end.
    Finished(Finish),
}

/// A finished generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// New tokens, without the prompt; a stop id that ended them is the last.
    pub ids: Vec<u32>,
    /// Log-probability of each at temperature 1.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}
