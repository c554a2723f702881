//! The steps of an ingest in their order. Each is a function of what came before it, so each can be read alone.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use dsv3_core::{Cancel, Rng, mix64};
use dsv3_data::{PIECE_BYTES, ShardSink, Specials, TokenMeta, TokenWriter, Tokenizer, TrainOptions};
use rayon::prelude::*;

use crate::{
    corpus::Corpus,
    error::IngestError,
    filter::DocumentFilter,
    fim::{FimTokens, fim_psm},
    options::IngestOptions,
    report::IngestReport,
    spool::Spool,
};

pub(crate) type Result<T> = std::result::Result<T, IngestError>;

/// What an ingest is handed besides data: who hears of its progress, and who may stop it.
pub struct Host<'a> {
    /// Called with a step's name, what is done of it and, if known, its whole.
    pub progress: &'a dyn Fn(&'static str, u64, Option<u64>),
    /// Checked between batches, and every few MB inside a long document.
    pub cancel: &'a Cancel,
    /// Folder for what does not fit into memory (some 256 MB of text); nothing means that all is kept there.
    pub scratch: Option<&'a Path>,
}

impl Host<'_> {
    pub(crate) fn check(&self) -> Result<()> {
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

/// Documents tokenised between two looks at the cancel flag ...
const ENCODE_BATCH: usize = 4096;
/// ... or fewer, where they have more bytes than this.
const ENCODE_BYTES: u64 = 64 << 20;
/// Tokens packed between two looks at it.
const PACK_TOKENS: usize = 1 << 20;

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
    let mut corpus = Corpus::read(options, inputs, filter, host, &mut report)?;
    if corpus.len() == 0 {
        return Err(IngestError::Empty { read: report.documents_in, dropped: report.dropped_text() });
    }
    report.tokenizer_trained = tokenizer.is_none();
    let tokenizer = match tokenizer {
        Some(tokenizer) => tokenizer,
        None => {
            (host.progress)("train tokenizer", 0, None);
            train(options, &corpus, report.bytes_out, seed, host)?
        }
    };
    host.check()?;
    let encoded = encode(&corpus, &tokenizer, host)?;
    corpus.drop_texts();
    let meta = pack(options, &corpus, &encoded, &tokenizer, seed, host, &mut report, sink)?;
    report.tokens = meta.total_tokens;
    report.tokens_by_source = meta.source_tokens.clone();
    report.bytes_per_token = report.bytes_out as f64 / (report.tokens - report.padding_tokens).max(1) as f64;
    report.vocab_size = meta.vocab_size;
    Ok(Ingested { meta, tokenizer, report })
}

/// Trains the tokenizer of `options` on the corpus.
fn train(options: &IngestOptions, corpus: &Corpus, bytes: u64, seed: u64, host: &Host<'_>) -> Result<Tokenizer> {
    let failed = OnceLock::new();
    let cancel = host.cancel;
    let texts = (0..corpus.len()).map_while(|index| match corpus.text(index) {
        _ if cancel.is_cancelled() => None,
        Ok(text) => Some(text),
        Err(error) => {
            // Said below, whatever was made of the texts before.
            let _ = failed.set(error);
            None
        }
    });
    let trained = train_tokenizer(options, texts, bytes, seed);
    host.check()?;
    failed.into_inner().map_or(trained, Err)
}

/// Trains the tokenizer of `options` on texts of `total_bytes` in all, or on a sample of them keyed by `seed`. A long text
/// is sampled in pieces.
///
/// # Errors
/// When the options fit no tokenizer.
pub fn train_tokenizer<'a>(
    options: &IngestOptions,
    texts: impl Iterator<Item = Cow<'a, str>> + Send,
    total_bytes: u64,
    seed: u64,
) -> Result<Tokenizer> {
    let share = options.tokenizer_sample_bytes as f64 / total_bytes.max(1) as f64;
    let key = mix64(seed ^ 0x7060);
    let in_sample = move |key: u64| share >= 1.0 || (mix64(key) >> 11) as f64 / ((1u64 << 53) as f64) < share;
    let sample = texts.enumerate().flat_map(move |(index, text)| {
        let key = key ^ index as u64;
        if share < 1.0 && text.len() > PIECE_BYTES {
            let slices = slices(&text).into_iter().enumerate();
            let kept = slices.filter(|(piece, _)| in_sample(mix64(key).wrapping_add(*piece as u64)));
            return kept.map(|(_, slice)| Cow::Owned(slice.to_owned())).collect();
        }
        if in_sample(key) { vec![text] } else { Vec::new() }
    });
    let sample_bytes = total_bytes.min(options.tokenizer_sample_bytes);
    let wanted = options.vocabulary_texts.iter().filter(|text| !text.is_empty());
    let wanted = wanted.flat_map(move |text| {
        let times = sample_bytes / 1000 / text.len() as u64 + 1;
        std::iter::repeat_n(Cow::Borrowed(text.as_str()), times as usize)
    });
    let sample = sample.chain(wanted);
    let pattern = options.split_pattern.clone();
    let train = TrainOptions { pattern, ..TrainOptions::new(options.vocab_size) };
    Ok(Tokenizer::train(sample, &train)?)
}

/// `text` in slices of [`PIECE_BYTES`], wherever that may cut it.
fn slices(mut text: &str) -> Vec<&str> {
    let mut slices = Vec::new();
    while !text.is_empty() {
        let end = (PIECE_BYTES..).take(4).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
        let (slice, rest) = text.split_at(end);
        slices.push(slice);
        text = rest;
    }
    slices
}

/// Token ids of every document, four bytes each, least significant first.
fn encode(corpus: &Corpus, tokenizer: &Tokenizer, host: &Host<'_>) -> Result<Spool> {
    let mut all = Spool::new(host.scratch, "ids");
    while all.len() < corpus.len() {
        let first = all.len();
        let mut bytes = 0;
        let documents = (first..corpus.len()).take(ENCODE_BATCH).take_while(|index| {
            let room = bytes < ENCODE_BYTES;
            bytes += corpus.bytes(*index);
            room
        });
        let texts = documents.map(|index| corpus.text(index)).collect::<Result<Vec<_>>>()?;
        let fault =
            |document: usize| move |source| IngestError::Document { at: Box::new(corpus.at(first + document)), source };
        let mut pieces = Vec::new();
        for (document, text) in texts.iter().enumerate() {
            host.check()?;
            for piece in tokenizer.pieces(text) {
                pieces.push((document, piece.map_err(fault(document))?));
                if pieces.len() % 64 == 0 {
                    host.check()?;
                }
            }
        }
        let cancel = host.cancel;
        let encode = |(document, piece): &(usize, &str)| match cancel.is_cancelled() {
            true => Err(IngestError::Cancelled),
            false => tokenizer.encode(piece).map_err(fault(*document)),
        };
        let encoded: Vec<Result<Vec<u32>>> = pieces.par_iter().map(encode).collect();
        let mut joined = vec![Vec::new(); texts.len()];
        for ((document, _), ids) in pieces.iter().zip(encoded) {
            joined[*document].extend(ids?.into_iter().flat_map(u32::to_le_bytes));
        }
        joined.into_iter().try_for_each(|ids| all.push(ids))?;
        (host.progress)("tokenise", all.len() as u64, Some(corpus.len() as u64));
    }
    all.seal()?;
    Ok(all)
}

/// The ids that [`encode`] put away.
fn read_ids(encoded: &Spool, index: usize) -> Result<Vec<u32>> {
    let bytes = encoded.get(index)?;
    Ok(bytes.chunks_exact(4).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])).collect())
}

fn pack(
    options: &IngestOptions,
    corpus: &Corpus,
    encoded: &Spool,
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
    let aligned = |index: usize| {
        options.align.as_ref().is_some_and(|align| align.sources.iter().any(|s| s == corpus.source(index)))
    };
    let (alone, mut packed): (Vec<usize>, Vec<usize>) = (0..corpus.len()).partition(|index| aligned(*index));
    if options.shuffle {
        Rng::new(seed).key("document shuffle").shuffle(&mut packed);
    }
    let mut writer = TokenWriter::new(options.row_tokens, options.shard_tokens, tokenizer.vocab_size() as u64, sink)?;
    for (done, index) in packed.iter().enumerate() {
        let mut ids = read_ids(encoded, *index)?;
        let mut rng = Rng::new(seed).key("fim").key(*index);
        let source = corpus.source(*index);
        if let Some(marks) = fim
            && (options.fim.sources.is_empty() || options.fim.sources.iter().any(|s| s == source))
            && rng.uniform() < options.fim.rate
            && let Some(rearranged) = fim_psm(&ids, marks, &mut rng)
        {
            report.fim_documents += 1;
            ids = rearranged;
        }
        ids.push(eos);
        push(&mut writer, &ids, source, host)?;
        if done % ENCODE_BATCH == 0 {
            host.check()?;
            (host.progress)("pack", done as u64, Some(corpus.len() as u64));
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
            ids.append(&mut read_ids(encoded, *index)?);
            ids.push(eos);
            report.aligned_documents += 1;
            report.aligned_overlong += u64::from(ids.len() as u64 > align.tokens);
            push(&mut writer, &ids, corpus.source(*index), host)?;
            fill(&mut writer)?;
        }
        report.padding_tokens = filled;
    }
    Ok(writer.finish()?)
}

/// Writes a document, looking at the cancel flag on the way.
fn push(writer: &mut TokenWriter<'_>, ids: &[u32], source: &str, host: &Host<'_>) -> Result<()> {
    let (first, rest) = ids.split_at(ids.len().min(PACK_TOKENS));
    writer.push_document(first, source)?;
    for more in rest.chunks(PACK_TOKENS) {
        host.check()?;
        writer.extend_document(more, source)?;
    }
    Ok(())
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
