//! Broken data and hostile hooks through the command line: one error that says where and what to do, exit 65, and
//! nothing that was committed is lost.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::tiny::{Place, file};
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A `document-filter` whose `judge` runs `body`; it configures itself and never answers.
fn filter(body: &str) -> Vec<u8> {
    let text = format!(
        r#"(module
  (memory (export "memory") 2)
  (global $top (mut i32) (i32.const 65536))
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
    (global.set $top (i32.add (local.get $at) (local.get 3)))
    (if (i32.gt_u (global.get $top) (i32.mul (memory.size) (i32.const 65536)))
      (then (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable))))
    (local.get $at))
  (func (export "dsv3:hooks/filter@0.1.0#configure") (param i32 i32) (result i32)
    (i32.store8 (i32.const 16) (i32.const 0)) (i32.const 16))
  (func (export "dsv3:hooks/filter@0.1.0#judge") (param i32 i32 i32 i32) (result i32) {body}))"#
    );
    let mut module = wat::parse_str(text).expect("a module");
    let mut resolve = wit_parser::Resolve::default();
    let package = resolve.push_file(root().join("schemas/hooks/hooks.wit")).expect("the package");
    let world = resolve.select_world(&[package], Some("document-filter")).expect("the world");
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).expect("metadata");
    ComponentEncoder::default().module(&module).expect("a module").encode().expect("a component")
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
fn a_hook_that_traps_or_loops_ends_its_stage_and_nothing_else() {
    for (body, parts) in [
        ("unreachable", ["hook `hostile`", "trapped"]),
        ("(loop (br 0)) (i32.const 0)", ["hook `hostile`", "deadline of 300 ms"]),
        ("(loop (drop (memory.grow (i32.const 100))) (br 0)) (i32.const 0)", ["hook `hostile`", "batch 0"]),
    ] {
        let hook = "hooks:\n  hostile: { wasm: hostile.wasm, world: document-filter, limits: { deadline_ms: 300, memory_mb: 16 } }\n";
        let dir = Dir::new("good.jsonl", hook);
        dir.write("hostile.wasm", &filter(body));
        dir.fails_with(&parts);
    }
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
