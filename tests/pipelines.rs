//! The recipes: shipped ones are complete, the full-size one plans to the published numbers, the tiny one lives its whole
//! life, and a life can begin in its middle with a model made elsewhere.

use std::{collections::BTreeSet, path::Path, time::Instant};

use dsv3_pipeline::{ALL, Engine, LoadOptions};
use serde_json::Value;

use crate::tiny::{Place, file, recipe, undisturbed};

fn pipelines() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines")
}

#[test]
fn every_shipped_pipeline_validates() {
    let engine = Engine::builder().stages(ALL).build();
    let mut seen = BTreeSet::new();
    for entry in std::fs::read_dir(pipelines()).expect("the pipelines").flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        if let Err(problems) = engine.load(&path, &LoadOptions::default()) {
            panic!("{}\n{problems}", path.display());
        }
        let text = std::fs::read_to_string(&path).expect("a pipeline");
        assert!(text.starts_with("# yaml-language-server: $schema="), "{} names its schema", path.display());
        seen.insert(entry.file_name().to_string_lossy().into_owned());
    }
    for name in ["balance.yaml", "full.yaml", "my-data.yaml", "pretrain.yaml", "v3-671b.yaml"] {
        assert!(seen.contains(name), "{name} in {seen:?}");
    }
}

/// Tokens consumed by the first `steps` steps of the published batch ramp: 3072 to 15360 sequences of 4096 tokens, growing
/// with the tokens up to 469B, in multiples of 16.
fn ramp_tokens(steps: u64) -> u64 {
    (0..steps).fold(0, |tokens, _| {
        let sequences = 3072 + (u128::from(tokens) * (15360 - 3072) / 469_000_000_000) as u64;
        tokens + sequences / 16 * 16 * 4096
    })
}

/// reference/deepseek-v3.md §6 and §14, by the token counts that are named there.
#[test]
fn the_full_size_plans_to_the_published_numbers() {
    let place = Place::new();
    let path = pipelines().join("v3-671b.yaml").display().to_string();
    let warmed = ramp_tokens(2000).to_string();
    // LR, batch, λ and γ; tokens as on the command line.
    let points = [
        ("0", "LR 0e0, batch 3072, λ 0.3, γ 0.001"),
        (&warmed, "LR 2.2e-4, batch 3792, λ 0.3, γ 0.001"),
        ("469B", "LR 2.2e-4, batch 15360, λ 0.3, γ 0.001"),
        ("10T", "LR 2.2e-4, batch 15360, λ 0.1, γ 0.001"),
        ("14.3T", "LR 2.2e-5, batch 15360, λ 0.1, γ 0"),
        ("14.633T", "LR 7.3e-6, batch 15360, λ 0.1, γ 0"),
        ("14.8T", "LR 7.3e-6, batch 15360, λ 0.1, γ 0"),
    ];
    let mut args = vec!["plan", &path];
    points.iter().for_each(|(tokens, _)| args.extend(["--at", tokens]));
    let planned = place.watch(&args, |_| None);
    assert_eq!(planned.code, Some(0), "{}", planned.errors);
    let base = planned.events.iter().find(|stage| stage["stage"] == "base").expect("the stage");
    assert_eq!((&base["state"], &base["waits_for"]), (&"waits".into(), &"corpus".into()));
    let facts: Vec<(&str, &str)> = base["facts"]
        .as_array()
        .expect("facts")
        .iter()
        .filter_map(|fact| Some((fact[0].as_str()?, fact[1].as_str()?)))
        .collect();
    for fact in [
        ("parameters", "671,026,419,200"),
        ("active parameters", "36,625,618,432"),
        ("parameters with MTP as stored", "684,489,845,504"),
    ] {
        assert!(facts.contains(&fact), "{fact:?} in {facts:?}");
    }
    let at: Vec<&str> = facts.iter().filter(|(name, _)| name.starts_with("at ")).map(|(_, text)| *text).collect();
    assert_eq!(at.len(), points.len(), "{at:?}");
    for ((tokens, expected), text) in points.iter().zip(&at) {
        assert!(text.ends_with(&format!(": {expected}")), "{tokens}: {text}");
    }
    assert!(at[1].starts_with("step 2000:"), "{}", at[1]);

    // The same on a screen, parameters without a run or a file left behind.
    let output =
        place.command(&["plan", &path, "--store", "file://./runs", "--at", "14.3T"]).output().expect("it runs");
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(out.contains("671,026,419,200") && out.contains("at 14,300,000,000,000 tokens"), "{out}");
    assert!(!place.store().join("runs").exists(), "planning makes no run");
}

#[test]
fn half_way_down_the_cosine_the_learning_rate_is_the_mean() {
    let place = Place::new();
    let path = pipelines().join("v3-671b.yaml").display().to_string();
    let planned = place.watch(&["plan", &path, "--at", "12.15T"], |_| None);
    let text = planned.events.iter().find(|stage| stage["stage"] == "base").expect("the stage")["facts"].to_string();
    assert!(text.contains("LR 1.21e-4") || text.contains("LR 1.2100"), "{text}");
}

#[test]
fn a_tiny_model_lives_its_whole_life() {
    let (place, run) = undisturbed();
    let kinds = |event: &str| -> BTreeSet<String> {
        let named = run.events.iter().filter(|value| value["event"] == event);
        named.filter_map(|value| value["kind"].as_str().map(str::to_owned)).collect()
    };
    let all: BTreeSet<String> = ALL.iter().map(|stage| stage.name.to_owned()).collect();
    assert_eq!(kinds("stage_started"), all, "every stage type has its part");
    let metrics = &run.last()["metrics"];
    let value = |name: &str| {
        let value = metrics[name]["value"].as_f64();
        value.unwrap_or_else(|| panic!("{name} in {metrics:#}"))
    };
    assert_eq!(
        (metrics["base.val_loss_ratio"]["ok"].as_bool(), value("base.val_loss_ratio") < 1.0),
        (Some(true), true)
    );
    assert!(metrics["base.val_loss_ratio"]["floor"].is_number());
    for name in [
        "corpus.documents_out",
        "base.loss_mtp_1_last",
        "base.load_max_mean_late",
        "extended.needle.128.words_gain",
        "extended.needle.words_base.128.30",
        "extended.needle.words_yarn_untrained.128.30",
        "extended.needle.words.128.30",
        "traces.rejection_rate",
        "sft.loss_last",
        "rl.reward_mean_last",
        "rl.reward_std_last",
        "rl.kl_last",
        "rl.entropy_last",
        "rl.clip_fraction_last",
        "rl.length_mean_last",
        "rl.logprob_gap_max_last",
        "evaluation.exact.accuracy_gain",
        "evaluation.choice.accuracy",
        "evaluation.needle.128.words",
        "evaluation.needle.words_before.128.70",
        "evaluation.needle.words_gain.128.70",
        "server.tokens_per_second",
        "server.draft_acceptance",
    ] {
        assert!(value(name).is_finite(), "{name}");
    }
    assert!(value("traces.rejection_rate") > 0.2, "some traces are planted wrong");
    assert!(value("rl.kl_last") > 0.0 && value("rl.grad_norm_last") > 0.0, "the policy moves");
    assert!(value("sft.loss_last") < value("sft.loss_first"));

    // Again, and nothing is left to do.
    let started = Instant::now();
    let again = place.done(&["--threads", "2"]);
    assert!(started.elapsed().as_secs_f64() < 2.0, "{:?}", started.elapsed());
    assert_eq!(again.events.iter().filter(|event| event["event"] == "stage_started").count(), 0);
    let outcomes = again.events.iter().filter(|event| event["event"] == "stage_finished");
    assert!(outcomes.map(|event| &event["outcome"]).all(|outcome| outcome == "cached"));
    assert_eq!(&again.last()["metrics"], metrics, "closing figures come back from the store");
}

#[test]
fn a_life_begins_in_its_middle_with_a_plain_folder() {
    let place = Place::new();
    let words = file("words.yaml");
    let run = place.watch(&["run", &words], |_| None);
    assert_eq!(run.code, Some(0), "{}", run.errors);
    let metrics = &run.last()["metrics"];
    // Twelve conversations; three to six words of the assistant and an end of sequence in each.
    assert_eq!(metrics["sft.conversations"]["value"], 12.0);
    assert_eq!(metrics["sft.assistant_tokens"]["value"], 66.0);
    assert!(metrics["sft.loss_last"]["value"].as_f64() < metrics["sft.loss_first"]["value"].as_f64());
    // The new model carries its template, so that the next stage needs none.
    let config = place.file_digest(&run.output("sft", "model"), "tokenizer_config.json");
    let config = std::fs::read(place.store().join("blobs").join(config)).expect("a blob");
    let config: Value = serde_json::from_slice(&config).expect("JSON");
    assert!(config["chat_template"].as_str().is_some_and(|template| template.contains("t2 {{ message.content }}")));
    assert_eq!(config["eos_token"], "t1");

    let without = "stages.sft.config.chat_template=null";
    for command in ["validate", "run"] {
        let refused = place.command(&[command, &words, "--set", without]).output().expect("it runs");
        let errors = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(64), "{errors}");
        assert!(errors.contains("has no chat template") && errors.contains("help: set chat_template"), "{errors}");
    }
    // A folder that brings one needs none in the config.
    let folder = place.path().join("model");
    std::fs::create_dir(&folder).expect("a folder");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/hf-tiny");
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(source.join(name), folder.join(name)).expect("a copy");
    }
    std::fs::write(folder.join("chat_template.jinja"), "{{ bos_token }}").expect("written");
    let model = format!("model={}", folder.display());
    let output = place.command(&["validate", &words, "--set", &model, "--set", without]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_tiny_recipe_is_a_pipeline_like_any_other() {
    let engine = Engine::builder().stages(ALL).build();
    for path in [recipe(), file("words.yaml")] {
        if let Err(problems) = engine.load(Path::new(&path), &LoadOptions::default()) {
            panic!("{problems}");
        }
    }
}
