//! One page of the cache, `[tokens, width]`, and one row's queries: scores, softmax so far, weighted sum of latents.
//!
//! A score is q·k in 16 lanes along the width, folded pairwise; a result's column is one chain of fused multiply-adds over
//! tokens. Heads share the loads of a cache row. The written form is compiled for every instruction set; AVX-512 has
//! a form with four tokens, or four vectors of columns, at a time, which keeps every lane's order.

use super::Walk;
use crate::isa::{Isa, simd_fn};
use crate::vector::{LANES, exp, exp_in_place, fold, max};

/// Heads that share the loads of a cache row.
pub(super) const HEADS_BLOCK: usize = 4;

/// Adds `page` to one row's running result; `scores` is `[heads, tokens]`. `next` will be read after it.
pub(super) fn visit(
    isa: Isa,
    walk: Walk,
    scores: &mut [f32],
    state: &mut [(f32, f32)],
    q: &[f32],
    page: &[f32],
    next: &[f32],
    out: &mut [f32],
) {
    let (width, rank) = (walk.width, walk.rank);
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        crate::isa::Kind::Avx512 => {
            wide::score(q, page, next, width, scores);
            soften(isa, walk, scores, state, out);
            wide::add_values(scores, page, width, rank, out);
        }
        _ => {
            score(isa, q, page, width, scores);
            soften(isa, walk, scores, state, out);
            add_values(isa, scores, page, width, rank, out);
        }
    }
}

simd_fn! {
    /// Scores become weights relative to the largest one so far; what came before is rescaled to it.
    fn soften(walk: Walk, scores: &mut [f32], state: &mut [(f32, f32)], out: &mut [f32]) {
        let tokens = scores.len() / walk.heads;
        let heads = scores.chunks_exact_mut(tokens).zip(state.iter_mut()).zip(out.chunks_exact_mut(walk.rank));
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
    }
}

simd_fn! {
    fn score(q: &[f32], page: &[f32], width: usize, scores: &mut [f32]) {
        let tokens = page.len() / width;
        let mut scores = scores;
        for q in q.chunks(HEADS_BLOCK * width) {
            let (here, rest) = scores.split_at_mut(q.len() / width * tokens);
            scores = rest;
            if q.len() == HEADS_BLOCK * width {
                score_block::<HEADS_BLOCK>(q, page, width, here);
            } else {
                for (q, here) in q.chunks_exact(width).zip(here.chunks_exact_mut(tokens)) {
                    score_block::<1>(q, page, width, here);
                }
            }
        }
    }
}

simd_fn! {
    fn add_values(p: &[f32], page: &[f32], width: usize, rank: usize, out: &mut [f32]) {
        let tokens = page.len() / width;
        for (p, out) in p.chunks(HEADS_BLOCK * tokens).zip(out.chunks_mut(HEADS_BLOCK * rank)) {
            if p.len() == HEADS_BLOCK * tokens {
                add_values_block::<HEADS_BLOCK>(p, page, width, rank, out);
            } else {
                for (p, out) in p.chunks_exact(tokens).zip(out.chunks_exact_mut(rank)) {
                    add_values_block::<1>(p, page, width, rank, out);
                }
            }
        }
    }
}

/// `scores[h][j] = q[h] · page[j]` for H heads, which share the loads of a key.
#[inline(always)]
fn score_block<const H: usize>(q: &[f32], page: &[f32], width: usize, scores: &mut [f32]) {
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
fn add_values_block<const H: usize>(p: &[f32], page: &[f32], width: usize, rank: usize, out: &mut [f32]) {
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

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod wide {
    //! The AVX-512 form. SAFETY, for the whole module: an `Isa` of this kind exists only where the features were detected;
    //! loads and stores stay within the slices, whose sizes `score` and `add_values` check, or are masked.

    use std::arch::x86_64::*;

    use super::{HEADS_BLOCK, LANES};

    /// Tokens scored, or vectors of columns summed, together with four heads: 16 sums in registers.
    const FOUR: usize = 4;

    /// Lanes below `count`.
    fn first_lanes(count: usize) -> __mmask16 {
        if count >= LANES { !0 } else { (1 << count) - 1 }
    }

    pub(super) fn score(q: &[f32], page: &[f32], next: &[f32], width: usize, scores: &mut [f32]) {
        let (tokens, heads) = (page.len() / width, q.len() / width);
        assert!(scores.len() == heads * tokens && tokens > 0, "scores of {heads} heads and {tokens} tokens");
        for head in (0..heads).step_by(HEADS_BLOCK) {
            for token in (0..tokens).step_by(FOUR) {
                if head == 0 {
                    prefetch(&next[next.len().min(token * width)..next.len().min((token + FOUR) * width)]);
                }
                // Past the last head or token the last one is computed again and dropped.
                let q: [&[f32]; HEADS_BLOCK] =
                    std::array::from_fn(|h| &q[(head + h).min(heads - 1) * width..][..width]);
                let keys: [&[f32]; FOUR] =
                    std::array::from_fn(|t| &page[(token + t).min(tokens - 1) * width..][..width]);
                // SAFETY: see the module.
                let sums = unsafe { score_four(q, keys) };
                for (h, sums) in sums.chunks_exact(FOUR).enumerate().take(heads - head) {
                    let count = FOUR.min(tokens - token);
                    scores[(head + h) * tokens + token..][..count].copy_from_slice(&sums[..count]);
                }
            }
        }
    }

    /// Asks for the cache lines of `x`: rows of several tokens are read side by side, which the processor does not foresee.
    fn prefetch(x: &[f32]) {
        for line in x.chunks(LANES) {
            // SAFETY: a hint, without effect on values.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
    }

    /// The score of head h and token t at 4·h + t.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn score_four(q: [&[f32]; HEADS_BLOCK], keys: [&[f32]; FOUR]) -> [f32; 16] {
        let width = q[0].len();
        let mut sums = [[_mm512_setzero_ps(); FOUR]; HEADS_BLOCK];
        for at in (0..width).step_by(LANES) {
            let mask = first_lanes(width - at);
            // SAFETY: masked lanes are not touched.
            let load = |x: &[f32]| unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr().add(at)) };
            let k = keys.map(load);
            for h in 0..HEADS_BLOCK {
                let q = load(q[h]);
                for t in 0..FOUR {
                    sums[h][t] = _mm512_mask3_fmadd_ps(q, k[t], sums[h][t], mask);
                }
            }
        }
        // Four folds of 16 vectors into one: lanes i and i + 8 of two vectors, i + 4 of four, i + 2, i + 1.
        let halves: [__m512; 8] = std::array::from_fn(|i| {
            let (a, b) = (sums[i % 4][i / 4 * 2], sums[i % 4][i / 4 * 2 + 1]);
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b))
        });
        let quarters: [__m512; 4] = std::array::from_fn(|i| {
            // Tokens 0 to 3 of head i.
            let (a, b) = (halves[i], halves[i + 4]);
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
        });
        let eighths: [__m512; 2] = std::array::from_fn(|i| {
            let (a, b) = (quarters[2 * i], quarters[2 * i + 1]);
            _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b))
        });
        let (a, b) = (eighths[0], eighths[1]);
        let all = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
        let mut by_token = [0.0; 16];
        // SAFETY: 16 elements.
        unsafe { _mm512_storeu_ps(by_token.as_mut_ptr(), all) };
        std::array::from_fn(|i| by_token[i % 4 * 4 + i / 4])
    }

    pub(super) fn add_values(p: &[f32], page: &[f32], width: usize, rank: usize, out: &mut [f32]) {
        let tokens = page.len() / width;
        let heads = p.len() / tokens;
        assert!(rank <= width && out.len() == heads * rank, "results of {heads} heads of {rank}");
        for head in (0..heads).step_by(HEADS_BLOCK) {
            for column in (0..rank).step_by(FOUR * LANES) {
                let count = HEADS_BLOCK.min(heads - head);
                let (p, out) = (&p[head * tokens..][..count * tokens], &mut out[head * rank..][..count * rank]);
                // SAFETY: see the module.
                unsafe {
                    match ((rank - column).div_ceil(LANES), count == HEADS_BLOCK) {
                        (1, true) => columns::<HEADS_BLOCK, 1>(p, page, width, rank, column, out),
                        (2, true) => columns::<HEADS_BLOCK, 2>(p, page, width, rank, column, out),
                        (3, true) => columns::<HEADS_BLOCK, 3>(p, page, width, rank, column, out),
                        (_, true) => columns::<HEADS_BLOCK, 4>(p, page, width, rank, column, out),
                        (vectors, false) => {
                            for (p, out) in p.chunks_exact(tokens).zip(out.chunks_exact_mut(rank)) {
                                for column in (column..rank).step_by(LANES).take(vectors.min(FOUR)) {
                                    columns::<1, 1>(p, page, width, rank, column, out);
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// V vectors of columns from `column` on, for H heads.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn columns<const H: usize, const V: usize>(
        p: &[f32],
        page: &[f32],
        width: usize,
        rank: usize,
        column: usize,
        out: &mut [f32],
    ) {
        let tokens = page.len() / width;
        // SAFETY: masked lanes are not touched; the others lie within the rank.
        unsafe {
            let masks: [__mmask16; V] = std::array::from_fn(|v| first_lanes(rank - column - v * LANES));
            let mut sums = [[_mm512_setzero_ps(); V]; H];
            let at = |h: usize, v: usize| h * rank + column + v * LANES;
            for h in 0..H {
                for v in 0..V {
                    sums[h][v] = _mm512_maskz_loadu_ps(masks[v], out.as_ptr().add(at(h, v)));
                }
            }
            for j in 0..tokens {
                let row = page.as_ptr().add(j * width + column);
                let c: [__m512; V] = std::array::from_fn(|v| _mm512_maskz_loadu_ps(masks[v], row.add(v * LANES)));
                for h in 0..H {
                    let p = _mm512_set1_ps(*p.as_ptr().add(h * tokens + j));
                    for v in 0..V {
                        sums[h][v] = _mm512_fmadd_ps(p, c[v], sums[h][v]);
                    }
                }
            }
            for h in 0..H {
                for v in 0..V {
                    _mm512_mask_storeu_ps(out.as_mut_ptr().add(at(h, v)), masks[v], sums[h][v]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for (heads, width, rank) in [(8, 160, 128), (1, 1, 1), (3, 17, 9), (5, 70, 66), (6, 96, 48), (4, 576, 512)] {
            for tokens in [1, 3, 4, 31, 32] {
                let (q, pages) = (values(&[heads, width], 1), values(&[2, tokens, width], 2));
                let run = |isa: Isa| {
                    let (mut scores, mut state) = (vec![0.0; heads * tokens], vec![(f32::NEG_INFINITY, 0.0); heads]);
                    let (mut out, walk) = (vec![0.0; heads * rank], Walk { heads, width, rank, scale: 0.3 });
                    for page in pages.as_f32().chunks_exact(tokens * width) {
                        visit(isa, walk, &mut scores, &mut state, q.as_f32(), page, &[], &mut out);
                    }
                    let sums = state.iter().flat_map(|(largest, sum)| [*largest, *sum]);
                    out.iter().copied().chain(sums).map(f32::to_bits).collect::<Vec<_>>()
                };
                let all = Isa::all();
                let expected = run(all[all.len() - 1]);
                for isa in all {
                    assert_eq!(run(isa), expected, "{heads} heads, {width}, {rank}, {tokens} tokens on {isa:?}");
                }
            }
        }
    }
}
