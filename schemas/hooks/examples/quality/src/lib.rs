//! Example of a `document-filter`: drops documents that are too short, too repetitive or mostly not letters, and trims
//! trailing white space.
//!
//! Configuration: `{"min_words": 5, "max_repeat_share": 0.9, "min_letter_share": 0.2}`.

use serde::Deserialize;

wit_bindgen::generate!({ path: "../..", world: "document-filter" });

use exports::dsv3::hooks::filter::{Guest, Texts, Verdicts};

#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Config {
    /// Fewer words than this: dropped.
    min_words: usize,
    /// A larger share of lines that repeat the line before: dropped.
    max_repeat_share: f64,
    /// A smaller share of letters and digits among the characters: dropped.
    min_letter_share: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { min_words: 5, max_repeat_share: 0.9, min_letter_share: 0.2 }
    }
}

static CONFIG: std::sync::OnceLock<Config> = std::sync::OnceLock::new();

struct Quality;

impl Guest for Quality {
    fn configure(config: String) -> Result<(), String> {
        let config = serde_json::from_str(&config).map_err(|error| error.to_string())?;
        CONFIG.set(config).map_err(|_| "configured twice".to_owned())
    }

    fn judge(documents: Texts) -> Result<Verdicts, String> {
        let config = CONFIG.get().copied().unwrap_or_default();
        let count = documents.offsets.len().saturating_sub(1);
        let mut verdicts = Verdicts {
            actions: Vec::with_capacity(count),
            notes: Texts { data: Vec::new(), offsets: vec![0] },
        };
        for i in 0..count {
            let bytes = &documents.data[documents.offsets[i] as usize..documents.offsets[i + 1] as usize];
            let text = std::str::from_utf8(bytes).map_err(|error| format!("document {i}: {error}"))?;
            let (action, note) = match reason(text, &config) {
                Some(reason) => (1, reason),
                None if text.trim_end().len() < text.len() => (2, text.trim_end()),
                None => (0, ""),
            };
            verdicts.actions.push(action);
            verdicts.notes.data.extend_from_slice(note.as_bytes());
            verdicts.notes.offsets.push(verdicts.notes.data.len() as u32);
        }
        Ok(verdicts)
    }
}

/// Why `text` is dropped, or `None` when it stays.
fn reason(text: &str, config: &Config) -> Option<&'static str> {
    if text.split_whitespace().count() < config.min_words {
        return Some("too few words");
    }
    let (mut chars, mut letters) = (0usize, 0usize);
    for c in text.chars().filter(|c| !c.is_whitespace()) {
        chars += 1;
        letters += usize::from(c.is_alphanumeric());
    }
    if (letters as f64) < config.min_letter_share * chars as f64 {
        return Some("too few letters");
    }
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let repeats = lines.windows(2).filter(|pair| pair[0] == pair[1]).count();
    if lines.len() > 2 && repeats as f64 > config.max_repeat_share * (lines.len() - 1) as f64 {
        return Some("repeated lines");
    }
    None
}

export!(Quality);
