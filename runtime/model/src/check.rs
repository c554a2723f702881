//! What can be known to be wrong with a configuration before anything runs: every problem at once, by field.
//!
//! Invariant: a configuration without problems describes a model whose parameter count fits in a `u64` and whose ops
//! get shapes they accept.

use crate::{ModelConfig, RopeScaling, count};

/// Something wrong with one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Name of the field, dotted below `rope_scaling`.
    pub field: &'static str,
    /// What is wrong, with the numbers.
    pub message: String,
}

/// Most parameters a model may have; beyond it a number in the configuration is a slip.
const PARAMETERS_MAX: u128 = 1 << 45;

/// Most entries of the table of rotations.
const ROTATIONS_MAX: usize = 1 << 28;

#[derive(Default)]
struct Problems(Vec<Problem>);

impl Problems {
    fn push(&mut self, field: &'static str, message: impl Into<String>) {
        self.0.push(Problem { field, message: message.into() });
    }

    fn within(&mut self, field: &'static str, value: usize, min: usize, max: usize) -> bool {
        let inside = (min..=max).contains(&value);
        if !inside {
            self.push(field, format!("{value} is outside {min}..={max}"));
        }
        inside
    }

    fn real(&mut self, field: &'static str, value: f64, inside: bool, wanted: &str) {
        if !value.is_finite() || !inside {
            self.push(field, format!("{value} is not {wanted}"));
        }
    }
}

impl ModelConfig {
    /// Every problem, empty when the model can be built.
    pub fn check(&self) -> Vec<Problem> {
        let mut problems = Problems::default();
        let sizes_fit = self.check_sizes(&mut problems);
        self.check_reals(&mut problems);
        if let Some(scaling) = &self.rope_scaling {
            self.check_scaling(scaling, &mut problems);
        }
        self.check_tokens(&mut problems);
        if sizes_fit {
            self.check_routing(&mut problems);
            let total = count::parameters_wide(self);
            if total > PARAMETERS_MAX {
                problems.push("hidden_size", format!("the sizes make a model of {total} parameters"));
            }
        }
        problems.0
    }

    fn check_sizes(&self, problems: &mut Problems) -> bool {
        let has_experts = self.first_k_dense_replace < self.num_hidden_layers || self.num_nextn_predict_layers > 0;
        let expert_min = usize::from(has_experts);
        let sizes = [
            ("vocab_size", self.vocab_size, 1, 1 << 24),
            ("hidden_size", self.hidden_size, 1, 1 << 17),
            ("intermediate_size", self.intermediate_size, usize::from(self.first_k_dense_replace > 0), 1 << 20),
            ("moe_intermediate_size", self.moe_intermediate_size, expert_min, 1 << 20),
            ("num_hidden_layers", self.num_hidden_layers, 1, 1 << 12),
            ("first_k_dense_replace", self.first_k_dense_replace, 0, self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads, 1, 1 << 12),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1), 1, 1 << 17),
            ("kv_lora_rank", self.kv_lora_rank, 1, 1 << 17),
            ("qk_nope_head_dim", self.qk_nope_head_dim, 1, 1 << 12),
            ("qk_rope_head_dim", self.qk_rope_head_dim, 2, 1 << 12),
            ("v_head_dim", self.v_head_dim, 1, 1 << 12),
            ("n_routed_experts", self.n_routed_experts, expert_min, 1 << 16),
            ("n_shared_experts", self.n_shared_experts, 0, 1 << 8),
            ("num_experts_per_tok", self.num_experts_per_tok, expert_min, 1 << 10),
            ("n_group", self.n_group, 1, 1 << 12),
            ("topk_group", self.topk_group, 1, 1 << 12),
            ("max_position_embeddings", self.max_position_embeddings, 1, 1 << 22),
            ("num_nextn_predict_layers", self.num_nextn_predict_layers, 0, 1 << 6),
        ];
        let mut fit = true;
        for (field, value, min, max) in sizes {
            fit &= problems.within(field, value, min, max);
        }
        if !self.qk_rope_head_dim.is_multiple_of(2) {
            let message = format!("{} is odd; rotary dimensions come in pairs", self.qk_rope_head_dim);
            problems.push("qk_rope_head_dim", message);
        }
        if fit && self.max_position_embeddings * self.qk_rope_head_dim > ROTATIONS_MAX {
            let message = format!("a rotary table of {} positions is too large", self.max_position_embeddings);
            problems.push("max_position_embeddings", message);
        }
        fit
    }

    fn check_routing(&self, problems: &mut Problems) {
        let (experts, groups) = (self.n_routed_experts, self.n_group);
        if experts == 0 {
            return;
        }
        if !experts.is_multiple_of(groups) {
            problems.push("n_group", format!("{experts} routed experts are not divisible into {groups} groups"));
            return;
        }
        if self.topk_group > groups {
            problems.push("topk_group", format!("{} groups cannot be kept of {groups}", self.topk_group));
            return;
        }
        let reachable = experts / groups * self.topk_group;
        if self.num_experts_per_tok > reachable {
            let message = format!(
                "a token takes {} experts, but the {} kept groups of {} hold {reachable}",
                self.num_experts_per_tok,
                self.topk_group,
                experts / groups,
            );
            problems.push("num_experts_per_tok", message);
        }
    }

    fn check_reals(&self, problems: &mut Problems) {
        let scale = self.routed_scaling_factor;
        problems.real("routed_scaling_factor", scale, scale > 0.0 && scale <= 1e6, "a positive factor");
        let eps = self.rms_norm_eps;
        problems.real("rms_norm_eps", eps, eps > 0.0 && eps < 1.0, "between 0 and 1");
        problems.real("rope_theta", self.rope_theta, self.rope_theta > 1.0, "above 1");
        let sigma = self.initializer_range;
        problems.real("initializer_range", sigma, (0.0..=100.0).contains(&sigma), "a standard deviation");
    }

    fn check_scaling(&self, scaling: &RopeScaling, problems: &mut Problems) {
        let factor = scaling.factor;
        problems.real("rope_scaling.factor", factor, (1.0..=1e6).contains(&factor), "at least 1");
        let (fast, slow) = (scaling.beta_fast, scaling.beta_slow);
        problems.real("rope_scaling.beta_slow", slow, slow > 0.0, "positive");
        problems.real("rope_scaling.beta_fast", fast, fast > slow, "above beta_slow");
        let (mscale, all) = (scaling.mscale, scaling.mscale_all_dim);
        problems.real("rope_scaling.mscale", mscale, mscale > 0.0 || all == 0.0, "positive");
        problems.real("rope_scaling.mscale_all_dim", all, all >= 0.0, "0 or positive");
        let original = scaling.original_max_position_embeddings;
        if !problems.within("rope_scaling.original_max_position_embeddings", original, 1, 1 << 22) {
            return;
        }
        if self.max_position_embeddings as f64 > factor * original as f64 + 0.5 {
            let message = format!(
                "{} positions are more than YaRN's factor {factor} makes of the original {original}",
                self.max_position_embeddings,
            );
            problems.push("max_position_embeddings", message);
        }
    }

    fn check_tokens(&self, problems: &mut Problems) {
        let tokens = [
            ("bos_token_id", self.bos_token_id),
            ("eos_token_id", self.eos_token_id),
            ("pad_token_id", self.pad_token_id),
        ];
        for (field, token) in tokens {
            if let Some(id) = token.filter(|id| *id as usize >= self.vocab_size) {
                problems.push(field, format!("token {id} is outside the vocabulary of {}", self.vocab_size));
            }
        }
    }
}
