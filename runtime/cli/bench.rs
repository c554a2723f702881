//! `dsv3-pipeline bench WORK --config NAME`: speed of training, decoding or prefill on this machine, beside what the machine
//! reaches in one large product and in reading memory, both measured in the same run, before and after the work; for decoding
//! memory is also read after every step, and those reads are what its fraction is of.
//!
//! Weights and tokens are random from a fixed seed. The figure is the median over the measured steps; model FLOPs are those
//! of `dsv3_estimate::flops`, so the fraction can be checked by hand: FLOPs a token · tokens/s / ceiling.
//! A model that fits the caches, as `demo` does, can decode faster than memory could feed it: its fraction passes 1.

mod ceiling;
mod peak;
mod work;

use std::path::PathBuf;

use clap::ValueEnum;
use dsv3_core::Error;
use dsv3_estimate::{flops, named};
use dsv3_model::count;
use dsv3_ops::{Fp8Format, Fp8Scales, Precision};
use serde::Serialize;

use crate::{
    common::{self, Failure},
    table::number,
};

/// Arguments of `bench`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// What is measured
    work: Work,
    /// Sizes of the model: demo is that of full.yaml; L is for decoding and prefill
    #[arg(long, value_parser = dsv3_estimate::NAMES)]
    config: String,
    /// Precision of the linear layers
    #[arg(long, default_value = "f32")]
    precision: PrecisionName,
    /// Sequences of a step (train: 8 for demo, 16 for S, 4 for M; decode and prefill: 1)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: Option<u32>,
    /// Tokens of a sequence (train: 128 for demo, 256 for S, 512 for M), or before the decoded ones (512)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    context: Option<u32>,
    /// Compute threads; all by default
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Widest instruction set used; the widest this machine has by default
    #[arg(long, value_parser = dsv3_ops::INSTRUCTION_SETS)]
    isa: Option<String>,
    /// Measured steps
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: u32,
    /// Steps before the measured ones
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    warmup: u32,
    /// Train demo without its prediction module and balance loss, which other implementations lack
    #[arg(long)]
    no_mtp: bool,
    /// Have the `perf record` that listens at this FIFO count the measured steps alone; benches/profile.py does so
    #[arg(long, value_name = "FIFO")]
    perf_control: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Work {
    /// Whole optimiser steps: forward, backward, AdamW
    Train,
    /// Tokens after a context, by the inference scheduler, without drafts
    Decode,
    /// Prompts up to their first token, by the inference scheduler
    Prefill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum PrecisionName {
    F32,
    Bf16,
    Fp8,
}

/// Everything a run of `bench` says; the object of `--json`.
#[derive(Debug, Serialize)]
struct Report {
    work: Work,
    config: String,
    precision: PrecisionName,
    mtp: bool,
    batch: usize,
    context: usize,
    threads: usize,
    isa: &'static str,
    /// Prediction modules included, where they are trained.
    parameters: u64,
    /// By which one token is multiplied, with norms and biases; main model.
    active_parameters: u64,
    /// P of the FLOP formula.
    matrix_parameters: u64,
    model_flops_per_token: f64,
    tokens_per_step: usize,
    steps: usize,
    seconds_per_step: f64,
    seconds_per_step_min: f64,
    tokens_per_second: f64,
    gflops: f64,
    /// Larger of the next two.
    ceiling_gflops: f64,
    /// A large f32 product by the `gemm` crate.
    ceiling_gemm_gflops: f64,
    /// The same product by this program.
    ceiling_own_gflops: f64,
    /// Larger of a read and a copy.
    bandwidth_gb_per_second: f64,
    read_gb_per_second: f64,
    copy_gb_per_second: f64,
    /// Median of the reads between the measured steps, which a fraction of memory is of; decoding alone.
    read_between_steps_gb_per_second: Option<f64>,
    /// What a step must read at least: weights it touches and the latent cache; decoding alone.
    bytes_per_step: Option<f64>,
    /// Which ceiling the fraction is of: `compute` or `memory`.
    bound: &'static str,
    /// Time that the nearer ceiling allows over time taken.
    fraction: f64,
    /// Highest resident memory while stepping, model included; null where the system does not say, or where it keeps the
    /// memory of measuring the ceilings in mind and the work took less.
    peak_bytes: Option<u64>,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    common::set_threads(args.threads.map(usize::from));
    if let Some(isa) = &args.isa {
        dsv3_ops::limit_instruction_set(isa).map_err(|error| Error::invalid(error.to_string()))?;
    }
    let mut named = named(&args.config).ok_or_else(|| Error::invalid(format!("no configuration `{}`", args.config)))?;
    if args.no_mtp || args.work != Work::Train {
        named = named.without_mtp();
    }
    let train = args.work == Work::Train;
    if train && named.name == "L" {
        let error =
            Error::invalid("L is measured in decoding and prefill: its optimiser state is beyond common machines");
        return Err(error.help("`bench train --config M` trains the next smaller one").into());
    }
    let (sequences, tokens) = if train { (named.train_sequences, named.train_tokens) } else { (1, 512) };
    let setup = work::Setup {
        precision: args.precision.kernel(),
        batch: args.batch.map_or(sequences, |batch| batch as usize),
        context: args.context.map_or(tokens, |context| context as usize),
        steps: args.steps as usize,
        warmup: args.warmup as usize,
        perf_control: args.perf_control.clone(),
    };
    let before = (ceiling::products(), ceiling::memory());
    let peak = peak::Peak::begin();
    let mut own_bytes = 0;
    let measured = match args.work {
        Work::Train => work::train(&named, &setup)?,
        Work::Decode => {
            let reader = ceiling::Reader::new();
            own_bytes = reader.bytes() as u64;
            work::decode(&named, &setup, &reader)?
        }
        Work::Prefill => work::prefill(&named, &setup)?,
    };
    let peak_bytes = peak.end().map(|bytes| bytes.saturating_sub(own_bytes));
    dsv3_ops::return_freed_memory();
    let machine = (before.0.max(ceiling::products()), before.1.max(ceiling::memory()));
    let report = report(args, &named, &setup, &measured, machine, peak_bytes);
    if args.json {
        return common::say_json(&report);
    }
    show(&report);
    Ok(())
}

fn report(
    args: &Args,
    named: &dsv3_estimate::Named,
    setup: &work::Setup,
    measured: &work::Measured,
    (products, memory): (ceiling::Products, ceiling::Memory),
    peak_bytes: Option<u64>,
) -> Report {
    let config = &named.config;
    let counts = count::counts(config);
    let per_token = match args.work {
        Work::Train => flops::train(config, setup.context),
        Work::Decode => flops::decode(config, setup.context),
        Work::Prefill => flops::prefill(config, setup.context),
    };
    let seconds = measured.median();
    let rate = measured.tokens_per_step as f64 / seconds;
    let (ceiling_gflops, bandwidth) = (products.ceiling(), memory.bandwidth());
    let compute_seconds = per_token * measured.tokens_per_step as f64 / (ceiling_gflops * 1e9);
    let between = Some(work::median(&measured.reads)).filter(|read| read.is_finite());
    let memory_seconds = measured.bytes_per_step.map_or(0.0, |bytes| bytes / (between.unwrap_or(bandwidth) * 1e9));
    Report {
        work: args.work,
        config: args.config.clone(),
        precision: args.precision,
        mtp: config.num_nextn_predict_layers > 0,
        batch: setup.batch,
        context: setup.context,
        threads: rayon::current_num_threads(),
        isa: dsv3_ops::instruction_set(),
        parameters: counts.total + counts.mtp_unique,
        active_parameters: counts.active,
        matrix_parameters: flops::matrix_parameters(config),
        model_flops_per_token: per_token,
        tokens_per_step: measured.tokens_per_step,
        steps: measured.seconds.len(),
        seconds_per_step: seconds,
        seconds_per_step_min: measured.least(),
        tokens_per_second: rate,
        gflops: rate * per_token * 1e-9,
        ceiling_gflops,
        ceiling_gemm_gflops: products.gemm,
        ceiling_own_gflops: products.own,
        bandwidth_gb_per_second: bandwidth,
        read_gb_per_second: memory.read,
        copy_gb_per_second: memory.copy,
        read_between_steps_gb_per_second: between,
        bytes_per_step: measured.bytes_per_step,
        bound: if memory_seconds > compute_seconds { "memory" } else { "compute" },
        fraction: compute_seconds.max(memory_seconds) / seconds,
        peak_bytes,
    }
}

impl PrecisionName {
    fn kernel(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
            Self::Fp8 => Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 },
        }
    }
}

/// Prints the report for a reader.
fn show(report: &Report) {
    let bytes = |bytes: f64| format!("{:.1} MiB", bytes / f64::from(1 << 20));
    let (most, gemm, own) = (report.ceiling_gflops, report.ceiling_gemm_gflops, report.ceiling_own_gflops);
    let ceiling = format!("{most:.1} GFLOP/s (gemm crate {gemm:.1}, ours {own:.1})");
    let mut lines = vec![
        ("parameters", number(report.parameters as f64)),
        ("active parameters", number(report.active_parameters as f64)),
        ("in matrices a token meets", number(report.matrix_parameters as f64)),
        ("model FLOPs a token", number(report.model_flops_per_token)),
        ("batch x context", format!("{} x {}", report.batch, report.context)),
        ("threads, instruction set", format!("{}, {}", report.threads, report.isa)),
        ("ceiling, large f32 product", ceiling),
        ("memory, read and copy", format!("{:.1}, {:.1} GB/s", report.read_gb_per_second, report.copy_gb_per_second)),
        ("median step", format!("{:.3} ms of {}", 1e3 * report.seconds_per_step, report.steps)),
        ("tokens/s", format!("{:.1}", report.tokens_per_second)),
        ("model GFLOP/s", format!("{:.1}", report.gflops)),
    ];
    let between = report.read_between_steps_gb_per_second;
    lines.extend(between.map(|read| ("memory, read between steps", format!("{read:.1} GB/s"))));
    lines.extend(report.bytes_per_step.map(|read| ("least bytes a step", bytes(read))));
    lines.push(("fraction of the ceiling", format!("{:.3} ({})", report.fraction, report.bound)));
    lines.extend(report.peak_bytes.map(|peak| ("peak memory", bytes(peak as f64))));
    for (name, value) in lines {
        common::say(format!("{name:28}  {value}"));
    }
}
