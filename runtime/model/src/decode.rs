//! The inference form: new tokens of many sequences at once over the latent cache, with absorbed attention.
//!
//! For each layer: write the new rows `[norm(c) ; rope(k^R)]` to the cache, then let every new token attend to the rows up
//! to its own position as multi-query attention, q̃ = W_UKᵀ q^C, o = W_UV õ. Report §2.1.1, `reference/deepseek-v3.md` §2.
//! A prediction module drafts in the same way from its own rows of the same pages.
//!
//! The training form rounds norm(c) as the precision of W_UK/UV says before it expands it. The cache holds c rounded so: a
//! score (W_UKᵀ q)·c and a sum W_UV Σ p c then are the training form's but for the order of additions, in FP8 and BF16 too.
//!
//! **Invariant**: a token's hidden state is the same bits alone, in any batch, and however its prompt was cut into chunks:
//! every op works row by row, and attention reads the cache only.

mod feedforward;

use std::sync::Arc;

use dsv3_ops::layers::{self, Layer};
use dsv3_ops::mla_decode::{self, Absorbed, CacheRows};
use dsv3_ops::{Param, Tape, Tensor, Weight, columns, elementwise, linear, rms_norm, rope, with_threads_awake};

use crate::block::{Block, Feedforward};
use crate::kv_cache::{LatentCache, SeqId};
use crate::mla::Query;
use crate::weight_names::{KV_B, ParamInfo, Role};
use crate::{Error, Model};

/// New tokens of one sequence; they follow what the cache holds.
#[derive(Clone, Copy, Debug)]
pub struct SeqStep<'a> {
    /// The sequence.
    pub seq: SeqId,
    /// At least one token.
    pub ids: &'a [u32],
}

/// New rows of one sequence for prediction module k: they follow the module's rows in the cache.
#[derive(Clone, Copy, Debug)]
pub struct MtpStep<'a> {
    /// The sequence.
    pub seq: SeqId,
    /// Hidden states after the last norm of the main model (module 1) or of the module before, `[ids.len(), d]`, flat.
    pub hidden: &'a [f32],
    /// For each row, the token k places after it.
    pub ids: &'a [u32],
}

/// Weights in the layout that decoding reads; made from the encodings on first use. A frozen model's are shared.
#[derive(Debug)]
pub(crate) struct Prepared {
    params: Vec<Param>,
    /// Key and value expansion of every layer, prediction modules last.
    absorbed: Vec<Absorbed>,
}

/// Whether products of decoding read the parameter in panels, so that a product of few rows reads every byte once. Absorbed
/// attention reads the heads of `kv_b` one by one and an embedding is looked up, so these stay in rows.
pub(crate) fn is_prepacked(info: &ParamInfo) -> bool {
    match info.role {
        Role::Linear => !info.name.ends_with(KV_B),
        Role::Projection | Role::Head | Role::Router => true,
        Role::Embedding | Role::Norm => false,
    }
}

/// A parameter's encoding as decoding reads it.
pub(crate) fn laid_out(info: &ParamInfo, weight: &Weight) -> Weight {
    if is_prepacked(info) { weight.prepack() } else { weight.clone() }
}

/// New rows of one call.
struct Rows {
    /// Sequence, first position and number of each step.
    steps: Vec<(SeqId, usize, usize)>,
    positions: Arc<[u32]>,
}

impl Rows {
    fn new(steps: Vec<(SeqId, usize, usize)>) -> Self {
        let positions = steps.iter().flat_map(|(_, first, count)| *first as u32..(first + count) as u32).collect();
        Self { steps, positions }
    }
}

impl Prepared {
    fn new(model: &Model) -> Self {
        let (config, graph) = (&model.config, model.graph());
        let packed = |(param, info): (&Param, &ParamInfo)| Param {
            id: param.id,
            master: None,
            compute: laid_out(info, &param.compute),
        };
        let (heads, nope, value) = (config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim);
        let blocks = graph.blocks.iter().chain(graph.mtp.iter().map(|module| &module.block));
        let absorbed = blocks
            .map(|block| Absorbed::new(&model.params[block.attention.kv_b as usize].compute, heads, nope, value))
            .collect();
        Self { params: model.params.iter().zip(model.infos()).map(packed).collect(), absorbed }
    }
}

impl Model {
    /// Makes what decoding reads now and not at the first request.
    pub fn prepare(&self) {
        self.prepared();
    }

    fn prepared(&self) -> &Prepared {
        self.prepared.get_or_init(|| Arc::new(Prepared::new(self)))
    }

    /// Logits `[rows, vocab]` of hidden states `[rows, d]` that went through `model.norm` (or `shared_head.norm`), F32:
    /// hidden states are not rounded whatever the head's encoding, as in training.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let head = &self.prepared().params[self.graph().head as usize].compute;
        with_threads_awake(|| linear::forward_unrounded(hidden, head))
    }

    /// Runs the new tokens of every step and adds them to the cache. Returns the hidden states after `model.norm`,
    /// `[Σ ids, d]`, step by step.
    ///
    /// # Errors
    /// When a token, a length or a sequence does not fit, or pages are lacking; the cache is unchanged then.
    pub fn forward_cached(&self, cache: &mut LatentCache, steps: &[SeqStep<'_>]) -> Result<Tensor, Error> {
        let counts: Vec<(SeqId, usize)> = steps.iter().map(|step| (step.seq, step.ids.len())).collect();
        self.check_new(steps.iter().map(|step| (step.ids, cache.len(step.seq))))?;
        cache.reserve(&counts)?;
        let rows = Rows::new(counts.iter().map(|(seq, count)| (*seq, cache.len(*seq), *count)).collect());
        let prepared = self.prepared();
        let ids: Vec<u32> = steps.iter().flat_map(|step| step.ids.iter().copied()).collect();
        let hidden = with_threads_awake(|| {
            let tape = &mut Tape::inference();
            let mut x = self.embed(tape, &ids).value;
            for (layer, block) in self.graph().blocks.iter().enumerate() {
                x = self.block_cached(prepared, block, layer, &x, cache, &rows);
            }
            let x = tape.leaf(x);
            self.final_norm(tape, &x).value
        });
        counts.iter().for_each(|(seq, count)| cache.advance(*seq, *count));
        Ok(hidden)
    }

    /// Runs prediction module `module` (from 0) on new rows. Returns the hidden states after `shared_head.norm`,
    /// `[Σ ids, d]`: [`Model::logits`] of them predict the token after each of `ids`.
    ///
    /// # Errors
    /// When the module, a token, a size or a sequence does not fit, or a row would overtake the main layers; the cache
    /// is unchanged then.
    pub fn forward_mtp_cached(
        &self,
        cache: &mut LatentCache,
        module: usize,
        steps: &[MtpStep<'_>],
    ) -> Result<Tensor, Error> {
        let refused = |what: String| Error::Input { what };
        let Some(parts) = self.graph().mtp.get(module) else {
            return Err(refused(format!("the model has no prediction module {}", module + 1)));
        };
        let d = self.config.hidden_size;
        self.check_new(steps.iter().map(|step| (step.ids, cache.mtp_len(step.seq, module))))?;
        for step in steps {
            if step.hidden.len() != step.ids.len() * d {
                return Err(refused(format!("{} hidden values for {} rows of {d}", step.hidden.len(), step.ids.len())));
            }
            let (end, len) = (cache.mtp_len(step.seq, module) + step.ids.len(), cache.len(step.seq));
            if end > len {
                return Err(refused(format!("prediction row {end} of a sequence of {len} tokens")));
            }
        }
        cache.reserve(&steps.iter().map(|step| (step.seq, 0)).collect::<Vec<_>>())?;
        let row = |step: &MtpStep<'_>| (step.seq, cache.mtp_len(step.seq, module), step.ids.len());
        let rows = Rows::new(steps.iter().map(row).collect());
        let (tape, prepared) = (&mut Tape::inference(), self.prepared());
        let ids: Vec<u32> = steps.iter().flat_map(|step| step.ids.iter().copied()).collect();
        let hidden: Vec<f32> = steps.iter().flat_map(|step| step.hidden.iter().copied()).collect();
        let hidden = tape.leaf(Tensor::f32(&[ids.len(), d], hidden));
        let embedded = self.embed(tape, &ids);
        let layer = self.config.num_hidden_layers + module;
        let hidden = with_threads_awake(|| {
            let x = parts.combine(tape, &prepared.params, &embedded, &hidden, self.shape.eps).value;
            let x = self.block_cached(prepared, &parts.block, layer, &x, cache, &rows);
            rms_norm::forward(&x, &prepared.params[parts.norm as usize].compute, self.shape.eps)
        });
        steps.iter().for_each(|step| cache.advance_mtp(step.seq, module, step.ids.len()));
        Ok(hidden)
    }

    /// Refuses tokens outside the vocabulary, empty steps and positions beyond the last.
    fn check_new<'a>(&self, steps: impl Iterator<Item = (&'a [u32], usize)>) -> Result<(), Error> {
        let (vocab, positions) = (self.config.vocab_size, self.config.max_position_embeddings);
        for (ids, before) in steps {
            if ids.is_empty() {
                return Err(Error::Input { what: "a step without tokens".to_owned() });
            }
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
                return Err(Error::Input { what: format!("token {id} is outside the vocabulary of {vocab}") });
            }
            let len = before + ids.len();
            if len > positions {
                let what = format!("a sequence of {len} tokens, max_position_embeddings is {positions}");
                return Err(Error::Input { what });
            }
        }
        Ok(())
    }

    /// One layer on new rows `x` `[R, d]`; `layer` numbers its rows in the cache.
    fn block_cached(
        &self,
        prepared: &Prepared,
        block: &Block,
        layer: usize,
        x: &Tensor,
        cache: &mut LatentCache,
        rows: &Rows,
    ) -> Tensor {
        let (w, eps) = (&prepared.params, self.shape.eps);
        let h = rms_norm::forward(x, &w[block.input_norm as usize].compute, eps);
        let h = self.attention_cached(prepared, block, layer, &h, cache, rows);
        let x = elementwise::add(x, &h);
        let h = rms_norm::forward(&x, &w[block.post_norm as usize].compute, eps);
        let h = match &block.feedforward {
            Feedforward::Dense(mlp) => mlp.infer(w, &h),
            Feedforward::Moe(moe) => {
                let (h, experts) = moe.infer(w, &self.biases[moe.bias], &self.shape.router, &h);
                cache.count_experts(experts);
                h
            }
        };
        elementwise::add(&x, &h)
    }

    fn attention_cached(
        &self,
        prepared: &Prepared,
        block: &Block,
        layer: usize,
        x: &Tensor,
        cache: &mut LatentCache,
        rows: &Rows,
    ) -> Tensor {
        let (shape, attention) = (&*self.shape, &block.attention);
        let w = |id: u32| &prepared.params[id as usize].compute;
        let first = match attention.query {
            Query::Direct(q) => w(q),
            Query::LowRank { a, .. } => w(a),
        };
        let of_input = |w| Layer { x, offsets: None, w };
        let mut both = layers::forward(&[of_input(first), of_input(w(attention.kv_a))]);
        let (latent, q) = (both.pop(), both.pop());
        let (Some(latent), Some(q)) = (latent, q) else { unreachable!("two weights, two products") };
        let q = match attention.query {
            Query::Direct(_) => q,
            Query::LowRank { norm, b, .. } => linear::forward(&rms_norm::forward(&q, w(norm), shape.eps), w(b)),
        };
        self.write_latents(&latent, w(attention.kv_a_norm), w(attention.kv_b), layer, cache, rows);
        let q = q.reshape(&[x.rows(), shape.heads, shape.nope + shape.rope]);
        let q = rope::forward(&q, shape.nope, &rows.positions, &shape.table);
        let pages: Vec<_> = rows.steps.iter().map(|(seq, ..)| cache.pages(layer, *seq)).collect();
        let seen: Vec<CacheRows<'_>> = rows
            .steps
            .iter()
            .zip(&pages)
            .flat_map(|((_, first, count), pages)| {
                (*first..first + count).map(move |position| CacheRows { pages, len: position + 1 })
            })
            .collect();
        let o = mla_decode::attend(&prepared.absorbed[layer], &q, &seen, shape.scale);
        linear::forward(&o, w(attention.o))
    }

    /// Norms, rounds and rotates new latent rows `[R, rank + dr]`, and puts them into the cache.
    fn write_latents(
        &self,
        latent: &Tensor,
        norm: &Weight,
        kv_b: &Weight,
        layer: usize,
        cache: &mut LatentCache,
        rows: &Rows,
    ) {
        let shape = &*self.shape;
        let (c, k_rope) = columns::split(latent, shape.rank);
        let c = linear::rounded_input(&rms_norm::forward(&c, norm, shape.eps), kv_b);
        let k_rope = rope::forward(&k_rope, 0, &rows.positions, &shape.table);
        let (c, k_rope) = (c.as_f32().chunks_exact(shape.rank), k_rope.as_f32().chunks_exact(shape.rope));
        let places = rows.steps.iter().flat_map(|(seq, first, count)| (*first..first + count).map(move |p| (*seq, p)));
        for (((seq, position), c), k_rope) in places.zip(c).zip(k_rope) {
            cache.write(layer, seq, position, c, k_rope);
        }
    }
}

#[cfg(test)]
mod tests;
