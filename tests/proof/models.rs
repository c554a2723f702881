//! Tiny models and batches that the proofs share.

use dsv3_model::{Batch, Model, ModelConfig, TrainOptions, TrainOut};
use dsv3_ops::{Fp8Format, Fp8Scales, Precision, Tape, Tensor, VarId, WeightGrads};
use dsv3_train::loss::{self, Divisors, LossWeights, MicroBatch};

/// The recipe's FP8.
pub(crate) const FP8: Precision = Precision::Fp8 { format: Fp8Format::E4m3, scales: Fp8Scales::F32 };

/// One dense layer, two layers with experts, one prediction module; widths that no tile divides.
pub(crate) fn config() -> ModelConfig {
    let json = br#"{
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 12,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "max_position_embeddings": 96, "num_nextn_predict_layers": 1, "initializer_range": 0.2
    }"#;
    ModelConfig::from_json(json).expect("a configuration")
}

/// A model whose linear inputs all have widths that are multiples of 128.
pub(crate) fn wide() -> ModelConfig {
    ModelConfig {
        hidden_size: 128,
        intermediate_size: 256,
        moe_intermediate_size: 128,
        q_lora_rank: Some(128),
        kv_lora_rank: 128,
        v_head_dim: 64,
        initializer_range: 0.1,
        ..config()
    }
}

/// `count` rows of `len` tokens below `vocab`, different for each `seed`.
pub(crate) fn rows(seed: usize, count: usize, len: usize, vocab: usize) -> Vec<Vec<u32>> {
    let token = |row: usize, i: usize| ((i * 31 + row * 17 + i * i * (row + 1) + seed * 7) % vocab) as u32;
    (0..count).map(|row| (0..len).map(|i| token(row, i)).collect()).collect()
}

/// Bits, which compare equal only when they are.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A forward pass without a tape.
pub(crate) fn forward(model: &Model, batch: &Batch, options: TrainOptions) -> TrainOut {
    model.forward_train(&mut Tape::inference(), batch, options).expect("the batch suits the model")
}

/// All log-probabilities of `batch`: main, then prediction modules.
pub(crate) fn logps(model: &Model, batch: &Batch) -> Vec<f32> {
    let out = forward(model, batch, TrainOptions::default());
    let depths = out.mtp.iter().map(|mtp| &mtp.logp);
    std::iter::once(&out.logp).chain(depths).flat_map(|logp| logp.value.as_f32().to_vec()).collect()
}

/// What starts the backward pass of the whole training loss over `batch`.
pub(crate) fn seeds(out: &TrainOut, batch: &Batch, weights: LossWeights, depths: usize) -> Vec<(VarId, Tensor)> {
    let micro = MicroBatch::from(batch.clone());
    let divisors = Divisors::of(std::slice::from_ref(&micro));
    loss::seeds(out, &micro, divisors, weights, depths).1
}

/// Weight gradients of the training loss over `batch`.
pub(crate) fn gradients(model: &Model, batch: &Batch, weights: LossWeights) -> WeightGrads {
    let (mut tape, mut grads) = (Tape::new(), WeightGrads::default());
    let out = model.forward_train(&mut tape, batch, TrainOptions::default()).expect("the batch suits the model");
    let seeds = seeds(&out, batch, weights, model.config.num_nextn_predict_layers);
    tape.backward(seeds, &mut grads);
    grads
}

/// Gradient of the parameter called `name`.
pub(crate) fn gradient_of(model: &Model, grads: &WeightGrads, name: &str) -> Vec<f32> {
    let info = model.infos().iter().find(|info| info.name == name).expect("a parameter");
    grads.get(info.id).map_or_else(Vec::new, |grad| grad.clone().into_f32())
}
