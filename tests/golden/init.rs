//! `train.safetensors`, records `init.*`: one training pass at the initial weights with prediction modules and balance
//! loss. Choices and loads exact, losses within 1e-5 relative, gradients within 1e-4 relative in norm, hidden states and
//! logits within 2e-4 absolute.

use dsv3_model::{Batch, Model, TrainOptions, TrainOut};
use dsv3_ops::{Tape, Tensor, Var, VarId, WeightGrads};

use super::records::{self, Check, Faults, Folder};

const FILE: &str = "train.safetensors";
const LOSS_LIMIT: f64 = 1e-5;
const GRADIENT_LIMIT: f64 = 1e-4;

pub(crate) const CHECKS: &[Check] = &[
    Check { file: FILE, records: &["init.hidden.", "init.logits."], run: hidden_and_logits },
    Check { file: FILE, records: &["init.topk.", "init.load."], run: choices },
    Check { file: FILE, records: &["init.loss."], run: losses },
    Check { file: FILE, records: &["init.grad.", "init.grad_lambda0.", "init.grad_main."], run: gradients },
];

#[test]
fn hidden_states_and_logits_of_every_depth_agree() {
    records::verify(&records::set(), &CHECKS[..1]);
}

#[test]
fn expert_choices_and_loads_agree() {
    records::verify(&records::set(), &CHECKS[1..2]);
}

#[test]
fn losses_agree() {
    records::verify(&records::set(), &CHECKS[2..3]);
}

#[test]
fn gradients_of_every_loss_agree() {
    records::verify(&records::set(), &CHECKS[3..]);
}

fn forward(model: &Model, folder: &Folder, tape: &mut Tape, recompute: bool) -> (Batch, TrainOut) {
    let batch = Batch::from_rows(folder.get("init.input_ids").rows());
    let options = TrainOptions { observe: true, recompute, ..TrainOptions::default() };
    let out = model.forward_train(tape, &batch, options).expect("the record's tokens fit");
    (batch, out)
}

fn hidden_and_logits(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    let model = folder.model();
    let (_, out) = forward(&model, folder, &mut Tape::inference(), false);
    let by_depth: Vec<&Tensor> =
        [&out.hidden.value].into_iter().chain(out.mtp.iter().map(|depth| &depth.hidden.value)).collect();
    for prefix in ["init.hidden.", "init.logits."] {
        for (depth, record) in folder.under(prefix) {
            let name = format!("{prefix}{depth}");
            let Some(hidden) = depth.parse::<usize>().ok().and_then(|depth| by_depth.get(depth)) else {
                faults.push(format!("{name}: the model has no such depth"));
                continue;
            };
            let got = if prefix == "init.hidden." { (*hidden).clone() } else { model.logits(hidden) };
            records::close(&mut faults, &name, got.as_f32(), record, 2e-4);
        }
    }
    faults
}

fn choices(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    let model = folder.model();
    let (_, out) = forward(&model, folder, &mut Tape::inference(), false);
    let observed = out.observed.unwrap_or_default();
    for (layer, record) in folder.under("init.topk.") {
        let name = format!("init.topk.{layer}");
        match observed.choices.iter().find(|(number, _)| number.to_string() == layer) {
            Some((_, chosen)) => {
                let mut chosen = chosen.as_u32().to_vec();
                chosen.chunks_mut(record.shape[1]).for_each(<[u32]>::sort_unstable);
                records::equal(&mut faults, &name, &chosen, &record.u32s());
            }
            None => faults.push(format!("{name}: the model has no such layer with experts")),
        }
    }
    for (layer, record) in folder.under("init.load.") {
        let name = format!("init.load.{layer}");
        let want: Vec<u64> = record.values.iter().map(|v| *v as u64).collect();
        match out.loads.iter().find(|(number, _)| number.to_string() == layer) {
            Some((_, loads)) => records::equal(&mut faults, &name, loads, &want),
            None => faults.push(format!("{name}: the model has no such layer with experts")),
        }
    }
    faults
}

/// −Σ logp / n, wide.
fn mean_loss(logp: &Var, count: f64) -> f64 {
    -logp.value.as_f32().iter().map(|logp| f64::from(*logp)).sum::<f64>() / count
}

fn losses(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    let model = folder.model();
    let (batch, out) = forward(&model, folder, &mut Tape::inference(), false);
    let (alpha, lambda) = (folder.scalar("hyper.alpha"), folder.scalar("hyper.lam"));
    let tokens = batch.tokens() as f64;
    let main = mean_loss(&out.logp, tokens);
    let depths: Vec<f64> = out.mtp.iter().map(|depth| mean_loss(&depth.logp, tokens)).collect();
    if let Some(want) = folder.records.get("init.loss.mtp") {
        records::equal(&mut faults, "init.loss.mtp, depths", &[depths.len()], &[want.values.len()]);
        for (depth, (got, want)) in depths.iter().zip(&want.values).enumerate() {
            records::same(&mut faults, &format!("init.loss.mtp {}", depth + 1), *got, *want, LOSS_LIMIT);
        }
    }
    let layers: Vec<(String, f64)> = out
        .balance
        .iter()
        .map(|(layer, loss)| (format!("balance.{layer}"), alpha * f64::from(loss.value.as_f32()[0])))
        .collect();
    let balance = layers.iter().map(|(_, loss)| loss).sum::<f64>();
    let total = main + balance + lambda * depths.iter().sum::<f64>() / depths.len().max(1) as f64;
    let sums = [("main", main), ("balance", balance), ("total", total)].map(|(name, loss)| (name.to_owned(), loss));
    for (name, loss) in sums.iter().chain(&layers) {
        let name = format!("init.loss.{name}");
        if let Some(want) = folder.records.get(&name) {
            records::same(&mut faults, &name, *loss, want.scalar(), LOSS_LIMIT);
        }
    }
    let computed = |name: &str| name == "mtp" || sums.iter().chain(&layers).any(|(known, _)| known == name);
    let unknown = folder.under("init.loss.").filter(|(name, _)| !computed(name));
    faults.extend(unknown.map(|(name, _)| format!("init.loss.{name}: the model has no such loss")));
    faults
}

/// Seeds of main + λ/D·ΣL_k + α·balance.
fn seeds(batch: &Batch, out: &TrainOut, lambda: f64, alpha: f64) -> Vec<(VarId, Tensor)> {
    let filled = |var: &Var, value: f64| {
        let shape = var.value.shape();
        (var.id(), Tensor::f32(shape, vec![value as f32; var.value.numel()]))
    };
    let tokens = batch.tokens() as f64;
    let mut seeds = vec![filled(&out.logp, -1.0 / tokens)];
    if lambda != 0.0 {
        let depth = -lambda / out.mtp.len() as f64 / tokens;
        seeds.extend(out.mtp.iter().map(|mtp| filled(&mtp.logp, depth)));
    }
    if alpha != 0.0 {
        seeds.extend(out.balance.iter().map(|(_, loss)| filled(loss, alpha)));
    }
    seeds
}

fn gradients(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    let model = folder.model();
    let (alpha, lambda) = (folder.scalar("hyper.alpha"), folder.scalar("hyper.lam"));
    let cases = [("init.grad.", lambda, alpha), ("init.grad_lambda0.", 0.0, alpha), ("init.grad_main.", 0.0, 0.0)];
    for (prefix, lambda, alpha) in cases.into_iter().filter(|(prefix, ..)| folder.has(prefix)) {
        let gradients = |recompute: bool| {
            let mut tape = Tape::new();
            let (batch, out) = forward(&model, folder, &mut tape, recompute);
            let mut grads = WeightGrads::default();
            tape.backward(seeds(&batch, &out, lambda, alpha), &mut grads);
            records::gradients(&model, &grads)
        };
        let named = gradients(false);
        records::compare_gradients(&mut faults, folder, prefix, &named, GRADIENT_LIMIT);
        if named != gradients(true) {
            faults.push(format!("{prefix}: recomputing activations changes the gradients' bits"));
        }
    }
    faults
}
