//! Reports on runs of the tiny stages: what was cached, stopped, killed or selected, several seeds, lineage.

use std::collections::BTreeMap;

use dsv3_core::{Cancel, ErrorKind, Event, Events, Figure};
use dsv3_store::{EventLog, StageResult};
use serde_json::json;

use super::{Fixture, PIPELINE};
use crate::{Report, ReportedStage, RunOptions, RunReport, Selection, Standing};

impl Fixture {
    async fn ran(&self, sets: &[&str]) -> RunReport {
        let options = RunOptions { command: Some(format!("run {}", sets.join(" "))), ..self.options() };
        self.engine.run(&self.plan(PIPELINE, sets).await, &options).await.unwrap()
    }

    async fn report(&self, runs: &[&str]) -> Report {
        let runs: Vec<_> = runs.iter().map(|run| (self.store.clone(), (*run).to_owned())).collect();
        self.engine.report(&runs).await.unwrap()
    }
}

fn steps(stage: &ReportedStage) -> Vec<u64> {
    stage.series.get("step").into_iter().flatten().map(|(step, _)| *step).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_stage_has_the_metrics_of_the_run_that_computed_it() {
    let fixture = Fixture::new();
    let first = fixture.ran(&[]).await;
    let second = fixture.ran(&[]).await;
    let report = fixture.report(&[&second.run]).await;
    let run = &report.runs[0];
    assert_eq!((run.pipeline.as_str(), run.seed, run.state.as_str()), ("small", 7, "done"));
    assert_eq!((run.machines.len(), run.command.as_deref()), (1, Some("run ")));
    let a = &run.stages[0];
    assert_eq!((&a.standing, a.unlogged), (&Standing::Cached, false));
    assert_eq!((steps(a), a.attempts[0].run.as_str()), (vec![1, 2, 3, 4, 5], first.run.as_str()));
    let figures: BTreeMap<String, Figure> = report
        .figures
        .iter()
        .map(|row| (format!("{}.{}", row.stage, row.metric), row.figures[0].clone().unwrap()))
        .collect();
    assert_eq!(figures, second.figures);
    // Without the log of the first run there is a hole, and the report says so.
    for name in fixture.store.list(&format!("runs/{}/events", first.run)).await.unwrap() {
        fixture.store.delete(&format!("runs/{}/events/{name}", first.run)).await.unwrap();
    }
    let a = fixture.report(&[&second.run]).await.runs.remove(0).stages.remove(0);
    assert!(a.unlogged && a.series.is_empty() && a.figures.contains_key("reached"));
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_of_several_runs_make_one_series() {
    let fixture = Fixture::new();
    let plan = fixture.plan(PIPELINE, &[]).await;
    let cancel = Cancel::new();
    let stop = cancel.clone();
    let events = Events::new(move |event| {
        if matches!(&event, Event::Checkpoint { step: 2, .. }) {
            stop.cancel();
        }
    });
    let options = RunOptions { events, cancel, ..RunOptions::default() };
    fixture.engine.run(&plan, &options).await.unwrap_err();
    let stopped = fixture.engine.find_run(&fixture.store, "latest").await.unwrap();
    let whole = fixture.ran(&[]).await;
    let report = fixture.report(&[&whole.run]).await;
    let a = &report.runs[0].stages[0];
    assert_eq!((&a.standing, steps(a)), (&Standing::Ran, vec![1, 2, 3, 4, 5]));
    assert_eq!(a.attempts.len(), 2);
    assert!(a.attempts[1].resumed_from.is_some() && a.attempts[1].run == whole.run, "{:?}", a.attempts);
    // The stopped run is told as far as it came itself.
    let report = fixture.report(&[&stopped]).await;
    let a = &report.runs[0].stages[0];
    assert_eq!((&a.standing, a.attempts.len(), a.figures.len()), (&Standing::Cancelled, 1, 0));
    assert!(steps(a).len() < 5 && report.figures.is_empty());
    assert_eq!(report.runs[0].stages[1].standing, Standing::Waiting);
}

#[tokio::test(flavor = "multi_thread")]
async fn seeds_have_mean_and_spread_and_other_differences_are_told() {
    let fixture = Fixture::new();
    let one = fixture.ran(&["stages.a.floors={reached: {min: 5}}"]).await;
    let two = fixture.ran(&["seed=8", "stages.a.floors={reached: {min: 5}}"]).await;
    let other = fixture.ran(&["seed=9", "stages.b.config.until=4"]).await;
    let report = fixture.report(&[&one.run, &two.run]).await;
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    assert_eq!(report.floors(), (2, 2));
    let report = fixture.report(&[&one.run, &two.run, &other.run]).await;
    let row = report.figures.iter().find(|row| row.stage == "b" && row.metric == "reached").unwrap();
    let spread = row.spread.unwrap();
    assert_eq!((spread.n, spread.mean), (3, (8.0 + 8.0 + 9.0) / 3.0));
    assert!((spread.deviation.unwrap() - (1.0f64 / 3.0).sqrt()).abs() < 1e-12);
    assert!(report.notes[0].ends_with("differ in more than their seed: b"), "{:?}", report.notes);
    let twice = [(fixture.store.clone(), one.run.clone()), (fixture.store.clone(), one.run)];
    assert_eq!(fixture.engine.report(&twice).await.unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn stages_that_were_not_asked_for_lend_their_figures() {
    let fixture = Fixture::new();
    let first = fixture.ran(&[]).await;
    let plan = fixture.plan(PIPELINE, &["stages.b.config.until=4"]).await;
    let options = RunOptions { select: Selection::Only("b".to_owned()), ..fixture.options() };
    let only = fixture.engine.run(&plan, &options).await.unwrap();
    let report = fixture.report(&[&only.run]).await;
    let standings: Vec<&Standing> = report.runs[0].stages.iter().map(|stage| &stage.standing).collect();
    assert_eq!(standings, [&Standing::Lent, &Standing::Ran, &Standing::Unasked]);
    assert_eq!(report.runs[0].stages[0].attempts[0].run, first.run);
    // A later walk of the same run adds to what its status says of others.
    fixture.engine.exec(&fixture.store, &only.run, "both", &fixture.options()).await.unwrap();
    let runs = fixture.engine.runs(&fixture.store).await.unwrap();
    let stages: Vec<&String> = runs.iter().find(|run| run.run == only.run).unwrap().stages.keys().collect();
    assert_eq!(stages, ["b", "both"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn lineage_is_that_of_the_result_and_a_begun_stage_is_told_as_such() {
    let fixture = Fixture::new();
    let plan = fixture.plan(PIPELINE, &[]).await;
    let run = "01aaaaaaaaaaaaaaaaaaaaaaaa";
    fixture.store.create_run(run, plan.to_bytes().into()).await.unwrap();
    let nothing = fixture.engine.report(&[(fixture.store.clone(), run.to_owned())]).await.unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::Invalid);
    assert!(nothing.help().is_some_and(|help| help.contains("resume")), "{:?}", nothing.help());

    let key = "7".repeat(64);
    let guard = json!([{ "action": "rewound", "step": 40, "last_step": 42, "samples": [300, 324], "loss": 9.5 }]);
    let result = StageResult {
        format: StageResult::FORMAT,
        key: key.clone(),
        stage_type: "count".to_owned(),
        outputs: Vec::new(),
        metrics: BTreeMap::new(),
        last_seq: 0,
        lineage: json!({ "guard": guard }),
        profile: json!({}),
    };
    fixture.store.commit_result(&key, &result).await.unwrap();
    let log = EventLog::start(fixture.store.clone(), run);
    let started = |stage: &str, key: &str| Event::StageStarted {
        stage: stage.to_owned(),
        kind: "count".to_owned(),
        key: key.to_owned(),
        resumed_from: None,
    };
    let (outcome, metrics) = (dsv3_core::Outcome::Done, BTreeMap::new());
    log.sink().emit(started("a", &key));
    log.sink().emit(Event::StageFinished { stage: "a".to_owned(), outcome, seconds: 2.0, metrics });
    log.sink().emit(started("b", "another key"));
    log.close().await.unwrap();
    let report = fixture.report(&[run]).await;
    let stages = &report.runs[0].stages;
    assert_eq!((&stages[0].standing, stages[0].seconds()), (&Standing::Ran, Some(2.0)));
    assert_eq!(stages[0].lineage["guard"], guard);
    assert_eq!(stages[0].incidents[0].samples, [300, 324]);
    assert_eq!(stages[1].standing, Standing::Begun);
}
