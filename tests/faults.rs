//! `kill -9` in the middle of every training stage, and a polite stop: nothing that was committed is lost, the next run
//! goes on at the step after the checkpoint, and the final outputs are those of an undisturbed run, with another number
//! of threads too.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use dsv3_core::Rng;
use serde_json::Value;

/// Kills in each training stage.
const KILLS: usize = 3;
/// Steps between two checkpoints of every stage below.
const INTERVAL: u64 = 2;
/// The training stages with their number of steps.
const STAGES: [(&str, u64); 4] = [("base", 14), ("extended", 14), ("sft", 14), ("rl", 8)];

/// A small model's life up to reinforcement learning.
const PIPELINE: &str = r#"
version: 1
seed: 11
hooks:
  answer: { wasm: ROOT/schemas/hooks/examples/answer.wasm, world: reward }
x-training: &training { precision: { fp8: {} }, checkpoint: { steps: 2 }, micro_batch_tokens: 512 }
x-schedules: &schedules
  lr: { segments: [{ shape: constant, lr: 1.0e-3 }] }
  batch: { sequences: 16 }
  mtp_weight: { value: 0.3 }
stages:
  corpus:
    type: ingest
    inputs: { documents: documents.jsonl }
    config: { vocab_size: 300, row_tokens: 32 }
  base:
    type: pretrain
    inputs: { tokens: corpus.tokens, tokenizer: corpus.tokenizer }
    config:
      model:
        { vocab_size: 300, hidden_size: 64, num_hidden_layers: 2, first_k_dense_replace: 1, intermediate_size: 128,
          num_attention_heads: 2, q_lora_rank: 16, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8,
          v_head_dim: 8, n_routed_experts: 4, num_experts_per_tok: 2, n_group: 2, topk_group: 1,
          moe_intermediate_size: 16, num_nextn_predict_layers: 1, max_position_embeddings: 64, bos_token_id: 0,
          eos_token_id: 1, pad_token_id: 2 }
      sequence_tokens: 32
      length: { steps: 14 }
      schedules:
        <<: *schedules
        bias_speed: { value: 0.01 }
      training: *training
  extended:
    type: context_extension
    inputs: { model: base.model, tokens: [corpus.tokens] }
    config:
      rope_scaling: { type: yarn, factor: 4, original_max_position_embeddings: 64 }
      max_position_embeddings: 256
      phases: [{ sequence_tokens: 64, length: { steps: 14 }, schedules: *schedules }]
      training: *training
  sft:
    type: sft
    inputs: { model: extended.model, chat: chat.jsonl }
    config: { epochs: 1, schedules: *schedules, training: *training }
  rl:
    type: rl
    inputs: { model: sft.model, prompts: prompts.jsonl }
    hooks: { reward: answer }
    config:
      steps: 8
      policy: { prompts_per_step: 4, group: 8, minibatches: 2, tokens_max: 24 }
      training: *training
"#;

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).expect("a written file");
        write("p.yaml", PIPELINE.replace("ROOT", env!("CARGO_MANIFEST_DIR")));
        let documents = (0..1600).map(|i| {
            format!("{{\"text\": \"the sum of {i} and {} is {}, as {} knew\"}}\n", i % 7, i + i % 7, i * 31 % 97)
        });
        write("documents.jsonl", documents.collect());
        let chat =
            (0..224).map(|i| format!("{{\"prompt\": \"sum of {i} and 2\", \"completion\": \"it is {}\"}}\n", i + 2));
        write("chat.jsonl", chat.collect());
        let prompts = (0..32).map(|i| format!("{{\"prompt\": \"sum of {i} and 3\", \"answer\": \"{}\"}}\n", i + 3));
        write("prompts.jsonl", prompts.collect());
        Self(dir)
    }

    fn start(&self, threads: &str) -> Child {
        Command::new(env!("CARGO_BIN_EXE_dsv3-pipeline"))
            .args(["run", "p.yaml", "--json", "--threads", threads])
            .current_dir(self.0.path())
            .env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program runs")
    }

    /// Outputs of every stage, from the results in the store.
    fn outputs(&self) -> Vec<Value> {
        let mut outputs = Vec::new();
        for entry in std::fs::read_dir(self.0.path().join("runs/stages")).expect("stages").flatten() {
            let text = std::fs::read_to_string(entry.path().join("result.json")).expect("a result of every stage");
            let result: Value = serde_json::from_str(&text).expect("a result");
            outputs.push(serde_json::json!([result["type"], result["key"], result["outputs"]]));
        }
        outputs.sort_by_key(Value::to_string);
        outputs
    }
}

/// What one process was seen to do.
#[derive(Default)]
struct Seen {
    /// Stage and step of the last checkpoint.
    checkpoint: Option<(String, u64)>,
    /// Of each stage that began: where it resumed and the first step it reported.
    began: Vec<(String, Option<u64>, Option<u64>)>,
    code: Option<i32>,
    errors: String,
}

/// Follows a process to its end. When `stage` reports step `at`, it is sent `signal`.
fn follow(mut child: Child, mut stop: Option<(&str, u64, i32)>) -> Seen {
    let mut seen = Seen::default();
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    for line in lines.map_while(Result::ok) {
        // The last line of a killed process may be cut.
        let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
        let stage = event["stage"].as_str().unwrap_or_default().to_owned();
        let step = event["step"].as_u64();
        match event["event"].as_str() {
            Some("stage_started") => seen.began.push((stage, event["resumed_from"].as_u64(), None)),
            Some("checkpoint") => seen.checkpoint = step.map(|step| (stage, step)),
            Some("metric") => {
                if let Some(last) = seen.began.last_mut().filter(|last| last.0 == stage) {
                    last.2 = last.2.or(step);
                }
                if let Some((wanted, at, signal)) = stop
                    && wanted == stage
                    && step >= Some(at)
                {
                    // SAFETY: `kill` only sends a signal; the child is ours and has not been waited for.
                    #[allow(unsafe_code)]
                    let sent = unsafe { libc::kill(child.id() as i32, signal) };
                    assert_eq!(sent, 0);
                    // A second interrupt would end it at once.
                    stop = None;
                    if signal == libc::SIGKILL {
                        break;
                    }
                }
            }
            _ => {}
        }
    }
    let output = child.wait_with_output().expect("an end");
    seen.code = output.status.code();
    seen.errors = String::from_utf8_lossy(&output.stderr).into_owned();
    seen
}

#[test]
fn killed_runs_end_with_the_bits_of_an_undisturbed_one() {
    let calm = Dir::new();
    let whole = follow(calm.start("2"), None);
    assert_eq!(whole.code, Some(0), "{}", whole.errors);
    assert!(whole.began.iter().all(|(_, resumed, _)| resumed.is_none()));

    let disturbed = Dir::new();
    let mut rng = Rng::new(5).key("kills");
    for (stage, steps) in STAGES {
        // Moments of the kills: rising, so that each attempt comes further than the one before.
        let mut at: Vec<u64> = (0..KILLS).map(|_| 1 + rng.below(steps - 4)).collect();
        at.sort_unstable();
        for at in at {
            let seen = follow(disturbed.start("1"), Some((stage, at, libc::SIGKILL)));
            assert_eq!(seen.code, None, "{stage} was to be killed at {at}: {}", seen.errors);
            check_beginnings(&seen);
        }
    }
    let last = follow(disturbed.start("1"), None);
    assert_eq!(last.code, Some(0), "{}", last.errors);
    check_beginnings(&last);
    assert_eq!(disturbed.outputs(), calm.outputs());
}

/// A resumed stage goes on at the step after its checkpoint: no step is skipped and none is done twice.
fn check_beginnings(seen: &Seen) {
    for (stage, resumed, first) in &seen.began {
        if let (Some(resumed), Some(first)) = (resumed, first) {
            assert_eq!(*first, resumed + 1, "{stage}");
        }
    }
}

#[test]
fn a_polite_stop_checkpoints_exits_75_and_goes_on() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1] {
        let dir = Dir::new();
        let stopped = follow(dir.start("2"), Some(("base", 3, signal)));
        assert_eq!(stopped.code, Some(75), "{}", stopped.errors);
        let (stage, step) = stopped.checkpoint.clone().expect("a checkpoint");
        assert_eq!(stage, "base");
        assert!(step >= 3, "the stop itself makes a checkpoint, {INTERVAL} steps apart or not");
        if signal == libc::SIGTERM {
            let resumed = follow(dir.start("2"), None);
            assert_eq!(resumed.code, Some(0), "{}", resumed.errors);
            assert_eq!(resumed.began[0], ("base".to_owned(), Some(step), Some(step + 1)));
        }
    }
}
