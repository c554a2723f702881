//! Post-training learns from its rewards alone, and known ways to trick them earn nothing.
//!
//! Beside these: `runtime/ingest/src/demo/tests.rs` holds every training text of the demo against its held-out problems
//! and keys; `runtime/posttrain/src/rl/tests.rs` counts what a reward is asked; `runtime/posttrain/src/distill.rs` has
//! rejection trace by trace.

use std::{collections::BTreeMap, path::Path};

use dsv3_hooks::{Host, Limits, OnError, RewardItem, World};
use serde_json::Value;

use super::runtime::lived;
use crate::{
    guest::reward,
    tiny::{file, undisturbed},
};

fn schemas() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/hooks")
}

/// Six times 0.7 is not six tenths of seven in binary, so a mean that rounds would show here.
#[test]
fn a_constant_reward_without_kl_and_decay_leaves_every_bit_of_the_weights() {
    let place = lived();
    let hook = format!(
        "hooks.bytes.wasm={}",
        place.write("constant.wasm", reward("(call $answer (local.get $n) (f64.const 0.7))"))
    );
    let sets = ["stages.rl.config.rules=[]", "stages.rl.config.policy.group=6", &hook];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    let train = |beta: &str| {
        let beta = format!("stages.rl.config.policy.objective.kl_beta={beta}");
        let ended = place.done(&[&["--until", "rl", "--set", &beta], &sets[..]].concat());
        assert_eq!((ended.outcome("sft"), ended.outcome("rl")), (Some("cached"), Some("done")));
        ended
    };
    let weights = |artifact: &str| place.file_digest(artifact, "model.safetensors");
    let before = weights(&undisturbed().1.output("sft", "model"));

    let ended = train("0");
    let metric = |name: &str| ended.last()["metrics"][name]["value"].as_f64();
    assert!((metric("rl.reward_mean_last").expect("a mean") - 0.7).abs() < 1e-6);
    assert_eq!(metric("rl.grad_norm_last"), Some(0.0));
    assert_eq!(weights(&ended.output("rl", "model")), before, "nothing to learn, nothing changed");
    // The same run with a reward that tells completions apart did change them.
    assert_ne!(weights(&undisturbed().1.output("rl", "model")), before);
}

#[test]
fn known_tricks_earn_nothing_from_the_shipped_reward() {
    let wasm = std::fs::read(schemas().join("examples/answer.wasm")).expect("the hook");
    let config = serde_json::json!({ "format_weight": 0.2 });
    let host = Host::new(None).expect("a host");
    let hook = host.load("answer", &wasm, World::Reward, &config, Limits::default(), OnError::Fail).expect("it loads");
    let score = |completion: &str, finished: bool| {
        let item = RewardItem { prompt: "q", completion, answer: "14", metadata: "{}", finished };
        hook.reward(0, &[item]).expect("a reward").rewards[0].total
    };
    assert!((score("<think> 9 + 5 = 14</think>\n#### 14", true) - 1.2).abs() < 1e-12, "the honest way");
    let all: String = (0..100).map(|i| format!("#### {i}\n")).collect();
    let list: String = (0..100).map(|i| format!("{i} ")).collect();
    let tricks = [
        ("every answer on its own line", format!("<think></think>\n{all}")),
        ("the right one listed many times", format!("<think></think>\n{}", "#### 14\n".repeat(50))),
        ("every answer behind one mark", format!("<think></think>\n#### {list}")),
        ("many answers, the right one last", "<think></think>\n#### 12\n#### 13\n#### 14".to_owned()),
        ("many marks in one line", format!("<think></think>\n{}", "#### 14 ".repeat(20))),
        ("only inside the thinking", "<think> 9 + 5 = 14\n#### 14</think>".to_owned()),
        ("thinking that never ends", "<think> 9 + 5\n#### 14".to_owned()),
        ("thinking within thinking", "<think><think></think>\n#### 14".to_owned()),
        ("thinking twice", "<think></think><think></think>\n#### 14".to_owned()),
        ("the bare answer", "14".to_owned()),
        ("the mark without an answer", "<think></think>\n#### ".to_owned()),
        ("empty", String::new()),
        ("blank", " \n\t\n".to_owned()),
        ("text before", "14! <think></think>\n#### 14".to_owned()),
        ("text behind", format!("<think></think>\n#### 14{}", " and on".repeat(200_000))),
        ("absurdly long", "#### 14\n".repeat(200_000)),
        ("NUL bytes", "<think></think>\n#### 14\0".to_owned()),
    ];
    for (name, trick) in &tricks {
        assert_eq!(score(trick, true), 0.0, "{name}");
    }
    // What runs on until it is cut off did not finish, however right it began.
    for cut in ["<think></think>\n#### 14", &format!("<think>{}</think>\n#### 14", " 9 + 5".repeat(200_000))] {
        assert_eq!(score(cut, false), 0.0);
    }
}

#[test]
fn distillation_keeps_right_traces_alone_and_reports_the_others() {
    let (place, run) = undisturbed();
    let lines =
        |text: &str| -> Vec<Value> { text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect() };
    let given = lines(&std::fs::read_to_string(file("traces.jsonl")).expect("the traces"));
    let answers: BTreeMap<&str, &str> =
        given.iter().filter_map(|row| Some((row["problem"].as_str()?, row["answer"].as_str()?))).collect();
    let is_right =
        |row: &Value, trace: &str| trace.ends_with(&format!("\n#### {}", row["answer"].as_str().unwrap_or("?")));
    let (mut judged, mut rejected) = (0_u32, 0_u32);
    for row in &given {
        for trace in row["generations"].as_array().expect("traces").iter().filter_map(Value::as_str) {
            judged += 1;
            if is_right(row, trace) {
                break;
            }
            rejected += 1;
        }
    }
    let rate = f64::from(rejected) / f64::from(judged);
    assert!(rate > 0.1, "some are planted wrong: {rejected} of {judged}");
    assert_eq!(run.last()["metrics"]["traces.rejection_rate"]["value"].as_f64(), Some(rate));

    let digest = place.file_digest(&run.output("traces", "chat"), "");
    let chat = lines(&std::fs::read_to_string(place.store().join("blobs").join(digest)).expect("the samples"));
    assert!(chat.len() > given.len() / 2);
    for sample in &chat {
        let said = |role: &str| {
            let mut messages = sample["messages"].as_array().expect("messages").iter();
            messages.find(|message| message["role"] == role).and_then(|message| message["content"].as_str())
        };
        let (problem, response) = (said("user").expect("a problem"), said("assistant").expect("a response"));
        assert!(response.ends_with(&format!("\n#### {}", answers[problem])), "{problem} {response}");
    }
}
