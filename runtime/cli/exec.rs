//! `dsv3-pipeline exec RUN STAGE`: exactly one stage of a stored run, from the store alone; what batch queues call.

use dsv3_engine::RunOptions;

use crate::{
    common::{self, Failure},
    run,
    runner::RunnerArgs,
    signals::unless_stopped,
};

/// Arguments of `exec`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Id of the run, the beginning of it, or `last`
    run: String,
    /// Stage to run; what it needs must be finished
    stage: String,
    /// Store of the run
    #[arg(long, value_name = "URL", default_value = common::DEFAULT_STORE)]
    store: String,
    /// Compute threads; results do not depend on them
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print the event stream, one JSON value a line
    #[arg(long)]
    pub(crate) json: bool,
    /// Keep a serving stage running until it is stopped
    #[arg(long)]
    stay: bool,
    #[command(flatten)]
    runner: RunnerArgs,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = RunOptions { threads: args.threads, stay: args.stay, ..run::watched(args.json, &args.runner)? };
    let engine = common::engine();
    let store = common::open_store(&engine, &args.store)?;
    let id = unless_stopped(&options.cancel, engine.find_run(&store, &args.run)).await?;
    let plan = unless_stopped(&options.cancel, engine.stored_plan(&store, &id)).await?;
    plan.stage(&args.stage)?;
    common::set_threads(args.threads.or(plan.threads));
    run::conclude(engine.exec(&store, &id, &args.stage, &options).await, args.json)
}
