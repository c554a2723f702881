//! The seeds of the corpus: small good inputs of every kind, and the nasty ones that are known. Written by
//! `DSV3_UPDATE=1 cargo test --test main fuzz`; the first byte chooses a kind where the body says so.

use std::path::Path;

use dsv3_data::{Tokenizer, TrainOptions};
use dsv3_model::{Model, ModelConfig, SaveFormat, save};
use dsv3_ops::{Fp8Scales, Precision};
use serde_json::{Map, Value, json};

use super::bodies::{CONFIG, DOCUMENTS};

/// Name and bytes.
type Seed = (String, Vec<u8>);

/// Writes `corpus/TARGET/seed-NAME`.
pub(crate) fn write(corpus: &Path) {
    for (target, seeds) in [
        ("yaml", yaml()),
        ("manifest", manifest()),
        ("safetensors", safetensors()),
        ("tokenizer", tokenizer()),
        ("http", http()),
    ] {
        let folder = corpus.join(target);
        std::fs::create_dir_all(&folder).expect("a folder");
        for (name, bytes) in seeds {
            std::fs::write(folder.join(format!("seed-{name}")), bytes).expect("written");
        }
    }
}

fn numbered(kind: u8, texts: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Vec<Seed> {
    let seed = |(i, text): (usize, _)| (format!("{kind}-{i:02}"), [&[kind][..], AsRef::<[u8]>::as_ref(&text)].concat());
    texts.into_iter().enumerate().map(seed).collect()
}

fn yaml() -> Vec<Seed> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let life = std::fs::read(root.join("tests/data/tiny/life.yaml")).expect("the recipe");
    let small = format!(
        "version: 1\nname: x\nparams: {{ rows: 16 }}\nstages:\n  a: {{ type: ingest, inputs: {{ documents: {DOCUMENTS} }}, config: {{ \
         vocab_size: 270, row_tokens: '${{params.rows}}' }} }}\n"
    );
    let stage = |config: &str| small.replace("row_tokens: '${params.rows}'", config).into_bytes();
    let mut bomb = "version: 1\nx-0: &a0 [x, x, x, x, x]\n".to_owned();
    (1..12).for_each(|i| bomb += &format!("x-{i}: &a{i} [*a{0}, *a{0}, *a{0}, *a{0}, *a{0}]\n", i - 1));
    let texts: Vec<(&str, Vec<u8>)> = vec![
        ("life", life),
        ("small", small.clone().into_bytes()),
        ("empty", Vec::new()),
        ("scalar", b"7".to_vec()),
        ("bom", format!("\u{feff}{small}").into_bytes()),
        ("crlf", small.replace('\n', "\r\n").into_bytes()),
        ("tabs", b"version: 1\nstages:\n\ta: {}\n".to_vec()),
        ("twice", b"version: 1\nversion: 1\nstages: {}\nstages: {}\n".to_vec()),
        ("bomb", bomb.into_bytes()),
        ("long-text", format!("x-a: &a {}\nx-b: [*a, *a, *a]\nversion: 1\n", "x".repeat(4000)).into_bytes()),
        ("loop", b"version: 1\nstages: &s [*s]\n".to_vec()),
        ("merge", b"x-a: &a { type: ingest }\nversion: 1\nstages: { a: { <<: *a }, b: { <<: [*a, *a] } }\n".to_vec()),
        ("merge-wrong", b"version: 1\nstages: { a: { <<: 3 }, b: { <<: [1, a] } }\n".to_vec()),
        ("deep", format!("version: 1\nstages: {}{}\n", "[".repeat(300), "]".repeat(300)).into_bytes()),
        ("deep-maps", (0..150).map(|i| format!("{}k:\n", " ".repeat(i))).collect::<String>().into_bytes()),
        ("documents", b"version: 1\n---\nversion: 1\n".to_vec()),
        ("tags", b"version: !!int '1'\nname: !x y\nstages: !!map {}\n".to_vec()),
        ("blocks", b"version: 1\nname: |\n  a\n  b\nx-c: >-\n  d\n\n  e\nstages: {}\n".to_vec()),
        ("keys", b"version: 1\n? [a, b]\n: 1\n? {c: d}\n: 2\nstages: {}\n".to_vec()),
        ("numbers", stage("row_tokens: 1e3, shard_tokens: 0x10, fim: { rate: .inf }")),
        ("negative", stage("row_tokens: -1, shard_tokens: 18446744073709551616, fim: { rate: .nan }")),
        ("unknown", stage("row_tokenz: 1")),
        ("align", stage("align: { tokens: 0, sources: [] }")),
        ("nulls", b"version:\nname: ~\nstages:\n  a:\n".to_vec()),
        ("cycle", b"version: 1\nstages:\n  a: { type: ingest, inputs: { documents: b.report } }\n  b: { type: ingest, inputs: { documents: a.report } }\n".to_vec()),
        ("params", b"version: 1\nparams: { a: '${params.b}', b: '${params.a}', c: '${env.HOME}', d: '$${x}' }\nname: ${params.a}\nstages: {}\n".to_vec()),
        ("floors", format!("{small}    floors: {{ x: {{ min: 1 }} }}\n").into_bytes()),
        ("floors-wrong", small.replace("config:", "floors: { x: { min: a, max: 1 } }, notes: { x: 3 }, config:").into_bytes()),
        ("glob", small.replace(DOCUMENTS, "[*.jsonl, x?.parquet]").replace("[*", "['*").replace("l, ", "l', ").into_bytes()),
        ("hooks", b"version: 1\nhooks: { h: { wasm: documents.jsonl, world: reward, limits: { memory_mb: 0, fuel: -1 } } }\nstages: {}\n".to_vec()),
        ("unicode", "version: 1\nname: \"\\u0000\\x41\\ud83d\u{1F600}\"\nstages: { \u{e9}: { type: \u{65e5} } }\n".as_bytes().to_vec()),
        ("line", format!("version: 1\nstages: {{ {} }}\n", "a: {type: x}, ".repeat(200)).into_bytes()),
        ("path", b"version: 1\nstages: { a: { type: ingest, inputs: { documents: [a.b.c, .., ., '', ~] } } }\n".to_vec()),
    ];
    texts.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}

fn manifest() -> Vec<Seed> {
    let digest = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
    let file = json!({ "path": "a/b.json", "digest": digest, "bytes": 3 });
    let manifest = json!({ "format": 1, "kind": "report", "files": [file], "meta": { "steps": 3 } });
    let with = |value: &Value, pointer: &str, to: Value| {
        let mut value = value.clone();
        *value.pointer_mut(pointer).expect("a place") = to;
        value.to_string()
    };
    let mut seeds = numbered(
        0,
        [
            manifest.to_string(),
            with(&manifest, "/format", json!(2)),
            with(&manifest, "/files/0/path", json!("../x")),
            with(&manifest, "/files/0/path", json!("")),
            with(&manifest, "/files/0/digest", json!("zz")),
            with(&manifest, "/files/0/bytes", json!(-1)),
            with(&manifest, "/files/0/bytes", json!(u64::MAX)),
            with(&manifest, "/files", json!([file, { "path": "c", "digest": digest, "bytes": u64::MAX }])),
            with(&manifest, "/files", json!({})),
            with(&manifest, "/kind", json!(null)),
            "[".repeat(3000),
            String::new(),
        ],
    );
    let key = "0123456789abcdef";
    let result = json!({
        "format": 1, "key": key, "type": "ingest", "outputs": [{ "name": "report", "kind": "report", "digest": digest, "bytes": 3 }],
        "metrics": { "loss": { "value": 1.5, "floor": null, "ok": null } }, "last_seq": 2, "lineage": {}, "profile": {}
    });
    seeds.extend(numbered(
        1,
        [result.to_string(), with(&result, "/metrics", json!([])), with(&result, "/format", json!("1"))],
    ));
    let checkpoint = json!({
        "format": 1, "kind": "checkpoint", "key": key, "seq": 1, "epoch": 1, "nonce": "0", "step": 4, "state": { "cursor": 3 },
        "files": []
    });
    seeds.extend(numbered(
        2,
        [
            checkpoint.to_string(),
            with(&checkpoint, "/kind", json!("fence")),
            with(&checkpoint, "/files", json!([file])),
            with(&checkpoint, "/seq", json!(u64::MAX)),
            with(&checkpoint, "/key", json!("another")),
        ],
    ));
    let status = json!({ "format": 1, "state": "running", "unix_millis": 1, "detail": { "pipeline": "x" } });
    let event = json!({ "event": "metric", "stage": "a", "name": "loss", "step": 3, "value": 1.5 });
    seeds.extend(numbered(
        3,
        [
            status.to_string(),
            with(&status, "/unix_millis", json!(1e300)),
            event.to_string(),
            format!("{event}\n{event}\n{{\"ev"),
        ],
    ));
    let holder = json!({ "host": "h", "boot_id": "b", "pid_space": "p", "pid": 1, "process_start": 2, "run": "r" });
    let lease = json!({ "format": 1, "key": key, "epoch": 1, "nonce": "0", "holder": holder });
    seeds.extend(numbered(
        4,
        [lease.to_string(), with(&lease, "/holder/pid", json!(-1)), with(&lease, "/epoch", json!(u64::MAX))],
    ));
    seeds.extend(plans());
    seeds
}

/// A stored plan, made from a pipeline's text, and wrong ones.
fn plans() -> Vec<Seed> {
    use dsv3_pipeline::{ALL, Engine, LoadOptions, Store};
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join(DOCUMENTS), "{\"text\": \"a document\"}\n").expect("written");
    let engine = Engine::builder().stages(ALL).store(Store::with_memory()).build();
    let text = yaml().into_iter().find(|(name, _)| name == "small").expect("a seed").1;
    let text = String::from_utf8(text).expect("text");
    let spec = engine.load_text("p.yaml", &text, folder.path(), &LoadOptions::default()).expect("a pipeline");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let plan = runtime.block_on(engine.plan(spec)).expect("a plan").to_bytes();
    let plan = String::from_utf8(plan).expect("JSON").replace(&folder.path().display().to_string(), "here");
    let whole: Value = serde_json::from_str(&plan).expect("JSON");
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut value = whole.clone();
        change(&mut value);
        value.to_string()
    };
    numbered(
        5,
        [
            plan.clone(),
            changed(&|plan| plan["stages"][0]["type"] = "unheard".into()),
            changed(&|plan| plan["stages"][0]["config"] = json!(3)),
            changed(&|plan| plan["stages"][0]["version"] = json!(u64::MAX)),
            changed(&|plan| plan["sources"] = json!([])),
        ],
    )
}

fn weights(precision: Precision, format: SaveFormat) -> Vec<u8> {
    let config = ModelConfig::from_json(CONFIG.as_bytes()).expect("a configuration");
    let model = Model::init(&config, precision, 3).expect("a model");
    let mut weights = Vec::new();
    save(&model, format, u64::MAX, &mut |name, bytes| {
        if name.ends_with(".safetensors") {
            weights = bytes;
        }
        Ok(())
    })
    .expect("written");
    weights
}

fn safetensors() -> Vec<Seed> {
    let bf16 = weights(Precision::F32, SaveFormat::Bf16);
    let fp8 = weights(Precision::F32, SaveFormat::Fp8(Fp8Scales::F32));
    let (length, rest) = fp8.split_first_chunk::<8>().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let whole: Map<String, Value> = serde_json::from_slice(header).expect("a header");
    let file = |header: &[u8], data: &[u8]| [&(header.len() as u64).to_le_bytes()[..], header, data].concat();
    let edited = |change: &dyn Fn(&mut Map<String, Value>)| {
        let mut header = whole.clone();
        change(&mut header);
        file(&serde_json::to_vec(&header).expect("JSON"), data)
    };
    let name = "model.layers.0.self_attn.o_proj.weight";
    let set = |field: &'static str, value: Value| edited(&|header| header[name][field] = value.clone());
    let mut scale = fp8.clone();
    let offsets = &whole[&format!("{name}_scale_inv")]["data_offsets"];
    let at = fp8.len() - data.len() + offsets[0].as_u64().expect("an offset") as usize;
    scale[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let twice =
        [&b"{\"a\": {\"dtype\": \"F32\", \"shape\": [], \"data_offsets\": [0, 4]}, "[..], &header[1..]].concat();
    let all: Vec<(&str, u8, Vec<u8>)> = vec![
        ("bf16", 0, bf16.clone()),
        ("f32", 0, weights(Precision::F32, SaveFormat::F32)),
        ("fp8", 1, fp8.clone()),
        ("fp8-as-bf16", 0, fp8.clone()),
        ("bf16-as-fp8", 1, bf16),
        ("empty", 0, Vec::new()),
        ("seven-bytes", 0, vec![0; 7]),
        ("no-header", 0, 0_u64.to_le_bytes().to_vec()),
        ("long-header", 0, u64::MAX.to_le_bytes().to_vec()),
        ("half", 1, fp8[..fp8.len() / 2].to_vec()),
        ("tail", 1, [&fp8[..], b"more"].concat()),
        ("list", 0, file(b"[]", &[])),
        ("deep", 0, file("[".repeat(2000).as_bytes(), &[])),
        ("not-utf8", 0, file(b"{\"\xff\": 1}", &[])),
        ("scale-nan", 1, scale),
        ("overlap", 1, set("data_offsets", json!([1, 33]))),
        ("outside", 1, set("data_offsets", json!([u64::MAX - 32, u64::MAX]))),
        ("behind", 1, set("data_offsets", json!([32, 0]))),
        ("shape-huge", 1, set("shape", json!([u64::MAX, u64::MAX]))),
        ("shape-zero", 1, set("shape", json!([0, 4]))),
        ("shape-deep", 1, set("shape", json!(vec![1; 100]))),
        ("type-unheard", 1, set("dtype", json!("F4"))),
        ("type-other", 1, set("dtype", json!("I64"))),
        ("missing", 1, edited(&|header| drop(header.remove(name)))),
        ("more", 1, edited(&|header| drop(header.insert("x".to_owned(), header[name].clone())))),
        ("metadata", 1, edited(&|header| drop(header.insert("__metadata__".to_owned(), json!({ "format": 3 }))))),
        ("twice", 1, file(&twice, data)),
    ];
    all.into_iter().map(|(name, kind, bytes)| (name.to_owned(), [&[kind][..], &bytes].concat())).collect()
}

fn tokenizer() -> Vec<Seed> {
    let documents = (0..40).map(|i| format!("a document of {i} words"));
    let good = Tokenizer::train(documents, &TrainOptions::new(280)).expect("a tokenizer");
    let whole: Value = serde_json::from_slice(good.to_bytes()).expect("JSON");
    let changed = |pointer: &str, to: Value| {
        let mut json = whole.clone();
        *json.pointer_mut(pointer).expect("a place") = to;
        json.to_string()
    };
    let config = r#"{"bos_token": "a", "eos_token": {"content": "<think>"}, "pad_token": 3, "add_bos_token": true}"#;
    let other = |model: Value, split: Value| {
        json!({
            "version": "1.0", "truncation": { "max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right" },
            "padding": null, "added_tokens": [{ "id": 0, "content": "<s>", "single_word": false, "lstrip": true, "rstrip": true,
            "normalized": false, "special": true }], "normalizer": { "type": "NFKC" }, "pre_tokenizer": split,
            "post_processor": null, "decoder": null, "model": model
        })
        .to_string()
    };
    let words = json!({ "<s>": 0, "a": 1, "text": 2, "of": 3 });
    let texts: Vec<(&str, String)> = vec![
        ("bpe", whole.to_string()),
        ("config", format!("{whole}\0{config}")),
        ("config-damaged", format!("{whole}\0{{\"bos_token\": [")),
        (
            "word-level",
            other(json!({ "type": "WordLevel", "vocab": words, "unk_token": "a" }), json!({ "type": "Whitespace" })),
        ),
        ("word-level-strict", other(json!({ "type": "WordLevel", "vocab": words, "unk_token": "?" }), Value::Null)),
        (
            "word-piece",
            other(
                json!({ "type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
                    "vocab": words }),
                json!({ "type": "BertPreTokenizer" }),
            ),
        ),
        (
            "unigram",
            other(
                json!({ "type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["a", -1.5], ["te", -2.0]], "byte_fallback": false }),
                json!({ "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true }),
            ),
        ),
        (
            "unigram-id",
            other(
                json!({ "type": "Unigram", "unk_id": 9, "vocab": [["a", -1.5]], "byte_fallback": true }),
                Value::Null,
            ),
        ),
        ("empty-vocabulary", changed("/model/vocab", json!({}))),
        ("far-id", changed("/model/vocab/a", json!(u32::MAX))),
        ("same-id", changed("/model/vocab/a", json!(9))),
        ("negative-id", changed("/model/vocab/a", json!(-1))),
        ("merges-unknown", changed("/model/merges", json!([["qq", "zz"]]))),
        ("merges-three", changed("/model/merges", json!(["a b c"]))),
        ("dropout", changed("/model/dropout", json!(2.5))),
        ("expression", changed("/pre_tokenizer/pretokenizers/0/pattern/Regex", json!("("))),
        ("expression-empty", changed("/pre_tokenizer/pretokenizers/0/pattern/Regex", json!(""))),
        ("expression-slow", changed("/pre_tokenizer/pretokenizers/0/pattern/Regex", json!("(a+)+$(?=b)"))),
        ("no-decoder", changed("/decoder", Value::Null)),
        ("added-empty", changed("/added_tokens/0/content", json!(""))),
        ("added-far", changed("/added_tokens/0/id", json!(u32::MAX))),
        ("no-special", changed("/added_tokens", json!([]))),
        ("half", whole.to_string()[..3000].to_owned()),
        ("list", "[]".to_owned()),
        ("deep", "[".repeat(3000)),
        ("empty", String::new()),
    ];
    texts.into_iter().map(|(name, text)| (name.to_owned(), text.into_bytes())).collect()
}

fn http() -> Vec<Seed> {
    let completions = [
        r#"{"model": "toy", "prompt": "a b", "max_tokens": 3}"#.to_owned(),
        r#"{"prompt": [40, 41, 42], "max_tokens": 3, "temperature": 0, "echo": true, "logprobs": 2, "stop": ["x", "yz"]}"#.to_owned(),
        r#"{"prompt": [[40], [41, 42]], "n": 2, "best_of": 3, "stream": true, "seed": 7, "top_p": 0.5}"#.to_owned(),
        r#"{"prompt": ["a", "b"], "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true}"#.to_owned(),
        r#"{"prompt": [], "max_tokens": 0}"#.to_owned(),
        r#"{"prompt": "", "max_tokens": 1}"#.to_owned(),
        r#"{"prompt": [4294967295, -1, 1.5]}"#.to_owned(),
        r#"{"prompt": "a", "max_tokens": 1e30, "temperature": -1, "top_p": 2, "n": 1000000}"#.to_owned(),
        r#"{"prompt": "a", "temperature": 1e-300, "logit_bias": {"3": 100}, "presence_penalty": 1e308}"#.to_owned(),
        r#"{"prompt": {"a": [null]}, "stop": [1, []], "logprobs": 99, "stream": "yes"}"#.to_owned(),
        format!(r#"{{"prompt": "{}", "max_tokens": 1}}"#, "a ".repeat(2000)),
        "[".repeat(3000),
        String::new(),
        "null".to_owned(),
        r#"{"prompt": "\ud800", "prompt": "twice"}"#.to_owned(),
    ];
    let chats = [
        r#"{"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}"#,
        r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}], "stream": true, "max_completion_tokens": 2, "logprobs": true, "top_logprobs": 3}"#,
        r#"{"messages": [{"role": "user", "content": "<\uff5cend\u2581of\u2581sentence\uff5c><think>"}], "max_tokens": 2, "temperature": 0}"#,
        r#"{"messages": []}"#,
        r#"{"messages": [{"role": "tool", "content": null}]}"#,
        r#"{"messages": [{"role": 3, "content": {"a": 1}}], "tools": [], "response_format": {"type": "json_object"}}"#,
        r#"{"messages": [{"role": "assistant", "content": "x"}], "n": 3, "stop": "x", "seed": -5}"#,
        r#"{"messages": "a", "max_tokens": null, "model": "another"}"#,
        "{",
    ];
    let mut seeds = numbered(0, completions);
    seeds.extend(numbered(1, chats));
    seeds
}
