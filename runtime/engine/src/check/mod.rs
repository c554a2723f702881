//! From [`Written`](crate::spec::Written) to [`Spec`]: stage types, ports, edges, files, hooks, configs and what stages
//! know of each other before anything runs. Every problem is found, not only the first.

mod config;
mod hooks;
mod inputs;
mod order;

use std::{collections::BTreeMap, path::Path, sync::Arc};

use dsv3_core::Error;
use dsv3_hooks::{Host, OnError};
use dsv3_stage::{PortSpec, StageEntry};
use serde_json::Value;

use crate::{
    diagnostics::{Diagnostic, Diagnostics, Sources, Span, did_you_mean},
    spec::{
        Floor, HookLimits, LeaseSettings, Reading, RetentionSpec, StageSpec, Word, Written,
        files::{self, ExternalFile},
    },
};

/// A pipeline whose every reference is good; [`crate::Engine::plan`] digests its files.
#[derive(Clone, Debug)]
pub struct Spec {
    pub(crate) name: String,
    pub(crate) store: String,
    pub(crate) store_options: dsv3_store::StoreOptions,
    pub(crate) seed: u64,
    pub(crate) threads: Option<usize>,
    pub(crate) device: String,
    pub(crate) lease: LeaseSettings,
    pub(crate) hooks: BTreeMap<String, CheckedHook>,
    /// Each after its inputs.
    pub(crate) stages: Vec<CheckedStage>,
    pub(crate) sources: Sources,
}

impl Spec {
    /// Name of the pipeline.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// URL of the store it runs in.
    pub fn store(&self) -> &str {
        &self.store
    }

    /// How that store is reached.
    pub fn store_options(&self) -> &dsv3_store::StoreOptions {
        &self.store_options
    }

    /// Whether inputs lie in object stores, which are read only when the pipeline is planned to run.
    pub fn has_remote_inputs(&self) -> bool {
        let inputs = self.stages.iter().flat_map(|stage| &stage.inputs);
        inputs.flat_map(|input| &input.values).any(|value| matches!(value, CheckedValue::Remote { .. }))
    }

    /// Names and types of the stages, each after its inputs.
    pub fn stages(&self) -> impl Iterator<Item = (&str, &str)> {
        self.stages.iter().map(|stage| (stage.name.as_str(), stage.entry.name))
    }
}

/// A hook whose component was read.
#[derive(Clone, Debug)]
pub(crate) struct CheckedHook {
    pub(crate) wasm: Arc<Vec<u8>>,
    pub(crate) world: String,
    pub(crate) config: Value,
    pub(crate) limits: HookLimits,
    pub(crate) on_error: OnError,
}

/// What an input port is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CheckedValue {
    Stage { stage: String, port: String },
    Files { files: Vec<ExternalFile>, span: Span },
    Remote { uris: Vec<String>, span: Span },
}

/// One connected input port.
#[derive(Clone, Debug)]
pub(crate) struct CheckedInput {
    pub(crate) spec: PortSpec,
    pub(crate) values: Vec<CheckedValue>,
}

/// A stage whose references are good.
#[derive(Clone, Debug)]
pub(crate) struct CheckedStage {
    pub(crate) name: String,
    pub(crate) entry: StageEntry,
    pub(crate) config: Value,
    pub(crate) inputs: Vec<CheckedInput>,
    pub(crate) hooks: BTreeMap<String, String>,
    pub(crate) floors: BTreeMap<String, Floor>,
    pub(crate) notes: BTreeMap<String, String>,
    pub(crate) retention: Option<RetentionSpec>,
    pub(crate) facts: Vec<(String, String)>,
}

/// What the checks share.
pub(crate) struct Checker<'a> {
    pub(crate) entries: &'a [StageEntry],
    pub(crate) written: &'a Written,
    /// Folder of each origin, for relative paths.
    pub(crate) reading: &'a Reading,
    pub(crate) at_tokens: &'a [u64],
    pub(crate) problems: Vec<Diagnostic>,
}

impl Checker<'_> {
    pub(crate) fn problem(&mut self, span: Span, message: impl Into<String>) {
        self.problems.push(Diagnostic::new(span, message));
    }

    /// The stage type a stage names; unknown ones are reported by [`check`].
    pub(crate) fn entry(&self, stage: &StageSpec) -> Option<StageEntry> {
        self.entries.iter().find(|entry| entry.name == stage.kind.text).copied()
    }

    /// The first stage called `name`.
    pub(crate) fn stage(&self, name: &str) -> Option<&StageSpec> {
        self.written.stages.iter().find(|stage| stage.name.text == name)
    }

    /// `stage \`base\` (line 7, column 3)`.
    pub(crate) fn cite(&self, word: &Word) -> String {
        let place = self.reading.sources.get(word.span.source).map(|source| source.position(word.span.start as usize));
        let (line, column) = place.unwrap_or((1, 1));
        format!("stage `{}` (line {line}, column {column})", word.text)
    }
}

/// Checks everything; all problems of reading and checking are in the error.
pub(crate) fn check(
    reading: Reading,
    entries: &[StageEntry],
    at_tokens: &[u64],
    host: impl Fn() -> Result<Arc<Host>, Error>,
) -> Result<Spec, Diagnostics> {
    let Some(written) = &reading.written else { return Err(Diagnostics::new(reading.sources, reading.problems)) };
    let mut checker = Checker { entries, written, reading: &reading, at_tokens, problems: Vec::new() };
    device(&mut checker);
    let hooks = hooks::check(&mut checker, &host);
    for stage in &written.stages {
        if checker.entry(stage).is_none() {
            let known = entries.iter().map(|entry| entry.name);
            let problem = Diagnostic::new(stage.kind.span, format!("there is no stage type `{}`", stage.kind.text));
            checker.problems.push(problem.maybe_help(did_you_mean(&stage.kind.text, known)));
        }
    }
    let inputs: Vec<Option<Vec<CheckedInput>>> =
        written.stages.iter().map(|stage| inputs::check(&mut checker, stage)).collect();
    let ports: Vec<BTreeMap<String, String>> =
        written.stages.iter().map(|stage| hooks::check_ports(&mut checker, stage)).collect();
    let order = order::check(&mut checker, &inputs);
    let stages = config::check(&mut checker, &order, inputs, ports);
    let mut problems = checker.problems;
    problems.extend(reading.problems.iter().cloned());
    let (name, seed) = (written.name.clone(), written.seed);
    let store_options = written.store_options.clone();
    let store = absolute(&written.store, &reading.current_dir);
    let (threads, device, lease) = (written.threads, written.device.text.clone(), written.lease);
    if problems.is_empty() {
        return Ok(Spec {
            name,
            store,
            store_options,
            seed,
            threads,
            device,
            lease,
            hooks,
            stages,
            sources: reading.sources,
        });
    }
    Err(Diagnostics::new(reading.sources, problems))
}

/// A local store's URL with the current directory written out, so that a plan means the same folder everywhere.
fn absolute(store: &str, current_dir: &Path) -> String {
    match (store.strip_prefix("file://"), store.contains("://")) {
        (None, true) => store.to_owned(),
        (path, _) => format!("file://{}", files::locate(path.unwrap_or(store), Path::new(""), current_dir).display()),
    }
}

/// The device by the word of the pipeline; none when this build has no such device.
pub(crate) fn parse_device(text: &str) -> Option<dsv3_stage::Device> {
    serde_json::from_value(Value::String(text.to_owned())).ok()
}

fn device(checker: &mut Checker<'_>) {
    let device = &checker.written.device;
    if parse_device(&device.text).is_none() {
        let problem = Diagnostic::new(device.span, format!("this build has no device `{}`", device.text));
        checker.problems.push(problem.help("write `device: cpu`"));
    }
}
