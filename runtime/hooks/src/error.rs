//! What can go wrong with a hook, and what the operator does next.

use std::fmt;

use dsv3_core::ErrorKind;

/// Why a hook failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Cause {
    /// The bytes are not a component, or not one of the world asked for.
    #[error("not a component of world {world}: {reason}")]
    World {
        /// World asked for.
        world: &'static str,
        /// What is missing or superfluous.
        reason: String,
    },
    /// `configure` refused the configuration.
    #[error("it refused its configuration: {0}")]
    Configuration(String),
    /// The guest trapped (a panic, an out-of-bounds access, too deep a recursion).
    #[error("it trapped: {0}")]
    Trap(String),
    /// The guest ran beyond the deadline.
    #[error("it ran longer than its deadline of {0} ms")]
    Deadline(u64),
    /// The guest asked for more memory than allowed.
    #[error("it wanted more memory than its limit of {0} bytes")]
    Memory(u64),
    /// The guest used up its fuel.
    #[error("it used up its fuel of {0}")]
    Fuel(u64),
    /// The guest itself returned an error.
    #[error("it reported: {0}")]
    Guest(String),
    /// The guest's answer does not have the promised form.
    #[error("its answer is malformed: {0}")]
    Malformed(String),
}

/// A failed hook call.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub struct HookError {
    /// Name of the hook in the pipeline.
    pub hook: String,
    /// Index of the batch, when a batch was running.
    pub batch: Option<u64>,
    /// Index within the batch of the item that alone reproduces the failure.
    pub item: Option<usize>,
    /// Why.
    pub cause: Cause,
}

impl fmt::Display for HookError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hook `{}`", self.hook)?;
        if let Some(batch) = self.batch {
            write!(f, ", batch {batch}")?;
        }
        if let Some(item) = self.item {
            write!(f, ", item {item}")?;
        }
        write!(f, ": {}", self.cause)
    }
}

impl HookError {
    /// What the operator does next.
    pub fn kind(&self) -> ErrorKind {
        match self.cause {
            Cause::World { .. } | Cause::Configuration(_) => ErrorKind::Invalid,
            _ => ErrorKind::Data,
        }
    }

    /// A sentence on what to do.
    pub fn help(&self) -> &'static str {
        match self.cause {
            Cause::World { .. } => "build it as a component of that world with no imports (schemas/hooks/README.md)",
            Cause::Configuration(_) => "correct `config` of this hook in the pipeline",
            Cause::Deadline(_) => {
                "raise `limits.deadline_ms` of this hook or make it faster; a deadline always ends the stage"
            }
            Cause::Memory(_) => "raise `limits.memory_mb` of this hook, or make it use less",
            Cause::Fuel(_) => "raise `limits.fuel` of this hook, or make it do less",
            _ => "correct the hook, or choose `on_error: drop` or `on_error: keep` for it",
        }
    }
}

impl From<HookError> for dsv3_core::Error {
    fn from(error: HookError) -> Self {
        Self::new(error.kind(), error.to_string()).help(error.help())
    }
}
