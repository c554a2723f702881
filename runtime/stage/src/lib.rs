//! What a stage is and what it is handed.
//!
//! A stage is a type that implements [`Stage`]: a name, a config, typed ports declared with [`ports!`], and `run`. The
//! engine sees it as a [`StageEntry`], type-erased: schema, ports, checks, and `run` on JSON. [`Ctx`] carries everything a
//! stage may touch: store, hooks, device, events, cancellation, seed, clock.
//!
//! ```
//! use dsv3_stage::{Artifact, Ctx, Stage, StageEntry, kinds::Report, ports};
//!
//! #[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
//! #[serde(deny_unknown_fields)]
//! struct Config {
//!     /// What to say.
//!     text: String,
//! }
//!
//! ports! {
//!     /// Outputs of `say`.
//!     struct Outputs {
//!         /// The text, as a report.
//!         report: Artifact<Report>,
//!     }
//! }
//!
//! struct Say;
//! impl Stage for Say {
//!     const NAME: &'static str = "say";
//!     const VERSION: u32 = 1;
//!     const ABOUT: &'static str = "Says something.";
//!     type Config = Config;
//!     type Inputs = dsv3_stage::NoPorts;
//!     type Outputs = Outputs;
//!
//!     fn run(config: Config, _: dsv3_stage::NoPorts, ctx: &mut Ctx) -> Result<Outputs, dsv3_stage::Error> {
//!         let file = ctx.put("report.json", config.text.into_bytes())?;
//!         Ok(Outputs { report: ctx.publish(vec![file], serde_json::Value::Null)? })
//!     }
//! }
//!
//! const SAY: StageEntry = StageEntry::of::<Say>();
//! let mut ctx = Ctx::for_test("say");
//! let outputs = SAY.run(&serde_json::json!({"text": "hello"}), &serde_json::json!({}), &mut ctx).unwrap();
//! assert_eq!(outputs["report"]["kind"], "report");
//! ```

mod closing;
mod ctx;
mod entry;
mod facts;
mod files;
mod keys;
mod names;
mod ports;
mod shape;
mod shrink;
#[cfg(test)]
mod tests;

pub use closing::Closing;
pub use ctx::{Ctx, CtxParts};
pub use dsv3_core::{Artifact, ArtifactRef, Bound, Error, ErrorKind, FileEntry, Kind, kinds};
pub use dsv3_hooks::{Hook, World};
pub use dsv3_ops::{Device, instruction_set};
pub use entry::{HookPort, Stage, StageEntry};
pub use facts::{InputFacts, OutputFacts, PortFacts, Problem, Problems};
pub use keys::KeyClass;
#[doc(hidden)]
pub use ports::private;
pub use ports::{NoPorts, PortField, PortSpec, Ports};
pub use shrink::Shrink;
