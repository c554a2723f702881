//! The whole life of a DeepSeek-V3-class model as typed stages of a declarative pipeline, for embedding.
//!
//! A host hands [`Engine`] the stages it knows, ours ([`ALL`]) and its own beside them, and drives runs on its own tokio
//! runtime: events arrive as values, a [`Cancel`] stops a run at its next checkpoint. The library installs no signal
//! handler, never ends the process and keeps no global state.
//!
//! ```
//! use dsv3_pipeline::{Ctx, Engine, Error, Event, Events, LoadOptions, NoPorts, RunOptions, Stage, StageEntry};
//!
//! /// A stage of the host's own.
//! struct Hello;
//!
//! #[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
//! struct Config {
//!     /// Whom to greet.
//!     whom: String,
//! }
//!
//! impl Stage for Hello {
//!     const NAME: &'static str = "hello";
//!     const VERSION: u32 = 1;
//!     const ABOUT: &'static str = "Greets.";
//!     type Config = Config;
//!     type Inputs = NoPorts;
//!     type Outputs = NoPorts;
//!     fn run(config: Config, _: NoPorts, ctx: &mut Ctx) -> Result<NoPorts, Error> {
//!         ctx.log_info(format!("hello, {}", config.whom));
//!         ctx.set_metric("letters", config.whom.len() as f64);
//!         Ok(NoPorts {})
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! let engine = Engine::builder().stages(dsv3_pipeline::ALL).stages(&[StageEntry::of::<Hello>()]).build();
//! let text = "version: 1\nstore: memory://\nstages:\n  a: { type: hello, config: { whom: world } }\n";
//! let spec = engine.load_text("inline.yaml", text, std::path::Path::new("."), &LoadOptions::default())?;
//! let plan = engine.plan(spec).await?;
//! let events = Events::new(|event| {
//!     if let Event::Log { message, .. } = event {
//!         println!("{message}");
//!     }
//! });
//! let report = engine.run(&plan, &RunOptions { events, ..RunOptions::default() }).await?;
//! assert_eq!(report.figures["a.letters"].value, 5.0);
//! # Ok(())
//! # })
//! # }
//! ```

pub use dsv3_core::{
    Artifact, ArtifactRef, Bound, Cancel, Clock, Digest, Error, ErrorKind, Event, Events, Figure, FileEntry,
    GuardAction, GuardRecord, Kind, Level, Manifest, Outcome, SystemClock, VirtualClock, kinds,
};
pub use dsv3_engine::{
    At, Attempt, ChaosOptions, ChaosPoint, ChaosReport, ChaosRow, ChaosTrial, Contrast, Damage, Diagnostic,
    Diagnostics, Engine, EngineBuilder, EngineError, Explanation, Exported, FigureRow, Floor, HookLimits, InputRef,
    LoadOptions, Machine, Matrix, Plan, PlannedHook, PlannedInput, PlannedStage, Replay, Report, ReportedRun,
    ReportedStage, RunOptions, RunReport, RunSummary, Selection, Spec, Spread, StageReport, StageState, Standing,
    State, TrialEnd, Variant, Verification, VerifiedStage, VerifyOptions,
};
pub use dsv3_stage::{
    Ctx, Device, HookPort, InputFacts, NoPorts, OutputFacts, PortFacts, PortSpec, Ports, Problems, Stage, StageEntry,
    World, ports,
};
pub use dsv3_stages::ALL;
pub use dsv3_store::{LeaseOptions, StageResult, Store};
