//! The guard on whole pipelines, with real causes: a stretch of poisoned documents whose loss jumps, one poisoned document,
//! and a model folder with an embedding so large that the gradient of whoever reads it overflows. What it did stands in
//! the lineage, in the events and on the screen, and survives kills; without it the poison does its harm.

use std::{collections::BTreeSet, ops::Range, path::Path};

use dsv3_core::{mix64, permute_index};
use dsv3_data::Loader;
use serde_json::{Value, json};

use super::attempts::steps;
use crate::tiny::{Ended, Place, file};

/// Documents of the corpus. Each fills one window of the stream, and the last is never whole.
const DOCUMENTS: u64 = 340;
/// What `poison.yaml` says.
const SEED: u64 = 5;
const SEQUENCE_TOKENS: usize = 32;
const HOLDOUT: u64 = 8;
const BATCH: u64 = 4;
/// Positions of the loading order that are poisoned: the batches of three steps.
const STRETCH: Range<u64> = 200..212;
const STRETCH_STEPS: [u64; 2] = [51, 53];

/// Documents of colours in a fixed order, and in none at the positions of the loading order that are to be poisoned.
fn documents(place: &Place, poisoned: Range<u64>) -> String {
    const COLOURS: [&str; 12] =
        ["red", "orange", "yellow", "green", "blue", "violet", "black", "white", "brown", "grey", "pink", "gold"];
    let loader = Loader::new(DOCUMENTS * SEQUENCE_TOKENS as u64, SEQUENCE_TOKENS, SEED).expect("a loader");
    let loader = loader.with_holdout(HOLDOUT).expect("a loader");
    let bad: BTreeSet<u64> = poisoned.map(|at| loader.window(at).start / SEQUENCE_TOKENS as u64).collect();
    let text = |document: u64| -> String {
        let colour = |i: u64| match bad.contains(&document) {
            false => 5 * document + i,
            true => document + 7 * i * i + i * i * i + 5 * i + i * i / 3,
        };
        (0..12).map(|i| COLOURS[(colour(i) % 12) as usize]).collect::<Vec<_>>().join(" ")
    };
    let lines = (0..DOCUMENTS).map(|i| format!("{}\n", json!({ "text": text(i), "source": "rows" })));
    format!("documents={}", place.write("documents.jsonl", lines.collect::<String>()))
}

/// Runs `poison.yaml` with more arguments.
fn run(place: &Place, documents: &str, more: &[&str], stop: impl FnMut(&Value) -> Option<i32>) -> Ended {
    place.watch(&[&["run", &file("poison.yaml"), "--set", documents], more].concat(), stop)
}

/// Values of a metric in the order in which they came; none for one that is not a number.
fn values(ended: &Ended, stage: &str, name: &str) -> Vec<(u64, Option<f64>)> {
    let events = ended.of("metric", stage).filter(|event| event["name"] == name);
    events.map(|event| (event["step"].as_u64().expect("a step"), event["value"].as_f64())).collect()
}

/// The last value that a metric had at a step.
fn value(ended: &Ended, stage: &str, name: &str, step: u64) -> f64 {
    let mut of_step = values(ended, stage, name).into_iter().filter(|(at, _)| *at == step);
    of_step.next_back().and_then(|(_, value)| value).unwrap_or_else(|| panic!("{name} at {step}: {}", ended.errors))
}

fn warnings(ended: &Ended, stage: &str) -> Vec<String> {
    let logs = ended.of("log", stage).filter(|event| event["level"] == "warn");
    logs.map(|event| event["message"].as_str().expect("text").to_owned()).collect()
}

/// Every float of the model that a stage made is finite.
fn assert_finite(place: &Place, ended: &Ended, stage: &str) {
    let bytes = std::fs::read(place.blob(&place.file_digest(&ended.output(stage, "model"), "model.safetensors")));
    let bytes = bytes.expect("weights");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    for (name, tensor) in tensors.tensors() {
        let values = tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        assert!(values.into_iter().all(f32::is_finite), "{name}");
    }
}

/// Each line is on the screen of a run that finds all finished, and in what `inspect` says beside the record.
fn assert_shown(place: &Place, pipeline: &[&str], stage: &str, lines: &[String]) {
    let store = ["--store", "file://./runs"];
    let screen = place.command(&[&["run"], pipeline, &store].concat()).output().expect("it runs");
    let screen = String::from_utf8_lossy(&screen.stdout);
    let inspected = place.command(&[&["inspect", "last", stage][..], &store].concat()).output().expect("it runs");
    let result: Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
    assert_eq!(result["lineage"]["guard"].as_array().map(Vec::len), Some(lines.len()), "{result:#}");
    let beside = String::from_utf8_lossy(&inspected.stderr);
    let (told, checkpoints) = beside.lines().partition::<Vec<_>, _>(|line| !line.starts_with("checkpoint "));
    assert_eq!(told, lines);
    assert!(!checkpoints.is_empty(), "{beside}");
    for line in lines {
        assert!(screen.lines().any(|shown| shown == format!("{stage}: {line}")), "{line} in\n{screen}");
    }
}

/// A killed or stopped process did a part of what the undisturbed one did, in its order.
fn assert_part(part: &Ended, whole: &Ended) {
    let (part, whole) = (values(part, "base", "loss"), values(whole, "base", "loss"));
    assert!(!part.is_empty() && whole.windows(part.len()).any(|window| window == part), "{part:?}\nin {whole:?}");
}

#[test]
fn a_poisoned_stretch_is_undone_and_left_out() {
    let place = Place::new();
    let documents = documents(&place, STRETCH);
    let guarded = run(&place, &documents, &[], |_| None);
    assert_eq!(guarded.code, Some(0), "{}", guarded.errors);
    let [first, last] = STRETCH_STEPS;
    let result = place.result(&guarded.key("base"));
    let record = &result["lineage"]["guard"][0];
    let loss = record["loss"].as_f64().expect("a loss");
    let expected = json!([{
        "action": "rewound", "step": first, "last_step": last, "samples": [STRETCH.start, STRETCH.end],
        "loss": loss, "back_to_step": first - 1 - (first - 1) % 6,
    }]);
    assert_eq!(result["lineage"]["guard"], expected);
    let line = format!(
        "steps 51 to 53 undone: the loss jumped to {loss:.4} and the run went back to step 48, samples 200..212 are left out"
    );
    assert_eq!(warnings(&guarded, "base"), [line.as_str()]);
    let done: Vec<u64> = values(&guarded, "base", "loss").into_iter().map(|(step, _)| step).collect();
    assert_eq!(done, (1..=53).chain(49..=72).collect::<Vec<_>>());
    assert_finite(&place, &guarded, "base");
    assert_shown(&place, &[&file("poison.yaml"), "--set", &documents], "base", &[line]);

    // The same without the guard: nothing is left out, and the model is worse for it until it has learnt again.
    let off = "stages.base.config.training.guard.spike_steps=0";
    let harmed = run(&place, &documents, &["--set", off], |_| None);
    assert_eq!(harmed.code, Some(0), "{}", harmed.errors);
    assert!(place.result(&harmed.key("base"))["lineage"].get("guard").is_none());
    let loss_at = |ended: &Ended, step: u64| value(ended, "base", "val_loss", step);
    let before = loss_at(&guarded, first - 1);
    assert_eq!(before, loss_at(&harmed, first - 1));
    println!(
        "val_loss {before:.3} before; after the stretch {:.3} with the guard, {:.3} without; at the end {:.3} and {:.3}",
        loss_at(&guarded, last),
        loss_at(&harmed, last),
        loss_at(&guarded, 72),
        loss_at(&harmed, 72)
    );
    assert!(loss_at(&guarded, last) < 1.1 * before && loss_at(&harmed, last) > 2.0 * before);
    assert!(loss_at(&guarded, 72) < loss_at(&harmed, 72));
}

/// Killed under suspicion, in the moment of going back and after the next checkpoint; or stopped politely under suspicion;
/// or with other checkpoints to go back to.
#[test]
fn a_run_disturbed_around_a_rewind_ends_with_the_same_bits() {
    let (calm, place) = (Place::new(), Place::new());
    let documents = documents(&calm, STRETCH);
    let whole = run(&calm, &documents, &[], |_| None);
    let expected = calm.result(&whole.key("base"));
    let is_step = |event: &Value, step: u64| event["name"] == "loss" && event["step"] == step;
    let rewound = |event: &Value| event["event"] == "log" && event["message"].to_string().contains("undone");

    // The checkpoint of step 48 is committed beside the steps; going back waits for it at the latest.
    let mut committed = false;
    let suspected = run(&place, &documents, &["--threads", "1"], |event| {
        committed |= event["event"] == "checkpoint" && event["step"] == 48;
        (committed && (is_step(event, 51) || is_step(event, 52) || is_step(event, 53) || rewound(event)))
            .then_some(libc::SIGKILL)
    });
    let back = run(&place, &documents, &["--threads", "2"], |event| rewound(event).then_some(libc::SIGKILL));
    let mut gone_back = false;
    let after = run(&place, &documents, &["--threads", "1"], |event| {
        gone_back |= rewound(event);
        (gone_back && event["event"] == "checkpoint").then_some(libc::SIGKILL)
    });
    let resumed = |ended: &Ended| ended.of("stage_started", "base").next().expect("it began")["resumed_from"].as_u64();
    for (ended, from) in [(&suspected, None), (&back, Some(48)), (&after, Some(48))] {
        assert_eq!((ended.code, resumed(ended)), (None, from), "{}", ended.errors);
        assert_part(ended, &whole);
    }
    let last = run(&place, &documents, &[], |_| None);
    assert_eq!((last.code, resumed(&last)), (Some(0), Some(54)), "{}", last.errors);
    assert!(warnings(&last, "base").is_empty(), "what the checkpoint remembers is not done again");
    assert_part(&last, &whole);
    let found = place.result(&last.key("base"));
    for part in ["outputs", "metrics", "lineage"] {
        assert_eq!(found[part], expected[part], "{part}");
    }

    // A polite stop under suspicion writes no checkpoint that would keep the poison.
    let place = Place::new();
    let stopped = run(&place, &documents, &[], |event| is_step(event, 52).then_some(libc::SIGTERM));
    assert_eq!(stopped.code, Some(75), "{}", stopped.errors);
    assert_part(&stopped, &whole);
    let last = run(&place, &documents, &[], |_| None);
    assert_part(&last, &whole);
    // One may have been written by a stop that came late; where it lay is all that may differ.
    let found = place.result(&last.key("base"));
    assert_eq!((&found["outputs"], &found["metrics"]), (&expected["outputs"], &expected["metrics"]));

    let place = Place::new();
    let seldom = run(&place, &documents, &["--set", "stages.base.config.training.checkpoint.steps=20"], |_| None);
    let found = place.result(&seldom.key("base"));
    assert_eq!((&found["outputs"], &found["metrics"]), (&expected["outputs"], &expected["metrics"]));
    assert_eq!(found["lineage"]["guard"][0]["back_to_step"], 40);
}

#[test]
fn one_poisoned_document_is_undone_and_left_out() {
    let place = Place::new();
    let documents = documents(&place, 241..242);
    let at_once = "stages.base.config.training.guard.spike_steps=1";
    let guarded = run(&place, &documents, &["--set", at_once], |_| None);
    assert_eq!(guarded.code, Some(0), "{}", guarded.errors);
    let guard = &place.result(&guarded.key("base"))["lineage"]["guard"];
    assert_eq!(guard.as_array().map(Vec::len), Some(1), "{guard:#}");
    assert_eq!((&guard[0]["step"], &guard[0]["samples"]), (&json!(61), &json!([240, 244])));
    // The default waits for three such steps in a row, and the document is learnt from.
    let patient = run(&place, &documents, &[], |_| None);
    assert!(place.result(&patient.key("base"))["lineage"].get("guard").is_none());
    assert!(value(&patient, "base", "loss", 61) > 3.0 * value(&patient, "base", "loss", 60));
}

/// The word that one conversation holds, whose embedding is too large to square.
const HUGE: usize = 60;

/// The toy folder with one embedding row of 3e38, and conversations of which the tenth holds the word.
fn huge(place: &Place) -> [String; 2] {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/hf-tiny");
    let folder = place.path().join("model");
    std::fs::create_dir(&folder).expect("a folder");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(source.join(name), folder.join(name)).expect("a copy");
    }
    let mut weights = std::fs::read(source.join("model.safetensors")).expect("weights");
    let header_bytes = u64::from_le_bytes(*weights.first_chunk().expect("a length")) as usize;
    let header: Value = serde_json::from_slice(&weights[8..8 + header_bytes]).expect("a header");
    let embedding = &header["model.embed_tokens.weight"];
    let width = embedding["shape"][1].as_u64().expect("a width") as usize;
    let start = 8 + header_bytes + embedding["data_offsets"][0].as_u64().expect("an offset") as usize;
    let row = &mut weights[start + HUGE * width * 4..start + (HUGE + 1) * width * 4];
    row.as_chunks_mut::<4>().0.iter_mut().for_each(|value| *value = 3e38_f32.to_le_bytes());
    std::fs::write(folder.join("model.safetensors"), weights).expect("written");
    let chat = std::fs::read_to_string(file("words.jsonl")).expect("conversations");
    let chat = place.write("words.jsonl", chat.replace("t20 t23 t26 t29", &format!("t20 t{HUGE} t26 t29")));
    [format!("model={}", folder.display()), format!("stages.sft.inputs.chat={chat}")]
}

/// Steps whose batch of four holds the tenth of ten conversations, in two passes with seed 1.
fn steps_that_hold_it() -> Vec<u64> {
    let holds = |position: &u64| {
        let key = mix64(mix64(1) ^ mix64(position / 10));
        permute_index(position % 10, 10, key) == 9
    };
    (0..20).filter(holds).map(|position| position / 4 + 1).collect()
}

#[test]
fn a_step_whose_gradient_is_not_finite_changes_nothing() {
    let place = Place::new();
    let [model, chat] = huge(&place);
    let options = ["stages.sft.config.holdout=2", "stages.sft.config.training.validate_steps=1"];
    let sets = [options[0], options[1], &model, &chat].map(|set| ["--set", set]).concat();
    let words = file("words.yaml");
    let run = |place: &Place, more: &[&str], stop: &mut dyn FnMut(&Value) -> Option<i32>| {
        place.watch(&[&["run", &words][..], &sets, more].concat(), stop)
    };
    let whole = run(&place, &[], &mut |_| None);
    assert_eq!(whole.code, Some(0), "{}", whole.errors);
    let skipped = steps_that_hold_it();
    assert_eq!(skipped.len(), 2, "one in each pass");
    let (norms, losses) = (values(&whole, "sft", "grad_norm"), values(&whole, "sft", "val_loss"));
    for ((step, norm), pair) in norms.iter().zip(losses.windows(2)) {
        assert_eq!(norm.is_none(), skipped.contains(step), "step {step}");
        // The model computes what it did before the step, to the last bit.
        assert_eq!(pair[0].1 == pair[1].1, skipped.contains(step), "step {step}: {pair:?}");
    }
    let result = place.result(&whole.key("sft"));
    let records = result["lineage"]["guard"].as_array().expect("records");
    let lines: Vec<String> = skipped
        .iter()
        .map(|step| {
            let (from, to) = ((step - 1) * BATCH, step * BATCH);
            format!("step {step} skipped: its gradient is not finite, samples {from}..{to}")
        })
        .collect();
    assert_eq!(records.iter().map(|record| record["step"].as_u64().expect("a step")).collect::<Vec<_>>(), skipped);
    assert_eq!(warnings(&whole, "sft")[1..], lines, "after one about modules that the folder lacks");
    assert_finite(&place, &whole, "sft");
    assert_shown(&place, &[&[words.as_str()][..], &sets].concat(), "sft", &lines);

    // Killed after the first skipped step, once a checkpoint is committed; the newest may still be on its way.
    let other = Place::new();
    let (mut saved, mut skipping) = (false, false);
    let killed = run(&other, &["--threads", "1"], &mut |event| {
        saved |= event["event"] == "checkpoint" && event["stage"] == "sft";
        skipping |= event["name"] == "loss" && event["step"] == skipped[0];
        (saved && skipping).then_some(libc::SIGKILL)
    });
    assert_eq!(killed.code, None, "{}", killed.errors);
    let last = run(&other, &[], &mut |_| None);
    assert_eq!(last.code, Some(0), "{}", last.errors);
    assert!(steps(&last, "sft").is_some_and(|(first, _)| first > 1), "it goes on in the middle");
    let found = other.result(&last.key("sft"));
    for part in ["outputs", "metrics", "lineage"] {
        assert_eq!(found[part], result[part], "{part}");
    }

    // No skip allowed: the run ends at the step, says which samples, and the checkpoint before is kept.
    let none = run(&other, &["--set", "stages.sft.config.training.guard.skips_max=0"], &mut |_| None);
    assert_eq!(none.code, Some(65), "{}", none.errors);
    assert!(
        none.errors.contains(&format!("step {}: ", skipped[0])) && none.errors.contains("help: "),
        "{}",
        none.errors
    );
    assert_eq!(warnings(&none, "sft").last(), Some(&lines[0]));
}
