//! Hostile input: one clear error that says where, the right exit code, no panic, no memory beyond the size of the files.
//!
//! Beside these: `tests/cli.rs` has tabs, deep nesting, a long line, a BOM and Latin-1 in YAML; `tests/faults/damage.rs`
//! and `tests/hooks.rs` damaged Parquet and hooks; the crates' own tests go through every form of each format.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use arrow::{
    array::{Array, ArrayRef, Int64Array, ListBuilder, RecordBatch, StringArray, StringBuilder},
    datatypes::{Field, Schema},
};
use dsv3_data::{Tokenizer, TrainOptions};
use dsv3_model::{LoadPrecision, SaveFormat, check_folder, load, save};
use dsv3_ops::Fp8Scales;
use parquet::arrow::ArrowWriter;
use serde_json::{Map, Value, json};

use crate::tiny::{Ended, Place, file};

/// One error with these parts and this exit code.
fn refuses(ended: &Ended, code: i32, parts: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.errors);
    let errors = ended.errors.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!(errors, 1, "{}", ended.errors);
    assert!(!ended.errors.contains("panicked") && ended.errors.len() < 10_000, "{}", ended.errors);
    for part in parts {
        assert!(ended.errors.contains(part), "{part} in\n{}", ended.errors);
    }
}

#[test]
fn yaml_that_swells_is_one_problem_with_its_place() {
    let place = Place::new();
    let mut bomb = "version: 1\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..20 {
        bomb += &format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 10].join(", "));
    }
    let keys: String = (0..400_000).map(|i| format!("key{i}: {{a: 1, b: [x, y]}}\n")).collect();
    assert!(keys.len() > 10 << 20);
    for (name, text, part) in [
        ("bomb.yaml", bomb, "copies made by aliases"),
        ("keys.yaml", keys, "more than"),
        ("loop.yaml", "version: 1\nstages: &s [*s]\n".to_owned(), "alias"),
        ("twice.yaml", "version: 1\nname: x\nversion: 1\nstages: {}\n".to_owned(), "stands twice"),
    ] {
        let began = Instant::now();
        let ended = place.watch(&["run", &place.write(name, text)], |_| None);
        refuses(&ended, 64, &[part, &format!("{name}:")]);
        assert!(began.elapsed().as_secs() < 20, "{name} took {:?}", began.elapsed());
    }
}

/// The reference checkpoint in FP8, with its tokenizer.
fn fp8_folder(place: &Place, name: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/hf-tiny");
    let model = load(&source, LoadPrecision::Own, false).expect("the reference").model;
    let folder = place.path().join(name);
    std::fs::create_dir(&folder).expect("a folder");
    save(&model, SaveFormat::Fp8(Fp8Scales::F32), u64::MAX, &mut |name, bytes| {
        std::fs::write(folder.join(name), bytes)
    })
    .expect("written");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(source.join(name), folder.join(name)).expect("a copy");
    }
    folder
}

/// Rewrites header and data of the folder's weights.
fn edit(folder: &Path, change: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) {
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).expect("the weights");
    let (length, rest) = bytes.split_first_chunk::<8>().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let mut header = serde_json::from_slice(header).expect("a header");
    let mut data = data.to_vec();
    change(&mut header, &mut data);
    let header = serde_json::to_vec(&header).expect("JSON");
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length[..], &header, &data].concat()).expect("written");
}

const DOWN: &str = "model.layers.1.mlp.experts.3.down_proj.weight";
const UP: &str = "model.layers.1.mlp.experts.3.up_proj.weight";

fn train(place: &Place, folder: &Path) -> Ended {
    let model = format!("model={}", folder.display());
    place.watch(&["run", &file("words.yaml"), "--set", &model], |_| None)
}

#[test]
fn weights_that_overlap_or_lie_outside_are_refused_before_anything_runs() {
    let place = Place::new();
    let offsets = |header: &Map<String, Value>, name: &str| -> [u64; 2] {
        serde_json::from_value(header[name]["data_offsets"].clone()).expect("offsets")
    };
    type Moved = fn([u64; 2], u64) -> [u64; 2];
    let cases: [(&str, Moved, &str); 4] = [
        ("overlap", |[begin, end], _| [begin + 1, end + 1], "share bytes"),
        ("outside", |[begin, end], size| [begin + size, end + size], "does not lie inside the file"),
        ("behind", |[begin, end], _| [end, begin], "does not lie inside the file"),
        ("far", |[begin, _], _| [begin, u64::MAX], "does not lie inside the file"),
    ];
    for (name, moved, part) in cases {
        let folder = fp8_folder(&place, name);
        edit(&folder, |header, data| {
            let own = offsets(header, UP);
            header[UP]["data_offsets"] = json!(moved(own, data.len() as u64));
            if name == "overlap" {
                data.push(0);
            }
        });
        for error in [load(&folder, LoadPrecision::Own, false).err(), check_folder(&folder).err()] {
            let error = error.unwrap_or_else(|| panic!("{name} was taken")).to_string();
            assert!(error.contains(part) && error.contains("model.safetensors") && error.contains(UP), "{error}");
        }
        let ended = train(&place, &folder);
        refuses(&ended, 64, &[part, "model.safetensors", UP, "words.yaml:"]);
        assert!(!place.store().join("runs").exists(), "nothing ran");
    }
}

#[test]
fn a_scale_that_is_no_number_is_named_with_its_block() {
    let place = Place::new();
    let scales = format!("{DOWN}_scale_inv");
    for (name, bad) in [("nan", f32::NAN), ("infinite", f32::INFINITY), ("negative", -1.0)] {
        let folder = fp8_folder(&place, name);
        edit(&folder, |header, data| {
            let [begin, _]: [usize; 2] =
                serde_json::from_value(header[&scales]["data_offsets"].clone()).expect("offsets");
            data[begin..begin + 4].copy_from_slice(&bad.to_le_bytes());
        });
        let error = load(&folder, LoadPrecision::Own, false).expect_err("a bad scale").to_string();
        assert!(error.contains(&scales) && error.contains("block 0"), "{error}");
        if name == "nan" {
            let ended = train(&place, &folder);
            refuses(&ended, 65, &["stage `sft`", &scales, "block 0", "NaN", &folder.display().to_string()]);
            assert!(!ended.errors.contains("artifacts"), "no folder of ours: {}", ended.errors);
        }
    }
}

#[test]
fn absurd_sizes_are_named_by_their_field_and_cost_nothing() {
    let place = Place::new();
    let folder = fp8_folder(&place, "absurd");
    let path = folder.join("config.json");
    let good: Value = serde_json::from_slice(&std::fs::read(&path).expect("the config")).expect("JSON");
    let cases = [
        ("hidden_size", json!(1_u64 << 40)),
        ("vocab_size", json!(u64::MAX)),
        ("num_hidden_layers", json!(1_000_000_000_u64)),
        ("n_routed_experts", json!(1_u64 << 60)),
        ("moe_intermediate_size", json!(1_u64 << 50)),
        ("max_position_embeddings", json!(1_u64 << 62)),
        ("num_nextn_predict_layers", json!(1_000_000_000_000_u64)),
        ("q_lora_rank", json!(1_u64 << 55)),
        ("num_attention_heads", json!(0)),
        ("kv_lora_rank", json!(0)),
        ("qk_rope_head_dim", json!(7)),
        ("hidden_size", json!(1e30)),
        ("vocab_size", json!("320")),
        ("eos_token_id", json!(-4)),
        ("rms_norm_eps", json!(-1.0)),
    ];
    let began = Instant::now();
    for (field, value) in &cases {
        let mut bad = good.clone();
        bad[*field] = value.clone();
        std::fs::write(&path, bad.to_string()).expect("written");
        let error = load(&folder, LoadPrecision::Own, false).err();
        let error = error.unwrap_or_else(|| panic!("{field} was taken")).to_string();
        assert!(error.contains(field), "{field} in {error}");
    }
    assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
    refuses(&train(&place, &folder), 64, &["words.yaml:", "rms_norm_eps"]);
}

/// Name, damaged bytes.
type Damaged = (&'static str, Vec<u8>);

fn damaged_tokenizers(good: &[u8]) -> Vec<Damaged> {
    let whole: Value = serde_json::from_slice(good).expect("JSON");
    let changed = |name, change: &dyn Fn(&mut Value)| -> Damaged {
        let mut json = whole.clone();
        change(&mut json);
        (name, json.to_string().into_bytes())
    };
    let mut latin = good.to_vec();
    let at = latin.windows(3).position(|part| part == b"\"a\"").expect("a token") + 1;
    latin[at] = 0xff;
    vec![
        ("cut", good[..good.len() / 2].to_vec()),
        ("empty", Vec::new()),
        ("not UTF-8", latin),
        ("a list", b"[]".to_vec()),
        ("deep", "[".repeat(100_000).into_bytes()),
        changed("no model", &|json| drop(json.as_object_mut().expect("a map").remove("model"))),
        changed("unknown model", &|json| json["model"]["type"] = "Unheard".into()),
        changed("vocabulary as a list", &|json| json["model"]["vocab"] = json!(["a", "b"])),
        changed("empty vocabulary", &|json| {
            json["model"]["vocab"] = json!({});
            json["model"]["merges"] = json!([]);
        }),
        changed("negative id", &|json| json["model"]["vocab"]["a"] = json!(-1)),
        changed("id as text", &|json| json["model"]["vocab"]["a"] = "7".into()),
        changed("id beyond 32 bits", &|json| json["model"]["vocab"]["a"] = json!(1_u64 << 40)),
        changed("merges of unknown tokens", &|json| json["model"]["merges"] = json!([["qq", "zz"]])),
        changed("merges of three", &|json| json["model"]["merges"] = json!(["a b c"])),
        changed("merges as a number", &|json| json["model"]["merges"] = json!(3)),
        changed("broken expression", &|json| {
            json["pre_tokenizer"] =
                json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false});
        }),
        changed("unknown decoder", &|json| json["decoder"] = json!({"type": "Unheard"})),
        changed("added token without text", &|json| json["added_tokens"] = json!([{"id": 3}])),
    ]
}

#[test]
fn damaged_tokenizers_are_named_and_never_panic() {
    let place = Place::new();
    let documents = (0..100).map(|i| format!("a document of {i} words, a good one"));
    let good = Tokenizer::train(documents, &TrainOptions::new(300)).expect("a tokenizer");
    let damaged = damaged_tokenizers(good.to_bytes());
    assert!(damaged.len() > 10);
    for (name, bytes) in &damaged {
        let path = PathBuf::from(place.write("tokenizer.json", bytes));
        match Tokenizer::from_file(&path) {
            Ok(_) => panic!("{name} was taken"),
            Err(error) => assert!(error.to_string().contains("tokenizer.json"), "{name}: {error}"),
        }
    }
    // Odd, but a tokenizer: whatever is made of it, nothing panics.
    let whole: Value = serde_json::from_slice(good.to_bytes()).expect("JSON");
    for (pointer, value) in [
        ("/model/vocab/a", json!(9)),
        ("/model/vocab/a", json!(u32::MAX)),
        ("/added_tokens/0/id", json!(77)),
        ("/added_tokens/0/content", json!("")),
        ("/pre_tokenizer", Value::Null),
        ("/decoder", Value::Null),
    ] {
        let mut json = whole.clone();
        *json.pointer_mut(pointer).expect("a place") = value;
        if let Ok(odd) = Tokenizer::from_bytes(json.to_string().as_bytes()) {
            let ids = odd.encode("a good document é\u{1F600}").unwrap_or_default();
            odd.decode(&ids);
            odd.decode(&[0, 7, 299, u32::MAX]);
        }
    }
    // Through a stage: a model folder with such a file.
    for (name, bytes) in damaged.iter().filter(|(name, _)| ["cut", "merges of unknown tokens"].contains(name)) {
        let folder = fp8_folder(&place, name);
        std::fs::write(folder.join("tokenizer.json"), bytes).expect("written");
        let path = folder.join("tokenizer.json").display().to_string();
        refuses(&train(&place, &folder), 65, &["stage `sft`", &path]);
    }
}

fn parquet(columns: Vec<(&str, ArrayRef)>) -> Vec<u8> {
    let fields: Vec<Field> =
        columns.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), true)).collect();
    let arrays = columns.into_iter().map(|(_, array)| array).collect();
    let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).expect("a batch");
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).expect("a writer");
    writer.write(&batch).expect("written");
    writer.into_inner().expect("bytes")
}

#[test]
fn parquet_without_rows_with_nulls_or_other_types_is_one_error_of_its_stage() {
    let place = Place::new();
    let texts = |values: Vec<Option<&str>>| -> ArrayRef { Arc::new(StringArray::from(values)) };
    let mut lists = ListBuilder::new(StringBuilder::new());
    lists.append_value([Some("a")]);
    type Columns = Vec<(&'static str, ArrayRef)>;
    let cases: Vec<(&str, Columns, &str)> = vec![
        ("rows", vec![("text", texts(Vec::new()))], "no document"),
        (
            "null",
            vec![("text", texts(vec![Some("a good text of five words"), None]))],
            "row 1 (row group 0): column \"text\"",
        ),
        ("nulls", vec![("text", texts(vec![None, None]))], "row 0 (row group 0): column \"text\""),
        ("number", vec![("text", Arc::new(Int64Array::from(vec![1])))], "column \"text\": has type Int64"),
        ("list", vec![("text", Arc::new(lists.finish()))], "column \"text\": has type List"),
        ("missing", vec![("body", texts(vec![Some("a")]))], "column \"text\": is missing; the file has body"),
        ("blank", vec![("text", texts(vec![Some(""), Some("  \n")]))], "no document is left of 2"),
    ];
    for (name, columns, part) in cases {
        let name = format!("{name}.parquet");
        let set = format!("stages.corpus.inputs.documents={}", place.write(&name, parquet(columns)));
        let ended = place.run(&["--until", "corpus", "--set", &set]);
        // Columns are looked at before anything runs; what the rows hold is found when they are read.
        let code = if part.starts_with("column") { 64 } else { 65 };
        refuses(&ended, code, &[part, "stage `corpus`", "help: "]);
        assert!(part.starts_with("no document") || ended.errors.contains(&name), "{}", ended.errors);
    }
}
