//! The one table of parameters: what there is, its shape, and what it is called in a published checkpoint.
//!
//! Every linear weight is `[out, in]`. The routed experts of a layer are one parameter `[experts, out, in]` here, named
//! `…mlp.experts.gate_proj.weight`, and one tensor per expert, `…mlp.experts.E.gate_proj.weight`, in a file. Prediction
//! module k (1-based) is layer L + k − 1; files repeat the embedding and the head there, as `embed_tokens` and
//! `shared_head.head`. Router biases are not parameters: no gradient, no optimiser. `reference/deepseek-v3.md` §1.3.
//!
//! **Invariant**: a parameter's [`ParamId`] is its index in [`Table::params`]; the order depends on the config only.

use dsv3_ops::ParamId;

use crate::ModelConfig;
use crate::block::{Block, Feedforward};
use crate::mla::{Mla, Query};
use crate::mlp::Mlp;
use crate::moe::Moe;
use crate::mtp::MtpModule;

/// Last part of the name of an attention layer's key and value expansion.
pub(crate) const KV_B: &str = "kv_b_proj.weight";

/// What a parameter is, which decides its precision and its weight decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Token embedding `[vocab, d]`; never FP8.
    Embedding,
    /// Output head `[vocab, d]`; never FP8.
    Head,
    /// RMSNorm weight; F32 in computation, no weight decay.
    Norm,
    /// Router `[experts, d]`; F32 in computation.
    Router,
    /// Linear layer of attention or an MLP, `[out, in]` or `[experts, out, in]`.
    Linear,
    /// `eh_proj` of a prediction module: a linear layer that published FP8 checkpoints keep in BF16.
    Projection,
}

/// One parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamInfo {
    /// Its index.
    pub id: ParamId,
    /// Published name; routed experts without their number.
    pub name: String,
    /// `[out, in]`, `[experts, out, in]` or `[d]`.
    pub shape: Vec<usize>,
    /// What it is.
    pub role: Role,
}

impl ParamInfo {
    /// Whether AdamW decays it: published tensors of two or more dimensions, so everything but norms.
    pub fn decays(&self) -> bool {
        self.role != Role::Norm
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it is a stack of experts, which files store one by one.
    pub fn is_stacked(&self) -> bool {
        self.shape.len() == 3
    }

    /// Published tensors this parameter is stored as: one, or one per expert, in order. Repetitions of the embedding and
    /// the head are not among them; see [`Table::repeats`].
    pub fn tensor_names(&self) -> Vec<String> {
        if !self.is_stacked() {
            return vec![self.name.clone()];
        }
        let (before, after) = self.name.split_once(EXPERTS).unwrap_or((&self.name, ""));
        (0..self.shape[0]).map(|expert| format!("{before}{EXPERTS}{expert}.{after}")).collect()
    }

    /// Shape of each of [`ParamInfo::tensor_names`].
    pub fn tensor_shape(&self) -> &[usize] {
        if self.is_stacked() { &self.shape[1..] } else { &self.shape }
    }
}

const EXPERTS: &str = ".experts.";

/// Router bias of one layer with experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BiasInfo {
    /// Layer; prediction modules count on from `num_hidden_layers`.
    pub layer: usize,
    /// Published name.
    pub name: String,
}

/// Every parameter of a model, and where in the graph it goes.
#[derive(Clone, Debug)]
pub struct Table {
    /// By [`ParamId`].
    pub params: Vec<ParamInfo>,
    /// Router biases by their index, which [`Moe`] holds.
    pub biases: Vec<BiasInfo>,
    pub(crate) graph: Graph,
}

/// The parameters by their place.
#[derive(Clone, Debug)]
pub(crate) struct Graph {
    pub(crate) embedding: ParamId,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: ParamId,
    pub(crate) head: ParamId,
    pub(crate) mtp: Vec<MtpModule>,
}

impl Table {
    /// The table of `config`.
    pub fn new(config: &ModelConfig) -> Self {
        let mut list = List { config, params: Vec::new(), biases: Vec::new() };
        let (vocab, d) = (config.vocab_size, config.hidden_size);
        let embedding = list.add("model.embed_tokens.weight", &[vocab, d], Role::Embedding);
        let blocks = (0..config.num_hidden_layers).map(|layer| list.block(layer)).collect();
        let norm = list.add("model.norm.weight", &[d], Role::Norm);
        let head = list.add("lm_head.weight", &[vocab, d], Role::Head);
        let mtp = (0..config.num_nextn_predict_layers).map(|module| list.mtp(module)).collect();
        let graph = Graph { embedding, blocks, norm, head, mtp };
        Self { params: list.params, biases: list.biases, graph }
    }

    /// Tensors that files repeat for every prediction module, with the parameter they are a copy of.
    pub fn repeats(&self, config: &ModelConfig) -> Vec<(String, ParamId)> {
        (config.num_hidden_layers..config.num_hidden_layers + config.num_nextn_predict_layers)
            .flat_map(|layer| {
                [
                    (format!("model.layers.{layer}.embed_tokens.weight"), self.graph.embedding),
                    (format!("model.layers.{layer}.shared_head.head.weight"), self.graph.head),
                ]
            })
            .collect()
    }

    /// The parameter called `name`.
    pub fn find(&self, name: &str) -> Option<&ParamInfo> {
        self.params.iter().find(|info| info.name == name)
    }
}

/// A table under construction; each method writes down one component's names.
struct List<'a> {
    config: &'a ModelConfig,
    params: Vec<ParamInfo>,
    biases: Vec<BiasInfo>,
}

impl List<'_> {
    fn add(&mut self, name: impl Into<String>, shape: &[usize], role: Role) -> ParamId {
        let id = self.params.len() as ParamId;
        self.params.push(ParamInfo { id, name: name.into(), shape: shape.to_vec(), role });
        id
    }

    fn block(&mut self, layer: usize) -> Block {
        let (c, at) = (self.config, format!("model.layers.{layer}"));
        let input_norm = self.add(format!("{at}.input_layernorm.weight"), &[c.hidden_size], Role::Norm);
        let attention = self.attention(&format!("{at}.self_attn"));
        let name = format!("{at}.post_attention_layernorm.weight");
        let post_norm = self.add(name, &[c.hidden_size], Role::Norm);
        let feedforward = if c.is_moe(layer) {
            Feedforward::Moe(self.moe(&format!("{at}.mlp"), layer))
        } else {
            Feedforward::Dense(self.mlp(&format!("{at}.mlp"), c.intermediate_size))
        };
        Block { layer, input_norm, attention, post_norm, feedforward }
    }

    fn attention(&mut self, at: &str) -> Mla {
        let (c, heads) = (self.config, self.config.num_attention_heads);
        let (d, q_rows) = (c.hidden_size, heads * c.qk_head_dim());
        let query = match c.q_lora_rank {
            None => Query::Direct(self.add(format!("{at}.q_proj.weight"), &[q_rows, d], Role::Linear)),
            Some(rank) => Query::LowRank {
                a: self.add(format!("{at}.q_a_proj.weight"), &[rank, d], Role::Linear),
                norm: self.add(format!("{at}.q_a_layernorm.weight"), &[rank], Role::Norm),
                b: self.add(format!("{at}.q_b_proj.weight"), &[q_rows, rank], Role::Linear),
            },
        };
        let rank = c.kv_lora_rank;
        let kv_a_shape = [rank + c.qk_rope_head_dim, d];
        let kv_b_shape = [heads * (c.qk_nope_head_dim + c.v_head_dim), rank];
        Mla {
            query,
            kv_a: self.add(format!("{at}.kv_a_proj_with_mqa.weight"), &kv_a_shape, Role::Linear),
            kv_a_norm: self.add(format!("{at}.kv_a_layernorm.weight"), &[rank], Role::Norm),
            kv_b: self.add(format!("{at}.{KV_B}"), &kv_b_shape, Role::Linear),
            o: self.add(format!("{at}.o_proj.weight"), &[d, heads * c.v_head_dim], Role::Linear),
        }
    }

    fn mlp(&mut self, at: &str, width: usize) -> Mlp {
        let d = self.config.hidden_size;
        Mlp {
            gate: self.add(format!("{at}.gate_proj.weight"), &[width, d], Role::Linear),
            up: self.add(format!("{at}.up_proj.weight"), &[width, d], Role::Linear),
            down: self.add(format!("{at}.down_proj.weight"), &[d, width], Role::Linear),
        }
    }

    fn moe(&mut self, at: &str, layer: usize) -> Moe {
        let c = self.config;
        let (d, width, experts) = (c.hidden_size, c.moe_intermediate_size, c.n_routed_experts);
        let router = self.add(format!("{at}.gate.weight"), &[experts, d], Role::Router);
        let bias = self.biases.len();
        self.biases.push(BiasInfo { layer, name: format!("{at}.gate.e_score_correction_bias") });
        let experts = Mlp {
            gate: self.add(format!("{at}.experts.gate_proj.weight"), &[experts, width, d], Role::Linear),
            up: self.add(format!("{at}.experts.up_proj.weight"), &[experts, width, d], Role::Linear),
            down: self.add(format!("{at}.experts.down_proj.weight"), &[experts, d, width], Role::Linear),
        };
        let shared_width = c.n_shared_experts * width;
        let shared = (shared_width > 0).then(|| self.mlp(&format!("{at}.shared_experts"), shared_width));
        Moe { router, bias, experts, shared }
    }

    fn mtp(&mut self, module: usize) -> MtpModule {
        let (d, layer) = (self.config.hidden_size, self.config.num_hidden_layers + module);
        let at = format!("model.layers.{layer}");
        MtpModule {
            embedding_norm: self.add(format!("{at}.enorm.weight"), &[d], Role::Norm),
            hidden_norm: self.add(format!("{at}.hnorm.weight"), &[d], Role::Norm),
            projection: self.add(format!("{at}.eh_proj.weight"), &[d, 2 * d], Role::Projection),
            block: self.block(layer),
            norm: self.add(format!("{at}.shared_head.norm.weight"), &[d], Role::Norm),
        }
    }
}
