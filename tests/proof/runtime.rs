//! The cache follows meaning and nothing else; a stage goes on from its checkpoint without the file that described it; a
//! full disk is an error, not a loss.
//!
//! Beside these: `tests/faults/damage.rs` has a damaged newest checkpoint (the one before is taken, and an event says so),
//! `tests/faults/kills.rs` the bits and the steps after kills, `runtime/engine/src/tests.rs` the same on tiny stages.

use std::{
    fs::File,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, SystemTime},
};

use crate::tiny::{Ended, Place, file, recipe, undisturbed};

/// A place whose store is a copy of that of the undisturbed run.
pub(crate) fn lived() -> Place {
    Place::copy_of(&undisturbed().0)
}

/// The recipe and all of its inputs, written into the place.
fn moved(place: &Place) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let copy = |from: &Path| {
        let name = from.file_name().expect("a name");
        std::fs::copy(from, place.path().join(name)).expect("a copy");
    };
    copy(&root.join("pipelines/data/validation.parquet"));
    for hook in ["quality", "answer"] {
        copy(&root.join(format!("schemas/hooks/examples/{hook}.wasm")));
    }
    for name in
        ["traces.jsonl", "prompts.jsonl", "needles.jsonl", "questions.jsonl", "choices.jsonl", "hooks/bytes.wasm"]
    {
        copy(Path::new(&file(name)));
    }
    let text = std::fs::read_to_string(recipe()).expect("the recipe");
    let folders = ["../../../schemas/hooks/examples/", "../../../pipelines/data/", "hooks/"];
    place.write("life.yaml", folders.iter().fold(text, |text, folder| text.replace(folder, "")))
}

fn run(place: &Place, pipeline: &str, more: &[&str]) -> Ended {
    let ended = place.watch(&[&["run", pipeline], more].concat(), |_| None);
    assert_eq!(ended.code, Some(0), "{more:?}\n{}", ended.errors);
    ended
}

fn started(ended: &Ended) -> Vec<&str> {
    let started = ended.events.iter().filter(|event| event["event"] == "stage_started");
    started.filter_map(|event| event["stage"].as_str()).collect()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn the_time_of_a_file_and_how_fast_it_goes_change_no_key_and_meaning_does() {
    let place = Place::new();
    let pipeline = moved(&place);
    let first = run(&place, &pipeline, &["--until", "base"]);
    assert_eq!(started(&first), ["corpus", "base"]);
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    for name in ["validation.parquet", "quality.wasm", "life.yaml"] {
        let file = File::options().write(true).open(place.path().join(name)).expect("a file");
        file.set_modified(long_ago).expect("a time");
    }
    let interval = "stages.base.config.training.checkpoint.steps=7";
    for more in [&[][..], &["--set", interval], &["--threads", "1"]] {
        let again = run(&place, &pipeline, &[&["--until", "base"], more].concat());
        assert!(started(&again).is_empty(), "{more:?} {:?}", started(&again));
        assert_eq!((again.outcome("corpus"), again.outcome("base")), (Some("cached"), Some("cached")));
    }

    let faster = "stages.base.config.schedules.bias_speed.value=0.02";
    let said = place.command(&["explain", &pipeline, "base", "--store", "file://./runs", "--set", faster]).output();
    let said = text(&said.expect("it runs"));
    assert!(said.contains("config.schedules.bias_speed.value: 0.01 -> 0.02"), "{said}");
    assert_eq!(said.matches(" -> ").count(), 1, "one field is named: {said}");
    let changed = run(&place, &pipeline, &["--until", "base", "--set", faster]);
    assert_eq!(started(&changed), ["base"]);
    assert_ne!(changed.key("base"), first.key("base"));
    assert_ne!(changed.output("base", "model"), first.output("base", "model"));
}

#[test]
fn a_deleted_blob_makes_its_stage_run_again_and_says_why() {
    let place = lived();
    let whole = &undisturbed().1;
    let weights = place.file_digest(&whole.output("base", "model"), "model.safetensors");
    std::fs::remove_file(place.blob(&weights)).expect("a removed blob");
    let again = run(&place, &recipe(), &[]);
    assert_eq!(started(&again), ["base"], "what was made from it is still there");
    assert!(
        again.of("log", "base").any(|event| event["message"].to_string().contains("is gone")),
        "it says why: {}",
        again.errors
    );
    assert_eq!(again.output("base", "model"), whole.output("base", "model"));
}

#[test]
fn a_changed_hook_runs_its_stage_and_what_follows() {
    let place = lived();
    // Other bytes, the same behaviour: a custom section at the end. Its stage must run to know; its output is the same.
    let mut wasm = std::fs::read(file("hooks/bytes.wasm")).expect("the hook");
    wasm.extend(b"\0\x05\x04note");
    let noted = format!("hooks.bytes.wasm={}", place.write("noted.wasm", wasm));
    let ended = run(&place, &recipe(), &["--set", &noted]);
    assert_eq!(started(&ended), ["rl"]);
    assert_eq!(ended.output("rl", "model"), undisturbed().1.output("rl", "model"));
    // Another behaviour: what reads the policy runs too, what came before does not.
    let answer = format!("hooks.bytes.wasm={}/schemas/hooks/examples/answer.wasm", env!("CARGO_MANIFEST_DIR"));
    let ended = run(&place, &recipe(), &["--set", &answer]);
    assert_eq!(started(&ended), ["rl", "evaluation", "release", "server"]);
    assert_ne!(ended.output("rl", "model"), undisturbed().1.output("rl", "model"));
}

#[test]
fn a_stage_goes_on_from_its_checkpoint_with_the_yaml_and_its_files_gone() {
    let place = Place::new();
    let pipeline = moved(&place);
    let mut seen = 0;
    let killed = place.watch(&["run", &pipeline, "--until", "base"], |event| {
        seen += u64::from(event["event"] == "checkpoint" && event["stage"] == "base");
        (seen == 2).then_some(libc::SIGKILL)
    });
    assert_eq!(killed.code, None, "{}", killed.errors);
    let gone = std::fs::read_dir(place.path()).expect("a folder").flatten().map(|entry| entry.path());
    gone.filter(|path| path.is_file()).for_each(|path| std::fs::remove_file(path).expect("removed"));
    assert!(!Path::new(&pipeline).exists());

    let last = place.watch(&["exec", "last", "base"], |_| None);
    assert_eq!(last.code, Some(0), "{}", last.errors);
    let resumed = last.of("stage_started", "base").next().expect("it began")["resumed_from"].as_u64();
    assert!(resumed >= Some(8) && resumed < Some(24), "from the middle of the stage: {resumed:?}");
    let first = last.of("metric", "base").next().expect("a metric")["step"].as_u64();
    assert_eq!(first, resumed.map(|step| step + 1));
    let whole = &undisturbed().1;
    assert_eq!((last.key("base"), last.output("base", "model")), (whole.key("base"), whole.output("base", "model")));
}

/// `RLIMIT_FSIZE`: no file may have more than a hundred kilobytes or two, as the shell counts. The corpus fits, a
/// checkpoint does not. The cache of compiled hooks does not fit either, and nobody minds.
#[test]
fn a_full_disk_ends_the_run_with_69_and_loses_nothing() {
    let place = Place::new();
    let output = Command::new("sh")
        .args(["-c", "ulimit -f 200 && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_dsv3-pipeline"), "run", &recipe()])
        .args(["--until", "base", "--store", "file://./runs"])
        .current_dir(place.path())
        .env("XDG_CACHE_HOME", place.path().join("cache"))
        .stdin(Stdio::null())
        .output()
        .expect("it runs");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(69), "{:?} {said}", output.status);
    assert_eq!(said.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{said}");
    for part in ["[corpus] done", "stage `base`", "File too large", "help: "] {
        assert!(said.contains(part), "{part} in\n{said}");
    }
    let last = place.done(&["--until", "base"]);
    assert_eq!((last.outcome("corpus"), last.outcome("base")), (Some("cached"), Some("done")));
    assert_eq!(last.output("base", "model"), undisturbed().1.output("base", "model"));
}
