//! One numerics profile: training steps and decoding end in the same bits on every instruction set and number of threads.
//!
//! A process has one instruction set, so this test starts itself again for each. Sequences have odd lengths, one of them a
//! single token; widths are such that no tile divides them; with so few tokens some experts stay empty.

use std::process::Command;

use dsv3_core::{Cancel, Digest};
use dsv3_infer::{GenerateOptions, Request, generate};
use dsv3_model::{Batch, Model, ModelConfig};
use dsv3_ops::{INSTRUCTION_SETS, Precision, limit_instruction_set};
use dsv3_train::{MicroBatch, Rates, Trainer, TrainerConfig};

use super::models::{FP8, config, rows};

/// Says in the child which instruction set and how many threads it has.
const CHILD: &str = "DSV3_TEST_INSTRUCTION_SET";
const NAME: &str = "proof::instruction_sets::every_set_and_thread_count_gives_the_same_bits";

/// Wide enough for two K blocks and several panels, ragged at every edge.
fn ragged() -> ModelConfig {
    ModelConfig {
        hidden_size: 150,
        intermediate_size: 170,
        moe_intermediate_size: 35,
        q_lora_rank: Some(70),
        kv_lora_rank: 45,
        qk_nope_head_dim: 18,
        v_head_dim: 23,
        initializer_range: 0.08,
        ..config()
    }
}

/// Weights after two steps, and what the model then says.
fn outcome(precision: Precision) -> String {
    let model = Model::init(&ragged(), precision, 3).expect("a model");
    let settings = TrainerConfig { balance_alpha: 1e-3, logit_rows: 48, ..TrainerConfig::default() };
    let mut trainer = Trainer::new(model, settings).expect("the model has masters");
    for step in 0..2 {
        let batch: Vec<Vec<u32>> = [2, 40, 96, 24].iter().flat_map(|len| rows(step + len, 1, *len, 50)).collect();
        let micro: MicroBatch = Batch::from_rows(batch).into();
        let rates = Rates { lr: 1e-3, mtp_weight: 0.3, bias_speed: 0.01 };
        trainer.train_step(&[micro], rates).expect("a step");
    }
    let model = trainer.model;
    let mut bytes = Vec::new();
    for param in model.params() {
        let master = param.master.as_ref().expect("a trained parameter");
        bytes.extend(master.as_f32().iter().flat_map(|x| x.to_le_bytes()));
    }
    let prompts = [1, 9, 33].map(|len| Request::greedy(rows(5, 1, len, 50).concat(), 6, Vec::new()));
    let answers = generate(&model, prompts.to_vec(), GenerateOptions::default(), &Cancel::default()).expect("answers");
    for answer in answers {
        bytes.extend(answer.ids.iter().flat_map(|id| id.to_le_bytes()));
        bytes.extend(answer.logprobs.iter().flat_map(|x| x.to_le_bytes()));
    }
    Digest::of(&bytes).to_string()
}

/// What a child on `set` with `threads` threads says; `None` where the machine lacks the set.
fn in_child(set: &str, threads: usize) -> Option<String> {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", NAME, "--nocapture"]).env(CHILD, set).env("RAYON_NUM_THREADS", threads.to_string());
    let output = command.output().expect("a child");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{set}: {said}{}", String::from_utf8_lossy(&output.stderr));
    let (_, outcome) = said.split_once("outcome: ").expect("an outcome");
    let outcome = outcome.lines().next().unwrap_or_default().to_owned();
    (outcome != "missing").then_some(outcome)
}

#[test]
fn every_set_and_thread_count_gives_the_same_bits() {
    if let Ok(set) = std::env::var(CHILD) {
        match limit_instruction_set(&set) {
            Ok(()) => println!("outcome: {}", [Precision::F32, Precision::Bf16, FP8].map(outcome).join(" ")),
            Err(_) => println!("outcome: missing"),
        }
        return;
    }
    let all: Vec<(&str, String)> =
        INSTRUCTION_SETS.into_iter().filter_map(|set| Some((set, in_child(set, 2)?))).collect();
    let (set, expected) = all.last().expect("every machine has the portable set");
    assert_eq!(*set, "portable");
    for (set, outcome) in &all {
        assert_eq!(outcome, expected, "{set} against portable");
    }
    for threads in [1, 3] {
        assert_eq!(in_child(all[0].0, threads).as_ref(), Some(expected), "{threads} threads");
    }
}
