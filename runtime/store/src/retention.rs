//! Which checkpoints of a stage are kept.
//!
//! A policy keeps the newest `last`, those at multiples of `every` steps, and the best few by a metric; what none of these
//! keeps is superseded. Without a policy all are kept. While a stage is unfinished its two newest valid ones are kept
//! whatever the policy says. Checkpoints behind a rewind count no more and are superseded.
//!
//! Invariant: fences and rewinds are never removed: the number that a replaced holder would commit next is its fence's.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{
    Checkpoint, CheckpointRecord, Store,
    error::{Result, StoreError},
};

/// Newest valid checkpoints that an unfinished stage keeps in any case.
const RUNNING_KEPT_MIN: usize = 2;

/// What is kept of a stage's checkpoints.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Retention {
    /// The newest ones.
    pub last: usize,
    /// Those whose step is a multiple of this.
    pub every_steps: Option<u64>,
    /// The best by a metric.
    pub best: Option<Best>,
}

/// The best checkpoints by a metric.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Best {
    /// Name of the metric as the stage reports it, such as `val_loss`.
    pub metric: String,
    /// How many.
    pub count: usize,
    /// Whether more is better.
    pub higher: bool,
}

/// Last value of a metric when the checkpoint was saved: training stages keep their figures in its state.
fn metric_of(checkpoint: &Checkpoint, metric: &str) -> Option<f64> {
    let in_figures = |figures: &Value| figures.get(metric)?.get("last")?.as_f64();
    let state = &checkpoint.state;
    let places = [state.pointer("/state/figures"), state.get("figures")];
    places.into_iter().flatten().find_map(in_figures)
}

impl Retention {
    /// Numbers of those to keep among `live`, newest first.
    fn kept(&self, live: &[Checkpoint], last_min: usize) -> BTreeSet<u64> {
        let mut kept: BTreeSet<u64> = live.iter().take(self.last.max(last_min)).map(|one| one.seq).collect();
        if let Some(every) = self.every_steps.filter(|every| *every > 0) {
            kept.extend(live.iter().filter(|one| one.step % every == 0).map(|one| one.seq));
        }
        if let Some(Best { metric, count, higher }) = &self.best {
            let valued = live.iter().filter_map(|one| Some((metric_of(one, metric)?, one.seq)));
            let mut valued: Vec<(f64, u64)> = valued.collect();
            // Of equals the newer one is better.
            valued.sort_by(|(a, newer), (b, other)| {
                let order = if *higher { b.total_cmp(a) } else { a.total_cmp(b) };
                order.then(other.cmp(newer))
            });
            kept.extend(valued.iter().take(*count).map(|(_, seq)| *seq));
        }
        kept
    }
}

impl Store {
    /// Checkpoints of the stage `key` that none of `policies` keeps, oldest first; none when a policy is `None`, which keeps
    /// all. What makes them superseded has been read back: of an unfinished stage the two newest, of a finished one all
    /// that `last` keeps are verified with every digest, and one that fails does not count.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub(crate) async fn superseded(
        &self,
        key: &str,
        policies: &[Option<Retention>],
        unfinished: bool,
    ) -> Result<Vec<Checkpoint>> {
        let policies: Option<Vec<&Retention>> = policies.iter().map(Option::as_ref).collect();
        let Some(policies) = policies.filter(|policies| !policies.is_empty()) else { return Ok(Vec::new()) };
        let mut seqs = self.checkpoint_seqs(key).await?;
        let (mut live, mut rewound) = (Vec::new(), Vec::new());
        // As `find_checkpoint` walks: a rewind makes everything between it and where it goes count no more.
        let mut up_to = u64::MAX;
        while let Some(seq) = seqs.pop() {
            match self.checkpoint_record(key, seq).await {
                Ok(CheckpointRecord::Checkpoint(checkpoint)) if seq <= up_to => live.push(checkpoint),
                Ok(CheckpointRecord::Checkpoint(checkpoint)) => rewound.push(checkpoint),
                Ok(CheckpointRecord::Rewind { to, .. }) if seq <= up_to => up_to = up_to.min(to),
                Ok(CheckpointRecord::Fence { .. } | CheckpointRecord::Rewind { .. }) => {}
                // What cannot be read is named by nobody and left for a person to look at.
                Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let last_min = if unfinished { RUNNING_KEPT_MIN } else { 0 };
        let wanted = policies.iter().map(|policy| policy.last.max(last_min)).max().unwrap_or(0);
        if live.len() <= wanted && rewound.is_empty() {
            return Ok(Vec::new());
        }
        // One that fails its digests neither counts among those to keep nor is removed.
        let (mut good, mut whole) = (Vec::new(), 0);
        for checkpoint in live {
            if whole < wanted {
                if !self.is_whole(&checkpoint).await? {
                    continue;
                }
                whole += 1;
            }
            good.push(checkpoint);
        }
        let kept: BTreeSet<u64> = policies.iter().flat_map(|policy| policy.kept(&good, last_min)).collect();
        let mut superseded: Vec<Checkpoint> = good.into_iter().filter(|one| !kept.contains(&one.seq)).collect();
        superseded.append(&mut rewound);
        superseded.sort_by_key(|one| one.seq);
        Ok(superseded)
    }

    async fn is_whole(&self, checkpoint: &Checkpoint) -> Result<bool> {
        for file in &checkpoint.files {
            match self.verify_blob(file.digest, file.bytes).await {
                Ok(()) => {}
                Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checkpoints(losses: &[f64]) -> Vec<Checkpoint> {
        let one = |(i, loss): (usize, &f64)| Checkpoint {
            seq: i as u64 + 1,
            step: 10 * (i as u64 + 1),
            state: json!({ "state": { "figures": { "val_loss": { "first": 9.0, "last": loss } } } }),
            files: Vec::new(),
            tensors: Vec::new(),
        };
        let mut all: Vec<Checkpoint> = losses.iter().enumerate().map(one).collect();
        all.reverse();
        all
    }

    fn kept(policy: &Retention, running: usize) -> Vec<u64> {
        policy.kept(&checkpoints(&[3.0, 1.0, 2.0, 1.0, 5.0, 4.0]), running).into_iter().collect()
    }

    #[test]
    fn last_every_and_best_add_up() {
        assert_eq!(kept(&Retention { last: 1, ..Retention::default() }, 2), [5, 6]);
        assert_eq!(kept(&Retention { last: 1, ..Retention::default() }, 0), [6]);
        assert_eq!(kept(&Retention { every_steps: Some(20), ..Retention::default() }, 0), [2, 4, 6]);
        let best = |count, higher| Retention {
            best: Some(Best { metric: "val_loss".into(), count, higher }),
            ..Retention::default()
        };
        assert_eq!(kept(&best(1, false), 0), [4], "of equals the newer");
        assert_eq!(kept(&best(3, false), 0), [2, 3, 4]);
        assert_eq!(kept(&best(2, true), 0), [5, 6]);
        let all = Retention { last: 1, every_steps: Some(30), ..best(1, false) };
        assert_eq!(kept(&all, 0), [3, 4, 6]);
        let unknown = Retention { best: Some(Best { metric: "nothing".into(), count: 9, higher: true }), ..all };
        assert_eq!(kept(&unknown, 2), [3, 5, 6]);
    }
}
