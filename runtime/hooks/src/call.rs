//! One batch: a fresh instance, limits, `configure`, the call, and a strict reading of the answer.

use std::sync::Arc;

use dsv3_core::Digest;
use wasmtime::{
    Engine, Store, Trap,
    component::{ComponentNamedList, Instance, InstancePre, Lift, Lower},
};

use crate::{
    Cause, HookError, Limits, OnError, World,
    flat::{GuestScores, GuestVerdicts, Items, Texts},
    host::{TICK_MS, Ticker},
    limits::State,
};

/// A loaded hook. Calls may come from any number of threads.
pub struct Hook {
    name: String,
    engine: Engine,
    pre: InstancePre<State>,
    world: World,
    config: String,
    limits: Limits,
    on_error: OnError,
    digest: Digest,
    _ticker: Arc<Ticker>,
}

/// A filter's decision on one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Keep it as it is.
    Keep,
    /// Drop it for this reason.
    Drop(String),
    /// Replace its text.
    Rewrite(String),
}

/// What a filter said of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct FilterOutcome {
    /// One per document.
    pub verdicts: Vec<Verdict>,
    /// Failures that `on_error` turned into a verdict.
    pub faults: Vec<HookError>,
}

/// A completion to be scored.
#[derive(Clone, Copy, Debug)]
pub struct RewardItem<'a> {
    /// What the model was given.
    pub prompt: &'a str,
    /// What it wrote.
    pub completion: &'a str,
    /// Reference answer of the data set.
    pub answer: &'a str,
    /// JSON object with the data set's other columns.
    pub metadata: &'a str,
    /// Whether the model ended by itself.
    pub finished: bool,
}

/// A reward and what it is made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reward {
    /// The reward; finite.
    pub total: f64,
    /// Named parts.
    pub parts: Vec<(String, f64)>,
}

/// What a reward said of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardOutcome {
    /// One per item.
    pub rewards: Vec<Reward>,
    /// Failures that `on_error` turned into a reward of 0.
    pub faults: Vec<HookError>,
}

impl Hook {
    pub(crate) fn new(
        name: &str,
        engine: Engine,
        pre: InstancePre<State>,
        world: World,
        config: &serde_json::Value,
        limits: Limits,
        on_error: OnError,
        digest: Digest,
        ticker: Arc<Ticker>,
    ) -> Self {
        let config = if config.is_null() { "{}".to_owned() } else { config.to_string() };
        Self { name: name.to_owned(), engine, pre, world, config, limits, on_error, digest, _ticker: ticker }
    }

    /// Name in the pipeline.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// World it was loaded as.
    pub fn world(&self) -> World {
        self.world
    }

    /// Digest of the component.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    pub(crate) fn try_configure(&self) -> Result<(), HookError> {
        self.start(|_, _| Ok(())).map_err(|cause| self.error(None, None, cause))
    }

    /// Judges batch number `batch` of `documents`.
    ///
    /// # Errors
    /// When the guest fails and `on_error` is `fail`, or at the deadline whatever `on_error` says.
    pub fn filter(&self, batch: u64, documents: &[&str]) -> Result<FilterOutcome, HookError> {
        let policy = self.on_error;
        let (verdicts, faults) = self.tolerant(
            batch,
            documents,
            |items| self.judge(items),
            |fault| match policy {
                OnError::Keep => Verdict::Keep,
                _ => Verdict::Drop(format!("hook failed: {}", fault.cause)),
            },
        )?;
        Ok(FilterOutcome { verdicts, faults })
    }

    /// Scores batch number `batch` of `items`.
    ///
    /// # Errors
    /// As [`Hook::filter`].
    pub fn reward(&self, batch: u64, items: &[RewardItem<'_>]) -> Result<RewardOutcome, HookError> {
        let (rewards, faults) = self.tolerant(batch, items, |items| self.score(items), |_| Reward::default())?;
        Ok(RewardOutcome { rewards, faults })
    }

    /// Calls a whole batch; when it fails, calls item by item to find the culprit and applies the policy to it alone.
    fn tolerant<T: Copy, R>(
        &self,
        batch: u64,
        items: &[T],
        call: impl Fn(&[T]) -> Result<Vec<R>, Cause>,
        replace: impl Fn(&HookError) -> R,
    ) -> Result<(Vec<R>, Vec<HookError>), HookError> {
        if items.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        let cause = match call(items) {
            Ok(answers) => return Ok((answers, Vec::new())),
            Err(cause @ Cause::Deadline(_)) => return Err(self.error(Some(batch), None, cause)),
            Err(cause) => cause,
        };
        let (mut answers, mut faults) = (Vec::with_capacity(items.len()), Vec::new());
        for i in 0..items.len() {
            match call(&items[i..=i]) {
                Ok(mut one) => answers.append(&mut one),
                Err(cause) => {
                    let fault = self.error(Some(batch), Some(i), cause);
                    if self.on_error == OnError::Fail || matches!(fault.cause, Cause::Deadline(_)) {
                        return Err(fault);
                    }
                    answers.push(replace(&fault));
                    faults.push(fault);
                }
            }
        }
        match self.on_error {
            // Every item passes alone: the batch as a whole is what it cannot take.
            OnError::Fail => Err(self.error(Some(batch), None, cause)),
            _ => Ok((answers, faults)),
        }
    }

    fn judge(&self, documents: &[&str]) -> Result<Vec<Verdict>, Cause> {
        let texts = pack(documents.iter().copied())?;
        let answer: GuestVerdicts = self.start(|store, instance| self.call(store, instance, (texts,)))?;
        let count = documents.len();
        if answer.actions.len() != count {
            return Err(Cause::Malformed(format!("{} actions for {count} documents", answer.actions.len())));
        }
        let read = |(i, action): (usize, &u8)| {
            let note = answer.notes.get(i, count).map_err(Cause::Malformed)?.to_owned();
            match action {
                0 => Ok(Verdict::Keep),
                1 => Ok(Verdict::Drop(note)),
                2 => Ok(Verdict::Rewrite(note)),
                other => Err(Cause::Malformed(format!("action {other} of document {i} is none of 0, 1, 2"))),
            }
        };
        answer.actions.iter().enumerate().map(read).collect()
    }

    fn score(&self, items: &[RewardItem<'_>]) -> Result<Vec<Reward>, Cause> {
        let batch = Items {
            prompts: pack(items.iter().map(|item| item.prompt))?,
            completions: pack(items.iter().map(|item| item.completion))?,
            answers: pack(items.iter().map(|item| item.answer))?,
            metadata: pack(items.iter().map(|item| item.metadata))?,
            finished: items.iter().map(|item| u8::from(item.finished)).collect(),
        };
        let answer: GuestScores = self.start(|store, instance| self.call(store, instance, (batch,)))?;
        let (count, width) = (items.len(), answer.part_names.len());
        if answer.totals.len() != count || answer.parts.len() != count * width {
            let (totals, parts) = (answer.totals.len(), answer.parts.len());
            return Err(Cause::Malformed(format!(
                "{totals} totals and {parts} parts for {count} items of {width} parts"
            )));
        }
        if let Some(i) = answer.totals.iter().position(|total| !total.is_finite()) {
            return Err(Cause::Malformed(format!("the reward of item {i} is {}", answer.totals[i])));
        }
        if let Some(i) = answer.parts.iter().position(|part| !part.is_finite()) {
            let (name, part) = (&answer.part_names[i % width], answer.parts[i]);
            return Err(Cause::Malformed(format!("part `{name}` of item {} is {part}", i / width)));
        }
        let parts =
            |i: usize| answer.part_names.iter().cloned().zip(answer.parts[i * width..].iter().copied()).collect();
        Ok((0..count).map(|i| Reward { total: answer.totals[i], parts: parts(i) }).collect())
    }

    /// Instantiates, configures, and hands the instance on.
    fn start<R>(&self, run: impl FnOnce(&mut Store<State>, &Instance) -> Result<R, Cause>) -> Result<R, Cause> {
        let mut store = Store::new(&self.engine, State::new(&self.limits));
        store.limiter(|state| state);
        store.set_epoch_deadline(self.limits.deadline_ms.div_ceil(TICK_MS).max(1) + 1);
        if let Some(fuel) = self.limits.fuel {
            store.set_fuel(fuel).map_err(|error| Cause::Trap(format!("{error:#}")))?;
        }
        let instance = self.pre.instantiate(&mut store).map_err(|error| self.cause(&store, &error))?;
        let configured: Result<(), String> =
            self.raw_call(&mut store, &instance, "configure", (self.config.as_str(),))?;
        configured.map_err(Cause::Configuration)?;
        run(&mut store, &instance)
    }

    fn call<P: ComponentNamedList + Lower + Send + Sync, R: Lift + Send + Sync + 'static>(
        &self,
        store: &mut Store<State>,
        instance: &Instance,
        params: P,
    ) -> Result<R, Cause> {
        let answer: Result<R, String> = self.raw_call(store, instance, self.world.function(), params)?;
        answer.map_err(Cause::Guest)
    }

    fn raw_call<P: ComponentNamedList + Lower + Send + Sync, R: Lift + Send + Sync + 'static>(
        &self,
        store: &mut Store<State>,
        instance: &Instance,
        function: &str,
        params: P,
    ) -> Result<R, Cause> {
        let malformed = |reason: String| Cause::World { world: self.world.name(), reason };
        let interface = instance
            .get_export_index(&mut *store, None, self.world.interface())
            .ok_or_else(|| malformed(format!("no interface {}", self.world.interface())))?;
        let index = instance
            .get_export_index(&mut *store, Some(&interface), function)
            .ok_or_else(|| malformed(format!("no function `{function}`")))?;
        let typed = instance
            .get_typed_func::<P, (R,)>(&mut *store, index)
            .map_err(|error| malformed(format!("`{function}` has another type: {error:#}")))?;
        let called = typed.call(&mut *store, params);
        let (answer,) = called.map_err(|error| match self.cause(store, &error) {
            // No trap: the guest ran to its end, and what it left cannot be read.
            Cause::Trap(reason) if error.downcast_ref::<Trap>().is_none() => Cause::Malformed(reason),
            cause => cause,
        })?;
        Ok(answer)
    }

    /// Which limit, if any, stands behind a trap.
    fn cause(&self, store: &Store<State>, error: &wasmtime::Error) -> Cause {
        match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => Cause::Deadline(self.limits.deadline_ms),
            Some(Trap::OutOfFuel) => Cause::Fuel(self.limits.fuel.unwrap_or_default()),
            _ if store.data().memory_refused => Cause::Memory(self.limits.memory_bytes),
            Some(trap) => Cause::Trap(trap.to_string()),
            None => Cause::Trap(format!("{error:#}")),
        }
    }

    fn error(&self, batch: Option<u64>, item: Option<usize>, cause: Cause) -> HookError {
        HookError { hook: self.name.clone(), batch, item, cause }
    }
}

fn pack<'a>(items: impl IntoIterator<Item = &'a str>) -> Result<Texts, Cause> {
    Texts::pack(items)
        .ok_or_else(|| Cause::Malformed("a batch holds more than 4 GiB of text; make batches smaller".into()))
}
