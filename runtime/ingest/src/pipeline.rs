//! The steps of an ingest in their order. Each is a function of what came before it, so each can be read alone.

use std::{collections::HashSet, path::PathBuf};

use dsv3_core::{Cancel, Rng, mix64};
use dsv3_data::{Document, ShardSink, Specials, TokenMeta, TokenWriter, Tokenizer, TrainOptions, read_documents};
use dsv3_hooks::{Cause, FilterOutcome, HookError, Verdict};
use rayon::prelude::*;

use crate::{
    error::IngestError,
    filter::DocumentFilter,
    fim::{FimTokens, fim_psm},
    options::IngestOptions,
    report::IngestReport,
};

type Result<T> = std::result::Result<T, IngestError>;

/// What an ingest is handed besides data: who hears of its progress, and who may stop it.
pub struct Host<'a> {
    /// Called with a step's name, what is done of it and, if known, its whole.
    pub progress: &'a dyn Fn(&'static str, u64, Option<u64>),
    /// Checked between batches.
    pub cancel: &'a Cancel,
}

impl Host<'_> {
    fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(IngestError::Cancelled) } else { Ok(()) }
    }
}

/// What an ingest made, besides the shards that went to the sink.
#[derive(Debug)]
pub struct Ingested {
    /// Facts of the stream, for its manifest.
    pub meta: TokenMeta,
    /// The tokenizer given or trained.
    pub tokenizer: Tokenizer,
    /// What was read, dropped and written.
    pub report: IngestReport,
}

/// Documents of a filter call.
const FILTER_BATCH: usize = 256;
/// Documents tokenised between two looks at the cancel flag.
const ENCODE_BATCH: usize = 4096;

/// A document that survived.
struct Kept {
    text: String,
    source: String,
}

/// Source of documents that name none.
const UNNAMED: &str = "unnamed";

/// Turns the documents of `inputs` (Parquet or JSONL) into a token stream whose shards go to `sink`.
///
/// # Errors
/// When a file is damaged or a record unusable (with its place), the filter fails, nothing is left, a shard cannot be
/// stored, or the caller cancels.
pub fn ingest(
    options: &IngestOptions,
    inputs: &[PathBuf],
    tokenizer: Option<Tokenizer>,
    filter: Option<&dyn DocumentFilter>,
    seed: u64,
    host: &Host<'_>,
    sink: &mut ShardSink<'_>,
) -> Result<Ingested> {
    if let Some((field, message)) = options.problems().into_iter().next() {
        return Err(IngestError::Options { message: format!("{field}: {message}") });
    }
    let mut report = IngestReport { files: inputs.len() as u64, ..IngestReport::default() };
    let documents = read(options, inputs, filter, host, &mut report)?;
    if documents.is_empty() {
        return Err(IngestError::Empty { read: report.documents_in, dropped: report.dropped_text() });
    }
    report.tokenizer_trained = tokenizer.is_none();
    let tokenizer = match tokenizer {
        Some(tokenizer) => tokenizer,
        None => {
            (host.progress)("train tokenizer", 0, None);
            train_tokenizer(options, documents.iter().map(|d| d.text.as_str()), report.bytes_out, seed)?
        }
    };
    host.check()?;
    let encoded = encode(&documents, &tokenizer, host)?;
    let meta = pack(options, &documents, encoded, &tokenizer, seed, host, &mut report, sink)?;
    report.tokens = meta.total_tokens;
    report.tokens_by_source = meta.source_tokens.clone();
    report.bytes_per_token = report.bytes_out as f64 / (report.tokens - report.padding_tokens).max(1) as f64;
    report.vocab_size = meta.vocab_size;
    Ok(Ingested { meta, tokenizer, report })
}

fn read(
    options: &IngestOptions,
    inputs: &[PathBuf],
    filter: Option<&dyn DocumentFilter>,
    host: &Host<'_>,
    report: &mut IngestReport,
) -> Result<Vec<Kept>> {
    let mut kept = Vec::new();
    let mut seen = HashSet::new();
    let mut filter_batches = 0;
    for batch in read_documents(inputs, &options.columns) {
        host.check()?;
        let batch = batch?;
        report.documents_in += batch.len() as u64;
        report.bytes_in += batch.iter().map(|d| d.text.len() as u64).sum::<u64>();
        let verdicts = judge(&batch, filter_batches, filter, report)?;
        filter_batches += batch.len().div_ceil(FILTER_BATCH) as u64;
        for (document, verdict) in batch.into_iter().zip(verdicts) {
            let text = match verdict {
                Verdict::Keep => document.text,
                Verdict::Rewrite(text) => {
                    report.rewritten += 1;
                    text
                }
                Verdict::Drop(reason) => {
                    report.drop_document(&reason, || document.at.to_string());
                    continue;
                }
            };
            let reason = if text.trim().is_empty() {
                Some("empty")
            } else if options.dedup && !seen.insert(*blake3::hash(text.as_bytes()).as_bytes()) {
                Some("duplicate")
            } else {
                None
            };
            if let Some(reason) = reason {
                report.drop_document(reason, || document.at.to_string());
                continue;
            }
            report.documents_out += 1;
            report.bytes_out += text.len() as u64;
            kept.push(Kept { text, source: document.source.unwrap_or_else(|| UNNAMED.to_owned()) });
        }
        (host.progress)("read", report.documents_in, None);
    }
    Ok(kept)
}

/// Asks the filter about `batch`, whose first filter batch has number `first_batch`.
fn judge(
    batch: &[Document],
    first_batch: u64,
    filter: Option<&dyn DocumentFilter>,
    report: &mut IngestReport,
) -> Result<Vec<Verdict>> {
    let Some(filter) = filter else { return Ok(vec![Verdict::Keep; batch.len()]) };
    let judged: Vec<Result<FilterOutcome>> = batch
        .par_chunks(FILTER_BATCH)
        .enumerate()
        .map(|(index, documents)| {
            let texts: Vec<&str> = documents.iter().map(|d| d.text.as_str()).collect();
            let number = first_batch + index as u64;
            let fault = |error: HookError| {
                let at = documents[error.item.unwrap_or(0).min(documents.len() - 1)].at.clone();
                IngestError::Filter { at: Box::new(at), source: Box::new(error) }
            };
            let outcome = filter.filter(number, &texts).map_err(fault)?;
            if outcome.verdicts.len() != texts.len() {
                let message = format!("{} verdicts for {} documents", outcome.verdicts.len(), texts.len());
                let cause = Cause::Malformed(message);
                return Err(fault(HookError { hook: "filter".to_owned(), batch: Some(number), item: None, cause }));
            }
            Ok(outcome)
        })
        .collect();
    let mut all = Vec::with_capacity(batch.len());
    for outcome in judged {
        let outcome = outcome?;
        all.extend(outcome.verdicts);
        report.note_faults(&outcome.faults);
    }
    Ok(all)
}

/// Trains the tokenizer of `options` on texts of `total_bytes` in all, or on a sample of them keyed by `seed`.
///
/// # Errors
/// When the options fit no tokenizer.
pub fn train_tokenizer<'a>(
    options: &IngestOptions,
    texts: impl Iterator<Item = &'a str> + Send,
    total_bytes: u64,
    seed: u64,
) -> Result<Tokenizer> {
    let share = options.tokenizer_sample_bytes as f64 / total_bytes.max(1) as f64;
    let key = mix64(seed ^ 0x7060);
    let in_sample =
        move |index: usize| share >= 1.0 || (mix64(key ^ index as u64) >> 11) as f64 / ((1u64 << 53) as f64) < share;
    let sample = texts.enumerate().filter(move |(index, _)| in_sample(*index)).map(|(_, text)| text);
    let sample_bytes = total_bytes.min(options.tokenizer_sample_bytes);
    let wanted = options.vocabulary_texts.iter().filter(|text| !text.is_empty());
    let wanted = wanted.flat_map(move |text| {
        let times = sample_bytes / 1000 / text.len() as u64 + 1;
        std::iter::repeat_n(text.as_str(), times as usize)
    });
    let sample = sample.chain(wanted);
    let pattern = options.split_pattern.clone();
    let train = TrainOptions { pattern, ..TrainOptions::new(options.vocab_size) };
    Ok(Tokenizer::train(sample, &train)?)
}

fn encode(documents: &[Kept], tokenizer: &Tokenizer, host: &Host<'_>) -> Result<Vec<Vec<u32>>> {
    let mut all = Vec::with_capacity(documents.len());
    for batch in documents.chunks(ENCODE_BATCH) {
        host.check()?;
        let ids: Vec<dsv3_data::Result<Vec<u32>>> = batch.par_iter().map(|d| tokenizer.encode(&d.text)).collect();
        for one in ids {
            all.push(one?);
        }
        (host.progress)("tokenise", all.len() as u64, Some(documents.len() as u64));
    }
    Ok(all)
}

fn pack(
    options: &IngestOptions,
    documents: &[Kept],
    mut encoded: Vec<Vec<u32>>,
    tokenizer: &Tokenizer,
    seed: u64,
    host: &Host<'_>,
    report: &mut IngestReport,
    sink: &mut ShardSink<'_>,
) -> Result<TokenMeta> {
    let specials = tokenizer.specials();
    let eos = specials.eos.ok_or_else(|| IngestError::Options {
        message: "the tokenizer has no end-of-text token: name one in its tokenizer_config.json".to_owned(),
    })?;
    let fim = fim_marks(options, specials)?;
    let aligned =
        |index: usize| options.align.as_ref().is_some_and(|align| align.sources.contains(&documents[index].source));
    let (alone, mut packed): (Vec<usize>, Vec<usize>) = (0..documents.len()).partition(|index| aligned(*index));
    if options.shuffle {
        Rng::new(seed).key("document shuffle").shuffle(&mut packed);
    }
    let mut writer = TokenWriter::new(options.row_tokens, options.shard_tokens, tokenizer.vocab_size() as u64, sink)?;
    for (done, index) in packed.iter().enumerate() {
        let mut ids = std::mem::take(&mut encoded[*index]);
        let mut rng = Rng::new(seed).key("fim").key(*index);
        let source = &documents[*index].source;
        if let Some(marks) = fim
            && (options.fim.sources.is_empty() || options.fim.sources.contains(source))
            && rng.uniform() < options.fim.rate
            && let Some(rearranged) = fim_psm(&ids, marks, &mut rng)
        {
            report.fim_documents += 1;
            ids = rearranged;
        }
        ids.push(eos);
        writer.push_document(&ids, source)?;
        if done % ENCODE_BATCH == 0 {
            host.check()?;
            (host.progress)("pack", done as u64, Some(documents.len() as u64));
        }
    }
    if let Some(align) = options.align.as_ref().filter(|_| !alone.is_empty()) {
        let pad = specials.pad.or(specials.eos).unwrap_or(eos);
        let mut filled = 0;
        let mut fill = |writer: &mut TokenWriter<'_>| -> Result<()> {
            let before = writer.total_tokens();
            writer.pad_to_multiple(align.tokens, pad)?;
            filled += writer.total_tokens() - before;
            Ok(())
        };
        fill(&mut writer)?;
        for index in &alone {
            let mut ids: Vec<u32> = specials.bos.into_iter().collect();
            ids.append(&mut encoded[*index]);
            ids.push(eos);
            report.aligned_documents += 1;
            report.aligned_overlong += u64::from(ids.len() as u64 > align.tokens);
            writer.push_document(&ids, &documents[*index].source)?;
            fill(&mut writer)?;
        }
        report.padding_tokens = filled;
    }
    Ok(writer.finish()?)
}

fn fim_marks(options: &IngestOptions, specials: &Specials) -> Result<Option<FimTokens>> {
    if options.fim.rate <= 0.0 {
        return Ok(None);
    }
    match FimTokens::of(specials) {
        Some(marks) => Ok(Some(marks)),
        None => Err(IngestError::Options {
            message: "fim.rate: the tokenizer has no fill-in-the-middle tokens; set the rate to 0".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests;
