//! The report's exceptions to its FP8 recipe (3.3.3): each acts where it should and nowhere else, costs and saves the
//! bytes it should, and changes training little. `reference/deepseek-v3.md` §5 and §14; the quantisers themselves, by hand
//! and against plain references, are tested in `kernels/ops/src/fp8`.

use std::collections::BTreeMap;

use dsv3_model::{Batch, Fp8Exceptions, Model, ModelConfig, TrainOptions};
use dsv3_ops::fp8::Exceptions;
use dsv3_ops::{Precision, Tape, Tensor, WeightGrads};
use dsv3_stage::{InputFacts, Problems};
use dsv3_train::loss::{LossWeights, MicroBatch};
use dsv3_train::{Rates, Trainer, TrainerConfig};
use serde_json::json;

use super::models::{FP8, bits, config, forward, logps, rows, seeds, wide};
use crate::tiny::Place;

const LOSS: LossWeights = LossWeights { mtp: 0.3, balance: 1e-2 };
const NONE: Fp8Exceptions = Fp8Exceptions {
    attention_output_power_of_two: false,
    attention_output_e5m6: false,
    dispatch_power_of_two: false,
    swiglu_inputs_fp8: false,
};
const ATTENTION: Fp8Exceptions = Fp8Exceptions { attention_output_power_of_two: true, ..NONE };
const E5M6: Fp8Exceptions = Fp8Exceptions { attention_output_e5m6: true, ..NONE };
const DISPATCH: Fp8Exceptions = Fp8Exceptions { dispatch_power_of_two: true, ..NONE };
const SWIGLU: Fp8Exceptions = Fp8Exceptions { swiglu_inputs_fp8: true, ..NONE };

fn model(config: &ModelConfig, precision: Precision, exceptions: Fp8Exceptions) -> Model {
    let mut model = Model::init(config, precision, 3).expect("a model");
    model.set_fp8_exceptions(exceptions);
    model
}

/// Sets every parameter whose name ends so to zero.
fn silence(model: &mut Model, ending: &str) {
    for info in model.infos().to_vec().iter().filter(|info| info.name.ends_with(ending)) {
        model.set_master(info.id, Tensor::zeros(&info.shape));
    }
}

/// How a backward pass is run; none of it may change a bit.
#[derive(Clone, Copy, Default)]
struct Way {
    recompute: bool,
    late: bool,
}

/// Bits of every gradient of the training loss, by parameter.
fn gradients(model: &Model, batch: &Batch, way: Way) -> BTreeMap<String, Vec<u32>> {
    let (mut tape, mut grads) = (Tape::new(), WeightGrads::default());
    let options = TrainOptions { recompute: way.recompute, ..TrainOptions::default() };
    let out = model.forward_train(&mut tape, batch, options).expect("the batch suits the model");
    let seeds = seeds(&out, batch, LOSS, out.mtp.len());
    if way.late {
        tape.backward_inputs(seeds);
        while tape.run_deferred(2, &mut grads) > 0 {}
    } else {
        tape.backward(seeds, &mut grads);
    }
    let named = model.infos().iter().map(|info| {
        let grad = grads.get(info.id).map_or_else(Vec::new, |grad| bits(grad.as_f32()));
        assert!(grad.iter().all(|bits| f32::from_bits(*bits).is_finite()), "{}", info.name);
        (info.name.clone(), grad)
    });
    named.collect()
}

/// Whether log-probabilities differ from those without exceptions, and the parameters whose gradients do.
fn moved(exceptions: Fp8Exceptions, change: impl Fn(&mut Model), batch: &Batch) -> (bool, Vec<String>) {
    let [plain, other] = [NONE, exceptions].map(|exceptions| {
        let mut model = model(&config(), FP8, exceptions);
        change(&mut model);
        (bits(&logps(&model, batch)), gradients(&model, batch, Way::default()))
    });
    let differ = plain.1.iter().filter(|(name, grad)| other.1[*name] != **grad).map(|(name, _)| name.clone());
    (plain.0 != other.0, differ.collect())
}

fn all_end_with(names: &[String], ending: &str, count: usize) -> bool {
    names.len() == count && names.iter().all(|name| name.ends_with(ending))
}

/// Rows of 24 tokens, one of two (a single position), and too few positions for eight experts in the second batch.
fn batches() -> [Batch; 2] {
    let mut ragged = rows(1, 3, 24, 50);
    ragged.push(vec![4, 9]);
    [Batch::from_rows(ragged), Batch::from_rows([[7_u32, 3]])]
}

#[test]
fn each_option_marks_its_layers_and_they_stay_marked() {
    let marked = |exceptions| {
        let mut model = model(&config(), Precision::Bf16, exceptions);
        model.set_precision(FP8);
        silence(&mut model, "o_proj.weight");
        let of = |model: &Model, id: u32| model.params()[id as usize].compute.exceptions();
        let names = model.infos().iter().map(|info| (info.name.clone(), of(&model, info.id)));
        names.filter(|(_, marks)| *marks != Exceptions::default()).map(|(name, _)| name).collect::<Vec<_>>()
    };
    // A dense layer, two with experts, and the prediction module's with experts.
    assert!(marked(NONE).is_empty());
    assert!(all_end_with(&marked(ATTENTION), "self_attn.o_proj.weight", 4));
    assert!(all_end_with(&marked(E5M6), "self_attn.o_proj.weight", 4));
    assert!(marked(DISPATCH).iter().all(|name| name.contains(".mlp.experts.")) && marked(DISPATCH).len() == 9);
    assert!(all_end_with(&marked(SWIGLU), ".down_proj.weight", 7));
}

#[test]
fn scales_after_attention_act_at_o_proj_alone() {
    let [batch, _] = batches();
    let (forward_moves, gradients) = moved(ATTENTION, |_| {}, &batch);
    assert!(forward_moves && gradients.len() > 20);
    // With o_proj at zero nothing else feels how its input is rounded: q, k and v keep their scales.
    let (forward_moves, gradients) = moved(ATTENTION, |model| silence(model, "o_proj.weight"), &batch);
    assert!(!forward_moves && all_end_with(&gradients, "o_proj.weight", 4), "{gradients:?}");
    // The first layer's input is the embedding still; its output is what moved first.
    let hidden = |exceptions| {
        let options = TrainOptions { observe: true, ..TrainOptions::default() };
        forward(&model(&config(), FP8, exceptions), &batch, options).observed.expect("asked for").hidden
    };
    let (plain, other) = (hidden(NONE), hidden(ATTENTION));
    assert!(plain[0].as_f32() == other[0].as_f32() && plain[1].as_f32() != other[1].as_f32());
}

#[test]
fn the_e5m6_cache_is_read_by_the_weight_gradient_of_o_proj_alone() {
    let [batch, _] = batches();
    let (forward_moves, gradients) = moved(E5M6, |_| {}, &batch);
    assert!(!forward_moves && all_end_with(&gradients, "o_proj.weight", 4), "{gradients:?}");
}

#[test]
fn dispatch_scales_act_at_routed_experts_alone() {
    let [batch, _] = batches();
    let (forward_moves, gradients) = moved(DISPATCH, |_| {}, &batch);
    assert!(forward_moves && gradients.len() > 20);
    // Shared experts and dense layers keep their scales.
    let (forward_moves, gradients) = moved(DISPATCH, |model| silence(model, "mlp.experts.down_proj.weight"), &batch);
    assert!(!forward_moves && all_end_with(&gradients, ".mlp.experts.down_proj.weight", 3), "{gradients:?}");
}

#[test]
fn swiglu_caches_act_in_the_backward_pass_of_mlps_alone() {
    let [batch, _] = batches();
    let (forward_moves, gradients) = moved(SWIGLU, |_| {}, &batch);
    assert!(!forward_moves, "the forward pass reads the exact products");
    let downs = gradients.iter().filter(|name| name.ends_with("down_proj.weight")).count();
    assert!(downs == 7 && !gradients.iter().any(|name| name == "lm_head.weight"), "{gradients:?}");
    let (_, gradients) = moved(SWIGLU, |model| silence(model, "down_proj.weight"), &batch);
    assert!(all_end_with(&gradients, ".down_proj.weight", 7), "{gradients:?}");
}

#[test]
fn no_option_moves_a_bit_outside_fp8() {
    let [batch, _] = batches();
    for precision in [Precision::F32, Precision::Bf16] {
        let run = |exceptions| {
            let model = model(&config(), precision, exceptions);
            (bits(&logps(&model, &batch)), gradients(&model, &batch, Way::default()))
        };
        assert!(run(NONE) == run(Fp8Exceptions::REPORT), "{precision:?}");
    }
}

#[test]
fn recomputation_deferral_and_threads_change_no_bit_with_all_options() {
    let model = model(&config(), FP8, Fp8Exceptions::REPORT);
    for batch in batches() {
        let run = |threads: usize, recompute: bool, late: bool| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| (bits(&logps(&model, &batch)), gradients(&model, &batch, Way { recompute, late })))
        };
        let one = run(1, false, false);
        assert!(one == run(2, false, true) && one == run(3, true, false) && one == run(2, true, true));
    }
    // Recomputed or not, the same masters after three whole steps.
    let batch = [MicroBatch::from(Batch::from_rows(rows(6, 6, 91, 50)))];
    let trained = |recompute| {
        let config = TrainerConfig { recompute, ..TrainerConfig::default() };
        let mut trainer = Trainer::new(model.clone(), config).expect("a trainer");
        (0..3).for_each(|_| drop(trainer.train_step(&batch, RATES).expect("a step")));
        let masters = trainer.model.params().iter().flat_map(|param| param.master.clone().expect("one").into_f32());
        bits(&masters.collect::<Vec<_>>())
    };
    assert!(trained(false) == trained(true));
}

/// Bytes kept until the backward pass by linear layers, by SwiGLU.
fn saved(config: &ModelConfig, precision: Precision, exceptions: Fp8Exceptions, batch: &Batch) -> [usize; 2] {
    let mut tape = Tape::new();
    let options = TrainOptions::default();
    model(config, precision, exceptions).forward_train(&mut tape, batch, options).expect("it suits");
    [tape.saved_input_bytes(), tape.saved_swiglu_bytes()]
}

#[test]
fn options_keep_the_bytes_they_promise() {
    // Widths are multiples of 128. 96 positions, and 93 of the prediction module; two experts a token and one shared.
    let batch = Batch::from_rows(rows(2, 3, 33, 50));
    let (positions, depth) = (96, 93);
    let of = |exceptions| saved(&wide(), FP8, exceptions, &batch);
    let names = ["none", "attention 2^k", "attention E5M6", "dispatch 2^k", "SwiGLU FP8", "all four"];
    let every = [NONE, ATTENTION, E5M6, DISPATCH, SWIGLU, Fp8Exceptions::REPORT].map(of);
    println!("{:<16}{:>16}{:>16}{:>16}", "bytes kept", "linear inputs", "SwiGLU inputs", "sum");
    for (name, [linear, swiglu]) in names.iter().zip(every) {
        println!("{name:<16}{linear:>16}{swiglu:>16}{:>16}", linear + swiglu);
    }
    let [none, attention, e5m6, dispatch, swiglu, all] = every;
    assert!(none == attention && none == dispatch, "scales alone cost nothing");
    // o_proj reads 128 columns: 1 byte and 4/128 of scale become 1.5 bytes and 1/128.
    let o_rows = 3 * positions + depth;
    assert_eq!(e5m6, [none[0] - o_rows * 132 + o_rows * 193, none[1]]);
    // Inner rows of 128: 256 of the dense layer count twice, each expert row and the shared one once.
    let inner_rows = 2 * positions + (2 * positions + depth) * (2 + 1);
    assert_eq!(swiglu, [none[0] - inner_rows * 132, inner_rows * 2 * 132], "down projections keep nothing");
    assert_eq!(none[1], inner_rows * 2 * 128 * 4, "without the cache both inputs are kept in f32");
    assert!(swiglu[1] as f64 <= 1.05 * (inner_rows * 2 * 128) as f64);
    assert_eq!(all, [e5m6[0] + swiglu[0] - none[0], swiglu[1]]);
    let share = (all[0] + all[1]) as f64 / (none[0] + none[1]) as f64;
    println!("all four keep {share:.3} of the bytes");
    assert!(share < 0.45, "{share}");
}

const RATES: Rates = Rates { lr: 2e-3, mtp_weight: 0.3, bias_speed: 1e-3 };

/// The end of one run says little: rounding elsewhere moves it by percents either way. So ten pairs are compared, each from
/// its own initial weights.
#[test]
fn sixty_steps_end_near_those_without_options() {
    let batch = [MicroBatch::from(Batch::from_rows(rows(11, 6, 40, 50)))];
    let run = |seed, exceptions| {
        let mut model = Model::init(&config(), FP8, seed).expect("a model");
        model.set_fp8_exceptions(exceptions);
        let mut trainer = Trainer::new(model, TrainerConfig::default()).expect("a trainer");
        let losses: Vec<f64> =
            (0..60).map(|_| trainer.train_step(&batch, RATES).expect("a step").losses.main).collect();
        (losses[0], losses[50..].iter().sum::<f64>() / 10.0)
    };
    let ratios: Vec<f64> = (1..=10)
        .map(|seed| {
            let (plain, other) = (run(seed, NONE), run(seed, Fp8Exceptions::REPORT));
            assert!(plain.1 < 0.8 * plain.0 && plain.1 != other.1, "it learns, and the options do something");
            other.1 / plain.1
        })
        .collect();
    let mean = ratios.iter().sum::<f64>() / 10.0;
    let variance = ratios.iter().map(|ratio| (ratio - mean).powi(2)).sum::<f64>() / 9.0;
    let error = (variance / 10.0).sqrt();
    println!(
        "mean loss of steps 51-60 with options over that without: {mean:.4}, standard error {error:.4}; {ratios:.3?}"
    );
    assert!((mean - 1.0).abs() < 0.04 && error < 0.03);
}

#[test]
fn options_need_fp8_and_enter_the_key() {
    let place = Place::new();
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/pipelines/v3-671b.yaml");
    let ended = place.watch(&["validate", recipe, "--set", "stages.base.config.training.precision=bf16"], |_| None);
    assert_eq!(ended.code, Some(64), "{}", ended.errors);
    let places = ended.errors.matches("needs FP8").count();
    assert!(places == 4 && ended.errors.contains("v3-671b.yaml:"), "{}", ended.errors);

    let pretrain = dsv3_stages::ALL.iter().find(|stage| stage.name == "pretrain").expect("the stage");
    let config = |training: serde_json::Value| {
        json!({
            "model": serde_json::to_value(config()).expect("a configuration"), "sequence_tokens": 8,
            "length": {"steps": 1}, "training": training,
            "schedules": {"lr": {"segments": [{"shape": "constant", "lr": 1e-3}]}, "batch": {"sequences": 1}},
        })
    };
    let key = |training| pretrain.key_config(&config(training)).expect("a key");
    let none = key(json!({"precision": {"fp8": {}}}));
    assert_eq!(none["training"].get("fp8_exceptions"), None, "keys from before the options stay what they were");
    for (name, _) in NONE.by_name() {
        let on = |precision| json!({"precision": precision, "fp8_exceptions": {name: true}});
        assert_ne!(key(on(json!({"fp8": {}}))), none, "{name} is semantic");
        let mut problems = Problems::default();
        pretrain.check(&config(on(json!("f32"))), &InputFacts::default(), &mut problems);
        let found: Vec<_> = problems.iter().map(|problem| problem.path.clone()).collect();
        assert_eq!(found, [format!("config.training.fp8_exceptions.{name}")]);
    }
}
