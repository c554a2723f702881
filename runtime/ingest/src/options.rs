//! Options of [`crate::ingest`], in the words of the pipeline file.

use dsv3_data::{DocumentColumns, SPLIT_PATTERN};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How documents become a token stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct IngestOptions {
    /// Names of the columns that are read.
    pub columns: DocumentColumns,
    /// Tokens of a Parquet row of the stream. Any sample length can be read from any row length.
    pub row_tokens: usize,
    /// Tokens of a shard, about.
    pub shard_tokens: u64,
    /// Drops documents whose text was seen before.
    pub dedup: bool,
    /// Tokens of the vocabulary that is trained when no tokenizer is given: ten specials, 256 bytes, merges.
    pub vocab_size: usize,
    /// Regular expression whose matches are never merged across, when a tokenizer is trained.
    pub split_pattern: String,
    /// Bytes of text, about, that the tokenizer is trained on; a larger corpus is sampled.
    pub tokenizer_sample_bytes: u64,
    /// Texts that a trained tokenizer should spell in few tokens although the documents rarely hold them, such as the
    /// marks of a later stage's answers: it is trained as if one in a thousand bytes of its sample were each of these.
    pub vocabulary_texts: Vec<String>,
    /// Fill in the middle.
    pub fim: FimOptions,
    /// Shuffles documents before packing. Aligned documents keep their order; the loader draws in its own.
    pub shuffle: bool,
    /// Documents that stand alone instead of being packed.
    pub align: Option<AlignOptions>,
}

impl Default for IngestOptions {
    fn default() -> Self {
        Self {
            columns: DocumentColumns::default(),
            row_tokens: 4096,
            shard_tokens: 1 << 24,
            dedup: true,
            vocab_size: 32_768,
            split_pattern: SPLIT_PATTERN.to_owned(),
            tokenizer_sample_bytes: 1 << 28,
            vocabulary_texts: Vec::new(),
            fim: FimOptions::default(),
            shuffle: true,
            align: None,
        }
    }
}

impl IngestOptions {
    /// The same for validation text: every document once, in its order, unchanged.
    #[must_use]
    pub fn for_validation(&self) -> Self {
        Self { dedup: false, shuffle: false, fim: FimOptions::default(), ..self.clone() }
    }

    /// Problems that can be seen without data: dotted field and message.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if self.row_tokens == 0 {
            problems.push(("row_tokens", "0 is refused: a row holds at least one token".to_owned()));
        }
        if self.shard_tokens == 0 {
            problems.push(("shard_tokens", "0 is refused: a shard holds at least one row".to_owned()));
        }
        if self.vocab_size < 266 {
            let message = format!("{} is below 266: ten specials and 256 bytes", self.vocab_size);
            problems.push(("vocab_size", message));
        }
        if !(0.0..=1.0).contains(&self.fim.rate) {
            problems.push(("fim.rate", format!("{} is no share between 0 and 1", self.fim.rate)));
        }
        if let Some(align) = &self.align {
            if align.tokens == 0 {
                problems.push(("align.tokens", "0 is refused: name the sequence length".to_owned()));
            }
            if align.sources.is_empty() {
                problems.push(("align.sources", "is empty: name the sources to align".to_owned()));
            }
        }
        problems
    }
}

/// Fill in the middle (PSM) before packing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FimOptions {
    /// Share of documents that are rearranged. 0 switches it off.
    pub rate: f64,
    /// Only documents of these sources; empty means all.
    pub sources: Vec<String>,
}

/// Documents that begin at a multiple of `tokens`, the space after them filled with pad, so that a sample of that length
/// holds exactly one of them. They come after all packed documents and begin with bos. Pad carries no loss.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AlignOptions {
    /// Sequence length of the training that reads the stream.
    pub tokens: u64,
    /// Documents of these sources are aligned.
    pub sources: Vec<String>,
}
