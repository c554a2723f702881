//! Needle retrieval: one sentence with a key at a depth of unrelated text, a question at the end.
//!
//! Records and their layout are [`NeedleRecord`]'s. Scored under teacher forcing (each token of the answer given the true
//! ones before): the share of the answer's tokens that are the most likely ones, and the share of answers that are right as
//! a whole, which is greedy generation's exact match.

use std::collections::BTreeMap;

use dsv3_core::Cancel;
use dsv3_data::{NeedleIds, NeedleRecord, Tokenizer};
use dsv3_infer::{Continuation, Decoder, score};
use serde::{Deserialize, Serialize};

use crate::Error;

/// A needle as the model reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct NeedleItem {
    /// Prompt and answer.
    pub text: Continuation,
    /// See [`NeedleRecord::depth`].
    pub depth: f64,
    /// See [`NeedleRecord::length_tokens`].
    pub length_tokens: usize,
}

/// Cuts the filler of every record so that prompt and answer have exactly their length.
///
/// # Errors
/// When a record's filler is too short for its length, or the length too short for its sentence.
pub fn needle_items(tokenizer: &Tokenizer, records: &[NeedleRecord]) -> Result<Vec<NeedleItem>, Error> {
    let item = |(index, record): (usize, &NeedleRecord)| {
        let located = |message: String| Error::Item { item: format!("needle {index}"), message };
        let NeedleIds { prompt, answer } = record.ids(tokenizer).map_err(|error| located(error.to_string()))?;
        if answer.is_empty() {
            return Err(located("its answer has no tokens".to_owned()));
        }
        let text = Continuation { prompt, continuation: answer };
        Ok(NeedleItem { text, depth: record.depth, length_tokens: record.length_tokens })
    };
    records.iter().enumerate().map(item).collect()
}

/// Counts of one length and depth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeedleCount {
    /// Needles.
    pub items: u64,
    /// Needles whose whole answer is right.
    pub exact: u64,
    /// Answer tokens.
    pub words: u64,
    /// Right ones.
    pub words_right: u64,
}

impl NeedleCount {
    /// Share of right answer tokens.
    pub fn word_share(&self) -> f64 {
        self.words_right as f64 / self.words.max(1) as f64
    }

    /// Share of right answers.
    pub fn exact_share(&self) -> f64 {
        self.exact as f64 / self.items.max(1) as f64
    }

    fn add(&mut self, other: &Self) {
        self.items += other.items;
        self.exact += other.exact;
        self.words += other.words;
        self.words_right += other.words_right;
    }
}

/// Counts by length and depth.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NeedleReport {
    /// By length in tokens and depth as written in the file.
    pub cells: BTreeMap<usize, BTreeMap<String, NeedleCount>>,
}

impl NeedleReport {
    /// All depths of one length; zeros for a length that was not asked.
    pub fn at(&self, length_tokens: usize) -> NeedleCount {
        let mut sum = NeedleCount::default();
        self.cells.get(&length_tokens).into_iter().flat_map(BTreeMap::values).for_each(|count| sum.add(count));
        sum
    }

    /// One length by depth in whole percent of the text.
    pub fn by_percent(&self, length_tokens: usize) -> BTreeMap<u64, NeedleCount> {
        let mut out: BTreeMap<u64, NeedleCount> = BTreeMap::new();
        for (depth, count) in self.cells.get(&length_tokens).into_iter().flatten() {
            let percent = depth.parse::<f64>().map_or(0.0, |depth| (depth * 100.0).round());
            out.entry(percent as u64).or_default().add(count);
        }
        out
    }

    /// Lengths asked, ascending.
    pub fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.cells.keys().copied()
    }
}

/// Scores every needle.
///
/// # Errors
/// When a needle is longer than the model's positions, or on cancellation.
pub fn find_needles<D: Decoder>(decoder: &D, items: &[NeedleItem], cancel: &Cancel) -> Result<NeedleReport, Error> {
    let texts: Vec<Continuation> = items.iter().map(|item| item.text.clone()).collect();
    let scores = score(decoder, &texts, cancel)?;
    let mut report = NeedleReport::default();
    for (item, score) in items.iter().zip(&scores) {
        let right = score.greedy.iter().zip(&item.text.continuation).filter(|(got, want)| got == want).count() as u64;
        let words = item.text.continuation.len() as u64;
        let one = NeedleCount { items: 1, exact: u64::from(right == words), words, words_right: right };
        let depths = report.cells.entry(item.length_tokens).or_default();
        depths.entry(format!("{}", item.depth)).or_default().add(&one);
    }
    Ok(report)
}
