//! The page: runs, stages, closing figures with floors, matrices by length and depth, what the guard did.

use dsv3_core::{Bound, Figure, GuardAction, GuardRecord};
use dsv3_engine::{FigureRow, Matrix, Report, ReportedRun, ReportedStage, Spread, Standing, Variant};

use super::{counted, labels};
use crate::{progress::span, runs::utc, table::number};

/// The whole page. `plots` are the names of the files beside it.
pub(super) fn page(report: &Report, plots: &[String]) -> String {
    let names: std::collections::BTreeSet<&str> = report.runs.iter().map(|run| run.pipeline.as_str()).collect();
    let title: Vec<&str> = names.into_iter().collect();
    let mut parts = vec![format!("# {}: {}", title.join(", "), counted(report.runs.len(), "run"))];
    parts.extend(report.notes.iter().map(|note| format!("**Note:** {note}.")));
    parts.push(runs(report));
    parts.extend(plots.iter().map(|plot| format!("![{plot}]({plot})")));
    parts.push("## Closing figures".to_owned());
    parts.push(tables(report).trim_end().to_owned());
    parts.push("## Guard and rejection".to_owned());
    parts.push(guard(report));
    parts.push("## Stages".to_owned());
    for (run, label) in report.runs.iter().zip(labels(&report.runs)) {
        if report.runs.len() > 1 {
            parts.push(format!("### {label}"));
        }
        parts.push(stages(run));
    }
    parts.join("\n\n") + "\n"
}

/// The closing figures and the matrices, for the page and for `--into`.
pub(super) fn tables(report: &Report) -> String {
    // Figures with two numbers in their names stand in the matrices.
    let rows: Vec<&FigureRow> = report.figures.iter().filter(|row| !Matrix::holds(&row.metric)).collect();
    let judged =
        |row: &FigureRow| row.figures.iter().flatten().any(|figure| figure.floor.is_some() || figure.note.is_some());
    let (judged, plain): (Vec<&FigureRow>, Vec<&FigureRow>) = rows.into_iter().partition(|row| judged(row));
    let (met, floors) = report.floors();
    let mut parts = Vec::new();
    let n = report.runs.len();
    if n > 1 {
        parts.push(format!("Mean over the {n} runs; spread is the sample standard deviation (n = {n} unless stated)."));
    }
    if !judged.is_empty() {
        parts.push(format!("{met} of {floors} floors met."));
        parts.push(figures(report, &judged, true));
    }
    if !plain.is_empty() {
        parts.push(figures(report, &plain, false));
    }
    parts.extend(report.matrices.iter().map(|one| matrix(one, n)));
    parts.join("\n\n") + "\n"
}

/// A table of Markdown: head, alignment (`<` or `>` a column), rows.
fn table(head: &[String], align: &str, rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
    let rule: Vec<String> = align.chars().map(|side| if side == '>' { "---:".into() } else { "---".into() }).collect();
    let mut lines = vec![line(head), format!("|{}|", rule.join("|"))];
    lines.extend(rows.iter().map(|row| line(row)));
    lines.join("\n")
}

/// Text that cannot break out of a table's cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

fn texts<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

fn runs(report: &Report) -> String {
    let rows: Vec<Vec<String>> = report
        .runs
        .iter()
        .map(|run| {
            let when = format!("{} UTC", utc(run.unix_millis));
            vec![
                format!("`{}`", run.run),
                run.seed.to_string(),
                run.state.clone(),
                when,
                format!("`{}`", cell(&run.store)),
            ]
        })
        .collect();
    let mut parts = vec![table(&texts(["run", "seed", "state", "last status", "store"]), "<><<<", &rows)];
    parts.push(machines(report));
    let commands = report.runs.iter().map(|run| match &run.command {
        Some(command) => command.clone(),
        None => format!("dsv3-pipeline resume {} --store {}  # how it began was not recorded", run.run, run.store),
    });
    parts.push(format!("To run it again:\n\n```\n{}\n```", commands.collect::<Vec<_>>().join("\n")));
    parts.join("\n\n")
}

/// The machines that computed the runs, in a sentence.
pub(super) fn machines(report: &Report) -> String {
    let mut machines: Vec<String> = report.runs.iter().flat_map(|run| &run.machines).map(ToString::to_string).collect();
    machines.sort();
    machines.dedup();
    match machines.as_slice() {
        [] => "Machine: not recorded by these runs.".to_owned(),
        [one] => format!("Machine: {one}."),
        many => format!("Machines: {}.", many.join("; ")),
    }
}

fn figures(report: &Report, rows: &[&FigureRow], judged: bool) -> String {
    let n = report.runs.len();
    let (mut head, mut align) = (texts(["figure"]), "<".to_owned());
    if judged {
        head.push("floor".to_owned());
        align.push('>');
    }
    let single = n == 1;
    head.extend(if single { texts(["value"]) } else { labels(&report.runs) });
    align.push_str(&">".repeat(n));
    if !single {
        head.extend(texts(["mean", "spread"]));
        align.push_str(">>");
    }
    if judged {
        head.extend(texts(["verdict", "remark"]));
        align.push_str("<<");
    }
    let lines: Vec<Vec<String>> = rows.iter().map(|row| figure_line(report, row, judged)).collect();
    table(&head, &align, &lines)
}

fn figure_line(report: &Report, row: &FigureRow, judged: bool) -> Vec<String> {
    let first = row.figures.iter().flatten().next();
    let mut line = vec![format!("`{}.{}`", row.stage, cell(&row.metric))];
    if judged {
        line.push(first.and_then(floor).unwrap_or_default());
    }
    line.extend(row.figures.iter().map(|figure| figure.as_ref().map_or("–".to_owned(), |one| number(one.value))));
    if report.runs.len() > 1 {
        let (mean, deviation) = spread_cells(row.spread, report.runs.len());
        line.extend([mean, deviation]);
    }
    if judged {
        line.push(verdict(report, row));
        line.push(first.and_then(|figure| figure.note.as_deref()).map(cell).unwrap_or_default());
    }
    line
}

fn floor(figure: &Figure) -> Option<String> {
    let side = if figure.bound == Some(Bound::AtMost) { "≤" } else { "≥" };
    figure.floor.map(|floor| format!("{side} {floor}"))
}

fn verdict(report: &Report, row: &FigureRow) -> String {
    let missed: Vec<String> = row
        .figures
        .iter()
        .zip(labels(&report.runs))
        .filter(|(figure, _)| figure.as_ref().is_some_and(|figure| figure.ok == Some(false)))
        .map(|(_, label)| label)
        .collect();
    let judged = row.figures.iter().flatten().any(|figure| figure.ok.is_some());
    match (judged, missed.is_empty(), report.runs.len()) {
        (false, ..) => String::new(),
        (true, true, _) => "met".to_owned(),
        (true, false, 1) => "**missed**".to_owned(),
        (true, false, _) => format!("**missed** by {}", missed.join(", ")),
    }
}

/// Mean and spread, with n where it is not that of the whole report.
fn spread_cells(spread: Option<Spread>, runs: usize) -> (String, String) {
    let Some(Spread { n, mean, deviation }) = spread else { return ("–".to_owned(), "–".to_owned()) };
    let deviation = deviation.map_or("–".to_owned(), number);
    (number(mean), if n == runs { deviation } else { format!("{deviation} (n = {n})") })
}

fn matrix(matrix: &Matrix, runs: usize) -> String {
    let variant = match matrix.variant {
        Variant::After => String::new(),
        other => format!(", {}", other.label()),
    };
    let over = if runs > 1 { " (mean ± spread)" } else { "" };
    let title = format!("`{}.{}`{variant}, by length (rows) and depth (columns){over}:", matrix.stage, matrix.figure);
    let head: Vec<String> =
        std::iter::once(String::new()).chain(matrix.columns.iter().map(ToString::to_string)).collect();
    let value = |spread: &Option<Spread>| match spread {
        None => "–".to_owned(),
        Some(Spread { mean, deviation: Some(deviation), .. }) => format!("{mean:.3} ± {deviation:.3}"),
        Some(Spread { mean, .. }) => format!("{mean:.3}"),
    };
    let line = |(row, cells): (&u64, &Vec<Option<Spread>>)| {
        std::iter::once(row.to_string()).chain(cells.iter().map(value)).collect::<Vec<_>>()
    };
    let lines: Vec<Vec<String>> = matrix.rows.iter().zip(&matrix.cells).map(line).collect();
    format!("{title}\n\n{}", table(&head, &">".repeat(head.len()), &lines))
}

/// Interventions of the guard, other lineage, and how much distillation rejected.
fn guard(report: &Report) -> String {
    let (mut rows, mut other) = (Vec::new(), Vec::new());
    for (run, label) in report.runs.iter().zip(labels(&report.runs)) {
        for stage in &run.stages {
            rows.extend(stage.incidents.iter().map(|record| incident(&label, stage, record)));
            let subjects = stage.lineage.as_object().into_iter().flatten();
            let others = subjects.filter(|(subject, _)| *subject != GuardRecord::SUBJECT);
            other
                .extend(others.map(|(name, value)| format!("- {label}, `{}`, {}: `{value}`", stage.stage, cell(name))));
        }
    }
    let finished = report.runs.iter().flat_map(|run| &run.stages).any(ReportedStage::has_finished);
    let mut parts = Vec::new();
    if !rows.is_empty() {
        let head = texts(["run", "stage", "what the guard did", "steps", "loss", "samples without effect"]);
        parts.push(table(&head, "<<<>>>", &rows));
    } else if finished {
        parts.push("No finished stage skipped a step, went back or left out a sample.".to_owned());
    } else {
        parts.push("No stage has finished, so none has a lineage yet.".to_owned());
    }
    if !other.is_empty() {
        parts.push(other.join("\n"));
    }
    let rejected = report.figures.iter().filter(|row| row.metric == "rejection_rate");
    let said: Vec<String> = rejected
        .filter_map(|row| {
            let Spread { n, mean, deviation } = row.spread?;
            let spread = deviation.map_or(String::new(), |deviation| format!(" ± {} (n = {n})", number(deviation)));
            Some(format!("- `{}` rejected the share {}{spread} of the traces it judged.", row.stage, number(mean)))
        })
        .collect();
    if !said.is_empty() {
        parts.push(said.join("\n"));
    }
    parts.join("\n\n")
}

fn incident(label: &str, stage: &ReportedStage, record: &GuardRecord) -> Vec<String> {
    let GuardRecord { action, step, last_step, samples: [from, to], loss, back_to_step, updates } = record;
    let what = match (action, updates) {
        (GuardAction::Skipped, None) => "skipped the step".to_owned(),
        (GuardAction::Skipped, Some([skipped, all])) => format!("skipped {skipped} of {all} updates"),
        (GuardAction::Rewound, _) => match back_to_step {
            Some(step) => format!("went back to step {step}, left the samples out"),
            None => "went back to a checkpoint, left the samples out".to_owned(),
        },
    };
    let steps = if step == last_step { step.to_string() } else { format!("{step}–{last_step}") };
    let loss = loss.map_or("not finite".to_owned(), number);
    vec![label.to_owned(), format!("`{}`", stage.stage), what, steps, loss, format!("{from}..{to}")]
}

fn stages(run: &ReportedRun) -> String {
    let rows: Vec<Vec<String>> = run
        .stages
        .iter()
        .map(|stage| {
            let key =
                stage.key.as_deref().map_or("–".to_owned(), |key| format!("`{}`", key.get(..12).unwrap_or(key)));
            let seconds = stage.seconds().map_or("–".to_owned(), span);
            let resumed: Vec<String> =
                stage.attempts.iter().filter_map(|one| one.resumed_from).map(|step| format!("step {step}")).collect();
            let kind = cell(&stage.kind);
            vec![format!("`{}`", stage.stage), kind, standing(run, stage), seconds, key, resumed.join(", ")]
        })
        .collect();
    let mut parts = vec![table(&texts(["stage", "type", "what", "time", "key", "resumed from"]), "<<<><<", &rows)];
    let warned = run
        .stages
        .iter()
        .flat_map(|stage| stage.warnings.iter().map(move |warning| format!("- `{}`: {}", stage.stage, cell(warning))));
    let warnings: Vec<String> = warned.collect();
    if !warnings.is_empty() {
        parts.push(format!("Warnings:\n\n{}", warnings.join("\n")));
    }
    parts.join("\n\n")
}

fn standing(run: &ReportedRun, stage: &ReportedStage) -> String {
    let what = match &stage.standing {
        Standing::Ran => "ran".to_owned(),
        Standing::Cached => "found finished".to_owned(),
        Standing::Cancelled => "stopped at a checkpoint".to_owned(),
        Standing::Failed { messages } => format!("failed: {}", cell(&messages.join(": "))),
        Standing::Begun => "begun; it runs, or its process is gone".to_owned(),
        Standing::Lent => "not asked for, found finished".to_owned(),
        Standing::Unasked => "not asked for".to_owned(),
        Standing::Waiting => "not reached".to_owned(),
    };
    if stage.unlogged {
        return format!("{what}; **no log of this store has its metrics**");
    }
    let mut elsewhere: Vec<&str> =
        stage.attempts.iter().map(|one| one.run.as_str()).filter(|other| *other != run.run).collect();
    elsewhere.dedup();
    match elsewhere.as_slice() {
        [] => what,
        runs => format!(
            "{what}; computed in run {}",
            runs.iter().map(|id| format!("`{id}`")).collect::<Vec<_>>().join(", ")
        ),
    }
}

#[cfg(test)]
mod tests;
