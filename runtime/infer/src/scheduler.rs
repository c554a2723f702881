//! Continuous batching: every step feeds each running sequence the rows it wants (a chunk of its prompt, or its last
//! token and a draft), chooses tokens from the logits, and lets new sequences in as pages come free.
//!
//! **Invariants.** A sequence is admitted only when the pages of its longest possible form are free, so no step can run
//! out of cache and nothing is ever evicted. Requests start in the order of their submission. What a sequence says does
//! not depend on its company (see `decoder.rs` and `sampling.rs`).

use std::collections::VecDeque;

use dsv3_ops::Tensor;
use rayon::prelude::*;

use crate::{
    Decoder, Error, Finish, Request, Step, Update,
    sequence::{Outcome, Sequence},
    speculate,
};

/// Logits held at once: 64 MiB of F32.
const LOGITS_MAX: usize = 1 << 24;

/// Limits of a [`Scheduler`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Tokens the cache holds over all sequences.
    pub cache_tokens: usize,
    /// Sequences that run at the same time.
    pub batch_max: usize,
    /// Prompt tokens per step over all sequences, so that long prompts do not hold up the others.
    pub prefill_tokens: usize,
    /// Requests that may wait.
    pub waiting_max: usize,
    /// A request that joins this many others or more does not draft: a wide batch keeps the machine busy already, and
    /// the rows of drafts that are refused would only take its time.
    pub speculate_batch_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { cache_tokens: 32_768, batch_max: 64, prefill_tokens: 512, waiting_max: 1024, speculate_batch_max: 16 }
    }
}

impl Options {
    /// As many tokens as a full batch of the longest sequences needs, but at most `cache_bytes_max` bytes; at least one
    /// longest sequence.
    #[must_use]
    pub fn fitting<D: Decoder>(self, decoder: &D, cache_bytes_max: usize) -> Self {
        let affordable = cache_bytes_max / decoder.token_bytes().max(1);
        let wanted = self.batch_max.max(1).saturating_mul(decoder.positions_max());
        Self { cache_tokens: wanted.min(affordable).max(decoder.positions_max()), ..self }
    }
}

/// Totals since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests that ended, for whatever reason.
    pub finished: u64,
    /// Prompt tokens read by the model.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Steps of the model.
    pub steps: u64,
    /// Drafts that a main-model row checked.
    pub drafts_tried: u64,
    /// Of those, the ones the main model would have chosen too.
    pub drafts_accepted: u64,
    /// Routed experts that had any row, summed over layers and steps.
    pub experts_read: u64,
    /// Sequences running now.
    pub running: u64,
    /// Requests waiting now.
    pub waiting: u64,
}

impl Counters {
    /// Share of drafts accepted; `None` before the first.
    pub fn acceptance(&self) -> Option<f64> {
        (self.drafts_tried > 0).then(|| self.drafts_accepted as f64 / self.drafts_tried as f64)
    }
}

/// See the file's head.
pub struct Scheduler<'a, D: Decoder> {
    decoder: &'a D,
    options: Options,
    cache: D::Cache,
    pages_free: usize,
    pages_total: usize,
    waiting: VecDeque<(u64, Request)>,
    running: Vec<Sequence>,
    counters: Counters,
}

/// Rows of one running sequence in this step.
struct Planned {
    ids: Vec<u32>,
    /// First row in the step's hidden states.
    row: usize,
    wanted: std::ops::Range<usize>,
}

impl<'a, D: Decoder> Scheduler<'a, D> {
    /// An idle scheduler with an empty cache.
    pub fn new(decoder: &'a D, options: Options) -> Self {
        let pages = options.cache_tokens.div_ceil(decoder.page_tokens()).max(1);
        Self {
            decoder,
            options,
            cache: decoder.cache(pages),
            pages_free: pages,
            pages_total: pages,
            waiting: VecDeque::new(),
            running: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Queues a request; `id` names it in the updates and must be new.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what this model or cache can never serve, [`Error::Busy`] when the queue is full.
    pub fn submit(&mut self, id: u64, request: Request) -> Result<(), Error> {
        validate(&request, self.decoder, self.pages_total)?;
        if self.waiting.len() >= self.options.waiting_max {
            return Err(Error::Busy { waiting: self.waiting.len() });
        }
        self.waiting.push_back((id, request));
        Ok(())
    }

    /// Ends a request early; it gets [`Finish::Cancelled`]. Nothing happens when it has ended already.
    pub fn cancel(&mut self, id: u64, sink: &mut dyn FnMut(u64, Update) -> bool) {
        let mut found = self.waiting.len();
        self.waiting.retain(|(waiting, _)| *waiting != id);
        found -= self.waiting.len();
        for sequence in &mut self.running {
            let before = sequence.followers.len();
            self.pages_free += sequence.followers.iter().filter(|f| f.id == id).map(|f| f.pages).sum::<usize>();
            sequence.followers.retain(|follower| follower.id != id);
            found += before - sequence.followers.len();
        }
        if let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            self.remove(index);
            found += 1;
        }
        if found > 0 {
            self.counters.finished += 1;
            sink(id, Update::Finished(Finish::Cancelled));
        }
    }

    /// Totals and current numbers.
    pub fn counters(&self) -> Counters {
        let followers: usize = self.running.iter().map(|sequence| sequence.followers.len()).sum();
        let running = (self.running.len() + followers) as u64;
        let experts_read = self.decoder.experts_read(&self.cache);
        Counters { running, waiting: self.waiting.len() as u64, experts_read, ..self.counters }
    }

    /// Whether nothing runs or waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Runs one step. `sink` gets every update and answers false when nobody listens any more, which cancels.
    ///
    /// # Errors
    /// [`Error::Model`], after which the scheduler is of no use.
    pub fn step(&mut self, sink: &mut dyn FnMut(u64, Update) -> bool) -> Result<(), Error> {
        self.admit(sink);
        if self.running.is_empty() {
            return Ok(());
        }
        let plan = self.plan();
        let steps: Vec<Step<'_>> = self
            .running
            .iter()
            .zip(&plan)
            .filter(|(_, planned)| !planned.ids.is_empty())
            .map(|(sequence, planned)| Step { seq: sequence.seq, ids: &planned.ids })
            .collect();
        let prefill = self.running.iter().zip(&plan).filter(|(s, _)| s.is_prefill());
        self.counters.prompt_tokens += prefill.map(|(_, planned)| planned.ids.len() as u64).sum::<u64>();
        self.counters.steps += 1;
        let hidden = self.decoder.forward(&mut self.cache, &steps)?;
        let outcomes = self.choose(&plan, &hidden);
        self.settle(&plan, &outcomes, &hidden)?;
        self.report(outcomes, sink);
        Ok(())
    }

    fn pages(&self, request: &Request) -> usize {
        (request.ids.len() + request.max_tokens).div_ceil(self.decoder.page_tokens())
    }

    fn live(&self) -> usize {
        self.running.iter().map(|sequence| 1 + sequence.followers.len()).sum()
    }

    fn admit(&mut self, sink: &mut dyn FnMut(u64, Update) -> bool) {
        while let Some((_, request)) = self.waiting.front() {
            let pages = self.pages(request);
            if pages > self.pages_free || self.live() >= self.options.batch_max.max(1) {
                break;
            }
            let Some((id, mut request)) = self.waiting.pop_front() else { break };
            if request.max_tokens == 0 && (request.echo_from.is_none() || request.ids.len() == 1) {
                self.answer_at_once(id, &request, sink);
                continue;
            }
            request.speculate &= self.decoder.has_draft() && self.live() < self.options.speculate_batch_max;
            self.pages_free -= pages;
            let tokens = request.ids.clone();
            let mut sequence =
                Sequence { id, request, seq: 0, tokens, fed: 0, draft: None, pages, followers: Vec::new() };
            if let Some(leader) = self.running.iter_mut().find(|leader| leader.leads(&sequence)) {
                leader.followers.push(sequence);
                continue;
            }
            sequence.seq = self.decoder.add(&mut self.cache);
            self.running.push(sequence);
        }
    }

    /// A request for which no row has to be computed.
    fn answer_at_once(&mut self, id: u64, request: &Request, sink: &mut dyn FnMut(u64, Update) -> bool) {
        if request.echo_from == Some(0) {
            let first = crate::Token { id: request.ids[0], logprob: None, top: Vec::new() };
            sink(id, Update::Prompt(vec![first]));
        }
        self.counters.finished += 1;
        sink(id, Update::Finished(Finish::Length));
    }

    fn plan(&self) -> Vec<Planned> {
        let mut budget = self.options.prefill_tokens.max(1);
        let rows_max = logit_rows_max(self.decoder.vocab_size());
        let mut row = 0;
        let mut planned = |sequence: &Sequence| {
            let ids = match sequence.is_prefill() {
                true if sequence.request.echo_from.is_some() => sequence.next_ids(budget.min(rows_max)),
                true => sequence.next_ids(budget),
                false => sequence.next_ids(0),
            };
            if sequence.is_prefill() {
                budget -= ids.len();
            }
            let start = row;
            row += ids.len();
            Planned { row: start, wanted: sequence.logit_rows(ids.len()), ids }
        };
        self.running.iter().map(&mut planned).collect()
    }

    /// Logits in groups of at most [`LOGITS_MAX`] values, then every sequence's tokens; leader first, then followers.
    fn choose(&mut self, plan: &[Planned], hidden: &Tensor) -> Vec<Vec<Outcome>> {
        let vocab = self.decoder.vocab_size();
        let rows_max = logit_rows_max(vocab);
        let mut outcomes = Vec::with_capacity(plan.len());
        let mut start = 0;
        while start < plan.len() {
            let (mut end, mut rows) = (start, Vec::new());
            while end < plan.len() && (end == start || rows.len() + plan[end].wanted.len() <= rows_max) {
                rows.extend(plan[end].wanted.clone().map(|row| plan[end].row + row));
                end += 1;
            }
            let logits = (!rows.is_empty()).then(|| self.decoder.logits(&gather(hidden, &rows)));
            let values = logits.as_ref().map_or(&[][..], Tensor::as_f32);
            let mut first = 0;
            let spans: Vec<&[f32]> = plan[start..end]
                .iter()
                .map(|planned| {
                    let span = &values[first * vocab..(first + planned.wanted.len()) * vocab];
                    first += planned.wanted.len();
                    span
                })
                .collect();
            let group = self.running[start..end].par_iter_mut().zip(&plan[start..end]).zip(spans);
            outcomes.par_extend(group.map(|((sequence, planned), span)| {
                let rows: Vec<&[f32]> = span.chunks_exact(vocab).collect();
                sequence.accept_all(planned.ids.len(), planned.wanted.clone(), &rows)
            }));
            start = end;
        }
        outcomes
    }

    /// Brings the caches in line with what was accepted, and drafts the next tokens.
    fn settle(&mut self, plan: &[Planned], outcomes: &[Vec<Outcome>], hidden: &Tensor) -> Result<(), Error> {
        for (index, planned) in plan.iter().enumerate() {
            let sequence = &mut self.running[index];
            if outcomes[index].first().is_some_and(|outcome| outcome.rows_kept < planned.ids.len()) {
                self.decoder.truncate(&mut self.cache, sequence.seq, sequence.fed);
            }
            if outcomes[index].len() > 1 {
                let (leader, fed) = (sequence.seq, sequence.fed);
                for follower in &mut sequence.followers {
                    follower.seq = self.decoder.fork(&mut self.cache, leader, fed)?;
                }
            }
        }
        let rows: Vec<speculate::Rows> = plan
            .iter()
            .zip(outcomes)
            .enumerate()
            .filter_map(|(index, (planned, outcome))| {
                let outcome = outcome.first().filter(|outcome| outcome.finish.is_none())?;
                Some(speculate::Rows { index, rows: planned.row..planned.row + outcome.rows_kept })
            })
            .collect();
        speculate::draft(self.decoder, &mut self.cache, &mut self.running, &rows, hidden)
    }

    fn report(&mut self, outcomes: Vec<Vec<Outcome>>, sink: &mut dyn FnMut(u64, Update) -> bool) {
        let mut ended = Vec::new();
        let mut joined = Vec::new();
        for (index, mut outcomes) in outcomes.into_iter().enumerate() {
            let followers =
                if outcomes.len() > 1 { std::mem::take(&mut self.running[index].followers) } else { vec![] };
            for (follower, outcome) in followers.into_iter().zip(outcomes.drain(outcomes.len().min(1)..)) {
                let over = self.counters.report(follower.id, outcome, sink);
                joined.push((follower, over));
            }
            for outcome in outcomes {
                if self.counters.report(self.running[index].id, outcome, sink) {
                    ended.push(index);
                }
            }
        }
        for (follower, over) in joined {
            self.running.push(follower);
            if over {
                ended.push(self.running.len() - 1);
            }
        }
        for index in ended.into_iter().rev() {
            self.remove(index);
        }
    }

    /// Frees a sequence. Followers that still wait for its prompt go back to the head of the queue.
    fn remove(&mut self, index: usize) {
        let sequence = self.running.remove(index);
        self.decoder.remove(&mut self.cache, sequence.seq);
        self.pages_free += sequence.pages;
        for follower in sequence.followers.into_iter().rev() {
            self.pages_free += follower.pages;
            self.waiting.push_front((follower.id, follower.request));
        }
    }
}

impl Counters {
    /// Sends one sequence's news; true when it has ended or nobody listens.
    fn report(&mut self, id: u64, outcome: Outcome, sink: &mut dyn FnMut(u64, Update) -> bool) -> bool {
        self.generated_tokens += outcome.tokens.len() as u64;
        self.drafts_tried += u64::from(outcome.draft_tried);
        self.drafts_accepted += u64::from(outcome.draft_accepted);
        let mut listened = true;
        if !outcome.prompt.is_empty() {
            listened &= sink(id, Update::Prompt(outcome.prompt));
        }
        if !outcome.tokens.is_empty() {
            listened &= sink(id, Update::Tokens(outcome.tokens));
        }
        if let Some(finish) = outcome.finish {
            sink(id, Update::Finished(finish));
        } else if !listened {
            sink(id, Update::Finished(Finish::Cancelled));
        }
        let over = outcome.finish.is_some() || !listened;
        self.finished += u64::from(over);
        over
    }
}

/// Refuses what can never be served.
pub(crate) fn validate<D: Decoder>(request: &Request, decoder: &D, pages_total: usize) -> Result<(), Error> {
    let vocab = decoder.vocab_size();
    if request.ids.is_empty() {
        return Err(Error::invalid("prompt", "it has no token"));
    }
    if let Some(id) = request.ids.iter().find(|id| **id as usize >= vocab) {
        return Err(Error::invalid("prompt", format!("token {id} is outside the vocabulary of {vocab}")));
    }
    let (length, positions) = (request.ids.len().saturating_add(request.max_tokens), decoder.positions_max());
    let positions = positions.min(pages_total * decoder.page_tokens());
    if length > positions {
        let text = format!(
            "its {} tokens and {} new ones exceed the context of {positions} tokens",
            request.ids.len(),
            request.max_tokens
        );
        return Err(Error::invalid("prompt", text));
    }
    let sampling = &request.sampling;
    if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
        return Err(Error::invalid("temperature", format!("{} is not a number from 0 up", sampling.temperature)));
    }
    if !(0.0..=1.0).contains(&sampling.top_p) {
        return Err(Error::invalid("top_p", format!("{} is not between 0 and 1", sampling.top_p)));
    }
    Ok(())
}

/// Rows whose logits may exist at one time.
pub(crate) fn logit_rows_max(vocab: usize) -> usize {
    (LOGITS_MAX / vocab.max(1)).max(1)
}

/// Rows of `[rows, d]` in the given order; shares the buffer when they are all of them.
pub(crate) fn gather(hidden: &Tensor, rows: &[usize]) -> Tensor {
    let d = hidden.cols();
    if rows.len() == hidden.rows() && rows.iter().enumerate().all(|(i, row)| i == *row) {
        return hidden.reshape(&[rows.len(), d]);
    }
    let values = hidden.as_f32();
    Tensor::f32(&[rows.len(), d], rows.iter().flat_map(|row| &values[row * d..(row + 1) * d]).copied().collect())
}
