//! `dsv3-pipeline resume RUN`: goes on with a stored run under its own id, from the store alone.
//!
//! `resume RUN STAGE --at SEQ` (of the last run: `resume STAGE --at SEQ`) does the stage again from that checkpoint, finished
//! or not. A record in the store says so; checkpoints after SEQ stay, count no more, and `--at` still finds them. A stage
//! that was finished must come out with the same bits, or the command fails (65) and the result committed first stays.

use dsv3_engine::{At, RunOptions};

use crate::{
    common::{self, Failure},
    runner::RunnerArgs,
    signals::unless_stopped,
};

/// Arguments of `resume`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Id of the run, the beginning of it, or `last`
    #[arg(default_value = "last")]
    run: String,
    /// Stage to do again from a checkpoint; given alone, of the last run
    #[arg(requires = "at")]
    stage: Option<String>,
    /// Number of the checkpoint, as the events name it
    #[arg(long, value_name = "SEQ")]
    at: Option<u64>,
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
    let (run, at) = match (args.stage, args.at) {
        (Some(stage), Some(seq)) => (args.run, Some(At { stage, seq })),
        (None, Some(seq)) => ("last".to_owned(), Some(At { stage: args.run, seq })),
        (_, None) => (args.run, None),
    };
    let options = RunOptions { threads: args.threads, at, ..crate::run::watched(args.json, &args.runner)? };
    let engine = common::engine();
    let store = common::open_store(&engine, &args.store)?;
    let id = unless_stopped(&options.cancel, engine.find_run(&store, &run)).await?;
    let plan = unless_stopped(&options.cancel, engine.stored_plan(&store, &id)).await?;
    if let Some(at) = &options.at {
        plan.stage(&at.stage)?;
    }
    common::set_threads(args.threads.or(plan.threads));
    crate::run::conclude(engine.resume(&store, &id, &options).await, args.json)
}
