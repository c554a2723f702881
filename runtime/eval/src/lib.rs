//! Benchmarks: exact match by generation, choice by likelihood, needle retrieval, published solutions under the model.
//!
//! Questions come in their published columns through [`dsv3_data::read_benchmark`]. Invariant: a report holds counts, and
//! is a function of model, questions and options; no clock, no thread, no order of a map reaches it.

mod answer;
mod choice;
mod code;
mod error;
mod exact;
mod needle;
#[cfg(test)]
mod tests;

pub use answer::{Extractor, normalise};
pub use choice::{ChoiceForm, ChoiceItem, ChoiceReport, choice_items, choose};
pub use code::{CodeReport, score_code};
pub use error::Error;
pub use exact::{Answer, ExactItem, ExactOptions, ExactReport, chat_items, exact_match};
pub use needle::{NeedleCount, NeedleItem, NeedleReport, find_needles, needle_items};
