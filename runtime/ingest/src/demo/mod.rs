//! The data that the recipes under `pipelines/` ship with: real text (Shakespeare, GSM8K) and what a seeded generator makes
//! of it. `dsv3-pipeline generate` writes it; a test regenerates it and compares.
//!
//! Held out by construction: one arithmetic problem in five ([`problems::Problem::held_out`]), one passkey in four
//! ([`passkeys::Key::held_out`]) and the last tenth of Shakespeare are in no training text of any stage; validation text,
//! needle sets and evaluation problems use nothing else.
//!
//! | file | columns | use |
//! |---|---|---|
//! | `corpus-*` | text, source | pretraining, 3.2M tokens |
//! | `validation` | text, source | validation loss |
//! | `extension-256`, `-512` | text, source | context extension: long documents and corpus |
//! | `needle-256`, `-512` | filler, statement, question, answer, depth, length_tokens | retrieval check |
//! | `sft-problems` | prompt, answer, solution, task | SFT without traces |
//! | `teacher-traces` | columns of the public R1 sets | distillation; 30% of the traces slip |
//! | `rl-prompts` | prompt, answer, task | reinforcement learning |
//! | `heldout-problems` | question, answer, task | evaluation |
//! | `gsm8k-choice` | question, subject, choices, answer | four-way choice |
//! | `tinyshakespeare`, `gsm8k-train`, `gsm8k-test` | as published | real text |

pub mod chats;
pub mod corpus;
pub mod passkeys;
pub mod problems;
pub mod real;
pub mod table;

use std::{borrow::Cow, path::Path};

use dsv3_core::Rng;

use crate::{error::IngestError, options::IngestOptions, pipeline::train_tokenizer};
use corpus::{Document, GsmPool};
use real::RealText;
use table::{Column, Table};

/// Seed of everything that ships.
pub const SEED: u64 = 20_261_124;
/// Size of the demo's vocabulary.
pub const VOCAB_SIZE: usize = 704;
/// Tokens of the pretraining corpus, a little more than the one pass that the recipe makes.
const CORPUS_TOKENS: u64 = 3_212_000;
/// Largest shipped file.
pub const FILE_BYTES_MAX: usize = 950_000;

/// Marks of a reasoned answer that the corpus hardly holds; each becomes one token.
pub const TRACE_WORDS: [&str; 2] = [" Check", "####"];

/// Options under which the demo's tokenizer is trained, here and by `pipelines/full.yaml`.
pub fn tokenizer_options() -> IngestOptions {
    let vocabulary_texts = TRACE_WORDS.map(str::to_owned).to_vec();
    IngestOptions { vocab_size: VOCAB_SIZE, vocabulary_texts, ..IngestOptions::default() }
}

/// Generates every generated file from the real text in `folder`: file names and Parquet bytes.
///
/// # Errors
/// When the real text is not there or damaged.
pub fn generate(folder: &Path) -> Result<Vec<(String, Vec<u8>)>, IngestError> {
    let real = RealText::read(folder)?;
    let root = Rng::new(SEED);
    let mut pool = GsmPool::new(&real, root.key("gsm8k order"));
    let mut files = Vec::new();

    let documents = corpus::corpus(&real, &mut pool, root.key("corpus"), CORPUS_TOKENS)?;
    let texts = || documents.iter().map(|document| document.text.as_str());
    let total_bytes = texts().map(|text| text.len() as u64).sum();
    let tokenizer = train_tokenizer(&tokenizer_options(), texts().map(Cow::Borrowed), total_bytes, SEED)?;
    let planted = corpus::with_planted(documents, root.key("planted"));
    files.extend(table(&planted).split("corpus", FILE_BYTES_MAX)?);
    files.push(one("validation", &table(&corpus::validation(&real, root.key("validation"))))?);

    for (tokens, rows) in [(256, 640), (512, 640)] {
        let rng = root.key("extension").key(tokens as u64);
        let documents = corpus::extension(&real, &mut pool, &tokenizer, rng, tokens, rows)?;
        files.push(one(&format!("extension-{tokens}"), &table(&documents))?);
        let rng = root.key("needle").key(tokens as u64);
        files.push(one(&format!("needle-{tokens}"), &passkeys::needle_table(&real, rng, tokens, 200))?);
    }
    let problems = chats::problems(root.key("sft"), 2400, false);
    files.push(one("sft-problems", &chats::prompt_table(&problems, true))?);
    files.push(one("teacher-traces", &chats::trace_table(&problems, root.key("teacher")))?);
    files.push(one("rl-prompts", &chats::prompt_table(&chats::problems(root.key("rl"), 512, false), false))?);
    files.push(one("heldout-problems", &chats::question_table(&chats::problems(root.key("evaluation"), 200, true)))?);
    files.push(one("gsm8k-choice", &chats::choice_table(&real, root.key("choice"), 150))?);
    Ok(files)
}

fn one(name: &str, table: &Table) -> Result<(String, Vec<u8>), IngestError> {
    Ok((format!("{name}.parquet"), table.to_parquet()?))
}

fn table(documents: &[Document]) -> Table {
    let texts = documents.iter().map(|document| document.text.clone()).collect();
    let sources = documents.iter().map(|document| document.source.to_owned()).collect();
    Table::new(vec![("text", Column::Text(texts)), ("source", Column::Text(sources))])
}

/// A text position at or before `at` that does not cut a character.
pub(crate) fn boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0)
}

pub(crate) fn choose<'a, T: ?Sized>(rng: &mut Rng, list: &[&'a T]) -> &'a T {
    list[rng.below(list.len() as u64) as usize]
}

#[cfg(test)]
mod tests;
