//! What a model costs before it runs: parameters, floating-point operations, memory.
//!
//! Everything is derived from a checked [`ModelConfig`]; nothing is measured. `reference/deepseek-v3.md` §1.4 (counts), §2
//! (cache and FLOPs: the published 250 GFLOPs per token at 4096 tokens are reproduced).

pub mod flops;
mod named;

use dsv3_model::{
    ModelConfig,
    count::{self, Counts},
};
use serde::Serialize;

pub use named::{NAMES, Named, named};

/// Sizes and costs of a model at one sequence length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Parameters.
    pub counts: Counts,
    /// Tokens of a training sequence that the FLOPs are for.
    pub sequence_tokens: u64,
    /// Multiply-adds count twice; forward and backward; attention causal. The embedding look-up costs none.
    pub train_flops_per_token: f64,
    /// Forward pass only, at the end of a context of `sequence_tokens`.
    pub decode_flops_per_token: f64,
    /// Latent cache in BF16, main model.
    pub cache_bytes_per_token: u64,
    /// One byte a parameter and two for the vocabulary matrices, which stay in BF16; block scales and norms left out.
    pub weight_bytes_fp8: u64,
    /// Weights in BF16.
    pub weight_bytes_bf16: u64,
    /// FP32 masters, FP32 gradients and BF16 moments, on all ranks together.
    pub optimizer_state_bytes: u64,
}

impl Estimate {
    /// Estimates `config` for training on sequences of `sequence_tokens`.
    pub fn new(config: &ModelConfig, sequence_tokens: u64) -> Self {
        let counts = count::counts(config);
        let heads = config.num_attention_heads as f64;
        let head_width = (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) as f64;
        // One query against `sequence_tokens` keys, all layers: a multiply-add counts twice.
        let attention = 2.0 * sequence_tokens as f64 * heads * head_width * config.num_hidden_layers as f64;
        let vocabulary = (2 * config.vocab_size * config.hidden_size * (1 + config.num_nextn_predict_layers)) as u64;
        Self {
            counts,
            sequence_tokens,
            train_flops_per_token: 6.0 * counts.active as f64 + 0.5 * 3.0 * attention,
            decode_flops_per_token: 2.0 * counts.active as f64 + attention,
            cache_bytes_per_token: 2
                * ((config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers) as u64,
            weight_bytes_fp8: counts.stored + vocabulary,
            weight_bytes_bf16: 2 * counts.stored,
            optimizer_state_bytes: (4 + 4 + 2 * 2) * (counts.total + counts.mtp_unique),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_costs_of_the_full_size_are_reproduced() {
        let config = include_bytes!("../tests/v3-671b.json");
        let config = dsv3_model::HfConfig::from_json(config).unwrap().model;
        let estimate = Estimate::new(&config, 4096);
        assert!((estimate.train_flops_per_token / 1e9 - 250.46).abs() < 0.01, "{}", estimate.train_flops_per_token);
        assert_eq!(estimate.cache_bytes_per_token, 70_272);
        // 641.29 GiB are stored, scales and norms included.
        assert!((estimate.weight_bytes_fp8 as f64 / 688_574_839_360.0 - 1.0).abs() < 0.002);
    }
}
