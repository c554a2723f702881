//! The one stream of events: progress bars, `--json`, reports and outside engines all read it; a stage never prints.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{ArtifactRef, ErrorKind};

/// Severity of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Worth knowing.
    Info,
    /// Something was skipped, repaired or degraded.
    Warn,
}

/// How a stage or run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It ran to its end.
    Done,
    /// A finished result was found; nothing ran.
    Cached,
    /// It stopped at a checkpoint because it was asked to.
    Cancelled,
    /// It failed.
    Failed {
        /// What the operator does next.
        kind: ErrorKind,
        /// The whole chain of causes, one per element.
        messages: Vec<String>,
        /// What to do next.
        help: Option<String>,
    },
}

/// Something that happened. `stage` is the stage's name in the pipeline; empty for the run itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Event {
    RunStarted {
        run: String,
        pipeline: String,
        stages: Vec<String>,
    },
    StageStarted {
        stage: String,
        kind: String,
        key: String,
        resumed_from: Option<u64>,
    },
    Progress {
        stage: String,
        done: u64,
        total: Option<u64>,
        unit: String,
    },
    Metric {
        stage: String,
        name: String,
        step: u64,
        value: f64,
    },
    Log {
        stage: String,
        level: Level,
        message: String,
    },
    Artifact {
        stage: String,
        port: String,
        artifact: ArtifactRef,
        bytes: u64,
    },
    Checkpoint {
        stage: String,
        seq: u64,
        step: u64,
    },
    StageFinished {
        stage: String,
        #[serde(flatten)]
        outcome: Outcome,
        seconds: f64,
        metrics: BTreeMap<String, serde_json::Value>,
    },
    RunFinished {
        run: String,
        #[serde(flatten)]
        outcome: Outcome,
        seconds: f64,
        metrics: BTreeMap<String, serde_json::Value>,
    },
}

/// Where events go. Cheap to clone; calling it never fails and must not block for long.
#[derive(Clone)]
pub struct Events(Arc<dyn Fn(Event) + Send + Sync>);

impl Events {
    /// Calls `sink` for each event, on the thread where it happens.
    pub fn new(sink: impl Fn(Event) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// Drops every event.
    pub fn none() -> Self {
        Self::new(|_| {})
    }

    /// Sends one event.
    pub fn emit(&self, event: Event) {
        (self.0)(event);
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}
