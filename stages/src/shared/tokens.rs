//! Token artifacts, opened.

use std::path::PathBuf;

use dsv3_core::{Artifact, Error, kinds::Tokens};
use dsv3_data::{TokenDataset, TokenMeta};
use dsv3_model::Model;
use dsv3_stage::Ctx;
use dsv3_train::{
    MicroBatch, Request, Source, StepData, StepReport, Supervised, Trainer, WindowSource, Work, micro_batches,
    schedule::Horizon,
};

/// Name of the metric that counts rows.
pub(crate) const ROWS_READ: &str = "rows_read";

/// Opens the stream behind `artifact`.
pub(crate) fn open(ctx: &Ctx, artifact: &Artifact<Tokens>) -> Result<(TokenDataset, TokenMeta), Error> {
    let manifest = ctx.manifest(artifact)?;
    let meta: TokenMeta = serde_json::from_value(manifest.meta)
        .map_err(|source| Error::data("the manifest of the tokens lacks their counts").source(source))?;
    let shards = ctx.local_files(artifact)?.into_iter().filter(|(file, _)| file.path.ends_with(".parquet"));
    let paths: Vec<PathBuf> = shards.map(|(_, path)| path).collect();
    Ok((TokenDataset::open(&paths, &meta)?, meta))
}

/// Refuses a stream made with another vocabulary than the model's.
pub(crate) fn check_vocabulary(meta: &TokenMeta, vocab_size: usize) -> Result<(), Error> {
    if meta.vocab_size <= vocab_size as u64 {
        return Ok(());
    }
    let found = meta.vocab_size;
    Err(Error::data(format!("the tokens come from a vocabulary of {found}, the model has {vocab_size}"))
        .help("ingest the text with the model's tokenizer"))
}

/// A training source that validates on a stream of its own, read whole in windows of `sequence_tokens`.
pub(crate) struct Validated<'a> {
    train: WindowSource<'a>,
    validation: Option<(TokenDataset, TokenMeta)>,
    sequence_tokens: usize,
}

impl<'a> Validated<'a> {
    /// `train`, validated on `validation` or, without it, on the windows its loader holds out.
    ///
    /// # Errors
    /// When the validation stream is shorter than one window.
    pub(crate) fn new(
        train: WindowSource<'a>,
        validation: Option<(TokenDataset, TokenMeta)>,
        sequence_tokens: usize,
    ) -> Result<Self, Error> {
        if let Some((stream, _)) = &validation
            && stream.total_tokens() <= sequence_tokens as u64
        {
            let found = stream.total_tokens();
            return Err(Error::data(format!(
                "the validation stream has {found} tokens, one window takes {}",
                sequence_tokens + 1
            )));
        }
        Ok(Self { train, validation, sequence_tokens })
    }
}

impl Source for Validated<'_> {
    fn next(&mut self, request: Request<'_>) -> Result<Option<StepData>, Error> {
        self.train.next(request)
    }

    fn validation(&mut self) -> Result<Vec<MicroBatch>, Error> {
        let Some((stream, meta)) = &self.validation else { return self.train.validation() };
        let length = self.sequence_tokens as u64;
        let windows = (stream.total_tokens() - 1) / length;
        let rows = (0..windows).map(|i| Ok(stream.read(i * length..(i + 1) * length + 1)?));
        let rows = rows.collect::<Result<Vec<_>, Error>>()?;
        Ok(micro_batches(&rows, self.train.micro_batch_tokens, meta.pad_token_id))
    }
}

/// Supervised training that reports `rows_read` after every step: rows of the stream that the steps up to it have
/// touched, those of a resumed run's earlier attempts up to the checkpoint included, those that a rewind undid not.
pub(crate) struct CountingRows<'a, S> {
    work: Supervised<S>,
    stream: &'a TokenDataset,
}

impl<'a, S: Source> CountingRows<'a, S> {
    /// `work` on windows of `stream`.
    pub(crate) fn new(work: Supervised<S>, stream: &'a TokenDataset) -> Self {
        Self { work, stream }
    }
}

impl<S: Source> Work for CountingRows<'_, S> {
    fn step(&mut self, trainer: &mut Trainer, horizon: Horizon) -> dsv3_train::Result<Option<StepReport>> {
        let before = self.stream.rows_read();
        let earlier = trainer.state.figures.get(ROWS_READ).map_or(0.0, |figure| figure.last);
        let Some(mut report) = self.work.step(trainer, horizon)? else { return Ok(None) };
        let rows = (self.stream.rows_read() - before) as f64;
        report.metrics.push((ROWS_READ.to_owned(), earlier + rows));
        Ok(Some(report))
    }

    fn validate(&mut self, model: &Model) -> dsv3_train::Result<Vec<(String, f64)>> {
        self.work.validate(model)
    }
}
