//! Named sizes that measurements are made at, so that a figure says in one word what it is of.
//!
//! `demo` is the model of `pipelines/full.yaml`; `S`, `M` and `L` have neither a prediction module nor a balance loss, as
//! other implementations of the architecture have neither.

use dsv3_model::ModelConfig;

/// A model of fixed sizes with the batch it is measured at.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    /// `demo`, `S`, `M` or `L`.
    pub name: &'static str,
    /// Its sizes.
    pub config: ModelConfig,
    /// Sequences of a training step.
    pub train_sequences: usize,
    /// Tokens of each.
    pub train_tokens: usize,
    /// Weight α of the balance loss in training.
    pub balance_alpha: f64,
}

/// Names that [`named`] knows.
pub const NAMES: [&str; 4] = ["demo", "S", "M", "L"];

/// The configuration of that name.
pub fn named(name: &str) -> Option<Named> {
    match name {
        "demo" => Some(demo()),
        "S" => Some(small()),
        "M" => Some(medium()),
        "L" => Some(large()),
        _ => None,
    }
}

impl Named {
    /// The same without prediction modules and balance loss, as other implementations train it.
    #[must_use]
    pub fn without_mtp(mut self) -> Self {
        self.config.num_nextn_predict_layers = 0;
        self.balance_alpha = 0.0;
        self
    }
}

fn demo() -> Named {
    let config = ModelConfig {
        vocab_size: 704,
        hidden_size: 128,
        intermediate_size: 256,
        moe_intermediate_size: 32,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        q_lora_rank: Some(96),
        kv_lora_rank: 64,
        qk_nope_head_dim: 16,
        qk_rope_head_dim: 32,
        v_head_dim: 32,
        num_nextn_predict_layers: 1,
        initializer_range: 0.06,
        ..small().config
    };
    Named { name: "demo", config, train_sequences: 8, train_tokens: 128, balance_alpha: 1e-4 }
}

fn small() -> Named {
    let config = ModelConfig {
        vocab_size: 4096,
        hidden_size: 256,
        intermediate_size: 704,
        moe_intermediate_size: 128,
        num_hidden_layers: 6,
        first_k_dense_replace: 1,
        num_attention_heads: 8,
        q_lora_rank: Some(96),
        kv_lora_rank: 64,
        qk_nope_head_dim: 32,
        qk_rope_head_dim: 16,
        v_head_dim: 32,
        n_routed_experts: 16,
        n_shared_experts: 1,
        num_experts_per_tok: 4,
        n_group: 4,
        topk_group: 2,
        routed_scaling_factor: 2.5,
        norm_topk_prob: true,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: None,
        max_position_embeddings: 2048,
        num_nextn_predict_layers: 0,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_id: None,
        pad_token_id: None,
    };
    Named { name: "S", config, train_sequences: 16, train_tokens: 256, balance_alpha: 0.0 }
}

fn medium() -> Named {
    let config = ModelConfig {
        vocab_size: 16_384,
        hidden_size: 512,
        intermediate_size: 1408,
        moe_intermediate_size: 192,
        num_hidden_layers: 12,
        q_lora_rank: Some(192),
        kv_lora_rank: 128,
        qk_nope_head_dim: 64,
        qk_rope_head_dim: 32,
        v_head_dim: 64,
        n_routed_experts: 32,
        ..small().config
    };
    Named { name: "M", config, train_sequences: 4, train_tokens: 512, balance_alpha: 0.0 }
}

fn large() -> Named {
    let config = ModelConfig {
        hidden_size: 1024,
        moe_intermediate_size: 512,
        num_hidden_layers: 16,
        n_routed_experts: 64,
        ..medium().config
    };
    Named { name: "L", config, ..medium() }
}

#[cfg(test)]
mod tests {
    use dsv3_model::count::counts;

    use super::*;

    #[test]
    fn every_name_is_a_valid_configuration() {
        for name in NAMES {
            let named = named(name).unwrap();
            assert_eq!((named.name, named.config.check()), (name, vec![]));
        }
        assert_eq!(named("XL"), None);
    }

    /// Each number was added up by hand from the sizes, layer by layer, router biases included.
    #[test]
    fn parameters_are_those_counted_by_hand() {
        let total = |name| counts(&named(name).unwrap().config).total;
        // Vocabulary 2·704·128 and norm 128; attention 3·72,096; dense 98,304; experts 2·(2,064 + 17·12,288).
        assert_eq!(total("demo"), 180_224 + 128 + 216_288 + 98_304 + 421_920);
        // Attention 180,896 a layer: q 61,536, kv 20,544 and 32,768, o 65,536, norms 512.
        assert_eq!(total("S"), 2_097_152 + 256 + 6 * 180_896 + 540_672 + 5 * (4112 + 17 * 98_304));
        // Attention 722,240 a layer: q 245,952, kv 82,048 and 131,072, o 262,144, norms 1024.
        assert_eq!(total("M"), 16_777_216 + 512 + 12 * 722_240 + 2_162_688 + 11 * (16_416 + 33 * 294_912));
        let attention = 344_256 + 163_968 + 131_072 + 524_288 + 2048;
        assert_eq!(total("L"), 33_554_432 + 1024 + 16 * attention + 4_325_376 + 15 * (65_600 + 65 * 1_572_864));
    }
}
