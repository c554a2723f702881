//! `train.safetensors`, records `grpo.*`: advantages, log-probabilities, objective, clipped tokens, loss and gradients
//! of group relative policy optimisation at the initial weights. Log-probabilities within 1e-4 absolute, objectives and
//! KL 1e-5, loss 1e-6, gradients 1e-4 relative in norm, the number of clipped tokens exact.

use dsv3_model::{Batch, Model, TrainOptions};
use dsv3_ops::{Tape, Tensor, WeightGrads};
use dsv3_train::grpo::{self, Completion, GrpoConfig, Outcome, StepSize};

use super::records::{self, Check, Faults, Folder};

/// `grpo.old_logp` is an input that says nothing where an advantage is 0, so a wrong value there cannot be seen.
pub(crate) const CHECKS: &[Check] = &[Check {
    file: "train.safetensors",
    records: &[
        "grpo.advantages",
        "grpo.clipped_tokens",
        "grpo.grad.",
        "grpo.kl",
        "grpo.logp",
        "grpo.loss",
        "grpo.objective",
        "grpo.ref_logp",
        "grpo.rewards",
    ],
    run: policy_step,
}];

#[test]
fn a_policy_step_agrees() {
    records::verify(&records::set(), CHECKS);
}

#[test]
fn wrong_values_of_a_policy_step_are_found() {
    super::planted::assert_planted_values_are_found(CHECKS);
}

/// Where the tokens of each completion lie in the packed batch: position of the first one's input, and how many.
fn places(folder: &Folder, batch: &Batch) -> Vec<(usize, usize)> {
    let (prompts, completions) = (folder.get("grpo.prompt_len").u32s(), folder.get("grpo.completion_len").u32s());
    let spans = batch.spans.iter().zip(prompts.iter().zip(&completions));
    spans.map(|(span, (prompt, completion))| (span.start + *prompt as usize - 1, *completion as usize)).collect()
}

fn policy_step(folder: &Folder) -> Faults {
    let mut faults = Faults::new();
    let rewards = folder.get("grpo.rewards");
    let advantages = grpo::advantages(&rewards.f32s(), rewards.shape[1]);
    records::close(&mut faults, "grpo.advantages", &advantages, folder.get("grpo.advantages"), 1e-6);

    let rows = folder.get("grpo.input_ids").rows();
    let lens = folder.get("grpo.prompt_len").u32s().into_iter().zip(folder.get("grpo.completion_len").u32s());
    let rows = rows.iter().zip(lens).map(|(row, (prompt, completion))| &row[..(prompt + completion) as usize]);
    let batch = Batch::from_rows(rows);
    let model = folder.model();
    let mut tape = Tape::new();
    let options = TrainOptions { mtp: false, balance: false, ..TrainOptions::default() };
    let out = model.forward_train(&mut tape, &batch, options).expect("the record's tokens fit");
    let places = places(folder, &batch);
    let logp = out.logp.value.as_f32();

    let width = folder.get("grpo.logp").shape[1];
    let mut padded = Vec::new();
    for (first, count) in &places {
        padded.extend_from_slice(&logp[*first..first + count]);
        padded.resize(padded.len() + width - count, 0.0);
    }
    records::close(&mut faults, "grpo.logp", &padded, folder.get("grpo.logp"), 1e-4);

    let outcome = outcome(folder, &places, logp, &advantages);
    compare(&mut faults, folder, &outcome);
    let mut seed = vec![0.0; logp.len()];
    for ((first, _), d_logp) in places.iter().zip(&outcome.d_logp) {
        seed[*first..first + d_logp.len()].copy_from_slice(d_logp);
    }
    let seeds = vec![(out.logp.id(), Tensor::f32(out.logp.value.shape(), seed))];
    compare_gradients(&mut faults, folder, &model, tape, seeds);
    faults
}

fn outcome(folder: &Folder, places: &[(usize, usize)], logp: &[f32], advantages: &[f32]) -> Outcome {
    let (old, reference) = (folder.get("grpo.old_logp"), folder.get("grpo.ref_logp"));
    let (width, old, reference) = (old.shape[1], old.f32s(), reference.f32s());
    let completions: Vec<Completion> = places
        .iter()
        .enumerate()
        .map(|(i, (first, count))| Completion {
            logp: &logp[*first..first + count],
            old: &old[i * width..][..*count],
            reference: Some(&reference[i * width..][..*count]),
            advantage: advantages[i],
        })
        .collect();
    let config = GrpoConfig {
        clip_eps: folder.scalar("hyper.clip_eps"),
        kl_beta: folder.scalar("hyper.kl_beta"),
        ..GrpoConfig::default()
    };
    grpo::objective(&completions, StepSize::of(&completions), &config)
}

fn compare(faults: &mut Faults, folder: &Folder, outcome: &Outcome) {
    let f32s = |list: &[f64]| list.iter().map(|x| *x as f32).collect::<Vec<_>>();
    records::close(faults, "grpo.objective", &f32s(&outcome.objective), folder.get("grpo.objective"), 1e-5);
    records::close(faults, "grpo.kl", &f32s(&outcome.kl), folder.get("grpo.kl"), 1e-5);
    records::close(faults, "grpo.loss", &[outcome.loss as f32], folder.get("grpo.loss"), 1e-6);
    let clipped = folder.scalar("grpo.clipped_tokens");
    records::equal(faults, "grpo.clipped_tokens", &[outcome.clipped_tokens as f64], &[clipped]);
}

fn compare_gradients(
    faults: &mut Faults,
    folder: &Folder,
    model: &Model,
    mut tape: Tape,
    seeds: Vec<(dsv3_ops::VarId, Tensor)>,
) {
    let mut grads = WeightGrads::default();
    tape.backward(seeds, &mut grads);
    records::compare_gradients(faults, folder, "grpo.grad.", &records::gradients(model, &grads), 1e-4);
}
