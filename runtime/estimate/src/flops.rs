//! Model FLOPs: the operations that the definition of the model asks for, whatever a program does.
//!
//! With P the parameters of the matrices a token is multiplied by (attention projections, dense MLP, router, chosen and
//! shared experts, output head; no embedding, norm or bias), H heads and L layers, a multiply-add counting twice:
//!
//! - A(n) = 2·n·H·(nope + rope + value)·L, one query against n keys in all layers
//! - training: 6·P + 3·A((T+1)/2) a token of sequences of T; recomputation does not count
//! - prefill: 2·(P − head) + 2·head/T + A((T+1)/2) a token of a prompt of T, whose last row alone gets logits
//! - decoding: 2·P + A(T+1) a token after T others
//!
//! A prediction module counts as a layer with its own pass through the head and `eh_proj`. Attention is counted in
//! its expanded form, also where a program takes the absorbed one.

use dsv3_model::ModelConfig;

/// Parameters of the output head.
fn head(config: &ModelConfig) -> u64 {
    (config.vocab_size * config.hidden_size) as u64
}

/// P of the file's head: what a token is multiplied by, prediction modules included.
pub fn matrix_parameters(config: &ModelConfig) -> u64 {
    let (d, heads, modules) = (config.hidden_size, config.num_attention_heads, config.num_nextn_predict_layers);
    let q_rows = heads * config.qk_head_dim();
    let query = config.q_lora_rank.map_or(d * q_rows, |rank| d * rank + rank * q_rows);
    let latent = d * (config.kv_lora_rank + config.qk_rope_head_dim);
    let expansion = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim);
    let attention = query + latent + expansion + heads * config.v_head_dim * d;
    let dense = 3 * d * config.intermediate_size;
    let chosen = config.num_experts_per_tok + config.n_shared_experts;
    let experts = config.n_routed_experts * d + chosen * 3 * d * config.moe_intermediate_size;
    let (layers, first) = (config.num_hidden_layers, config.first_k_dense_replace.min(config.num_hidden_layers));
    let main = layers * attention + first * dense + (layers - first) * experts;
    (main + modules * (attention + experts + 2 * d * d)) as u64 + (1 + modules as u64) * head(config)
}

/// A(n) of the file's head.
fn attention(config: &ModelConfig, keys: f64) -> f64 {
    let width = config.qk_head_dim() + config.v_head_dim;
    let layers = config.num_hidden_layers + config.num_nextn_predict_layers;
    2.0 * keys * (config.num_attention_heads * width * layers) as f64
}

/// Of a training step, a token, on sequences of `tokens`.
pub fn train(config: &ModelConfig, tokens: usize) -> f64 {
    6.0 * matrix_parameters(config) as f64 + 3.0 * attention(config, (tokens as f64 + 1.0) / 2.0)
}

/// Of reading a prompt of `tokens`, a token.
pub fn prefill(config: &ModelConfig, tokens: usize) -> f64 {
    let (all, head) = (matrix_parameters(config) as f64, head(config) as f64);
    let tokens = tokens as f64;
    2.0 * (all - head + head / tokens) + attention(config, (tokens + 1.0) / 2.0)
}

/// Of one more token after `tokens` others.
pub fn decode(config: &ModelConfig, tokens: usize) -> f64 {
    2.0 * matrix_parameters(config) as f64 + attention(config, tokens as f64 + 1.0)
}

/// How many of a layer's routed experts `rows` tokens touch on average when each is as likely as any other.
pub fn experts_touched(config: &ModelConfig, rows: usize) -> f64 {
    let experts = config.n_routed_experts as f64;
    let missed = 1.0 - config.num_experts_per_tok as f64 / experts;
    experts * (1.0 - missed.powi(i32::try_from(rows).unwrap_or(i32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::named;

    fn config(name: &str) -> ModelConfig {
        named(name).unwrap().without_mtp().config
    }

    /// Sums made by hand: layers of attention, dense MLP, experts with router, head.
    #[test]
    fn matrix_parameters_are_those_counted_by_hand() {
        assert_eq!(matrix_parameters(&config("demo")), 3 * 71_680 + 98_304 + 2 * (2048 + 5 * 12_288) + 90_112);
        assert_eq!(matrix_parameters(&config("S")), 5_148_672);
        assert_eq!(matrix_parameters(&config("M")), 35_602_432);
        assert_eq!(
            matrix_parameters(&config("L")),
            16 * 1_163_264 + 4_325_376 + 15 * (65_536 + 5 * 1_572_864) + (1 << 24)
        );
        let with_mtp = matrix_parameters(&named("demo").unwrap().config);
        assert_eq!(with_mtp - matrix_parameters(&config("demo")), 71_680 + 2048 + 5 * 12_288 + 2 * 128 * 128 + 90_112);
    }

    #[test]
    fn flops_are_those_counted_by_hand() {
        // S: 6·5,148,672 + 3·(2·128.5·8·80·6); M: 6·35,602,432 + 3·(2·256.5·8·160·12).
        assert_eq!(train(&config("S"), 256), 30_892_032.0 + 2_960_640.0);
        assert_eq!(train(&config("M"), 512), 213_614_592.0 + 23_639_040.0);
        // 2·(5,148,672 − 1,048,576) + 2·1,048,576/256 + 986,880.
        assert_eq!(prefill(&config("S"), 256), 8_200_192.0 + 8192.0 + 986_880.0);
        // 2·5,148,672 + 2·513·8·80·6.
        assert_eq!(decode(&config("S"), 512), 10_297_344.0 + 3_939_840.0);
    }

    #[test]
    fn one_token_touches_its_own_experts() {
        assert!((experts_touched(&config("L"), 1) - 4.0).abs() < 1e-9);
        // 64·(1 − (60/64)^8)
        assert!((experts_touched(&config("L"), 8) - 25.81).abs() < 1e-3);
    }
}
