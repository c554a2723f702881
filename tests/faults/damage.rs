//! Damaged and vanished bytes: one error that says where and what to do, with its exit code; what is finished stays
//! finished, and with the damage undone the run goes on.

use serde_json::Value;

use crate::tiny::{Ended, Place, file, recipe, undisturbed};

/// One error of this exit code that names all `parts` and says what to do.
fn refuses(ended: &Ended, code: i32, parts: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.errors);
    let errors = ended.errors.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!(errors, 1, "{}", ended.errors);
    for part in parts.iter().chain(&["help: "]) {
        assert!(ended.errors.contains(part), "{part} in\n{}", ended.errors);
    }
    let last = ended.last();
    assert_eq!((&last["event"], &last["outcome"]), (&"run_finished".into(), &"failed".into()));
}

/// Cuts a file to half of its length.
fn cut(path: &std::path::Path) {
    let file = std::fs::OpenOptions::new().write(true).open(path).expect("a file");
    file.set_len(file.metadata().expect("a file").len() / 2).expect("a cut file");
}

/// Changes one byte of a file.
fn flip(path: &std::path::Path) {
    let mut bytes = std::fs::read(path).expect("a file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).expect("a file");
}

#[test]
fn a_corrupt_parquet_file_stops_its_stage_only() {
    let good =
        std::fs::read(format!("{}/pipelines/data/rl-prompts.parquet", env!("CARGO_MANIFEST_DIR"))).expect("shipped");
    let place = Place::new();
    place.done(&["--until", "sft"]);
    let mut pages = good.clone();
    let middle = pages.len() / 3;
    pages[middle..middle + 200].iter_mut().for_each(|byte| *byte ^= 0x5a);
    let mut footer = good.clone();
    let end = footer.len();
    footer[end - 120..end - 60].fill(0xff);
    for (name, bytes) in [("cut", &good[..good.len() / 2]), ("pages", &pages), ("footer", &footer), ("empty", &[])] {
        let name = format!("{name}.parquet");
        let set = format!("stages.rl.inputs.prompts={}", place.write(&name, bytes));
        let ended = place.run(&["--set", &set]);
        refuses(&ended, 65, &["stage `rl`", &name]);
        assert_eq!(ended.outcome("sft"), Some("cached"));
    }
    let ended = place.done(&["--until", "rl"]);
    assert_eq!((ended.outcome("sft"), ended.outcome("rl")), (Some("cached"), Some("done")));
}

#[test]
fn a_truncated_output_is_made_again_and_nothing_else() {
    let place = Place::new();
    let first = place.done(&["--until", "sft"]);
    cut(&place.blob(&place.file_digest(&first.output("base", "model"), "model.safetensors")));
    let again = place.done(&["--until", "sft"]);
    assert!(again.of("log", "base").any(|event| event["message"].to_string().contains("instead of")));
    assert_eq!((again.outcome("corpus"), again.outcome("base")), (Some("cached"), Some("done")));
    // The same bits came out, so what was made from them still counts.
    assert_eq!((again.outcome("extended"), again.outcome("sft")), (Some("cached"), Some("cached")));
    assert_eq!(again.output("base", "model"), first.output("base", "model"));
}

#[test]
fn an_input_with_a_flipped_bit_is_made_again_by_a_run_and_refused_by_one_stage_alone() {
    let place = Place::new();
    let first = place.done(&["--until", "corpus"]);
    let digest = place.file_digest(&first.output("corpus", "tokens"), "");
    let blob = place.blob(&digest);
    let good = std::fs::read(&blob).expect("a blob");
    flip(&blob);
    refuses(&place.run(&["--only", "base"]), 65, &["stage `base`", &digest, "another digest", "`corpus` made"]);
    assert_ne!(std::fs::read(&blob).expect("a blob"), good, "a stage alone changes nothing of another");
    let last = place.done(&["--until", "base"]);
    let named = |event: &Value| event["message"].to_string().contains(&digest);
    assert!(last.of("log", "corpus").any(named), "{:?}", last.events);
    assert_eq!((last.outcome("corpus"), last.outcome("base")), (Some("cached"), Some("done")));
    let outcomes: Vec<_> = last.of("stage_finished", "corpus").map(|event| event["outcome"].clone()).collect();
    assert_eq!(outcomes, ["cached", "done"], "found finished, found damaged, made again");
    assert_eq!(std::fs::read(&blob).expect("a blob"), good);
    assert_eq!(last.output("base", "model"), undisturbed().1.output("base", "model"));
}

#[test]
fn a_damaged_result_is_named_by_the_stage_that_needs_it() {
    let place = Place::new();
    let first = place.done(&["--until", "corpus"]);
    let result = place.store().join("stages").join(first.key("corpus")).join("result.json");
    let mut permissions = std::fs::metadata(&result).expect("a file").permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    std::fs::set_permissions(&result, permissions).expect("a writable file");
    flip(&result);
    refuses(&place.run(&["--only", "base"]), 65, &["stage `base` needs stage `corpus`", "result.json", "damaged"]);
    let last = place.done(&["--until", "base"]);
    assert_eq!((last.outcome("corpus"), last.outcome("base")), (Some("done"), Some("done")));
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_one_before() {
    for (damage, of_record) in [(cut as fn(&std::path::Path), false), (flip, false), (cut, true), (flip, true)] {
        let place = Place::new();
        let stop = |event: &Value| {
            let late = event["stage"] == "base" && event["step"].as_u64() >= Some(14);
            (late && event["event"] == "metric").then_some(libc::SIGKILL)
        };
        let killed = place.watch(&["run", &recipe(), "--until", "base"], stop);
        assert_eq!(killed.code, None, "{}", killed.errors);
        let folder = place.store().join("stages").join(killed.key("base")).join("checkpoints");
        let mut names: Vec<_> =
            std::fs::read_dir(folder).expect("checkpoints").map(|entry| entry.expect("one").path()).collect();
        names.sort();
        let record = names.last().expect("a checkpoint");
        let newest = std::fs::read(record).expect("readable");
        let newest: Value = serde_json::from_slice(&newest).expect("JSON");
        let masters =
            newest["files"].as_array().expect("files").iter().find(|file| file["path"] == "masters.safetensors");
        let masters = masters.expect("masters")["digest"].as_str().expect("a digest");
        let damaged = if of_record { record.clone() } else { place.blob(masters) };
        let mut permissions = std::fs::metadata(&damaged).expect("a file").permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
        std::fs::set_permissions(&damaged, permissions).expect("a writable file");
        damage(&damaged);
        let named = damaged.file_name().expect("a name").to_string_lossy();
        let last = place.done(&["--until", "base"]);
        let step = newest["step"].as_u64().expect("a step");
        let started = last.of("stage_started", "base").next().expect("it began");
        assert_eq!(started["resumed_from"].as_u64(), Some(step - 4), "one interval back");
        assert!(
            last.of("log", "base").any(|event| event["message"].to_string().contains(&*named)),
            "{:?}",
            last.events
        );
        assert_eq!(last.output("base", "model"), undisturbed().1.output("base", "model"));
    }
}

#[test]
fn a_missing_input_is_found_before_anything_runs() {
    let place = Place::new();
    let text = std::fs::read_to_string(recipe()).expect("the recipe");
    let root = format!("{}/", env!("CARGO_MANIFEST_DIR"));
    let text = text.replace("../../../", &root).replace("hooks/bytes.wasm", &file("hooks/bytes.wasm"));
    for name in ["traces.jsonl", "needles.jsonl", "questions.jsonl", "choices.jsonl"] {
        std::fs::copy(file(name), place.path().join(name)).expect("a copy");
    }
    let pipeline = place.write("life.yaml", text);
    let ended = place.watch(&["run", &pipeline], |_| None);
    refuses(
        &Ended { errors: format!("{}help: ", ended.errors), ..ended },
        64,
        &["life.yaml:", "prompts: prompts.jsonl", "does not exist"],
    );
    assert!(!place.store().exists(), "nothing ran");

    // Gone after the plan was made: what is finished does not miss it, the stage that reads it does.
    std::fs::copy(file("prompts.jsonl"), place.path().join("prompts.jsonl")).expect("a copy");
    let first = place.watch(&["run", &pipeline, "--until", "traces"], |_| None);
    assert_eq!(first.code, Some(0), "{}", first.errors);
    std::fs::remove_file(place.path().join("prompts.jsonl")).expect("removed");
    std::fs::remove_file(place.path().join("traces.jsonl")).expect("removed");
    let ended = place.watch(&["resume", "last"], |_| None);
    refuses(&ended, 69, &["stage `rl`", "prompts.jsonl", "does not exist"]);
    assert_eq!((ended.outcome("traces"), ended.outcome("sft")), (Some("cached"), Some("done")));
    place.write("prompts.jsonl", "{\"prompt\": \"another\", \"answer\": \"1\"}\n");
    refuses(&place.watch(&["resume", "last"], |_| None), 65, &["stage `rl`", "prompts.jsonl", "has changed"]);
    std::fs::copy(file("prompts.jsonl"), place.path().join("prompts.jsonl")).expect("a copy");
    let last = place.watch(&["exec", "last", "rl"], |_| None);
    assert_eq!(last.code, Some(0), "{}", last.errors);
    assert_eq!(last.output("rl", "model"), undisturbed().1.output("rl", "model"));
}

/// What only the data can show is found by the running stage: exit 65, whatever the stage calls it.
#[test]
fn data_that_does_not_fit_is_named_by_its_stage() {
    let place = Place::new();
    place.done(&["--until", "sft"]);
    let empty = place.write("empty.jsonl", "");
    let broken =
        place.write("broken.jsonl", "{\"prompt\": \"a\", \"answer\": \"1\"}\n{\"prompt\": \"b\", \"answer\":\n");
    let wrong = place.write("wrong.jsonl", "{\"prompt\": \"a\", \"answer\": \"1\"}\n{\"prompt\": \"b\"}\n");
    let prompts = |path: &str| format!("stages.rl.inputs.prompts={path}");
    let cases = [
        ("rl", prompts(&empty), "no prompt"),
        ("rl", prompts(&broken), "broken.jsonl: line 2"),
        ("rl", prompts(&wrong), "wrong.jsonl: line 2"),
        ("rl", "stages.rl.config.policy.tokens_max=100".to_owned(), "exceed the context of 128"),
        ("base", "stages.base.config.holdout_sequences=100000".to_owned(), "leaves none to train on"),
        ("sft", "stages.sft.config.holdout=44".to_owned(), "leaves no conversation"),
        ("sft", "stages.sft.config.tokens_max=10".to_owned(), "have more than 10 tokens"),
    ];
    for (stage, set, part) in cases {
        let ended = place.run(&["--until", stage, "--set", &set]);
        assert_eq!(ended.code, Some(65), "{set}\n{}", ended.errors);
        assert!(ended.errors.contains(part) && ended.errors.contains(&format!("stage `{stage}`")), "{}", ended.errors);
        assert_eq!(ended.outcome("corpus"), Some("cached"));
    }
    let nothing =
        format!("stages.evaluation.inputs.data=[{empty}, {}, {}]", file("choices.jsonl"), file("needles.jsonl"));
    let task = "stages.evaluation.config.tasks.0.file=empty.jsonl";
    let ended = place.run(&["--until", "evaluation", "--set", &nothing, "--set", task]);
    refuses(&ended, 65, &["stage `evaluation`", "task exact", "empty.jsonl"]);
}
