//! A packed training batch: sequences of any lengths one after another, each attending to itself only.

use std::sync::Arc;

use dsv3_ops::{Spans, token_logprob::NO_TARGET};

use crate::{Error, ModelConfig};

/// Inputs and targets of one forward pass.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Input tokens, `[T]`.
    pub ids: Vec<u32>,
    /// Sequence boundaries over `ids`.
    pub spans: Spans,
    /// The token after each input, `[T]`; [`Batch::NO_TARGET`] where there is none or no loss is wanted.
    pub targets: Arc<[u32]>,
}

impl Batch {
    /// The target of a position without one.
    pub const NO_TARGET: u32 = NO_TARGET;

    /// From rows of n + 1 tokens: n inputs, each with the next token as its target. Prediction depth k needs no more
    /// tokens; it has n − k targets. A row of less than two tokens has no target and is left out.
    pub fn from_rows<R: AsRef<[u32]>>(rows: impl IntoIterator<Item = R>) -> Self {
        let (mut ids, mut targets, mut lens) = (Vec::new(), Vec::new(), Vec::new());
        for row in rows {
            if let [inputs @ .., _] = row.as_ref()
                && !inputs.is_empty()
            {
                ids.extend_from_slice(inputs);
                targets.extend_from_slice(&row.as_ref()[1..]);
                lens.push(inputs.len());
            }
        }
        Self { ids, spans: Spans::from_lens(lens), targets: targets.into() }
    }

    /// From rows of tokens and, for each token, whether a loss on it is wanted (the first token's flag is not read).
    ///
    /// # Panics
    /// When a row's flags are fewer than its tokens.
    pub fn from_masked_rows<'a>(rows: impl IntoIterator<Item = (&'a [u32], &'a [bool])>) -> Self {
        let (tokens, wanted): (Vec<&[u32]>, Vec<&[bool]>) = rows.into_iter().filter(|(row, _)| row.len() > 1).unzip();
        let mut batch = Self::from_rows(&tokens);
        let flags = tokens.iter().zip(&wanted).flat_map(|(row, wanted)| &wanted[1..row.len()]);
        batch.targets =
            batch.targets.iter().zip(flags).map(|(&target, &on)| if on { target } else { NO_TARGET }).collect();
        batch
    }

    /// Number of input tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Number of positions with a target.
    pub fn target_count(&self) -> usize {
        self.targets.iter().filter(|target| **target != NO_TARGET).count()
    }

    /// Whether a model of `config` can take it.
    ///
    /// # Errors
    /// Names the first token outside the vocabulary or sequence beyond the longest position.
    pub fn check(&self, config: &ModelConfig) -> Result<(), Error> {
        let refused = |what: String| Err(Error::Input { what });
        if self.spans.tokens() != self.ids.len() || self.targets.len() != self.ids.len() {
            let (ids, spans) = (self.ids.len(), self.spans.tokens());
            return refused(format!("batch of {ids} tokens, {} targets, spans of {spans}", self.targets.len()));
        }
        if self.ids.is_empty() || self.spans.iter().any(|span| span.is_empty()) {
            return refused("a batch without tokens, or with an empty sequence".to_owned());
        }
        let vocab = config.vocab_size;
        if let Some(id) = self.ids.iter().find(|id| **id as usize >= vocab) {
            return refused(format!("token {id} is outside the vocabulary of {vocab}"));
        }
        if let Some(id) = self.targets.iter().find(|id| **id != NO_TARGET && **id as usize >= vocab) {
            return refused(format!("target {id} is outside the vocabulary of {vocab}"));
        }
        let (longest, limit) = (self.spans.iter().map(|span| span.len()).max(), config.max_position_embeddings);
        match longest.filter(|len| *len > limit) {
            Some(len) => refused(format!("a sequence of {len} tokens, max_position_embeddings is {limit}")),
            None => Ok(()),
        }
    }
}
