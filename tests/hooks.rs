//! Broken data and hostile hooks through the command line: one error that says where and what to do, exit 65, and
//! nothing that was committed is lost.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    guest::{DEEP, ENDLESS, GREEDY, broken_scores, broken_verdicts, filter, reward},
    proof::runtime::lived,
    tiny::{Place, file},
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

struct Dir(tempfile::TempDir);

impl Dir {
    /// `first` is a good stage, `second` reads `documents` through the hook.
    fn new(documents: &str, hook: &str) -> Self {
        let dir = Self(tempfile::tempdir().expect("a folder"));
        let text = format!(
            "version: 1\n{hook}stages:\n  first: {{ type: ingest, inputs: {{ documents: good.jsonl }}, config: {{ vocab_size: 270, \
             row_tokens: 16 }} }}\n  second:\n    type: ingest\n    inputs: {{ documents: {documents}, tokenizer: first.tokenizer \
             }}\n    config: {{ row_tokens: 16 }}\n{}",
            if hook.is_empty() { "" } else { "    hooks: { filter: hostile }\n" }
        );
        dir.write("p.yaml", text.as_bytes());
        let good: String =
            (0..40).map(|i| format!("{{\"text\": \"good document {i} of the first stage\"}}\n")).collect();
        dir.write("good.jsonl", good.as_bytes());
        dir
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).expect("a written file");
        path
    }

    /// Runs the pipeline; exit code and standard error.
    fn run(&self) -> (Option<i32>, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_dsv3-pipeline"))
            .args(["run", "p.yaml"])
            .current_dir(self.0.path())
            .env("XDG_CACHE_HOME", self.0.path().join("cache"))
            .output()
            .expect("the program runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// One error with these parts, exit 65, and the first stage stays finished.
    fn fails_with(&self, parts: &[&str]) {
        for finished in ["[first] done", "[first] finished before"] {
            let (code, err) = self.run();
            assert_eq!(code, Some(65), "{err}");
            assert_eq!(err.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{err}");
            for part in parts.iter().chain(&[finished, "stage `second`", "help: "]) {
                assert!(err.contains(part), "{part} in\n{err}");
            }
        }
    }
}

#[test]
fn a_filter_that_fails_ends_its_stage_and_nothing_else() {
    let hook = "hooks:\n  hostile: { wasm: hostile.wasm, world: document-filter, limits: { deadline_ms: 300, memory_mb: 16 } }\n";
    let line = "good.jsonl: line 1: the document filter failed";
    let ways = [
        ("unreachable", "batch 0, item 0: it trapped: "),
        (ENDLESS, "batch 0: it ran longer than its deadline of 300 ms"),
        (GREEDY, "batch 0, item 0: it wanted more memory than its limit of 16777216 bytes"),
        (DEEP, "batch 0, item 0: it trapped: wasm trap: call stack exhausted"),
    ];
    let ways = ways.map(|(body, said)| (body.to_owned(), said));
    for (body, said) in ways.into_iter().chain(broken_verdicts()) {
        let dir = Dir::new("good.jsonl", hook);
        dir.write("hostile.wasm", &filter(&body));
        dir.fails_with(&["hook `hostile`, batch 0", line, said]);
    }
}

#[test]
fn a_reward_that_fails_ends_its_stage_and_nothing_else() {
    let place = lived();
    let ways = [
        ("unreachable", "it trapped: "),
        (ENDLESS, "it ran longer than its deadline of 300 ms"),
        (GREEDY, "it wanted more memory than its limit of 16777216 bytes"),
        (DEEP, "it trapped: wasm trap: call stack exhausted"),
    ];
    let ways = ways.map(|(body, said)| (body.to_owned(), said));
    for (body, said) in ways.into_iter().chain(broken_scores()) {
        let hook = format!("hooks.bytes.wasm={}", place.write("hostile.wasm", reward(&body)));
        let limits = "hooks.bytes.limits={ deadline_ms: 300, memory_mb: 16 }";
        let failed = place.run(&["--until", "rl", "--set", &hook, "--set", limits]);
        assert_eq!(failed.code, Some(65), "{said}\n{}", failed.errors);
        for part in ["stage `rl`: step 1", "hook `bytes`, batch 1", said, "help: "] {
            assert!(failed.errors.contains(part), "{part} in\n{}", failed.errors);
        }
        assert_eq!(failed.outcome("sft"), Some("cached"));
    }
    // Nothing of the run before is lost.
    assert_eq!(place.done(&["--until", "rl"]).outcome("rl"), Some("cached"));
}

#[test]
fn a_corrupt_parquet_file_is_named() {
    let good = std::fs::read(root().join("pipelines/data/validation.parquet")).expect("shipped data");
    let mut flipped = good.clone();
    let middle = flipped.len() / 3;
    flipped[middle..middle + 64].iter_mut().for_each(|byte| *byte ^= 0x5A);
    for bytes in [&good[..good.len() / 2], &flipped, b"PAR1 is how it begins and that is all"] {
        let dir = Dir::new("bad.parquet", "");
        dir.write("bad.parquet", bytes);
        dir.fails_with(&["bad.parquet"]);
    }
}

/// The recipe's filter replaced by one that fails on documents that begin with `x`.
fn fussy(place: &Place, more: &[&str]) -> crate::tiny::Ended {
    let documents = (0..30).map(|i| match i {
        7 | 20 => format!("{{\"text\": \"x marks document {i} of this corpus\"}}\n"),
        _ => format!("{{\"text\": \"document {i} of this corpus is a good one\"}}\n"),
    });
    let documents =
        format!("stages.corpus.inputs.documents={}", place.write("documents.jsonl", documents.collect::<String>()));
    let hook = format!("hooks.quality.wasm={}", file("hooks/trap.wasm"));
    place.run(&[&["--until", "corpus", "--set", &documents, "--set", &hook], more].concat())
}

#[test]
fn a_policy_decides_about_the_failing_document_alone() {
    let place = Place::new();
    let failed = fussy(&place, &[]);
    assert_eq!(failed.code, Some(65), "{}", failed.errors);
    for part in ["documents.jsonl: line 8", "hook `quality`", "batch 0, item 7", "trapped", "on_error: drop"] {
        assert!(failed.errors.contains(part), "{part} in\n{}", failed.errors);
    }
    let mut keys = vec![failed.key("corpus")];
    for (policy, documents_out) in [("drop", 28.0), ("keep", 30.0)] {
        let ended = fussy(&place, &["--set", &format!("hooks.quality.on_error={policy}")]);
        assert_eq!(ended.code, Some(0), "{}", ended.errors);
        let metrics = &ended.last()["metrics"];
        assert_eq!(metrics["corpus.documents_out"]["value"], documents_out, "{policy}");
        assert_eq!(metrics["corpus.filter_faults"]["value"], 2.0, "{policy}");
        keys.push(ended.key("corpus"));
    }
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 3, "the policy is part of the stage's key");
}

#[test]
fn a_reward_that_fails_names_the_completion_and_keeps_what_was_trained() {
    let place = Place::new();
    let trap = format!("hooks.bytes.wasm={}", file("hooks/reward_trap.wasm"));
    let failed = place.run(&["--until", "rl", "--set", &trap]);
    assert_eq!(failed.code, Some(65), "{}", failed.errors);
    for part in ["stage `rl`: step 1", "hook `bytes`, batch 1, item 0", "trapped", "help: "] {
        assert!(failed.errors.contains(part), "{part} in\n{}", failed.errors);
    }
    assert_eq!(failed.outcome("sft"), Some("done"));
    // With the failure tolerated every reward is 0: a policy that learns nothing, and says so.
    let ended = place.run(&["--until", "rl", "--set", &trap, "--set", "hooks.bytes.on_error=drop"]);
    assert_eq!((ended.code, ended.outcome("sft")), (Some(0), Some("cached")), "{}", ended.errors);
    assert_eq!(ended.last()["metrics"]["rl.reward_mean_last"]["value"], 0.0);
}

#[test]
fn a_hook_of_another_world_is_refused_before_anything_runs() {
    let place = Place::new();
    for (hook, wasm) in [("bytes", file("hooks/trap.wasm")), ("quality", file("hooks/bytes.wasm"))] {
        let failed = place.run(&["--set", &format!("hooks.{hook}.wasm={wasm}")]);
        assert_eq!(failed.code, Some(64), "{}", failed.errors);
        assert!(
            failed.errors.contains(&format!("hook `{hook}`")) && failed.errors.contains("is expected"),
            "{}",
            failed.errors
        );
    }
    assert!(!place.store().exists());
}
