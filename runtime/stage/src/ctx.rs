//! [`Ctx`]: everything a stage may touch. A stage reads no clock, environment, random source or file of its own.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dsv3_core::{Bound, Cancel, Clock, Digest, Error, Event, Events, Level, Rng, SystemClock};
use dsv3_hooks::Hook;
use dsv3_ops::Device;
use dsv3_store::{
    Retention, Sources, Store,
    blocking::{Blobs, Checkpoints},
};
use serde_json::Value;
use tokio::runtime::{self, Handle, Runtime};

use crate::{Closing, names::Names};

/// What the engine puts into a [`Ctx`].
pub struct CtxParts {
    /// Name of the stage in the pipeline, for events.
    pub stage: String,
    /// Type of the stage, which keys its random streams: a renamed stage gives the same bits.
    pub stage_type: String,
    /// Key of the stage.
    pub key: String,
    /// Epoch of the lease.
    pub epoch: u64,
    /// Seed of the pipeline.
    pub seed: u64,
    /// Where tensors live.
    pub device: Device,
    /// Threads of the compute pool.
    pub threads: usize,
    /// The store of the run.
    pub store: Store,
    /// The runtime the store's calls run on.
    pub runtime: Handle,
    /// External inputs of the plan.
    pub sources: Arc<Sources>,
    /// Input artifacts that are outputs of other stages, as `stage.output`, for messages.
    pub origins: BTreeMap<Digest, String>,
    /// Where events go.
    pub events: Events,
    /// Set when the stage should checkpoint and stop.
    pub cancel: Cancel,
    /// Hooks by port.
    pub hooks: BTreeMap<String, Arc<Hook>>,
    /// For rates and intervals.
    pub clock: Arc<dyn Clock>,
    /// A folder for copies, which the engine removes.
    pub scratch: PathBuf,
    /// Whether a server should keep running until it is cancelled.
    pub stay: bool,
    /// Number of the checkpoint to go on from; the newest when absent.
    pub at: Option<u64>,
    /// Whether a training stage publishes its checkpoint as it is, without another step.
    pub as_it_is: bool,
    /// Which of the stage's checkpoints are kept; all when absent.
    pub retention: Option<Retention>,
}

/// What a stage is handed.
pub struct Ctx {
    parts: CtxParts,
    blobs: Blobs,
    checkpoints: Checkpoints,
    closing: Mutex<Closing>,
    names: Names,
    /// Of a test: its runtime, and the scratch folder to remove.
    _own: Option<(Runtime, ScratchFolder)>,
}

struct ScratchFolder(PathBuf);

impl Drop for ScratchFolder {
    fn drop(&mut self) {
        // A folder that stays behind in the system's temporary folder harms nothing.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl fmt::Debug for Ctx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ctx({}, {})", self.parts.stage, self.parts.key)
    }
}

impl Ctx {
    /// Assembles what the engine has prepared.
    pub fn new(parts: CtxParts) -> Self {
        let blobs =
            Blobs::new(parts.store.clone(), parts.runtime.clone(), parts.sources.clone(), parts.scratch.clone());
        let checkpoints = Checkpoints::new(
            parts.store.clone(),
            parts.runtime.clone(),
            &parts.key,
            parts.epoch,
            &parts.stage,
            parts.events.clone(),
        )
        .at(parts.at)
        .retain(parts.retention.clone(), parts.clock.clone());
        Self { parts, blobs, checkpoints, closing: Mutex::default(), names: Names::default(), _own: None }
    }

    /// A context for a stage's unit test: fresh memory store, no hooks, events dropped. Not for use inside tokio.
    ///
    /// # Panics
    /// When the test's runtime cannot be made.
    pub fn for_test(stage: &str) -> Self {
        let store = Store::with_memory();
        Self::for_test_on(store, stage, Events::none())
    }

    /// [`Ctx::for_test`] on a given store, so that a test can interrupt a stage and go on; the key is the stage's name.
    ///
    /// # Panics
    /// As [`Ctx::for_test`].
    pub fn for_test_on(store: Store, stage: &str, events: Events) -> Self {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a test has a runtime");
        let scratch = std::env::temp_dir().join(format!("dsv3-test-{}", dsv3_store::nonce()));
        let parts = CtxParts {
            stage: stage.to_owned(),
            stage_type: stage.to_owned(),
            key: stage.to_owned(),
            epoch: 1,
            seed: 7,
            device: Device::default(),
            threads: 2,
            store,
            runtime: runtime.handle().clone(),
            sources: Arc::default(),
            origins: BTreeMap::new(),
            events,
            cancel: Cancel::new(),
            hooks: BTreeMap::new(),
            clock: Arc::new(SystemClock::default()),
            scratch: scratch.clone(),
            stay: false,
            at: None,
            as_it_is: false,
            retention: None,
        };
        Self { _own: Some((runtime, ScratchFolder(scratch))), ..Self::new(parts) }
    }

    /// Adds a hook; for tests.
    pub fn set_hook(&mut self, port: &str, hook: Arc<Hook>) {
        self.parts.hooks.insert(port.to_owned(), hook);
    }

    /// Name of the stage in the pipeline.
    pub fn stage(&self) -> &str {
        &self.parts.stage
    }

    /// Key of the stage.
    pub fn key(&self) -> &str {
        &self.parts.key
    }

    /// Seed of the pipeline. Prefer [`Ctx::rng`].
    pub fn seed(&self) -> u64 {
        self.parts.seed
    }

    /// The stage's random streams: key them further by what they are for, step and item.
    pub fn rng(&self) -> Rng {
        Rng::new(self.parts.seed).key(self.parts.stage_type.as_str())
    }

    /// Where tensors live.
    pub fn device(&self) -> Device {
        self.parts.device
    }

    /// Threads of the compute pool. Results must not depend on it.
    pub fn threads(&self) -> usize {
        self.parts.threads
    }

    /// Artifacts and their files.
    pub fn blobs(&self) -> &Blobs {
        &self.blobs
    }

    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    pub(crate) fn origin(&self, artifact: Digest) -> Option<&str> {
        self.parts.origins.get(&artifact).map(String::as_str)
    }

    /// The stage's checkpoints.
    pub fn checkpoints(&self) -> &Checkpoints {
        &self.checkpoints
    }

    /// The runtime of the engine, for a stage that serves.
    pub fn runtime(&self) -> &Handle {
        &self.parts.runtime
    }

    /// Where events go.
    pub fn events(&self) -> &Events {
        &self.parts.events
    }

    /// The request to stop.
    pub fn cancel(&self) -> &Cancel {
        &self.parts.cancel
    }

    /// Ends the stage when it was asked to stop. Call where nothing would be lost.
    ///
    /// # Errors
    /// [`dsv3_core::ErrorKind::Cancelled`].
    pub fn check_cancelled(&self) -> Result<(), Error> {
        if self.parts.cancel.is_cancelled() { Err(Error::cancelled()) } else { Ok(()) }
    }

    /// The hook at a port.
    pub fn hook(&self, port: &str) -> Option<&Arc<Hook>> {
        self.parts.hooks.get(port)
    }

    /// The clock, for rates and intervals only.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.parts.clock
    }

    /// A folder for copies; what is in it is lost when the stage ends.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scratch_dir(&self) -> Result<&Path, Error> {
        let folder = &self.parts.scratch;
        fs::create_dir_all(folder).map_err(|source| {
            Error::unavailable(format!("cannot create the scratch folder {}", folder.display())).source(source)
        })?;
        Ok(folder)
    }

    /// Whether a server should keep running until it is cancelled.
    pub fn stay(&self) -> bool {
        self.parts.stay
    }

    /// Whether a training stage publishes its checkpoint as it is, without another step.
    pub fn as_it_is(&self) -> bool {
        self.parts.as_it_is
    }

    /// Reports how far the stage is, in `unit` (`steps`, `documents`).
    pub fn progress(&self, done: u64, total: Option<u64>, unit: &str) {
        let stage = self.parts.stage.clone();
        self.parts.events.emit(Event::Progress { stage, done, total, unit: unit.to_owned() });
    }

    /// Reports a figure of a step.
    pub fn metric(&self, name: &str, step: u64, value: f64) {
        let stage = self.parts.stage.clone();
        self.parts.events.emit(Event::Metric { stage, name: name.to_owned(), step, value });
    }

    /// Says something worth knowing.
    pub fn log_info(&self, message: impl Into<String>) {
        self.log(Level::Info, message.into());
    }

    /// Says that something was skipped, repaired or degraded.
    pub fn log_warn(&self, message: impl Into<String>) {
        self.log(Level::Warn, message.into());
    }

    fn log(&self, level: Level, message: String) {
        self.parts.events.emit(Event::Log { stage: self.parts.stage.clone(), level, message });
    }

    /// Sets a closing figure without a floor.
    pub fn set_metric(&self, name: &str, value: f64) {
        self.closing_mut().set(name, value, None);
    }

    /// Sets a closing figure with a floor; a missed one is shown and fails nothing.
    pub fn set_floor(&self, name: &str, value: f64, bound: Bound, floor: f64) {
        self.closing_mut().set(name, value, Some((bound, floor)));
    }

    /// Adds a remark to a closing figure that was set, such as that it shows no ability.
    pub fn set_note(&self, name: &str, note: &str) {
        self.closing_mut().note(name, note);
    }

    /// Records what happened on the way (skipped steps, rewinds, excluded data) under `subject`.
    pub fn record_lineage(&self, subject: &str, value: Value) {
        self.closing_mut().lineage.insert(subject.to_owned(), value);
    }

    /// What was set so far; for the engine.
    pub fn closing(&self) -> Closing {
        self.closing_mut().clone()
    }

    fn closing_mut(&self) -> MutexGuard<'_, Closing> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
