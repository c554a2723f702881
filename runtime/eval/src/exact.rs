//! Exact match by generation: the model answers, an extractor finds the answer, answers are compared.
//!
//! **Invariant:** the report is a function of model, items and options: sampling noise is keyed by the seed, the item's
//! index and the sample's index.

use dsv3_core::{Cancel, Rng};
use dsv3_data::{ChatTemplate, Message, Tokenizer};
use dsv3_infer::{Decoder, Finish, GenerateOptions, Request, Sampling, generate};
use serde::{Deserialize, Serialize};

use crate::{Error, Extractor, answer::normalise};

/// A question as the model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExactItem {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The right answer.
    pub answer: String,
}

/// How answers are generated and read.
#[derive(Clone, Debug, PartialEq)]
pub struct ExactOptions {
    /// New tokens at most.
    pub max_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// Answers per question.
    pub samples: usize,
    /// Names the noise.
    pub seed: u64,
    /// Id that ends an answer; an answer without it has not the asked form.
    pub eos: u32,
    /// Where the answer is looked for.
    pub extractor: Extractor,
}

/// Counts over all answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExactReport {
    /// Questions.
    pub items: u64,
    /// Answers: questions times samples.
    pub answers: u64,
    /// Answers that ended by themselves in the asked form.
    pub formatted: u64,
    /// Of those, the right ones.
    pub correct: u64,
    /// Tokens of all answers, end tokens included.
    pub tokens: u64,
}

impl ExactReport {
    /// Share of right answers.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.answers.max(1) as f64
    }

    /// Share of answers in the asked form.
    pub fn format_share(&self) -> f64 {
        self.formatted as f64 / self.answers.max(1) as f64
    }

    /// Mean tokens per answer.
    pub fn length_mean(&self) -> f64 {
        self.tokens as f64 / self.answers.max(1) as f64
    }
}

/// One answer, for transcripts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Index of the question.
    pub item: usize,
    /// The model's text, without the end token.
    pub text: String,
    /// What the extractor found.
    pub found: Option<String>,
    /// Whether it is right.
    pub is_correct: bool,
    /// Tokens, end token included.
    pub tokens: usize,
}

/// Questions with answers as items: each question alone in a user turn, after `system` if there is one.
///
/// # Errors
/// When the template refuses the messages.
pub fn chat_items<'a>(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    system: Option<&str>,
    questions: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<Vec<ExactItem>, Error> {
    questions
        .map(|(question, answer)| {
            let turns = system.map(Message::system).into_iter().chain([Message::user(question)]);
            let prompt = template.encode_prompt(tokenizer, &turns.collect::<Vec<_>>())?;
            Ok(ExactItem { prompt, answer: answer.to_owned() })
        })
        .collect()
}

/// Asks every item `options.samples` times.
///
/// # Errors
/// When an item does not fit the model, or on cancellation.
pub fn exact_match<D: Decoder>(
    decoder: &D,
    tokenizer: &Tokenizer,
    items: &[ExactItem],
    options: &ExactOptions,
    cancel: &Cancel,
) -> Result<(ExactReport, Vec<Answer>), Error> {
    let samples = options.samples.max(1);
    let requests = items.iter().enumerate().flat_map(|(index, item)| {
        (0..samples).map(move |sample| {
            let seed = Rng::new(options.seed).key("exact match").key(index).key(sample).next_u64();
            let sampling = Sampling { temperature: options.temperature, top_p: 1.0, seed };
            Request::greedy(item.prompt.clone(), options.max_tokens, vec![options.eos]).sampled(sampling)
        })
    });
    let completions = generate(decoder, requests.collect(), GenerateOptions::default(), cancel)?;
    let mut report = ExactReport { items: items.len() as u64, ..ExactReport::default() };
    let mut answers = Vec::with_capacity(completions.len());
    for (index, completion) in completions.iter().enumerate() {
        let item = index / samples;
        let ended = completion.finish == Finish::Stop;
        let text = tokenizer.decode(&completion.ids[..completion.ids.len() - usize::from(ended)]);
        let found = options.extractor.extract(&text).filter(|_| ended);
        let is_correct = found.as_deref() == Some(normalise(&items[item].answer).as_str());
        report.answers += 1;
        report.formatted += u64::from(found.is_some());
        report.correct += u64::from(is_correct);
        report.tokens += completion.ids.len() as u64;
        answers.push(Answer { item, text, found, is_correct, tokens: completion.ids.len() });
    }
    Ok((report, answers))
}
