//! Exported folders as somebody without our code reads them: `tests/clients/numpy_forward.py` computes log-probabilities
//! from the equations and the bytes of the files, and the server's must agree.
//!
//! Needs a Python with NumPy: `$DSV3_PYTHON`, else `python3` or `/usr/bin/python3`. Without one the tests say so and pass;
//! `.ci/run` installs it. The scripts beside it that need large packages are run by hand (`tests/README.md`).

use std::path::{Path, PathBuf};
use std::process::Command;

use dsv3_model::{Batch, LoadPrecision, Model, ModelConfig, RopeScaling, SaveFormat, TrainOptions};
use dsv3_ops::{Fp8Scales, Precision, Tape};
use serde_json::{Value, json};

use crate::proof::models::{FP8, rows};
use crate::serve::Server;

/// Between their log-probabilities, in float64, and ours in f32.
const LIMIT: f64 = 1e-3;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// A Python that has NumPy.
fn python() -> Option<PathBuf> {
    let named = std::env::var_os("DSV3_PYTHON").map(PathBuf::from);
    let usual = ["python3", "/usr/bin/python3"].map(PathBuf::from);
    let has_numpy = |python: &PathBuf| {
        let asked = Command::new(python).args(["-c", "import numpy"]).output();
        asked.is_ok_and(|output| output.status.success())
    };
    let found = named.into_iter().chain(usual).find(has_numpy);
    if found.is_none() {
        eprintln!("NOT CHECKED AGAINST NUMPY: no python3 with numpy here (DSV3_PYTHON names one)");
    }
    found
}

/// What NumPy says of the rows.
fn theirs(python: &Path, folder: &Path, rows: &[Vec<u32>]) -> Vec<Value> {
    let ids = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(ids.path(), json!(rows).to_string()).expect("written");
    let mut command = Command::new(python);
    let output = command.arg(file("clients/numpy_forward.py")).arg("--mtp").arg(folder).arg(ids.path()).output();
    let output = output.expect("Python runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().into_iter().flatten().map(|number| number.as_f64().unwrap_or(f64::NAN)).collect()
}

/// Largest difference between the server's log-probabilities and theirs, of every token and of the likeliest next one.
fn worst(server: &Server, rows: &[Vec<u32>], theirs: &[Value]) -> f64 {
    let mut worst = 0.0_f64;
    for (row, theirs) in rows.iter().zip(theirs) {
        let body = json!({
            "prompt": row, "max_tokens": 1, "echo": true, "logprobs": 0, "temperature": 0, "ignore_eos": true
        });
        let ours = numbers(&server.complete(&body)["logprobs"]["token_logprobs"]);
        let mut wanted = numbers(&theirs["logp"]);
        wanted.push(theirs["next"].as_f64().expect("a number"));
        assert_eq!((ours.len(), wanted.len()), (row.len() + 1, row.len()));
        for (a, b) in ours[1..].iter().zip(wanted) {
            worst = worst.max(if (a - b).is_nan() { f64::INFINITY } else { (a - b).abs() });
        }
    }
    worst
}

/// Rows from one token on.
fn some_rows(vocab: usize) -> Vec<Vec<u32>> {
    [1, 2, 7, 60, 120].iter().enumerate().flat_map(|(seed, len)| rows(seed, 1, *len, vocab)).collect()
}

/// Widths beyond one tile of 128 that no tile divides, YaRN, router biases, a prediction module.
fn ragged() -> Model {
    let text = json!({
        "vocab_size": 320, "hidden_size": 160, "intermediate_size": 200, "moe_intermediate_size": 72,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 3, "q_lora_rank": 136,
        "kv_lora_rank": 144, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 40, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "max_position_embeddings": 128, "num_nextn_predict_layers": 1, "initializer_range": 0.1
    });
    let config = ModelConfig::from_json(text.to_string().as_bytes()).expect("a configuration");
    let config = ModelConfig { rope_scaling: Some(RopeScaling::yarn(4.0, 32)), ..config };
    let mut model = Model::init(&config, FP8, 3).expect("a model");
    for (i, bias) in model.biases_mut().iter_mut().flatten().enumerate() {
        *bias = ((i * 7 % 5) as f32 - 2.0) * 0.02;
    }
    model
}

fn write(model: &Model, folder: &Path) {
    dsv3_model::save(model, SaveFormat::Fp8(Fp8Scales::F32), 100_000, &mut |name, bytes| {
        std::fs::write(folder.join(name), bytes)
    })
    .expect("written");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(file("data/oracles/hf-tiny").join(name), folder.join(name)).expect("copied");
    }
}

#[test]
fn the_scripts_pipelines_are_valid() {
    let model = format!("params.model={}", file("data/oracles/hf-tiny").display());
    for (name, sets) in [("wide.yaml", vec![]), ("export.yaml", vec!["--set", &model])] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dsv3-pipeline"));
        let output = command.arg("validate").arg(file("clients").join(name)).args(sets).output().expect("it runs");
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn numpy_agrees_on_plain_folders_with_and_without_yarn() {
    let Some(python) = python() else { return };
    for name in ["hf-tiny", "hf-tiny-yarn"] {
        let folder = file("data/oracles").join(name);
        let rows = some_rows(320);
        let theirs = theirs(&python, &folder, &rows);
        let worst = worst(&Server::start(&folder, &["--precision", "f32"]), &rows, &theirs);
        println!("{name}: largest difference {worst:.1e}");
        assert!(worst < LIMIT, "{name}: {worst}");
    }
}

#[test]
fn numpy_agrees_on_fp8_with_ragged_blocks() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let mut model = ragged();
    write(&model, folder.path());
    let rows = some_rows(320);
    let told = theirs(&python, folder.path(), &rows);
    let server = Server::start(folder.path(), &["--precision", "f32"]);
    let found = worst(&server, &rows, &told);
    println!("ragged FP8: largest difference {found:.1e}");
    assert!(found < LIMIT, "{found}");

    // The prediction module, which no server reports.
    let loaded =
        dsv3_model::load(folder.path(), LoadPrecision::As(Precision::F32), false).expect("our own folder").model;
    for (row, told) in rows.iter().zip(&told).filter(|(row, _)| row.len() > 2) {
        let batch = Batch::from_rows([row]);
        let out = loaded.forward_train(&mut Tape::inference(), &batch, TrainOptions::default()).expect("it fits");
        let wanted = numbers(&told["mtp"]);
        assert_eq!(out.mtp[0].logp.value.numel(), wanted.len());
        for (a, b) in out.mtp[0].logp.value.as_f32().iter().zip(wanted) {
            assert!((f64::from(*a) - b).abs() < LIMIT, "prediction module: {a} is not {b}");
        }
    }

    // The test of the test: one weight of another folder.
    let id = model.infos().iter().find(|info| info.name.ends_with("1.self_attn.o_proj.weight")).expect("a layer").id;
    let mut master = model.params()[id as usize].master.clone().expect("trainable");
    master.as_f32_mut()[5] += 1.0;
    model.set_master(id, master);
    let other = tempfile::tempdir().expect("a folder");
    write(&model, other.path());
    assert!(worst(&server, &rows, &theirs(&python, other.path(), &rows)) > LIMIT);
}
