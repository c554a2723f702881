//! What every layer of one forward pass shares: sizes, rotations, positions and sequence boundaries.

use std::sync::Arc;

use dsv3_ops::rope::RopeTable;
use dsv3_ops::{Spans, router};

use crate::ModelConfig;

/// Sizes and the rotary table; the same for every layer and every batch.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) heads: usize,
    /// Unrotated and rotated width of a query head.
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) value: usize,
    /// Width of the key/value latent.
    pub(crate) rank: usize,
    pub(crate) eps: f32,
    /// Multiplier of attention logits.
    pub(crate) scale: f32,
    pub(crate) router: router::Config,
    pub(crate) table: RopeTable,
}

impl Shape {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let yarn = config.rope_scaling.as_ref().map(|scaling| scaling.to_op());
        let positions = config.max_position_embeddings;
        Self {
            heads: config.num_attention_heads,
            nope: config.qk_nope_head_dim,
            rope: config.qk_rope_head_dim,
            value: config.v_head_dim,
            rank: config.kv_lora_rank,
            eps: config.rms_norm_eps as f32,
            scale: config.softmax_scale(),
            router: config.router(),
            table: RopeTable::new(config.qk_rope_head_dim, config.rope_theta as f32, yarn.as_ref(), positions),
        }
    }
}

/// One packed batch on its way through the layers.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) shape: Arc<Shape>,
    pub(crate) spans: Arc<Spans>,
    /// Position of every token within its sequence.
    pub(crate) positions: Arc<[u32]>,
}

impl Context {
    pub(crate) fn new(shape: &Arc<Shape>, spans: Spans) -> Self {
        let positions = spans.positions().into();
        Self { shape: shape.clone(), spans: Arc::new(spans), positions }
    }
}
