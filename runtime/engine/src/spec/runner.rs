//! What a pipeline says of its runners: leases, and which checkpoints are kept. Nothing here changes a result, so nothing of it
//! is in a key.

use std::time::Duration;

use dsv3_store::{Best, IfHeld, LeaseOptions, Retention};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How runners of one stage keep apart. What is absent is as the program's default, or as an earlier setting says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LeaseSettings {
    /// What a second runner does while another process holds a stage: `wait` for it, or `refuse` and end with exit 75.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<IfHeldWord>")]
    pub if_held: Option<IfHeld>,
    /// Seconds between two heartbeats of a holder; 2 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.01, max = 3600))]
    pub beat_seconds: Option<f64>,
    /// Seconds of silence after which a holder is replaced; 10 by default, at least twice the time between heartbeats.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.02, max = 86400))]
    pub expire_seconds: Option<f64>,
}

/// The words of [`IfHeld`] in the schema.
#[derive(JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(dead_code)]
enum IfHeldWord {
    /// Wait until the holder has ended or expired.
    Wait,
    /// End with exit 75 and the holder's name.
    Refuse,
}

impl LeaseSettings {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// These settings on top of `base`.
    pub fn over(&self, base: LeaseOptions) -> LeaseOptions {
        let seconds =
            |value: Option<f64>, base| value.map_or(base, |value| Duration::from_secs_f64(value.clamp(0.0, 86400.0)));
        let beat = seconds(self.beat_seconds, base.beat);
        // Heartbeats that are set apart from the expiry move it along, so that a living holder never looks dead.
        let expire = seconds(self.expire_seconds, base.expire.max(beat * 2));
        // A contender that looks less often than a holder beats would miss how long the silence is.
        let poll = base.poll.min(expire / 4);
        LeaseOptions { beat: beat.min(expire / 2), expire, poll, if_held: self.if_held.unwrap_or(base.if_held) }
    }

    /// What is wrong with them, if anything.
    pub fn problem(&self) -> Option<String> {
        for (name, value) in [("beat_seconds", self.beat_seconds), ("expire_seconds", self.expire_seconds)] {
            if value.is_some_and(|value| !(value.is_finite() && value > 0.0)) {
                return Some(format!("`{name}` is a number above 0"));
            }
        }
        let base = LeaseOptions::default();
        let beat = self.beat_seconds.unwrap_or(base.beat.as_secs_f64());
        let expire = self.expire_seconds?;
        (expire < 2.0 * beat)
            .then(|| format!("`expire_seconds` is at least twice `beat_seconds`; {expire} is less than 2 x {beat}"))
    }
}

/// Which checkpoints of a stage are kept; all when absent. The two newest valid ones of an unfinished stage always are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionSpec {
    /// How many of the newest are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_last: Option<u32>,
    /// Those after a multiple of this many steps are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub keep_every: Option<u64>,
    /// The best by a metric are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_best: Option<KeepBest>,
}

/// The best checkpoints by a metric.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KeepBest {
    /// A metric of the stage's steps or validations, such as `val_loss`.
    pub metric: String,
    /// How many are kept.
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    pub count: u32,
    /// What is better.
    #[serde(default)]
    pub better: Better,
}

/// Which end of a metric is the good one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// A loss.
    #[default]
    Lower,
    /// A reward or an accuracy.
    Higher,
}

/// How many newest checkpoints a policy keeps that does not say.
const KEPT_LAST: u32 = 2;

fn one() -> u32 {
    1
}

impl RetentionSpec {
    /// In the words of the store.
    pub fn to_store(&self) -> Retention {
        let best = self.keep_best.as_ref().map(|best| Best {
            metric: best.metric.clone(),
            count: best.count as usize,
            higher: best.better == Better::Higher,
        });
        let last = self.keep_last.unwrap_or(KEPT_LAST) as usize;
        Retention { last, every_steps: self.keep_every, best }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_settings_count_and_a_beat_always_fits_twice_into_the_expiry() {
        let base = LeaseOptions::default();
        let yaml = LeaseSettings { expire_seconds: Some(30.0), ..LeaseSettings::default() };
        let line =
            LeaseSettings { if_held: Some(IfHeld::Refuse), beat_seconds: Some(20.0), ..LeaseSettings::default() };
        let options = line.over(yaml.over(base));
        assert_eq!((options.beat.as_secs(), options.expire.as_secs()), (20, 40));
        assert_eq!(options.if_held, IfHeld::Refuse);
        let short = LeaseSettings { expire_seconds: Some(1.0), ..LeaseSettings::default() }.over(base);
        assert!(short.beat * 2 <= short.expire && short.poll * 4 <= short.expire);
        let wrong = LeaseSettings { beat_seconds: Some(2.0), expire_seconds: Some(3.0), ..LeaseSettings::default() };
        assert!(wrong.problem().is_some_and(|problem| problem.contains("twice")));
        assert_eq!(yaml.problem(), None);
    }
}
