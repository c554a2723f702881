//! `dsv3-pipeline`: the command line. Signals, exit codes and everything printed live here and nowhere else.
//!
//! Exit codes: 0 done; 64 bad usage, configuration or hook world; 65 bad data, integrity, hook trap or timeout; 69
//! something unavailable, full or read-only; 70 a bug; 75 stopped at a checkpoint, run again.

mod bench;
mod chaos;
mod common;
mod exec;
mod explain;
mod export;
mod gc;
mod generate;
mod get;
mod inspect;
mod plan;
mod progress;
mod report;
mod resume;
mod run;
mod runner;
mod runs;
mod schema;
mod serve;
mod signals;
mod table;
mod validate;
mod verify;

use std::process::ExitCode;

use clap::Parser;
use common::Failure;
use dsv3_core::{Error, ErrorKind};

/// The whole life of a DeepSeek-V3-class model as a pipeline.
#[derive(Parser)]
#[command(name = "dsv3-pipeline", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Run a pipeline; run it again to go on where it stopped
    Run(run::Args),
    /// Check a pipeline; report every problem with its place
    Validate(validate::Args),
    /// Show what a run would do with each stage
    Plan(plan::Args),
    /// Run one stage of a stored run, from the store alone
    Exec(exec::Args),
    /// Go on with a stored run
    Resume(resume::Args),
    /// Say why a stage is or is not cached, field by field
    Explain(explain::Args),
    /// List the runs of a store
    Runs(runs::Args),
    /// Remove what no kept run of a store names
    Gc(gc::Args),
    /// Write what runs did: a page with every closing figure, and plots
    Report(report::Args),
    /// Show an artifact, a stage's result, or the tensors of a safetensors file
    Inspect(inspect::Args),
    /// Copy an artifact out of the store into a folder
    Get(get::Args),
    /// Write a checkpoint of a training stage as a model folder
    Export(export::Args),
    /// Read everything a run names and compare every digest; do steps again and compare their bits
    Verify(verify::Args),
    /// Print the JSON Schema of pipeline files
    Schema(schema::Args),
    /// Serve a model folder over an OpenAI-compatible HTTP API
    Serve(serve::Args),
    /// Run a pipeline, made small, with a crash at every store operation
    Chaos(chaos::Args),
    /// Measure training, decoding or prefill on this machine, beside what it could reach
    Bench(bench::Args),
    /// Write the data that the shipped pipelines read
    #[command(hide = true)]
    Generate(generate::Args),
}

/// Fewest threads for the engine and the store.
const WORKERS_MIN: usize = 4;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, everything else is bad usage.
            let code = if error.use_stderr() { ErrorKind::Invalid.exit_code() } else { 0 };
            // Nobody is left to tell when the terminal is gone.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    // Training frees and takes the same megabytes at every step.
    dsv3_ops::keep_freed_memory();
    // Enough that heartbeats go on while events wait for a reader that is slow.
    let workers = std::thread::available_parallelism().map_or(WORKERS_MIN, |cores| cores.get().max(WORKERS_MIN));
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let error = Error::unavailable("cannot start the threads of the runtime").source(error);
            return Failure::from(error).report(false);
        }
    };
    common::init_tracing();
    let json = cli.command.json();
    let outcome = runtime.block_on(cli.command.run());
    // A stage or a loading model that cannot be interrupted must not hold the exit.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(json),
    }
}

impl Command {
    fn json(&self) -> bool {
        match self {
            Self::Run(args) => args.json,
            Self::Validate(args) => args.json,
            Self::Plan(args) => args.json,
            Self::Exec(args) => args.json,
            Self::Resume(args) => args.json,
            Self::Report(args) => args.json,
            Self::Gc(args) => args.json,
            Self::Bench(args) => args.json,
            Self::Chaos(args) => args.json,
            _ => false,
        }
    }

    async fn run(self) -> Result<(), Failure> {
        match self {
            Self::Run(args) => run::run(args).await,
            Self::Validate(args) => validate::run(&args),
            Self::Plan(args) => plan::run(args).await,
            Self::Exec(args) => exec::run(args).await,
            Self::Resume(args) => resume::run(args).await,
            Self::Explain(args) => explain::run(args).await,
            Self::Runs(args) => runs::run(args).await,
            Self::Gc(args) => gc::run(args).await,
            Self::Report(args) => report::run(args).await,
            Self::Inspect(args) => inspect::run(args).await,
            Self::Get(args) => get::run(args).await,
            Self::Export(args) => export::run(args).await,
            Self::Verify(args) => verify::run(args).await,
            Self::Schema(args) => schema::run(&args),
            Self::Serve(args) => Ok(serve::run(args).await?),
            Self::Bench(args) => bench::run(&args),
            Self::Chaos(args) => chaos::run(args).await,
            Self::Generate(args) => Ok(generate::run(&args)?),
        }
    }
}
