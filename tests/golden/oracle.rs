//! `oracle.safetensors`: one forward and backward pass of the main model, and greedy continuations.
//!
//! Logits and hidden states within 2e-4 absolute, the loss within 1e-5 relative, every gradient within 1e-3 relative in
//! norm, greedy tokens identical by the training path (the whole text again for every token) and by cached decoding.

use dsv3_model::{Batch, LatentCache, LatentType, Model, Observed, SeqStep, TrainOptions};
use dsv3_ops::{Spans, Tape, Tensor, WeightGrads};

use super::records::{self, Check, Faults, Folder};

const FILE: &str = "oracle.safetensors";

pub(crate) const CHECKS: &[Check] = &[
    Check { file: FILE, records: &["hidden.", "logits"], run: hidden_and_logits },
    Check { file: FILE, records: &["loss", "grad."], run: loss_and_gradients },
    Check { file: FILE, records: &["greedy"], run: greedy_by_training_path },
    Check { file: FILE, records: &["greedy"], run: greedy_by_cached_decoding },
];

#[test]
fn hidden_states_and_logits_agree() {
    records::verify(&records::set(), &CHECKS[..1]);
}

#[test]
fn loss_and_gradients_agree() {
    records::verify(&records::set(), &CHECKS[1..2]);
}

#[test]
fn greedy_tokens_agree_by_the_training_path() {
    records::verify(&records::set(), &CHECKS[2..3]);
}

#[test]
fn greedy_tokens_agree_by_cached_decoding() {
    records::verify(&records::set(), &CHECKS[3..]);
}

/// All of `rows` as inputs; the last token of each has no target.
fn whole(rows: &[Vec<u32>]) -> Batch {
    let targets = rows.iter().flat_map(|row| row[1..].iter().copied().chain([Batch::NO_TARGET])).collect();
    Batch { ids: rows.concat(), spans: Spans::from_lens(rows.iter().map(Vec::len)), targets }
}

fn main_only() -> TrainOptions {
    TrainOptions { mtp: false, balance: false, observe: true, ..TrainOptions::default() }
}

fn run(model: &Model, rows: &[Vec<u32>]) -> (Tensor, Observed) {
    let out = model.forward_train(&mut Tape::inference(), &whole(rows), main_only()).expect("the record's tokens fit");
    (out.hidden.value, out.observed.unwrap_or_default())
}

fn hidden_and_logits(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    let model = folder.model();
    let (hidden, observed) = run(&model, &folder.get("input_ids").rows());
    for (index, record) in folder.under("hidden.") {
        match index.parse::<usize>().ok().and_then(|index| observed.hidden.get(index)) {
            Some(hidden) => records::close(&mut faults, &format!("hidden.{index}"), hidden.as_f32(), record, 2e-4),
            None => faults.push(format!("hidden.{index}: the model has no such layer")),
        }
    }
    if let Some(record) = folder.records.get("logits") {
        records::close(&mut faults, "logits", model.logits(&hidden).as_f32(), record, 2e-4);
    }
    faults
}

fn loss_and_gradients(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    let model = folder.model();
    let batch = whole(&folder.get("input_ids").rows());
    let count = batch.target_count() as f32;
    let mut tape = Tape::new();
    let out = model.forward_train(&mut tape, &batch, main_only()).expect("the record's tokens fit");
    let logp = out.logp.value.as_f32();
    let loss = -logp.iter().map(|logp| f64::from(*logp)).sum::<f64>() / f64::from(count);
    records::same(&mut faults, "loss", loss, folder.scalar("loss"), 1e-5);
    let mut grads = WeightGrads::default();
    let seed = Tensor::f32(&[logp.len()], vec![-1.0 / count; logp.len()]);
    tape.backward(vec![(out.logp.id(), seed)], &mut grads);
    let named = records::gradients(&model, &grads);
    records::compare_gradients(&mut faults, folder, "grad.", &named, 1e-3);
    faults
}

/// The recorded rows and the length of their prompt: what all of them share with `input_ids`.
fn prompt(folder: &Folder) -> (Vec<Vec<u32>>, usize) {
    let (inputs, greedy) = (folder.get("input_ids").rows(), folder.get("greedy").rows());
    let shared = |(a, b): (&Vec<u32>, &Vec<u32>)| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let len = inputs.iter().zip(&greedy).map(shared).min().unwrap_or(0);
    (greedy, len)
}

fn best(logits: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).fold(0, better) as u32
}

fn last_row(x: &Tensor) -> Tensor {
    let (rows, d) = (x.rows(), x.cols());
    Tensor::f32(&[1, d], x.as_f32()[(rows - 1) * d..].to_vec())
}

fn greedy_by_training_path(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    let model = folder.model();
    let (greedy, prompt_len) = prompt(folder);
    for (i, want) in greedy.iter().enumerate() {
        let mut row = want[..prompt_len].to_vec();
        while row.len() < want.len() {
            let (hidden, _) = run(&model, std::slice::from_ref(&row));
            row.push(best(model.logits(&last_row(&hidden)).as_f32()));
        }
        records::equal(&mut faults, &format!("greedy row {i} by the training path"), &row, want);
    }
    faults
}

/// All rows in one batch, the prompt of each cut at another place.
fn greedy_by_cached_decoding(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    let model = folder.model();
    let (greedy, prompt_len) = prompt(folder);
    let longest = greedy.iter().map(Vec::len).max().unwrap_or(0);
    let mut cache = LatentCache::for_tokens(&model, greedy.len(), longest, LatentType::F32);
    let seqs: Vec<_> = greedy.iter().map(|_| cache.start()).collect();
    let mut rows: Vec<Vec<u32>> = greedy.iter().map(|row| row[..prompt_len].to_vec()).collect();
    let mut done: Vec<usize> = vec![0; rows.len()];
    while rows.iter().zip(&greedy).any(|(row, want)| row.len() < want.len()) {
        let new: Vec<&[u32]> = rows
            .iter()
            .zip(&done)
            .enumerate()
            .map(|(i, (row, done))| {
                let chunk = if *done == 0 { (1 + 5 * i).min(row.len()) } else { row.len() - done };
                &row[*done..done + chunk]
            })
            .collect();
        let steps: Vec<SeqStep<'_>> = seqs.iter().zip(&new).map(|(seq, ids)| SeqStep { seq: *seq, ids }).collect();
        let hidden = model.forward_cached(&mut cache, &steps).expect("the cache has room");
        let logits = model.logits(&hidden);
        let lens: Vec<usize> = new.iter().map(|ids| ids.len()).collect();
        let mut end = 0;
        for (i, len) in lens.into_iter().enumerate() {
            (end, done[i]) = (end + len, done[i] + len);
            if done[i] == rows[i].len() && rows[i].len() < greedy[i].len() {
                rows[i].push(best(&logits.as_f32()[(end - 1) * logits.cols()..end * logits.cols()]));
            }
        }
    }
    for (i, (row, want)) in rows.iter().zip(&greedy).enumerate() {
        records::equal(&mut faults, &format!("greedy row {i} by cached decoding"), row, want);
    }
    faults
}
