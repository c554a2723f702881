//! `config.json` as Hugging Face writes it, old and new spelling, to [`ModelConfig`] and back.
//!
//! Old files say `rope_theta`, `rope_scaling: {type, ..}` and `torch_dtype`; new ones say `rope_parameters: {rope_type,
//! rope_theta, ..}` and `dtype`. Fields that do not describe the architecture are ignored; a value that this
//! architecture cannot follow (another activation, tied embeddings, softmax scores) is a problem with its field's name.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{Error, ModelConfig, Problem, RopeScaling};

/// `quantization_config` of block-scaled FP8 weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantization {
    /// `fp8`.
    pub quant_method: String,
    /// `e4m3`.
    #[serde(default = "e4m3")]
    pub fmt: String,
    /// `dynamic`: activations are scaled as they come.
    #[serde(default = "dynamic")]
    pub activation_scheme: String,
    /// Rows and columns that share a scale.
    #[serde(default = "block")]
    pub weight_block_size: Vec<usize>,
    /// `ue8m0` when scales are powers of two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_fmt: Option<String>,
}

/// A whole `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct HfConfig {
    /// The architecture.
    pub model: ModelConfig,
    /// Element type of the weights that are not quantised: `bfloat16`, `float32`.
    pub dtype: Option<String>,
    /// How the linear layers are quantised.
    pub quantization: Option<Quantization>,
}

/// What a field must say, when it is there at all.
const FIXED: &[(&str, &[&str])] = &[
    ("scoring_func", &["sigmoid"]),
    ("topk_method", &["noaux_tc"]),
    ("hidden_act", &["silu"]),
    ("model_type", &["deepseek_v3"]),
];

/// Flags that change the graph and must have this value.
const FLAGS: &[(&str, bool)] = &[("tie_word_embeddings", false), ("attention_bias", false), ("rope_interleave", true)];

/// Fields of [`ModelConfig`] that are copied as they are.
const COPIED: &[&str] = &[
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "norm_topk_prob",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "num_nextn_predict_layers",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
];

impl HfConfig {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// When it is not JSON, lacks a field, or describes another architecture or impossible sizes.
    pub fn from_json(bytes: &[u8]) -> Result<Self, Error> {
        let mut fields: Map<String, Value> = serde_json::from_slice(bytes).map_err(|source| Error::Json { source })?;
        let mut problems = refused(&fields);
        let mut kept = Map::new();
        for name in COPIED {
            match fields.remove(*name) {
                // No shared experts is written as null.
                Some(Value::Null) if *name == "n_shared_experts" => {
                    kept.insert((*name).to_owned(), json!(0));
                }
                None | Some(Value::Null) => {}
                // Some checkpoints list several end tokens; the first is the model's own.
                Some(Value::Array(list)) if name.ends_with("_token_id") && !list.is_empty() => {
                    kept.insert((*name).to_owned(), list[0].clone());
                }
                Some(value) => {
                    kept.insert((*name).to_owned(), value);
                }
            }
        }
        take_rope(&mut fields, &mut kept, &mut problems);
        let wrong = wrong_types(&kept);
        if !wrong.is_empty() {
            problems.extend(wrong);
            return Err(Error::Config { problems });
        }
        let model: ModelConfig =
            serde_json::from_value(Value::Object(kept)).map_err(|source| Error::Json { source })?;
        problems.extend(model.check());
        let quantization = match fields.remove("quantization_config").filter(|value| !value.is_null()) {
            Some(value) => Some(serde_json::from_value(value).map_err(|source| Error::Json { source })?),
            None => None,
        };
        problems.extend(quantization.as_ref().and_then(unsupported));
        if !problems.is_empty() {
            return Err(Error::Config { problems });
        }
        let dtype = ["dtype", "torch_dtype"].iter().find_map(|name| fields.get(*name)?.as_str().map(str::to_owned));
        Ok(Self { model, dtype, quantization })
    }

    /// The file's text, old spelling, which every reader knows.
    pub fn to_json(&self) -> Vec<u8> {
        let mut out = match serde_json::to_value(&self.model) {
            Ok(Value::Object(fields)) => fields,
            _ => Map::new(),
        };
        let heads = self.model.num_attention_heads;
        let fixed = json!({
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": heads,
            "hidden_act": "silu",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "tie_word_embeddings": false,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "moe_layer_freq": 1,
            "rope_interleave": true,
            "use_cache": true,
        });
        if let Value::Object(fixed) = fixed {
            out.extend(fixed);
        }
        if let Some(dtype) = &self.dtype {
            out.insert("torch_dtype".to_owned(), json!(dtype));
        }
        if let Some(quantization) = &self.quantization {
            out.insert("quantization_config".to_owned(), json!(quantization));
        }
        serde_json::to_vec_pretty(&out).unwrap_or_default()
    }
}

impl ModelConfig {
    /// The architecture in a `config.json`; see [`HfConfig::from_json`].
    ///
    /// # Errors
    /// As [`HfConfig::from_json`].
    pub fn from_json(bytes: &[u8]) -> Result<Self, Error> {
        HfConfig::from_json(bytes).map(|config| config.model)
    }

    /// A `config.json` of this architecture whose weights are `dtype` (`bfloat16`, `float32`).
    pub fn to_json(&self, dtype: &str) -> Vec<u8> {
        HfConfig { model: self.clone(), dtype: Some(dtype.to_owned()), quantization: None }.to_json()
    }
}

/// Fields whose value has another type than the model's, each read alone: only then is its name known.
fn wrong_types(kept: &Map<String, Value>) -> Vec<Problem> {
    let alone = |field: &'static str| {
        let value = kept.get(field)?.clone();
        let error = serde_json::from_value::<ModelConfig>(Value::Object(Map::from_iter([(field.to_owned(), value)])));
        // What can be read is followed by the lack of some other field.
        let message = error.err()?.to_string();
        (!message.starts_with("missing field")).then_some(Problem { field, message })
    };
    let scaling = kept.get("rope_scaling").and_then(|value| RopeScaling::deserialize(value).err());
    let scaling = scaling.map(|error| Problem { field: "rope_scaling", message: error.to_string() });
    COPIED.iter().copied().filter_map(alone).chain(scaling).collect()
}

fn refused(fields: &Map<String, Value>) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (field, allowed) in FIXED {
        if let Some(found) = fields.get(*field).filter(|value| !value.is_null())
            && !allowed.iter().any(|name| found == *name)
        {
            problems.push(Problem { field, message: format!("{found} is not {}, which this model needs", allowed[0]) });
        }
    }
    for (field, wanted) in FLAGS {
        if let Some(found) = fields.get(*field).filter(|value| !value.is_null())
            && *found != *wanted
        {
            problems.push(Problem { field, message: format!("{found} is not {wanted}, which this model needs") });
        }
    }
    let heads = fields.get("num_attention_heads");
    if let Some(kv_heads) = fields.get("num_key_value_heads").filter(|kv| !kv.is_null() && Some(*kv) != heads) {
        let message = format!("{kv_heads} differs from num_attention_heads; latent attention has one key per head");
        problems.push(Problem { field: "num_key_value_heads", message });
    }
    if let Some(frequency) = fields.get("moe_layer_freq").filter(|f| !f.is_null() && **f != 1) {
        problems.push(Problem { field: "moe_layer_freq", message: format!("{frequency} is not 1") });
    }
    problems
}

fn take_rope(fields: &mut Map<String, Value>, kept: &mut Map<String, Value>, problems: &mut Vec<Problem>) {
    const KNOWN: &[&str] =
        &["factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings"];
    for spelling in ["rope_scaling", "rope_parameters"] {
        let rope = match fields.remove(spelling) {
            Some(Value::Object(rope)) => rope,
            None | Some(Value::Null) => continue,
            Some(other) => {
                let message = format!("{other} is not a map of the rotary scaling");
                problems.push(Problem { field: "rope_scaling", message });
                continue;
            }
        };
        if let Some(theta) = rope.get("rope_theta").filter(|theta| !theta.is_null()) {
            kept.insert("rope_theta".to_owned(), theta.clone());
        }
        let kind = ["rope_type", "type"].iter().find_map(|name| rope.get(*name)?.as_str()).unwrap_or("default");
        match kind {
            "default" => {}
            "yarn" => {
                let mut scaling: Map<String, Value> = KNOWN
                    .iter()
                    .filter_map(|name| Some(((*name).to_owned(), rope.get(*name).filter(|v| !v.is_null())?.clone())))
                    .collect();
                scaling.insert("type".to_owned(), json!("yarn"));
                // Absent in a file means 0 for the logits' multiplier, though recipes default to 1.
                scaling.entry("mscale_all_dim").or_insert_with(|| json!(0.0));
                kept.insert("rope_scaling".to_owned(), Value::Object(scaling));
            }
            other => {
                let message = format!("rotary scaling {other:?} is not known; yarn and default are");
                problems.push(Problem { field: "rope_scaling", message });
            }
        }
    }
}

fn unsupported(quantization: &Quantization) -> Option<Problem> {
    let fits = quantization.quant_method == "fp8"
        && quantization.fmt == "e4m3"
        && quantization.weight_block_size == [128, 128]
        && quantization.scale_fmt.as_deref().is_none_or(|format| matches!(format, "ue8m0" | "float"));
    let message = format!(
        "{} {} in blocks of {:?} is not FP8 E4M3 in blocks of [128, 128]",
        quantization.quant_method, quantization.fmt, quantization.weight_block_size,
    );
    (!fits).then_some(Problem { field: "quantization_config", message })
}

fn e4m3() -> String {
    "e4m3".to_owned()
}

fn dynamic() -> String {
    "dynamic".to_owned()
}

fn block() -> Vec<usize> {
    vec![128, 128]
}
