//! Tests of configurations: both spellings, every kind of problem, hostile files.

use super::*;
use crate::{Error, HfConfig};

/// The published 671B configuration.
pub(crate) fn v3() -> ModelConfig {
    ModelConfig {
        vocab_size: 129_280,
        hidden_size: 7168,
        intermediate_size: 18_432,
        moe_intermediate_size: 2048,
        num_hidden_layers: 61,
        first_k_dense_replace: 3,
        num_attention_heads: 128,
        q_lora_rank: Some(1536),
        kv_lora_rank: 512,
        qk_nope_head_dim: 128,
        qk_rope_head_dim: 64,
        v_head_dim: 128,
        n_routed_experts: 256,
        n_shared_experts: 1,
        num_experts_per_tok: 8,
        n_group: 8,
        topk_group: 4,
        routed_scaling_factor: 2.5,
        norm_topk_prob: true,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: Some(RopeScaling::yarn(40.0, 4096)),
        max_position_embeddings: 163_840,
        num_nextn_predict_layers: 1,
        initializer_range: 0.006,
        bos_token_id: Some(0),
        eos_token_id: Some(1),
        pad_token_id: None,
    }
}

/// A model small enough for tests.
pub(crate) fn small() -> ModelConfig {
    ModelConfig {
        vocab_size: 50,
        hidden_size: 32,
        intermediate_size: 48,
        moe_intermediate_size: 16,
        num_hidden_layers: 3,
        first_k_dense_replace: 1,
        num_attention_heads: 2,
        q_lora_rank: Some(12),
        kv_lora_rank: 16,
        qk_nope_head_dim: 8,
        qk_rope_head_dim: 4,
        v_head_dim: 8,
        n_routed_experts: 8,
        num_experts_per_tok: 2,
        n_group: 4,
        topk_group: 2,
        rope_scaling: None,
        max_position_embeddings: 96,
        num_nextn_predict_layers: 1,
        initializer_range: 0.2,
        ..v3()
    }
}

#[test]
fn json_round_trips_in_the_old_spelling() {
    let config = v3();
    let text = config.to_json("bfloat16");
    let back = HfConfig::from_json(&text).unwrap();
    assert_eq!(back.model, config);
    assert_eq!(back.dtype.as_deref(), Some("bfloat16"));
    let plain = small();
    assert_eq!(ModelConfig::from_json(&plain.to_json("float32")).unwrap(), plain);
}

#[test]
fn new_spelling_and_direct_queries_are_read() {
    let mut value: serde_json::Value = serde_json::from_slice(&v3().to_json("bfloat16")).unwrap();
    let fields = value.as_object_mut().unwrap();
    fields.remove("rope_scaling");
    fields.remove("rope_theta");
    fields.remove("torch_dtype");
    fields.insert("dtype".into(), "float32".into());
    fields.insert("q_lora_rank".into(), serde_json::Value::Null);
    fields.insert("eos_token_id".into(), serde_json::json!([1, 5]));
    fields.insert("unheard_of".into(), serde_json::json!({"x": 1}));
    let rope = serde_json::json!({"rope_type": "yarn", "rope_theta": 500.0, "factor": 40, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096});
    fields.insert("rope_parameters".into(), rope);
    let read = HfConfig::from_json(&serde_json::to_vec(&value).unwrap()).unwrap();
    let expected = ModelConfig { q_lora_rank: None, rope_theta: 500.0, ..v3() };
    assert_eq!((read.model, read.dtype.as_deref()), (expected, Some("float32")));
}

#[test]
fn every_problem_is_named_by_field() {
    let config = ModelConfig {
        n_group: 3,
        qk_rope_head_dim: 5,
        eos_token_id: Some(50),
        rms_norm_eps: 0.0,
        rope_theta: f64::NAN,
        rope_scaling: Some(RopeScaling::yarn(2.0, 40)),
        ..small()
    };
    let fields: Vec<&str> = config.check().iter().map(|problem| problem.field).collect();
    let expected =
        ["qk_rope_head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings", "eos_token_id", "n_group"];
    assert_eq!(fields, expected);
    let top_k = ModelConfig { num_experts_per_tok: 5, ..small() };
    assert_eq!(top_k.check()[0].field, "num_experts_per_tok");
    assert_eq!(ModelConfig { topk_group: 5, ..small() }.check()[0].field, "topk_group");
    assert_eq!(ModelConfig { hidden_size: usize::MAX, ..small() }.check()[0].field, "hidden_size");
    assert_eq!(small().check(), []);
    let vast = ModelConfig {
        hidden_size: 1 << 17,
        moe_intermediate_size: 1 << 20,
        num_hidden_layers: 1 << 12,
        n_routed_experts: 1 << 16,
        ..small()
    };
    assert!(vast.check()[0].message.contains("parameters"));
}

#[test]
fn other_architectures_and_garbage_are_refused() {
    let mut value: serde_json::Value = serde_json::from_slice(&small().to_json("float32")).unwrap();
    let changes = [
        ("hidden_act", serde_json::json!("gelu")),
        ("scoring_func", serde_json::json!("softmax")),
        ("tie_word_embeddings", serde_json::json!(true)),
        ("num_key_value_heads", serde_json::json!(1)),
    ];
    for (field, wrong) in changes {
        value[field] = wrong;
    }
    let Err(Error::Config { problems }) = ModelConfig::from_json(&serde_json::to_vec(&value).unwrap()) else {
        panic!("another architecture is refused");
    };
    assert_eq!(problems.len(), 4, "{problems:?}");
    let mut value: serde_json::Value = serde_json::from_slice(&v3().to_json("float32")).unwrap();
    let changes = [
        ("hidden_size", serde_json::json!("7168")),
        ("vocab_size", serde_json::json!(1e30)),
        ("eos_token_id", serde_json::json!(-4)),
        ("num_hidden_layers", serde_json::json!({"x": 1})),
        ("rope_parameters", serde_json::json!(3)),
        ("rope_scaling", serde_json::json!({"type": "yarn", "factor": "40", "original_max_position_embeddings": 4})),
    ];
    let mut wrong: Vec<&str> = changes.iter().map(|(field, _)| *field).collect();
    for (field, change) in &changes {
        value[*field] = change.clone();
    }
    let Err(Error::Config { problems }) = ModelConfig::from_json(&serde_json::to_vec(&value).unwrap()) else {
        panic!("fields of other types are refused by name");
    };
    wrong.sort_unstable();
    let mut fields: Vec<&str> = problems.iter().map(|problem| problem.field).collect();
    fields.sort_unstable();
    // Both spellings of rotary scaling go by one name.
    assert_eq!(fields, wrong.iter().map(|f| f.replace("parameters", "scaling")).collect::<Vec<_>>(), "{problems:?}");
    for text in ["", "[]", "{}", "{\"vocab_size\": -1}", "{\"vocab_size\": \"many\"}", "\u{0}"] {
        assert!(ModelConfig::from_json(text.as_bytes()).is_err(), "{text:?}");
    }
}
