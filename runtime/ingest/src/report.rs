//! What an ingest read, dropped and wrote.

use std::collections::BTreeMap;

use dsv3_hooks::HookError;
use serde::{Deserialize, Serialize};

/// Counts of one ingest. Deterministic: it is an artifact of the run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct IngestReport {
    /// Files read.
    pub files: u64,
    /// Documents read.
    pub documents_in: u64,
    /// Bytes of their text.
    pub bytes_in: u64,
    /// Documents written.
    pub documents_out: u64,
    /// Bytes of their text.
    pub bytes_out: u64,
    /// Documents dropped, by reason (the filter's own words, `duplicate`, `empty`).
    pub dropped: BTreeMap<String, u64>,
    /// Places of the first few dropped documents of each reason.
    pub dropped_examples: BTreeMap<String, Vec<String>>,
    /// Documents on which the filter failed and its policy decided.
    pub filter_faults: u64,
    /// The first few of these failures.
    pub filter_fault_examples: Vec<String>,
    /// Documents whose text the filter changed.
    pub rewritten: u64,
    /// Documents rearranged for filling in the middle.
    pub fim_documents: u64,
    /// Documents that stand alone.
    pub aligned_documents: u64,
    /// Of these, documents longer than the aligned length, which run on into further samples.
    pub aligned_overlong: u64,
    /// Pad tokens after aligned documents.
    pub padding_tokens: u64,
    /// Tokens of the stream.
    pub tokens: u64,
    /// Tokens by source of document.
    pub tokens_by_source: BTreeMap<String, u64>,
    /// Bytes of text per token.
    pub bytes_per_token: f64,
    /// Size of the vocabulary.
    pub vocab_size: u64,
    /// Whether the tokenizer was trained here.
    pub tokenizer_trained: bool,
}

/// Places kept for each reason.
const EXAMPLES: usize = 5;

impl IngestReport {
    pub(crate) fn drop_document(&mut self, reason: &str, place: impl FnOnce() -> String) {
        *self.dropped.entry(reason.to_owned()).or_default() += 1;
        let examples = self.dropped_examples.entry(reason.to_owned()).or_default();
        if examples.len() < EXAMPLES {
            examples.push(place());
        }
    }

    pub(crate) fn note_faults(&mut self, faults: &[HookError]) {
        self.filter_faults += faults.len() as u64;
        let room = EXAMPLES.saturating_sub(self.filter_fault_examples.len());
        self.filter_fault_examples.extend(faults.iter().take(room).map(HookError::to_string));
    }

    /// `3 duplicate, 2 too short`, for messages.
    pub fn dropped_text(&self) -> String {
        let parts: Vec<String> = self.dropped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        if parts.is_empty() { "nothing was dropped".to_owned() } else { parts.join(", ") }
    }
}
