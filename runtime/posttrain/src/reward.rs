//! Rewards of completions: rules that read text alone, and a reward hook; totals and named parts add up.
//!
//! A rule sees what a user would see, the prompt, the completion, and the data set's answer; never the model. Rules and
//! hook are pure functions of their items, so a batch may be scored again after an interruption.

use dsv3_core::Error as CoreError;
use dsv3_hooks::{Hook, RewardItem};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Items a hook is given at a time.
const HOOK_BATCH: usize = 256;

/// A reward by a rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "rule", rename_all = "snake_case", deny_unknown_fields)]
pub enum Rule {
    /// What stands after the last `marker` equals the data set's answer, thousands separators apart, and the model ended
    /// by itself.
    Answer {
        /// Text before the final answer.
        #[serde(default = "marker")]
        marker: String,
        /// Reward when it is right.
        #[serde(default = "full")]
        weight: f64,
    },
    /// The completion is `open` … `close`, a line break, `marker`, a space, an answer without spaces, and nothing else,
    /// and the model ended by itself.
    Format {
        /// Start of the reasoning.
        #[serde(default = "open")]
        open: String,
        /// End of the reasoning.
        #[serde(default = "close")]
        close: String,
        /// Text before the final answer.
        #[serde(default = "marker")]
        marker: String,
        /// Reward when it has this form.
        #[serde(default = "fifth")]
        weight: f64,
    },
}

fn marker() -> String {
    "####".to_owned()
}

fn open() -> String {
    "<think>".to_owned()
}

fn close() -> String {
    "</think>".to_owned()
}

fn full() -> f64 {
    1.0
}

fn fifth() -> f64 {
    0.2
}

impl Rule {
    fn name(&self) -> &'static str {
        match self {
            Self::Answer { .. } => "answer",
            Self::Format { .. } => "format",
        }
    }

    fn score(&self, item: &RewardItem<'_>) -> f64 {
        let (holds, weight) = match self {
            Self::Answer { marker, weight } => (final_answer(item.completion, marker) == normal(item.answer), weight),
            Self::Format { open, close, marker, weight } => (has_form(item.completion, open, close, marker), weight),
        };
        if holds && item.finished { *weight } else { 0.0 }
    }
}

fn normal(answer: &str) -> String {
    answer.trim().replace(',', "")
}

/// What stands after the last marker; something no answer equals when there is none.
fn final_answer(text: &str, marker: &str) -> String {
    text.rsplit_once(marker).map_or_else(|| "\0".to_owned(), |(_, answer)| normal(answer))
}

fn has_form(text: &str, open: &str, close: &str, marker: &str) -> bool {
    let Some((thinking, rest)) = text.trim().strip_prefix(open).and_then(|text| text.split_once(close)) else {
        return false;
    };
    let answer = rest.strip_prefix('\n').and_then(|rest| rest.strip_prefix(marker)).and_then(|a| a.strip_prefix(' '));
    !thinking.contains(open) && answer.is_some_and(|a| !a.is_empty() && !a.contains(char::is_whitespace))
}

/// A reward and what it is made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scored {
    /// Sum of all rules and the hook's total.
    pub total: f64,
    /// Parts by name.
    pub parts: Vec<(String, f64)>,
}

/// Whatever scores completions.
pub trait Scorer {
    /// One score per item, in order. `batch` numbers the call within its stage.
    ///
    /// # Errors
    /// When the scorer itself fails.
    fn score(&self, batch: u64, items: &[RewardItem<'_>]) -> Result<Vec<Scored>>;
}

/// Rules and a hook, added up.
pub struct Rewards<'a> {
    /// Rules.
    pub rules: Vec<Rule>,
    /// A hook of the world `reward`.
    pub hook: Option<&'a Hook>,
}

impl Scorer for Rewards<'_> {
    fn score(&self, batch: u64, items: &[RewardItem<'_>]) -> Result<Vec<Scored>> {
        let mut scores: Vec<Scored> = items.iter().map(|item| by_rules(&self.rules, item)).collect();
        let Some(hook) = self.hook else { return Ok(scores) };
        let parts_per_batch = items.len().div_ceil(HOOK_BATCH).max(1) as u64;
        for (part, (items, scores)) in items.chunks(HOOK_BATCH).zip(scores.chunks_mut(HOOK_BATCH)).enumerate() {
            let number = batch * parts_per_batch + part as u64;
            let outcome = hook.reward(number, items).map_err(|e| Error::Reward { source: CoreError::from(e) })?;
            for (score, reward) in scores.iter_mut().zip(outcome.rewards) {
                score.total += reward.total;
                score.parts.extend(reward.parts);
            }
        }
        Ok(scores)
    }
}

fn by_rules(rules: &[Rule], item: &RewardItem<'_>) -> Scored {
    let parts: Vec<(String, f64)> = rules.iter().map(|rule| (rule.name().to_owned(), rule.score(item))).collect();
    Scored { total: parts.iter().map(|(_, value)| value).sum(), parts }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(completion: &str, answer: &str, finished: bool) -> f64 {
        let rules: Vec<Rule> = serde_json::from_str(r#"[{"rule": "answer"}, {"rule": "format"}]"#).unwrap();
        let item = RewardItem { prompt: "p", completion, answer, metadata: "{}", finished };
        Rewards { rules, hook: None }.score(0, &[item]).unwrap()[0].total
    }

    #[test]
    fn right_form_and_right_answer_add_up() {
        assert_eq!(total("<think> 1 + 1 = 2</think>\n#### 2", "2", true), 1.2);
        assert_eq!(total("<think></think>\n#### 1,002", "1002", true), 1.2);
        assert_eq!(total("<think></think>\n#### 3", "2", true), 0.2);
        assert_eq!(total("#### 2", "2", true), 1.0);
        assert_eq!(total("<think></think>\n#### 2", "2", false), 0.0);
        assert_eq!(total("<think>#### 2</think>", "2", true), 0.0);
        assert_eq!(total("", "", true), 0.0);
    }
}
