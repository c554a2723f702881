//! Absorbed multi-head latent attention over a latent cache: multi-query attention with keys `[c ; r]` and values c.
//!
//! kv_b `[heads · (dn + dv), rank]` holds W_UK,h (dn rows) and W_UV,h (dv rows) of every head. A query absorbs the first:
//! q̃_h = W_UK,hᵀ q_h; attention runs over cached latents, õ_h = Σ_j p_j c_j; the second expands the result:
//! o_h = W_UV,h õ_h. (`reference/deepseek-v3.md` §2; report §2.1.1.)
//!
//! A cache row is `[c (rank) ; r (dr)]`; rows lie in pages that a query walks in order with an online softmax.
//! [`attend`] does all three for a few heads and rows at a time, so that one region of parallel work covers a layer.
//! **Invariant**: the result of a query row is a function of that row, its pages and its length only, bit for bit: the
//! same alone, in any batch, and however a prompt was cut into chunks.

mod page;

use std::ops::Range;

use half::bf16;

use crate::gemm::{Mat, Product, run_serial};
use crate::isa::Isa;

use page::HEADS_BLOCK;

use crate::bfloat::widen;
use crate::memory::buffer;
use crate::vector::{collect, for_row_chunks};
use crate::weight::Operand;
use crate::{Tensor, Weight, scratch};

/// Query rows a thread multiplies at a time.
const CHUNK_ROWS: usize = 32;

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

/// kv_b for absorbed attention, cut into the weights of every head once.
#[derive(Clone, Debug)]
pub struct Absorbed {
    /// W_UKᵀ of every head, `[heads, rank, dn]`.
    keys: Weight,
    /// W_UV of every head, `[heads, dv, rank]`.
    values: Weight,
    heads: usize,
    dn: usize,
    dv: usize,
}

impl Absorbed {
    /// Cuts `kv_b` `[heads · (dn + dv), rank]`.
    ///
    /// # Panics
    /// When its rows are not `heads · (dn + dv)`.
    pub fn new(kv_b: &Weight, heads: usize, dn: usize, dv: usize) -> Self {
        let [keys, values] = kv_b.absorbed(heads, dn, dv);
        Self { keys, values, heads, dn, dv }
    }

    /// Width of a latent.
    pub fn rank(&self) -> usize {
        self.values.inputs()
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
            self.absorb(0..heads, &data[first * heads * width..], width, chunk);
        });
        Tensor::f32(&[rows, heads, out_width], out)
    }

    /// Absorbs heads `run` of queries `[.., heads, width]` to `out` `[.., run, rank + dr]`.
    fn absorb(&self, run: Range<usize>, q: &[f32], width: usize, out: &mut [f32]) {
        let (rank, dn, heads, count) = (self.rank(), self.dn, self.heads, run.len());
        let out_width = rank + width - dn;
        let m = out.len() / (count * out_width);
        for (i, head) in run.clone().enumerate() {
            let a = Mat::rows(&q[head * width..], heads * width);
            let b = &Operand::forward(&self.keys, head);
            let (c, c_stride) = (&mut out[i * out_width..], count * out_width);
            run_serial(Product { m, n: rank, k: dn, a, b, c, c_stride, accumulate: false });
        }
        for (i, to) in out.chunks_exact_mut(out_width).enumerate() {
            let from = (i / count * heads + run.start + i % count) * width;
            to[rank..].copy_from_slice(&q[from + dn..from + width]);
        }
    }

    /// Expands results by W_UV: `[rows, heads, rank]` to `[rows, heads · dv]`.
    ///
    /// # Panics
    /// When `o` has another shape.
    pub fn value(&self, o: &Tensor) -> Tensor {
        let (rank, dv, heads) = (self.rank(), self.dv, self.heads);
        let rows = o.shape()[0];
        assert_eq!(o.shape()[1..], [heads, rank], "latent results of another shape");
        let data = o.as_f32();
        let mut out = buffer(rows * heads * dv);
        for_row_chunks(&mut out, heads * dv, CHUNK_ROWS, heads * dv * rank, |first, chunk| {
            self.expand(0..heads, &data[first * heads * rank..], chunk);
        });
        Tensor::f32(&[rows, heads * dv], out)
    }

    /// Expands heads `run`: `o` `[.., run, rank]` to `out` `[.., run, dv]`.
    fn expand(&self, run: Range<usize>, o: &[f32], out: &mut [f32]) {
        let (rank, dv, count) = (self.rank(), self.dv, run.len());
        let m = out.len() / (count * dv);
        for (i, head) in run.enumerate() {
            let a = Mat::rows(&o[i * rank..], count * rank);
            let b = &Operand::forward(&self.values, head);
            let (c, c_stride) = (&mut out[i * dv..], count * dv);
            run_serial(Product { m, n: dv, k: rank, a, b, c, c_stride, accumulate: false });
        }
    }
}

/// [`Absorbed::query`], [`forward`] and [`Absorbed::value`] in one: queries `[rows, heads, dn + dr]` to
/// `[rows, heads · dv]`, one [`CacheRows`] per row.
///
/// # Panics
/// When the sizes disagree, a row sees no token or more than its pages hold.
pub fn attend(kv_b: &Absorbed, q: &Tensor, rows: &[CacheRows<'_>], scale: f32) -> Tensor {
    let (heads, rank, dv, width) = (kv_b.heads, kv_b.rank(), kv_b.dv, q.cols());
    assert!(
        q.shape()[..2] == [rows.len(), heads] && width >= kv_b.dn,
        "queries {:?} of {} rows",
        q.shape(),
        rows.len()
    );
    let blocks = heads.div_ceil(HEADS_BLOCK);
    // A task is some heads of some rows. How many changes no bit.
    let chunk_rows = (rows.len() * blocks).div_ceil(2 * rayon::current_num_threads()).clamp(1, CHUNK_ROWS);
    let chunks = rows.len().div_ceil(chunk_rows);
    let seen_mean = rows.iter().map(|row| row.len).sum::<usize>() / rows.len().max(1);
    let latent_width = rank + width - kv_b.dn;
    let work = chunk_rows * HEADS_BLOCK * latent_width * (seen_mean + kv_b.dn);
    let place = |task: usize| {
        let (chunk, block) = (task / blocks, task % blocks);
        let rows = chunk * chunk_rows..rows.len().min((chunk + 1) * chunk_rows);
        (rows, block * HEADS_BLOCK..heads.min((block + 1) * HEADS_BLOCK))
    };
    let results = collect(chunks * blocks, work, |task| {
        let (run, few) = place(task);
        let mut out = vec![0.0; run.len() * few.len() * dv];
        scratch::with_f32(run.len() * few.len() * latent_width, |absorbed| {
            kv_b.absorb(few.clone(), &q.as_f32()[run.start * heads * width..], width, absorbed);
            scratch::with_f32(run.len() * few.len() * rank, |latent| {
                let walk = Walk { heads: few.len(), width: latent_width, rank, scale };
                walk.run(absorbed, &rows[run.clone()], latent);
                kv_b.expand(few.clone(), latent, &mut out);
            });
        });
        out
    });
    let mut out = buffer(rows.len() * heads * dv);
    for (task, result) in results.iter().enumerate() {
        let (run, few) = place(task);
        for (row, from) in run.zip(result.chunks_exact(few.len() * dv)) {
            out[(row * heads + few.start) * dv..][..from.len()].copy_from_slice(from);
        }
    }
    Tensor::f32(&[rows.len(), heads * dv], out)
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
    let mut out = buffer(count * heads * rank);
    let seen_mean = rows.iter().map(|row| row.len).sum::<usize>() / count.max(1);
    for_row_chunks(&mut out, heads * rank, 1, seen_mean * heads * width, |row, out| {
        let q = &data[row * heads * width..][..heads * width];
        Walk { heads, width, rank, scale }.run(q, &rows[row..=row], out);
    });
    Tensor::f32(&[count, heads, rank], out)
}

/// Sizes of absorbed queries `[rows, heads, width]` on their way through pages.
#[derive(Clone, Copy)]
struct Walk {
    heads: usize,
    width: usize,
    rank: usize,
    scale: f32,
}

/// Where one row's heads are: the largest score and the sum of exponentials so far.
type State = Vec<(f32, f32)>;

impl Walk {
    /// Results `out` `[rows, heads, rank]`. Rows of one sequence read each page together.
    fn run(self, q: &[f32], rows: &[CacheRows<'_>], out: &mut [f32]) {
        let (q_len, out_len) = (self.heads * self.width, self.heads * self.rank);
        let mut first = 0;
        for same in rows.chunk_by(|a, b| std::ptr::eq(a.pages, b.pages)) {
            let end = first + same.len();
            self.run_sequence(&q[first * q_len..end * q_len], same, &mut out[first * out_len..end * out_len]);
            first = end;
        }
    }

    /// Rows that see the same pages.
    fn run_sequence(self, q: &[f32], rows: &[CacheRows<'_>], out: &mut [f32]) {
        let Some(longest) = rows.iter().map(|row| row.len).max() else { return };
        let mut states: Vec<State> = vec![vec![(f32::NEG_INFINITY, 0.0); self.heads]; rows.len()];
        let mut scores = Vec::new();
        out.fill(0.0);
        let mut seen = 0;
        for (at, page) in rows[0].pages.iter().enumerate() {
            let next = match rows[0].pages.get(at + 1) {
                Some(Page::F32(data)) => data,
                _ => &[][..],
            };
            if seen >= longest {
                break;
            }
            let tokens = (longest - seen).min(page.len() / self.width);
            let wide = if matches!(page, Page::Bf16(_)) { tokens * self.width } else { 0 };
            scratch::with_f32(wide, |wide| {
                let page = match page {
                    Page::F32(data) => &data[..tokens * self.width],
                    Page::Bf16(data) => {
                        widen(Isa::best(), &data[..tokens * self.width], wide);
                        &*wide
                    }
                };
                let results = out.chunks_exact_mut(self.heads * self.rank);
                let each = rows.iter().zip(&mut states).zip(q.chunks_exact(self.heads * self.width)).zip(results);
                for (i, (((row, state), q), out)) in each.enumerate() {
                    let next = if i == 0 { next } else { &[] };
                    let tokens = row.len.saturating_sub(seen).min(tokens);
                    if tokens > 0 {
                        scores.resize(self.heads * tokens, 0.0);
                        page::visit(Isa::best(), self, &mut scores, state, q, &page[..tokens * self.width], next, out);
                    }
                }
            });
            seen += tokens;
        }
        let results = out.chunks_exact_mut(self.heads * self.rank);
        for ((row, state), out) in rows.iter().zip(&states).zip(results) {
            let left = row.len.saturating_sub(seen);
            assert!(left == 0 && row.len > 0, "a query sees {} tokens, its pages lack {left}", row.len);
            for (out, (_, total)) in out.chunks_exact_mut(self.rank).zip(state) {
                let inverse = 1.0 / total;
                out.iter_mut().for_each(|o| *o *= inverse);
            }
        }
    }
}

#[cfg(test)]
mod tests;
