//! The page of reports made here: floors over several runs, matrices, holes, text that would break a table.

use std::collections::BTreeMap;

use dsv3_engine::Attempt;

use super::*;

fn run(seed: u64) -> ReportedRun {
    let stage = ReportedStage {
        stage: "base".to_owned(),
        kind: "pretrain".to_owned(),
        key: Some("k".repeat(64)),
        standing: Standing::Cached,
        attempts: Vec::new(),
        unlogged: false,
        warnings: Vec::new(),
        figures: BTreeMap::new(),
        incidents: Vec::new(),
        lineage: serde_json::Value::Null,
        series: BTreeMap::new(),
    };
    ReportedRun {
        run: format!("run{seed}"),
        store: "file://./runs".to_owned(),
        pipeline: "p".to_owned(),
        seed,
        state: "done".to_owned(),
        unix_millis: 0,
        machines: Vec::new(),
        command: Some(format!("dsv3-pipeline run p.yaml --set seed={seed}")),
        stages: vec![stage],
    }
}

fn row(metric: &str, figures: Vec<Option<Figure>>) -> FigureRow {
    let spread = spread(figures.iter().flatten().map(|figure| figure.value).collect());
    FigureRow { stage: "base".to_owned(), metric: metric.to_owned(), figures, spread }
}

fn spread(values: Vec<f64>) -> Option<Spread> {
    Spread::of(values)
}

fn report(runs: Vec<ReportedRun>, figures: Vec<FigureRow>) -> Report {
    Report { runs, figures, matrices: Vec::new(), contrasts: Vec::new(), notes: Vec::new() }
}

#[test]
fn a_missed_floor_names_the_run_and_a_missing_figure_its_n() {
    let floored = |value| Some(Figure::with_floor(value, Bound::AtLeast, 0.5));
    let figures =
        vec![row("score", vec![floored(0.75), floored(0.25)]), row("loss", vec![Some(Figure::new(2.0)), None])];
    let text = tables(&report(vec![run(7), run(11)], figures));
    assert!(text.contains("1 of 2 floors met."), "{text}");
    let score = "| `base.score` | ≥ 0.5 | 0.7500 | 0.2500 | 0.5000 | 0.3536 | **missed** by seed 11 |  |";
    assert!(text.contains(score), "{text}");
    assert!(text.contains("| `base.loss` | 2 | – | 2 | – (n = 1) |"), "{text}");
}

#[test]
fn cells_stand_in_a_matrix_and_not_in_the_table() {
    let mut report = report(vec![run(7)], vec![row("needle.words.256.10", vec![Some(Figure::new(0.5))])]);
    report.matrices.push(Matrix {
        stage: "base".to_owned(),
        figure: "needle.words".to_owned(),
        variant: Variant::Before,
        rows: vec![256, 512],
        columns: vec![10],
        cells: vec![vec![spread(vec![0.5])], vec![None]],
    });
    let text = tables(&report);
    assert!(!text.contains("needle.words.256.10"), "{text}");
    let matrix = "`base.needle.words`, before, by length (rows) and depth (columns):\n\n|  | 10 |\n|---:|---:|\n\
                  | 256 | 0.500 |\n| 512 | – |";
    assert!(text.contains(matrix), "{text}");
}

#[test]
fn a_hole_a_failure_and_another_run_are_told() {
    let mut one = run(7);
    let stage = &mut one.stages[0];
    stage.unlogged = true;
    assert!(page(&report(vec![one.clone()], Vec::new()), &[]).contains("**no log of this store has its metrics**"));
    let stage = &mut one.stages[0];
    (stage.unlogged, stage.standing) = (false, Standing::Failed { messages: vec!["a | b".into(), "c\nd".into()] });
    let attempt = Attempt { run: "earlier".to_owned(), resumed_from: Some(40), outcome: None, seconds: Some(90.0) };
    stage.attempts = vec![attempt];
    stage.lineage = serde_json::json!({ "mixed_profiles": [1, 2] });
    let text = page(&report(vec![one], Vec::new()), &["loss.svg".to_owned()]);
    for words in [
        "failed: a \\| b: c d; computed in run `earlier`",
        "| 1 min 30 s |",
        "| step 40 |",
        "- seed 7, `base`, mixed_profiles: `[1,2]`",
        "No stage has finished",
        "![loss.svg](loss.svg)",
        "dsv3-pipeline run p.yaml --set seed=7",
    ] {
        assert!(text.contains(words), "{words} in\n{text}");
    }
}
