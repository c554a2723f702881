//! Balance is real: biases choose and do nothing else, no token is dropped, γ levels loads, α reaches the router.
//! Report §2.1.2, `reference/deepseek-v3.md` §3 and §14.

use dsv3_core::mix64;
use dsv3_model::weight_names::Role;
use dsv3_model::{Batch, Model, ModelConfig, TrainOptions};
use dsv3_ops::{Precision, Tape, Tensor, WeightGrads, router};
use dsv3_train::loss::MicroBatch;
use dsv3_train::{Rates, Trainer, TrainerConfig, router_bias};

use super::models::{FP8, bits, config, forward, gradient_of, logps, rows};

fn batch() -> Batch {
    Batch::from_rows(rows(1, 4, 40, 50))
}

fn model(precision: Precision) -> Model {
    let mut model = Model::init(&config(), precision, 3).expect("a model");
    model.biases_mut().iter_mut().flatten().enumerate().for_each(|(i, b)| *b = (i * 7 % 5) as f32 / 64.0);
    model
}

/// Experts of every token in every layer.
fn choices(model: &Model, batch: &Batch) -> Vec<u32> {
    let out = forward(model, batch, TrainOptions { observe: true, ..TrainOptions::default() });
    out.observed.expect("observed").choices.iter().flat_map(|(_, chosen)| chosen.as_u32().to_vec()).collect()
}

#[test]
fn a_constant_on_all_biases_changes_no_bit() {
    let batch = batch();
    for precision in [Precision::F32, FP8] {
        let plain = model(precision);
        // Far below zero, a dropped group that was masked with 0 instead of −∞ would win.
        for constant in [0.25, 4.0, -0.5, -4.0] {
            let mut moved = plain.clone();
            moved.biases_mut().iter_mut().flatten().for_each(|bias| *bias += constant);
            assert_eq!(choices(&moved, &batch), choices(&plain, &batch), "{constant}");
            assert!(bits(&logps(&moved, &batch)) == bits(&logps(&plain, &batch)), "{constant}");
        }
    }
}

#[test]
fn only_a_bias_that_flips_a_choice_changes_anything() {
    let (plain, batch) = (model(Precision::F32), batch());
    let moved = |size: f32| {
        let mut moved = plain.clone();
        moved.biases_mut().iter_mut().flatten().enumerate().for_each(|(i, bias)| *bias += size * (i % 3) as f32);
        moved
    };
    let (small, large) = (moved(1e-6), moved(0.2));
    assert!(small.biases() != plain.biases() && choices(&small, &batch) == choices(&plain, &batch));
    assert!(bits(&logps(&small, &batch)) == bits(&logps(&plain, &batch)));
    assert!(choices(&large, &batch) != choices(&plain, &batch) && logps(&large, &batch) != logps(&plain, &batch));
}

#[test]
fn gates_sum_to_the_scaling_factor_whatever_the_biases() {
    let config = config().router();
    let scores: Vec<f32> = dsv3_ops::testing::values(&[200, 8], 5).into_f32().iter().map(|x| 0.5 + x * 0.49).collect();
    let scores = Tensor::f32(&[200, 8], scores);
    for bias in [[0.0; 8], [0.3, -0.2, 0.1, 0.0, -0.4, 0.2, 0.0, 0.1], [-5.0; 8]] {
        let chosen = router::select(&scores, &bias, &config);
        let gates = router::gates_forward(&scores, &chosen, &config);
        for (row, gates) in gates.as_f32().chunks(2).enumerate() {
            assert!((gates.iter().sum::<f32>() - 2.5).abs() < 1e-5, "row {row}: {gates:?}");
            // And each gate is the unbiased score's share.
            let score = |slot: usize| scores.as_f32()[row * 8 + chosen.as_u32()[row * 2 + slot] as usize];
            assert!((gates[0] - 2.5 * score(0) / (score(0) + score(1))).abs() < 1e-5);
        }
    }
}

#[test]
fn all_tokens_on_one_expert_are_all_computed() {
    // With equal experts it cannot matter where a token goes, unless some are dropped on the way.
    let config = ModelConfig { num_experts_per_tok: 1, topk_group: 1, ..config() };
    let mut even = Model::init(&config, Precision::F32, 5).expect("a model");
    let experts: Vec<u32> = even.infos().iter().filter(|info| info.is_stacked()).map(|info| info.id).collect();
    assert_eq!(experts.len(), 9, "gate, up and down of three layers");
    for id in experts {
        let shape = even.infos()[id as usize].shape.clone();
        let all = even.params()[id as usize].master.clone().expect("a master").into_f32();
        even.set_master(id, Tensor::f32(&shape, all[..all.len() / 8].repeat(8)));
    }
    let mut crowded = even.clone();
    crowded.biases_mut().iter_mut().for_each(|bias| bias[6] = 10.0);
    let batch = batch();
    let out = forward(&crowded, &batch, TrainOptions::default());
    for (layer, loads) in &out.loads {
        let rows = if *layer < 3 { 4 * 39 } else { 4 * 38 };
        assert_eq!(loads[..], [0, 0, 0, 0, 0, 0, rows, 0], "layer {layer}");
    }
    let spread = forward(&even, &batch, TrainOptions::default()).loads;
    assert!(spread.iter().all(|(_, loads)| loads.iter().filter(|load| **load > 0).count() > 2));
    assert!(bits(&logps(&even, &batch)) == bits(&logps(&crowded, &batch)));
}

/// Largest load over mean load (1 is level, 4 is the worst here), mean of the layers, over `steps` of training with γ.
fn curve(gamma: f64, steps: usize) -> Vec<f64> {
    let mut model = Model::init(&config(), Precision::F32, 3).expect("a model");
    // Skewed on purpose: all tokens share a direction, and two experts of one group look for it.
    for info in model.infos().to_vec() {
        let mut master = model.params()[info.id as usize].master.clone().expect("a master");
        match info.role {
            Role::Embedding => master.as_f32_mut().iter_mut().for_each(|value| *value += 0.2),
            Role::Router => master.as_f32_mut()[..64].iter_mut().for_each(|value| *value = value.abs() * 0.5),
            _ => continue,
        }
        model.set_master(info.id, master);
    }
    let config = TrainerConfig { balance_alpha: 0.0, ..TrainerConfig::default() };
    let mut trainer = Trainer::new(model, config).expect("a trainer");
    let rates = Rates { lr: 1e-3, mtp_weight: 0.3, bias_speed: gamma };
    let step = |i: usize| {
        let token = |row: u64, at: u64| (mix64((i as u64) << 32 | row << 16 | at) % 50) as u32;
        let rows = (0..6).map(|row| (0..40).map(|at| token(row, at)).collect::<Vec<u32>>());
        let batch = MicroBatch::from(Batch::from_rows(rows));
        let loads = trainer.train_step(&[batch], rates).expect("a step").loads;
        loads.values().map(|loads| router_bias::imbalance(loads)).sum::<f64>() / loads.len() as f64
    };
    (0..steps).map(step).collect()
}

#[test]
fn gamma_levels_a_skewed_router_and_nothing_else_does() {
    let (with, without) = (curve(0.005, 200), curve(0.0, 200));
    // The curve in `tests/README.md`.
    for i in (0..200).step_by(25).chain([199]) {
        println!("step {i:3}  with γ {:.2}  without {:.2}", with[i], without[i]);
    }
    let late = |curve: &[f64]| curve[180..].iter().sum::<f64>() / 20.0;
    assert!(with[0] == without[0] && with[0] > 2.4, "skewed at first: {}", with[0]);
    assert!(late(&with) < 2.0, "level at last: {}", late(&with));
    assert!(late(&without) > 3.0, "still skewed without: {}", late(&without));
}

#[test]
fn alpha_alone_gives_the_router_its_finite_differences() {
    let batch = Batch::from_rows(rows(2, 2, 12, 50));
    let model = model(Precision::F32);
    let loss = |model: &Model| {
        let out = forward(model, &batch, TrainOptions::default());
        out.balance.iter().map(|(_, loss)| f64::from(loss.value.as_f32()[0])).sum::<f64>()
    };
    let (mut tape, mut grads) = (Tape::new(), WeightGrads::default());
    let out = model.forward_train(&mut tape, &batch, TrainOptions::default()).expect("the batch suits the model");
    let seeds = out.balance.iter().map(|(_, loss)| (loss.id(), Tensor::f32(&[1], vec![1.0]))).collect();
    tape.backward(seeds, &mut grads);
    // The last main layer and the prediction module's: one α for all.
    let routers: Vec<_> = model.infos().iter().filter(|info| info.role == Role::Router).cloned().collect();
    assert_eq!(routers.len(), 3);
    for info in &routers[1..] {
        let computed = gradient_of(&model, &grads, &info.name);
        let largest = computed.iter().fold(0.0_f32, |most, g| most.max(g.abs()));
        assert!(largest > 1e-3, "{}: {largest}", info.name);
        for element in (0..computed.len()).step_by(37) {
            let at = |delta: f32| {
                let mut moved = model.clone();
                let mut master = moved.params()[info.id as usize].master.clone().expect("a master");
                master.as_f32_mut()[element] += delta;
                moved.set_master(info.id, master);
                loss(&moved)
            };
            let measured = (at(0.002) - at(-0.002)) / 0.004;
            let error = (measured - f64::from(computed[element])).abs();
            assert!(
                error < 0.02 * f64::from(largest),
                "{} [{element}]: {} and {measured}",
                info.name,
                computed[element]
            );
        }
    }
}
