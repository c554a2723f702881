//! Absorbed multi-head latent attention over a latent cache: multi-query attention with keys `[c ; r]` and values c.
//!
//! kv_b `[heads · (dn + dv), rank]` holds W_UK,h (dn rows) and W_UV,h (dv rows) of every head. A query absorbs the first:
//! q̃_h = W_UK,hᵀ q_h; attention runs over cached latents, õ_h = Σ_j p_j c_j; the second expands the result:
//! o_h = W_UV,h õ_h. (`reference/deepseek-v3.md` §2; report §2.1.1.)
//!
//! A cache row is `[c (rank) ; r (dr)]`; rows lie in pages that a query walks in order with an online softmax.
//! **Invariant**: the result of a query row is a function of that row, its pages and its length only, bit for bit: the
//! same alone, in any batch, and however a prompt was cut into chunks.

use half::bf16;

use crate::gemm::{Mat, Product, run_serial};
use crate::isa::{Isa, simd_fn};

use crate::bfloat::widen;
use crate::memory::buffer;
use crate::vector::{LANES, exp, exp_in_place, fold, for_row_chunks, max};
use crate::weight::Operand;
use crate::{Tensor, Weight};

/// Query rows a thread multiplies at a time.
const CHUNK_ROWS: usize = 32;
/// Heads that share the loads of a cache row.
const HEADS_BLOCK: usize = 4;

/// One page of cache rows, `[page_tokens, rank + dr]`.
#[derive(Clone, Copy, Debug)]
pub enum Page<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl Page<'_> {
    fn len(&self) -> usize {
        match self {
            Page::F32(data) => data.len(),
            Page::Bf16(data) => data.len(),
        }
    }
}

/// What one query row sees: the first `len` tokens of `pages`.
#[derive(Clone, Copy, Debug)]
pub struct CacheRows<'a> {
    /// Pages in order of position.
    pub pages: &'a [Page<'a>],
    /// Visible tokens, the query's own included.
    pub len: usize,
}

/// kv_b for absorbed attention, in its own encoding: products decode it as they read it.
#[derive(Clone, Debug)]
pub struct Absorbed {
    /// `[heads · (dn + dv), rank]`, in the row layout.
    kv_b: Weight,
    heads: usize,
    dn: usize,
    dv: usize,
}

impl Absorbed {
    /// Shares `kv_b`; copies it when it is prepacked.
    ///
    /// # Panics
    /// When its rows are not `heads · (dn + dv)`.
    pub fn new(kv_b: &Weight, heads: usize, dn: usize, dv: usize) -> Self {
        let kv_b = kv_b.in_rows();
        assert_eq!(kv_b.outputs(), heads * (dn + dv), "kv_b {:?} for {heads} heads of {dn} + {dv}", kv_b.shape());
        Self { kv_b, heads, dn, dv }
    }

    /// Width of a latent.
    pub fn rank(&self) -> usize {
        self.kv_b.inputs()
    }

    /// Absorbs W_UK into queries: `[rows, heads, dn + dr]` to `[rows, heads, rank + dr]`; the rotary part is copied.
    ///
    /// # Panics
    /// When `q` has another shape.
    pub fn query(&self, q: &Tensor) -> Tensor {
        let (rank, dn, heads) = (self.rank(), self.dn, self.heads);
        let (rows, width) = (q.shape()[0], q.cols());
        assert!(q.shape()[1] == heads && width >= dn, "queries {:?} for {heads} heads of {dn}", q.shape());
        let out_width = rank + width - dn;
        let data = q.as_f32();
        let mut out = buffer(rows * heads * out_width);
        for_row_chunks(&mut out, heads * out_width, CHUNK_ROWS, heads * dn * rank, |first, chunk| {
            let data = &data[first * heads * width..];
            let count = chunk.len() / (heads * out_width);
            for head in 0..heads {
                let a = Mat::rows(&data[head * width..], heads * width);
                let keys = head * (dn + self.dv);
                let b = &Operand::run(&self.kv_b, keys..keys + dn, false);
                let (c, c_stride) = (&mut chunk[head * out_width..], heads * out_width);
                run_serial(Product { m: count, n: rank, k: dn, a, b, c, c_stride, accumulate: false });
            }
            for (to, from) in chunk.chunks_exact_mut(out_width).zip(data.chunks_exact(width)) {
                to[rank..].copy_from_slice(&from[dn..]);
            }
        });
        Tensor::f32(&[rows, heads, out_width], out)
    }

    /// Expands results by W_UV: `[rows, heads, rank]` to `[rows, heads · dv]`.
    ///
    /// # Panics
    /// When `o` has another shape.
    pub fn value(&self, o: &Tensor) -> Tensor {
        let (rank, dn, dv, heads) = (self.rank(), self.dn, self.dv, self.heads);
        let rows = o.shape()[0];
        assert_eq!(o.shape()[1..], [heads, rank], "latent results of another shape");
        let data = o.as_f32();
        let mut out = buffer(rows * heads * dv);
        for_row_chunks(&mut out, heads * dv, CHUNK_ROWS, heads * dv * rank, |first, chunk| {
            let count = chunk.len() / (heads * dv);
            for head in 0..heads {
                let a = Mat::rows(&data[(first * heads + head) * rank..], heads * rank);
                let values = head * (dn + dv) + dn;
                let b = &Operand::run(&self.kv_b, values..values + dv, true);
                let (c, c_stride) = (&mut chunk[head * dv..], heads * dv);
                run_serial(Product { m: count, n: dv, k: rank, a, b, c, c_stride, accumulate: false });
            }
        });
        Tensor::f32(&[rows, heads * dv], out)
    }
}

/// [`Absorbed::query`] for one call. `q` is `[rows, heads, dn + dr]`.
pub fn absorb_query(q: &Tensor, kv_b: &Weight, dn: usize, dv: usize) -> Tensor {
    Absorbed::new(kv_b, q.shape()[1], dn, dv).query(q)
}

/// [`Absorbed::value`] for one call. `o` is `[rows, heads, rank]`.
pub fn expand_value(o: &Tensor, kv_b: &Weight, dn: usize, dv: usize) -> Tensor {
    Absorbed::new(kv_b, o.shape()[1], dn, dv).value(o)
}

/// Attention of absorbed queries `[rows, heads, rank + dr]` over the cache, one [`CacheRows`] per row:
/// `[rows, heads, rank]`.
///
/// # Panics
/// When the counts disagree, a row sees no token or more than its pages hold.
pub fn forward(q: &Tensor, rows: &[CacheRows<'_>], rank: usize, scale: f32) -> Tensor {
    let &[count, heads, width] = q.shape() else { panic!("absorbed queries of shape {:?}", q.shape()) };
    assert!(count == rows.len() && rank <= width, "{count} queries over {} caches", rows.len());
    let data = q.as_f32();
    let mut out = vec![0.0; count * heads * rank];
    let seen_mean = rows.iter().map(|row| row.len).sum::<usize>() / count.max(1);
    for_row_chunks(&mut out, heads * rank, 1, seen_mean * heads * width, |row, out| {
        let q = &data[row * heads * width..][..heads * width];
        Walk::new(heads, width, rank, scale).run(q, rows[row], out);
    });
    Tensor::f32(&[count, heads, rank], out)
}

/// One query row's way through its pages.
struct Walk {
    heads: usize,
    width: usize,
    rank: usize,
    scale: f32,
    /// Largest score and sum of exponentials so far, per head.
    state: Vec<(f32, f32)>,
    /// Scores of the current page, `[heads, page_tokens]`.
    scores: Vec<f32>,
    /// The current page in f32, when it is stored otherwise.
    page: Vec<f32>,
}

impl Walk {
    fn new(heads: usize, width: usize, rank: usize, scale: f32) -> Self {
        let state = vec![(f32::NEG_INFINITY, 0.0); heads];
        Self { heads, width, rank, scale, state, scores: Vec::new(), page: Vec::new() }
    }

    fn run(&mut self, q: &[f32], rows: CacheRows<'_>, out: &mut [f32]) {
        let mut left = rows.len;
        for page in rows.pages {
            if left == 0 {
                break;
            }
            let tokens = left.min(page.len() / self.width);
            left -= tokens;
            match page {
                Page::F32(data) => self.visit(q, &data[..tokens * self.width], out),
                Page::Bf16(data) => {
                    let mut page = std::mem::take(&mut self.page);
                    page.resize(tokens * self.width, 0.0);
                    widen(Isa::best(), &data[..tokens * self.width], &mut page);
                    self.visit(q, &page, out);
                    self.page = page;
                }
            }
        }
        assert!(left == 0 && rows.len > 0, "a query sees {} tokens, its pages lack {left}", rows.len);
        for (out, (_, total)) in out.chunks_exact_mut(self.rank).zip(&self.state) {
            let inverse = 1.0 / total;
            for o in out {
                *o *= inverse;
            }
        }
    }

    /// Adds one page, `[tokens, width]`, to the running result.
    fn visit(&mut self, q: &[f32], page: &[f32], out: &mut [f32]) {
        let tokens = page.len() / self.width;
        if tokens > 0 {
            self.scores.resize(self.heads * tokens, 0.0);
            visit_page(Isa::best(), self, q, page, out);
        }
    }
}

simd_fn! {
    fn visit_page(walk: &mut Walk, q: &[f32], page: &[f32], out: &mut [f32]) {
        let (width, rank) = (walk.width, walk.rank);
        let tokens = page.len() / width;
        let blocked = walk.heads / HEADS_BLOCK * HEADS_BLOCK;
        let (scores, scores_rest) = walk.scores.split_at_mut(blocked * tokens);
        for (q, scores) in q.chunks_exact(HEADS_BLOCK * width).zip(scores.chunks_exact_mut(HEADS_BLOCK * tokens)) {
            score::<HEADS_BLOCK>(q, page, width, scores);
        }
        for (q, scores) in q[blocked * width..].chunks_exact(width).zip(scores_rest.chunks_exact_mut(tokens)) {
            score::<1>(q, page, width, scores);
        }
        let heads = walk.scores.chunks_exact_mut(tokens).zip(&mut walk.state).zip(out.chunks_exact_mut(rank));
        for ((scores, state), out) in heads {
            for s in scores.iter_mut() {
                *s *= walk.scale;
            }
            let largest = max(scores).max(state.0);
            let rescale = exp(state.0 - largest);
            let total = exp_in_place(scores, largest);
            *state = (largest, state.1 * rescale + total);
            for o in out.iter_mut() {
                *o *= rescale;
            }
        }
        let (p, p_rest) = walk.scores.split_at(blocked * tokens);
        let (out, out_rest) = out.split_at_mut(blocked * rank);
        for (p, out) in p.chunks_exact(HEADS_BLOCK * tokens).zip(out.chunks_exact_mut(HEADS_BLOCK * rank)) {
            add_values::<HEADS_BLOCK>(p, page, width, rank, out);
        }
        for (p, out) in p_rest.chunks_exact(tokens).zip(out_rest.chunks_exact_mut(rank)) {
            add_values::<1>(p, page, width, rank, out);
        }
    }
}

/// `scores[h][j] = q[h] · page[j]` for H heads, which share the loads of a key.
#[inline(always)]
fn score<const H: usize>(q: &[f32], page: &[f32], width: usize, scores: &mut [f32]) {
    let tokens = page.len() / width;
    let whole = width / LANES * LANES;
    for (j, key) in page.chunks_exact(width).enumerate() {
        let mut sums = [[0.0_f32; LANES]; H];
        for at in (0..whole).step_by(LANES) {
            let key = &key[at..at + LANES];
            for h in 0..H {
                let q = &q[h * width + at..][..LANES];
                for i in 0..LANES {
                    sums[h][i] = q[i].mul_add(key[i], sums[h][i]);
                }
            }
        }
        for h in 0..H {
            for i in 0..width - whole {
                sums[h][i] = q[h * width + whole + i].mul_add(key[whole + i], sums[h][i]);
            }
            scores[h * tokens + j] = fold(sums[h]);
        }
    }
}

/// `out[h] += Σ_j p[h][j] · page[j][..rank]` in order of j, for H heads, with the sums of 16 columns in registers.
#[inline(always)]
fn add_values<const H: usize>(p: &[f32], page: &[f32], width: usize, rank: usize, out: &mut [f32]) {
    let tokens = page.len() / width;
    let whole = rank / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        let mut sums = [[0.0_f32; LANES]; H];
        for h in 0..H {
            sums[h].copy_from_slice(&out[h * rank + at..][..LANES]);
        }
        for (j, key) in page.chunks_exact(width).enumerate() {
            let key = &key[at..at + LANES];
            for h in 0..H {
                for i in 0..LANES {
                    sums[h][i] = p[h * tokens + j].mul_add(key[i], sums[h][i]);
                }
            }
        }
        for h in 0..H {
            out[h * rank + at..][..LANES].copy_from_slice(&sums[h]);
        }
    }
    for h in 0..H {
        for column in whole..rank {
            let mut sum = out[h * rank + column];
            for j in 0..tokens {
                sum = p[h * tokens + j].mul_add(page[j * width + column], sum);
            }
            out[h * rank + column] = sum;
        }
    }
}

#[cfg(test)]
mod tests;
