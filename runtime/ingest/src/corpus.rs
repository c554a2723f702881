//! The documents that stay: read, judged by the filter, freed of duplicates. Their texts lie in a spool; what is kept in
//! memory is where each one comes from.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashSet},
    path::PathBuf,
};

use dsv3_data::{Document, Location, Place, read_documents};
use dsv3_hooks::{Cause, FilterOutcome, HookError, Verdict};
use rayon::prelude::*;

use crate::{
    error::IngestError,
    filter::DocumentFilter,
    options::IngestOptions,
    pipeline::{Host, Result},
    report::IngestReport,
    spool::Spool,
};

/// Documents of a filter call.
const FILTER_BATCH: usize = 256;
/// Source of documents that name none.
const UNNAMED: &str = "unnamed";

/// Documents by their number.
pub(crate) struct Corpus {
    texts: Spool,
    kept: Vec<Kept>,
    sources: Names<String>,
    files: Names<PathBuf>,
}

/// What is remembered of a document besides its text.
struct Kept {
    source: u32,
    file: u32,
    place: Place,
}

/// Values by number, each once.
struct Names<T> {
    all: Vec<T>,
    numbers: BTreeMap<T, u32>,
}

impl<T: Ord + Clone> Names<T> {
    fn new() -> Self {
        Self { all: Vec::new(), numbers: BTreeMap::new() }
    }

    fn number(&mut self, value: &T) -> u32 {
        if let Some(number) = self.numbers.get(value) {
            return *number;
        }
        let number = self.all.len() as u32;
        self.all.push(value.clone());
        self.numbers.insert(value.clone(), number);
        number
    }
}

impl Corpus {
    /// Reads `inputs`.
    ///
    /// # Errors
    /// When a record cannot be used, the filter fails, the scratch folder refuses, or the caller cancels.
    pub(crate) fn read(
        options: &IngestOptions,
        inputs: &[PathBuf],
        filter: Option<&dyn DocumentFilter>,
        host: &Host<'_>,
        report: &mut IngestReport,
    ) -> Result<Self> {
        let texts = Spool::new(host.scratch, "texts");
        let mut corpus = Self { texts, kept: Vec::new(), sources: Names::new(), files: Names::new() };
        let mut seen = HashSet::new();
        let mut filter_batches = 0;
        for batch in read_documents(inputs, &options.columns) {
            host.check()?;
            let batch = batch?;
            report.documents_in += batch.len() as u64;
            report.bytes_in += batch.iter().map(|d| d.text.len() as u64).sum::<u64>();
            let verdicts = judge(&batch, filter_batches, filter, report)?;
            filter_batches += batch.len().div_ceil(FILTER_BATCH) as u64;
            for (mut document, verdict) in batch.into_iter().zip(verdicts) {
                match verdict {
                    Verdict::Keep => {}
                    Verdict::Rewrite(text) => {
                        report.rewritten += 1;
                        document.text = text;
                    }
                    Verdict::Drop(reason) => {
                        report.drop_document(&reason, || document.at.to_string());
                        continue;
                    }
                }
                let reason = if document.text.trim().is_empty() {
                    Some("empty")
                } else if options.dedup && !seen.insert(*blake3::hash(document.text.as_bytes()).as_bytes()) {
                    Some("duplicate")
                } else {
                    None
                };
                match reason {
                    Some(reason) => report.drop_document(reason, || document.at.to_string()),
                    None => corpus.push(document, report)?,
                }
            }
            (host.progress)("read", report.documents_in, None);
        }
        corpus.texts.seal()?;
        Ok(corpus)
    }

    fn push(&mut self, document: Document, report: &mut IngestReport) -> Result<()> {
        report.documents_out += 1;
        report.bytes_out += document.text.len() as u64;
        let source = self.sources.number(&document.source.unwrap_or_else(|| UNNAMED.to_owned()));
        let file = self.files.number(&document.at.path);
        self.kept.push(Kept { source, file, place: document.at.place });
        self.texts.push(document.text.into_bytes())
    }

    /// Number of documents.
    pub(crate) fn len(&self) -> usize {
        self.kept.len()
    }

    /// Bytes of the text of document `index`.
    pub(crate) fn bytes(&self, index: usize) -> u64 {
        self.texts.bytes(index)
    }

    /// Text of document `index`.
    ///
    /// # Errors
    /// When the scratch folder refuses.
    pub(crate) fn text(&self, index: usize) -> Result<Cow<'_, str>> {
        Ok(match self.texts.get(index)? {
            Cow::Borrowed(bytes) => String::from_utf8_lossy(bytes),
            Cow::Owned(bytes) => Cow::Owned(
                String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()),
            ),
        })
    }

    /// Where document `index` says it comes from.
    pub(crate) fn source(&self, index: usize) -> &str {
        &self.sources.all[self.kept[index].source as usize]
    }

    /// Where document `index` stands.
    pub(crate) fn at(&self, index: usize) -> Location {
        let kept = &self.kept[index];
        Location { path: self.files.all[kept.file as usize].clone(), place: kept.place }
    }

    /// Gives the texts up.
    pub(crate) fn drop_texts(&mut self) {
        self.texts = Spool::new(None, "");
    }
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
