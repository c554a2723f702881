//! FP8 is real, and equalities that the design promises. Report §3.3, `reference/deepseek-v3.md` §5 and §14.
//!
//! The sentinel: every tile holds one outlier of 448·u, u a power of two, which makes the tile's scale exactly u; all other
//! values are 17·u, which E4M3 must round to 16·u. So the quantised product is a sum of whole numbers known beforehand,
//! and it differs from the exact one. A diagonal of outliers puts one in every 1×128, 128×1 and 128×128 tile at once.

use std::fs;
use std::sync::Arc;

use dsv3_model::weight_names::Role;
use dsv3_model::{Batch, LoadPrecision, Model, ModelConfig, SaveFormat, TrainOptions, load, save};
use dsv3_ops::{Fp8Scales, Param, Precision, Tape, Tensor, Weight, WeightGrads, attention, grouped_linear, linear};
use dsv3_train::loss::{LossWeights, MicroBatch};
use dsv3_train::{Rates, Trainer, TrainerConfig};

use super::models::{FP8, bits, config, forward, gradients, logps, rows, seeds, wide};

const LOSS: LossWeights = LossWeights { mtp: 0.3, balance: 1e-2 };

/// `[rows, cols]`: 448 where row and column agree modulo 128, `rest` elsewhere.
fn sentinel(rows: usize, cols: usize, rest: f32) -> Tensor {
    let value = |at: usize| if at / cols % 128 == at % cols % 128 { 448.0 } else { rest };
    Tensor::f32(&[rows, cols], (0..rows * cols).map(value).collect())
}

/// y, dx and dw of one linear layer over experts bounded by `offsets`.
fn products(x: Tensor, w: &Tensor, dy: Tensor, offsets: &[usize], precision: Precision) -> [Vec<f32>; 3] {
    let (mut tape, mut grads) = (Tape::new(), WeightGrads::default());
    let param = Param { id: 0, master: Some(w.clone()), compute: Weight::encode(w, &precision) };
    let x = tape.leaf(x);
    let y = match w.shape().len() {
        2 => linear::on_tape(&mut tape, &x, &param),
        _ => grouped_linear::on_tape(&mut tape, &x, &Arc::from(offsets), &param),
    };
    let mut inputs = tape.backward(vec![(y.id(), dy)], &mut grads);
    let dx = inputs.take(x.id()).expect("a gradient of the input");
    [y.value.into_f32(), dx.into_f32(), grads.get(0).expect("a gradient of the weight").clone().into_f32()]
}

#[test]
fn sentinel_products_are_the_quantised_ones() {
    // Experts of 128, 0 and 256 rows: every token tile of the weight gradient is full.
    let (offsets, n, k) = ([0, 128, 128, 384], 256, 128);
    for experts in [1, 3] {
        let run = |rest: f32, precision: Precision| {
            let w: Vec<f32> = (0..experts).flat_map(|_| sentinel(n, k, rest).into_f32()).collect();
            let shape = [experts, n, k];
            let w = Tensor::f32(if experts == 1 { &shape[1..] } else { &shape[..] }, w);
            products(sentinel(384, k, rest), &w, sentinel(384, n, rest), &offsets, precision)
        };
        let (known, exact, fp8) = (run(16.0, Precision::F32), run(17.0, Precision::F32), run(17.0, FP8));
        // By hand: 448·448 where both outliers meet, else 2·448·16 + 126·16·16; k is one tile.
        assert_eq!(known[0][..2], [448.0 * 448.0 + 127.0 * 256.0, 2.0 * 448.0 * 16.0 + 126.0 * 256.0]);
        for (i, name) in ["forward", "dgrad", "wgrad"].iter().enumerate() {
            assert!(fp8[i] == known[i], "{name} with {experts} experts is not the quantised product");
            assert!(fp8[i] != exact[i], "{name}: the sentinel tells the two apart");
        }
    }
}

/// Whether log-probabilities, and whether gradients of the other parameters, stay the same bits when the sentinel's
/// 17·u in parameter `id` becomes 16·u.
fn unmoved(precision: Precision, id: u32, batch: &Batch) -> (bool, bool) {
    let run = |rest: f32| {
        let mut model = Model::init(&config(), precision, 3).expect("a model");
        let shape = model.infos()[id as usize].shape.clone();
        let (matrix, u) = (&shape[shape.len().saturating_sub(2)..], 2.0_f32.powi(-11));
        let matrix = sentinel(matrix.iter().rev().skip(1).product(), matrix[matrix.len() - 1], rest).into_f32();
        let values = matrix.repeat(shape.iter().product::<usize>() / matrix.len());
        model.set_master(id, Tensor::f32(&shape, values.into_iter().map(|v| v * u).collect()));
        let grads = gradients(&model, batch, LOSS);
        let others = model.infos().iter().filter_map(|info| grads.get(info.id));
        let others: Vec<u32> = others.flat_map(|grad| bits(grad.as_f32())).collect();
        (bits(&logps(&model, batch)), others)
    };
    let (a, b) = (run(17.0), run(16.0));
    (a.0 == b.0, a.1 == b.1)
}

#[test]
fn every_linear_layer_of_a_model_is_quantised_and_nothing_else() {
    let batch = Batch::from_rows(rows(1, 3, 24, 50));
    let model = Model::init(&config(), FP8, 3).expect("a model");
    let named = |part: &str| model.infos().iter().any(|info| info.name.contains(part) && info.role != Role::Router);
    assert!(named("shared_experts") && named("eh_proj") && named("mlp.experts"), "the model has them all");
    for info in model.infos() {
        let quantised = matches!(info.role, Role::Linear | Role::Projection);
        let precision = model.params()[info.id as usize].compute.precision();
        let expected = match info.role {
            Role::Linear | Role::Projection => FP8,
            Role::Embedding | Role::Head => Precision::Bf16,
            Role::Norm | Role::Router => Precision::F32,
        };
        assert_eq!(precision, expected, "{}", info.name);
        assert_eq!(unmoved(FP8, info.id, &batch), (quantised, quantised), "{}", info.name);
        assert_eq!(unmoved(Precision::F32, info.id, &batch), (false, false), "{} in F32", info.name);
    }
}

#[test]
fn the_attention_core_is_exact() {
    // 17 and 16 beside 448 in the values: equal to FP8, different to the core, which has no precision to be told.
    let one = |rest: f32| {
        let t = |seed: u64, shape: &[usize]| dsv3_ops::testing::values(shape, seed);
        let (q, k, k_rope) = (t(1, &[6, 1, 16]), t(2, &[6, 1, 8]), t(3, &[6, 8]));
        let v = sentinel(6, 128, rest).reshape(&[6, 1, 128]);
        let kv = (0..6).flat_map(|i| [&k.as_f32()[i * 8..][..8], &v.as_f32()[i * 128..][..128]].concat()).collect();
        let spans = dsv3_ops::Spans::from_lens([6]);
        attention::forward(&q, &Tensor::f32(&[6, 1, 136], kv), &k_rope, &spans, 0.25)
    };
    assert_ne!(bits(one(17.0).as_f32()), bits(one(16.0).as_f32()));
}

#[test]
fn saved_inputs_take_a_byte_an_element() {
    let batch = Batch::from_rows(rows(2, 3, 33, 50));
    let saved = |config: &ModelConfig, precision| {
        let model = Model::init(config, precision, 4).expect("a model");
        let mut tape = Tape::new();
        model.forward_train(&mut tape, &batch, TrainOptions::default()).expect("the batch suits the model");
        tape.saved_input_bytes() as f64
    };
    let elements = saved(&wide(), Precision::Bf16) / 2.0;
    assert!(elements > 0.0);
    // In F32 the rows of the experts are gathered again instead.
    assert!(saved(&wide(), Precision::F32) < 4.0 * elements);
    let bytes = saved(&wide(), FP8) / elements;
    assert!((1.0..=1.05).contains(&bytes), "{bytes} bytes an element");
    // A ragged tile of width w costs 1 + 4/w; the narrowest input here has 12 columns.
    let ragged = saved(&config(), FP8) / (saved(&config(), Precision::Bf16) / 2.0);
    assert!(ragged > bytes && ragged <= 1.0 + 4.0 / 12.0, "{ragged} bytes an element in ragged tiles");
}

#[test]
fn fp8_and_bf16_differ_from_the_first_step() {
    let batch = MicroBatch::from(Batch::from_rows(rows(3, 2, 33, 50)));
    let loss = |precision| {
        let model = Model::init(&wide(), precision, 4).expect("a model");
        let mut trainer = Trainer::new(model, TrainerConfig::default()).expect("a trainer");
        trainer.train_step(std::slice::from_ref(&batch), RATES).expect("a step").losses.main
    };
    let (fp8, bf16) = (loss(FP8), loss(Precision::Bf16));
    assert!(fp8 != bf16 && (fp8 / bf16 - 1.0).abs() < 0.02, "{fp8} and {bf16}");
}

const RATES: Rates = Rates { lr: 1e-3, mtp_weight: 0.3, bias_speed: 1e-3 };

fn written(model: &Model, format: SaveFormat, shard_bytes: u64) -> (tempfile::TempDir, usize) {
    let (folder, mut files) = (tempfile::tempdir().expect("a folder"), 0);
    save(model, format, shard_bytes, &mut |name, bytes| {
        files += 1;
        fs::write(folder.path().join(name), bytes)
    })
    .expect("the model is written");
    (folder, files)
}

/// Doubles F32 number `index` of tensor `name` in a folder with one weights file.
fn double(folder: &std::path::Path, name: &str, index: usize) {
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).expect("the weights");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    let start = header[name]["data_offsets"][0].as_u64().expect("an offset") as usize;
    let at = 8 + length + start + 4 * index;
    let value = f32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    bytes[at..at + 4].copy_from_slice(&(2.0 * value).to_le_bytes());
    fs::write(&path, bytes).expect("written back");
}

#[test]
fn doubling_one_scale_doubles_one_block() {
    // 128 × 256: blocks 0 and 1 side by side.
    let name = "model.layers.0.mlp.down_proj.weight";
    let model = Model::init(&wide(), Precision::F32, 6).expect("a model");
    let (folder, _) = written(&model, SaveFormat::Fp8(Fp8Scales::F32), u64::MAX);
    let own = |folder: &tempfile::TempDir| load(folder.path(), LoadPrecision::Own, false).expect("a folder").model;
    let before = own(&folder);
    double(folder.path(), &format!("{name}_scale_inv"), 1);
    let after = own(&folder);
    for info in model.infos() {
        let weight = |model: &Model| model.params()[info.id as usize].compute.dequantize().into_f32();
        let mut expected = weight(&before);
        if info.name == name {
            assert_eq!(info.shape, [128, 256]);
            expected.chunks_mut(256).flat_map(|row| &mut row[128..]).for_each(|value| *value *= 2.0);
        }
        assert!(weight(&after) == expected, "{}", info.name);
    }
    // The product changes by exactly that block's share: inputs of the other block do not feel it.
    let id = model.infos().iter().find(|info| info.name == name).expect("it exists").id as usize;
    let y = |model: &Model, block: usize| {
        let x = (0..512).map(|i| if i % 256 / 128 == block { (i % 7) as f32 - 3.0 } else { 0.0 }).collect();
        linear::forward(&Tensor::f32(&[2, 256], x), &model.params()[id].compute).into_f32()
    };
    assert_eq!(bits(&y(&before, 0)), bits(&y(&after, 0)));
    assert!(y(&before, 1).iter().zip(y(&after, 1)).all(|(a, b)| *a != 0.0 && 2.0 * a == b));
    let batch = Batch::from_rows(rows(5, 1, 20, 50));
    assert!(logps(&before, &batch) != logps(&after, &batch), "the model feels it");
}

/// Masters and biases after three steps of `micro_batches` on `threads` threads.
fn trained(precision: Precision, threads: usize, micro_batches: &[MicroBatch]) -> Vec<f32> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    pool.install(|| {
        let model = Model::init(&config(), precision, 8).expect("a model");
        let mut trainer = Trainer::new(model, TrainerConfig::default()).expect("a trainer");
        for _ in 0..3 {
            trainer.train_step(micro_batches, RATES).expect("a step");
        }
        let model = &trainer.model;
        let masters = model.params().iter().flat_map(|param| param.master.clone().expect("a master").into_f32());
        masters.chain(model.biases().concat()).collect()
    })
}

fn micro_batches(rows: &[Vec<u32>], each: usize) -> Vec<MicroBatch> {
    rows.chunks(each).map(|rows| Batch::from_rows(rows).into()).collect()
}

#[test]
fn training_has_the_same_bits_on_one_two_and_three_threads() {
    let batches = micro_batches(&rows(6, 6, 91, 50), 3);
    for precision in [Precision::F32, FP8] {
        let one = bits(&trained(precision, 1, &batches));
        assert!(one == bits(&trained(precision, 2, &batches)) && one == bits(&trained(precision, 3, &batches)));
    }
}

#[test]
fn micro_batches_split_a_step_without_changing_it() {
    // The size of a micro-batch belongs to the numerics profile: sums are cut elsewhere, so equal up to rounding.
    let rows = rows(7, 6, 40, 50);
    let step = |each: usize| {
        let model = Model::init(&config(), Precision::F32, 8).expect("a model");
        let mut trainer = Trainer::new(model, TrainerConfig::default()).expect("a trainer");
        let metrics = trainer.train_step(&micro_batches(&rows, each), RATES).expect("a step");
        (metrics.total, metrics.update.grad_norm, metrics.loads, trainer.model.biases().concat())
    };
    let whole = step(6);
    for each in [1, 2, 4] {
        let split = step(each);
        assert!((split.0 - whole.0).abs() < 1e-5 * whole.0, "loss {} and {}", split.0, whole.0);
        assert!((split.1 - whole.1).abs() < 1e-4 * whole.1, "norm {} and {}", split.1, whole.1);
        assert_eq!((split.2, split.3), (whole.2.clone(), whole.3.clone()), "loads and biases are whole numbers");
    }
}

#[test]
fn weight_gradients_may_wait_and_change_no_bit() {
    let batch = Batch::from_rows(rows(8, 4, 40, 50));
    for precision in [Precision::F32, FP8] {
        let model = Model::init(&config(), precision, 8).expect("a model");
        let at_once = gradients(&model, &batch, LOSS);
        // As a zero-bubble schedule may: all activation gradients first, then the weight jobs a few at a time.
        let (mut tape, mut late) = (Tape::new(), WeightGrads::default());
        let out = model.forward_train(&mut tape, &batch, TrainOptions::default()).expect("it suits");
        tape.backward_inputs(seeds(&out, &batch, LOSS, 1));
        assert!(model.infos().iter().all(|info| late.get(info.id).is_none()), "nothing ran yet");
        let mut count = 1;
        while tape.run_deferred(count, &mut late) > 0 {
            count = count % 3 + 1;
        }
        for info in model.infos() {
            let grad = |grads: &WeightGrads| bits(grads.get(info.id).expect("a gradient").as_f32());
            assert!(grad(&at_once) == grad(&late), "{}", info.name);
        }
    }
}

#[test]
fn shards_of_any_size_hold_the_same_model() {
    let model = Model::init(&config(), Precision::F32, 9).expect("a model");
    let batch = Batch::from_rows(rows(9, 2, 20, 50));
    for format in [SaveFormat::F32, SaveFormat::Bf16, SaveFormat::Fp8(Fp8Scales::F32)] {
        let read = |shard_bytes| {
            let (folder, files) = written(&model, format, shard_bytes);
            let model = load(folder.path(), LoadPrecision::Own, false).expect("a folder").model;
            let values = model.params().iter().flat_map(|param| bits(param.compute.dequantize().as_f32())).collect();
            (files, values, bits(forward(&model, &batch, TrainOptions::default()).logp.value.as_f32()))
        };
        let (whole, shards): ((_, Vec<u32>, _), (_, Vec<u32>, _)) = (read(u64::MAX), read(8_000));
        assert!(whole.0 == 2 && shards.0 > 6, "one file against {}", shards.0);
        assert!((whole.1, whole.2) == (shards.1, shards.2), "{format:?}");
    }
}
