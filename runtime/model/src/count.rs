//! Parameter counts: in all, active per token, and as stored with prediction modules. `reference/deepseek-v3.md` §1.4.

use crate::ModelConfig;

/// Sizes of a model in parameters; router biases count, FP8 scales do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// The main model.
    pub total: u64,
    /// What one token is multiplied by in the main model: chosen and shared experts only, without the input embedding.
    pub active: u64,
    /// Prediction modules, without the embedding and head they share.
    pub mtp_unique: u64,
    /// What a checkpoint file holds: the main model and the modules with their repeated embedding and head.
    pub stored: u64,
}

/// Counts of a checked configuration.
pub fn counts(config: &ModelConfig) -> Counts {
    let parts = Parts::of(config);
    let (layers, dense) = (config.num_hidden_layers as u128, config.first_k_dense_replace as u128);
    let modules = config.num_nextn_predict_layers as u128;
    let active_moe = parts.router + (config.num_experts_per_tok as u128 + parts.shared) * parts.expert;
    let active = parts.vocabulary + parts.width + layers * parts.attention + dense * parts.dense;
    Counts {
        total: narrow(main(config, &parts)),
        active: narrow(active + (layers - dense) * active_moe),
        mtp_unique: narrow(modules * parts.module),
        stored: narrow(main(config, &parts) + modules * (parts.module + 2 * parts.vocabulary)),
    }
}

/// Everything stored, wide enough for any sizes that `check` lets pass one by one.
pub(crate) fn parameters_wide(config: &ModelConfig) -> u128 {
    let parts = Parts::of(config);
    main(config, &parts) + config.num_nextn_predict_layers as u128 * (parts.module + 2 * parts.vocabulary)
}

fn main(config: &ModelConfig, parts: &Parts) -> u128 {
    let (layers, dense) = (config.num_hidden_layers as u128, config.first_k_dense_replace as u128);
    2 * parts.vocabulary + parts.width + layers * parts.attention + dense * parts.dense + (layers - dense) * parts.moe
}

fn narrow(count: u128) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

struct Parts {
    width: u128,
    /// One vocabulary matrix.
    vocabulary: u128,
    /// Attention of one layer with its inner norms and the block's two norms.
    attention: u128,
    dense: u128,
    expert: u128,
    shared: u128,
    /// Router and its bias.
    router: u128,
    /// Feed-forward part of a layer with experts.
    moe: u128,
    /// One prediction module without embedding and head.
    module: u128,
}

impl Parts {
    fn of(config: &ModelConfig) -> Self {
        let n = |size: usize| size as u128;
        let (d, heads, rank) = (n(config.hidden_size), n(config.num_attention_heads), n(config.kv_lora_rank));
        let q_rows = heads * n(config.qk_head_dim());
        let query = config.q_lora_rank.map_or(d * q_rows, |q_rank| d * n(q_rank) + n(q_rank) + n(q_rank) * q_rows);
        let key_value = d * (rank + n(config.qk_rope_head_dim)) + rank;
        let expansion = rank * heads * (n(config.qk_nope_head_dim) + n(config.v_head_dim));
        let attention = query + key_value + expansion + heads * n(config.v_head_dim) * d + 2 * d;
        let (experts, shared) = (n(config.n_routed_experts), n(config.n_shared_experts));
        let expert = 3 * d * n(config.moe_intermediate_size);
        let router = experts * d + experts;
        let moe = router + (experts + shared) * expert;
        Self {
            width: d,
            vocabulary: n(config.vocab_size) * d,
            attention,
            dense: 3 * d * n(config.intermediate_size),
            expert,
            shared,
            router,
            moe,
            module: 2 * d * d + 3 * d + attention + moe,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight_names::Table;

    #[test]
    fn published_size_is_reproduced() {
        let config = crate::config::tests::v3();
        assert_eq!(config.check(), []);
        let counts = counts(&config);
        assert_eq!(counts.total, 671_026_419_200);
        assert_eq!(counts.active, 36_625_618_432);
        assert_eq!(counts.mtp_unique, 11_610_068_224);
        assert_eq!(counts.stored, 684_489_845_504);
    }

    #[test]
    fn table_holds_what_is_counted() {
        let config = crate::config::tests::v3();
        let table = Table::new(&config);
        let unique: u64 = table.params.iter().map(|info| info.numel() as u64).sum();
        let biases = (table.biases.len() * config.n_routed_experts) as u64;
        let counts = counts(&config);
        assert_eq!(unique + biases, counts.total + counts.mtp_unique);
        let repeats: u64 = table.repeats(&config).iter().map(|(_, id)| table.params[*id as usize].numel() as u64).sum();
        assert_eq!(counts.total + counts.mtp_unique + repeats, counts.stored);
        let tensors: usize = table.params.iter().map(|info| info.tensor_names().len()).sum();
        // With FP8 scales the published listing has 91,991 tensors.
        let quantised = |info: &&crate::weight_names::ParamInfo| info.role == crate::weight_names::Role::Linear;
        let scales: usize = table.params.iter().filter(quantised).map(|info| info.tensor_names().len()).sum();
        assert_eq!(tensors + table.biases.len() + table.repeats(&config).len() + scales, 91_991);
    }
}
