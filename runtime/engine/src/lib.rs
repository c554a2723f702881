//! From YAML to finished stages: reads a pipeline, refuses it with every problem at its place, plans it, and runs the
//! plan with caching, resuming and one stream of events.
//!
//! ```text
//! text -> Spec (written, checked) -> Plan (resolved, digested, stored) -> exec RUN STAGE -> result under the stage's key
//! ```
//!
//! The engine knows no stage: a host hands it a slice of [`dsv3_stage::StageEntry`]. It is async on the host's tokio
//! runtime; each stage runs on an OS thread of its own. It installs no signal handler and never ends the process.
//!
//! Invariants: below the engine nobody sees YAML; a finished key is never run again; a stage's key depends on what changes
//! its result and on nothing else; all that a run needs lies in the store, external input files excepted.

mod cached;
mod chaos;
mod check;
mod diagnostics;
mod engine;
mod error;
mod explain;
mod export;
mod gc;
mod machine;
mod plan;
mod report;
mod run;
mod runs;
mod schema;
mod spec;
mod verify;
mod yaml;

pub use chaos::{ChaosOptions, ChaosPoint, ChaosReport, ChaosRow, ChaosTrial, Head, TrialEnd};
pub use check::Spec;
pub use diagnostics::{Diagnostic, Diagnostics, Origin, Source, Sources, Span};
pub use engine::{Engine, EngineBuilder};
pub use error::EngineError;
pub use explain::{Explanation, StageState, State};
pub use export::Exported;
pub use gc::{GcOptions, GcReport};
pub use machine::Machine;
pub use plan::{InputRef, Plan, PlannedHook, PlannedInput, PlannedStage};
pub use report::{Attempt, Contrast, FigureRow, Matrix, Report, ReportedRun, ReportedStage, Spread, Standing, Variant};
pub use run::{At, RunOptions, RunReport, Selection, StageReport};
pub use runs::{RunListing, RunSummary};
pub use spec::{Better, Floor, HookLimits, KeepBest, LeaseSettings, LoadOptions, RetentionSpec};
pub use verify::{Damage, Replay, Verification, VerifiedStage, VerifyOptions};

#[cfg(test)]
mod tests;
