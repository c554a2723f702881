//! Supervised training as [`Work`]: a data source gives the sequences of a step, the schedules say how to learn from them.
//!
//! Pretraining, context extension and SFT are this with different sources.

use std::ops::Range;

use dsv3_core::Error as CoreError;
use dsv3_data::{Loader, TokenDataset};
use dsv3_model::{Batch, Model};

use crate::{
    error::{Error, Result},
    loss::{Losses, MicroBatch},
    plan::Schedules,
    router_bias,
    run::{StepReport, Work},
    schedule::{Horizon, Position},
    trainer::{Rates, StepMetrics, Trainer},
};

/// What a source is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Position in the loading order to start from.
    pub cursor: u64,
    /// Sequences wanted.
    pub sequences: usize,
    /// Positions to leave out.
    pub excluded: &'a [Range<u64>],
}

/// The data of one step.
#[derive(Clone, Debug)]
pub struct StepData {
    /// At least one.
    pub micro_batches: Vec<MicroBatch>,
    /// Position in the loading order after it.
    pub cursor: u64,
}

/// Sequences in a loading order that a cursor resumes.
pub trait Source {
    /// The sequences after `request.cursor`; `None` when there are no more.
    ///
    /// # Errors
    /// When data cannot be read.
    fn next(&mut self, request: Request<'_>) -> Result<Option<StepData>, CoreError>;

    /// Sequences to validate on; none by default.
    ///
    /// # Errors
    /// When data cannot be read.
    fn validation(&mut self) -> Result<Vec<MicroBatch>, CoreError> {
        Ok(Vec::new())
    }
}

/// [`Work`] over a [`Source`].
pub struct Supervised<S> {
    /// Where sequences come from.
    pub source: S,
    /// Learning rate, batch size, λ and γ over the run.
    pub schedules: Schedules,
    /// More figures of the model, taken with each validation.
    pub probe: Option<Probe>,
    validation: Option<Vec<MicroBatch>>,
}

/// Figures of a model.
pub type Probe = Box<dyn FnMut(&Model) -> Result<Vec<(String, f64)>, CoreError>>;

impl<S: Source> Supervised<S> {
    /// Work over `source`.
    pub fn new(source: S, schedules: Schedules) -> Self {
        Self { source, schedules, probe: None, validation: None }
    }
}

impl<S: Source> Work for Supervised<S> {
    fn step(&mut self, trainer: &mut Trainer, horizon: Horizon) -> Result<Option<StepReport>> {
        let state = &trainer.state;
        let step = state.step + 1;
        let sequences = self.schedules.batch.at(state.step, state.tokens, horizon) as usize;
        let excluded = state.guard.excluded();
        let request = Request { cursor: state.cursor, sequences, excluded: &excluded };
        let data = self.source.next(request).map_err(|source| Error::Source { step, source })?;
        let Some(data) = data else { return Ok(None) };
        let tokens: u64 = data.micro_batches.iter().map(|micro| micro.batch.tokens() as u64).sum();
        let at = Position { step, tokens: state.tokens, tokens_after: state.tokens + tokens };
        let rates = Rates {
            lr: self.schedules.lr.at(at, horizon),
            mtp_weight: self.schedules.mtp_weight.at(at, horizon),
            bias_speed: self.schedules.bias_speed.at(at, horizon),
        };
        let metrics = trainer.train_step(&data.micro_batches, rates)?;
        let sequences = data.micro_batches.iter().map(MicroBatch::sequences).sum::<usize>();
        let mut list = step_metrics(&metrics, trainer);
        list.push(("sequences".to_owned(), sequences as f64));
        list.push(("mtp_weight".to_owned(), rates.mtp_weight));
        list.push(("bias_speed".to_owned(), rates.bias_speed));
        Ok(Some(StepReport {
            loss: metrics.losses.main,
            skipped: u32::from(!metrics.update.applied),
            updates: 1,
            tokens,
            cursor: data.cursor,
            metrics: list,
        }))
    }

    fn validate(&mut self, model: &Model) -> Result<Vec<(String, f64)>> {
        let located = |source| Error::Source { step: 0, source };
        if self.validation.is_none() {
            self.validation = Some(self.source.validation().map_err(located)?);
        }
        let mut figures = Vec::new();
        if let Some(micro_batches) = self.validation.as_ref().filter(|list| !list.is_empty()) {
            let Losses { main, mtp, .. } = Trainer::evaluate(model, micro_batches)?;
            figures.push(("val_loss".to_owned(), main));
            figures.extend(mtp.iter().enumerate().map(|(k, loss)| (format!("val_loss_mtp_{}", k + 1), *loss)));
        }
        if let Some(probe) = &mut self.probe {
            figures.extend(probe(model).map_err(located)?);
        }
        Ok(figures)
    }
}

/// The metrics of a supervised step under stable names. `load_max_mean` is the worst main layer.
pub fn step_metrics(metrics: &StepMetrics, trainer: &Trainer) -> Vec<(String, f64)> {
    let mut list = vec![
        ("loss".to_owned(), metrics.losses.main),
        ("loss_total".to_owned(), metrics.total),
        ("loss_balance".to_owned(), metrics.losses.balance),
        ("lr".to_owned(), metrics.lr),
        ("grad_norm".to_owned(), metrics.update.grad_norm),
    ];
    if metrics.losses.mtp.iter().any(|loss| *loss != 0.0) {
        let depths = metrics.losses.mtp.iter().enumerate();
        list.extend(depths.map(|(k, loss)| (format!("loss_mtp_{}", k + 1), *loss)));
    }
    let main_layers = trainer.model.config.num_hidden_layers;
    let loads = metrics.loads.iter().map(|(layer, loads)| (*layer, router_bias::imbalance(loads)));
    let loads: Vec<(usize, f64)> = loads.collect();
    let worst = loads.iter().filter(|(layer, _)| *layer < main_layers).map(|(_, load)| *load).fold(0.0, f64::max);
    list.push(("load_max_mean".to_owned(), worst));
    list.extend(loads.iter().map(|(layer, load)| (format!("load_max_mean.{layer}"), *load)));
    for (info, bias) in trainer.model.bias_infos().iter().zip(trainer.model.biases()) {
        let (low, high) = bias.iter().fold((f32::MAX, f32::MIN), |(low, high), b| (low.min(*b), high.max(*b)));
        list.push((format!("router_bias_min.{}", info.layer), f64::from(low)));
        list.push((format!("router_bias_max.{}", info.layer), f64::from(high)));
    }
    list
}

/// Splits rows of tokens into micro-batches of at most `tokens` inputs (or one row). `pad` is never a target.
pub fn micro_batches(rows: &[Vec<u32>], tokens: usize, pad: Option<u32>) -> Vec<MicroBatch> {
    let mut batches = Vec::new();
    let (mut start, mut held) = (0, 0);
    for (i, row) in rows.iter().enumerate() {
        let inputs = row.len().saturating_sub(1);
        if held > 0 && held + inputs > tokens {
            batches.push(micro_batch(&rows[start..i], pad));
            (start, held) = (i, 0);
        }
        held += inputs;
    }
    if start < rows.len() {
        batches.push(micro_batch(&rows[start..], pad));
    }
    batches
}

fn micro_batch(rows: &[Vec<u32>], pad: Option<u32>) -> MicroBatch {
    let mut batch = Batch::from_rows(rows);
    if let Some(pad) = pad {
        batch.targets = batch.targets.iter().map(|t| if *t == pad { Batch::NO_TARGET } else { *t }).collect();
    }
    batch.into()
}

/// Windows of a token stream, in the order of a [`Loader`]; its held-out windows validate.
pub struct WindowSource<'a> {
    /// The stream.
    pub tokens: &'a TokenDataset,
    /// Order and length of the windows.
    pub loader: Loader,
    /// Cursor at which the data ends.
    pub end: u64,
    /// Largest number of tokens of a forward pass, unless one window is longer.
    pub micro_batch_tokens: usize,
    /// Id that fills the space after aligned documents, which is never a target.
    pub pad: Option<u32>,
}

impl WindowSource<'_> {
    fn rows(&self, windows: &[Range<u64>]) -> Result<Vec<Vec<u32>>, CoreError> {
        windows.iter().map(|window| Ok(self.tokens.read(window.clone())?)).collect()
    }
}

impl Source for WindowSource<'_> {
    fn next(&mut self, request: Request<'_>) -> Result<Option<StepData>, CoreError> {
        let Request { cursor, sequences, excluded } = request;
        let (positions, cursor) = crate::guard::next_positions(cursor, sequences, self.end, excluded);
        if positions.is_empty() {
            return Ok(None);
        }
        let windows: Vec<Range<u64>> = positions.iter().map(|position| self.loader.window(*position)).collect();
        let micro_batches = micro_batches(&self.rows(&windows)?, self.micro_batch_tokens, self.pad);
        Ok(Some(StepData { micro_batches, cursor }))
    }

    fn validation(&mut self) -> Result<Vec<MicroBatch>, CoreError> {
        let rows = self.rows(&self.loader.holdout_windows())?;
        Ok(micro_batches(&rows, self.micro_batch_tokens, self.pad))
    }
}
