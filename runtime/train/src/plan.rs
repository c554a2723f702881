//! All schedules of a run together, and what they say at a given token count: `plan` prints it without training.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schedule::{BatchSchedule, Horizon, LrSchedule, Position, Problem, Switched};

/// Every schedule a pretraining-like run follows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Schedules {
    /// Learning rate.
    pub lr: LrSchedule,
    /// Sequences per step.
    pub batch: BatchSchedule,
    /// Weight λ of the multi-token prediction loss.
    #[serde(default = "zero")]
    pub mtp_weight: Switched,
    /// Speed γ of the router bias update; 0 freezes the biases.
    #[serde(default = "zero")]
    pub bias_speed: Switched,
}

fn zero() -> Switched {
    Switched::constant(0.0)
}

/// What the schedules say at one point.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ScheduleAt {
    /// Steps done at the first step boundary at or after the asked token count.
    pub steps: u64,
    /// Tokens asked for.
    pub tokens: u64,
    /// Learning rate there.
    pub lr: f64,
    /// Sequences per step there.
    pub sequences: u32,
    /// λ there.
    pub mtp_weight: f64,
    /// γ there.
    pub bias_speed: f64,
}

impl Schedules {
    /// Everything wrong with them for a run of length `horizon`.
    pub fn check(&self, horizon: Horizon) -> Vec<Problem> {
        let parts = [
            ("lr", self.lr.check(horizon)),
            ("batch", self.batch.check(horizon)),
            ("mtp_weight", self.mtp_weight.check(horizon)),
            ("bias_speed", self.bias_speed.check(horizon)),
        ];
        let located = |(name, problems): (&str, Vec<Problem>)| {
            problems.into_iter().map(move |p| Problem { path: format!("{name}.{}", p.path), ..p }).collect::<Vec<_>>()
        };
        parts.into_iter().flat_map(located).collect()
    }

    /// What holds once `tokens` are consumed, in a run of sequences of `sequence_tokens`.
    pub fn at_tokens(&self, tokens: u64, sequence_tokens: u64, horizon: Horizon) -> ScheduleAt {
        let (steps, _) = self.walk(sequence_tokens, horizon, |_, consumed| consumed < tokens);
        self.read(steps, tokens, horizon)
    }

    /// What holds once `steps` are done, in a run of sequences of `sequence_tokens`.
    pub fn at_step(&self, steps: u64, sequence_tokens: u64, horizon: Horizon) -> ScheduleAt {
        let (steps, tokens) = self.walk(sequence_tokens, horizon, |done, _| done < steps);
        self.read(steps, tokens, horizon)
    }

    fn read(&self, steps: u64, tokens: u64, horizon: Horizon) -> ScheduleAt {
        // A point between steps: the segments hold from here on, and the warm-up has seen `steps` steps.
        let warm = Position { step: steps, tokens, tokens_after: tokens };
        let next = Position { step: steps + 1, ..warm };
        let lr = match horizon {
            Horizon::Steps(_) => self.lr.at(next, horizon),
            Horizon::Tokens(_) => self.lr.at(warm, horizon),
        };
        ScheduleAt {
            steps,
            tokens,
            lr,
            sequences: self.batch.at(steps, tokens, horizon),
            mtp_weight: self.mtp_weight.at(next, horizon),
            bias_speed: self.bias_speed.at(next, horizon),
        }
    }

    /// Steps through the run while `more(steps, tokens)`; a run has some 10⁵ steps, so this takes a moment at most.
    fn walk(&self, sequence_tokens: u64, horizon: Horizon, more: impl Fn(u64, u64) -> bool) -> (u64, u64) {
        let (mut steps, mut tokens) = (0, 0);
        while more(steps, tokens) && sequence_tokens > 0 {
            tokens += u64::from(self.batch.at(steps, tokens, horizon).max(1)) * sequence_tokens;
            steps += 1;
        }
        (steps, tokens)
    }
}
