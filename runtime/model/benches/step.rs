//! Time of one training step and of decoding at the demo's size: `cargo bench -p dsv3-model`.
//!
//! Prints milliseconds per forward and backward pass with tokens per second, by precision, and decoded tokens per second
//! by batch size.

use std::time::Instant;

use dsv3_model::{Batch, LatentCache, LatentType, Model, ModelConfig, SeqStep, TrainOptions};
use dsv3_ops::{Fp8Format, Fp8Scales, Precision, Tape, Tensor, WeightGrads};

/// The demo's model, `reference/demo.md`.
const CONFIG: &str = r#"{
    "vocab_size": 704, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 32,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4, "q_lora_rank": 96,
    "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    "max_position_embeddings": 512, "num_nextn_predict_layers": 1, "initializer_range": 0.06
}"#;

const STEPS: usize = 5;

fn train_step(model: &Model, batch: &Batch) -> f64 {
    let start = Instant::now();
    let mut tape = Tape::new();
    let out = model.forward_train(&mut tape, batch, TrainOptions::default()).expect("the batch fits");
    let forward = start.elapsed().as_secs_f64();
    let seed =
        |var: &dsv3_ops::Var, value: f32| (var.id(), Tensor::f32(var.value.shape(), vec![value; var.value.numel()]));
    let mut seeds = vec![seed(&out.logp, -1e-3)];
    seeds.extend(out.mtp.iter().map(|mtp| seed(&mtp.logp, -3e-4)));
    seeds.extend(out.balance.iter().map(|(_, loss)| seed(loss, 1e-4)));
    tape.backward(seeds, &mut WeightGrads::default());
    forward
}

fn training(config: &ModelConfig, rows: usize, len: usize) {
    let fp8 = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
    for precision in [Precision::F32, Precision::Bf16, fp8] {
        let mut model = Model::init(config, precision, 1).expect("the configuration is right");
        let text = |row: usize| (0..=len).map(move |i| ((i * 37 + row * 101 + i * i) % 704) as u32).collect::<Vec<_>>();
        let batch = Batch::from_rows((0..rows).map(text));
        train_step(&model, &batch);
        let start = Instant::now();
        let forward: f64 = (0..STEPS).map(|_| train_step(&model, &batch)).sum::<f64>() / STEPS as f64;
        let step = start.elapsed().as_secs_f64() / STEPS as f64;
        let start = Instant::now();
        model.encode();
        println!(
            "train {rows} x {len} {precision:?}: {:.1} ms (forward {:.1}), encode {:.1} ms, {:.0} tokens/s",
            step * 1e3,
            forward * 1e3,
            start.elapsed().as_secs_f64() * 1e3,
            (rows * len) as f64 / step,
        );
    }
}

fn decoding(config: &ModelConfig) {
    let model = Model::init(config, Precision::F32, 1).expect("the configuration is right");
    for sequences in [1, 16, 128] {
        let mut cache = LatentCache::for_tokens(&model, sequences, 96, LatentType::F32);
        let seqs: Vec<_> = (0..sequences).map(|_| cache.start()).collect();
        let prompt: Vec<u32> = (0..32).collect();
        let steps: Vec<SeqStep<'_>> = seqs.iter().map(|seq| SeqStep { seq: *seq, ids: &prompt }).collect();
        let start = Instant::now();
        model.forward_cached(&mut cache, &steps).expect("the cache has room");
        let prefill = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let rounds = 20;
        for token in 0..rounds {
            let ids = [token];
            let steps: Vec<SeqStep<'_>> = seqs.iter().map(|seq| SeqStep { seq: *seq, ids: &ids }).collect();
            let hidden = model.forward_cached(&mut cache, &steps).expect("the cache has room");
            model.logits(&hidden);
        }
        println!(
            "decode, {sequences} sequences: prefill {:.0} tokens/s, {:.0} tokens/s",
            (sequences * 32) as f64 / prefill,
            sequences as f64 * f64::from(rounds) / start.elapsed().as_secs_f64(),
        );
    }
}

fn main() {
    let config = ModelConfig::from_json(CONFIG.as_bytes()).expect("the configuration is right");
    training(&config, 8, 128);
    training(&config, 4, 512);
    decoding(&config);
}
