//! `chaos` on the shipped life and on the tests' recipe: a process that dies at a store operation, in memory and on disk,
//! and a store that fails without a crash. Each trial ends with the bits of the undisturbed run.
//!
//! A sample by default; `DSV3_CHAOS_POINTS` asks for more, and `results/chaos.md` has what all points gave:
//!
//!     DSV3_CHAOS_POINTS=100000 cargo test --test main chaos -- --nocapture

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::tiny::{Place, recipe};

/// Points of a sample unless `DSV3_CHAOS_POINTS` says how many.
const POINTS: usize = 40;

fn points_wanted() -> String {
    std::env::var("DSV3_CHAOS_POINTS").unwrap_or_else(|_| POINTS.to_string())
}

/// Every line of `chaos --json`, and its exit code.
fn chaos(pipeline: &str, args: &[&str]) -> (Option<i32>, Vec<Value>, String) {
    let place = Place::new();
    let mut command = place.command(&["chaos", pipeline, "--json", "--threads", "1"]);
    let output = command.args(args).stdin(Stdio::null()).output().expect("the program runs");
    let lines =
        String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    (output.status.code(), lines, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A chaos run in which every trial is identical; answers its last line.
fn calm(pipeline: &str, args: &[&str]) -> Value {
    let (code, lines, errors) = chaos(pipeline, args);
    let last = lines.last().cloned().unwrap_or_default();
    assert_eq!(code, Some(0), "{args:?}\n{last:#}\n{errors}");
    assert_eq!(last["tried"], last["identical"]);
    println!("{pipeline} {args:?}: {} of {} points, {} s", last["tried"], last["points"], last["seconds"]);
    for row in last["rows"].as_array().expect("rows") {
        let field = |name: &str| row[name].as_str().map_or_else(|| row[name].to_string(), str::to_owned);
        let names = ["stage", "operation", "points", "not_met", "attempts", "resumed", "further_crashes", "identical"];
        println!("| {} |", names.map(field).join(" | "));
    }
    last
}

fn full() -> String {
    format!("{}/pipelines/full.yaml", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_crash_at_every_store_operation_of_the_whole_life() {
    let last = calm(&full(), &["--seed", "6", "--points", &points_wanted()]);
    assert!(last["points"].as_u64() >= Some(2000), "{}", last["points"]);
    assert_eq!(last["stages"].as_array().map(Vec::len), Some(17));
}

#[test]
fn a_crash_at_every_step_of_a_durable_create() {
    let last = calm(&recipe(), &["--seed", "6", "--disk", "--points", &points_wanted()]);
    let rows = last["rows"].as_array().expect("rows");
    for step in ["stage", "sync", "link", "answer"] {
        let met = |row: &Value| row["operation"].as_str().is_some_and(|name| name.starts_with(step));
        assert!(rows.iter().any(met), "{step} in {rows:?}");
    }
}

#[test]
fn a_store_that_fails_without_a_crash() {
    calm(&recipe(), &["--seed", "6", "--faults", "troubles", "--points", &points_wanted()]);
}

#[test]
fn one_point_again_and_points_that_are_none() {
    let stages = ["--stages", "traces", "--seed", "3"];
    let (code, lines, errors) = chaos(&recipe(), &[&stages[..], &["--points", "2"]].concat());
    assert_eq!((code, lines.len()), (Some(0), 3), "{errors}");
    let point = lines[0]["point"].as_str().expect("a point").to_owned();
    let (code, again, errors) = chaos(&recipe(), &["--seed", "3", "--point", &point]);
    assert_eq!(code, Some(0), "{errors}");
    assert_eq!(again[0], lines[0], "a trial is a function of pipeline, seed and point");
    for (args, part) in [
        (&["--point", "traces: create nowhere #1 crash-before"][..], "has no operation"),
        (&["--point", "nonsense"], "is no point"),
        (&["--faults", "boom"], "no fault is called"),
        (&["--stages", "nobody"], "nobody"),
    ] {
        let (code, _, errors) = chaos(&recipe(), args);
        assert_eq!(code, Some(64), "{args:?}\n{errors}");
        assert!(errors.contains(part), "{part} in {errors}");
    }
}

#[test]
fn what_is_made_small_is_said_and_can_be_overruled() {
    let place = Place::new();
    let said = |args: &[&str]| {
        let mut command: Command = place.command(&["chaos", &recipe(), "--threads", "1", "--points", "1"]);
        let output = command.args(args).output().expect("the program runs");
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let text = said(&["--stages", "traces", "--set", "stages.base.config.length.steps=3"]);
    assert!(text.contains("shrunk: --set 'stages.rl.config.steps=3'"), "{text}");
    assert!(text.contains("first 24 rows of"), "{text}");
    assert!(!text.contains("stages.base.config.length"), "{text}");
    assert!(
        text.contains(
            "not compared, since a clock has a hand in them: server.draft_acceptance, server.tokens_per_second"
        ),
        "{text}"
    );
}
