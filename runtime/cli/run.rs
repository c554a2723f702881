//! `dsv3-pipeline run PIPELINE`: plans and runs; the same command again goes on where it stopped or finds all done.

use dsv3_core::{Cancel, Error};
use dsv3_engine::{EngineError, RunOptions, RunReport, Selection};
use dsv3_store::StageResult;

use crate::{
    common::{self, Failure, PipelineArgs},
    plan, progress,
    runner::RunnerArgs,
    signals, table,
};

/// Arguments of `run`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) pipeline: PipelineArgs,
    /// Run this stage and what needs it; what comes before must be finished
    #[arg(long, value_name = "STAGE", conflicts_with = "only")]
    from: Option<String>,
    /// Run this stage alone
    #[arg(long, value_name = "STAGE")]
    only: Option<String>,
    /// Run this stage and what it needs
    #[arg(long, value_name = "STAGE", conflicts_with = "only")]
    until: Option<String>,
    /// Show what would happen and stop
    #[arg(long)]
    dry_run: bool,
    /// Print the event stream, one JSON value a line; the last has every closing metric
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
    // From here on a signal is a request to stop, also while files are digested.
    let watched = watched(args.json, &args.runner)?;
    let engine = common::engine();
    let spec = args.pipeline.load(&engine, &[])?;
    let select = match (args.only, args.from, args.until) {
        (Some(only), _, _) => Selection::Only(only),
        (None, None, None) => Selection::All,
        (None, from, until) => Selection::Between { from, until },
    };
    let plan = signals::unless_stopped(&watched.cancel, engine.plan(spec)).await?;
    select.names(&plan)?;
    if args.dry_run {
        return plan::show(&engine.states(&plan).await?, args.json);
    }
    let options = RunOptions { select, stay: args.stay, ..watched };
    common::set_threads(plan.threads);
    let report = engine.run(&plan, &options).await;
    conclude(report, args.json)
}

/// Options with signals watched and events printed.
pub(crate) fn watched(json: bool, runner: &RunnerArgs) -> Result<RunOptions, Failure> {
    let cancel = Cancel::new();
    signals::watch(cancel.clone(), runner.stop_after)?;
    let lease = runner.lease();
    if let Some(problem) = lease.problem() {
        return Err(Error::invalid(problem).help("mend --lease-beat and --lease-expire").into());
    }
    let events = progress::events(json);
    Ok(RunOptions { events, cancel, command: Some(command()), lease, ..RunOptions::default() })
}

/// The command line of this process as one would type it, without what only chooses how it talks.
fn command() -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:=@,+%".contains(&byte);
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let quoted = words.filter(|word| word != "--json").map(|word| match !word.is_empty() && word.bytes().all(plain) {
        true => word,
        false => format!("'{}'", word.replace('\'', r"'\''")),
    });
    std::iter::once("dsv3-pipeline".to_owned()).chain(quoted).collect::<Vec<_>>().join(" ")
}

/// What guards did and the closing table of a run that ended well, or its failure, which the event stream has told.
pub(crate) fn conclude(report: Result<RunReport, EngineError>, json: bool) -> Result<(), Failure> {
    let report = report.map_err(Failure::told)?;
    if !json {
        for stage in &report.stages {
            let incidents = stage.result.iter().flat_map(StageResult::incidents);
            incidents.for_each(|incident| common::say(format_args!("{}: {incident}", stage.stage)));
        }
        common::say(table::closing(&report.figures));
    }
    Ok(())
}
