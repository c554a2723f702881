//! Sequence-wise balance loss, without its factor α: the mean over sequences of Σ_i f_i·P_i.
//!
//! For a sequence of T tokens: f_i = N/(K·T) · #{t : i among the K largest unbiased scores of t}, not limited to
//! groups; P_i = (1/T) Σ_t s_ti / Σ_j s_tj. f carries no gradient. Report §2.1.2, equations 17 to 20.

use crate::isa::{Isa, simd_fn};
use crate::router::take_largest;
use crate::vector::{collect, dot, for_row_chunks, sum};
use crate::{Back, Grads, Job, Spans, Tape, Tensor, Var, VarId};

/// Tokens a thread differentiates at a time.
const CHUNK_TOKENS: usize = 64;

/// The loss `[1]` of `scores` `[tokens, experts]`; empty sequences do not count.
///
/// # Panics
/// When `spans` does not cover the tokens.
pub fn forward(scores: &Tensor, spans: &Spans, top_k: usize) -> Tensor {
    let parts = per_span(scores, spans, top_k);
    Tensor::f32(&[1], vec![mean(&parts)])
}

/// [`forward`] with the gradient of `scores`.
pub fn on_tape(tape: &mut Tape, scores: &Var, spans: &Spans, top_k: usize) -> Var {
    let parts = per_span(&scores.value, spans, top_k);
    let value = Tensor::f32(&[1], vec![mean(&parts)]);
    let (scores, spans) = (scores.clone(), spans.clone());
    tape.push(value, |out| Box::new(BalanceBack { scores, spans, parts, out }))
}

/// One sequence: its loss and f.
struct Part {
    loss: f32,
    frequency: Vec<f32>,
}

fn per_span(scores: &Tensor, spans: &Spans, top_k: usize) -> Vec<Part> {
    let (experts, s) = (scores.cols(), scores.as_f32());
    assert_eq!(scores.rows(), spans.tokens(), "balance loss: spans do not cover the scores");
    let work = scores.numel() / spans.count().max(1) * top_k;
    collect(spans.count(), work, |i| {
        let range = spans.range(i);
        let tokens = range.len() as f32;
        let (mut counts, mut shares) = (vec![0_u32; experts], vec![0.0_f32; experts]);
        let mut taken = vec![false; experts];
        for row in s[range.start * experts..range.end * experts].chunks_exact(experts) {
            taken.fill(false);
            for _ in 0..top_k {
                counts[take_largest(row, &mut taken)] += 1;
            }
            let total = sum(row);
            for (share, score) in shares.iter_mut().zip(row) {
                *share += score / total;
            }
        }
        let frequency: Vec<f32> = counts.iter().map(|&c| experts as f32 * c as f32 / (top_k as f32 * tokens)).collect();
        let loss = frequency.iter().zip(&shares).map(|(f, share)| f * (share / tokens)).sum();
        Part { loss: if range.is_empty() { 0.0 } else { loss }, frequency }
    })
}

fn sequences(parts: &[Part]) -> f32 {
    // An empty sequence has 0/0 frequencies.
    parts.iter().filter(|part| part.frequency.iter().all(|f| f.is_finite())).count().max(1) as f32
}

fn mean(parts: &[Part]) -> f32 {
    parts.iter().map(|part| part.loss).sum::<f32>() / sequences(parts)
}

simd_fn! {
    /// d/ds_i of factor · Σ_j f_j s_j / Z with Z = Σ s: factor · (f_i − Σ_j f_j s_j / Z) / Z.
    fn row_grads(s: &[f32], f: &[f32], factor: f32, ds: &mut [f32]) {
        let total = sum(s);
        let level = dot(f, s) / total;
        for (d, f) in ds.iter_mut().zip(f) {
            *d = factor / total * (f - level);
        }
    }
}

struct BalanceBack {
    scores: Var,
    spans: Spans,
    parts: Vec<Part>,
    out: VarId,
}

impl Back for BalanceBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let seed = grads.take(self.out)?.as_f32()[0] / sequences(&self.parts);
        let (experts, s) = (self.scores.value.cols(), self.scores.value.as_f32());
        let mut span_of_token = Vec::with_capacity(self.spans.tokens());
        for (i, range) in self.spans.iter().enumerate() {
            span_of_token.extend(std::iter::repeat_n(i, range.len()));
        }
        let mut ds = crate::memory::zeros(s.len());
        for_row_chunks(&mut ds, experts, CHUNK_TOKENS, 2 * experts, |first, chunk| {
            for (i, ds) in chunk.chunks_exact_mut(experts).enumerate() {
                let (row, span) = (&s[(first + i) * experts..][..experts], span_of_token[first + i]);
                let factor = seed / self.spans.range(span).len() as f32;
                row_grads(Isa::best(), row, &self.parts[span].frequency, factor, ds);
            }
        });
        grads.add(self.scores.id(), Tensor::f32(self.scores.value.shape(), ds));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, values};

    /// Scores in (0, 1) that no test step can reorder: every row is a permutation of well-spaced values.
    fn spaced(tokens: usize, experts: usize) -> Tensor {
        let noise = values(&[tokens, experts], 9);
        let row = |row: &[f32]| {
            let rank = |v: f32| row.iter().filter(|w| **w < v).count();
            row.iter().map(|v| 0.1 + 0.8 * rank(*v) as f32 / experts as f32).collect::<Vec<_>>()
        };
        Tensor::f32(&[tokens, experts], noise.as_f32().chunks(experts).flat_map(row).collect())
    }

    /// The equations, in f64.
    fn reference(s: &Tensor, spans: &Spans, top_k: usize) -> f64 {
        let n = s.cols();
        let one = |range: std::ops::Range<usize>| {
            let t = range.len() as f64;
            let (mut f, mut p) = (vec![0.0; n], vec![0.0; n]);
            for row in s.as_f32()[range.start * n..range.end * n].chunks(n) {
                let total: f64 = row.iter().map(|v| f64::from(*v)).sum();
                for i in 0..n {
                    p[i] += f64::from(row[i]) / total / t;
                    if row.iter().filter(|v| **v > row[i]).count() < top_k {
                        f[i] += n as f64 / (top_k as f64 * t);
                    }
                }
            }
            f.iter().zip(&p).map(|(f, p)| f * p).sum::<f64>()
        };
        let losses: Vec<f64> = spans.iter().filter(|r| !r.is_empty()).map(one).collect();
        losses.iter().sum::<f64>() / losses.len() as f64
    }

    #[test]
    fn follows_the_equations() {
        let s = spaced(12, 6);
        for lens in [vec![12], vec![5, 0, 7]] {
            let spans = Spans::from_lens(lens);
            let (got, want) = (forward(&s, &spans, 2).as_f32()[0], reference(&s, &spans, 2));
            assert!((f64::from(got) - want).abs() < 1e-5, "{got} is not {want}");
        }
    }

    #[test]
    fn equal_loads_and_scores_give_one() {
        let s = Tensor::f32(&[4, 4], vec![0.5; 16]);
        // Ties go to the lower index, but equal shares make the loss Σ f / N all the same.
        assert!((forward(&s, &Spans::uniform(1, 4), 2).as_f32()[0] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn gradients() {
        let spans = Spans::from_lens([3, 0, 4]);
        check_gradients("balance_loss", vec![spaced(7, 5)], vec![], |t, x, _| on_tape(t, &x[0], &spans, 2), 2e-3);
    }
}
