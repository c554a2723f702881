//! `dsv3-pipeline explain PIPELINE STAGE`: why the stage is or is not cached, field by field against its last result.

use crate::{
    common::{self, Failure, PipelineArgs},
    plan,
};

/// Arguments of `explain`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Stage to explain
    stage: String,
    /// Print one JSON value, with everything the key is made of
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let engine = common::engine();
    let spec = args.pipeline.load(&engine, &[])?;
    let plan = engine.plan(spec).await?;
    let explanation = engine.explain(&plan, &args.stage).await?;
    if args.json {
        return common::say_json(&explanation);
    }
    let stage = &explanation.stage;
    let key = stage.key.as_deref().unwrap_or("not known yet");
    common::say(format!("{} ({}) would {}", stage.stage, stage.kind, plan::would(&stage.state)));
    common::say(format!("  key: {key}"));
    explanation.reasons.iter().for_each(|reason| common::say(format!("  {reason}")));
    Ok(())
}
