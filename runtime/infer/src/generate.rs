//! Many prompts to many completions in one call: rollouts, distillation, evaluation.

use dsv3_core::Cancel;

use crate::{Completion, Decoder, Error, Finish, Options, Request, Scheduler, Update, scheduler};

/// Performance options of [`generate`] and [`crate::score`]; none changes a token or a bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerateOptions {
    /// Sequences that run at the same time.
    pub batch_max: usize,
    /// Prompt tokens per step.
    pub prefill_tokens: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { batch_max: 128, prefill_tokens: 2048 }
    }
}

/// Completes every request; the answers lie in the order of the requests.
///
/// Equal prompts without drafting are read once. A request's answer is the same bits whatever the others are.
///
/// # Errors
/// [`Error::Invalid`] for a request the model cannot serve, [`Error::Cancelled`], [`Error::NonFinite`],
/// [`Error::Model`].
pub fn generate<D: Decoder>(
    decoder: &D,
    requests: Vec<Request>,
    options: GenerateOptions,
    cancel: &Cancel,
) -> Result<Vec<Completion>, Error> {
    let empty = || Completion { ids: Vec::new(), logprobs: Vec::new(), finish: Finish::Length };
    let mut completions: Vec<Completion> = requests.iter().map(|_| empty()).collect();
    run(decoder, requests, options, cancel, |index, update| match update {
        Update::Prompt(_) => {}
        Update::Tokens(tokens) => {
            for token in tokens {
                completions[index].ids.push(token.id);
                completions[index].logprobs.push(token.logprob.unwrap_or(f32::NAN));
            }
        }
        Update::Finished(finish) => completions[index].finish = finish,
    })?;
    Ok(completions)
}

/// Drives a scheduler of fitting size until every request has ended.
pub(crate) fn run<D: Decoder>(
    decoder: &D,
    requests: Vec<Request>,
    options: GenerateOptions,
    cancel: &Cancel,
    mut each: impl FnMut(usize, Update),
) -> Result<(), Error> {
    let page = decoder.page_tokens();
    let mut pages = Vec::with_capacity(requests.len());
    for request in &requests {
        scheduler::validate(request, decoder, usize::MAX / page)?;
        pages.push((request.ids.len() + request.max_tokens).div_ceil(page));
    }
    pages.sort_unstable_by(|a, b| b.cmp(a));
    let batch_max = options.batch_max.max(1);
    let cache_tokens = pages.iter().take(batch_max).sum::<usize>() * page;
    let waiting_max = requests.len();
    let prefill_tokens = options.prefill_tokens;
    let options = Options { cache_tokens, batch_max, prefill_tokens, waiting_max, ..Options::default() };
    let mut scheduler = Scheduler::new(decoder, options);
    for (id, request) in requests.into_iter().enumerate() {
        scheduler.submit(id as u64, request)?;
    }
    let mut failed = None;
    while !scheduler.is_idle() {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        scheduler.step(&mut |id, update| {
            if let Update::Finished(Finish::NonFinite { position }) = update {
                failed = failed.or(Some((id as usize, position)));
            }
            each(id as usize, update);
            true
        })?;
        if let Some((request, position)) = failed {
            return Err(Error::NonFinite { request, position });
        }
    }
    Ok(())
}
