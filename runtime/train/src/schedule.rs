//! Schedules: learning rate, batch size, MTP weight λ and bias speed γ as functions of how far a run has come.
//!
//! A run is measured in consumed tokens or in optimiser steps ([`Horizon`]). Segments are half-open, `[start, until)`,
//! in that measure, taken **before** the step: at a boundary the later segment holds. Warm-up counts the step itself:
//! the factor of step n (from 1) is min(1, n / warm-up steps), so position 0, before any step, has learning rate 0 and
//! step 2000 of a 2000-step warm-up has the full one. Paper: DeepSeek-V3 §4.2.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

/// A point of a run, counted from its start.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Extent {
    /// Optimiser steps.
    Steps(#[serde(deserialize_with = "whole_number")] u64),
    /// Consumed tokens. `10e12` is read as a whole number.
    Tokens(#[serde(deserialize_with = "whole_number")] u64),
    /// Share of the run, 0 to 1.
    Fraction(f64),
}

/// Reads `10e12` as well as `10000000000000`.
fn whole_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let value = serde_json::Number::deserialize(deserializer)?;
    let whole = value.as_u64().or_else(|| {
        let float = value.as_f64()?;
        (float >= 0.0 && float.fract() == 0.0 && float < 2f64.powi(63)).then_some(float as u64)
    });
    whole.ok_or_else(|| serde::de::Error::custom(format!("{value} is not a whole number of steps or tokens")))
}

/// Length of a run in its own measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Horizon {
    /// The run ends after this many steps.
    Steps(u64),
    /// The run ends when this many tokens are consumed.
    Tokens(u64),
}

/// Where a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Number of the step, from 1; 0 asks for the state before any step.
    pub step: u64,
    /// Tokens consumed before the step.
    pub tokens: u64,
    /// Tokens consumed once the step is done.
    pub tokens_after: u64,
}

impl Position {
    /// The position before any step.
    pub const START: Self = Self { step: 0, tokens: 0, tokens_after: 0 };
}

impl Horizon {
    /// How far the run has come before the step, in its measure.
    pub fn elapsed(self, at: Position) -> u64 {
        match self {
            Self::Steps(_) => at.step.saturating_sub(1),
            Self::Tokens(_) => at.tokens,
        }
    }

    /// Length of the run in its measure.
    pub fn total(self) -> u64 {
        match self {
            Self::Steps(total) | Self::Tokens(total) => total,
        }
    }

    /// Whether a run that has done `steps` and consumed `tokens` is over.
    pub fn is_over(self, steps: u64, tokens: u64) -> bool {
        match self {
            Self::Steps(total) => steps >= total,
            Self::Tokens(total) => tokens >= total,
        }
    }

    /// `extent` in this measure, or `None` when it is in the other one.
    fn resolve(self, extent: Extent) -> Option<f64> {
        match (self, extent) {
            (_, Extent::Fraction(fraction)) => Some(fraction * self.total() as f64),
            (Self::Steps(_), Extent::Steps(n)) | (Self::Tokens(_), Extent::Tokens(n)) => Some(n as f64),
            _ => None,
        }
    }
}

/// What is wrong with a schedule: the dotted path below it and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Dotted path of the field below the schedule.
    pub path: String,
    /// What is wrong.
    pub message: String,
}

fn problem(path: impl Into<String>, message: impl Into<String>) -> Problem {
    Problem { path: path.into(), message: message.into() }
}

fn check_extent(path: &str, extent: Extent, horizon: Horizon, problems: &mut Vec<Problem>) {
    match extent {
        Extent::Fraction(f) if !(0.0..=1.0).contains(&f) => {
            problems.push(problem(path, format!("{f} is not a share between 0 and 1")));
        }
        _ if horizon.resolve(extent).is_none() => {
            let measure = if matches!(horizon, Horizon::Steps(_)) { "steps" } else { "tokens" };
            problems.push(problem(path, format!("the run is measured in {measure}; use {measure} or fraction")));
        }
        _ => {}
    }
}

/// One stretch of a learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "shape", rename_all = "snake_case", deny_unknown_fields)]
pub enum LrSegment {
    /// One value.
    Constant {
        /// Learning rate.
        lr: f64,
        /// Where the segment ends; the end of the run when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<Extent>,
    },
    /// to + (from − to)·(1 + cos πx)/2 for x from 0 to 1 over the segment.
    Cosine {
        /// Learning rate at the segment's start.
        from: f64,
        /// Learning rate at its end.
        to: f64,
        /// Where the segment ends; the end of the run when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<Extent>,
    },
    /// A straight line over the segment.
    Linear {
        /// Learning rate at the segment's start.
        from: f64,
        /// Learning rate at its end.
        to: f64,
        /// Where the segment ends; the end of the run when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<Extent>,
    },
}

impl LrSegment {
    fn until(&self) -> Option<Extent> {
        match *self {
            Self::Constant { until, .. } | Self::Cosine { until, .. } | Self::Linear { until, .. } => until,
        }
    }

    fn rates(&self) -> [f64; 2] {
        match *self {
            Self::Constant { lr, .. } => [lr, lr],
            Self::Cosine { from, to, .. } | Self::Linear { from, to, .. } => [from, to],
        }
    }

    /// Value at share `x` of the segment.
    fn at(&self, x: f64) -> f64 {
        let [from, to] = self.rates();
        match self {
            Self::Constant { .. } => from,
            Self::Cosine { .. } => to + (from - to) * (1.0 + (std::f64::consts::PI * x).cos()) / 2.0,
            Self::Linear { .. } => from + (to - from) * x,
        }
    }
}

/// Learning rate over a run: a linear warm-up factor times the segment that holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LrSchedule {
    /// The factor grows from 0 to 1 over this stretch; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup: Option<Extent>,
    /// Segments in order, each half-open from the end of the one before. After the last one its end value holds.
    pub segments: Vec<LrSegment>,
}

impl LrSchedule {
    /// One constant value, without warm-up.
    pub fn constant(lr: f64) -> Self {
        Self { warmup: None, segments: vec![LrSegment::Constant { lr, until: None }] }
    }

    /// Learning rate of the step at `at` of a run of length `horizon`.
    pub fn at(&self, at: Position, horizon: Horizon) -> f64 {
        self.warmup_factor(at, horizon) * self.segment_value(horizon.elapsed(at) as f64, horizon)
    }

    fn segment_value(&self, elapsed: f64, horizon: Horizon) -> f64 {
        let mut start = 0.0;
        for segment in &self.segments {
            let end = segment.until().and_then(|e| horizon.resolve(e)).unwrap_or(horizon.total() as f64);
            if elapsed < end {
                return segment.at((elapsed - start) / (end - start));
            }
            start = end;
        }
        self.segments.last().map_or(0.0, |segment| segment.at(1.0))
    }

    fn warmup_factor(&self, at: Position, horizon: Horizon) -> f64 {
        let (done, length) = match (self.warmup, horizon) {
            (None, _) => return 1.0,
            (Some(Extent::Steps(n)), _) => (at.step, n as f64),
            (Some(Extent::Tokens(n)), _) => (at.tokens_after, n as f64),
            (Some(Extent::Fraction(f)), Horizon::Steps(n)) => (at.step, f * n as f64),
            (Some(Extent::Fraction(f)), Horizon::Tokens(n)) => (at.tokens_after, f * n as f64),
        };
        if length <= 0.0 { 1.0 } else { (done as f64 / length).min(1.0) }
    }

    /// Everything wrong with it for a run of length `horizon`.
    pub fn check(&self, horizon: Horizon) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Some(Extent::Fraction(f)) = self.warmup
            && !(0.0..=1.0).contains(&f)
        {
            problems.push(problem("warmup.fraction", format!("{f} is not a share between 0 and 1")));
        }
        if self.segments.is_empty() {
            problems.push(problem("segments", "at least one segment is needed"));
        }
        let mut start = 0.0;
        for (i, segment) in self.segments.iter().enumerate() {
            let path = format!("segments.{i}");
            if segment.rates().iter().any(|lr| !lr.is_finite() || *lr < 0.0) {
                problems.push(problem(&path, "a learning rate is a number of at least 0"));
            }
            match segment.until() {
                Some(extent) => check_extent(&format!("{path}.until"), extent, horizon, &mut problems),
                None if i + 1 < self.segments.len() => {
                    problems.push(problem(&path, "only the last segment may go without `until`"));
                }
                None => {}
            }
            if let Some(end) = segment.until().and_then(|e| horizon.resolve(e)) {
                if end <= start {
                    problems.push(problem(format!("{path}.until"), "the segment ends before it starts"));
                }
                start = end;
            }
        }
        problems
    }
}

/// How a batch grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RampShape {
    /// In proportion to the measure of the run.
    #[default]
    Linear,
    /// `from` until the ramp's end, then the full size.
    Step,
}

/// Growth of the batch at the start of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchRamp {
    /// Sequences per step at the start.
    pub from: u32,
    /// Where the full size is reached.
    pub until: Extent,
    /// How it grows.
    #[serde(default)]
    pub shape: RampShape,
    /// Sizes during the ramp are rounded down to a multiple of this.
    #[serde(default = "one")]
    pub multiple_of: u32,
}

fn one() -> u32 {
    1
}

/// Sequences per optimiser step over a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchSchedule {
    /// Sequences per step once the ramp is over.
    pub sequences: u32,
    /// Growth at the start; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramp: Option<BatchRamp>,
}

impl BatchSchedule {
    /// Always the same size.
    pub fn constant(sequences: u32) -> Self {
        Self { sequences, ramp: None }
    }

    /// Sequences of the step that starts after `steps` done steps and `tokens` consumed ones.
    pub fn at(&self, steps: u64, tokens: u64, horizon: Horizon) -> u32 {
        let Some(ramp) = self.ramp else { return self.sequences };
        let elapsed = horizon.elapsed(Position { step: steps + 1, tokens, tokens_after: tokens });
        let Some(end) = horizon.resolve(ramp.until) else { return self.sequences };
        if elapsed as f64 >= end {
            return self.sequences;
        }
        if ramp.shape == RampShape::Step {
            return ramp.from.max(1);
        }
        // Whole numbers: a rounding error here would move a batch by a whole multiple.
        let grown = u128::from(self.sequences.saturating_sub(ramp.from)) * u128::from(elapsed) / end.ceil() as u128;
        let multiple = ramp.multiple_of.max(1);
        ((ramp.from + grown as u32) / multiple * multiple).max(1)
    }

    /// Everything wrong with it for a run of length `horizon`.
    pub fn check(&self, horizon: Horizon) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.sequences == 0 {
            problems.push(problem("sequences", "a step needs at least one sequence"));
        }
        if let Some(ramp) = self.ramp {
            check_extent("ramp.until", ramp.until, horizon, &mut problems);
            if ramp.from == 0 || ramp.from > self.sequences {
                problems.push(problem("ramp.from", format!("must lie between 1 and {}", self.sequences)));
            }
            if ramp.multiple_of == 0 || ramp.from % ramp.multiple_of.max(1) != 0 {
                problems.push(problem("ramp.multiple_of", format!("must divide {}", ramp.from)));
            }
        }
        problems
    }
}

/// A value that jumps at given points of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Switched {
    /// Value from the start.
    pub value: f64,
    /// Later values, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub switches: Vec<Switch>,
}

/// One jump of a [`Switched`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// The first point at which `value` holds.
    pub at: Extent,
    /// The new value.
    pub value: f64,
}

impl Switched {
    /// Always `value`.
    pub fn constant(value: f64) -> Self {
        Self { value, switches: Vec::new() }
    }

    /// Value for the step at `at`.
    pub fn at(&self, at: Position, horizon: Horizon) -> f64 {
        let elapsed = horizon.elapsed(at) as f64;
        let reached = |s: &&Switch| horizon.resolve(s.at).is_some_and(|point| elapsed >= point);
        self.switches.iter().rev().find(reached).map_or(self.value, |s| s.value)
    }

    /// Everything wrong with it for a run of length `horizon`.
    pub fn check(&self, horizon: Horizon) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut last = f64::NEG_INFINITY;
        for (i, switch) in self.switches.iter().enumerate() {
            let path = format!("switches.{i}.at");
            check_extent(&path, switch.at, horizon, &mut problems);
            if let Some(point) = horizon.resolve(switch.at) {
                if point <= last {
                    problems.push(problem(path, "switches must come in order"));
                }
                last = point;
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests;
