//! Training steps of the named sizes (`dsv3-estimate`), without prediction modules: milliseconds by the clock and of
//! the processors, tokens per second, loss.
//!
//! `cargo bench -p dsv3-train --bench step [-- NAME.. PRECISION.. STEPS]`, for instance `-- S M f32 10`; without names the
//! demo, without precisions all three. `RAYON_NUM_THREADS=1` for one core. The loss of the last step shows whether a
//! change kept every bit.

use std::time::Instant;

use dsv3_core::Rng;
use dsv3_estimate::{Named, named};
use dsv3_model::{Batch, Model};
use dsv3_ops::{Fp8Format, Fp8Scales, Precision};
use dsv3_train::{MicroBatch, Rates, Trainer, TrainerConfig};

/// Steps before the measured ones.
const WARMUP: usize = 2;
/// Measured steps unless an argument says otherwise.
const STEPS: usize = 10;

fn precision(name: &str) -> Option<Precision> {
    match name {
        "f32" => Some(Precision::F32),
        "bf16" => Some(Precision::Bf16),
        "fp8" => Some(Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 }),
        _ => None,
    }
}

/// Processor time of all threads of the process, seconds, where the system tells: on a machine that other work keeps busy
/// it says more than the clock does.
fn processor_seconds() -> f64 {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let nanoseconds = threads.flatten().filter_map(|thread| {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() * 1e-9
}

/// Prints the shortest and the mean step, and the mean of the processor time.
fn measure(named: &Named, label: &str, precision: Precision, steps: usize) {
    let (rows, length) = (named.train_sequences, named.train_tokens);
    let model = Model::init(&named.config, precision, 1).expect("a named size is valid");
    let config = TrainerConfig { balance_alpha: 0.0, logit_rows: 1024, ..TrainerConfig::default() };
    let mut trainer = Trainer::new(model, config).expect("the model has masters");
    let mut rng = Rng::new(1);
    let vocabulary = named.config.vocab_size as u64;
    let mut step = || -> (f64, f64) {
        let tokens = (0..rows).map(|_| (0..=length).map(|_| rng.below(vocabulary) as u32).collect());
        let micro: MicroBatch = Batch::from_rows(tokens.collect::<Vec<Vec<u32>>>()).into();
        let started = Instant::now();
        let rates = Rates { lr: 3e-4, mtp_weight: 0.0, bias_speed: 0.001 };
        let metrics = trainer.train_step(&[micro], rates).expect("a step succeeds");
        (started.elapsed().as_secs_f64(), metrics.total)
    };
    for _ in 0..WARMUP {
        step();
    }
    let before = processor_seconds();
    let results: Vec<(f64, f64)> = (0..steps).map(|_| step()).collect();
    let busy = 1e3 * (processor_seconds() - before) / steps as f64;
    let least = results.iter().map(|(seconds, _)| *seconds).fold(f64::INFINITY, f64::min);
    let mean = results.iter().map(|(seconds, _)| seconds).sum::<f64>() / steps as f64;
    let (rate, loss) = ((rows * length) as f64 / least, results.last().map_or(0.0, |(_, loss)| *loss));
    let (least, mean) = (1e3 * least, 1e3 * mean);
    println!("{:>6} {label:>9} {least:>9.1} {mean:>9.1} {busy:>9.1} {rate:>10.0} {loss:>12.8}", named.name);
}

fn main() {
    dsv3_ops::keep_freed_memory();
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let mut sizes: Vec<Named> = args.iter().filter_map(|arg| named(arg)).collect();
    if sizes.is_empty() {
        sizes.extend(named("demo"));
    }
    let mut labels: Vec<&str> = args.iter().map(String::as_str).filter(|arg| precision(arg).is_some()).collect();
    if labels.is_empty() {
        labels = vec!["f32", "bf16", "fp8"];
    }
    let steps = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(STEPS).max(1);
    let titles = ("size", "precision", "ms/step", "mean", "CPU ms", "tokens/s", "loss");
    let (size, precision_title, least, mean, busy, rate, loss) = titles;
    println!("{size:>6} {precision_title:>9} {least:>9} {mean:>9} {busy:>9} {rate:>10} {loss:>12}");
    for size in sizes {
        let size = size.without_mtp();
        for label in &labels {
            if let Some(precision) = precision(label) {
                measure(&size, label, precision, steps);
            }
        }
    }
}
