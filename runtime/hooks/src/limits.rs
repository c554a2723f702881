//! Limits and policy of a hook, and the resource limiter that enforces memory and remembers that it did.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use wasmtime::ResourceLimiter;

/// What a hook may use for one batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Most bytes of linear memory.
    pub memory_bytes: u64,
    /// Milliseconds of wall time for one batch. Reaching it always ends the stage, or machine load would change results.
    pub deadline_ms: u64,
    /// Units of fuel (about one per instruction) for one batch: a limit that does not depend on the machine. Off by default.
    pub fuel: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory_bytes: 256 << 20, deadline_ms: 10_000, fuel: None }
    }
}

/// What to do when a hook fails on an item for another reason than its deadline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// End the stage.
    #[default]
    Fail,
    /// Drop the document; for a reward, give 0.
    Drop,
    /// Keep the document as it is; for a reward, give 0.
    Keep,
}

/// Per-store state: the memory limiter.
pub(crate) struct State {
    memory_bytes: usize,
    pub(crate) memory_refused: bool,
}

impl State {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self { memory_bytes: usize::try_from(limits.memory_bytes).unwrap_or(usize::MAX), memory_refused: false }
    }
}

impl ResourceLimiter for State {
    fn memory_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let allowed = desired <= self.memory_bytes;
        self.memory_refused |= !allowed;
        Ok(allowed)
    }

    fn table_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= 100_000)
    }
}
