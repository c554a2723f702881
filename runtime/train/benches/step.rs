//! One training step of the demo's model (`pipelines/full.yaml`): milliseconds and tokens per second by precision.
//!
//! `cargo bench -p dsv3-train --bench step`

use std::time::Instant;

use dsv3_core::Rng;
use dsv3_model::{Batch, Model, ModelConfig};
use dsv3_ops::{Fp8Format, Fp8Scales, Precision};
use dsv3_train::{MicroBatch, Rates, Trainer, TrainerConfig};

const DEMO: &str = r#"{
  "vocab_size": 704, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 32,
  "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4,
  "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 32,
  "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
  "routed_scaling_factor": 2.5, "max_position_embeddings": 2048, "num_nextn_predict_layers": 1,
  "initializer_range": 0.06
}"#;

fn main() {
    let config: ModelConfig = serde_json::from_str(DEMO).expect("the demo's configuration is valid");
    let fp8 = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };
    println!("{:>10} {:>12} {:>9} {:>10} {:>10}", "precision", "rows", "ms/step", "tokens/s", "loss");
    for (rows, length) in [(8, 128), (8, 256), (4, 512), (32, 45)] {
        for (name, precision) in [("f32", Precision::F32), ("bf16", Precision::Bf16), ("fp8", fp8)] {
            let model = Model::init(&config, precision, 1).expect("the demo's configuration is valid");
            let mut trainer = Trainer::new(model, TrainerConfig::default()).expect("the model has masters");
            let mut rng = Rng::new(1);
            let mut step = || -> f64 {
                let tokens = (0..rows).map(|_| (0..=length).map(|_| rng.below(704) as u32).collect());
                let micro: MicroBatch = Batch::from_rows(tokens.collect::<Vec<Vec<u32>>>()).into();
                let rates = Rates { lr: 1e-3, mtp_weight: 0.3, bias_speed: 0.01 };
                trainer.train_step(&[micro], rates).expect("a step succeeds").total
            };
            for _ in 0..3 {
                step();
            }
            let (started, steps) = (Instant::now(), 20);
            let loss = (0..steps).map(|_| step()).last().unwrap_or_default();
            let seconds = started.elapsed().as_secs_f64() / f64::from(steps);
            let rate = (rows * length) as f64 / seconds;
            println!("{name:>10} {rows:>6} x{length:>4} {:>9.1} {rate:>10.0} {loss:>10.4}", 1e3 * seconds);
        }
    }
}
