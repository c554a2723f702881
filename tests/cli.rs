//! The command line as a user sees it: exit codes, diagnostics, event stream, cache, what works after the YAML is gone.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Instant,
};

use serde_json::Value;

/// A folder of its own for one test.
struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(&path, text).expect("a written file");
        path
    }

    /// Runs the program in this folder.
    fn run(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_dsv3-pipeline"))
            .args(args)
            .current_dir(self.0.path())
            .env("XDG_CACHE_HOME", self.0.path().join("cache"))
            .env_remove("RUST_LOG")
            .output()
            .expect("the program runs")
    }

    /// Runs it and expects an exit code; gives standard output and standard error.
    fn expect(&self, code: i32, args: &[&str]) -> (String, String) {
        let output = self.run(args);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{args:?}\n{out}\n{err}");
        (out, err)
    }

    /// A pipeline of one quick real stage on documents written here.
    fn small_pipeline(&self) {
        let documents: String = (0..60)
            .map(|i| format!("{{\"text\": \"document {i} says that {i} and {} are {} together\"}}\n", i + 1, 2 * i + 1))
            .collect();
        self.write("in/documents.jsonl", &documents);
        self.write(
            "small.yaml",
            "version: 1\nparams: { vocab: 280 }\nstages:\n  corpus:\n    type: ingest\n    inputs: { documents: in/*.jsonl }\n    \
             config: { vocab_size: \"${params.vocab}\", row_tokens: 32 }\n",
        );
    }
}

fn events(out: &str) -> Vec<Value> {
    out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

#[test]
fn bad_usage_exits_64_and_help_exits_0() {
    let dir = Dir::new();
    dir.expect(0, &["--help"]);
    dir.expect(0, &["--version"]);
    dir.expect(64, &[]);
    dir.expect(64, &["fly"]);
    dir.expect(64, &["run"]);
    dir.expect(64, &["run", "nowhere.yaml"]);
    dir.expect(64, &["run", "x.yaml", "--threads", "0"]);
    dir.expect(64, &["runs"]);
    dir.expect(64, &["exec", "last", "corpus"]);
    dir.expect(64, &["inspect", "nonsense"]);
}

#[test]
fn ten_mistakes_get_ten_located_diagnostics() {
    let dir = Dir::new();
    dir.write("hook.wasm", "not a component");
    dir.write("docs.jsonl", "{\"text\": \"x\"}\n");
    dir.write(
        "bad.yaml",
        "version: 1
naem: ten
seed: 7
seed: 8
hooks:
  quality: { wasm: hook.wasm, world: document-filter }
stages:
  corpus: { type: ingset, inputs: { documents: docs.jsonl } }
  other: { type: ingest, inputs: { documents: missing/*.parquet }, config: { row_tokens: many } }
  third: { type: ingest, inputs: { document: docs.jsonl }, config: { vocab_sise: 300 } }
  base: { type: ingest, inputs: { documents: other.tokens } }
  last: { type: ingest, inputs: { documents: \"${params.data}\" } }
",
    );
    let (_, err) = dir.expect(64, &["validate", "bad.yaml"]);
    let expected = [
        ("bad.yaml:2:1", "unknown key `naem`"),
        ("bad.yaml:4:1", "the key `seed` stands twice"),
        ("bad.yaml:6:20", "world document-filter"),
        ("bad.yaml:8:19", "no stage type `ingset`"),
        ("bad.yaml:9:47", "no file matches"),
        ("bad.yaml:9:90", "`config.row_tokens` takes an integer"),
        ("bad.yaml:10:36", "has no input `document`"),
        ("bad.yaml:10:70", "unknown key `vocab_sise` in `config`"),
        ("bad.yaml:11:46", "input `documents` of stage `base` (line 11, column 3) takes documents"),
        ("bad.yaml:12:46", "no param is called `data`"),
    ];
    for (place, message) in expected {
        let block = err.split("\n\n").find(|block| block.contains(message));
        assert!(block.is_some_and(|block| block.contains(place)), "{place} {message} in\n{err}");
    }
    assert_eq!(err.matches("error: ").count(), expected.len(), "one diagnostic for each mistake\n{err}");
    assert!(err.contains("did you mean `ingest`?") && err.contains("docs.jsonl }"), "{err}");
    let (out, _) = dir.expect(64, &["run", "bad.yaml", "--json"]);
    let last = events(&out).pop().expect("a last event");
    assert_eq!((&last["event"], &last["kind"]), (&"run_finished".into(), &"invalid".into()));
    assert!(last["problems"].as_array().is_some_and(|problems| problems.len() == 10));
}

#[test]
fn hostile_files_are_one_located_problem() {
    let dir = Dir::new();
    for (name, text, place) in [
        ("tab.yaml", "version: 1\nstages:\n\ta: 1\n".to_owned(), "tab.yaml:3:"),
        ("deep.yaml", format!("version: 1\nstages: {}{}\n", "[".repeat(9999), "]".repeat(9999)), "deep.yaml:2:"),
        ("long.yaml", format!("version: 1\nname: '{}'\nstages: 5\n", "x".repeat(10 << 20)), "long.yaml:3:9"),
        ("bom.yaml", "\u{feff}version: 2\nstages: {}\n".to_owned(), "bom.yaml:1:10"),
    ] {
        dir.write(name, &text);
        let (_, err) = dir.expect(64, &["validate", name]);
        assert!(err.contains(place) && err.len() < 10_000, "{place} in\n{err}");
    }
    std::fs::write(dir.0.path().join("latin.yaml"), b"version: 1\nname: caf\xe9\n").expect("a written file");
    let (_, err) = dir.expect(64, &["validate", "latin.yaml"]);
    assert!(err.contains("latin.yaml:2:1") && err.contains("UTF-8"), "{err}");
}

#[test]
fn a_run_is_cached_explained_and_executed_without_its_file() {
    let dir = Dir::new();
    dir.small_pipeline();
    let (out, _) = dir.expect(0, &["validate", "small.yaml"]);
    assert!(out.contains("corpus"), "{out}");
    let (out, _) = dir.expect(0, &["plan", "small.yaml"]);
    assert!(out.contains("corpus") && out.contains("  run"), "{out}");
    dir.expect(0, &["run", "small.yaml", "--dry-run"]);
    assert!(!dir.0.path().join("runs/runs").exists(), "a dry run leaves no run behind");

    let (out, _) = dir.expect(0, &["run", "small.yaml", "--json"]);
    let seen = events(&out);
    let names: Vec<&str> = seen.iter().filter_map(|event| event["event"].as_str()).collect();
    for name in ["run_started", "stage_started", "artifact", "stage_finished", "run_finished"] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    assert_eq!(seen.last().map(|event| &event["outcome"]), Some(&"done".into()));

    let started = Instant::now();
    let (out, err) = dir.expect(0, &["run", "small.yaml"]);
    assert!(started.elapsed().as_secs_f64() < 2.0, "a cached run took {:?}", started.elapsed());
    assert!(err.contains("[corpus] finished before"), "{out}\n{err}");

    let (out, _) = dir.expect(0, &["explain", "small.yaml", "corpus"]);
    assert!(out.contains("found finished"), "{out}");
    let (out, _) = dir.expect(0, &["explain", "small.yaml", "corpus", "--set", "vocab=290"]);
    assert!(out.contains("config.vocab_size: 280 -> 290"), "{out}");
    let (_, err) = dir.expect(64, &["explain", "small.yaml", "corpsu"]);
    assert!(err.contains("did you mean `corpus`?"), "{err}");

    std::fs::remove_file(dir.0.path().join("small.yaml")).expect("a removed file");
    let (_, err) = dir.expect(0, &["exec", "last", "corpus"]);
    assert!(err.contains("finished before"), "{err}");
    dir.expect(0, &["resume"]);
    let (out, _) = dir.expect(0, &["runs"]);
    assert_eq!(out.lines().count(), 3, "a head and two runs: {out}");
    assert!(out.contains("done") && out.contains("1/1"), "{out}");
    let (out, _) = dir.expect(0, &["inspect", "last", "corpus"]);
    let result: Value = serde_json::from_str(&out).expect("a result");
    let digest = result["outputs"][0]["digest"].as_str().expect("a digest");
    let (out, _) = dir.expect(0, &["inspect", digest]);
    assert!(out.contains("\"kind\": \"tokens\""), "{out}");
    let (_, err) = dir.expect(64, &["exec", "zzz", "corpus"]);
    assert!(err.contains("no run `zzz`"), "{err}");
}

#[test]
fn selections_and_stores_are_taken_from_the_command_line() {
    let dir = Dir::new();
    dir.small_pipeline();
    dir.expect(64, &["run", "small.yaml", "--only", "nothing"]);
    dir.expect(64, &["run", "small.yaml", "--only", "corpus", "--from", "corpus"]);
    dir.expect(64, &["run", "small.yaml", "--store", "s4://x"]);
    dir.expect(0, &["run", "small.yaml", "--only", "corpus", "--store", "file://./elsewhere", "--threads", "1"]);
    assert!(dir.0.path().join("elsewhere/runs").is_dir());
    let (out, _) = dir.expect(0, &["runs", "--store", "elsewhere"]);
    assert!(out.contains("done"), "{out}");
    // The same content under another store has the same key and the same output.
    dir.expect(0, &["run", "small.yaml", "--until", "corpus", "--threads", "2"]);
    let output = |store: &str| {
        let (out, _) = dir.expect(0, &["inspect", "last", "corpus", "--store", store]);
        serde_json::from_str::<Value>(&out).expect("a result")["outputs"].clone()
    };
    assert_eq!(output("runs"), output("elsewhere"));
}

#[test]
fn a_truncated_blob_runs_its_stage_again_and_says_why() {
    let dir = Dir::new();
    dir.small_pipeline();
    dir.expect(0, &["run", "small.yaml"]);
    let blobs = std::fs::read_dir(dir.0.path().join("runs/blobs")).expect("blobs");
    let largest =
        blobs.flatten().max_by_key(|blob| blob.metadata().map_or(0, |metadata| metadata.len())).expect("a blob");
    let file = std::fs::OpenOptions::new().write(true).open(largest.path()).expect("a blob");
    file.set_len(10).expect("a cut blob");
    let (_, err) = dir.expect(0, &["run", "small.yaml"]);
    assert!(err.contains("has 10 bytes instead of") && err.contains("[corpus] done"), "{err}");
    let (_, err) = dir.expect(0, &["run", "small.yaml"]);
    assert!(err.contains("finished before"), "{err}");
}

#[test]
fn a_read_only_or_missing_place_is_said_with_its_code() {
    let dir = Dir::new();
    dir.small_pipeline();
    dir.write("file", "");
    let (_, err) = dir.expect(69, &["run", "small.yaml", "--store", "file://./file/below"]);
    assert!(err.contains("file/below"), "{err}");
    dir.write("in/documents.jsonl", "{\"text\": \"good\"}\n{\"text\": 5");
    let (_, err) = dir.expect(65, &["run", "small.yaml"]);
    assert!(err.contains("documents.jsonl") && err.contains("stage `corpus`"), "{err}");
}

#[test]
fn the_committed_schema_is_that_of_the_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/pipeline.schema.json");
    let (out, _) = Dir::new().expect(0, &["schema"]);
    if std::env::var_os("DSV3_UPDATE").is_some() {
        std::fs::write(&path, &out).expect("a written schema");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == out, "schemas/pipeline.schema.json is stale: DSV3_UPDATE=1 cargo test committed_schema");
}

#[test]
fn bench_reports_fractions_that_can_be_checked() {
    let dir = Dir::new();
    for (work, more) in
        [("train", &["--no-mtp"][..]), ("decode", &["--context", "16"]), ("prefill", &["--context", "16"])]
    {
        let mut args =
            vec!["bench", work, "--config", "demo", "--steps", "2", "--warmup", "0", "--threads", "2", "--json"];
        args.extend(more);
        let (out, _) = dir.expect(0, &args);
        let report: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"));
        let number = |name: &str| report[name].as_f64().unwrap_or_else(|| panic!("{name} in {report}"));
        let rates = number("tokens_per_second") * number("model_flops_per_token") * 1e-9 / number("ceiling_gflops");
        assert!(number("tokens_per_second") > 0.0 && number("bandwidth_gb_per_second") > 0.0, "{report}");
        // A ceiling of decoding may be the memory's.
        let near = (number("fraction") / rates - 1.0).abs() < 1e-9;
        assert!(near || (work == "decode" && report["bound"] == "memory"), "{report}");
        assert_eq!((number("threads"), number("steps"), report["precision"].as_str()), (2.0, 2.0, Some("f32")));
        assert!(report["peak_bytes"].as_u64().is_none_or(|bytes| bytes > 1 << 20), "{report}");
        assert!(report["isa"].is_string() && report["config"] == "demo" && report["mtp"] == false, "{report}");
        let (gemm, own) = (number("ceiling_gemm_gflops"), number("ceiling_own_gflops"));
        assert!(gemm > 0.0 && own > 0.0 && number("ceiling_gflops") == gemm.max(own), "{report}");
    }
    dir.expect(64, &["bench", "train", "--config", "L"]);
    dir.expect(64, &["bench", "train", "--config", "XL"]);
    dir.expect(64, &["bench", "fly", "--config", "demo"]);
    let (_, err) = dir.expect(64, &["bench", "decode", "--config", "demo", "--perf-control", "no/such/fifo"]);
    assert!(err.contains("no/such/fifo"), "{err}");
}

/// The narrower set is used where the machine has it, and named where it does not.
#[test]
fn bench_runs_on_the_instruction_set_asked_for() {
    let dir = Dir::new();
    let args = ["bench", "decode", "--config", "demo", "--steps", "1", "--context", "16", "--json", "--isa", "avx2"];
    #[cfg(target_arch = "x86_64")]
    let found = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    let found = false;
    let (out, err) = dir.expect(if found { 0 } else { 64 }, &args);
    if found {
        let report: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"));
        assert_eq!(report["isa"], "AVX2", "{report}");
    } else {
        assert!(err.contains("avx2") && err.contains("portable"), "{err}");
    }
    dir.expect(64, &["bench", "decode", "--config", "demo", "--isa", "sse"]);
}
