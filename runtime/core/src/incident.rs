//! What went wrong on the way of a training run and what was done about it: kept in checkpoints, in the lineage of the
//! stage's result under [`GuardRecord::SUBJECT`], and shown in one line each.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the guard of a training run did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuardAction {
    /// The step was not applied.
    Skipped,
    /// The run went back to a checkpoint and leaves these samples out.
    Rewound,
}

/// One intervention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuardRecord {
    /// What was done.
    pub action: GuardAction,
    /// First step concerned, from 1.
    pub step: u64,
    /// Last step concerned.
    pub last_step: u64,
    /// Samples concerned, as positions in the loading order, half-open.
    pub samples: [u64; 2],
    /// Loss of the last step; absent when it was not finite.
    pub loss: Option<f64>,
    /// Step of the checkpoint gone back to, 0 for the start; absent for a skipped step. Steps up to the first one
    /// concerned are the same when they are done again, so no weight depends on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub back_to_step: Option<u64>,
    /// Updates not applied, of all, when a step has several and not all were skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updates: Option<[u32; 2]>,
}

impl GuardRecord {
    /// Name under which records stand in the lineage of a result.
    pub const SUBJECT: &'static str = "guard";
}

impl fmt::Display for GuardRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { action, step, last_step, samples: [from, to], loss, back_to_step, updates } = self;
        let what = if loss.is_some() { "gradient" } else { "loss" };
        match (action, updates) {
            (GuardAction::Skipped, None) => {
                write!(f, "step {step} skipped: its {what} is not finite, samples {from}..{to}")
            }
            (GuardAction::Skipped, Some([skipped, all])) => {
                write!(
                    f,
                    "step {step}, {skipped} of {all} updates skipped: a {what} is not finite, samples {from}..{to}"
                )
            }
            (GuardAction::Rewound, _) => {
                let loss = loss.unwrap_or(f64::NAN);
                let back = back_to_step.unwrap_or(0);
                write!(
                    f,
                    "steps {step} to {last_step} undone: the loss jumped to {loss:.4} and the run went back to step {back}, \
                     samples {from}..{to} are left out"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_one_line() {
        let skipped = GuardRecord {
            action: GuardAction::Skipped,
            step: 31,
            last_step: 31,
            samples: [240, 248],
            loss: Some(2.0),
            back_to_step: None,
            updates: None,
        };
        assert_eq!(skipped.to_string(), "step 31 skipped: its gradient is not finite, samples 240..248");
        let text = serde_json::to_string(&skipped).unwrap();
        assert_eq!(text, r#"{"action":"skipped","step":31,"last_step":31,"samples":[240,248],"loss":2.0}"#);
        assert_eq!(serde_json::from_str::<GuardRecord>(&text).unwrap(), skipped);
        let partly = GuardRecord { updates: Some([1, 2]), loss: None, ..skipped.clone() };
        assert_eq!(partly.to_string(), "step 31, 1 of 2 updates skipped: a loss is not finite, samples 240..248");
        let rewound = GuardRecord {
            action: GuardAction::Rewound,
            step: 40,
            last_step: 44,
            samples: [320, 352],
            loss: Some(9.125),
            back_to_step: Some(36),
            ..skipped
        };
        assert_eq!(
            rewound.to_string(),
            "steps 40 to 44 undone: the loss jumped to 9.1250 and the run went back to step 36, samples 320..352 are left out"
        );
    }
}
