//! HumanEval's published solutions under the model, without running any program: mean log-probability per token and the
//! share of tokens that are the most likely ones. This is not pass@1; running generated programs needs a sandbox that
//! this project does not have, and no figure is reported in its place.

use dsv3_core::Cancel;
use dsv3_data::{BenchmarkRecord, Tokenizer};
use dsv3_infer::{Continuation, Decoder, score};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Sums over all programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CodeReport {
    /// Programs scored.
    pub items: u64,
    /// Programs longer than the model's positions, which were left out.
    pub too_long: u64,
    /// Tokens of their solutions.
    pub tokens: u64,
    /// Tokens that were the most likely ones.
    pub tokens_right: u64,
    /// Sum of the tokens' log-probabilities.
    pub logprob_sum: f64,
}

impl CodeReport {
    /// Mean log-probability per token.
    pub fn logprob_mean(&self) -> f64 {
        self.logprob_sum / self.tokens.max(1) as f64
    }
}

/// Scores the programs of a benchmark; other records are passed over.
///
/// # Errors
/// When a text has no tokens, or on cancellation.
pub fn score_code<D: Decoder>(
    decoder: &D,
    tokenizer: &Tokenizer,
    records: &[BenchmarkRecord],
    cancel: &Cancel,
) -> Result<CodeReport, Error> {
    let mut report = CodeReport::default();
    let mut texts = Vec::new();
    for record in records {
        let BenchmarkRecord::Code { prompt, canonical_solution, .. } = record else { continue };
        let prompt = tokenizer.encode(prompt)?;
        let continuation = tokenizer.encode(canonical_solution)?;
        match prompt.len() + continuation.len() <= decoder.positions_max() && !prompt.is_empty() {
            true => texts.push(Continuation { prompt, continuation }),
            false => report.too_long += 1,
        }
    }
    for (text, score) in texts.iter().zip(score(decoder, &texts, cancel)?) {
        report.items += 1;
        report.tokens += text.continuation.len() as u64;
        report.tokens_right +=
            score.greedy.iter().zip(&text.continuation).filter(|(got, want)| got == want).count() as u64;
        report.logprob_sum += score.logprobs.iter().map(|logprob| f64::from(*logprob)).sum::<f64>();
    }
    Ok(report)
}
