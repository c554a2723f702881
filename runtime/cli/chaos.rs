//! `dsv3-pipeline chaos PIPELINE --seed S`: the user's own pipeline, made small, with a crash at every store operation;
//! every row of the kill matrix must end with the results of the undisturbed run.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use dsv3_core::{Cancel, Error, ErrorKind};
use dsv3_engine::{ChaosOptions, ChaosPoint, ChaosReport, ChaosRow, ChaosTrial, Engine, Plan};
use dsv3_store::{Store, faults::Fault};
use serde_json::json;

use crate::{
    common::{self, Failure, PipelineArgs},
    signals,
};

/// Trials between two lines of progress.
const TOLD_EVERY: usize = 100;

/// Arguments of `chaos`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Draws the sample of points and the further crashes of a trial
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Try this many points, drawn by the seed; all when absent
    #[arg(long, value_name = "N")]
    points: Option<usize>,
    /// Try one point, as a failed one was printed
    #[arg(long, value_name = "POINT", conflicts_with = "points")]
    point: Option<ChaosPoint>,
    /// Disturb these stages only
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    stages: Vec<String>,
    /// What goes wrong: crashes, troubles, or names such as crash-after, torn, lost-answer, timeout, full
    #[arg(long, value_name = "FAULT", value_delimiter = ',', default_value = "crashes")]
    faults: Vec<String>,
    /// Rows left of every Parquet and JSONL input; 0 leaves all
    #[arg(long, value_name = "N", default_value_t = 24)]
    rows: usize,
    /// Leave the shapes in the pipeline as they are
    #[arg(long)]
    full_size: bool,
    /// Keep the stores on disk, in the system's temporary folder, instead of in memory: adds the steps of durable creates
    #[arg(long)]
    disk: bool,
    /// Trials at the same time
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    /// Print one JSON value for each trial and the matrix as the last
    #[arg(long)]
    pub(crate) json: bool,
}

/// A folder that goes with this value.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // The system's temporary folder is cleaned anyway.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let faults = faults(&args.faults)?;
    let cancel = Cancel::new();
    signals::watch(cancel.clone(), None)?;
    let scratch = Scratch(std::env::temp_dir().join(format!("dsv3-chaos-{}", dsv3_store::nonce())));
    let refused = |error| Error::unavailable(format!("cannot create {}", scratch.0.display())).source(error);
    std::fs::create_dir_all(&scratch.0).map_err(refused)?;
    let engine = common::engine_on(Store::with_memory());
    let plan = small(&args, &engine, &scratch.0).await?;
    common::set_threads(plan.threads);
    let options = ChaosOptions {
        points_max: args.points,
        stages: args.stages.clone(),
        faults,
        only: args.point.clone(),
        folder: args.disk.then(|| scratch.0.clone()),
        jobs: args.jobs,
        threads: plan.threads,
        ..ChaosOptions::new(args.seed)
    };
    let (started, tried) = (Instant::now(), AtomicUsize::new(0));
    let told = |trial: &ChaosTrial| {
        let count = tried.fetch_add(1, Ordering::Relaxed) + 1;
        if args.json {
            // Standard output that is closed must not end the trials.
            let _ = common::say_json(&trial_json(trial));
        } else if let Some(problem) = &trial.problem {
            common::say(format_args!("DIFFERS {}: {problem}", trial.point));
        } else if count.is_multiple_of(TOLD_EVERY) {
            common::tell(format_args!("{count} points tried in {:.0} s", started.elapsed().as_secs_f64()));
        }
    };
    let report = engine.chaos(&plan, &options, &cancel, &told).await?;
    conclude(&args, &report, started.elapsed().as_secs_f64())
}

fn faults(names: &[String]) -> Result<Vec<Fault>, Error> {
    let mut faults = Vec::new();
    for name in names {
        match (name.as_str(), Fault::from_name(name)) {
            ("crashes", _) => faults.extend(Fault::CRASHES),
            ("troubles", _) => faults.extend(Fault::TROUBLES),
            (_, Some(fault)) if fault != Fault::Cut => faults.push(fault),
            _ => {
                let known: Vec<&str> =
                    Fault::ALL.iter().filter(|fault| **fault != Fault::Cut).map(|fault| fault.name()).collect();
                return Err(Error::invalid(format!("no fault is called `{name}`"))
                    .help(format!("crashes, troubles, or of: {}", known.join(", "))));
            }
        }
    }
    faults.sort_unstable();
    faults.dedup();
    Ok(faults)
}

/// The plan, made small; says what was made small.
async fn small(args: &Args, engine: &Engine, scratch: &Path) -> Result<Plan, Failure> {
    let whole = engine.plan(args.pipeline.load(engine, &[])?).await?;
    if args.full_size && args.rows == 0 {
        return Ok(whole);
    }
    let sets = if args.full_size { Vec::new() } else { engine.shrink_sets(&whole, &args.pipeline.sets)? };
    let mut arguments = args.pipeline.clone();
    // Of two that name one field the later counts; ours name none that the user does.
    arguments.sets.extend(sets.iter().cloned());
    let mut plan = engine.plan(arguments.load(engine, &[])?).await?;
    let folder = scratch.join("inputs");
    let refused = |error| Error::unavailable(format!("cannot create {}", folder.display())).source(error);
    std::fs::create_dir_all(&folder).map_err(refused)?;
    let head = |path: &Path| match args.rows {
        0 => Ok(None),
        rows => dsv3_data::head(path, rows).map_err(Error::from),
    };
    let (files, before, after) = plan.shrink_inputs(&folder, &head)?;
    if !args.json {
        sets.iter().for_each(|set| common::say(format_args!("shrunk: --set '{set}'")));
        if files > 0 {
            let rows = args.rows;
            common::say(format_args!("shrunk: first {rows} rows of {files} input files, {after} bytes of {before}"));
        }
    }
    Ok(plan)
}

fn trial_json(trial: &ChaosTrial) -> serde_json::Value {
    json!({
        "event": "chaos_trial",
        "point": trial.point.to_string(),
        "end": trial.end,
        "attempts": trial.attempts,
        "further_crashes": trial.further_crashes,
        "resumed": trial.resumed,
        "identical": trial.problem.is_none(),
        "problem": trial.problem,
    })
}

/// The matrix, and the failure when a row of it is not identical.
fn conclude(args: &Args, report: &ChaosReport, seconds: f64) -> Result<(), Failure> {
    let failed: Vec<&ChaosTrial> = report.failed().collect();
    if args.json {
        let faults: Vec<_> = report
            .faults()
            .iter()
            .map(|(fault, (points, met, same))| {
                json!({ "fault": fault.name(), "points": points, "met": met, "identical": same })
            })
            .collect();
        common::say_json(&json!({
            "event": "chaos_finished",
            "seed": report.seed,
            "points": report.points,
            "tried": report.trials.len(),
            "identical": report.trials.len() - failed.len(),
            "seconds": seconds,
            "stages": report.stages.iter().map(|(name, count)| json!({ "stage": name, "operations": count }))
                .collect::<Vec<_>>(),
            "not_compared": report.clocked,
            "rows": report.rows(),
            "faults": faults,
            "failed": failed.iter().map(|trial| trial.point.to_string()).collect::<Vec<_>>(),
        }))?;
    } else {
        common::say(matrix(report, seconds));
    }
    let Some(first) = failed.first() else { return Ok(()) };
    let message = format!("{} of {} points did not end as the undisturbed run", failed.len(), report.trials.len());
    let mut again = format!("dsv3-pipeline chaos {} --seed {}", args.pipeline.pipeline.display(), report.seed);
    args.pipeline.sets.iter().for_each(|set| again.push_str(&format!(" --set '{set}'")));
    if args.disk {
        again.push_str(" --disk");
    }
    let help = format!("one of them again: {again} --rows {} --point '{}'", args.rows, first.point);
    Err(Error::new(ErrorKind::Data, message).help(help).into())
}

/// The matrix as a table in Markdown.
fn matrix(report: &ChaosReport, seconds: f64) -> String {
    let mut lines = vec![
        "| stage | operation | points | met | went on over it | attempts | from a checkpoint | crashed again | identical |"
            .to_owned(),
        "|---|---|---|---|---|---|---|---|---|".to_owned(),
    ];
    let line = |row: &ChaosRow| {
        let ChaosRow { stage, operation, points, not_met, survived, attempts, resumed, further_crashes, identical } =
            row;
        let met = points - not_met;
        format!(
            "| {stage} | {operation} | {points} | {met} | {survived} | {attempts} | {resumed} | {further_crashes} | {identical} |"
        )
    };
    lines.extend(report.rows().iter().map(line));
    lines.extend(report.totals().into_iter().map(|row| line(&ChaosRow { stage: "all stages".to_owned(), ..row })));
    if !report.clocked.is_empty() {
        lines.push(format!("\nnot compared, since a clock has a hand in them: {}", report.clocked.join(", ")));
    }
    let same = report.trials.len() - report.failed().count();
    let again: u32 = report.trials.iter().map(|trial| trial.further_crashes).sum();
    lines.push(format!(
        "\nseed {}: {} of {} points tried, {again} further crashes, {same} identical, {} not, {seconds:.0} s",
        report.seed,
        report.trials.len(),
        report.points,
        report.trials.len() - same,
    ));
    lines.join("\n")
}
