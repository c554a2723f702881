//! A pipeline as written: names, places and values before anything is looked up.
//!
//! `text -> tree -> --set -> ${...} -> Spec`. What refers to stage types, ports or files is checked in
//! [`crate::check`].

mod fields;
pub(crate) mod files;
mod params;
mod read;
mod runner;
mod set;
pub(crate) mod store;

use std::{collections::BTreeMap, path::PathBuf};

pub use runner::{Better, KeepBest, LeaseSettings, RetentionSpec};

use crate::{
    diagnostics::{Diagnostic, Source, Sources, Span},
    yaml::{self, Node, Value},
};

/// What the caller adds to the text of a pipeline.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// `PATH=VALUE` overrides, in order.
    pub sets: Vec<String>,
    /// Store that replaces the one the file names: a URL, or a map in braces as `store:` takes it.
    pub store: Option<String>,
    /// Compute threads that replace those the file names.
    pub threads: Option<usize>,
    /// Token counts at which stages describe their schedules.
    pub at_tokens: Vec<u64>,
    /// Current directory of relative paths on the command line; empty means the process's.
    pub current_dir: PathBuf,
    /// Environment that `${env.X}` reads; `None` means the process's.
    pub env: Option<BTreeMap<String, String>>,
}

/// A text and its place.
#[derive(Clone, Debug)]
pub(crate) struct Word {
    pub(crate) text: String,
    pub(crate) span: Span,
    pub(crate) origin: u32,
}

/// One hook of the pipeline.
#[derive(Clone, Debug)]
pub(crate) struct HookSpec {
    pub(crate) name: Word,
    pub(crate) wasm: Word,
    pub(crate) world: Word,
    pub(crate) config: serde_json::Value,
    /// Where the configuration stands; the hook's name when it has none.
    pub(crate) config_span: Span,
    pub(crate) limits: HookLimits,
    pub(crate) on_error: dsv3_hooks::OnError,
}

/// What a hook may use up.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HookLimits {
    /// Memory of one instance in MiB.
    #[schemars(range(min = 1, max = 4096))]
    pub memory_mb: u32,
    /// Wall time of one batch in milliseconds; exceeding it always fails the stage.
    #[schemars(range(min = 1))]
    pub deadline_ms: u64,
    /// Instructions of one batch, counted by wasmtime; unlimited when absent.
    pub fuel: Option<u64>,
}

impl HookLimits {
    /// In the words of the host.
    pub(crate) fn to_host(self) -> dsv3_hooks::Limits {
        let memory_bytes = u64::from(self.memory_mb) << 20;
        dsv3_hooks::Limits { memory_bytes, deadline_ms: self.deadline_ms, fuel: self.fuel }
    }
}

impl Default for HookLimits {
    fn default() -> Self {
        Self { memory_mb: 256, deadline_ms: 10_000, fuel: None }
    }
}

/// What a closing figure should reach. A missed floor is shown and fails nothing.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Floor {
    /// The figure should be at least this.
    Min(f64),
    /// The figure should be at most this.
    Max(f64),
}

/// One input port as written: a single value or a list.
#[derive(Clone, Debug)]
pub(crate) struct InputSpec {
    pub(crate) port: Word,
    pub(crate) values: Vec<Word>,
}

/// One stage as written.
#[derive(Clone, Debug)]
pub(crate) struct StageSpec {
    pub(crate) name: Word,
    pub(crate) kind: Word,
    pub(crate) inputs: Vec<InputSpec>,
    /// Hook port and name of the hook.
    pub(crate) hooks: Vec<(Word, Word)>,
    /// Floors of closing figures by metric.
    pub(crate) floors: BTreeMap<String, Floor>,
    /// Remarks on closing figures by metric.
    pub(crate) notes: BTreeMap<String, String>,
    /// Absent means an empty map at the stage's name.
    pub(crate) config: Node,
    pub(crate) config_span: Span,
    /// Which checkpoints are kept; the pipeline's word when absent.
    pub(crate) retention: Option<RetentionSpec>,
}

/// A pipeline as written.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    pub(crate) name: String,
    pub(crate) store: String,
    pub(crate) store_options: dsv3_store::StoreOptions,
    pub(crate) seed: u64,
    pub(crate) threads: Option<usize>,
    pub(crate) device: Word,
    pub(crate) lease: LeaseSettings,
    pub(crate) hooks: Vec<HookSpec>,
    pub(crate) stages: Vec<StageSpec>,
}

/// Everything read so far, with the problems found on the way.
pub(crate) struct Reading {
    pub(crate) sources: Sources,
    pub(crate) current_dir: PathBuf,
    pub(crate) written: Option<Written>,
    pub(crate) problems: Vec<Diagnostic>,
}

impl Reading {
    /// Folder that a relative path starts from.
    pub(crate) fn base(&self, origin: u32) -> PathBuf {
        self.sources.get(origin).map_or_else(|| self.current_dir.clone(), |source| source.base.clone())
    }
}

/// Reads a pipeline's text; `name` is shown before `:LINE:COL`, `base` is where its relative paths start.
pub(crate) fn read(name: &str, text: &str, base: PathBuf, options: &LoadOptions) -> Reading {
    let current_dir = match &options.current_dir {
        dir if dir.as_os_str().is_empty() => std::env::current_dir().unwrap_or_default(),
        dir => dir.clone(),
    };
    let mut sources = Sources::default();
    let file = sources.add(Source::new(name, text, base));
    let (root, mut problems) = match sources.get(file) {
        Some(source) => yaml::read(file, source),
        None => (None, Vec::new()),
    };
    let mut reading = Reading { sources, current_dir, written: None, problems: Vec::new() };
    // `---` alone is a document that holds nothing.
    if let Some(mut root) = root.filter(|root| root.value != Value::Null) {
        for argument in &options.sets {
            let source = Source::new(format!("--set {argument}"), argument.clone(), reading.current_dir.clone());
            let index = reading.sources.add(source);
            if let Some(source) = reading.sources.get(index) {
                set::apply(&mut root, index, source, &mut problems);
            }
        }
        if let Some(store) = options.store.as_ref().filter(|store| store::is_map(store)) {
            let text = format!("store={store}");
            let source = Source::new(format!("--{text}"), text, reading.current_dir.clone());
            let index = reading.sources.add(source);
            if let Some(source) = reading.sources.get(index) {
                set::apply(&mut root, index, source, &mut problems);
            }
        }
        let origins = params::substitute(&mut root, options.env.as_ref(), &mut problems);
        reading.sources.add_origins(origins);
        reading.written = read::written(&root, default_name(name), options, &mut problems);
    } else if problems.is_empty() {
        let message = "the file is empty; a pipeline has `version: 1` and `stages`";
        problems.push(Diagnostic::new(Span::default(), message));
    }
    reading.problems = problems;
    reading
}

/// File stem of the path the pipeline was read from.
fn default_name(path: &str) -> String {
    let stem = std::path::Path::new(path).file_stem().and_then(|stem| stem.to_str());
    stem.filter(|stem| !stem.is_empty()).unwrap_or("pipeline").to_owned()
}

#[cfg(test)]
mod tests;
