//! Hostile and broken guests, written in WebAssembly text: each must come back as one located error. And the shipped
//! examples, from `schemas/hooks/examples` or from `$DSV3_HOOKS_BUILD` when set (`.ci/run` points it at a fresh build).

mod guest;

use std::path::PathBuf;

use dsv3_hooks::{Cause, Hook, HookError, Host, Limits, OnError, RewardItem, Verdict, World};
use guest::{DEEP, ENDLESS, GREEDY, broken_scores, broken_verdicts, filter, reward};
use serde_json::json;

fn schemas() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../schemas/hooks")
}

fn example(name: &str) -> Vec<u8> {
    let dir = std::env::var_os("DSV3_HOOKS_BUILD").map_or_else(|| schemas().join("examples"), PathBuf::from);
    std::fs::read(dir.join(name)).unwrap()
}

fn limits() -> Limits {
    Limits { memory_bytes: 16 << 20, deadline_ms: 500, fuel: None }
}

fn load(host: &Host, wasm: &[u8], limits: Limits, on_error: OnError) -> Hook {
    host.load("guest", wasm, World::DocumentFilter, &json!({}), limits, on_error).unwrap()
}

/// Fails when a document starts with `x`.
const FUSSY: &str = r#"(if (i32.eq (i32.load8_u (local.get $data)) (i32.const 120)) (then unreachable))
    (if (i32.gt_u (local.get $n) (i32.const 1)) (then unreachable))
    (call $answer (local.get $n) (i32.const 0))"#;

/// Rewards a completion with the sum of its bytes modulo 8: whatever a model writes, some of it is better.
const BYTES: &str = r#"(local.set $totals (call $alloc (i32.const 0) (i32.const 0) (i32.const 8) (i32.mul (local.get $n) (i32.const 8))))
    (block $done (loop $next
      (br_if $done (i32.ge_u (local.get $i) (local.get $n)))
      (local.set $at (i32.add (i32.load offset=24 (local.get $items)) (i32.mul (local.get $i) (i32.const 4))))
      (local.set $end (i32.add (i32.load offset=16 (local.get $items)) (i32.load offset=4 (local.get $at))))
      (local.set $at (i32.add (i32.load offset=16 (local.get $items)) (i32.load (local.get $at))))
      (local.set $sum (i32.const 0))
      (block $read (loop $byte
        (br_if $read (i32.ge_u (local.get $at) (local.get $end)))
        (local.set $sum (i32.add (local.get $sum) (i32.load8_u (local.get $at))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $byte)))
      (f64.store (i32.add (local.get $totals) (i32.mul (local.get $i) (i32.const 8)))
        (f64.convert_i32_u (i32.and (local.get $sum) (i32.const 7))))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br $next)))
    (i32.store (i32.const 32) (i32.const 0))
    (i32.store (i32.const 36) (local.get $totals)) (i32.store (i32.const 40) (local.get $n))
    (i32.store (i32.const 44) (i32.const 8)) (i32.store (i32.const 48) (i32.const 0))
    (i32.store (i32.const 52) (i32.const 8)) (i32.store (i32.const 56) (i32.const 0))
    (i32.const 32)"#;

/// The components that the tests of whole pipelines use are those of the texts here; `DSV3_UPDATE=1` writes them again.
#[test]
fn components_of_the_pipeline_tests_are_built_from_these_texts() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/tiny/hooks");
    for (name, wasm) in [
        ("trap.wasm", filter(FUSSY)),
        ("loop.wasm", filter(ENDLESS)),
        ("bytes.wasm", reward(BYTES)),
        ("reward_trap.wasm", reward("unreachable")),
    ] {
        let path = folder.join(name);
        if std::env::var_os("DSV3_UPDATE").is_some() {
            std::fs::write(&path, &wasm).unwrap();
        }
        assert!(std::fs::read(&path).unwrap() == wasm, "{} is stale: run this test with DSV3_UPDATE=1", path.display());
    }
    let host = Host::new(None).unwrap();
    let hook = host.load("b", &reward(BYTES), World::Reward, &json!({}), Limits::default(), OnError::Fail).unwrap();
    let item = |completion| RewardItem { prompt: "p", completion, answer: "", metadata: "{}", finished: true };
    let rewards = hook.reward(0, &[item("a"), item(""), item("ab")]).unwrap().rewards;
    assert_eq!(rewards.iter().map(|reward| reward.total).collect::<Vec<_>>(), [1.0, 0.0, 3.0]);
}

#[test]
fn a_trap_names_hook_batch_and_item() {
    let host = Host::new(None).unwrap();
    let hook = load(&host, &filter(FUSSY), limits(), OnError::Fail);
    let error = hook.filter(7, &["good", "x bad", "good"]).unwrap_err();
    assert_eq!((error.batch, error.item), (Some(7), Some(1)));
    assert!(matches!(error.cause, Cause::Trap(_)), "{error}");
    assert!(error.to_string().starts_with("hook `guest`, batch 7, item 1: it trapped"), "{error}");
    assert_eq!(dsv3_core::Error::from(error).kind.exit_code(), 65);
}

#[test]
fn policies_touch_the_failing_document_only() {
    let host = Host::new(None).unwrap();
    for (policy, expected) in [(OnError::Drop, None), (OnError::Keep, Some(Verdict::Keep))] {
        let hook = load(&host, &filter(FUSSY), limits(), policy);
        let outcome = hook.filter(0, &["good", "x bad"]).unwrap();
        assert_eq!(outcome.verdicts[0], Verdict::Keep);
        match expected {
            Some(verdict) => assert_eq!(outcome.verdicts[1], verdict),
            None => assert!(matches!(&outcome.verdicts[1], Verdict::Drop(reason) if reason.contains("trapped"))),
        }
        assert_eq!(outcome.faults.len(), 1);
        assert_eq!(outcome.faults[0].item, Some(1));
    }
}

#[test]
fn limits_end_the_guest_and_are_told_apart() {
    let host = Host::new(None).unwrap();
    let run = |body: &str, limits: Limits, policy| load(&host, &filter(body), limits, policy).filter(0, &["a"]);
    let cause = |result: Result<_, HookError>| result.unwrap_err().cause;
    assert_eq!(cause(run(ENDLESS, limits(), OnError::Keep)), Cause::Deadline(500), "a deadline is always fatal");
    assert_eq!(cause(run(GREEDY, limits(), OnError::Fail)), Cause::Memory(16 << 20));
    assert!(matches!(cause(run(DEEP, limits(), OnError::Fail)), Cause::Trap(text) if text.contains("stack")));
    let fuelled = Limits { fuel: Some(100_000), ..limits() };
    assert_eq!(cause(run(ENDLESS, fuelled, OnError::Fail)), Cause::Fuel(100_000));
}

#[test]
fn malformed_answers_are_refused() {
    let host = Host::new(None).unwrap();
    for (body, expected) in broken_verdicts() {
        let error = load(&host, &filter(&body), limits(), OnError::Fail).filter(3, &["a"]).unwrap_err();
        assert!(matches!(&error.cause, Cause::Malformed(text) if text.contains(expected)), "{error}");
        assert!(error.to_string().starts_with("hook `guest`, batch 3, item 0: its answer is malformed: "), "{error}");
    }
    for (body, expected) in broken_scores() {
        let item = RewardItem { prompt: "p", completion: "c", answer: "", metadata: "{}", finished: true };
        let load = |policy| host.load("guest", &reward(&body), World::Reward, &json!({}), limits(), policy).unwrap();
        let error = load(OnError::Fail).reward(3, &[item]).unwrap_err();
        assert!(matches!(&error.cause, Cause::Malformed(text) if text.contains(expected)), "{error}");
        assert!(error.to_string().starts_with("hook `guest`, batch 3, item 0: its answer is malformed: "), "{error}");
        // Tolerated, it is a reward of nothing.
        let outcome = load(OnError::Drop).reward(3, &[item]).unwrap();
        assert_eq!((outcome.rewards[0].total, outcome.faults.len()), (0.0, 1));
    }
}

#[test]
fn other_worlds_and_garbage_are_refused_by_name() {
    let host = Host::new(None).unwrap();
    let error = host.check_world("r", &filter(FUSSY), World::Reward).unwrap_err();
    assert!(error.to_string().contains("dsv3:hooks/rewards@0.1.0"), "{error}");
    assert_eq!(error.kind().exit_code(), 64);
    for garbage in [&b""[..], b"\0asm\x01\0\0\0", b"not wasm"] {
        assert!(matches!(host.check_world("g", garbage, World::Reward).unwrap_err().cause, Cause::World { .. }));
    }
    let importer = wat::parse_str(r#"(component (import "wasi:clocks/monotonic-clock@0.2.0" (instance)))"#).unwrap();
    let error = host.check_world("w", &importer, World::Reward).unwrap_err();
    assert!(error.to_string().contains("wasi:clocks/monotonic-clock"), "{error}");
}

#[test]
fn damaged_cache_entries_are_compiled_again() {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::new(Some(dir.path().to_owned())).unwrap();
    let wasm = example("quality.wasm");
    for damage in [None, Some(&b"short"[..]), Some(&[7u8; 500][..])] {
        if let Some(bytes) = damage {
            for entry in std::fs::read_dir(dir.path()).unwrap() {
                std::fs::write(entry.unwrap().path(), bytes).unwrap();
            }
        }
        load(&host, &wasm, Limits::default(), OnError::Fail);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

#[test]
fn quality_example_keeps_drops_and_rewrites() {
    let host = Host::new(None).unwrap();
    let hook = load(&host, &example("quality.wasm"), Limits::default(), OnError::Fail);
    let long = "the same line of words\n".repeat(40);
    let documents =
        ["one two three four five", "too short", "trailing space comes off here  \n", "!? !? !? !? !? !?", &long];
    let verdicts = hook.filter(0, &documents).unwrap().verdicts;
    let expected = [
        Verdict::Keep,
        Verdict::Drop("too few words".into()),
        Verdict::Rewrite("trailing space comes off here".into()),
        Verdict::Drop("too few letters".into()),
        Verdict::Drop("repeated lines".into()),
    ];
    assert_eq!(verdicts, expected);
    let error = host
        .load("q", &example("quality.wasm"), World::DocumentFilter, &json!({"min_word": 3}), limits(), OnError::Fail)
        .err()
        .unwrap();
    assert!(error.to_string().contains("min_word"), "{error}");
}

#[test]
fn answer_example_rewards_only_the_asked_form() {
    let host = Host::new(None).unwrap();
    let wasm = example("answer.wasm");
    let hook = host.load("a", &wasm, World::Reward, &json!({}), Limits::default(), OnError::Fail).unwrap();
    let cases = [
        ("<think></think>\n#### 14", true, 1.2),
        ("<think> 9 + 5 = 14. Check: 14.</think>\n#### 14", true, 1.2),
        ("<think></think>\n#### 13", true, 0.2),
        ("<think></think>\n#### 14", false, 0.0),
        ("<think> #### 14</think>", true, 0.0),
        ("<think></think>\n#### 13\n#### 14", true, 0.0),
        ("#### 14", true, 0.0),
        ("", true, 0.0),
        ("<think><think></think>\n#### 14", true, 0.0),
    ];
    let items: Vec<RewardItem<'_>> = cases
        .iter()
        .map(|(completion, finished, _)| RewardItem {
            prompt: "q",
            completion,
            answer: "14",
            metadata: "{}",
            finished: *finished,
        })
        .collect();
    let outcome = hook.reward(0, &items).unwrap();
    for ((completion, _, total), reward) in cases.iter().zip(&outcome.rewards) {
        assert!((reward.total - total).abs() < 1e-12, "{completion:?}: {reward:?}");
        assert_eq!(reward.parts.len(), 2);
    }
}
