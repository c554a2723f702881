//! A host that embeds the library: its own tokio runtime, its own stage beside ours, events as values, cancellation, and
//! a panic of its stage that ends the run and not the process.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use dsv3_pipeline::{
    ALL, Artifact, Cancel, Ctx, Engine, Error, ErrorKind, Event, Events, LoadOptions, Outcome, Plan, RunOptions, Stage,
    StageEntry, Store, kinds, ports,
};
use serde_json::json;

/// Options of the host's stage.
#[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    /// Steps to take.
    steps: u64,
    /// Whether to panic at the end.
    #[serde(default)]
    panic: bool,
}

ports! {
    /// What the host's stage reads.
    struct Inputs {
        /// Made by a stage of ours.
        report: Artifact<kinds::Report>,
    }
}

ports! {
    /// What the host's stage makes.
    struct Outputs {
        /// Its count.
        report: Artifact<kinds::Report>,
    }
}

/// Counts slowly, with a checkpoint after each step.
struct Count;

impl Stage for Count {
    const NAME: &'static str = "host_count";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "Counts, for a host.";
    type Config = Config;
    type Inputs = Inputs;
    type Outputs = Outputs;

    fn run(config: Config, inputs: Inputs, ctx: &mut Ctx) -> Result<Outputs, Error> {
        let read = ctx.local_files(&inputs.report)?.len() as u64;
        let first = ctx.checkpoints().latest()?.map_or(0, |checkpoint| checkpoint.step) + 1;
        for step in first..=config.steps {
            std::thread::sleep(Duration::from_millis(5));
            ctx.metric("step", step, step as f64);
            ctx.progress(step, Some(config.steps), "steps");
            ctx.checkpoints().save(step, vec![("count".to_owned(), step.to_le_bytes().to_vec())], json!({}))?;
            ctx.check_cancelled()?;
        }
        assert!(!config.panic, "the host's stage panics");
        ctx.set_metric("total", (config.steps + read) as f64);
        let file = ctx.put("count.json", config.steps.to_string().into_bytes())?;
        Ok(Outputs { report: ctx.publish(vec![file], json!({ "steps": config.steps }))? })
    }
}

ports! {
    /// What the broken stage makes.
    struct Broken {
        /// A model nobody can load.
        model: Artifact<kinds::Model>,
    }
}

/// Publishes a model whose file `config.wrong` says is damaged.
struct Break;

/// Options of the broken stage.
#[derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct BreakConfig {
    /// The damaged file.
    wrong: String,
}

impl Stage for Break {
    const NAME: &'static str = "host_break";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "Makes a damaged model.";
    type Config = BreakConfig;
    type Inputs = dsv3_pipeline::NoPorts;
    type Outputs = Broken;

    fn run(config: BreakConfig, _: dsv3_pipeline::NoPorts, ctx: &mut Ctx) -> Result<Broken, Error> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/hf-tiny");
        let mut files = Vec::new();
        for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            let good = std::fs::read(folder.join(name)).expect("the reference");
            files.push(ctx.put(name, if name == config.wrong { good[..good.len() / 2].to_vec() } else { good })?);
        }
        Ok(Broken { model: ctx.publish(files, json!({}))? })
    }
}

fn engine(store: &Store) -> Engine {
    Engine::builder().stages(ALL).stages(&[StageEntry::of::<Count>()]).store(store.clone()).build()
}

async fn plan(engine: &Engine, dir: &Path, config: &str) -> Plan {
    let documents: String = (0..40).map(|i| format!("{{\"text\": \"line {i} of the host's documents\"}}\n")).collect();
    std::fs::write(dir.join("documents.jsonl"), documents).expect("documents");
    let text = format!(
        "version: 1\nstore: memory://\nstages:\n  corpus: {{ type: ingest, inputs: {{ documents: documents.jsonl }}, \
         config: {{ vocab_size: 270, row_tokens: 16 }} }}\n  host: {{ type: host_count, inputs: {{ report: corpus.report }}, \
         config: {config} }}\n"
    );
    let spec = engine.load_text("inline.yaml", &text, dir, &LoadOptions::default());
    engine.plan(spec.unwrap_or_else(|report| panic!("{report}"))).await.expect("a plan")
}

#[test]
fn a_host_runs_its_stage_beside_ours_and_gets_events() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let dir = tempfile::tempdir().expect("a folder");
    runtime.block_on(async {
        let store = Store::with_memory();
        let engine = engine(&store);
        let plan = plan(&engine, dir.path(), "{ steps: 4 }").await;
        let seen: Arc<Mutex<Vec<Event>>> = Arc::default();
        let sink = seen.clone();
        let events = Events::new(move |event| sink.lock().expect("a lock").push(event));
        let report = engine.run(&plan, &RunOptions { events, ..RunOptions::default() }).await.expect("a run");
        assert_eq!(report.stages.iter().map(|stage| &stage.outcome).collect::<Vec<_>>(), [&Outcome::Done; 2]);
        assert!(report.figures["host.total"].value >= 5.0);
        let seen = seen.lock().expect("a lock");
        assert!(matches!(seen.first(), Some(Event::RunStarted { .. })));
        assert!(matches!(seen.last(), Some(Event::RunFinished { outcome: Outcome::Done, .. })));
        assert!(seen.iter().any(|event| matches!(event, Event::Progress { stage, done: 4, .. } if stage == "host")));
    });
}

#[test]
fn a_host_cancels_and_goes_on_with_equal_bits() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let dir = tempfile::tempdir().expect("a folder");
    runtime.block_on(async {
        let (disturbed, calm) = (Store::with_memory(), Store::with_memory());
        let engine_of = |store: &Store| engine(store);
        let first = engine_of(&disturbed);
        let planned = plan(&first, dir.path(), "{ steps: 40 }").await;
        let cancel = Cancel::new();
        let stop = cancel.clone();
        let events = Events::new(move |event| {
            if matches!(event, Event::Checkpoint { step: 3, .. }) {
                stop.cancel();
            }
        });
        let options = RunOptions { events, cancel, ..RunOptions::default() };
        let error = first.run(&planned, &options).await.expect_err("a cancelled run");
        assert_eq!(error.kind(), ErrorKind::Cancelled);

        // Another engine over the same store, as in a new process.
        let steps: Arc<Mutex<Vec<u64>>> = Arc::default();
        let sink = steps.clone();
        let events = Events::new(move |event| {
            if let Event::Metric { stage, step, .. } = event
                && stage == "host"
            {
                sink.lock().expect("a lock").push(step);
            }
        });
        let resumed = engine_of(&disturbed).run(&planned, &RunOptions { events, ..RunOptions::default() }).await;
        let resumed = resumed.expect("a resumed run");
        let steps = steps.lock().expect("a lock").clone();
        assert!(steps[0] > 3 && steps[0] < 40 && steps.len() as u64 == 41 - steps[0], "{steps:?}");

        let undisturbed = engine_of(&calm).run(&planned, &RunOptions::default()).await.expect("a run");
        let outputs = |report: &dsv3_pipeline::RunReport| -> Vec<_> {
            report.stages.iter().map(|stage| stage.result.as_ref().expect("a result").outputs.clone()).collect()
        };
        assert_eq!(outputs(&resumed), outputs(&undisturbed));
    });
}

#[test]
fn a_host_with_a_single_thread_of_tokio_is_enough() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let dir = tempfile::tempdir().expect("a folder");
    runtime.block_on(async {
        let store = Store::with_memory();
        let engine = engine(&store);
        let plan = plan(&engine, dir.path(), "{ steps: 2 }").await;
        let report = engine.run(&plan, &RunOptions::default()).await.expect("a run");
        assert_eq!(report.stages.len(), 2);
    });
}

#[test]
fn a_panic_of_the_hosts_stage_ends_the_run_and_not_the_process() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let dir = tempfile::tempdir().expect("a folder");
    runtime.block_on(async {
        let store = Store::with_memory();
        let engine = engine(&store);
        let plan = plan(&engine, dir.path(), "{ steps: 1, panic: true }").await;
        let error = engine.run(&plan, &RunOptions::default()).await.expect_err("a failed run");
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert!(error.to_string().contains("stage `host`"), "{error}");
    });
}

/// The scratch folder in which a stage sees its inputs says nothing to a person.
#[test]
fn a_damaged_file_of_an_artifact_is_named_as_what_it_is() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let dir = tempfile::tempdir().expect("a folder");
    runtime.block_on(async {
        for store in [Store::with_memory(), Store::open(&dir.path().join("runs").display().to_string()).expect("a store")] {
            let stages = [StageEntry::of::<Break>()];
            let engine = Engine::builder().stages(ALL).stages(&stages).store(store.clone()).build();
            for wrong in ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"] {
                let text = format!(
                    "version: 1\nstages:\n  made: {{ type: host_break, config: {{ wrong: {wrong} }} }}\n  out: {{ type: export, \
                     inputs: {{ model: made.model }} }}\n"
                );
                let spec = engine.load_text("inline.yaml", &text, dir.path(), &LoadOptions::default());
                let plan = engine.plan(spec.unwrap_or_else(|report| panic!("{report}"))).await.expect("a plan");
                let error = engine.run(&plan, &RunOptions::default()).await.expect_err("a damaged model");
                assert_eq!(error.kind(), ErrorKind::Data, "{error}");
                let (said, root) = (error.to_string(), store.display_path("blobs/"));
                assert!(said.starts_with("stage `out`: ") && said.contains("`made.model`"), "{said}");
                assert!(!said.contains("artifacts/"), "{said}");
                if wrong != "config.json" {
                    assert!(said.contains(&root) && said.contains(&format!("(file {wrong} of `made.model`)")), "{said}");
                }
            }
        }
    });
}
