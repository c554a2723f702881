//! A stage of the tests through its type-erased entry: keys, shapes, files, interruption.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use dsv3_core::{Artifact, Bound, Digest, Error, ErrorKind, Event, Events, Kind, Level, kinds};
use dsv3_store::Store;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Ctx, InputFacts, OutputFacts, PortFacts, Problems, Stage, StageEntry, ports};

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    /// Steps to take.
    steps: u32,
    /// Rate of the optimiser.
    #[serde(default = "default_rate")]
    learning_rate: f64,
    /// Worker threads of the reader.
    #[serde(default)]
    #[schemars(extend("x-key" = "performance"))]
    readers: Option<u8>,
    /// Nested options.
    #[serde(default)]
    model: ModelConfig,
    /// Phases, one after another.
    #[serde(default)]
    phases: Vec<Phase>,
    /// When to save.
    #[serde(default)]
    #[schemars(extend("x-key" = "performance"))]
    save: Save,
    /// How to stop.
    #[serde(default)]
    stop: Stop,
    /// Figures by name.
    #[serde(default)]
    extra: BTreeMap<String, u32>,
}

fn default_rate() -> f64 {
    0.001
}

#[derive(Serialize, Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
struct ModelConfig {
    /// Width.
    hidden_size: u32,
    /// Number form.
    #[schemars(extend("x-key" = "numerics"))]
    precision: Precision,
}

#[derive(Serialize, Deserialize, JsonSchema, Default)]
#[serde(rename_all = "lowercase")]
enum Precision {
    /// Eight bits.
    Fp8,
    /// Thirty-two bits.
    #[default]
    F32,
}

#[derive(Serialize, Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
struct Save {
    /// Steps between checkpoints.
    every_steps: u32,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Phase {
    /// Tokens of the phase.
    tokens: u64,
    /// Rows at a time.
    #[serde(default)]
    #[schemars(extend("x-key" = "numerics"))]
    micro_batch: u32,
}

#[derive(Serialize, Deserialize, JsonSchema, Default)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Stop {
    /// Never.
    #[default]
    Never,
    /// At a loss.
    AtLoss {
        /// The loss.
        loss: f64,
        /// How often to look.
        #[serde(default)]
        #[schemars(extend("x-key" = "performance"))]
        every: u32,
    },
}

ports! {
    /// Inputs of `count`.
    struct Inputs {
        /// Text to count.
        documents: Artifact<kinds::Documents>,
    }
}

ports! {
    /// Outputs of `count`.
    struct Outputs {
        /// The count.
        report: Artifact<kinds::Report>,
    }
}

/// Adds the bytes of its input once per step, with a checkpoint after each.
struct Count;

impl Stage for Count {
    const NAME: &'static str = "count";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "Counts bytes.";
    type Config = Config;
    type Inputs = Inputs;
    type Outputs = Outputs;

    fn check(config: &Config, facts: &InputFacts, problems: &mut Problems) {
        if facts.fact("documents", "width").is_some_and(|width| *width != config.model.hidden_size) {
            problems.push("config.model.hidden_size", "it differs from the width of the documents", "");
        }
    }

    fn facts(config: &Config, _: &InputFacts) -> OutputFacts {
        OutputFacts::from([("report".into(), json!({"steps": config.steps}))])
    }

    fn run(config: Config, inputs: Inputs, ctx: &mut Ctx) -> Result<Outputs, Error> {
        let (mut step, mut sum) = match ctx.checkpoints().latest()? {
            Some(found) => (found.step, found.state["sum"].as_u64().unwrap_or_default()),
            None => (0, 0),
        };
        let bytes = ctx.read(&inputs.documents, "text/a.txt")?.len() as u64;
        while step < u64::from(config.steps) {
            ctx.check_cancelled()?;
            assert!(config.learning_rate < 1.0, "the rate is absurd");
            (step, sum) = (step + 1, sum + bytes);
            ctx.checkpoints().save(step, vec![], json!({"sum": sum}))?;
            ctx.metric("sum", step, sum as f64);
            if step == 2 && config.extra.contains_key("interrupt") {
                ctx.cancel().cancel();
            }
        }
        ctx.set_floor("sum", sum as f64, Bound::AtLeast, 100.0);
        ctx.set_note("sum", "small");
        let file = ctx.put("count.json", sum.to_string().into_bytes())?;
        Ok(Outputs { report: ctx.publish(vec![file], Value::Null)? })
    }
}

const COUNT: StageEntry = StageEntry::of::<Count>();

fn documents(ctx: &Ctx) -> Artifact<kinds::Documents> {
    let files = vec![ctx.put("text/a.txt", &b"0123456789"[..]).unwrap(), ctx.put("b.txt", &b"b"[..]).unwrap()];
    ctx.publish(files, json!({"documents": 2})).unwrap()
}

fn inputs(ctx: &Ctx) -> Value {
    json!({ "documents": documents(ctx).erase() })
}

#[test]
fn the_key_has_semantic_fields_and_defaults_only() {
    let key = |config: Value| COUNT.key_config(&config).unwrap();
    let base = key(json!({"steps": 3}));
    assert_eq!(
        base,
        json!({"steps": 3, "learning_rate": 0.001, "model": {"hidden_size": 0}, "phases": [], "stop": {"type": "never"}, "extra": {}})
    );
    assert_eq!(
        base,
        key(
            json!({"steps": 3, "readers": 2, "save": {"every_steps": 9}, "model": {"precision": "fp8"}, "learning_rate": 1e-3})
        )
    );
    assert_ne!(base, key(json!({"steps": 4})));
    let phases = key(json!({"steps": 3, "phases": [{"tokens": 5, "micro_batch": 2}, {"tokens": 6}]}));
    assert_eq!(phases["phases"], json!([{"tokens": 5}, {"tokens": 6}]));
    let stop = key(json!({"steps": 3, "stop": {"type": "at_loss", "loss": 1.5, "every": 7}}));
    assert_eq!(stop["stop"], json!({"type": "at_loss", "loss": 1.5}));
}

#[test]
fn the_profile_has_numerics_fields_only() {
    let config = json!({"steps": 3, "model": {"precision": "fp8"}, "phases": [{"tokens": 5, "micro_batch": 2}]});
    let profile = COUNT.profile_config(&config).unwrap();
    assert_eq!(profile, json!({"model": {"precision": "fp8"}, "phases": [{"micro_batch": 2}]}));
}

#[test]
fn every_problem_of_a_shape_is_reported_with_its_path() {
    let config = json!({
        "learning_rat": 0.1,
        "learning_rate": "fast",
        "readers": 300,
        "model": {"hidden_size": -4, "precision": "fp4"},
        "phases": [{"tokens": 1}, {"token": 2}],
        "stop": {"type": "at_loss", "los": 1.0},
        "save": [],
        "extra": {"a": 1.5},
    });
    let problems = COUNT.check_shape(&config);
    let found: Vec<String> = problems.iter().map(|p| format!("{}: {}", p.path, p.message)).collect();
    let expected = [
        "config.extra.a: a whole number is expected, this is a fraction",
        "config.learning_rat: there is no field learning_rat",
        "config.learning_rate: a number is expected, this is a text",
        "config.model.hidden_size: -4 is out of range",
        "config.model.precision: \"fp4\" is not one of",
        "config.phases.1.token: there is no field token",
        "config.phases.1: the field tokens is missing",
        "config.readers: 300 is out of range: 0 to 255",
        "config.save: a map is expected, this is a list",
        "config.stop.los: there is no field los",
        "config.stop: the field loss is missing",
        "config: the field steps is missing",
    ];
    for text in expected {
        assert!(found.iter().any(|found| found.starts_with(text)), "no {text:?} in {found:#?}");
    }
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    let typo = problems.iter().find(|p| p.path == "config.learning_rat").unwrap();
    assert_eq!(typo.help.as_deref(), Some("did you mean learning_rate?"));
    assert!(
        COUNT.check_shape(&json!({"steps": 1, "readers": null, "stop": {"type": "at_loss", "loss": 1}})).is_empty()
    );
    assert_eq!(COUNT.check_shape(&json!(7))[0].path, "config");
}

#[test]
fn checks_see_facts() {
    let mut facts = InputFacts::default();
    facts.push("documents", PortFacts::Upstream(json!({"width": 8})));
    let mut problems = Problems::default();
    COUNT.check(&json!({"steps": 1, "model": {"hidden_size": 9}}), &facts, &mut problems);
    assert_eq!(problems.iter().next().unwrap().path, "config.model.hidden_size");
    COUNT.check(&json!({"steps": "x"}), &facts, &mut problems);
    assert_eq!(problems.iter().count(), 2);
    assert_eq!(COUNT.facts(&json!({"steps": 5}), &facts)["report"]["steps"], 5);
    let mut facts = InputFacts::default();
    facts.push("model", PortFacts::External(vec!["/m/config.json".into(), "/m/tokenizer.json".into()]));
    assert_eq!(facts.external_file("model", "config.json").unwrap(), std::path::Path::new("/m/config.json"));
}

#[test]
fn an_interrupted_stage_goes_on_and_ends_with_the_same_output() {
    let mut calm = Ctx::for_test("count");
    let documents = inputs(&calm);
    let undisturbed = COUNT.run(&json!({"steps": 5}), &documents, &mut calm).unwrap();
    let closing = calm.closing();
    let figure = &closing.figures["sum"];
    assert_eq!((figure.value, figure.ok, figure.note.as_deref()), (50.0, Some(false), Some("small")));

    let store = Store::with_memory();
    let mut first = Ctx::for_test_on(store.clone(), "count", Events::none());
    let documents = inputs(&first);
    let error = COUNT.run(&json!({"steps": 5, "extra": {"interrupt": 1}}), &documents, &mut first).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Cancelled);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    let events = Events::new(move |event| {
        if let Event::Metric { step, .. } = event {
            sink.lock().unwrap().push(step);
        }
    });
    let mut second = Ctx::for_test_on(store, "count", events);
    assert_eq!(COUNT.run(&json!({"steps": 5}), &documents, &mut second).unwrap(), undisturbed);
    assert_eq!(*seen.lock().unwrap(), [3, 4, 5]);
}

#[test]
fn a_panic_is_an_internal_error() {
    let mut ctx = Ctx::for_test("count");
    let documents = inputs(&ctx);
    let error = COUNT.run(&json!({"steps": 1, "learning_rate": 2.0}), &documents, &mut ctx).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Internal);
    assert!(error.message.contains("the rate is absurd"), "{error}");
}

#[test]
fn an_artifact_of_another_kind_is_refused_by_port_and_by_manifest() {
    let mut ctx = Ctx::for_test("count");
    let digest = documents(&ctx).digest();
    let wrong = json!({"documents": {"kind": kinds::Chat::NAME, "digest": digest.to_string()}});
    let error = COUNT.run(&json!({"steps": 1}), &wrong, &mut ctx).unwrap_err();
    assert!(error.message.contains("documents, this one is chat"), "{error}");
    let error = ctx.read(&Artifact::<kinds::Chat>::new(digest), "b.txt").unwrap_err();
    assert_eq!(error.kind, ErrorKind::Data);
    assert!(error.message.contains("of kind documents, chat is expected"), "{error}");
    let error = ctx.read(&Artifact::<kinds::Documents>::new(digest), "c.txt").unwrap_err();
    assert!(error.message.contains("no file c.txt; it has: text/a.txt, b.txt"), "{error}");
    let error = ctx.read(&Artifact::<kinds::Documents>::new(Digest::of(b"?")), "c.txt").unwrap_err();
    assert_eq!(error.kind, ErrorKind::Data);
}

#[test]
fn artifacts_become_folders_and_folders_artifacts() {
    let folder = std::env::temp_dir().join(format!("dsv3-stage-{}", dsv3_store::nonce()));
    for store in [Store::with_memory(), Store::open(&folder.display().to_string()).unwrap()] {
        let ctx = Ctx::for_test_on(store, "count", Events::none());
        let artifact = documents(&ctx);
        for _ in 0..2 {
            let laid_out = ctx.local_dir(&artifact).unwrap();
            assert_eq!(std::fs::read(laid_out.join("text/a.txt")).unwrap(), b"0123456789");
            assert_eq!(std::fs::read(laid_out.join("b.txt")).unwrap(), b"b");
            let again: Artifact<kinds::Documents> = ctx.publish_dir(&laid_out, json!({"documents": 2})).unwrap();
            let paths: Vec<String> = ctx.manifest(&again).unwrap().files.into_iter().map(|file| file.path).collect();
            assert_eq!(paths, ["b.txt", "text/a.txt"]);
        }
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_a_warning() {
    let folder = std::env::temp_dir().join(format!("dsv3-stage-{}", dsv3_store::nonce()));
    let url = folder.display().to_string();
    let mut ctx = Ctx::for_test_on(Store::open(&url).unwrap(), "count", Events::none());
    let documents = inputs(&ctx);
    let done = COUNT.run(&json!({"steps": 3}), &documents, &mut ctx).unwrap();
    std::fs::write(folder.join("stages/count/checkpoints/00000003.json"), b"{").unwrap();
    let warned = Arc::new(Mutex::new(0));
    let sink = warned.clone();
    let events = Events::new(move |event| {
        if matches!(event, Event::Log { level: Level::Warn, .. }) {
            *sink.lock().unwrap() += 1;
        }
    });
    let mut ctx = Ctx::for_test_on(Store::open(&url).unwrap(), "count", events);
    assert_eq!(COUNT.run(&json!({"steps": 3}), &documents, &mut ctx).unwrap(), done);
    assert_eq!(*warned.lock().unwrap(), 1);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_stage_runs_on_a_thread_of_its_own_inside_the_hosts_runtime() {
    let make = tokio::task::spawn_blocking(|| {
        let ctx = Ctx::for_test("count");
        let documents = inputs(&ctx);
        (ctx, documents)
    });
    let (ctx, documents) = make.await.unwrap();
    let (outcome, ctx) = COUNT.run_on_thread(json!({"steps": 2}), documents, ctx).await.unwrap();
    assert_eq!(outcome.unwrap()["report"]["kind"], "report");
    tokio::task::spawn_blocking(move || drop(ctx)).await.unwrap();
}
