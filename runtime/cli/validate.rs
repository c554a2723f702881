//! `dsv3-pipeline validate PIPELINE`: every problem at once, each with file, line, column and excerpt.

use serde_json::json;

use crate::common::{self, Failure, PipelineArgs};

/// Arguments of `validate`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Print one JSON value
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let spec = args.pipeline.load(&common::engine(), &[])?;
    let names: Vec<&str> = spec.stages().map(|(name, _)| name).collect();
    if args.json {
        return common::say_json(&json!({ "pipeline": spec.name(), "stages": names, "problems": [] }));
    }
    common::say(format!("{}: good; {} stages: {}", args.pipeline.pipeline.display(), names.len(), names.join(", ")));
    Ok(())
}
