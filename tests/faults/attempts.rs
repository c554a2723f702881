//! What must hold for every process that trained a part of a stage, and over all of them, whatever ended them.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::tiny::{Ended, Place, undisturbed};

/// A training stage of the recipe.
pub(super) struct Training {
    pub(super) stage: &'static str,
    /// Optimiser steps, over all phases.
    pub(super) steps: u64,
    /// Steps between two checkpoints.
    pub(super) interval: u64,
}

pub(super) const BASE: Training = Training { stage: "base", steps: 24, interval: 4 };
pub(super) const EXTENDED: Training = Training { stage: "extended", steps: 24, interval: 4 };
pub(super) const SFT: Training = Training { stage: "sft", steps: 20, interval: 4 };
pub(super) const RL: Training = Training { stage: "rl", steps: 16, interval: 3 };

/// Metrics that tell of the machine.
const CLOCKED: [&str; 3] = ["tokens_per_second", "checkpoint_stall_seconds", "checkpoint_save_seconds"];

/// Metrics by step and name, without those of a clock.
pub(super) fn metrics(ended: &Ended, stage: &str) -> BTreeMap<(u64, String), f64> {
    let metric = |event: &Value| {
        let name = event["name"].as_str().expect("a name").to_owned();
        ((event["step"].as_u64().expect("a step"), name), event["value"].as_f64().unwrap_or(f64::NAN))
    };
    ended.of("metric", stage).map(metric).filter(|((_, name), _)| !CLOCKED.contains(&name.as_str())).collect()
}

/// First and last step that the stage reported in this process; none when it made no step.
pub(super) fn steps(ended: &Ended, stage: &str) -> Option<(u64, u64)> {
    let mut steps =
        ended.of("metric", stage).filter(|event| event["name"] == "loss").filter_map(|event| event["step"].as_u64());
    let first = steps.next()?;
    Some((first, steps.last().unwrap_or(first)))
}

pub(super) fn last_checkpoint(ended: &Ended, stage: &str) -> Option<u64> {
    ended.of("checkpoint", stage).last().and_then(|event| event["step"].as_u64())
}

/// All processes that worked at one stage in one store, one after another.
pub(super) struct Attempts<'a> {
    training: &'a Training,
    expected: BTreeMap<(u64, String), f64>,
    /// Step of the newest checkpoint that was told of.
    checkpoint: u64,
    /// Last step that the processes before reported.
    reached: u64,
    /// Most steps that one process had to do again.
    pub(super) repeated_max: u64,
    /// Steps done by all processes together.
    pub(super) steps_done: u64,
    /// Rows of the stream read by all processes together.
    pub(super) rows_read: f64,
}

impl<'a> Attempts<'a> {
    pub(super) fn new(training: &'a Training) -> Self {
        let expected = metrics(&undisturbed().1, training.stage);
        assert!(!expected.is_empty());
        Self { training, expected, checkpoint: 0, reached: 0, repeated_max: 0, steps_done: 0, rows_read: 0.0 }
    }

    fn rows_at(&self, step: u64) -> f64 {
        self.expected.get(&(step, "rows_read".to_owned())).copied().unwrap_or(0.0)
    }

    /// Rows that one undisturbed run reads.
    pub(super) fn rows_needed(&self) -> f64 {
        self.rows_at(self.training.steps)
    }

    /// Most steps and rows allowed after `stops` interruptions: each costs an interval at most, and one more whose
    /// checkpoint was being committed. The batch is largest at the end, so no interval has more rows than the last steps
    /// have.
    pub(super) fn bounds(&self, stops: u64) -> (u64, f64) {
        let Training { steps, interval, .. } = self.training;
        let rows = self.rows_needed();
        let rows_of_step = rows - self.rows_at(steps - 1);
        let lost = stops * 2 * interval;
        (steps + lost, rows + lost as f64 * rows_of_step)
    }

    /// One more process. One that was ended before it came to the stage, or found it finished, shows nothing.
    pub(super) fn add(&mut self, ended: &Ended) {
        let Training { stage, interval, .. } = self.training;
        let Some(started) = ended.of("stage_started", stage).next() else { return };
        let resumed = started["resumed_from"].as_u64().unwrap_or(0);
        // A checkpoint may have been committed in the moment before the kill and its event lost.
        assert!(resumed >= self.checkpoint, "{stage} resumed from {resumed}, {} was there", self.checkpoint);
        let damaged =
            ended.of("log", stage).find(|event| event["message"].to_string().contains("skipping a checkpoint"));
        assert!(damaged.is_none(), "no kill leaves a damaged checkpoint: {damaged:?}");
        let again = self.reached.saturating_sub(resumed);
        // At most one save is in flight, and the next waits for it.
        assert!(again <= 2 * interval, "{stage} came to step {} and goes on after {resumed}", self.reached);
        self.repeated_max = self.repeated_max.max(again);
        self.checkpoint = last_checkpoint(ended, stage).unwrap_or(resumed);
        for (at, value) in metrics(ended, stage) {
            assert_eq!(Some(&value), self.expected.get(&at), "{stage} {at:?}");
        }
        let Some((first, last)) = steps(ended, stage) else { return };
        assert_eq!(first, resumed + 1, "the first step is the checkpoint's plus one");
        self.steps_done += last - resumed;
        self.rows_read += self.rows_at(last) - self.rows_at(resumed);
        self.reached = last;
    }

    /// The stage is finished after `stops` interruptions.
    pub(super) fn finish(&self, place: &Place, stops: u64) {
        let Training { stage, steps, .. } = self.training;
        let (steps_max, rows_max) = self.bounds(stops);
        assert!((*steps..=steps_max).contains(&self.steps_done), "{stage}: {} steps in all", self.steps_done);
        let rows = self.rows_needed();
        assert!((rows..=rows_max).contains(&self.rows_read), "{stage}: {} rows in all, {rows} needed", self.rows_read);
        let (calm, whole) = undisturbed();
        let key = whole.key(stage);
        let (expected, found) = (calm.result(&key), place.result(&key));
        assert_eq!(found["outputs"], expected["outputs"], "{stage}");
        assert_eq!(found["metrics"], expected["metrics"], "{stage}");
        assert_eq!(found["lineage"], expected["lineage"], "{stage}");
    }
}
