//! What the event logs of runs say of stages, by stage key.
//!
//! A key's metrics may lie in several logs: an attempt that was stopped, the one that went on in the next run. They are
//! put together in the order of the runs. Invariant: each step of a series stands once; of a step that was logged twice
//! (after a kill, or because the guard went back) the later value counts, which is the one the result was made with.

use std::collections::BTreeMap;

use dsv3_core::{Event, Level, Outcome};
use serde::Serialize;

/// One time that a stage was begun.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Attempt {
    /// Run it belonged to.
    pub run: String,
    /// Step of the checkpoint it went on from; none when it began at the start.
    pub resumed_from: Option<u64>,
    /// How it ended; none while it runs, or when its process ended without a word.
    pub outcome: Option<Outcome>,
    /// How long it took; none without an end.
    pub seconds: Option<f64>,
}

/// What logs say of one key.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Trace {
    pub(super) attempts: Vec<Attempt>,
    /// Warnings, each once, in order.
    pub(super) warnings: Vec<String>,
    /// Value by metric and step.
    pub(crate) series: BTreeMap<String, BTreeMap<u64, f64>>,
}

impl Trace {
    pub(super) fn warn(&mut self, message: &str) {
        if !self.warnings.iter().any(|known| known == message) {
            self.warnings.push(message.to_owned());
        }
    }
}

/// Adds what the log of `run` says of the keys for which `wanted` holds.
pub(crate) fn scan(run: &str, events: &[Event], wanted: &dyn Fn(&str) -> bool, traces: &mut BTreeMap<String, Trace>) {
    // Key of the attempt that runs, by stage; none when nobody asked for that key.
    let mut current: BTreeMap<&str, Option<&str>> = BTreeMap::new();
    // Warnings said before the stage begins, such as that its old result is damaged.
    let mut early: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for event in events {
        match event {
            Event::StageStarted { stage, key, resumed_from, .. } => {
                let key = wanted(key).then_some(key.as_str());
                current.insert(stage, key);
                let said = early.remove(stage.as_str()).unwrap_or_default();
                let Some(key) = key else { continue };
                let trace = traces.entry(key.to_owned()).or_default();
                said.into_iter().for_each(|message| trace.warn(message));
                let resumed_from = *resumed_from;
                trace.attempts.push(Attempt { run: run.to_owned(), resumed_from, outcome: None, seconds: None });
            }
            Event::Metric { stage, name, step, value } => {
                if let Some(Some(key)) = current.get(stage.as_str()) {
                    let series = &mut traces.entry((*key).to_owned()).or_default().series;
                    series.entry(name.clone()).or_default().insert(*step, *value);
                }
            }
            Event::Log { stage, level: Level::Warn, message } => match current.get(stage.as_str()) {
                Some(Some(key)) => traces.entry((*key).to_owned()).or_default().warn(message),
                Some(None) => {}
                None => early.entry(stage).or_default().push(message),
            },
            Event::StageFinished { stage, outcome, seconds, .. } => {
                if let Some(Some(key)) = current.remove(stage.as_str())
                    && let Some(attempt) = traces.entry(key.to_owned()).or_default().attempts.last_mut()
                {
                    (attempt.outcome, attempt.seconds) = (Some(outcome.clone()), Some(*seconds));
                }
                early.remove(stage.as_str());
            }
            // A new walk: what ran before it has ended without a word.
            Event::RunStarted { .. } => current.clear(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(key: &str, resumed_from: Option<u64>) -> Event {
        Event::StageStarted { stage: "base".to_owned(), kind: "pretrain".to_owned(), key: key.to_owned(), resumed_from }
    }

    fn loss(step: u64, value: f64) -> Event {
        Event::Metric { stage: "base".to_owned(), name: "loss".to_owned(), step, value }
    }

    fn finished(outcome: Outcome) -> Event {
        Event::StageFinished { stage: "base".to_owned(), outcome, seconds: 1.5, metrics: BTreeMap::new() }
    }

    fn warned(message: &str) -> Event {
        Event::Log { stage: "base".to_owned(), level: Level::Warn, message: message.to_owned() }
    }

    #[test]
    fn a_series_has_each_step_once_over_kills_and_runs() {
        let mut traces = BTreeMap::new();
        let wanted = |key: &str| key == "k";
        // The first process is killed after step 3; the second, of another run, goes on from the checkpoint of step 2.
        scan("r1", &[started("k", None), loss(1, 3.0), loss(2, 2.5), loss(3, 2.0)], &wanted, &mut traces);
        let second =
            [warned("odd"), started("k", Some(2)), loss(3, 2.25), warned("odd"), loss(4, 1.0), finished(Outcome::Done)];
        scan("r2", &second, &wanted, &mut traces);
        let trace = &traces["k"];
        assert_eq!(trace.series["loss"], BTreeMap::from([(1, 3.0), (2, 2.5), (3, 2.25), (4, 1.0)]));
        assert_eq!(trace.warnings, ["odd"]);
        let ends: Vec<_> = trace.attempts.iter().map(|one| (one.run.as_str(), one.resumed_from, one.seconds)).collect();
        assert_eq!(ends, [("r1", None, None), ("r2", Some(2), Some(1.5))]);
    }

    #[test]
    fn metrics_of_other_keys_under_the_same_name_are_left_out() {
        let mut traces = BTreeMap::new();
        let events = [
            started("other", None),
            loss(1, 9.0),
            finished(Outcome::Done),
            warned("cached"),
            finished(Outcome::Cached),
            started("k", None),
            loss(1, 3.0),
        ];
        scan("r", &events, &|key| key == "k", &mut traces);
        assert_eq!(traces.len(), 1);
        assert_eq!(traces["k"].series["loss"], BTreeMap::from([(1, 3.0)]));
        assert!(traces["k"].warnings.is_empty(), "{:?}", traces["k"].warnings);
    }
}
