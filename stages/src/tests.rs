//! What stages refuse before anything runs, by the dotted path of the problem, and what they say of their outputs.

use dsv3_stage::{InputFacts, PortFacts, Problems, StageEntry};
use serde_json::{Value, json};

use crate::ALL;

fn stage(name: &str) -> &'static StageEntry {
    ALL.iter().find(|stage| stage.name == name).unwrap()
}

/// A small model of 300 rows and 64 positions.
fn model() -> Value {
    json!({
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 1,
        "intermediate_size": 48, "num_attention_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 4, "topk_group": 2, "moe_intermediate_size": 16, "max_position_embeddings": 64
    })
}

fn schedules() -> Value {
    json!({ "lr": { "segments": [{ "shape": "constant", "lr": 1e-3 }] }, "batch": { "sequences": 8 } })
}

/// Ports filled by other stages, which say this of their outputs.
fn facts(ports: &[(&str, Value)]) -> InputFacts {
    let mut facts = InputFacts::default();
    ports.iter().for_each(|(port, said)| facts.push(port, PortFacts::Upstream(said.clone())));
    facts
}

/// A model that another stage trained.
fn trained(has_template: bool) -> (&'static str, Value) {
    let defaults = pretrain(json!({}));
    let said = stage("pretrain").facts(&defaults, &InputFacts::default());
    let mut said = said["model"].clone();
    said["chat_template"] = has_template.into();
    ("model", said)
}

fn merged(mut base: Value, with: Value) -> Value {
    for (key, value) in with.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}

fn pretrain(with: Value) -> Value {
    let base = json!({
        "model": model(), "sequence_tokens": 32, "length": { "steps": 10 }, "schedules": schedules()
    });
    merged(base, with)
}

fn extension(with: Value) -> Value {
    let phase = json!({ "sequence_tokens": 128, "length": { "steps": 2 }, "schedules": schedules() });
    let yarn = json!({ "type": "yarn", "factor": 2, "original_max_position_embeddings": 64 });
    merged(json!({ "rope_scaling": yarn, "max_position_embeddings": 128, "phases": [phase] }), with)
}

/// Paths of all problems, after the config fitted its type.
fn paths(name: &str, config: &Value, facts: &InputFacts) -> Vec<String> {
    let shape = stage(name).check_shape(config);
    assert!(shape.is_empty(), "{name}: {shape:?}");
    let mut problems = Problems::default();
    stage(name).check(&stage(name).resolve_config(config).unwrap(), facts, &mut problems);
    problems.iter().map(|problem| problem.path.clone()).collect()
}

fn refused(name: &str, config: Value, facts: &InputFacts, expected: &[&str]) {
    assert_eq!(paths(name, &config, facts), expected, "{name} {config}");
}

#[test]
fn all_names_are_different_and_every_stage_says_what_it_is() {
    for (i, stage) in ALL.iter().enumerate() {
        assert!(ALL[..i].iter().all(|other| other.name != stage.name), "{}", stage.name);
        assert!(!stage.about.is_empty() && !stage.outputs().is_empty());
    }
}

#[test]
fn pretrain_holds_numbers_against_each_other() {
    let tokens = |vocab: u64| {
        facts(&[("tokens", json!({ "vocab_size": vocab })), ("tokenizer", json!({ "vocab_size": vocab }))])
    };
    refused("pretrain", pretrain(json!({})), &tokens(300), &[]);
    refused("pretrain", pretrain(json!({ "sequence_tokens": 65 })), &tokens(300), &["config.sequence_tokens"]);
    let small = ["config.model.vocab_size"; 2];
    refused("pretrain", pretrain(json!({})), &tokens(301), &small);
    let groups = merged(model(), json!({ "n_group": 3 }));
    let found = paths("pretrain", &pretrain(json!({ "model": groups })), &tokens(300));
    assert!(found.iter().any(|path| path == "config.model.n_group"), "{found:?}");
    refused("pretrain", pretrain(json!({ "length": { "steps": 0 } })), &tokens(300), &["config.length"]);
    let training = json!({ "micro_batch_tokens": 0, "balance_alpha": -1 });
    let expected = ["config.training.micro_batch_tokens", "config.training.balance_alpha"];
    refused("pretrain", pretrain(json!({ "training": training })), &tokens(300), &expected);
    refused("pretrain", pretrain(json!({ "chat_template": "{% for" })), &tokens(300), &["config.chat_template"]);
}

#[test]
fn schedules_of_epochs_are_refused_only_for_what_holds_at_any_length() {
    let none = InputFacts::default();
    let with = |segments: Value| {
        let schedules = merged(schedules(), json!({ "lr": { "segments": segments } }));
        pretrain(json!({ "length": { "epochs": 1 }, "schedules": schedules }))
    };
    let last = json!({ "shape": "constant", "lr": 1e-4 });
    let until = |extent: Value| json!({ "shape": "constant", "lr": 1e-3, "until": extent });
    let mixed = [until(json!({ "tokens": 10_000 })), until(json!({ "fraction": 0.9 })), last.clone()];
    refused("pretrain", with(json!(mixed)), &none, &[]);
    let backwards = [until(json!({ "fraction": 0.9 })), until(json!({ "fraction": 0.5 })), last.clone()];
    refused("pretrain", with(json!(backwards)), &none, &["config.schedules.lr.segments.1.until"]);
    let steps = [until(json!({ "steps": 5 })), last];
    refused("pretrain", with(json!(steps)), &none, &["config.schedules.lr.segments.0.until"]);
}

#[test]
fn context_extension_holds_positions_against_yarn() {
    let known = facts(&[trained(true), ("tokens", json!({ "vocab_size": 300 }))]);
    refused("context_extension", extension(json!({})), &known, &[]);
    let far = extension(json!({ "max_position_embeddings": 129 }));
    refused("context_extension", far, &known, &["config.max_position_embeddings"]);
    let yarn = json!({ "type": "yarn", "factor": 2, "original_max_position_embeddings": 64, "beta_fast": 0.5 });
    let expected = ["config.rope_scaling.beta_fast"];
    refused("context_extension", extension(json!({ "rope_scaling": yarn })), &known, &expected);
    let short = extension(json!({ "max_position_embeddings": 100 }));
    refused("context_extension", short, &known, &["config.phases.0.sequence_tokens"]);
    refused("context_extension", extension(json!({ "phases": [] })), &known, &["config.phases"]);
    let mut two = known.clone();
    two.push("tokens", PortFacts::Upstream(json!({ "vocab_size": 300 })));
    refused("context_extension", extension(json!({})), &two, &["inputs.tokens"]);
    let foreign = facts(&[trained(true), ("tokens", json!({ "vocab_size": 301 }))]);
    refused("context_extension", extension(json!({})), &foreign, &["inputs.tokens"]);
    let said = stage("context_extension").facts(&extension(json!({})), &known);
    assert_eq!(said["model"]["config"]["max_position_embeddings"], 128);
    assert_eq!(said["model"]["config"]["rope_scaling"]["factor"], 2.0);
}

#[test]
fn post_training_needs_a_template_a_reward_and_room() {
    let (with, without) = (facts(&[trained(true)]), facts(&[trained(false)]));
    let sft = |more: Value| merged(json!({ "epochs": 1, "schedules": schedules() }), more);
    refused("sft", sft(json!({})), &with, &[]);
    refused("sft", sft(json!({})), &without, &["config.chat_template"]);
    refused("sft", sft(json!({ "chat_template": "{{ bos_token }}" })), &without, &[]);
    refused("sft", sft(json!({ "tokens_max": 65 })), &with, &["config.tokens_max"]);
    let ramp = json!({ "sequences": 8, "ramp": { "from": 2, "until": { "fraction": 0.5 } } });
    let ramped = sft(json!({ "schedules": merged(schedules(), json!({ "batch": ramp })) }));
    refused("sft", ramped, &with, &["config.schedules.batch.ramp"]);

    let rl = |tokens: u64| json!({ "steps": 2, "policy": { "tokens_max": tokens } });
    let mut hooked = with.clone();
    hooked.push_hook("reward");
    refused("rl", rl(8), &hooked, &[]);
    refused("rl", rl(64), &hooked, &["config.policy.tokens_max"]);
    refused("rl", rl(8), &with, &["config.rules"]);
    refused("rl", merged(rl(8), json!({ "rules": [{ "rule": "answer" }] })), &with, &[]);
    refused("distill", json!({}), &InputFacts::default(), &["config.rules"]);
}

#[test]
fn evaluation_and_serving_name_what_does_not_fit() {
    let mut known = facts(&[trained(true)]);
    known.push("data", PortFacts::External(vec!["/data/questions.jsonl".to_owned()]));
    let task = |name: &str, file: &str, tokens: u64| json!({ "name": name, "file": file, "score": { "kind": "exact", "tokens_max": tokens } });
    let tasks = |tasks: &[Value]| json!({ "tasks": tasks });
    refused("evaluate", tasks(&[task("a", "questions.jsonl", 8)]), &known, &[]);
    let bad = [task("a", "questions.jsonl", 64), task("a", "answers.jsonl", 8)];
    let expected = ["config.tasks.0.score.tokens_max", "config.tasks.1.name", "config.tasks.1.file"];
    refused("evaluate", tasks(&bad), &known, &expected);
    let (_, bare) = trained(false);
    known.push("baseline", PortFacts::Upstream(bare));
    refused("evaluate", tasks(&[task("a", "questions.jsonl", 8)]), &known, &["config.chat_template"]);
    refused("serve", json!({ "tokens_max": 64 }), &known, &["config.tokens_max"]);
    refused("serve", json!({ "tokens_max": 0 }), &known, &["config.tokens_max"]);
}

#[test]
fn an_incomplete_model_folder_is_named_part_by_part() {
    let folder = |files: &[&str]| {
        let mut facts = InputFacts::default();
        facts.push("model", PortFacts::External(files.iter().map(|file| format!("/nowhere/{file}")).collect()));
        facts
    };
    for stage in ["export", "serve"] {
        refused(stage, json!({}), &folder(&["model.safetensors", "tokenizer.json"]), &["inputs.model"]);
        let found = paths(stage, &json!({}), &folder(&["config.json", "model.safetensors", "tokenizer.json"]));
        assert_eq!(found, ["inputs.model"], "config.json is not there");
    }
}
