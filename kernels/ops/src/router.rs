//! Mixture-of-experts gating: sigmoid scores, group-limited choice by biased score, gates from unbiased scores.
//!
//! s = σ(x·Wᵀ) in F32 whatever the compute precision. Choice: z = s + bias; a group of consecutive experts scores the
//! sum of its two largest z (its largest when groups have one expert); the best `top_groups` groups stay, the others
//! are −∞; the `top_k` largest z are chosen, ties to the lower index, listed by falling z. Gates: g = scale·s / (Σ chosen
//! s + 1e-20). The bias only chooses: no gradient reaches it. (Report §2.1.2, `reference/deepseek-v3.md` §3.)

use crate::gemm::{Mat, gemm};
use crate::isa::{Isa, simd_fn};
use crate::memory::buffer;
use crate::vector::{collect, for_row_chunks, sigmoid};
use crate::{Back, Grads, Job, Param, ParamId, Tape, Tensor, Var, VarId, Weight, linear};

/// Tokens a thread routes at a time.
const CHUNK_TOKENS: usize = 64;

/// How experts are chosen and their gates made.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Routed experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Groups of consecutive experts.
    pub groups: usize,
    /// Groups a token may choose from.
    pub top_groups: usize,
    /// Multiplier of the gates.
    pub scale: f32,
    /// Whether the chosen scores are divided by their sum.
    pub norm_topk: bool,
}

/// Affinity of every token to every expert: σ(x·wᵀ), `[tokens, experts]`.
pub fn scores_forward(x: &Tensor, w: &Weight) -> Tensor {
    scores(x, w)
}

/// [`scores_forward`] with the gradients of `x` and `w`.
pub fn scores_on_tape(tape: &mut Tape, x: &Var, w: &Param) -> Var {
    let value = scores(&x.value, &w.compute);
    let (input, param, scores) = (x.clone(), w.id, value.clone());
    tape.push(value, |out| Box::new(ScoresBack { input, weight: w.compute.dequantize(), scores, param, out }))
}

fn scores(x: &Tensor, w: &Weight) -> Tensor {
    let experts = w.outputs();
    let mut scores = linear::forward_unrounded(x, w);
    for_row_chunks(scores.as_f32_mut(), experts, CHUNK_TOKENS, 8 * experts, |_, chunk| {
        sigmoid_chunk(Isa::best(), chunk);
    });
    scores.reshape(&[x.rows(), experts])
}

simd_fn! {
    fn sigmoid_chunk(z: &mut [f32]) {
        for z in z.iter_mut() {
            *z = sigmoid(*z);
        }
    }
}

simd_fn! {
    /// Turns gradients of scores into those of logits.
    fn sigmoid_grad_chunk(d: &mut [f32], s: &[f32]) {
        for (d, s) in d.iter_mut().zip(s) {
            *d *= s * (1.0 - s);
        }
    }
}

struct ScoresBack {
    input: Var,
    weight: Tensor,
    scores: Tensor,
    param: ParamId,
    out: VarId,
}

impl Back for ScoresBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let mut d_logits = grads.take(self.out)?;
        let s = self.scores.as_f32();
        for_row_chunks(d_logits.as_f32_mut(), 1, 1 << 13, 2, |first, chunk| {
            sigmoid_grad_chunk(Isa::best(), chunk, &s[first..]);
        });
        let (experts, d, tokens) = (self.weight.rows(), self.weight.cols(), self.input.value.rows());
        let mut dx = buffer(tokens * d);
        let w = Mat::rows(self.weight.as_f32(), d);
        gemm(tokens, d, experts, Mat::rows(d_logits.as_f32(), experts), w, &mut dx, d, false);
        grads.add(self.input.id(), Tensor::f32(self.input.value.shape(), dx));
        Some(Job::new(move |weights| {
            let (slot, accumulate) = weights.slot_or_new(self.param, self.weight.shape());
            let x = Mat::rows(self.input.value.as_f32(), d);
            gemm(experts, d, tokens, Mat::transposed(d_logits.as_f32(), experts), x, slot, d, accumulate);
        }))
    }
}

/// The experts of every token, `[tokens, top_k]` U32, by falling biased score.
///
/// # Panics
/// When the sizes of `scores`, `bias` and `config` disagree.
pub fn select(scores: &Tensor, bias: &[f32], config: &Config) -> Tensor {
    let (experts, tokens, s) = (config.experts, scores.rows(), scores.as_f32());
    assert!(
        scores.cols() == experts && bias.len() == experts && experts.is_multiple_of(config.groups),
        "{} scores, {} biases, {experts} experts in {} groups",
        scores.cols(),
        bias.len(),
        config.groups,
    );
    assert!(config.top_k <= experts && config.top_groups <= config.groups, "more choices than experts or groups");
    let chunks = collect(tokens.div_ceil(CHUNK_TOKENS), CHUNK_TOKENS * experts * config.top_k, |chunk| {
        let range = chunk * CHUNK_TOKENS..tokens.min((chunk + 1) * CHUNK_TOKENS);
        let mut chosen = Vec::with_capacity(range.len() * config.top_k);
        let mut choice = Choice::new(config);
        for token in range {
            choice.of_token(&s[token * experts..][..experts], bias, config, &mut chosen);
        }
        chosen
    });
    Tensor::u32(&[tokens, config.top_k], chunks.concat())
}

/// Scratch of one thread's choices.
struct Choice {
    biased: Vec<f32>,
    group_scores: Vec<f32>,
    group_taken: Vec<bool>,
    expert_taken: Vec<bool>,
}

impl Choice {
    fn new(config: &Config) -> Self {
        Self {
            biased: vec![0.0; config.experts],
            group_scores: vec![0.0; config.groups],
            group_taken: vec![false; config.groups],
            expert_taken: vec![false; config.experts],
        }
    }

    fn of_token(&mut self, scores: &[f32], bias: &[f32], config: &Config, chosen: &mut Vec<u32>) {
        for ((z, s), b) in self.biased.iter_mut().zip(scores).zip(bias) {
            *z = s + b;
        }
        if config.top_groups < config.groups {
            self.drop_groups(config);
        }
        self.expert_taken.fill(false);
        for _ in 0..config.top_k {
            let expert = take_largest(&self.biased, &mut self.expert_taken);
            chosen.push(expert as u32);
        }
    }

    fn drop_groups(&mut self, config: &Config) {
        let size = config.experts / config.groups;
        for (score, group) in self.group_scores.iter_mut().zip(self.biased.chunks_exact(size)) {
            *score = two_largest(group);
        }
        self.group_taken.fill(false);
        for _ in 0..config.top_groups {
            take_largest(&self.group_scores, &mut self.group_taken);
        }
        for (group, kept) in self.biased.chunks_exact_mut(size).zip(&self.group_taken) {
            if !kept {
                group.fill(f32::NEG_INFINITY);
            }
        }
    }
}

fn two_largest(values: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &v in values {
        if v > first {
            (first, second) = (v, first);
        } else if v > second {
            second = v;
        }
    }
    if values.len() == 1 { first } else { first + second }
}

/// Index of the largest value not yet taken, ties to the lower; marks it taken. Some index even among NaN.
pub(crate) fn take_largest(values: &[f32], taken: &mut [bool]) -> usize {
    let mut best = None;
    for (i, &v) in values.iter().enumerate() {
        if !taken[i] && best.is_none_or(|(_, largest)| v > largest) {
            best = Some((i, v));
        }
    }
    let index = best.map_or(0, |(i, _)| i);
    taken[index] = true;
    index
}

/// Weights of the chosen experts, `[tokens, top_k]`, from their unbiased scores.
pub fn gates_forward(scores: &Tensor, experts: &Tensor, config: &Config) -> Tensor {
    let (width, k, s, chosen) = (scores.cols(), experts.cols(), scores.as_f32(), experts.as_u32());
    let mut out = vec![0.0; experts.numel()];
    for_row_chunks(&mut out, k, CHUNK_TOKENS, 2 * k, |first, chunk| {
        for (i, gates) in chunk.chunks_exact_mut(k).enumerate() {
            let token = first + i;
            for (gate, &expert) in gates.iter_mut().zip(&chosen[token * k..][..k]) {
                *gate = s[token * width + expert as usize];
            }
            let total = if config.norm_topk { gates.iter().sum::<f32>() + 1e-20 } else { 1.0 };
            for gate in gates {
                *gate = *gate / total * config.scale;
            }
        }
    });
    Tensor::f32(experts.shape(), out)
}

/// [`gates_forward`] with the gradient of `scores`.
pub fn gates_on_tape(tape: &mut Tape, scores: &Var, experts: &Tensor, config: &Config) -> Var {
    let value = gates_forward(&scores.value, experts, config);
    let (scores, experts, config) = (scores.clone(), experts.clone(), config.clone());
    tape.push(value, |out| Box::new(GatesBack { scores, experts, config, out }))
}

struct GatesBack {
    scores: Var,
    experts: Tensor,
    config: Config,
    out: VarId,
}

impl Back for GatesBack {
    fn inputs(self: Box<Self>, grads: &mut Grads) -> Option<Job> {
        let dy = grads.take(self.out)?;
        let (width, k) = (self.scores.value.cols(), self.experts.cols());
        let (s, chosen, dy) = (self.scores.value.as_f32(), self.experts.as_u32(), dy.as_f32());
        let mut ds = crate::memory::zeros(s.len());
        for_row_chunks(&mut ds, width, CHUNK_TOKENS, width, |first, chunk| {
            for (i, ds) in chunk.chunks_exact_mut(width).enumerate() {
                let token = first + i;
                let (s, chosen, dy) = (&s[token * width..][..width], &chosen[token * k..][..k], &dy[token * k..][..k]);
                // With Z = Σ s + 1e-20: ds_k = scale / Z · (dy_k − Σ_j dy_j s_j / Z).
                let (mut total, mut pull) = (1.0, 0.0);
                if self.config.norm_topk {
                    total = chosen.iter().map(|&e| s[e as usize]).sum::<f32>() + 1e-20;
                    pull = chosen.iter().zip(dy).map(|(&e, d)| s[e as usize] * d).sum::<f32>() / total;
                }
                for (&expert, d) in chosen.iter().zip(dy) {
                    ds[expert as usize] += self.config.scale / total * (d - pull);
                }
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

    fn config(experts: usize, top_k: usize, groups: usize, top_groups: usize) -> Config {
        Config { experts, top_k, groups, top_groups, scale: 2.5, norm_topk: true }
    }

    /// The choice by sorting everything.
    fn reference(s: &[f32], bias: &[f32], c: &Config) -> Vec<u32> {
        let mut z: Vec<f32> = s.iter().zip(bias).map(|(s, b)| s + b).collect();
        let size = c.experts / c.groups;
        let mut groups: Vec<(usize, f32)> = (0..c.groups)
            .map(|g| {
                let mut members = z[g * size..(g + 1) * size].to_vec();
                members.sort_by(|a, b| b.total_cmp(a));
                (g, members.iter().take(2).sum())
            })
            .collect();
        groups.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for (g, _) in &groups[c.top_groups..] {
            z[g * size..(g + 1) * size].fill(f32::NEG_INFINITY);
        }
        let mut order: Vec<u32> = (0..c.experts as u32).collect();
        order.sort_by(|a, b| z[*b as usize].total_cmp(&z[*a as usize]).then(a.cmp(b)));
        order[..c.top_k].to_vec()
    }

    #[test]
    fn choices_follow_the_reference() {
        for c in
            [config(16, 4, 4, 2), config(12, 3, 1, 1), config(8, 2, 8, 3), config(256, 8, 8, 4), config(6, 6, 2, 2)]
        {
            let s = values(&[70, c.experts], 5);
            // Coarse biases make ties.
            let bias: Vec<f32> = values(&[c.experts], 6).as_f32().iter().map(|b| (b * 4.0).round() / 2.0).collect();
            let chosen = select(&s, &bias, &c);
            assert_eq!(chosen.shape(), [70, c.top_k]);
            for (s, chosen) in s.as_f32().chunks(c.experts).zip(chosen.as_u32().chunks(c.top_k)) {
                assert_eq!(chosen, reference(s, &bias, &c), "{c:?}");
            }
        }
    }

    #[test]
    fn ties_go_to_the_lower_index_and_dropped_groups_stay_dropped() {
        let c = config(4, 2, 2, 1);
        // All biased scores are negative: a dropped group masked with 0 would win.
        let s = Tensor::f32(&[1, 4], vec![0.1, 0.1, 0.3, 0.1]);
        assert_eq!(select(&s, &[-1.0; 4], &c).as_u32(), [2, 3]);
        assert_eq!(select(&Tensor::f32(&[1, 4], vec![0.5; 4]), &[0.0; 4], &c).as_u32(), [0, 1]);
        assert_eq!(select(&Tensor::f32(&[1, 4], vec![f32::NAN; 4]), &[0.0; 4], &c).as_u32(), [0, 1]);
    }

    #[test]
    fn gates_are_normalised_unbiased_scores() {
        let s = Tensor::f32(&[1, 4], vec![0.1, 0.2, 0.3, 0.4]);
        let chosen = Tensor::u32(&[1, 2], vec![3, 1]);
        let gates = gates_forward(&s, &chosen, &config(4, 2, 1, 1));
        for (got, want) in gates.as_f32().iter().zip([2.5 * 0.4 / 0.6, 2.5 * 0.2 / 0.6]) {
            assert!((got - want).abs() < 1e-6);
        }
        let plain = gates_forward(&s, &chosen, &Config { norm_topk: false, scale: 1.0, ..config(4, 2, 1, 1) });
        assert_eq!(plain.as_f32(), [0.4, 0.2]);
    }

    #[test]
    fn gradients() {
        let inputs = || vec![values(&[5, 7], 7)];
        let w = || vec![values(&[6, 7], 8)];
        check_gradients("router scores", inputs(), w(), |t, x, p| scores_on_tape(t, &x[0], &p[0]), 1e-3);
        let chosen = Tensor::u32(&[5, 2], vec![0, 1, 2, 3, 4, 5, 0, 5, 1, 4]);
        for norm_topk in [true, false] {
            let c = Config { norm_topk, ..config(6, 2, 1, 1) };
            let run = |t: &mut Tape, x: &[Var], p: &[Param]| {
                let scores = scores_on_tape(t, &x[0], &p[0]);
                gates_on_tape(t, &scores, &chosen, &c)
            };
            check_gradients("router gates", inputs(), w(), run, 1e-3);
        }
    }
}
