//! `kill -9` three times in every training stage, polite stops, other numbers of threads: outputs, metrics of every step
//! and closing figures are those of an undisturbed run, bit for bit.

use std::collections::BTreeMap;

use dsv3_core::Rng;
use serde_json::Value;

use crate::tiny::{Ended, Place, recipe, undisturbed};

/// Kills in each stage.
const KILLS: u64 = 3;

/// A training stage of the recipe.
struct Training {
    stage: &'static str,
    /// Optimiser steps, over all phases.
    steps: u64,
    /// Steps between two checkpoints.
    interval: u64,
}

const BASE: Training = Training { stage: "base", steps: 24, interval: 4 };
const EXTENDED: Training = Training { stage: "extended", steps: 24, interval: 4 };
const SFT: Training = Training { stage: "sft", steps: 20, interval: 4 };
const RL: Training = Training { stage: "rl", steps: 16, interval: 3 };

/// Metrics by step and name, without the only one that is a clock's.
fn metrics(ended: &Ended, stage: &str) -> BTreeMap<(u64, String), f64> {
    let metric = |event: &Value| {
        let name = event["name"].as_str().expect("a name").to_owned();
        ((event["step"].as_u64().expect("a step"), name), event["value"].as_f64().unwrap_or(f64::NAN))
    };
    ended.of("metric", stage).map(metric).filter(|((_, name), _)| name != "tokens_per_second").collect()
}

/// First and last step that the stage reported in this process.
fn steps(ended: &Ended, stage: &str) -> (u64, u64) {
    let mut steps =
        ended.of("metric", stage).filter(|event| event["name"] == "loss").map(|event| event["step"].as_u64());
    let first = steps.next().flatten().unwrap_or_else(|| panic!("{stage} made no step: {}", ended.errors));
    (first, steps.last().flatten().unwrap_or(first))
}

fn resumed_from(ended: &Ended, stage: &str) -> Option<u64> {
    ended.of("stage_started", stage).next().expect("it began")["resumed_from"].as_u64()
}

fn last_checkpoint(ended: &Ended, stage: &str) -> Option<u64> {
    ended.of("checkpoint", stage).last().and_then(|event| event["step"].as_u64())
}

/// What must hold for every process that trained a part of a stage, and over all of them.
struct Attempts<'a> {
    training: &'a Training,
    expected: BTreeMap<(u64, String), f64>,
    checkpoint: Option<u64>,
    /// Steps done by all processes together.
    steps_done: u64,
    /// Rows of the stream read by all processes together.
    rows_read: f64,
}

impl<'a> Attempts<'a> {
    fn new(training: &'a Training) -> Self {
        let expected = metrics(&undisturbed().1, training.stage);
        assert!(!expected.is_empty());
        Self { training, expected, checkpoint: None, steps_done: 0, rows_read: 0.0 }
    }

    fn rows_at(&self, step: u64) -> f64 {
        self.expected.get(&(step, "rows_read".to_owned())).copied().unwrap_or(0.0)
    }

    /// One more process.
    fn add(&mut self, ended: &Ended) {
        let stage = self.training.stage;
        let resumed = resumed_from(ended, stage);
        // A checkpoint may have been committed in the moment before the kill and its event lost.
        assert!(resumed >= self.checkpoint, "{stage} resumed from {resumed:?}, {:?} was there", self.checkpoint);
        let (first, last) = steps(ended, stage);
        let resumed = resumed.unwrap_or(0);
        assert_eq!(first, resumed + 1, "the first step is the checkpoint's plus one");
        for (at, value) in metrics(ended, stage) {
            assert_eq!(Some(&value), self.expected.get(&at), "{stage} {at:?}");
        }
        self.steps_done += last - resumed;
        self.rows_read += self.rows_at(last) - self.rows_at(resumed);
        self.checkpoint = last_checkpoint(ended, stage).or(self.checkpoint);
    }

    /// The stage is finished after `stops` interruptions.
    fn finish(&self, place: &Place, key: &str, stops: u64) {
        let Training { stage, steps, interval } = self.training;
        let most = steps + stops * interval;
        assert!((*steps..=most).contains(&self.steps_done), "{stage}: {} steps in all", self.steps_done);
        let rows = self.rows_at(*steps);
        // The batch is largest at the end, so no interval has more rows than the last.
        let rows_most = rows + (stops * interval) as f64 * (rows - self.rows_at(steps - 1));
        assert!((rows..=rows_most).contains(&self.rows_read), "{stage}: {} rows in all, {rows} needed", self.rows_read);
        let (calm, whole) = undisturbed();
        assert_eq!(whole.key(stage), key);
        let (expected, found) = (calm.result(key), place.result(key));
        assert_eq!(found["outputs"], expected["outputs"], "{stage}");
        assert_eq!(found["metrics"], expected["metrics"], "{stage}");
    }
}

/// Moments of the kills: rising, each at a step of its own part of the run or at the first checkpoint after it.
fn moments(training: &Training) -> Vec<(u64, &'static str)> {
    let mut rng = Rng::new(5).key("kills").key(training.stage);
    let part = (training.steps - training.interval) / KILLS;
    let kinds = ["metric", "checkpoint", "progress"];
    (0..KILLS).map(|i| (1 + i * part + rng.below(part - 1), kinds[i as usize % kinds.len()])).collect()
}

/// Whether `event` is of this kind and the stage has come to `step`.
fn is_moment(event: &Value, stage: &str, (step, kind): (u64, &str), seen: &mut u64) -> bool {
    if event["stage"] != stage {
        return false;
    }
    *seen = (*seen).max(event["step"].as_u64().unwrap_or(0));
    event["event"] == kind && *seen >= step
}

fn survives_kills(training: &Training) {
    let (place, stage) = (Place::new(), training.stage);
    let mut attempts = Attempts::new(training);
    for moment in moments(training) {
        let mut seen = 0;
        let stop = |event: &Value| is_moment(event, stage, moment, &mut seen).then_some(libc::SIGKILL);
        let killed = place.watch(&["run", &recipe(), "--until", stage, "--threads", "1"], stop);
        assert_eq!(killed.code, None, "{stage} was to be killed at {moment:?}: {}", killed.errors);
        attempts.add(&killed);
    }
    let last = place.done(&["--until", stage]);
    attempts.add(&last);
    attempts.finish(&place, &last.key(stage), KILLS);
}

#[test]
fn pretraining_survives_kills() {
    survives_kills(&BASE);
}

#[test]
fn context_extension_survives_kills() {
    survives_kills(&EXTENDED);
}

#[test]
fn sft_survives_kills() {
    survives_kills(&SFT);
}

#[test]
fn rl_survives_kills() {
    survives_kills(&RL);
}

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
        let mut seen = 0;
        let stop = |event: &Value| is_moment(event, stage, (*step, "metric"), &mut seen).then_some(*signal);
        let stopped = place.watch(&["run", &recipe(), "--until", stage], stop);
        assert_eq!(stopped.code, Some(75), "{stage}: {}", stopped.errors);
        assert_eq!(
            (&stopped.last()["event"], &stopped.last()["outcome"]),
            (&"run_finished".into(), &"cancelled".into())
        );
        let (_, last) = steps(&stopped, stage);
        assert_eq!(last_checkpoint(&stopped, stage), Some(last), "no step is lost: {}", stopped.errors);
        attempts.add(&stopped);
        assert_eq!(place.run(&["--until", stage, "--dry-run"]).code, Some(0));
    }
    // From the store alone, as a batch queue would.
    let last = place.watch(&["exec", "last", stage], |_| None);
    assert_eq!(last.code, Some(0), "{}", last.errors);
    attempts.add(&last);
    assert_eq!(attempts.steps_done, training.steps, "a polite stop loses no step");
    attempts.finish(&place, &last.key(stage), 0);
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
