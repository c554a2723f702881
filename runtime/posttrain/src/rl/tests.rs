//! GRPO on a small random model: what it learns, and that an interruption leaves no trace.

use std::{cell::RefCell, collections::BTreeMap};

use bytes::Bytes;
use dsv3_core::{Digest, Events, FileEntry, VirtualClock};
use dsv3_data::{ChatTemplate, Location, Message, Place, PromptRecord, TrainOptions as TokenizerOptions};
use dsv3_hooks::RewardItem;
use dsv3_model::ModelConfig;
use dsv3_ops::Precision;
use dsv3_train::{
    AdamWConfig, CheckpointEvery, CheckpointStore, GuardConfig, RunOptions, Snapshot, TrainHost, TrainerConfig,
    run_training,
};

use super::*;
use crate::{error::Result, reward::Scored};

/// Rewards completions that hold many letters `a`; asks the run to stop while it scores step `stop_at`.
struct Letters {
    stop_at: Option<u64>,
    cancel: Cancel,
}

impl Scorer for Letters {
    fn score(&self, batch: u64, items: &[RewardItem<'_>]) -> Result<Vec<Scored>> {
        if self.stop_at == Some(batch) {
            self.cancel.cancel();
        }
        let score = |item: &RewardItem<'_>| item.completion.matches('a').count() as f64;
        Ok(items.iter().map(|item| Scored { total: score(item), parts: vec![("a".to_owned(), score(item))] }).collect())
    }
}

type Saved = (dsv3_store::Checkpoint, BTreeMap<String, Bytes>);

/// Holds the newest checkpoint.
#[derive(Default)]
struct Memory(RefCell<Option<Saved>>);

impl CheckpointStore for Memory {
    fn latest(&self) -> Result<Option<dsv3_store::Checkpoint>, CoreError> {
        Ok(self.0.borrow().as_ref().map(|(checkpoint, _)| checkpoint.clone()))
    }
    fn read(&self, _: &dsv3_store::Checkpoint, name: &str) -> Result<Bytes, CoreError> {
        Ok(self.0.borrow().as_ref().unwrap().1[name].clone())
    }
    fn save(&self, snapshot: Snapshot) -> Result<(), CoreError> {
        let entry = |(path, bytes): &(String, Bytes)| FileEntry {
            path: path.clone(),
            digest: Digest::of(bytes),
            bytes: bytes.len() as u64,
        };
        let files = snapshot.files.iter().map(entry).collect();
        let Snapshot { step, state, tensors, .. } = snapshot;
        let checkpoint = dsv3_store::Checkpoint { seq: 1, step, state, files, tensors };
        *self.0.borrow_mut() = Some((checkpoint, snapshot.files.into_iter().collect()));
        Ok(())
    }
}

fn tokenizer() -> Tokenizer {
    let text = ["a b c d e f g h a a b b c c"; 4];
    Tokenizer::train(text.into_iter(), &TokenizerOptions::new(280)).unwrap()
}

fn model(vocab: usize) -> Model {
    let config: ModelConfig = serde_json::from_value(serde_json::json!({
        "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5,
        "max_position_embeddings": 64, "num_nextn_predict_layers": 1, "initializer_range": 0.1,
    }))
    .unwrap();
    Model::init(&config, Precision::F32, 3).unwrap()
}

fn records() -> Vec<PromptRecord> {
    let record = |text: &str| PromptRecord {
        at: Location { path: "p".into(), place: Place::Line(1) },
        messages: vec![Message::user(text)],
        answer: "1".to_owned(),
        task: Some("letters".to_owned()),
        solution: None,
        metadata: serde_json::Map::new(),
    };
    ["a b", "c d", "e"].into_iter().map(record).collect()
}

fn config() -> RlConfig {
    RlConfig {
        prompts_per_step: 2,
        group: 6,
        tokens_max: 6,
        lr: LrSchedule::constant(1e-2),
        micro_batch_tokens: 64,
        ..RlConfig::default()
    }
}

/// Runs 24 steps on from whatever checkpoint is there, or until it is stopped.
fn run(memory: &Memory, stop_at: Option<u64>) -> Trainer {
    let cancel = Cancel::new();
    let scorer = Letters { stop_at, cancel: cancel.clone() };
    run_with(config(), &scorer, &cancel, memory, stop_at.is_none())
}

fn run_with(config: RlConfig, scorer: &dyn Scorer, cancel: &Cancel, memory: &Memory, ends_well: bool) -> Trainer {
    let tokenizer = tokenizer();
    let start = model(tokenizer.vocab_size());
    let mut work = Rl {
        config,
        prompts: rollout::prompts(&records(), &ChatTemplate::default(), &tokenizer).unwrap(),
        scorer,
        tokenizer: &tokenizer,
        reference: start.clone(),
        seed: 11,
        cancel,
        probe: None,
    };
    let adamw = AdamWConfig { weight_decay: 0.0, ..AdamWConfig::default() };
    let mut trainer = Trainer::new(start, TrainerConfig { adamw, ..TrainerConfig::default() }).unwrap();
    let events = Events::none();
    let clock = VirtualClock::default();
    let host = TrainHost { stage: "rl", events: &events, cancel, clock: &clock, checkpoints: memory, as_it_is: false };
    let options = RunOptions {
        checkpoint: CheckpointEvery { steps: Some(2), minutes: None, shards: 3 },
        guard: GuardConfig::finite_only(),
        ..RunOptions::new(Horizon::Steps(24))
    };
    let ended = run_training(&mut trainer, &mut work, &host, &options);
    assert_eq!(ended.is_ok(), ends_well, "{ended:?}");
    trainer
}

#[test]
fn rewards_rise_and_an_interruption_leaves_no_trace() {
    let whole = run(&Memory::default(), None);
    let figures = &whole.state.figures;
    let reward = figures.get("reward_mean").unwrap();
    assert!(reward.late_mean() > reward.first + 0.5, "{reward:?}");
    assert!(figures.get("logprob_gap_max").unwrap().last < 1e-3);
    assert!(figures.get("kl").unwrap().last > 0.0 && figures.get("entropy").unwrap().last > 0.0);
    assert_eq!(figures.get("reward.a"), figures.get("reward_mean"));

    let memory = Memory::default();
    assert_eq!(run(&memory, Some(9)).state.step, 9);
    let resumed = run(&memory, None);
    let (a, b) = (whole.snapshot().unwrap(), resumed.snapshot().unwrap());
    assert_eq!(a.state, b.state);
    assert!(a.files == b.files, "weights differ");
}

/// Gives every completion the same reward and notes what it is asked: number of the batch, prompts of its items.
struct Constant {
    reward: f64,
    asked: RefCell<Vec<(u64, Vec<String>)>>,
}

impl Scorer for Constant {
    fn score(&self, batch: u64, items: &[RewardItem<'_>]) -> Result<Vec<Scored>> {
        self.asked.borrow_mut().push((batch, items.iter().map(|item| item.prompt.to_owned()).collect()));
        Ok(vec![Scored { total: self.reward, parts: Vec::new() }; items.len()])
    }
}

#[test]
fn every_completion_is_scored_once_and_equal_rewards_teach_nothing() {
    for (reward, beta) in [(0.7, 0.0), (0.0, 0.0), (1e9 / 3.0, 0.0), (-0.1, 0.0), (0.7, 0.5)] {
        let objective = dsv3_train::grpo::GrpoConfig { kl_beta: beta, ..Default::default() };
        let scorer = Constant { reward, asked: RefCell::default() };
        let config = RlConfig { objective, ..config() };
        let trainer = run_with(config.clone(), &scorer, &Cancel::new(), &Memory::default(), true);
        let asked = scorer.asked.into_inner();
        let batches: Vec<u64> = asked.iter().map(|(batch, _)| *batch).collect();
        assert_eq!(batches, (1..=24).collect::<Vec<u64>>(), "one batch a step");
        for (_, prompts) in &asked {
            assert_eq!(prompts.len(), config.prompts_per_step * config.group, "as many items as completions");
            let mut groups = prompts.chunks(config.group);
            assert!(groups.all(|group| group.iter().all(|prompt| *prompt == group[0])));
        }
        let before = model(tokenizer().vocab_size());
        let bits = |model: &Model| -> Vec<u32> {
            let masters = model.params().iter().filter_map(|param| param.master.as_ref());
            masters.flat_map(|master| master.as_f32().iter().map(|value| value.to_bits())).collect()
        };
        assert_eq!(trainer.model.biases(), before.biases());
        assert!(bits(&trainer.model) == bits(&before), "reward {reward}, beta {beta}: a weight has changed");
    }
}

#[test]
fn rewards_of_other_completions_teach_nothing_useful() {
    let gain = |control| {
        let (cancel, config) = (Cancel::new(), RlConfig { control, ..config() });
        let scorer = Letters { stop_at: None, cancel: cancel.clone() };
        let trainer = run_with(config, &scorer, &cancel, &Memory::default(), true);
        let figure = trainer.state.figures.get("reward_mean").unwrap();
        figure.late_mean() - figure.first
    };
    let (honest, permuted) = (gain(None), gain(Some(Control::PermutedRewards)));
    assert!(honest > 0.5 && permuted < honest / 4.0, "{honest} {permuted}");
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let config = RlConfig { group: 1, minibatches: 1, temperature: 0.0, ..RlConfig::default() };
    let paths: Vec<String> = config.check(Horizon::Steps(4)).into_iter().map(|(path, _)| path).collect();
    assert_eq!(paths, ["group", "minibatches", "temperature"]);
}
