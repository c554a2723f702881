//! `dsv3-pipeline report [RUN...]`: what runs did, as a page (`report.md`) and two plots (`loss.svg`, `accuracy.svg`).
//!
//! Everything comes from the stores of the runs: no pipeline file is read, nothing is computed, no run is disturbed.
//! Several runs are several seeds of one pipeline: the page has mean and spread, the plots a line a run and error bars.

mod accuracy;
mod loss;
mod markdown;
mod style;

use std::path::{Path, PathBuf};

use dsv3_core::Error;
use dsv3_engine::{Report, ReportedRun};
use serde_json::json;

use crate::common::{self, Failure};

/// Line before the tables in a file given with `--into`.
const INTO_BEGIN: &str = "<!-- report -->";
/// Line after them.
const INTO_END: &str = "<!-- /report -->";

/// Arguments of `report`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Runs: an id, the beginning of one, or `latest`; RUN@URL for a run of another store
    #[arg(value_name = "RUN", default_value = "latest")]
    runs: Vec<String>,
    /// Store of the runs that name none
    #[arg(long, value_name = "URL", default_value = common::DEFAULT_STORE)]
    store: String,
    /// Folder to write into; files of earlier reports are replaced
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Beginning of the names of the files, such as `full-`
    #[arg(long, value_name = "TEXT", default_value = "")]
    prefix: String,
    /// Put plots and tables into this Markdown file too, between its lines `<!-- report -->` and `<!-- /report -->`
    #[arg(long, value_name = "FILE")]
    into: Option<PathBuf>,
    /// Print the data of the report as one JSON value
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    if args.prefix.contains(['/', '\\']) {
        return Err(Error::invalid(format!("--prefix {} holds a path", args.prefix))
            .help("`--out` names the folder")
            .into());
    }
    let engine = common::engine();
    let mut runs = Vec::new();
    for text in &args.runs {
        let (run, url) = text.split_once('@').unwrap_or((text, &args.store));
        let store = common::open_store(&engine, url)?;
        let id = engine.find_run(&store, run).await?;
        runs.push((store, id));
    }
    let mut report = engine.report(&runs).await?;
    for (run, text) in report.runs.iter_mut().zip(&args.runs) {
        // As the user names it: a page must not hold paths of this machine that nobody typed.
        run.store = text.split_once('@').map_or(&*args.store, |(_, url)| url).to_owned();
    }
    let files = write(&args, &report)?;
    if args.json {
        let files: Vec<String> = files.iter().map(|(path, _)| path.display().to_string()).collect();
        let (met, floors) = report.floors();
        return common::say_json(&json!({ "report": report, "floors": floors, "floors_met": met, "files": files }));
    }
    files.iter().for_each(|(path, what)| common::say(format!("{}: {what}", path.display())));
    Ok(())
}

/// Writes the files; answers each with what it holds.
fn write(args: &Args, report: &Report) -> Result<Vec<(PathBuf, String)>, Error> {
    let failed = |path: &Path, error| Error::unavailable(format!("cannot write {}", path.display())).source(error);
    std::fs::create_dir_all(&args.out).map_err(|error| failed(&args.out, error))?;
    let (mut plots, mut files) = (Vec::new(), Vec::new());
    for (name, drawn) in [("loss.svg", loss::draw(report)?), ("accuracy.svg", accuracy::draw(report)?)] {
        let name = format!("{}{name}", args.prefix);
        let Some((svg, what)) = drawn else { continue };
        plots.push(name.clone());
        files.push((args.out.join(name), svg, what));
    }
    let stages = report.runs.first().map_or(0, |run| run.stages.len());
    let (met, floors) = report.floors();
    let what = format!(
        "{}, {stages} stages, {} closing figures, {met} of {floors} floors met",
        counted(report.runs.len(), "run"),
        report.figures.len()
    );
    files.insert(0, (args.out.join(format!("{}report.md", args.prefix)), markdown::page(report, &plots), what));
    let mut written = Vec::new();
    for (path, content, what) in files {
        std::fs::write(&path, content).map_err(|error| failed(&path, error))?;
        written.push((path, what));
    }
    if let Some(path) = &args.into {
        let page = args.out.join(format!("{}report.md", args.prefix));
        let links: Vec<String> =
            plots.iter().map(|plot| format!("![{plot}]({})", link(path, &args.out.join(plot)))).collect();
        let machines = markdown::machines(report);
        let whole = format!("{machines} Runs, stages and lineage: [{0}]({0}).", link(path, &page));
        insert(path, &[whole, links.join("\n\n"), markdown::tables(report)].join("\n\n"))?;
        written.push((path.clone(), "the plots and the closing tables".to_owned()));
    }
    Ok(written)
}

/// Replaces what stands between the two marks of the file.
fn insert(path: &Path, tables: &str) -> Result<(), Error> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::invalid(format!("cannot read {}", path.display())).source(error))?;
    let between = text.split_once(INTO_BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(INTO_END)?.1)));
    let (before, after) = between.ok_or_else(|| {
        Error::invalid(format!("{} has no lines {INTO_BEGIN} and {INTO_END}", path.display()))
            .help("write the two lines where the tables should stand")
    })?;
    let text = format!("{before}{INTO_BEGIN}\n\n{tables}\n{INTO_END}{after}");
    std::fs::write(path, text)
        .map_err(|error| Error::unavailable(format!("cannot write {}", path.display())).source(error))
}

/// The way from a Markdown file to a file beside or below it, else its path as given.
fn link(from: &Path, to: &Path) -> String {
    let folder = from.parent().unwrap_or(Path::new(""));
    to.strip_prefix(folder).unwrap_or(to).display().to_string()
}

/// What tells the runs apart: their seeds, else their ids.
fn labels(runs: &[ReportedRun]) -> Vec<String> {
    let distinct = runs.iter().enumerate().all(|(i, run)| runs[..i].iter().all(|other| other.seed != run.seed));
    let label = |run: &ReportedRun| if distinct { format!("seed {}", run.seed) } else { run.run.clone() };
    runs.iter().map(label).collect()
}

/// `1 run`, `3 runs`.
fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}
