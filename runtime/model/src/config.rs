//! Sizes and switches of a DeepSeek-V3-class model, under their Hugging Face names.
//!
//! The struct is what YAML recipes write and what the rest of the crate reads; `hf_config` reads and writes the
//! `config.json` form, which spells rotary scaling in two ways. Report §2 and §4.2, `reference/deepseek-v3.md` §1.

use dsv3_ops::{rope, router};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

/// A model's architecture. Field names are those of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Rows of the embedding and of the output head; at least the tokenizer's size.
    pub vocab_size: usize,
    /// Width of the residual stream, d.
    pub hidden_size: usize,
    /// Inner width of the dense layers' MLP.
    pub intermediate_size: usize,
    /// Inner width of one expert.
    pub moe_intermediate_size: usize,
    /// Main layers, without multi-token-prediction modules.
    pub num_hidden_layers: usize,
    /// How many of the first layers have a dense MLP instead of experts.
    pub first_k_dense_replace: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Width of the query latent; null or 0 for a direct query projection.
    #[serde(default, deserialize_with = "zero_as_none")]
    pub q_lora_rank: Option<usize>,
    /// Width of the key/value latent that the cache holds.
    pub kv_lora_rank: usize,
    /// Unrotated part of a query or key head.
    pub qk_nope_head_dim: usize,
    /// Rotated part of a query head; the rotated key is shared by all heads.
    pub qk_rope_head_dim: usize,
    /// Width of a value head.
    pub v_head_dim: usize,
    /// Routed experts per layer.
    pub n_routed_experts: usize,
    /// Shared experts: one MLP of this many times `moe_intermediate_size`. May be 0.
    #[serde(default = "one")]
    pub n_shared_experts: usize,
    /// Routed experts a token is sent to.
    pub num_experts_per_tok: usize,
    /// Groups of consecutive experts.
    #[serde(default = "one")]
    pub n_group: usize,
    /// Groups a token may choose experts from.
    #[serde(default = "one")]
    pub topk_group: usize,
    /// Multiplier of the gates.
    #[serde(default = "default_scale")]
    pub routed_scaling_factor: f64,
    /// Whether the gates of the chosen experts are divided by their sum.
    #[serde(default = "yes")]
    pub norm_topk_prob: bool,
    /// ε of every RMSNorm.
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    /// YaRN context extension; absent while pretraining.
    #[serde(default)]
    pub rope_scaling: Option<RopeScaling>,
    /// Longest sequence.
    #[serde(default = "default_positions")]
    pub max_position_embeddings: usize,
    /// Multi-token-prediction modules, D.
    #[serde(default)]
    pub num_nextn_predict_layers: usize,
    /// σ of the initial weights. The report uses 0.006 (its config.json says 0.02).
    #[serde(default = "default_sigma")]
    pub initializer_range: f64,
    /// Token that opens a text.
    #[serde(default)]
    pub bos_token_id: Option<u32>,
    /// Token that ends a text.
    #[serde(default)]
    pub eos_token_id: Option<u32>,
    /// Token that fills a batch.
    #[serde(default)]
    pub pad_token_id: Option<u32>,
}

/// YaRN, in the form of the published code: a ramp that is linear in the dimension index.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RopeScaling {
    /// Always `yarn`.
    #[serde(rename = "type", alias = "rope_type", default)]
    pub kind: ScalingKind,
    /// By how much the context grows.
    pub factor: f64,
    /// Dimensions that turn more often than this within the original context keep their frequency.
    #[serde(default = "default_beta_fast")]
    pub beta_fast: f64,
    /// Dimensions that turn less often than this are slowed down by `factor`.
    #[serde(default = "default_mscale")]
    pub beta_slow: f64,
    /// Numerator of the cosine and sine multiplier.
    #[serde(default = "default_mscale")]
    pub mscale: f64,
    /// Its denominator; squared, it multiplies attention logits. 0 when absent from a published config.
    #[serde(default = "default_mscale")]
    pub mscale_all_dim: f64,
    /// Context length before extension, tokens.
    pub original_max_position_embeddings: usize,
}

/// Kinds of rotary scaling this model knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScalingKind {
    /// YaRN.
    #[default]
    Yarn,
}

impl RopeScaling {
    /// YaRN by `factor` from `original` positions, β 32 and 1, both multipliers 1.
    pub fn yarn(factor: f64, original: usize) -> Self {
        Self {
            kind: ScalingKind::Yarn,
            factor,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: 1.0,
            mscale_all_dim: 1.0,
            original_max_position_embeddings: original,
        }
    }

    /// The kernel's form.
    pub fn to_op(&self) -> rope::Yarn {
        // Published code ignores both multipliers of the cosine unless both are given.
        let mscale = if self.mscale_all_dim == 0.0 { 1.0 } else { self.mscale };
        rope::Yarn {
            factor: self.factor as f32,
            beta_fast: self.beta_fast as f32,
            beta_slow: self.beta_slow as f32,
            mscale: mscale as f32,
            mscale_all_dim: self.mscale_all_dim as f32,
            original_context: self.original_max_position_embeddings,
        }
    }
}

impl ModelConfig {
    /// Whether main layer `layer` has experts; every layer of a prediction module has.
    pub fn is_moe(&self, layer: usize) -> bool {
        layer >= self.first_k_dense_replace
    }

    /// Layers with experts, in order, multi-token-prediction modules included (numbered from `num_hidden_layers`).
    pub fn moe_layers(&self) -> Vec<usize> {
        (self.first_k_dense_replace..self.num_hidden_layers + self.num_nextn_predict_layers).collect()
    }

    /// Width of a query or key head.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// What the router does, in the kernel's form.
    pub fn router(&self) -> router::Config {
        router::Config {
            experts: self.n_routed_experts,
            top_k: self.num_experts_per_tok,
            groups: self.n_group,
            top_groups: self.topk_group,
            scale: self.routed_scaling_factor as f32,
            norm_topk: self.norm_topk_prob,
        }
    }

    /// What attention logits are multiplied by.
    pub fn softmax_scale(&self) -> f32 {
        let yarn = self.rope_scaling.as_ref().map(RopeScaling::to_op);
        rope::softmax_scale(self.qk_head_dim(), yarn.as_ref())
    }
}

fn zero_as_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    Ok(Option::<usize>::deserialize(deserializer)?.filter(|rank| *rank > 0))
}

fn one() -> usize {
    1
}

fn yes() -> bool {
    true
}

fn default_scale() -> f64 {
    2.5
}

fn default_eps() -> f64 {
    1e-6
}

fn default_theta() -> f64 {
    10_000.0
}

fn default_positions() -> usize {
    4096
}

fn default_sigma() -> f64 {
    0.006
}

fn default_beta_fast() -> f64 {
    32.0
}

fn default_mscale() -> f64 {
    1.0
}

#[cfg(test)]
pub(crate) mod tests;
