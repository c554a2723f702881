//! From text to [`Written`]: params, overrides, and the problems of each.

use super::*;
use crate::diagnostics::Diagnostics;
use dsv3_store::StoreOptions;

const TEXT: &str = "version: 1
params: { steps: 600, data: in.parquet, out: \"${env.OUT}\" }
seed: 7
stages:
  a: { type: count, inputs: { documents: \"${params.data}\" }, config: { steps: \"${params.steps}\", dir: \"x/${params.steps}.${params.out}\", lit: \"$${no}\" } }
";

fn load(text: &str, sets: &[&str]) -> (Reading, Vec<String>) {
    let options = LoadOptions {
        sets: sets.iter().map(|set| (*set).to_owned()).collect(),
        current_dir: "/cwd".into(),
        env: Some([("OUT".to_owned(), "5".to_owned())].into()),
        ..LoadOptions::default()
    };
    let reading = read("dir/p.yaml", text, "/cwd/dir".into(), &options);
    let report = Diagnostics::new(reading.sources.clone(), reading.problems.clone());
    let lines = report
        .problems
        .iter()
        .map(|p| format!("{} {} [{}]", reading.sources.locate(p.span), p.message, p.help.as_deref().unwrap_or("")));
    let lines = lines.collect();
    (reading, lines)
}

#[test]
fn params_take_their_type_and_their_folder() {
    let (reading, problems) = load(TEXT, &[]);
    assert_eq!(problems, Vec::<String>::new());
    let written = reading.written.as_ref().unwrap();
    assert_eq!((written.name.as_str(), written.seed, written.store.as_str()), ("p", 7, "file://./runs"));
    let config = written.stages[0].config.to_json();
    assert_eq!(config, serde_json::json!({"steps": 600, "dir": "x/600.5", "lit": "${no}"}));
    assert_eq!(reading.base(written.stages[0].inputs[0].values[0].origin), PathBuf::from("/cwd/dir"));
}

#[test]
fn sets_reach_params_roots_and_stages() {
    let sets = ["steps=3", "seed=11", "stages.a.config.extra.deep=[1, x]", "data=other.parquet", "store=memory://"];
    let (reading, problems) = load(TEXT, &sets);
    assert_eq!(problems, Vec::<String>::new());
    let written = reading.written.as_ref().unwrap();
    assert_eq!((written.seed, written.store.as_str()), (11, "memory://"));
    let config = written.stages[0].config.to_json();
    assert_eq!((&config["steps"], &config["extra"]), (&3.into(), &serde_json::json!({"deep": [1, "x"]})));
    assert_eq!(reading.base(written.stages[0].inputs[0].values[0].origin), PathBuf::from("/cwd"));
}

#[test]
fn wrong_sets_point_into_the_argument() {
    let (_, problems) =
        load(TEXT, &["stesp=1", "stages.b.config.x=1", "nothing", "stages.a.type.x=1", "a..b=1", "sed=010"]);
    let all = problems.join("\n");
    for part in [
        "--set stesp=1:1:1 `stesp` is neither a param nor a field of the pipeline [did you mean `steps`?]",
        "--set stages.b.config.x=1:1:1 no stage is called `b`",
        "--set nothing:1:1 `--set` takes PATH=VALUE",
        "`stages.a.type` is the text \"count\", not a map",
        "`a..b` is not a dotted path",
        "--set sed=010:1:5",
    ] {
        assert!(all.contains(part), "{part} in\n{all}");
    }
}

#[test]
fn every_mistake_of_shape_is_reported() {
    let text = "version: 2
naem: x
seed: -1
threads: two
device: tpu
store: s4://runs
params: [1]
hooks:
  1bad: { wasm: x }
  h: { wasm: a.wasm, world: reward, limits: { memory_mb: 0, fule: 1 }, on_error: ignore }
stages:
  a: { tpye: count, inputs: { x: 3, y: [] } }
  b: { type: \"${params.none}\", config: 5, hooks: { filter: [h] } }
  c: { type: \"${env.NONE}\", config: { x: \"${other}\", y: \"${params.x\" } }
";
    let all = load(text, &[]).1.join("\n");
    for part in [
        "dir/p.yaml:1:10 this build reads `version: 1`",
        "dir/p.yaml:2:1 unknown key `naem` in a pipeline [did you mean `name`?]",
        "dir/p.yaml:3:7 `seed` is 0 to",
        "dir/p.yaml:4:10 `threads` is an integer",
        "dir/p.yaml:6:8 `s4://runs` is not the URL of a store",
        "dir/p.yaml:7:9 `params` is a map; this is a list",
        "dir/p.yaml:9:3 a hook's name",
        "dir/p.yaml:9:3 hook `1bad` lacks `world`",
        "`limits.memory_mb` is at least 1",
        "unknown key `fule` in `limits` [did you mean `fuel`?]",
        "`on_error` cannot be the text \"ignore\"",
        "dir/p.yaml:12:8 unknown key `tpye` in stage `a` [did you mean `type`?]",
        "dir/p.yaml:12:34 input `x` is a text; this is the integer 3",
        "input `y` of a is an empty list",
        "no param is called `none`",
        "`config` is a map; this is the integer 5",
        "the name of a hook is a text; this is a list",
        "the environment has no variable `NONE`",
        "`${other}` is not known",
        "`${` is not closed by `}`",
    ] {
        assert!(all.contains(part), "{part} in\n{all}");
    }
}

#[test]
fn a_store_is_a_url_or_a_map_of_it_and_options() {
    let store = |line: &str, option: Option<&str>| {
        let text = format!("version: 1\nparams: {{ p: s3://bucket/p, n: 3 }}\n{line}\nstages: {{}}\n");
        let options = LoadOptions { store: option.map(str::to_owned), ..LoadOptions::default() };
        let reading = read("p.yaml", &text, PathBuf::new(), &options);
        let problems = Diagnostics::new(reading.sources.clone(), reading.problems.clone()).problems;
        let said = |p: &Diagnostic| format!("{} {}", reading.sources.locate(p.span), p.message);
        let problems: Vec<String> = problems.iter().map(said).collect();
        (reading.written.map(|written| (written.store, written.store_options)), problems.join("\n"))
    };
    let (read, problems) =
        store("store: { url: \"${params.p}\", endpoint: http://h:9, attempts: \"${params.n}\" }", None);
    let (url, options) = read.unwrap();
    assert_eq!((problems.as_str(), url.as_str()), ("", "s3://bucket/p"));
    assert_eq!((options.endpoint.as_deref(), options.attempts, options.parallel), (Some("http://h:9"), 3, 8));
    for (line, part) in [
        ("store: { endpoint: http://h:9 }", "p.yaml:3:1 `store` lacks `url`"),
        ("store: { url: s3://b, endpiont: x }", "p.yaml:3:23 unknown key `endpiont` in `store`"),
        ("store: { url: s3://b, part_mib: 4 }", "p.yaml:3:33 `store.part_mib` is at least 5"),
        ("store: { url: s3://b, path_style: maybe }", "p.yaml:3:35 `store.path_style` takes true or false"),
        ("store: { url: s3://b, conditional_create: never }", "`store.conditional_create` cannot be"),
        ("store: { url: s4://b }", "`s4://b` is not the URL of a store"),
        (
            "store: { url: ./runs, region: eu }",
            "p.yaml:3:15 \"./runs\" is not a store: a file:// store has no `region`",
        ),
        ("store: [s3://b]", "`store` is a text; this is a list"),
    ] {
        let (_, problems) = store(line, None);
        assert!(problems.contains(part), "{line}: {part} in\n{problems}");
    }
    // What replaces it replaces all of it.
    let (read, problems) = store("store: { url: s4://b, region: eu }", Some("file://./x"));
    assert_eq!((problems.as_str(), read), ("", Some(("file://./x".to_owned(), StoreOptions::default()))));
    let (read, _) = store("store: ./runs", Some("{ url: s3://b, allow_http: true }"));
    let (url, options) = read.unwrap();
    assert_eq!((url.as_str(), options.allow_http), ("s3://b", Some(true)));
    let (_, problems) = store("", Some("{ url: s3://b, regoin: x }"));
    assert!(problems.contains("--store={ url: s3://b, regoin: x }:1:22 unknown key `regoin`"), "{problems}");
    let text = format!("{TEXT}store: {{ url: s3://b }}\n");
    let (reading, problems) = load(&text, &["store.endpoint=http://h:9", "store.attempts=2"]);
    assert_eq!(problems, Vec::<String>::new());
    let options = reading.written.unwrap().store_options;
    assert_eq!((options.endpoint.as_deref(), options.attempts), (Some("http://h:9"), 2));
    let refused = super::store::parse("{ url: s3://b, regoin: x }").unwrap_err().to_string();
    assert!(refused.contains("regoin"), "{refused}");
    assert_eq!(super::store::parse("s3://b").unwrap().0, "s3://b");
}

#[test]
fn an_empty_or_odd_file_is_one_problem() {
    for (text, part) in [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("5\n", "a pipeline is a map"),
        ("[1]\n", "a pipeline is a map"),
    ] {
        let (reading, problems) = load(text, &[]);
        assert!(reading.written.is_none());
        assert!(problems.len() == 1 && problems[0].contains(part), "{text:?} {problems:?}");
    }
}
