//! Example of a `reward`: 1 for the right final answer in the asked form, plus `format_weight` for the form itself.
//!
//! The form is `<think>…</think>`, a line break, `#### N`, and nothing else; the thinking holds no `<`. A completion that
//! ran into the length limit, lists several answers, or answers only inside the thinking earns nothing.
//!
//! Configuration: `{"format_weight": 0.2}`.

use serde::Deserialize;

wit_bindgen::generate!({ path: "../..", world: "reward" });

use exports::dsv3::hooks::rewards::{Guest, Items, Scores, Texts};

#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    /// Reward of the form alone.
    format_weight: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { format_weight: 0.2 }
    }
}

static CONFIG: std::sync::OnceLock<Config> = std::sync::OnceLock::new();

struct Answer;

impl Guest for Answer {
    fn configure(config: String) -> Result<(), String> {
        let config = serde_json::from_str(&config).map_err(|error| error.to_string())?;
        CONFIG.set(config).map_err(|_| "configured twice".to_owned())
    }

    fn score(batch: Items) -> Result<Scores, String> {
        let config = CONFIG.get().copied().unwrap_or_default();
        let mut scores = Scores {
            totals: Vec::with_capacity(batch.finished.len()),
            part_names: vec!["correct".to_owned(), "format".to_owned()],
            parts: Vec::with_capacity(2 * batch.finished.len()),
        };
        for (i, finished) in batch.finished.iter().enumerate() {
            let given = (*finished == 1).then(|| text(&batch.completions, i)).transpose()?.and_then(final_answer);
            let wanted = number(text(&batch.answers, i)?.trim());
            let format = f64::from(u8::from(given.is_some()));
            let correct = f64::from(u8::from(given.is_some() && given == wanted));
            scores.totals.push(correct + config.format_weight * format);
            scores.parts.extend([correct, format]);
        }
        Ok(scores)
    }
}

fn text(texts: &Texts, i: usize) -> Result<&str, String> {
    let bytes = &texts.data[texts.offsets[i] as usize..texts.offsets[i + 1] as usize];
    std::str::from_utf8(bytes).map_err(|error| format!("item {i}: {error}"))
}

/// The number after `####` when the completion has exactly the asked form.
fn final_answer(completion: &str) -> Option<i64> {
    let (thinking, rest) = completion.trim().strip_prefix("<think>")?.split_once("</think>")?;
    if thinking.contains('<') {
        return None;
    }
    number(rest.strip_prefix("\n#### ")?)
}

/// A plain decimal integer; thousands separators as in GSM8K are allowed.
fn number(text: &str) -> Option<i64> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let valid = digits.starts_with(|c: char| c.is_ascii_digit()) && digits.chars().all(|c| c.is_ascii_digit() || c == ',');
    valid.then(|| text.replace(',', "").parse().ok()).flatten()
}

export!(Answer);
