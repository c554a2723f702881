//! The work that `bench` measures, step by step, on the paths that stages and the server take: `Trainer::train_step`, and
//! the scheduler over the latent cache.

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use dsv3_core::{Error, Rng};
use dsv3_estimate::Named;
use dsv3_infer::{Options, Request, Scheduler};
use dsv3_model::{Batch, LatentCache, Model, ModelConfig, PAGE_TOKENS, weight_names::Role};
use dsv3_ops::Precision;
use dsv3_train::{MicroBatch, Rates, Trainer, TrainerConfig};

use super::ceiling::Reader;

/// Of weights and tokens.
const SEED: u64 = 1;
/// Rows whose logits are made at one time in training, as in the recipes.
const LOGIT_ROWS: usize = 1024;
/// Prompt tokens of one pass.
const PREFILL_TOKENS: usize = 2048;

/// What `perf` may take to follow a command.
const PERF_DELAY: Duration = Duration::from_millis(50);

/// How a piece of work is measured.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) precision: Precision,
    pub(super) batch: usize,
    pub(super) context: usize,
    pub(super) steps: usize,
    pub(super) warmup: usize,
    /// Where `perf record --control` listens.
    pub(super) perf_control: Option<PathBuf>,
}

/// What was measured.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) tokens_per_step: usize,
    /// Of each measured step, in order; at least one.
    pub(super) seconds: Vec<f64>,
    /// Least that a step of decoding reads.
    pub(super) bytes_per_step: Option<f64>,
    /// GB/s of a large read after each measured step of decoding, in order.
    pub(super) reads: Vec<f64>,
}

/// Middle of some figures; of an even number the mean of the middle two, of none not a number.
pub(super) fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.get(sorted.len().saturating_sub(1) / 2).zip(sorted.get(sorted.len() / 2));
    middle.map_or(f64::NAN, |(low, high)| (low + high) / 2.0)
}

impl Measured {
    /// Middle of the steps' times.
    pub(super) fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// Shortest of the steps' times.
    pub(super) fn least(&self) -> f64 {
        self.seconds.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

/// Tells a listening `perf` to `enable` or `disable` its counters.
fn perf(setup: &Setup, command: &str) -> Result<(), Error> {
    let Some(path) = &setup.perf_control else { return Ok(()) };
    let told = std::fs::write(path, format!("{command}\n"));
    told.map_err(|error| Error::invalid(format!("perf does not listen at {}: {error}", path.display())))?;
    thread::sleep(PERF_DELAY);
    Ok(())
}

/// Times `steps` calls after `warmup` ones. `step` gives the seconds it wants counted.
fn repeat(setup: &Setup, mut step: impl FnMut() -> Result<f64, Error>) -> Result<Vec<f64>, Error> {
    for _ in 0..setup.warmup {
        step()?;
    }
    perf(setup, "enable")?;
    let seconds = (0..setup.steps).map(|_| step()).collect();
    perf(setup, "disable")?;
    seconds
}

fn tokens(rng: &mut Rng, config: &ModelConfig, count: usize) -> Vec<u32> {
    (0..count).map(|_| rng.below(config.vocab_size as u64) as u32).collect()
}

/// The sizes with room for this many positions.
fn config_for(named: &Named, positions: usize) -> ModelConfig {
    let max_position_embeddings = named.config.max_position_embeddings.max(positions);
    ModelConfig { max_position_embeddings, ..named.config.clone() }
}

/// Whole optimiser steps on new random tokens.
pub(super) fn train(named: &Named, setup: &Setup) -> Result<Measured, Error> {
    let config = config_for(named, setup.context);
    let model = Model::init(&config, setup.precision, SEED)?;
    let settings =
        TrainerConfig { balance_alpha: named.balance_alpha, logit_rows: LOGIT_ROWS, ..TrainerConfig::default() };
    let mut trainer = Trainer::new(model, settings)?;
    let mtp_weight = if config.num_nextn_predict_layers > 0 { 0.3 } else { 0.0 };
    let rates = Rates { lr: 3e-4, mtp_weight, bias_speed: 0.001 };
    let mut rng = Rng::new(SEED);
    let seconds = repeat(setup, || {
        let rows = (0..setup.batch).map(|_| tokens(&mut rng, &config, setup.context + 1));
        let micro: MicroBatch = Batch::from_rows(rows.collect::<Vec<_>>()).into();
        let started = Instant::now();
        let metrics = trainer.train_step(&[micro], rates)?;
        let seconds = started.elapsed().as_secs_f64();
        if metrics.update.applied { Ok(seconds) } else { Err(Error::internal("a measured step is not finite")) }
    })?;
    Ok(Measured { tokens_per_step: setup.batch * setup.context, seconds, bytes_per_step: None, reads: Vec::new() })
}

/// A scheduler's limits for `batch` sequences of `positions` tokens.
fn options(setup: &Setup, positions: usize, prefill_tokens: usize) -> Options {
    let cache_tokens = setup.batch * positions.next_multiple_of(PAGE_TOKENS);
    Options { cache_tokens, batch_max: setup.batch, prefill_tokens, waiting_max: setup.batch, ..Options::default() }
}

/// One token a sequence and step, after prompts that were read beforehand.
pub(super) fn decode(named: &Named, setup: &Setup, reader: &Reader) -> Result<Measured, Error> {
    let new = setup.warmup + setup.steps + 1;
    let positions = setup.context + new;
    let config = config_for(named, positions);
    let model = frozen(&config, setup)?;
    let mut scheduler = Scheduler::new(&model, options(setup, positions, setup.batch * setup.context));
    let mut rng = Rng::new(SEED);
    for id in 0..setup.batch {
        scheduler.submit(id as u64, Request::greedy(tokens(&mut rng, &config, setup.context), new, Vec::new()))?;
    }
    // The prompts, and the first token of each.
    scheduler.step(&mut |_, _| true)?;
    let before = scheduler.counters();
    let mut reads = Vec::new();
    let seconds = repeat(setup, || {
        let before = scheduler.counters().generated_tokens;
        let started = Instant::now();
        scheduler.step(&mut |_, _| true)?;
        let seconds = started.elapsed().as_secs_f64();
        if setup.perf_control.is_none() {
            reads.push(reader.pass());
        }
        let made = scheduler.counters().generated_tokens - before;
        if made == setup.batch as u64 {
            Ok(seconds)
        } else {
            Err(Error::internal(format!("a step made {made} tokens")))
        }
    })?;
    let after = scheduler.counters();
    let experts = (after.experts_read - before.experts_read) as f64 / (after.steps - before.steps).max(1) as f64;
    reads.drain(..setup.warmup.min(reads.len()));
    let bytes_per_step = Some(bytes_read(&model, setup, experts));
    Ok(Measured { tokens_per_step: setup.batch, seconds, bytes_per_step, reads })
}

/// Prompts up to their first token, new ones at every step.
pub(super) fn prefill(named: &Named, setup: &Setup) -> Result<Measured, Error> {
    let config = config_for(named, setup.context + 1);
    let model = frozen(&config, setup)?;
    let mut scheduler = Scheduler::new(&model, options(setup, setup.context + 1, PREFILL_TOKENS));
    let mut rng = Rng::new(SEED);
    let seconds = repeat(setup, || {
        let prompts: Vec<_> = (0..setup.batch).map(|_| tokens(&mut rng, &config, setup.context)).collect();
        let started = Instant::now();
        for (id, prompt) in prompts.into_iter().enumerate() {
            scheduler.submit(id as u64, Request::greedy(prompt, 1, Vec::new()))?;
        }
        while !scheduler.is_idle() {
            scheduler.step(&mut |_, _| true)?;
        }
        Ok(started.elapsed().as_secs_f64())
    })?;
    Ok(Measured { tokens_per_step: setup.batch * setup.context, seconds, bytes_per_step: None, reads: Vec::new() })
}

fn frozen(config: &ModelConfig, setup: &Setup) -> Result<Model, Error> {
    let model = Model::init_frozen(config, setup.precision, SEED)?;
    model.prepare();
    Ok(model)
}

/// Weights that a step touches, at the size of their encoding, and the latents it attends to. `experts` is how many routed
/// experts had rows in a step, over all layers, as counted; of the embedding nothing is read.
fn bytes_read(model: &Model, setup: &Setup, experts: f64) -> f64 {
    let stacks = model.infos().iter().filter(|info| info.shape.len() == 3);
    let layers = stacks.map(|info| info.name.rsplit_once(".experts").map_or("", |(layer, _)| layer));
    let layers = layers.collect::<std::collections::BTreeSet<_>>().len();
    let share = experts / (layers * model.config.n_routed_experts).max(1) as f64;
    let weights = model.infos().iter().zip(model.params()).filter(|(info, _)| info.role != Role::Embedding);
    let weights = weights.map(|(info, param)| {
        let routed = if info.shape.len() == 3 { share } else { 1.0 };
        routed * param.compute.bytes() as f64
    });
    let latents = setup.batch * (setup.context + 1) * LatentCache::token_bytes(model, model.latents());
    weights.sum::<f64>() + latents as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle() {
        assert_eq!((median(&[3.0]), median(&[5.0, 1.0, 2.0]), median(&[4.0, 1.0, 2.0, 9.0])), (3.0, 2.0, 3.0));
        assert!(median(&[]).is_nan());
    }
}
