//! Multi-head latent attention, training form.
//!
//! c^Q = norm(W_DQ h), q = W_UQ c^Q with the last dr columns of every head rotated; [c ; k^R] = W_DKV h, k^R rotated and
//! shared by all heads; [k^C ; v] = W_UK/UV norm(c); o = W_O attention. Report §2.1.1, `reference/deepseek-v3.md` §2.
//! The decoding form over a cache is in `decode`; both read the same parameters.

use dsv3_ops::{Param, ParamId, Tape, Var, attention, columns, linear, rms_norm, rope};

use crate::context::Context;

/// Parameters of one attention layer.
#[derive(Clone, Debug)]
pub(crate) struct Mla {
    pub(crate) query: Query,
    /// Latent and rotated key, `[rank + dr, d]`.
    pub(crate) kv_a: ParamId,
    pub(crate) kv_a_norm: ParamId,
    /// Keys and values of every head, `[heads · (dn + dv), rank]`.
    pub(crate) kv_b: ParamId,
    pub(crate) o: ParamId,
}

/// How queries are made.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Query {
    /// One product, `[heads · (dn + dr), d]`.
    Direct(ParamId),
    /// Through a normalised latent.
    LowRank {
        /// `[q_rank, d]`.
        a: ParamId,
        norm: ParamId,
        /// `[heads · (dn + dr), q_rank]`.
        b: ParamId,
    },
}

impl Mla {
    /// Queries `[T, heads · (dn + dr)]` and the latent row `[T, rank + dr]` of the normalised input `x` `[T, d]`.
    /// Products of one input share its quantisation.
    pub(crate) fn project(&self, tape: &mut Tape, w: &[Param], x: &Var, eps: f32) -> (Var, Var) {
        let kv_a = &w[self.kv_a as usize];
        let first = match self.query {
            Query::Direct(q) => &w[q as usize],
            Query::LowRank { a, .. } => &w[a as usize],
        };
        let mut both = linear::on_tape_many(tape, x, &[first, kv_a]).into_iter();
        let (Some(q), Some(latent)) = (both.next(), both.next()) else { unreachable!("two weights, two products") };
        let q = match self.query {
            Query::Direct(_) => q,
            Query::LowRank { norm, b, .. } => {
                let q = rms_norm::on_tape(tape, &q, &w[norm as usize], eps);
                linear::on_tape(tape, &q, &w[b as usize])
            }
        };
        (q, latent)
    }

    /// Attention of the normalised input `x` `[T, d]` within each sequence of `ctx`: `[T, d]`.
    pub(crate) fn forward(&self, tape: &mut Tape, w: &[Param], x: &Var, ctx: &Context) -> Var {
        let shape = &*ctx.shape;
        let tokens = x.value.rows();
        let (q, latent) = self.project(tape, w, x, shape.eps);
        let q = q.reshape(&[tokens, shape.heads, shape.nope + shape.rope]);
        let q = rope::on_tape(tape, &q, shape.nope, &ctx.positions, &shape.table);
        let (c, k_rope) = columns::split_on_tape(tape, &latent, shape.rank);
        let k_rope = rope::on_tape(tape, &k_rope, 0, &ctx.positions, &shape.table);
        let c = rms_norm::on_tape(tape, &c, &w[self.kv_a_norm as usize], shape.eps);
        let kv = linear::on_tape(tape, &c, &w[self.kv_b as usize]);
        let kv = kv.reshape(&[tokens, shape.heads, shape.nope + shape.value]);
        let o = attention::on_tape(tape, &q, &kv, &k_rope, &ctx.spans, shape.scale);
        linear::on_tape(tape, &o.reshape(&[tokens, shape.heads * shape.value]), &w[self.o as usize])
    }
}
