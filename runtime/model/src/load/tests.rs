//! Folders written and read back, in every format, and folders that are damaged on purpose.

use std::fs;

use dsv3_ops::Tape;

use super::*;
use crate::config::tests::small;
use crate::{Batch, SaveFormat, TrainOptions, save};

fn model() -> Model {
    let mut model = Model::init(&small(), Precision::F32, 11).unwrap();
    model.biases_mut().iter_mut().flatten().enumerate().for_each(|(i, bias)| *bias = i as f32 * 0.001);
    model
}

fn written(model: &Model, format: SaveFormat, shard_bytes: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut names = Vec::new();
    save(model, format, shard_bytes, &mut |name, bytes| {
        names.push(name.to_owned());
        fs::write(folder.path().join(name), bytes)
    })
    .unwrap();
    assert_eq!(names.iter().any(|name| name.ends_with("index.json")), names.len() > 2, "{names:?}");
    folder
}

fn logp(model: &Model) -> Vec<f32> {
    let batch = Batch::from_rows([[3_u32, 9, 27, 31, 43, 29, 37, 11, 33, 49, 47, 41]]);
    let out = model.forward_train(&mut Tape::inference(), &batch, TrainOptions::default()).unwrap();
    out.logp.value.into_f32()
}

#[test]
fn f32_is_exact_whatever_the_shards() {
    let model = model();
    for shard_bytes in [u64::MAX, 20_000, 1] {
        let folder = written(&model, SaveFormat::F32, shard_bytes);
        let loaded = load(folder.path(), LoadPrecision::Own, true).unwrap();
        assert_eq!((&loaded.warnings[..], &loaded.model.config), (&[][..], &model.config));
        assert_eq!(loaded.model.biases(), model.biases());
        for (a, b) in loaded.model.params().iter().zip(model.params()) {
            assert!(a.master.as_ref().unwrap().as_f32() == b.master.as_ref().unwrap().as_f32(), "{}", a.id);
        }
        let served = load(folder.path(), LoadPrecision::Own, false).unwrap().model;
        assert!(!served.is_trainable());
        assert_eq!(logp(&served), logp(&model));
    }
}

#[test]
fn bf16_and_fp8_folders_compute_what_the_model_computes_in_that_precision() {
    let mut model = model();
    for (format, precision) in [
        (SaveFormat::Bf16, Precision::Bf16),
        (SaveFormat::Fp8(Fp8Scales::F32), Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 }),
        (SaveFormat::Fp8(Fp8Scales::Ue8m0), Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::Ue8m0 }),
    ] {
        let folder = written(&model, format, 30_000);
        let loaded = load(folder.path(), LoadPrecision::Own, false).unwrap();
        assert_eq!(loaded.model.precision(), precision);
        assert_eq!(loaded.config.quantization.is_some(), precision != Precision::Bf16);
        model.set_precision(precision);
        let close = logp(&model).iter().zip(logp(&loaded.model)).all(|(a, b)| (a - b).abs() < 0.05);
        assert!(close, "{format:?}");
        // Written again, the same values.
        let again = written(&loaded.model, format, u64::MAX);
        let first = load(folder.path(), LoadPrecision::As(Precision::F32), true).unwrap().model;
        let second = load(again.path(), LoadPrecision::As(Precision::F32), true).unwrap().model;
        for (a, b) in first.params().iter().zip(second.params()) {
            assert!(a.master.as_ref().unwrap().as_f32() == b.master.as_ref().unwrap().as_f32(), "{}", a.id);
        }
        let trainable = load(folder.path(), LoadPrecision::Own, true).unwrap().model;
        assert!(trainable.is_trainable() && trainable.precision() == precision);
    }
}

/// Rewrites the header of the folder's only weights file.
fn edit(folder: &Path, change: impl Fn(&mut serde_json::Map<String, serde_json::Value>)) {
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    change(&mut header);
    let header = serde_json::to_vec(&header).unwrap();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header);
    out.extend(&bytes[8 + length..]);
    fs::write(path, out).unwrap();
}

#[test]
fn absent_modules_are_left_out_with_a_warning() {
    let folder = written(&model(), SaveFormat::F32, u64::MAX);
    edit(folder.path(), |header| header.retain(|name, _| !name.starts_with("model.layers.3.")));
    let loaded = load(folder.path(), LoadPrecision::Own, false).unwrap();
    assert_eq!((loaded.warnings.len(), loaded.model.config.num_nextn_predict_layers), (1, 0));
}

#[test]
fn wrong_tensors_are_named() {
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let folder = written(&model(), SaveFormat::F32, u64::MAX);
    edit(folder.path(), |header| {
        header.remove(name);
    });
    let error = load(folder.path(), LoadPrecision::Own, false).unwrap_err();
    assert!(matches!(&error, Error::Missing { name: missing, .. } if missing == name), "{error}");
    let folder = written(&model(), SaveFormat::F32, u64::MAX);
    edit(folder.path(), |header| header[name]["shape"] = serde_json::json!([32, 16]));
    let error = load(folder.path(), LoadPrecision::Own, false).unwrap_err();
    assert!(matches!(&error, Error::Shape { name: wrong, .. } if wrong == name), "{error}");
    edit(folder.path(), |header| {
        header[name]["shape"] = serde_json::json!([16, 32]);
        header[name]["dtype"] = serde_json::json!("I32");
    });
    let error = load(folder.path(), LoadPrecision::Own, false).unwrap_err();
    assert!(matches!(&error, Error::Type { name: wrong, .. } if wrong == name), "{error}");
}

#[test]
fn damaged_files_give_errors() {
    let folder = written(&model(), SaveFormat::F32, u64::MAX);
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &[0; 64]].concat();
    let tensor = |offsets: &str, shape: &str| {
        header(&format!(r#"{{"lm_head.weight": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}"#))
    };
    let damaged = [
        Vec::new(),
        vec![0; 7],
        whole[..whole.len() - 1].to_vec(),
        whole[..100].to_vec(),
        [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat(),
        header("[1, 2]"),
        header("{\"a\": 5}"),
        header("\u{1}"),
        tensor("[0, 18446744073709551615]", "[50, 32]"),
        tensor("[8, 0]", "[50, 32]"),
        tensor("[0, 16]", "[18446744073709551615, 18446744073709551615]"),
        tensor("[0, 64]", "[4, 4]"),
    ];
    for (i, bytes) in damaged.into_iter().enumerate() {
        fs::write(&path, bytes).unwrap();
        assert!(load(folder.path(), LoadPrecision::Own, false).is_err(), "case {i}");
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(load(folder.path(), LoadPrecision::Own, false), Err(Error::Read { .. })));
    for index in ["", "{}", r#"{"weight_map": {"lm_head.weight": "../model.safetensors"}}"#, r#"{"weight_map": 3}"#] {
        fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        assert!(load(folder.path(), LoadPrecision::Own, false).is_err(), "{index}");
    }
}
