//! The weights file of a model folder whose configuration is fixed: loaded as it is, to be trained, and looked over as
//! `validate` does.

use std::path::PathBuf;

use dsv3_model::{LoadPrecision, check_folder, load};
use dsv3_ops::Precision;

/// The folder's configuration: every kind of tensor there is, all of them small.
pub const CONFIG: &str = r#"{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 12,
"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 4, "num_hidden_layers": 2, "first_k_dense_replace": 1,
"num_attention_heads": 1, "num_key_value_heads": 1, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4,
"qk_rope_head_dim": 2, "v_head_dim": 4, "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1,
"topk_group": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": true, "routed_scaling_factor": 1.0,
"rms_norm_eps": 1e-06, "rope_theta": 10000.0, "max_position_embeddings": 32, "num_nextn_predict_layers": 1,
"hidden_act": "silu", "tie_word_embeddings": false, "attention_bias": false, "torch_dtype": "bfloat16"}"#;

thread_local! {
    /// A folder of this thread; in memory where the system has such a place.
    static FOLDER: PathBuf = {
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let folder = tempfile::tempdir_in(parent).expect("a folder").keep();
        std::fs::write(folder.join("config.json"), CONFIG).expect("written");
        folder
    };
}

/// Reads the bytes as `model.safetensors`. The first byte chooses whether the configuration says FP8.
pub fn safetensors(bytes: &[u8]) {
    let Some((kind, weights)) = bytes.split_first() else { return };
    FOLDER.with(|folder| {
        let fp8 = CONFIG.replacen(
            '{',
            r#"{"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, "#,
            1,
        );
        let config = if kind % 2 == 1 { &fp8 } else { CONFIG };
        std::fs::write(folder.join("config.json"), config).expect("written");
        std::fs::write(folder.join("model.safetensors"), weights).expect("written");
        let whole = load(folder, LoadPrecision::Own, false);
        let checked = check_folder(folder);
        // What is trained is made of what was read; it may refuse more, never read more.
        let trained = load(folder, LoadPrecision::As(Precision::F32), true);
        if let Ok(loaded) = &whole {
            assert!(checked.is_ok(), "validate refuses what a stage takes: {:?}", checked.err());
            assert!(loaded.model.infos().iter().map(|info| info.numel()).sum::<usize>() < 100_000);
        }
        let text = [whole.err(), trained.err()].into_iter().flatten().map(|error| error.to_string());
        text.for_each(|text| assert!(!text.is_empty() && text.len() < 100_000, "{} bytes of error", text.len()));
    });
}
