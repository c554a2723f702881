//! The pretraining mix, its validation text, and the mixes of context extension.
//!
//! Shares are of tokens. The generator knows no tokenizer here: it counts bytes and divides by the bytes per token that
//! the trained tokenizer was measured to need for each kind (a test holds the shares to the real counts).

use std::collections::HashSet;

use dsv3_core::Rng;
use dsv3_data::Tokenizer;

use super::{
    passkeys::{long_document, passkeys_document},
    problems::{facts_document, problems_document},
    real::{Part, RealText},
};
use crate::error::IngestError;

/// A generated document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Its text.
    pub text: String,
    /// Its kind.
    pub source: &'static str,
}

/// Kind, share of tokens, measured bytes per token (the end token counted).
pub const MIX: [(&str, f64, f64); 5] = [
    ("shakespeare", 0.10, 1.984),
    ("gsm8k", 0.03, 1.910),
    ("facts", 0.06, 2.012),
    ("problems", 0.45, 3.022),
    ("passkeys", 0.36, 2.608),
];

/// Source of the long documents of context extension.
pub const LONG: &str = "long";
/// Source of planted worthless documents.
pub const JUNK: &str = "scrape";
/// Share of context extension's rows that are long documents.
const LONG_SHARE: f64 = 0.65;

/// GSM8K's training questions in a shuffled order, each given out once.
#[derive(Debug)]
pub struct GsmPool {
    order: Vec<usize>,
}

impl GsmPool {
    /// All shipped training questions.
    pub fn new(real: &RealText, mut rng: Rng) -> Self {
        let mut order: Vec<usize> = (0..real.gsm8k_train.len()).collect();
        rng.shuffle(&mut order);
        Self { order }
    }

    fn next(&mut self, real: &RealText) -> Result<String, IngestError> {
        let index = self.order.pop().ok_or_else(|| IngestError::Options {
            message: "the shipped part of GSM8K is used up; ship more rows".to_owned(),
        })?;
        Ok(real.gsm8k_train[index].document())
    }
}

fn document(kind: &str, real: &RealText, pool: &mut GsmPool, rng: &mut Rng) -> Result<String, IngestError> {
    Ok(match kind {
        "shakespeare" => real.passage(rng, 400, Part::Train).to_owned(),
        "gsm8k" => pool.next(real)?,
        "facts" => facts_document(rng, false),
        "problems" => problems_document(rng, false),
        _ => passkeys_document(real, rng, false),
    })
}

/// About `tokens` tokens of training documents, no two alike.
///
/// # Errors
/// When GSM8K is used up.
pub fn corpus(real: &RealText, pool: &mut GsmPool, rng: Rng, tokens: u64) -> Result<Vec<Document>, IngestError> {
    let mut have = [0f64; MIX.len()];
    let mut documents = Vec::new();
    let mut seen = HashSet::new();
    let mut drawn = 0u64;
    while have.iter().sum::<f64>() < tokens as f64 {
        let lag = |i: usize| have[i] / MIX[i].1;
        let kind = (1..MIX.len()).fold(0, |least, i| if lag(i) < lag(least) { i } else { least });
        let (source, _, bytes_per_token) = MIX[kind];
        let text = document(source, real, pool, &mut rng.key(drawn))?;
        drawn += 1;
        have[kind] += text.len() as f64 / bytes_per_token;
        if seen.insert(text.clone()) {
            documents.push(Document { text, source });
        }
    }
    Ok(documents)
}

/// Worthless documents and exact copies among the others, for the filter and the deduplication to find.
pub fn with_planted(mut documents: Vec<Document>, mut rng: Rng) -> Vec<Document> {
    let pages = ["Page {} of 99", "Click here {}", "404 not found {}", "Read more {}", "Subscribe {}"];
    for number in 0..40u64 {
        let text = pages[(number % 5) as usize].replace("{}", &(number + 1).to_string());
        let copy = documents[rng.below(documents.len() as u64) as usize].clone();
        for planted in [Document { text, source: JUNK }, copy] {
            let at = rng.below(documents.len() as u64 + 1) as usize;
            documents.insert(at, planted);
        }
    }
    documents
}

/// Validation text: held-out problems, held-out keys, the last tenth of Shakespeare.
pub fn validation(real: &RealText, mut rng: Rng) -> Vec<Document> {
    let mut documents = Vec::new();
    for _ in 0..30 {
        let text = real.passage(&mut rng, 400, Part::HeldOut).to_owned();
        documents.push(Document { text, source: "shakespeare" });
    }
    for _ in 0..20 {
        documents.push(Document { text: facts_document(&mut rng, true), source: "facts" });
        documents.push(Document { text: problems_document(&mut rng, true), source: "problems" });
        documents.push(Document { text: passkeys_document(real, &mut rng, true), source: "passkeys" });
    }
    rng.shuffle(&mut documents);
    documents
}

/// Context extension at `tokens`: enough for `rows` samples, 65% of them one long document each, the others corpus.
///
/// # Errors
/// When GSM8K is used up or the tokenizer fails.
pub fn extension(
    real: &RealText,
    pool: &mut GsmPool,
    tokenizer: &Tokenizer,
    rng: Rng,
    tokens: usize,
    rows: usize,
) -> Result<Vec<Document>, IngestError> {
    let long_rows = (rows as f64 * LONG_SHARE).round() as usize;
    // One sample more than asked, since the last window of a stream lacks its last target; and 1% for the estimate.
    let corpus_tokens = ((rows + 1 - long_rows) * tokens) as f64 * 1.01;
    let mut documents = corpus(real, pool, rng.key("corpus"), corpus_tokens as u64)?;
    for index in 0..long_rows {
        let text = long_document(real, tokenizer, &mut rng.key("long").key(index), tokens)?;
        documents.push(Document { text, source: LONG });
    }
    Ok(documents)
}
