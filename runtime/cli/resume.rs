//! `dsv3-pipeline resume RUN`: goes on with a stored run under its own id, from the store alone.

use dsv3_engine::RunOptions;

use crate::{
    common::{self, Failure},
    run,
    runner::RunnerArgs,
    signals::unless_stopped,
};

/// Arguments of `resume`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Id of the run, the beginning of it, or `last`
    #[arg(default_value = "last")]
    run: String,
    /// Store of the run
    #[arg(long, value_name = "URL", default_value = common::DEFAULT_STORE)]
    store: String,
    /// Compute threads; results do not depend on them
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print the event stream, one JSON value a line
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    runner: RunnerArgs,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let options = RunOptions { threads: args.threads, ..run::watched(args.json, &args.runner)? };
    let engine = common::engine();
    let store = common::open_store(&engine, &args.store)?;
    let id = unless_stopped(&options.cancel, engine.find_run(&store, &args.run)).await?;
    let plan = unless_stopped(&options.cancel, engine.stored_plan(&store, &id)).await?;
    common::set_threads(args.threads.or(plan.threads));
    run::conclude(engine.resume(&store, &id, &options).await, args.json)
}
