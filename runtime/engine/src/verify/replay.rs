//! Some steps of a training stage done again from a checkpoint: the figures of every step must have the bits that the
//! run's log holds, and where the next checkpoint is reached, every tensor and the trainer's state must be the ones
//! committed. Nothing is written to the store.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use dsv3_core::{Cancel, Digest, Error, ErrorKind, Event, Events};
use dsv3_store::{Checkpoint, CheckpointRecord, Store};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::VerifyOptions;
use crate::{
    Engine,
    error::EngineError,
    plan::Plan,
    report,
    run::beside::{Beside, Purpose, metric},
};

/// Metrics that tell of the machine, not of the training.
const CLOCKED: [&str; 3] = ["tokens_per_second", "checkpoint_stall_seconds", "checkpoint_save_seconds"];
/// Differences that are told; there may be as many as tensors.
const TOLD_MAX: usize = 20;

/// What was done again, and how it came out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Replay {
    /// Name of the stage.
    pub stage: String,
    /// Its key.
    pub key: String,
    /// Checkpoint it was done from.
    pub from_seq: u64,
    /// Step of that checkpoint.
    pub from_step: u64,
    /// Last step that was done.
    pub to_step: u64,
    /// Losses compared with the log, bit for bit.
    pub losses: u64,
    /// All figures compared, losses among them.
    pub figures: u64,
    /// Steps of which the log holds no loss.
    pub unlogged: u64,
    /// Checkpoint whose state and tensors were compared; none when it lies beyond the steps asked for.
    pub compared_seq: Option<u64>,
    /// Digest of the files of that checkpoint, as a list of `name digest`.
    pub weights: Vec<String>,
    /// What differs.
    pub differences: Vec<String>,
}

impl Engine {
    /// Does up to `steps` steps of a training stage again.
    pub(super) async fn replay(
        &self,
        store: &Store,
        id: &str,
        plan: &Plan,
        steps: u64,
        options: &VerifyOptions,
    ) -> Result<Replay, EngineError> {
        let name = options.stage.as_deref();
        let name = name.ok_or_else(|| Error::invalid("--replay needs a stage").help("name a stage that trains"))?;
        let beside = Beside::find(self, store, plan, id, name).await?;
        let key = beside.key.clone();
        let all = checkpoints(store, &key).await?;
        let from = match options.at {
            Some(seq) => beside.checkpoint(Some(seq)).await?,
            None => {
                // Weights can be compared from the last checkpoint that another follows.
                let followed = all.iter().rev().skip(1).find(|one| next(&all, one).is_some());
                beside.checkpoint(followed.map(|one| one.seq)).await?
            }
        };
        let next = next(&all, &from).filter(|next| next.step - from.step <= steps.max(1));
        let target = next.map_or(from.step + steps.max(1), |next| next.step);
        let logged = logged(self, store, id, &key).await?;
        let seen: Arc<Mutex<BTreeMap<(String, u64), f64>>> = Arc::default();
        let cancel = Cancel::new();
        let events = watch(seen.clone(), cancel.clone(), options.cancel.clone(), target);
        let (outcome, left) = beside.run(from.seq, Purpose::GoOn, options.threads, &cancel, events).await?;
        if options.cancel.is_cancelled() {
            return Err(Error::cancelled().into());
        }
        // The stage was stopped where it should stop, or came to its end.
        if let Err(error) = outcome
            && error.kind != ErrorKind::Cancelled
        {
            return Err(error.context(format!("replay of stage `{name}`")).into());
        }
        let seen = seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut replay = compare_figures(&seen, &logged, &from, target);
        (replay.stage, replay.key) = (name.to_owned(), key.clone());
        if let Some(next) = next {
            replay.compared_seq = Some(next.seq);
            replay.weights = next.files.iter().map(|file| format!("{} {}", file.path, file.digest)).collect();
            match again(&left, &key, &all, target).await? {
                Some(again) => replay.differences.extend(compare(store, next, &left, &again).await?),
                None => replay.differences.push(format!("the replay wrote no checkpoint at step {target}")),
            }
        }
        replay.differences.truncate(TOLD_MAX);
        Ok(replay)
    }
}

/// All checkpoints of a key, rewound ones too.
async fn checkpoints(store: &Store, key: &str) -> Result<Vec<Checkpoint>, Error> {
    let mut all = Vec::new();
    for seq in store.checkpoint_seqs(key).await? {
        if let CheckpointRecord::Checkpoint(checkpoint) = store.checkpoint_record(key, seq).await? {
            all.push(checkpoint);
        }
    }
    Ok(all)
}

/// The first checkpoint after `from` that is further.
fn next<'a>(all: &'a [Checkpoint], from: &Checkpoint) -> Option<&'a Checkpoint> {
    all.iter().find(|one| one.seq > from.seq && one.step > from.step)
}

/// The checkpoint of `step` that the replay wrote.
async fn again(left: &Store, key: &str, before: &[Checkpoint], step: u64) -> Result<Option<Checkpoint>, Error> {
    let all = checkpoints(left, key).await?;
    let new = |one: &Checkpoint| one.step == step && before.iter().all(|old| old.seq != one.seq);
    Ok(all.into_iter().find(new))
}

/// Values by metric and step that the logs hold of a key.
async fn logged(
    engine: &Engine,
    store: &Store,
    id: &str,
    key: &str,
) -> Result<BTreeMap<String, BTreeMap<u64, f64>>, EngineError> {
    let mut traces = BTreeMap::new();
    for run in engine.runs(store).await? {
        if run.run == id || run.keys.values().any(|other| other == key) {
            report::scan(&run.run, &store.read_events(&run.run).await?, &|other| other == key, &mut traces);
        }
    }
    Ok(traces.remove(key).map(|trace| trace.series).unwrap_or_default())
}

/// Events that are noted; the stage is stopped once step `target` is done.
fn watch(seen: Arc<Mutex<BTreeMap<(String, u64), f64>>>, stop: Cancel, asked: Cancel, target: u64) -> Events {
    Events::new(move |event: Event| {
        if let Some((name, step, value)) = metric(&event) {
            seen.lock().unwrap_or_else(PoisonError::into_inner).insert((name.to_owned(), step), value);
            if asked.is_cancelled() || (name == "loss" && step >= target) {
                stop.cancel();
            }
        }
    })
}

fn compare_figures(
    seen: &BTreeMap<(String, u64), f64>,
    logged: &BTreeMap<String, BTreeMap<u64, f64>>,
    from: &Checkpoint,
    target: u64,
) -> Replay {
    let mut replay = Replay {
        stage: String::new(),
        key: String::new(),
        from_seq: from.seq,
        from_step: from.step,
        to_step: from.step,
        losses: 0,
        figures: 0,
        unlogged: 0,
        compared_seq: None,
        weights: Vec::new(),
        differences: Vec::new(),
    };
    let within = |step: u64| step > from.step && step <= target;
    for ((name, step), value) in
        seen.iter().filter(|((name, step), _)| within(*step) && !CLOCKED.contains(&name.as_str()))
    {
        let is_loss = name == "loss";
        if is_loss {
            replay.to_step = replay.to_step.max(*step);
        }
        let Some(before) = logged.get(name).and_then(|series| series.get(step)) else {
            replay.unlogged += u64::from(is_loss);
            continue;
        };
        (replay.losses, replay.figures) = (replay.losses + u64::from(is_loss), replay.figures + 1);
        if before.to_bits() != value.to_bits() {
            replay.differences.push(format!("step {step}: {name} is {value:e}, the log says {before:e}"));
        }
    }
    replay
}

/// What differs between a committed checkpoint and the one done again.
async fn compare(store: &Store, old: &Checkpoint, left: &Store, new: &Checkpoint) -> Result<Vec<String>, Error> {
    let mut differences = Vec::new();
    compare_state("state", &old.state, &new.state, &mut differences);
    if old.tensors.is_empty() || new.tensors.is_empty() {
        // Format 1 says what its files are, not what they hold.
        for file in &old.files {
            if new.file(&file.path).map(|file| file.digest) != Some(file.digest) {
                differences.push(format!("file {} has another digest", file.path));
            }
        }
        return Ok(differences);
    }
    for tensor in &old.tensors {
        let same_place = new.tensors.iter().any(|other| other == tensor);
        if same_place {
            continue;
        }
        let rows = || 0..tensor.rows();
        let (a, b) =
            (store.read_rows(old, &tensor.name, rows()).await?, left.read_rows(new, &tensor.name, rows()).await);
        if b.map(|b| Digest::of(&b)).ok() != Some(Digest::of(&a)) {
            differences.push(format!("tensor {} has another digest", tensor.name));
        }
    }
    Ok(differences)
}

fn compare_state(at: &str, old: &Value, new: &Value, differences: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(a), Value::Object(b)) => {
            for name in a.keys().chain(b.keys().filter(|name| !a.contains_key(*name))) {
                let null = &Value::Null;
                compare_state(
                    &format!("{at}.{name}"),
                    a.get(name).unwrap_or(null),
                    b.get(name).unwrap_or(null),
                    differences,
                );
            }
        }
        (old, new) if old != new => differences.push(format!("{at} is {new}, the checkpoint says {old}")),
        _ => {}
    }
}
