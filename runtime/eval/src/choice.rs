//! Choice by likelihood: the choice whose tokens have the highest mean log-probability after the question.
//!
//! Ties go to the first choice, so items whose right answer always comes first (GPQA) are shuffled by a key.

use dsv3_core::{Cancel, Rng};
use dsv3_data::{BenchmarkRecord, Tokenizer};
use dsv3_infer::{Continuation, Decoder, score};
use serde::{Deserialize, Serialize};

use crate::Error;

/// A question with its choices as the model reads them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChoiceItem {
    /// The question.
    pub prompt: Vec<u32>,
    /// What may follow.
    pub choices: Vec<Vec<u32>>,
    /// Index of the right one.
    pub correct: usize,
}

/// How a question is put.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChoiceForm {
    /// Text between the question and a choice.
    #[serde(default = "default_cue")]
    pub cue: String,
    /// Tokens kept of a question, from its end.
    #[serde(default = "default_prompt_tokens")]
    pub prompt_tokens_max: usize,
}

fn default_cue() -> String {
    "\n####".to_owned()
}

fn default_prompt_tokens() -> usize {
    200
}

impl Default for ChoiceForm {
    fn default() -> Self {
        Self { cue: default_cue(), prompt_tokens_max: default_prompt_tokens() }
    }
}

/// Counts over all questions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChoiceReport {
    /// Questions.
    pub items: u64,
    /// Those whose right choice was the likeliest.
    pub correct: u64,
    /// Expected `correct` of blind guessing.
    pub chance: f64,
}

impl ChoiceReport {
    /// Share of right choices.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.items.max(1) as f64
    }

    /// Share that blind guessing would get.
    pub fn chance_accuracy(&self) -> f64 {
        self.chance / self.items.max(1) as f64
    }
}

/// The multiple-choice questions of a benchmark as items, choices shuffled by `seed`; other records are passed over.
///
/// # Errors
/// When a text has no tokens.
pub fn choice_items(
    tokenizer: &Tokenizer,
    records: &[BenchmarkRecord],
    form: &ChoiceForm,
    seed: u64,
) -> Result<Vec<ChoiceItem>, Error> {
    let mut items = Vec::new();
    for (index, record) in records.iter().enumerate() {
        let BenchmarkRecord::Choice { question, choices, correct } = record else { continue };
        let mut prompt = tokenizer.encode(&format!("{question}{}", form.cue))?;
        prompt.drain(..prompt.len().saturating_sub(form.prompt_tokens_max.max(1)));
        let mut order: Vec<usize> = (0..choices.len()).collect();
        Rng::new(seed).key("choices").key(index).shuffle(&mut order);
        let encode = |choice: &usize| Ok(tokenizer.encode(&format!(" {}", choices[*choice]))?);
        let encoded = order.iter().map(encode).collect::<Result<Vec<_>, Error>>()?;
        if prompt.is_empty() || encoded.iter().any(Vec::is_empty) {
            return Err(Error::Item { item: format!("question {index}"), message: "a text has no tokens".to_owned() });
        }
        let correct = order.iter().position(|choice| choice == correct).unwrap_or(0);
        items.push(ChoiceItem { prompt, choices: encoded, correct });
    }
    Ok(items)
}

/// Picks the likeliest choice of every item; also returns the picks.
///
/// # Errors
/// When an item does not fit the model, or on cancellation.
pub fn choose<D: Decoder>(
    decoder: &D,
    items: &[ChoiceItem],
    cancel: &Cancel,
) -> Result<(ChoiceReport, Vec<usize>), Error> {
    let continuations: Vec<Continuation> = items
        .iter()
        .flat_map(|item| {
            let one = |choice: &Vec<u32>| Continuation { prompt: item.prompt.clone(), continuation: choice.clone() };
            item.choices.iter().map(one)
        })
        .collect();
    let scores = score(decoder, &continuations, cancel)?;
    let (mut report, mut picks, mut first) = (ChoiceReport::default(), Vec::new(), 0);
    for item in items {
        let means: Vec<f64> = scores[first..first + item.choices.len()].iter().map(|score| score.mean()).collect();
        first += item.choices.len();
        let pick = (0..means.len()).fold(0, |best, index| if means[index] > means[best] { index } else { best });
        report.items += 1;
        report.correct += u64::from(pick == item.correct);
        report.chance += 1.0 / item.choices.len().max(1) as f64;
        picks.push(pick);
    }
    Ok((report, picks))
}
