//! A store that takes no more writes: full, mounted for reading, or granted so. One error that names the path and says what to do,
//! exit 69; what the store holds stays and can be read.
//!
//! The tests run as root, whom file modes do not stop: the whole-program test mounts the store read-only in a mount name
//! space of its own. Where the kernel lets nobody do that, it says so and the other tests stand alone.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use dsv3_pipeline::{ALL, Engine, ErrorKind, Event, Events, LoadOptions, Outcome, Plan, RunOptions, State, Store};
use dsv3_store::faults::{Fault, Faults};

use crate::{
    proof::runtime::lived,
    tiny::{Place, recipe},
};

/// Two ingests, the second with the first one's tokenizer.
async fn plan(engine: &Engine, folder: &Path) -> Plan {
    let documents: String = (0..40).map(|i| format!("{{\"text\": \"line {i} of the documents\"}}\n")).collect();
    std::fs::write(folder.join("documents.jsonl"), documents).expect("written");
    let text = "version: 1\nstore: memory://\nstages:\n  first: { type: ingest, inputs: { documents: documents.jsonl }, config: { \
                vocab_size: 270, row_tokens: 16 } }\n  second: { type: ingest, inputs: { documents: documents.jsonl, tokenizer: \
                first.tokenizer }, config: { row_tokens: 8 } }\n";
    let spec = engine.load_text("two.yaml", text, folder, &LoadOptions::default());
    engine.plan(spec.unwrap_or_else(|report| panic!("{report}"))).await.expect("a plan")
}

fn engine(store: &Store) -> Engine {
    Engine::builder().stages(ALL).store(store.clone()).build()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

/// Events go to a list; when the second stage begins, `turn` is called.
fn watched(turn: impl Fn() + Send + Sync + 'static) -> (RunOptions, Arc<Mutex<Vec<Event>>>) {
    let seen: Arc<Mutex<Vec<Event>>> = Arc::default();
    let sink = seen.clone();
    let events = Events::new(move |event| {
        if matches!(&event, Event::StageStarted { stage, .. } if stage == "second") {
            turn();
        }
        sink.lock().expect("a lock").push(event);
    });
    (RunOptions { events, ..RunOptions::default() }, seen)
}

#[test]
fn a_host_is_told_and_reads_on() {
    let folder = tempfile::tempdir().expect("a folder");
    runtime().block_on(async {
        let faults = Faults::default();
        let engine = engine(&faults.memory());
        let plan = plan(&engine, folder.path()).await;
        let turn = faults.clone();
        let (options, events) = watched(move || turn.plan("", Fault::ReadOnly, usize::MAX));
        let error = engine.run(&plan, &options).await.expect_err("a failed run");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(
            error.to_string().starts_with("stage `second`: tokens-00000.parquet: cannot create memory://"),
            "{error}"
        );
        assert!(error.help().is_some_and(|help| help.contains("write access")), "{:?}", error.help());
        let last = events.lock().expect("a lock").last().cloned();
        assert!(matches!(last, Some(Event::RunFinished { outcome: Outcome::Failed { .. }, .. })), "{last:?}");

        // Another run is refused before it begins, and what is finished can be seen.
        let error = engine.run(&plan, &RunOptions::default()).await.expect_err("a refused run");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        let states = engine.states(&plan).await.expect("states");
        assert_eq!(states[0].state, State::Cached);
        assert!(matches!(states[1].state, State::Runs), "{states:?}");

        // With writes taken again, nothing is done twice.
        faults.clear();
        let report = engine.run(&plan, &RunOptions::default()).await.expect("a run");
        let outcomes: Vec<_> = report.stages.iter().map(|stage| &stage.outcome).collect();
        assert_eq!(outcomes, [&Outcome::Cached, &Outcome::Done]);
    });
}

#[test]
fn a_store_that_fills_up_at_any_object_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    runtime().block_on(async {
        // Blobs of the stage, its result, the events and statuses of the run, and everything.
        for path in ["blobs/", "/result.json", "/events/", "/status/", ""] {
            let faults = Faults::default();
            let engine = engine(&faults.memory());
            let plan = plan(&engine, folder.path()).await;
            let turn = faults.clone();
            let (options, _) = watched(move || turn.plan(path, Fault::Full, usize::MAX));
            let error = engine.run(&plan, &options).await.expect_err("a failed run");
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{path}: {error}");
            assert!(error.to_string().contains("memory://"), "{path}: {error}");
            assert!(error.chain().concat().contains("no storage space"), "{path}: {:?}", error.chain());
            assert!(error.help().is_some_and(|help| help.contains("make room")), "{path}: {:?}", error.help());
            faults.clear();
            let report = engine.run(&plan, &RunOptions::default()).await.expect("a run");
            assert_eq!(report.stages[0].outcome, Outcome::Cached, "{path}");
        }
    });
}

/// How the program ends with the store mounted read-only: exit code, standard output, standard error.
fn read_only(place: &Place, args: &[&str]) -> (Option<i32>, String, String) {
    let store = place.store();
    let mount = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" || exit 99; exec \"$@\"";
    let program = place.command(args);
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", mount])
        .arg(&store)
        .arg(program.get_program())
        .args(program.get_args())
        .current_dir(place.path())
        .env("XDG_CACHE_HOME", place.path().join("cache"))
        .stdin(Stdio::null())
        .output();
    let output = output.expect("unshare runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Whether this kernel lets us mount.
fn may_mount() -> bool {
    let place = Place::new();
    std::fs::create_dir(place.store()).expect("a folder");
    let tried = Command::new("unshare")
        .args([
            "-m",
            "sh",
            "-c",
            "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && ! touch \"$0/x\" 2>/dev/null",
        ])
        .arg(place.store())
        .output();
    tried.is_ok_and(|output| output.status.success())
}

#[test]
fn a_read_only_mount_is_one_error_and_can_be_read() {
    if !may_mount() {
        eprintln!("NOT SHOWN HERE: this system lets nobody mount a store read-only (unshare -m, mount -o remount,ro)");
        return;
    }
    let place = lived();
    let recipe = recipe();
    let store = ["--store", "file://./runs"];
    let before = listing(&place);
    let shown = place.store().display().to_string();
    let change = "stages.sft.config.training.validate_steps=3";
    let writes: [&[&str]; 5] = [
        &["run", &recipe],
        &["run", &recipe, "--set", change],
        &["resume", "last"],
        &["exec", "last", "sft"],
        &["run", &recipe, "--json"],
    ];
    for args in writes {
        let (code, _, errors) = read_only(&place, &[args, &store].concat());
        assert_eq!(code, Some(69), "{args:?}\n{errors}");
        assert_eq!(errors.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{args:?}\n{errors}");
        for part in ["cannot create ", &shown, "Read-only file system", "help: give write access", "--store"] {
            assert!(errors.contains(part), "{part} of {args:?} in\n{errors}");
        }
        assert!(!errors.contains("panicked"), "{errors}");
    }
    let folder = place.path().join("model");
    let folder = folder.display().to_string();
    let page = place.path().join("page").display().to_string();
    let reads: [(&[&str], &str); 8] = [
        (&["plan", &recipe], "be found finished"),
        (&["explain", &recipe, "sft"], "finished"),
        (&["run", &recipe, "--dry-run"], "be found finished"),
        (&["runs"], "tiny"),
        (&["inspect", "last", "base"], "model"),
        (&["get", "last", "sft.model", &folder], ""),
        (&["report", "last", "--out", &page], "report.md"),
        (&["verify", "last", "--no-certificate"], "objects, "),
    ];
    for (args, part) in reads {
        let (code, said, errors) = read_only(&place, &[args, &store].concat());
        assert_eq!(code, Some(0), "{args:?}\n{said}{errors}");
        assert!(said.contains(part), "{part} of {args:?} in\n{said}");
    }
    let (code, said, errors) = read_only(&place, &[&["verify", "last"][..], &store].concat());
    assert_eq!(code, Some(69), "{errors}");
    assert!(
        said.contains("objects, ") && errors.contains("is sound; no certificate was written: cannot create "),
        "{errors}"
    );
    assert!(Path::new(&folder).join("model.safetensors").is_file());
    assert_eq!(listing(&place), before, "nothing was written");
    assert_eq!(place.done(&[]).outcome("evaluation"), Some("cached"), "and nothing is lost");
}

/// Every file of the store with its length.
fn listing(place: &Place) -> String {
    let output = Command::new("find").arg(place.store()).args(["-type", "f", "-printf", "%p %s\n"]).output();
    let text = String::from_utf8(output.expect("find runs").stdout).expect("text");
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines.join("\n")
}

#[test]
fn a_store_that_cannot_be_is_named_before_anything_runs() {
    let place = Place::new();
    let file = place.write("a-file", "not a folder");
    let below = format!("file://{file}/runs");
    for (store, parts) in [
        (below.as_str(), ["cannot open the store", "a-file"]),
        (&format!("file://{file}"), ["cannot open the store", "a-file"]),
        ("file:///proc/dsv3-runs", ["cannot open the store", "/proc/dsv3-runs"]),
        ("file:///sys/dsv3-runs", ["cannot open the store", "/sys/dsv3-runs"]),
    ] {
        let recipe = recipe();
        let args: [&[&str]; 2] = [&["run", &recipe, "--store", store], &["plan", &recipe, "--store", store]];
        for args in args {
            let output = place.command(args).output().expect("the program runs");
            let errors = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(69), "{args:?}\n{errors}");
            assert_eq!(errors.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{errors}");
            for part in parts.iter().chain(&["help: "]) {
                assert!(errors.contains(part), "{part} in\n{errors}");
            }
        }
    }
}
