//! The training form: a packed batch through embedding, layers, final norm, head, and prediction modules.
//!
//! The parts are segments a pipeline schedule can place apart: embed, layer i, head, module k. Losses are left to the
//! caller, who seeds the backward pass with the gradients of what [`TrainOut`] holds.

use std::sync::Arc;

use dsv3_ops::{Spans, Tape, Tensor, Var, balance_loss, embedding, gather_rows, rms_norm, token_logprob};

use crate::context::Context;
use crate::moe::Routing;
use crate::mtp::{MtpOut, Shifted};
use crate::recompute::{self, Weights};
use crate::{Batch, Error, Model};

/// What a training pass computes besides the main log-probabilities.
#[derive(Clone, Copy, Debug)]
pub struct TrainOptions {
    /// Run the prediction modules.
    pub mtp: bool,
    /// Compute the balance loss of every layer with experts that runs.
    pub balance: bool,
    /// Compute the entropy of every main distribution.
    pub entropy: bool,
    /// Keep layer inputs only and run layers again in the backward pass.
    pub recompute: bool,
    /// Keep hidden states and choices for inspection.
    pub observe: bool,
    /// Rows whose logits are made at one time.
    pub logit_rows: usize,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self { mtp: true, balance: true, entropy: false, recompute: false, observe: false, logit_rows: 256 }
    }
}

/// What a training pass gives. Gradients start from `logp`, `mtp[..].logp` and `balance`.
#[derive(Clone, Debug)]
pub struct TrainOut {
    /// After `model.norm`, `[T, d]`.
    pub hidden: Var,
    /// Log-probability of each position's target, `[T]`; 0 where there is none.
    pub logp: Var,
    /// Entropy of each position's distribution, `[T]`, when asked for.
    pub entropy: Option<Tensor>,
    /// One per depth that has any row.
    pub mtp: Vec<MtpOut>,
    /// Balance loss `[1]` without its factor α, by layer.
    pub balance: Vec<(usize, Var)>,
    /// Tokens sent to every expert, by layer.
    pub loads: Vec<(usize, Vec<u64>)>,
    /// When asked for.
    pub observed: Option<Observed>,
}

/// Intermediate values, for tests and diagnosis.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Input of every main layer, then the output of `model.norm`; `[T, d]` each.
    pub hidden: Vec<Tensor>,
    /// Experts of every token, `[rows, top_k]`, by layer.
    pub choices: Vec<(usize, Tensor)>,
}

/// What a pass gathers from the layers it runs.
struct Pass<'a> {
    model: &'a Model,
    options: TrainOptions,
    /// Present when layers are recomputed.
    shared: Option<Weights>,
    balance: Vec<(usize, Var)>,
    loads: Vec<(usize, Vec<u64>)>,
    observed: Observed,
}

impl Model {
    /// Runs `batch` and records it on `tape`.
    ///
    /// # Errors
    /// When a token or a length does not suit the model.
    pub fn forward_train(&self, tape: &mut Tape, batch: &Batch, options: TrainOptions) -> Result<TrainOut, Error> {
        batch.check(&self.config)?;
        let shared = (options.recompute && tape.is_recording())
            .then(|| Weights { params: self.params.clone().into(), biases: self.biases.clone().into() });
        let mut pass = Pass {
            model: self,
            options,
            shared,
            balance: Vec::new(),
            loads: Vec::new(),
            observed: Observed::default(),
        };
        let ctx = Context::new(&self.shape, batch.spans.clone());
        let mut x = self.embed(tape, &batch.ids);
        for block in &self.graph().blocks {
            pass.observe(&x);
            x = pass.block(tape, block, &x, &ctx);
        }
        let hidden = self.final_norm(tape, &x);
        pass.observe(&hidden);
        let (logp, entropy) = self.head(tape, &hidden, &batch.targets, options);
        let mtp = if options.mtp { pass.mtp(tape, batch, &hidden) } else { Vec::new() };
        let observed = options.observe.then_some(pass.observed);
        Ok(TrainOut { hidden, logp, entropy, mtp, balance: pass.balance, loads: pass.loads, observed })
    }

    /// First segment: token embeddings, `[T, d]`.
    pub(crate) fn embed(&self, tape: &mut Tape, ids: &[u32]) -> Var {
        embedding::on_tape(tape, ids, &self.params[self.graph().embedding as usize])
    }

    /// `model.norm`.
    pub(crate) fn final_norm(&self, tape: &mut Tape, x: &Var) -> Var {
        rms_norm::on_tape(tape, x, &self.params[self.graph().norm as usize], self.shape.eps)
    }

    /// Last segment: log-probabilities of `targets`, the logits of `options.logit_rows` rows at a time.
    fn head(
        &self,
        tape: &mut Tape,
        hidden: &Var,
        targets: &Arc<[u32]>,
        options: TrainOptions,
    ) -> (Var, Option<Tensor>) {
        let head = &self.params[self.graph().head as usize];
        let options = token_logprob::Options { chunk_rows: options.logit_rows, want_entropy: options.entropy };
        token_logprob::on_tape(tape, hidden, head, targets, options)
    }
}

impl Pass<'_> {
    fn observe(&mut self, x: &Var) {
        if self.options.observe {
            self.observed.hidden.push(x.value.clone());
        }
    }

    /// One layer, and what it says of its experts.
    fn block(&mut self, tape: &mut Tape, block: &crate::block::Block, x: &Var, ctx: &Context) -> Var {
        let (y, routing) = match &self.shared {
            Some(weights) => recompute::forward(tape, block, weights, x, ctx),
            None => block.forward(tape, &self.model.params, &self.model.biases, x, ctx),
        };
        if let Some(Routing { scores, chosen, loads }) = routing {
            if self.options.balance {
                let loss = balance_loss::on_tape(tape, &scores, &ctx.spans, ctx.shape.router.top_k);
                self.balance.push((block.layer, loss));
            }
            if self.options.observe {
                self.observed.choices.push((block.layer, chosen));
            }
            self.loads.push((block.layer, loads));
        }
        y
    }

    /// Every prediction module on the output of the one before it.
    fn mtp(&mut self, tape: &mut Tape, batch: &Batch, hidden: &Var) -> Vec<MtpOut> {
        let model = self.model;
        let mut out: Vec<MtpOut> = Vec::new();
        let mut previous = hidden.clone();
        let mut spans: Spans = batch.spans.clone();
        let mut rows: Vec<u32> = (0..batch.ids.len() as u32).collect();
        for (index, module) in model.graph().mtp.iter().enumerate() {
            let depth = index + 1;
            let shifted = Shifted::of(&spans);
            if shifted.sources.is_empty() {
                break;
            }
            rows = shifted.sources.iter().map(|source| rows[*source as usize]).collect();
            let ahead = |list: &[u32]| -> Vec<u32> { rows.iter().map(|row| list[*row as usize + depth]).collect() };
            let targets: Arc<[u32]> = ahead(&batch.targets).into();
            let before = gather_rows::on_tape(tape, &previous, &shifted.sources);
            let embedded = model.embed(tape, &ahead(&batch.ids));
            let x = module.combine(tape, &model.params, &embedded, &before, model.shape.eps);
            spans = shifted.spans;
            let x = self.block(tape, &module.block, &x, &Context::new(&model.shape, spans.clone()));
            let hidden = rms_norm::on_tape(tape, &x, &model.params[module.norm as usize], model.shape.eps);
            let plain = TrainOptions { entropy: false, ..self.options };
            let (logp, _) = model.head(tape, &hidden, &targets, plain);
            previous = hidden.clone();
            out.push(MtpOut { depth, hidden, logp, rows: rows.clone(), targets });
        }
        out
    }
}

#[cfg(test)]
mod tests;
