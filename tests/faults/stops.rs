//! Polite stops, other numbers of threads, and a kill in the last moment: outputs, metrics of every step and closing figures
//! are those of an undisturbed run, bit for bit.

use serde_json::Value;

use super::attempts::{Attempts, BASE, EXTENDED, RL, SFT, Training, last_checkpoint, metrics, steps};
use crate::tiny::{Place, recipe, undisturbed};

/// Killed between its last step and its result, a stage is finished from its last checkpoint without a step.
#[test]
fn a_kill_before_the_result_is_committed_costs_no_step() {
    let place = Place::new();
    let stop = |event: &Value| (event["event"] == "artifact" && event["stage"] == "base").then_some(libc::SIGKILL);
    let killed = place.watch(&["run", &recipe(), "--until", "base"], stop);
    assert_eq!(killed.code, None, "{}", killed.errors);
    let key = killed.key("base");
    let last = place.done(&["--until", "base"]);
    assert_eq!(last.of("metric", "base").filter(|event| event["name"] == "loss").count(), 0);
    assert_eq!(place.result(&key)["outputs"], undisturbed().0.result(&key)["outputs"]);
}

/// Stopped by signals, a stage checkpoints where it is and ends with exit 75.
fn stops_politely(training: &Training, signals: &[(u64, i32)]) {
    let (place, stage) = (Place::new(), training.stage);
    let mut attempts = Attempts::new(training);
    for (step, signal) in signals {
        let stop = |event: &Value| {
            let there = event["event"] == "metric" && event["stage"] == stage && event["step"].as_u64() >= Some(*step);
            there.then_some(*signal)
        };
        let stopped = place.watch(&["run", &recipe(), "--until", stage], stop);
        assert_eq!(stopped.code, Some(75), "{stage}: {}", stopped.errors);
        assert_eq!(
            (&stopped.last()["event"], &stopped.last()["outcome"]),
            (&"run_finished".into(), &"cancelled".into())
        );
        let (_, last) = steps(&stopped, stage).expect("steps");
        assert_eq!(last_checkpoint(&stopped, stage), Some(last), "no step is lost: {}", stopped.errors);
        attempts.add(&stopped);
        assert_eq!(place.run(&["--until", stage, "--dry-run"]).code, Some(0));
    }
    // From the store alone, as a batch queue would.
    let last = place.watch(&["exec", "last", stage], |_| None);
    assert_eq!(last.code, Some(0), "{}", last.errors);
    attempts.add(&last);
    assert_eq!(attempts.steps_done, training.steps, "a polite stop loses no step");
    attempts.finish(&place, 0);
}

#[test]
fn pretraining_stops_politely() {
    stops_politely(&BASE, &[(3, libc::SIGTERM), (10, libc::SIGUSR1), (17, libc::SIGINT)]);
}

#[test]
fn context_extension_stops_politely() {
    stops_politely(&EXTENDED, &[(5, libc::SIGTERM), (14, libc::SIGTERM)]);
}

#[test]
fn sft_stops_politely() {
    stops_politely(&SFT, &[(7, libc::SIGTERM)]);
}

#[test]
fn rl_stops_politely() {
    stops_politely(&RL, &[(5, libc::SIGTERM)]);
}

#[test]
fn one_thread_gives_the_bits_of_two() {
    let (calm, two) = undisturbed();
    let (place, one) = {
        let place = Place::new();
        let ended = place.done(&["--threads", "1"]);
        (place, ended)
    };
    let stages: Vec<&str> = two
        .events
        .iter()
        .filter(|event| event["event"] == "stage_started")
        .filter_map(|event| event["stage"].as_str())
        .collect();
    assert_eq!(stages.len(), 9);
    for stage in stages {
        let key = two.key(stage);
        assert_eq!(one.key(stage), key, "{stage}");
        assert_eq!(place.result(&key)["outputs"], calm.result(&key)["outputs"], "{stage}");
        assert_eq!(metrics(&one, stage), metrics(two, stage), "{stage}");
    }
}
