//! Keeps a run alive: skips steps that are not finite, and notices a loss that has jumped and stays high.
//!
//! A step is *high* when its loss exceeds the mean of the last `window_steps` calm ones by both `spike_deviations`
//! standard deviations and the share `spike_margin` of that mean. `spike_steps` high steps in a row are a spike: the
//! trainer goes back to the last checkpoint and the samples of those steps are excluded from then on. While a spike is
//! suspected no checkpoint is written, so the one gone back to always lies before it, and an interrupted run excludes
//! the same range as an undisturbed one. The steps between the checkpoint and the first high one are done again with the
//! same bits, so where checkpoints lie changes nothing that is made. Each intervention is a [`GuardRecord`] in the lineage.

use std::{collections::VecDeque, ops::Range};

pub use dsv3_core::{GuardAction, GuardRecord};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// When the guard steps in.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GuardConfig {
    /// Steps in a row that may be skipped because loss or gradient is not finite; one more ends the run.
    pub skips_max: u32,
    /// High steps in a row that make a spike; 0 turns detection off.
    pub spike_steps: u32,
    /// Calm steps a loss is compared with.
    pub window_steps: u32,
    /// Standard deviations above their mean from which a loss counts as high.
    pub spike_deviations: f64,
    /// Share of their mean above it from which a loss counts as high.
    pub spike_margin: f64,
    /// Times a run may go back to a checkpoint; one more spike ends it.
    pub rewinds_max: u32,
}

impl Default for GuardConfig {
    fn default() -> Self {
        Self {
            skips_max: 8,
            spike_steps: 3,
            window_steps: 32,
            spike_deviations: 6.0,
            spike_margin: 0.3,
            rewinds_max: 3,
        }
    }
}

impl GuardConfig {
    /// Skips steps that are not finite, and looks for no spikes: for losses that are not a level.
    pub fn finite_only() -> Self {
        Self { spike_steps: 0, ..Self::default() }
    }
}

/// What the guard remembers; part of every checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuardState {
    /// Losses of the last calm steps.
    window: VecDeque<f64>,
    /// Skips in a row.
    skips: u32,
    /// High steps in a row: first step, first sample, how many.
    suspicion: Option<(u64, u64, u32)>,
    /// Everything done in this phase, in the order of the samples.
    pub records: Vec<GuardRecord>,
    /// What was done in phases before.
    pub earlier: Vec<GuardRecord>,
}

/// What the trainer must do about a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Go on.
    Fine,
    /// The step was not applied, or not all of it; go on.
    Skipped(GuardRecord),
    /// Go back to a checkpoint and leave out what the record names.
    Rewind(GuardRecord),
    /// Give up: this and too many skips in a row.
    TooManySkips(GuardRecord, u32),
    /// Give up: too many rewinds.
    TooManyRewinds(u32),
}

/// What the guard is told of a step.
#[derive(Clone, Debug)]
pub struct StepFacts {
    /// Number of the step, from 1.
    pub step: u64,
    /// Positions in the loading order it consumed.
    pub samples: Range<u64>,
    /// Its loss.
    pub loss: f64,
    /// Updates that were not applied because loss or gradient was not finite.
    pub skipped: u32,
    /// All updates of the step.
    pub updates: u32,
}

impl GuardState {
    /// Judges a step.
    pub fn judge(&mut self, config: &GuardConfig, facts: &StepFacts) -> Verdict {
        if facts.skipped > 0 {
            return self.skipped(config, facts);
        }
        self.skips = 0;
        if config.spike_steps == 0 || !self.is_high(config, facts.loss) {
            self.suspicion = None;
            self.window.push_back(facts.loss);
            while self.window.len() > config.window_steps.max(1) as usize {
                self.window.pop_front();
            }
            return Verdict::Fine;
        }
        let (step, sample, count) = self.suspicion.unwrap_or((facts.step, facts.samples.start, 0));
        self.suspicion = Some((step, sample, count + 1));
        if count + 1 < config.spike_steps {
            return Verdict::Fine;
        }
        let rewinds = self.records.iter().filter(|record| record.action == GuardAction::Rewound).count() as u32;
        if rewinds >= config.rewinds_max {
            return Verdict::TooManyRewinds(rewinds);
        }
        Verdict::Rewind(GuardRecord {
            action: GuardAction::Rewound,
            step,
            last_step: facts.step,
            samples: [sample, facts.samples.end],
            loss: Some(facts.loss),
            back_to_step: None,
            updates: None,
        })
    }

    fn skipped(&mut self, config: &GuardConfig, facts: &StepFacts) -> Verdict {
        self.skips += 1;
        let record = GuardRecord {
            action: GuardAction::Skipped,
            step: facts.step,
            last_step: facts.step,
            samples: [facts.samples.start, facts.samples.end],
            loss: facts.loss.is_finite().then_some(facts.loss),
            back_to_step: None,
            updates: (facts.skipped < facts.updates).then_some([facts.skipped, facts.updates]),
        };
        self.note(record.clone());
        if self.skips > config.skips_max { Verdict::TooManySkips(record, self.skips) } else { Verdict::Skipped(record) }
    }

    /// Keeps a record, in the order of the samples: where checkpoints lay does not show.
    pub fn note(&mut self, record: GuardRecord) {
        let after = self.records.partition_point(|other| other.samples <= record.samples);
        self.records.insert(after, record);
    }

    /// What must survive going back to a checkpoint: the ranges left out so far. A skipped step after the checkpoint will
    /// be done, and skipped, again.
    pub fn keep_rewinds(&mut self, before: Vec<GuardRecord>) {
        for record in before {
            if record.action == GuardAction::Rewound && !self.records.contains(&record) {
                self.note(record);
            }
        }
    }

    fn is_high(&self, config: &GuardConfig, loss: f64) -> bool {
        let count = self.window.len();
        if count < config.window_steps.max(1) as usize {
            return false;
        }
        let mean = self.window.iter().sum::<f64>() / count as f64;
        let variance = self.window.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count as f64;
        let above = loss - mean;
        above > config.spike_deviations * variance.sqrt() && above > config.spike_margin * mean.abs()
    }

    /// Whether a spike is suspected, so that a checkpoint now might keep it.
    pub fn is_suspicious(&self) -> bool {
        self.suspicion.is_some() || self.skips > 0
    }

    /// The guard of the next phase: nothing but what was done so far.
    pub fn next_phase(self) -> Self {
        let earlier = [self.earlier, self.records].concat();
        Self { earlier, ..Self::default() }
    }

    /// Everything done in all phases, in order.
    pub fn lineage(&self) -> impl Iterator<Item = &GuardRecord> {
        self.earlier.iter().chain(&self.records)
    }

    /// Ranges of the loading order that are left out, in order and apart.
    pub fn excluded(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = self
            .records
            .iter()
            .filter(|record| record.action == GuardAction::Rewound)
            .map(|record| record.samples[0]..record.samples[1])
            .collect();
        ranges.sort_by_key(|range| range.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match merged.last_mut().filter(|last| range.start <= last.end) {
                Some(last) => last.end = last.end.max(range.end),
                None => merged.push(range),
            }
        }
        merged
    }
}

/// The next `count` positions of the loading order from `cursor`, without `excluded` ones, and the cursor after them.
/// Fewer when `total` is reached.
pub fn next_positions(cursor: u64, count: usize, total: u64, excluded: &[Range<u64>]) -> (Vec<u64>, u64) {
    let mut positions = Vec::with_capacity(count);
    let mut at = cursor;
    while positions.len() < count && at < total {
        match excluded.iter().find(|range| range.contains(&at)) {
            Some(range) => at = range.end,
            None => {
                positions.push(at);
                at += 1;
            }
        }
    }
    (positions, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(step: u64, loss: f64) -> StepFacts {
        StepFacts { step, samples: (step - 1) * 4..step * 4, loss, skipped: u32::from(!loss.is_finite()), updates: 1 }
    }

    fn config() -> GuardConfig {
        GuardConfig { window_steps: 4, spike_steps: 2, rewinds_max: 1, skips_max: 2, ..GuardConfig::default() }
    }

    #[test]
    fn a_lasting_jump_rewinds_and_names_its_samples() {
        let (config, mut guard) = (config(), GuardState::default());
        for (step, loss) in [2.0, 2.1, 1.9, 2.0, 9.0, 2.0].into_iter().enumerate() {
            assert_eq!(guard.judge(&config, &facts(step as u64 + 1, loss)), Verdict::Fine);
        }
        assert!(!guard.is_suspicious());
        assert_eq!(guard.judge(&config, &facts(7, 8.0)), Verdict::Fine);
        assert!(guard.is_suspicious());
        let Verdict::Rewind(record) = guard.judge(&config, &facts(8, 8.0)) else { panic!("no rewind") };
        assert_eq!((record.step, record.last_step, record.samples), (7, 8, [24, 32]));
        guard.records.push(record);
        assert_eq!(guard.excluded(), vec![24..32]);
        assert_eq!(guard.judge(&config, &facts(8, 8.0)), Verdict::TooManyRewinds(1));
        assert_eq!(next_positions(22, 4, 100, &guard.excluded()), (vec![22, 23, 32, 33], 34));
        assert_eq!(next_positions(30, 4, 34, &guard.excluded()), (vec![32, 33], 34));
    }

    #[test]
    fn steps_that_are_not_finite_are_skipped_up_to_a_limit() {
        let (config, mut guard) = (config(), GuardState::default());
        let skipped = |verdict: Verdict| matches!(verdict, Verdict::Skipped(_));
        assert!(skipped(guard.judge(&config, &facts(1, f64::NAN))));
        assert_eq!(guard.judge(&config, &facts(2, 2.0)), Verdict::Fine);
        for step in 3..5 {
            assert!(skipped(guard.judge(&config, &facts(step, f64::INFINITY))));
        }
        assert!(matches!(guard.judge(&config, &facts(5, f64::NAN)), Verdict::TooManySkips(_, 3)));
        assert_eq!(guard.records.len(), 4);
    }
}
