//! `train.safetensors`, records `trace.*`: optimiser steps from the initial weights, with F32 and with BF16 moments.
//! Loads and router biases exact; losses and norms within 1e-5 relative; final weights, all tensors together, within
//! 5e-4 of the distance they travelled.

use dsv3_model::Batch;
use dsv3_train::{AdamWConfig, MicroBatch, Moments, Rates, StepMetrics, Trainer, TrainerConfig};

use super::records::{self, Check, Faults, Folder};

const FILE: &str = "train.safetensors";
const LIMIT: f64 = 1e-5;
const DISTANCE_LIMIT: f64 = 5e-4;

pub(crate) const CHECKS: &[Check] = &[
    Check {
        file: FILE,
        records: &[
            "trace.f32.main",
            "trace.f32.balance",
            "trace.f32.total",
            "trace.f32.depth",
            "trace.f32.norm",
            "trace.f32.load.",
            "trace.f32.bias.",
            "trace.f32.param.",
        ],
        run: |folder| trace(folder, "trace.f32.", Moments::F32),
    },
    Check {
        file: FILE,
        records: &[
            "trace.bf16.main",
            "trace.bf16.balance",
            "trace.bf16.total",
            "trace.bf16.depth",
            "trace.bf16.norm",
            "trace.bf16.load.",
            "trace.bf16.bias.",
            "trace.bf16.param.",
        ],
        run: |folder| trace(folder, "trace.bf16.", Moments::Bf16),
    },
];

#[test]
fn optimiser_steps_with_f32_moments_agree() {
    records::verify(&records::set(), &CHECKS[..1]);
}

#[test]
fn optimiser_steps_with_bf16_moments_agree() {
    records::verify(&records::set(), &CHECKS[1..]);
}

#[test]
fn wrong_values_of_optimiser_steps_are_found() {
    super::planted::assert_planted_values_are_found(CHECKS);
}

/// Rows `[T + 1]` of every micro-batch of every step.
fn steps(folder: &Folder) -> Vec<Vec<MicroBatch>> {
    let record = folder.get("trace.input_ids");
    let [_, micro_batches, rows, width] = record.shape[..] else { panic!("trace.input_ids has four dimensions") };
    let micro = |ids: &[u32]| Batch::from_rows(ids.chunks(width)).into();
    let step = |ids: &[u32]| ids.chunks(rows * width).map(micro).collect();
    record.u32s().chunks(micro_batches * rows * width).map(step).collect()
}

fn trace(folder: &Folder, prefix: &str, moments: Moments) -> Faults {
    let adamw = AdamWConfig {
        beta1: folder.scalar("hyper.beta1"),
        beta2: folder.scalar("hyper.beta2"),
        eps: folder.scalar("hyper.eps"),
        weight_decay: folder.scalar("hyper.weight_decay"),
        clip_norm: folder.scalar("hyper.clip_norm"),
        moments,
    };
    let config = TrainerConfig { adamw, balance_alpha: folder.scalar("hyper.alpha"), ..TrainerConfig::default() };
    let mut trainer = Trainer::new(folder.model(), config).expect("the model is trainable");
    let start = masters(&trainer);
    let mut faults = Faults::new();
    for (step, (micro_batches, lr)) in steps(folder).iter().zip(&folder.get("trace.lr").values).enumerate() {
        let rates = Rates { lr: *lr, mtp_weight: folder.scalar("hyper.lam"), bias_speed: folder.scalar("hyper.gamma") };
        let metrics = trainer.train_step(micro_batches, rates).expect("the record's tokens fit");
        compare_step(&mut faults, folder, prefix, step, &metrics, &trainer);
    }
    compare_masters(&mut faults, folder, &format!("{prefix}param."), &start, &masters(&trainer));
    faults
}

fn compare_step(
    faults: &mut Faults,
    folder: &Folder,
    prefix: &str,
    step: usize,
    metrics: &StepMetrics,
    trainer: &Trainer,
) {
    let scalars = [
        ("main", metrics.losses.main),
        ("balance", metrics.losses.balance),
        ("total", metrics.total),
        ("norm", metrics.update.grad_norm),
    ];
    for (name, got) in scalars {
        let name = format!("{prefix}{name}");
        if let Some(record) = folder.records.get(&name) {
            records::same(faults, &format!("{name}, step {}", step + 1), got, record.values[step], LIMIT);
        }
    }
    let name = format!("{prefix}depth");
    if let Some(record) = folder.records.get(&name) {
        let depths = record.shape[1];
        let want = &record.values[step * depths..][..depths];
        records::equal(faults, &format!("{name}, depths"), &[metrics.losses.mtp.len()], &[depths]);
        for (depth, (got, want)) in metrics.losses.mtp.iter().zip(want).enumerate() {
            records::same(faults, &format!("{name} {}, step {}", depth + 1, step + 1), *got, *want, LIMIT);
        }
    }
    let row = |record: &records::Record| {
        let experts = record.shape[1];
        record.values[step * experts..][..experts].to_vec()
    };
    for (layer, record) in folder.under(&format!("{prefix}load.")) {
        let found = metrics.loads.iter().find(|(number, _)| number.to_string() == layer);
        let got: Vec<f64> = found.map_or_else(Vec::new, |(_, loads)| loads.iter().map(|load| *load as f64).collect());
        records::equal(faults, &format!("{prefix}load.{layer}, step {}", step + 1), &got, &row(record));
    }
    for (layer, record) in folder.under(&format!("{prefix}bias.")) {
        let biases = trainer.model.bias_infos().iter().zip(trainer.model.biases());
        let found = biases.into_iter().find(|(info, _)| info.layer.to_string() == layer);
        let got: Vec<f64> = found.map_or_else(Vec::new, |(_, bias)| bias.iter().map(|b| f64::from(*b)).collect());
        records::equal(faults, &format!("{prefix}bias.{layer}, step {}", step + 1), &got, &row(record));
    }
}

/// Published name and values of every parameter.
fn masters(trainer: &Trainer) -> std::collections::BTreeMap<String, Vec<f32>> {
    let mut named = std::collections::BTreeMap::new();
    for (info, param) in trainer.model.infos().iter().zip(trainer.model.params()) {
        let master = param.master.as_ref().expect("the model is trainable").as_f32();
        let len = info.tensor_shape().iter().product::<usize>();
        named.extend(info.tensor_names().into_iter().zip(master.chunks(len).map(<[f32]>::to_vec)));
    }
    named
}

fn compare_masters(
    faults: &mut Faults,
    folder: &Folder,
    prefix: &str,
    start: &std::collections::BTreeMap<String, Vec<f32>>,
    end: &std::collections::BTreeMap<String, Vec<f32>>,
) {
    let (mut off, mut travelled) = (0.0, 0.0);
    for (name, record) in folder.under(prefix) {
        let (Some(start), Some(end)) = (start.get(name), end.get(name)) else {
            faults.push(format!("{prefix}{name}: the model has no such parameter"));
            continue;
        };
        records::equal(faults, &format!("{prefix}{name}, elements"), &[end.len()], &[record.values.len()]);
        for ((start, end), want) in start.iter().zip(end).zip(&record.values) {
            off += (f64::from(*end) - want).powi(2);
            travelled += (want - f64::from(*start)).powi(2);
        }
    }
    let share = (off / travelled).sqrt();
    // A set may lack final weights.
    if !folder.has(prefix) {
        return;
    }
    if share.is_nan() || share > DISTANCE_LIMIT {
        faults.push(format!("{prefix}*: off by {share:.3e} of the distance travelled, allowed {DISTANCE_LIMIT:.1e}"));
    }
}
