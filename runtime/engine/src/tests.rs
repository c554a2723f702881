//! The engine on tiny stages of its own: cache, kill and resume, exec, explain, selection, diagnostics.

mod report;
mod stages;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use dsv3_core::{Cancel, ErrorKind, Event, Events, Outcome};
use dsv3_store::Store;

use crate::{Engine, EngineError, LoadOptions, Plan, RunOptions, RunReport, Selection, State};

const PIPELINE: &str = "version: 1
name: small
params: { until: 5 }
store: memory://
seed: 7
stages:
  a: { type: count, config: { until: \"${params.until}\" } }
  b: { type: count, inputs: { before: a.report }, config: { until: 3 } }
  both: { type: sum, inputs: { reports: [a.report, b.report] } }
";

/// Root of the repository, for the shipped hooks.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// An engine with the test stages over one memory store.
struct Fixture {
    engine: Engine,
    store: Store,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Fixture {
    fn new() -> Self {
        let store = Store::with_memory();
        let engine = Engine::builder().stages(stages::ALL).store(store.clone()).build();
        Self { engine, store, events: Arc::default() }
    }

    async fn plan(&self, text: &str, sets: &[&str]) -> Plan {
        let sets = sets.iter().map(|set| (*set).to_owned()).collect();
        let options = LoadOptions { sets, ..LoadOptions::default() };
        let spec = self.engine.load_text("small.yaml", text, Path::new(""), &options);
        self.engine.plan(spec.unwrap_or_else(|report| panic!("{report}"))).await.unwrap()
    }

    fn options(&self) -> RunOptions {
        let seen = self.events.clone();
        RunOptions { events: Events::new(move |event| seen.lock().unwrap().push(event)), ..RunOptions::default() }
    }

    /// Steps that the stage `name` has counted since the last call.
    fn steps(&self, name: &str) -> Vec<u64> {
        let mut events = self.events.lock().unwrap();
        let is_step = |event: &Event| match event {
            Event::Metric { stage, step, .. } if stage == name => Some(*step),
            _ => None,
        };
        let steps = events.iter().filter_map(is_step).collect();
        events.clear();
        steps
    }
}

fn outcomes(report: &RunReport) -> Vec<(&str, Outcome)> {
    report.stages.iter().map(|stage| (stage.stage.as_str(), stage.outcome.clone())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_does_nothing_and_a_changed_field_runs_what_depends_on_it() {
    let fixture = Fixture::new();
    let plan = fixture.plan(PIPELINE, &[]).await;
    let first = fixture.engine.run(&plan, &fixture.options()).await.unwrap();
    assert_eq!(outcomes(&first), [("a", Outcome::Done), ("b", Outcome::Done), ("both", Outcome::Done)]);
    assert_eq!(first.figures["both.sum"].value, 5.0 + 8.0);
    assert_eq!(fixture.steps("a"), [1, 2, 3, 4, 5]);

    let second = fixture.engine.run(&plan, &fixture.options()).await.unwrap();
    assert!(second.stages.iter().all(|stage| stage.outcome == Outcome::Cached));
    assert_eq!(second.figures, first.figures);
    assert!(fixture.steps("a").is_empty());

    let slower = fixture.plan(PIPELINE, &["stages.b.config.pause_ms=1"]).await;
    let third = fixture.engine.run(&slower, &fixture.options()).await.unwrap();
    assert!(third.stages.iter().all(|stage| stage.outcome == Outcome::Cached), "a performance field is not in the key");

    let changed = fixture.plan(PIPELINE, &["stages.b.config.until=4"]).await;
    let states: Vec<State> = fixture.engine.states(&changed).await.unwrap().into_iter().map(|s| s.state).collect();
    assert_eq!(states, [State::Cached, State::Runs, State::Waits { stage: "b".to_owned() }]);
    let why = fixture.engine.explain(&changed, "b").await.unwrap();
    assert!(why.reasons.contains(&"config.until: 3 -> 4".to_owned()), "{:?}", why.reasons);
    let why = fixture.engine.explain(&changed, "both").await.unwrap();
    assert!(
        why.reasons.iter().any(|line| line.starts_with("inputs.reports") && line.contains("`b` has finished")),
        "{why:?}"
    );
    let fourth = fixture.engine.run(&changed, &fixture.options()).await.unwrap();
    assert_eq!(outcomes(&fourth), [("a", Outcome::Cached), ("b", Outcome::Done), ("both", Outcome::Done)]);
    assert_eq!(fixture.engine.runs(&fixture.store).await.unwrap().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_goes_on_from_its_checkpoint_in_a_new_run_with_equal_bits() {
    let undisturbed = Fixture::new();
    let whole = undisturbed.engine.run(&undisturbed.plan(PIPELINE, &[]).await, &undisturbed.options()).await.unwrap();

    let fixture = Fixture::new();
    let plan = fixture.plan(PIPELINE, &[]).await;
    let (cancel, seen) = (Cancel::new(), fixture.events.clone());
    let stop = cancel.clone();
    let events = Events::new(move |event| {
        if matches!(&event, Event::Checkpoint { step: 2, .. }) {
            stop.cancel();
        }
        seen.lock().unwrap().push(event);
    });
    let options = RunOptions { events, cancel, ..RunOptions::default() };
    let stopped = fixture.engine.run(&plan, &options).await.unwrap_err();
    assert_eq!(stopped.kind(), ErrorKind::Cancelled);
    let before = fixture.steps("a");
    let states = fixture.engine.states(&plan).await.unwrap();
    assert_eq!(states[0].state, State::Resumes { step: *before.last().unwrap() });
    let other = fixture.plan(PIPELINE, &["stages.a.config.micro=2"]).await;
    let resumed = fixture.engine.run(&other, &fixture.options()).await.unwrap();
    let mixed = |stage: usize| resumed.stages[stage].result.as_ref().unwrap().lineage["mixed_profiles"].clone();
    assert_eq!(mixed(0).as_array().unwrap().len(), 2, "a key that was run under two profiles is marked");
    assert_eq!(mixed(2), mixed(0), "and so is what was made from it");
    assert_eq!(fixture.steps("a").first(), Some(&(before.last().unwrap() + 1)));
    let outputs =
        |report: &RunReport| -> Vec<_> { report.stages.iter().map(|s| s.result.clone().unwrap().outputs).collect() };
    assert_eq!(outputs(&resumed), outputs(&whole));
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_needs_only_the_store_and_finished_upstream() {
    let fixture = Fixture::new();
    let plan = fixture.plan(PIPELINE, &[]).await;
    let options = RunOptions { select: Selection::Only("b".to_owned()), ..fixture.options() };
    let refused = fixture.engine.run(&plan, &options).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(refused.to_string().contains("stage `b` needs stage `a`"), "{refused}");
    let run = fixture.engine.find_run(&fixture.store, "last").await.unwrap();
    assert!(fixture.engine.exec(&fixture.store, &run, "b", &fixture.options()).await.is_err());
    for (stage, outcome) in [("a", Outcome::Done), ("b", Outcome::Done), ("b", Outcome::Cached)] {
        let report = fixture.engine.exec(&fixture.store, &run, stage, &fixture.options()).await.unwrap();
        assert_eq!(outcomes(&report), [(stage, outcome)]);
    }
    let report = fixture.engine.resume(&fixture.store, &run[..20], &fixture.options()).await;
    assert!(report.is_err(), "resume takes full ids; find_run completes them");
    let report = fixture.engine.resume(&fixture.store, &run, &fixture.options()).await.unwrap();
    assert_eq!(outcomes(&report).last().unwrap(), &("both", Outcome::Done));
    assert_eq!(fixture.engine.find_run(&fixture.store, "zzz").await.unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn selections_choose_by_the_graph() {
    let fixture = Fixture::new();
    let plan = fixture.plan(PIPELINE, &[]).await;
    let between = |from: Option<&str>, until: Option<&str>| Selection::Between {
        from: from.map(str::to_owned),
        until: until.map(str::to_owned),
    };
    assert_eq!(between(Some("b"), None).names(&plan).unwrap(), ["b", "both"]);
    assert_eq!(between(None, Some("b")).names(&plan).unwrap(), ["a", "b"]);
    assert_eq!(between(Some("b"), Some("b")).names(&plan).unwrap(), ["b"]);
    assert!(between(Some("b"), Some("a")).names(&plan).is_err());
    let error = between(Some("bo"), None).names(&plan).unwrap_err();
    assert_eq!(error.help.as_deref(), Some("did you mean `b`?"));
    let options = RunOptions { select: between(None, Some("a")), ..fixture.options() };
    let report = fixture.engine.run(&plan, &options).await.unwrap();
    assert_eq!(outcomes(&report), [("a", Outcome::Done)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn floors_and_notes_judge_cached_results_too() {
    let fixture = Fixture::new();
    fixture.engine.run(&fixture.plan(PIPELINE, &[]).await, &fixture.options()).await.unwrap();
    let sets = [
        "stages.a.floors={reached: {min: 6}, other: {max: 1}}",
        "stages.b.floors={reached: {max: 8}}",
        "stages.b.notes={reached: 'no ability'}",
    ];
    let report = fixture.engine.run(&fixture.plan(PIPELINE, &sets).await, &fixture.options()).await.unwrap();
    assert!(report.stages.iter().all(|stage| stage.outcome == Outcome::Cached));
    let ok = |name: &str| report.figures[name].ok;
    assert_eq!(
        (ok("a.reached"), ok("a.other"), ok("b.reached"), ok("both.sum")),
        (Some(false), Some(false), Some(true), None)
    );
    assert_eq!(report.figures["b.reached"].note.as_deref(), Some("no ability"));
    let last = fixture.events.lock().unwrap().last().cloned();
    let Some(Event::RunFinished { metrics, .. }) = last else { panic!("{last:?}") };
    assert_eq!(metrics["b.reached"]["value"], 8.0);
    assert_eq!(metrics["b.reached"]["ok"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_blob_makes_its_stage_run_again_and_says_why() {
    let fixture = Fixture::new();
    let plan = fixture.plan(PIPELINE, &[]).await;
    let first = fixture.engine.run(&plan, &fixture.options()).await.unwrap();
    let result = first.stages[0].result.clone().unwrap();
    let manifest = fixture.store.manifest(result.outputs[0].digest).await.unwrap();
    fixture.store.delete(&format!("blobs/{}", manifest.files[0].digest)).await.unwrap();
    let again = fixture.engine.run(&plan, &fixture.options()).await.unwrap();
    assert_eq!(outcomes(&again), [("a", Outcome::Done), ("b", Outcome::Cached), ("both", Outcome::Cached)]);
    let warned = |event: &Event| matches!(event, Event::Log { message, .. } if message.contains("is gone"));
    assert!(fixture.events.lock().unwrap().iter().any(warned));
    // A record that is cut is no result either.
    let path = format!("stages/{}/result.json", again.stages[0].key);
    fixture.store.delete(&path).await.unwrap();
    fixture.store.create(&path, bytes::Bytes::from_static(b"{\"format\":1,")).await.unwrap();
    let again = fixture.engine.run(&plan, &fixture.options()).await.unwrap();
    assert_eq!(outcomes(&again)[0], ("a", Outcome::Done));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_and_a_panicking_stage_end_the_run_with_their_kind() {
    for (config, kind, part) in [
        ("{ until: 5, fail_at: 3 }", ErrorKind::Data, "stage `a`: step 3 was asked to fail"),
        ("{ until: 5, panic_at: 2 }", ErrorKind::Internal, "panicked"),
    ] {
        let fixture = Fixture::new();
        let text = format!("version: 1\nstore: memory://\nstages:\n  a: {{ type: count, config: {config} }}\n");
        let plan = fixture.plan(&text, &[]).await;
        let error = fixture.engine.run(&plan, &fixture.options()).await.unwrap_err();
        assert_eq!(error.kind(), kind);
        assert!(error.to_string().contains(part), "{error}");
        let last = fixture.events.lock().unwrap().last().cloned();
        assert!(matches!(last, Some(Event::RunFinished { outcome: Outcome::Failed { .. }, .. })), "{last:?}");
        assert_eq!(fixture.engine.runs(&fixture.store).await.unwrap()[0].state, "failed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_become_artifacts_and_their_change_changes_the_key() {
    let dir = temp_dir("files");
    std::fs::create_dir_all(dir.join("in")).unwrap();
    std::fs::write(dir.join("in/x.txt"), "one").unwrap();
    std::fs::write(dir.join("in/y.txt"), "two").unwrap();
    let text = "version: 1\nstore: memory://\nstages:\n  a: { type: read, inputs: { documents: 'in/*.txt' } }\n";
    std::fs::write(dir.join("p.yaml"), text).unwrap();
    let fixture = Fixture::new();
    let plan = async || {
        let spec = fixture.engine.load(&dir.join("p.yaml"), &LoadOptions::default()).unwrap();
        fixture.engine.plan(spec).await.unwrap()
    };
    let first = fixture.engine.run(&plan().await, &fixture.options()).await.unwrap();
    assert_eq!(first.figures["a.bytes"].value, 6.0);
    assert_eq!(fixture.engine.run(&plan().await, &fixture.options()).await.unwrap().stages[0].outcome, Outcome::Cached);
    let stale = plan().await;
    std::fs::write(dir.join("in/x.txt"), "three").unwrap();
    let second = fixture.engine.run(&plan().await, &fixture.options()).await.unwrap();
    assert_eq!((second.stages[0].outcome.clone(), second.figures["a.bytes"].value), (Outcome::Done, 8.0));
    let why = fixture.engine.explain(&plan().await, "a").await.unwrap();
    assert_eq!(why.stage.state, State::Cached);
    // The old plan still names the old content: its result is stored, so nothing has to be read.
    assert_eq!(fixture.engine.run(&stale, &fixture.options()).await.unwrap().figures, first.figures);
    std::fs::remove_dir_all(&dir).unwrap();
}

fn temp_dir(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("dsv3-engine-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

#[test]
fn ten_kinds_of_mistakes_are_each_reported_at_their_place() {
    let text = "version: 1
stages:
  a: { type: cuont }
  b: { type: count, inputs: { befor: a.report }, config: { until: many } }
  c: { type: count, inputs: { before: d.report }, config: { until: 2, untl: 3 } }
  d: { type: count, inputs: { before: c.report }, config: { until: 2 } }
  e: { type: count, inputs: { before: b.rapport }, config: {} }
  f: { type: read, inputs: { documents: missing/*.parquet } }
  g: { type: read, inputs: { documents: b.report } }
  h: { type: read }
  i: { type: count, hooks: { filter: nothing }, config: { until: 13 } }
  j: { type: sum, inputs: { reports: [zz.report, b] } }
";
    let engine = Engine::builder().stages(stages::ALL).build();
    let report = engine.load_text("bad.yaml", text, Path::new("/nowhere"), &LoadOptions::default()).unwrap_err();
    let text = report.to_string();
    for part in [
        "there is no stage type `cuont`",
        "did you mean `count`?",
        "bad.yaml:4:31",
        "stage type `count` has no input `befor`",
        "`config.until` takes an integer; this is the text \"many\"",
        "unknown key `untl` in `config`",
        "these stages wait for each other: c <- d <- c",
        "stage `b` (line 4, column 3) has no output `rapport`",
        "`config` lacks `until`",
        "no file matches /nowhere/missing/*.parquet",
        "input `documents` of stage `g` (line 9, column 3) takes documents, but output `report` of stage `b` (line 4, column 3) is report",
        "stage `h` lacks its input `documents`",
        "no hook is called `nothing`",
        "`config.until` of stage `i`: thirteen is refused",
        "bad.yaml:11:66",
        "`zz.report` names no stage of this pipeline and no file",
        "`b` is a stage; an input takes one of its outputs",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    assert!(matches!(EngineError::from(report).kind(), ErrorKind::Invalid));
}

#[test]
fn a_problem_with_a_param_also_points_at_its_value() {
    let text = "version: 1
params:
  texts: missing.parquet
stages:
  a: { type: read, inputs: { documents: \"${params.texts}\" } }
";
    let engine = Engine::builder().stages(stages::ALL).build();
    let load = |sets: &[&str]| {
        let options = LoadOptions { sets: sets.iter().map(ToString::to_string).collect(), ..LoadOptions::default() };
        engine.load_text("p.yaml", text, Path::new("/nowhere"), &options).unwrap_err().to_string()
    };
    let written = load(&[]);
    for part in ["/nowhere/missing.parquet does not exist", "p.yaml:5:41", "p.yaml:3:10", "value of `texts`"] {
        assert!(written.contains(part), "{part} in\n{written}");
    }
    let set = load(&["params.texts=other.parquet"]);
    assert!(set.contains("--set params.texts=other.parquet:1:14"), "{set}");
}

#[test]
fn the_schema_names_every_stage_and_takes_placeholders() {
    let schema = Engine::builder().stages(stages::ALL).build().schema();
    let config = &schema["$defs"]["count"]["properties"]["config"]["properties"];
    assert_eq!(config["until"]["anyOf"][1]["$ref"], "#/$defs/placeholder");
    assert!(config["until"]["description"].as_str().unwrap().contains("count to"));
    assert_eq!(schema["$defs"]["stage"]["properties"]["type"]["oneOf"].as_array().unwrap().len(), stages::ALL.len());
    assert_eq!(schema["$defs"]["read"]["properties"]["inputs"]["required"], serde_json::json!(["documents"]));
}

#[test]
fn hooks_are_loaded_before_anything_runs() {
    let engine = Engine::builder().stages(stages::ALL).build();
    let load = |hook: &str| {
        let text =
            format!("version: 1\nhooks:\n  q: {hook}\nstages:\n  a: {{ type: count, config: {{ until: 1 }} }}\n");
        let report = engine.load_text("h.yaml", &text, Path::new(ROOT), &LoadOptions::default());
        report.map(|_| String::new()).unwrap_or_else(|report| report.to_string())
    };
    let wasm = "schemas/hooks/examples/quality.wasm";
    assert_eq!(load(&format!("{{ wasm: {wasm}, world: document-filter }}")), "");
    for (hook, parts) in [
        (format!("{{ wasm: {wasm}, world: reward }}"), ["h.yaml:3:14", "not a component of world reward"]),
        (format!("{{ wasm: {wasm}, world: rewrad }}"), ["h.yaml:3:58", "did you mean `reward`?"]),
        (
            format!("{{ wasm: {wasm}, world: document-filter, config: {{ min_words: x }} }}"),
            ["h.yaml:3:", "configuration"],
        ),
        ("{ wasm: nowhere.wasm, world: reward }".to_owned(), ["h.yaml:3:14", "nowhere.wasm cannot be read"]),
    ] {
        let report = load(&hook);
        assert!(parts.iter().all(|part| report.contains(part)), "{parts:?} in\n{report}");
    }
}

/// Damaged texts: every one is a pipeline or a report that can be drawn, never a panic.
#[test]
fn damaged_pipelines_never_panic() {
    const PIECES: [&str; 24] = [
        "{",
        "}",
        "[",
        "]",
        ": ",
        "- ",
        "\n",
        "\n  ",
        "\t",
        "&a ",
        "*a",
        "<<: *a",
        "${",
        "${params.until}",
        "${env.PATH}",
        "\"",
        "'",
        "#",
        "é",
        "\u{feff}",
        "!!str ",
        "---\n",
        "| \n",
        "0x",
    ];
    let engine = Engine::builder().stages(stages::ALL).build();
    let hooked = format!("{PIPELINE}hooks:\n  h: {{ wasm: x, world: reward }}\nx-a: &a {{ until: 3 }}\n");
    let mut rng = dsv3_core::Rng::new(3).key("fuzz");
    for round in 0..3000 {
        let mut text: Vec<char> = hooked.chars().collect();
        for _ in 0..=rng.below(4) {
            let at = rng.below(text.len() as u64 + 1) as usize;
            let until = (at + rng.below(9) as usize).min(text.len());
            let piece = PIECES[rng.below(PIECES.len() as u64) as usize].chars();
            match rng.below(3) {
                0 => drop(text.splice(at..at, piece)),
                1 => drop(text.splice(at..until, piece)),
                _ => drop(text.splice(at..until, [])),
            }
        }
        let text: String = text.into_iter().collect();
        let sets = ["until=2", "stages.a.config={until: [1", "stages.b=", "params=3"];
        let sets = sets.iter().take((round % 5) as usize).map(|set| (*set).to_owned()).collect();
        let options = LoadOptions { sets, ..LoadOptions::default() };
        if let Err(report) = engine.load_text("f.yaml", &text, Path::new("/nowhere"), &options) {
            assert!(report.to_string().contains("error: ") && !report.to_json().is_empty(), "{text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_runs_at_once_share_the_work() {
    let fixture = Fixture::new();
    let plan = fixture.plan(PIPELINE, &[]).await;
    let other = Engine::builder().stages(stages::ALL).store(fixture.store.clone()).build();
    let options = fixture.options();
    let (first, second) = tokio::join!(fixture.engine.run(&plan, &options), other.run(&plan, &options));
    let (first, second) = (first.unwrap(), second.unwrap());
    for (a, b) in first.stages.iter().zip(&second.stages) {
        let mut both = [&a.outcome, &b.outcome];
        both.sort_by_key(|outcome| format!("{outcome:?}"));
        assert_eq!(both, [&Outcome::Cached, &Outcome::Done], "{}", a.stage);
        assert_eq!(a.result, b.result);
    }
}
