//! One running sequence: which rows it wants next, and what to do with the logits that come back.
//!
//! State: `tokens` are confirmed (prompt and chosen); the first `fed` of them have cache entries; `draft` is a guess at
//! the token after the last. A step feeds a chunk of the prompt, or the last token and its draft. The draft's row counts
//! only when the token chosen from the row before is the draft.

use std::ops::Range;

use crate::{
    request::{Finish, Request, Token},
    sampling,
};

/// See the file's head.
pub(crate) struct Sequence {
    pub(crate) id: u64,
    pub(crate) request: Request,
    pub(crate) seq: usize,
    pub(crate) tokens: Vec<u32>,
    pub(crate) fed: usize,
    pub(crate) draft: Option<u32>,
    pub(crate) pages: usize,
    /// Sequences with the same prompt that wait for this one to read it.
    pub(crate) followers: Vec<Sequence>,
}

/// What one step brought a sequence.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) prompt: Vec<Token>,
    pub(crate) tokens: Vec<Token>,
    pub(crate) finish: Option<Finish>,
    /// Rows of this step whose cache entries stay.
    pub(crate) rows_kept: usize,
    pub(crate) draft_tried: bool,
    pub(crate) draft_accepted: bool,
}

impl Sequence {
    pub(crate) fn prompt_len(&self) -> usize {
        self.request.ids.len()
    }

    /// Tokens of the prompt that must pass through the model: with nothing to generate the last one need not.
    fn prompt_rows(&self) -> usize {
        self.prompt_len() - usize::from(self.request.max_tokens == 0)
    }

    /// Whether the next step is part of the prompt.
    pub(crate) fn is_prefill(&self) -> bool {
        self.fed < self.prompt_rows()
    }

    /// Ids of the next step, at most `rows_max` of a prompt.
    pub(crate) fn next_ids(&self, rows_max: usize) -> Vec<u32> {
        if self.is_prefill() {
            return self.tokens[self.fed..self.prompt_rows().min(self.fed + rows_max)].to_vec();
        }
        self.tokens[self.fed..].iter().copied().chain(self.draft).collect()
    }

    /// The rows, of a step of `rows` rows, whose logits are needed.
    pub(crate) fn logit_rows(&self, rows: usize) -> Range<usize> {
        let end = self.fed + rows;
        if !self.is_prefill() {
            return 0..rows;
        }
        let last = if end == self.prompt_rows() && self.request.max_tokens > 0 { rows - 1 } else { rows };
        match self.request.echo_from {
            // Row j speaks about token j + 1.
            Some(from) => from.saturating_sub(1).saturating_sub(self.fed).min(last)..rows,
            None => last..rows,
        }
    }

    /// Whether `other` may wait for this one's prompt instead of reading the same one again.
    pub(crate) fn leads(&self, other: &Sequence) -> bool {
        let plain = |s: &Sequence| s.request.max_tokens > 0 && s.request.echo_from.is_none() && !s.request.speculate;
        self.fed == 0 && plain(self) && plain(other) && self.request.ids == other.request.ids
    }

    /// [`Self::accept`] for this sequence and, once its prompt is read, for its followers. Empty without rows.
    pub(crate) fn accept_all(&mut self, rows: usize, wanted: Range<usize>, logits: &[&[f32]]) -> Vec<Outcome> {
        if rows == 0 {
            return Vec::new();
        }
        let fed = self.fed;
        let mut outcomes = vec![self.accept(rows, wanted.clone(), logits)];
        if !self.is_prefill() {
            for follower in &mut self.followers {
                follower.fed = fed;
                outcomes.push(follower.accept(rows, wanted.clone(), logits));
            }
        }
        outcomes
    }

    /// Takes the logits of [`Self::logit_rows`] of the step that fed `rows` rows, `[count, vocab]`.
    pub(crate) fn accept(&mut self, rows: usize, wanted: Range<usize>, logits: &[&[f32]]) -> Outcome {
        let mut outcome = Outcome { draft_tried: self.draft.is_some(), rows_kept: rows, ..Outcome::default() };
        let prompt_rows = self.prompt_rows();
        let was_prefill = self.is_prefill();
        if was_prefill && self.fed == 0 && self.request.echo_from == Some(0) {
            outcome.prompt.push(Token { id: self.tokens[0], logprob: None, top: Vec::new() });
        }
        for (row, logits) in wanted.zip(logits) {
            let position = self.fed + row + 1;
            let known = self.tokens.get(position).copied();
            let chosen = known.or_else(|| sampling::sample(logits, &self.request.sampling, position));
            let log_sum = sampling::log_sum_exp(logits);
            let Some(id) = chosen.filter(|_| !log_sum.is_nan()) else {
                outcome.finish = Some(Finish::NonFinite { position });
                break;
            };
            let token = self.describe(id, logits, log_sum);
            if known.is_some() {
                if self.request.echo_from.is_some_and(|from| position >= from) {
                    outcome.prompt.push(token);
                }
                continue;
            }
            outcome.tokens.push(token);
            self.tokens.push(id);
            outcome.finish = self.finish();
            let accepted = self.draft.take() == Some(id);
            outcome.draft_accepted |= accepted;
            if outcome.finish.is_some() || !accepted {
                outcome.rows_kept = row + 1;
                break;
            }
        }
        self.draft = None;
        self.fed += outcome.rows_kept;
        if was_prefill && self.request.max_tokens == 0 && self.fed == prompt_rows {
            outcome.finish = outcome.finish.or(Some(Finish::Length));
        }
        outcome
    }

    fn finish(&self) -> Option<Finish> {
        let last = self.tokens[self.tokens.len() - 1];
        if self.request.stop_ids.contains(&last) {
            return Some(Finish::Stop);
        }
        (self.tokens.len() - self.prompt_len() >= self.request.max_tokens).then_some(Finish::Length)
    }

    fn describe(&self, id: u32, logits: &[f32], log_sum: f64) -> Token {
        let logprob = (f64::from(logits[id as usize]) - log_sum) as f32;
        Token { id, logprob: Some(logprob), top: sampling::top(logits, log_sum, self.request.top_logprobs) }
    }

    /// Whether a draft could still be used: it needs room for the token it follows and for itself.
    pub(crate) fn wants_draft(&self) -> bool {
        let generated = self.tokens.len() - self.prompt_len();
        self.request.speculate && generated + 1 < self.request.max_tokens
    }
}
