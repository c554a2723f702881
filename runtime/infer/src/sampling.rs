//! From logits to a token: log-probabilities, temperature, top-p, and noise that depends on nothing but the seed.
//!
//! A token is drawn as `argmax_i (ln p_i + g_i)` with independent Gumbel noise `g_i` (Gumbel-max), written as the race
//! `argmin_i (e_i / p_i)`, `e_i = -ln u_i`, which needs one logarithm. `u_i` is keyed by (seed, position, token id) and
//! by nothing else. **Invariant:** the token at a position is a pure function of (logits, sampling, position). So the text
//! of a seed is the same in any batch, and a drafting head that draws from its own distribution under the *same* noise
//! proposes exactly what the main model will draw wherever the two distributions agree: accepting on equality is
//! lossless for any temperature, without a separate correction step (Daliri et al., "Coupling without Communication
//! and Drafter-Invariant Speculative Decoding", 2024).

use dsv3_core::Rng;

/// How to choose a token from a distribution.
///
/// ```
/// use dsv3_infer::sampling::{Sampling, sample};
/// let logits = [0.5, 2.0, -1.0];
/// assert_eq!(sample(&logits, &Sampling::default(), 0), Some(1));
/// let warm = Sampling { temperature: 1.0, top_p: 0.9, seed: 7 };
/// assert_eq!(sample(&logits, &warm, 3), sample(&logits, &warm, 3));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Keeps the smallest set of most likely tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f64,
    /// Names the noise.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

/// `ln Σ exp(row)` in double precision; NaN when [`argmax`] has no answer.
pub fn log_sum_exp(row: &[f32]) -> f64 {
    let Some(best) = argmax(row) else { return f64::NAN };
    let max = f64::from(row[best as usize]);
    max + row.iter().map(|v| (f64::from(*v) - max).exp()).sum::<f64>().ln()
}

/// Index of the largest logit; ties go to the lowest id. `None` for a row without a finite value or with NaN.
pub fn argmax(row: &[f32]) -> Option<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (id, value) in row.iter().enumerate() {
        if value.is_nan() || *value == f32::INFINITY {
            return None;
        }
        if *value > best.map_or(f32::NEG_INFINITY, |b| b.1) {
            best = Some((id, *value));
        }
    }
    best.map(|b| b.0 as u32)
}

/// The `n` most likely ids with their log-probabilities, most likely first, ties to the lowest id.
pub fn top(row: &[f32], log_sum: f64, n: usize) -> Vec<(u32, f32)> {
    let n = n.min(row.len());
    if n == 0 {
        return Vec::new();
    }
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    let order = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    if n < ids.len() {
        ids.select_nth_unstable_by(n - 1, order);
        ids.truncate(n);
    }
    ids.sort_unstable_by(order);
    ids.into_iter().map(|id| (id, (f64::from(row[id as usize]) - log_sum) as f32)).collect()
}

/// Draws the token at `position`; `None` when the logits are not finite.
pub fn sample(row: &[f32], sampling: &Sampling, position: usize) -> Option<u32> {
    let greedy = argmax(row)?;
    if sampling.temperature <= 0.0 || sampling.top_p <= 0.0 {
        return Some(greedy);
    }
    let max = f64::from(row[greedy as usize]);
    let weight = |id: usize| ((f64::from(row[id]) - max) / sampling.temperature).exp();
    let weights: Vec<f64> = (0..row.len()).map(weight).collect();
    let kept = (sampling.top_p < 1.0).then(|| nucleus(&weights, sampling.top_p));
    Some(race(&weights, kept.as_deref(), sampling.seed, position).unwrap_or(greedy))
}

/// For each id whether it belongs to the smallest most likely set whose probability reaches `top_p`.
fn nucleus(weights: &[f64], top_p: f64) -> Vec<bool> {
    let mut ids: Vec<usize> = (0..weights.len()).collect();
    ids.sort_unstable_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
    let target = top_p * weights.iter().sum::<f64>();
    let (mut kept, mut sum) = (vec![false; weights.len()], 0.0);
    for id in ids {
        kept[id] = true;
        sum += weights[id];
        if sum >= target {
            break;
        }
    }
    kept
}

/// `argmin -ln(u_id) / weight_id` over the kept ids; ties to the lowest id.
fn race(weights: &[f64], kept: Option<&[bool]>, seed: u64, position: usize) -> Option<u32> {
    let mut noise = Rng::new(seed).key("sample").key(position);
    let mut best: Option<(u32, f64)> = None;
    for (id, weight) in weights.iter().enumerate() {
        let u = 1.0 - noise.uniform();
        if *weight <= 0.0 || kept.is_some_and(|kept| !kept[id]) {
            continue;
        }
        let bound = best.map_or(f64::INFINITY, |b| b.1);
        // -ln u >= 1 - u, so most ids are out of the race before the logarithm.
        if (1.0 - u) / weight >= bound {
            continue;
        }
        let time = -u.ln() / weight;
        if time < bound {
            best = Some((id as u32, time));
        }
    }
    best.map(|b| b.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [0.3, -1.0, 2.0, 2.0, -4.0, 1.1];

    fn probabilities(temperature: f64) -> Vec<f64> {
        let scaled: Vec<f32> = LOGITS.iter().map(|l| (f64::from(*l) / temperature) as f32).collect();
        let sum = log_sum_exp(&scaled);
        scaled.iter().map(|l| (f64::from(*l) - sum).exp()).collect()
    }

    fn frequencies(sampling: Sampling, draws: usize) -> Vec<f64> {
        let mut counts = vec![0.0; LOGITS.len()];
        for position in 0..draws {
            counts[sample(&LOGITS, &sampling, position).unwrap() as usize] += 1.0 / draws as f64;
        }
        counts
    }

    #[test]
    fn greedy_ties_go_to_the_lowest_id() {
        assert_eq!(argmax(&LOGITS), Some(2));
        assert_eq!(sample(&LOGITS, &Sampling::default(), 9), Some(2));
        assert_eq!(top(&LOGITS, log_sum_exp(&LOGITS), 3).iter().map(|t| t.0).collect::<Vec<_>>(), [2, 3, 5]);
    }

    #[test]
    fn non_finite_logits_are_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(sample(&[0.0, bad, 1.0], &Sampling { temperature: 1.0, ..Sampling::default() }, 0), None);
            assert!(log_sum_exp(&[0.0, bad, 1.0]).is_nan());
        }
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), None);
        assert_eq!(argmax(&[f32::NEG_INFINITY, -3.0]), Some(1));
    }

    #[test]
    fn draws_follow_the_distribution() {
        for temperature in [0.5, 1.0, 2.0] {
            let got = frequencies(Sampling { temperature, top_p: 1.0, seed: 3 }, 40_000);
            for (got, want) in got.iter().zip(probabilities(temperature)) {
                assert!((got - want).abs() < 0.01, "T {temperature}: {got} for {want}");
            }
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_and_renormalises() {
        let p = probabilities(1.0);
        let got = frequencies(Sampling { temperature: 1.0, top_p: p[2] + p[3] + 1e-6, seed: 1 }, 40_000);
        let mass = p[2] + p[3] + p[5];
        for (id, got) in got.iter().enumerate() {
            let want = if [2, 3, 5].contains(&id) { p[id] / mass } else { 0.0 };
            assert!((got - want).abs() < 0.01, "{id}: {got} for {want}");
        }
        assert!(frequencies(Sampling { temperature: 1.0, top_p: 0.0, seed: 1 }, 10)[2] > 0.99);
    }

    #[test]
    fn noise_depends_on_seed_and_position_only() {
        let draw = |seed, position| sample(&LOGITS, &Sampling { temperature: 1.0, top_p: 1.0, seed }, position);
        assert_eq!(draw(5, 17), draw(5, 17));
        let differs = |f: &dyn Fn(usize) -> Option<u32>| (0..64).any(|i| f(i) != f(i + 64));
        assert!(differs(&|i| draw(i as u64, 0)) && differs(&|i| draw(0, i)));
    }

    #[test]
    fn coupled_draws_of_near_distributions_mostly_agree() {
        let near: Vec<f32> = LOGITS.iter().enumerate().map(|(i, l)| l + 0.1 * (i as f32 - 2.0)).collect();
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, seed: 8 };
        let agree = (0..4000).filter(|p| sample(&LOGITS, &sampling, *p) == sample(&near, &sampling, *p)).count();
        assert!(agree > 3400, "{agree} of 4000");
    }
}
