//! Group relative policy optimisation: advantages, objective, and its gradient with respect to log-probabilities.
//!
//! A_i = (r_i − mean)/std over a group, population std; a group whose rewards are all equal has A = 0.
//! Per token, ρ = exp(logp − old), d = ref − logp: min(ρA, clip(ρ, 1−ε, 1+ε)·A) − β·(exp(d) − d − 1).
//! The objective of a completion is the mean over its own tokens; the loss is minus the mean over completions.
//! `ratio: sequence` takes one ρ and one d per completion, from sums over its tokens, as the report writes it;
//! `normalisation: token` divides by the tokens of the step instead. DeepSeekMath §4.1, DeepSeek-V3 §5.2.2,
//! `reference/deepseek-v3.md` §14.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a probability ratio is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Ratio {
    /// One per token (DeepSeekMath).
    #[default]
    Token,
    /// One per completion (the report's text).
    Sequence,
}

/// What terms are averaged over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Normalisation {
    /// Over a completion's tokens, then over completions.
    #[default]
    Completion,
    /// Over all tokens of the step, so that long completions weigh more.
    Token,
}

/// Settings of the objective.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GrpoConfig {
    /// ε: how far a ratio may leave 1 before its gradient stops.
    pub clip_eps: f64,
    /// β: weight of the KL term against the reference model; 0 needs no reference.
    pub kl_beta: f64,
    /// What a probability ratio is of.
    pub ratio: Ratio,
    /// What terms are averaged over.
    pub normalisation: Normalisation,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        Self { clip_eps: 0.2, kl_beta: 0.005, ratio: Ratio::Token, normalisation: Normalisation::Completion }
    }
}

/// Log-probabilities of one completion's tokens under three models, and its advantage.
#[derive(Clone, Copy, Debug)]
pub struct Completion<'a> {
    /// Under the model being trained.
    pub logp: &'a [f32],
    /// Under the model that wrote it.
    pub old: &'a [f32],
    /// Under the reference model; absent when β is 0.
    pub reference: Option<&'a [f32]>,
    /// A_i.
    pub advantage: f32,
}

/// What the objective is divided by: counts over the whole step, of which a call may see a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSize {
    /// Completions.
    pub completions: usize,
    /// Their tokens.
    pub tokens: usize,
}

impl StepSize {
    /// Of `completions` alone.
    pub fn of(completions: &[Completion<'_>]) -> Self {
        Self { completions: completions.len(), tokens: completions.iter().map(|c| c.logp.len()).sum() }
    }
}

/// The objective of some completions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Their share in the loss of the step.
    pub loss: f64,
    /// Objective of each completion.
    pub objective: Vec<f64>,
    /// Mean of exp(d) − d − 1 of each completion.
    pub kl: Vec<f64>,
    /// Gradient of the loss with respect to each log-probability.
    pub d_logp: Vec<Vec<f32>>,
    /// Tokens on the clipped branch, where no gradient flows through ρ.
    pub clipped_tokens: usize,
}

/// Advantages of completions in group order, `group` to a prompt.
///
/// # Panics
/// When `group` is 0.
pub fn advantages(rewards: &[f32], group: usize) -> Vec<f32> {
    rewards.chunks(group).flat_map(group_advantages).collect()
}

fn group_advantages(rewards: &[f32]) -> Vec<f32> {
    // A rounded mean can leave a tiny std, so equality is tested on the rewards themselves.
    if rewards.iter().all(|r| *r == rewards[0]) {
        return vec![0.0; rewards.len()];
    }
    let count = rewards.len() as f64;
    let mean = rewards.iter().map(|r| f64::from(*r)).sum::<f64>() / count;
    let variance = rewards.iter().map(|r| (f64::from(*r) - mean).powi(2)).sum::<f64>() / count;
    rewards.iter().map(|r| ((f64::from(*r) - mean) / variance.sqrt()) as f32).collect()
}

/// One ratio's term and its derivative with respect to the log-probability behind it.
struct Term {
    value: f64,
    kl: f64,
    derivative: f64,
    clipped: bool,
}

fn term(logp: f64, old: f64, reference: Option<f64>, advantage: f64, config: &GrpoConfig) -> Term {
    let ratio = (logp - old).exp();
    let plain = ratio * advantage;
    let bounded = ratio.clamp(1.0 - config.clip_eps, 1.0 + config.clip_eps) * advantage;
    let clipped = bounded < plain;
    let d = reference.map_or(0.0, |reference| reference - logp);
    let kl = d.exp_m1() - d;
    let policy_derivative = if clipped { 0.0 } else { plain };
    Term {
        value: plain.min(bounded) - config.kl_beta * kl,
        kl,
        derivative: policy_derivative + config.kl_beta * d.exp_m1(),
        clipped,
    }
}

/// Loss, per-completion figures and gradients of `completions`, as part of a step of size `step`.
///
/// # Panics
/// When the lengths of a completion's lists differ.
pub fn objective(completions: &[Completion<'_>], step: StepSize, config: &GrpoConfig) -> Outcome {
    let mut out = Outcome::default();
    for completion in completions {
        let tokens = completion.logp.len();
        assert_eq!(tokens, completion.old.len(), "GRPO: old log-probabilities of a completion");
        let terms = terms(completion, config);
        let (sum, kl) = terms.iter().fold((0.0, 0.0), |(sum, kl), term| (sum + term.value, kl + term.kl));
        let count = terms.len().max(1) as f64;
        // Share of one term in the loss of the step.
        let share = match config.normalisation {
            Normalisation::Completion => 1.0 / (count * step.completions.max(1) as f64),
            Normalisation::Token if config.ratio == Ratio::Token => 1.0 / step.tokens.max(1) as f64,
            Normalisation::Token => tokens as f64 / step.tokens.max(1) as f64,
        };
        out.loss -= sum * share;
        out.objective.push(sum / count);
        out.kl.push(kl / count);
        let gradient = |token: usize| terms.get(token).or(terms.first()).map_or(0.0, |term| -term.derivative * share);
        out.d_logp.push(match config.ratio {
            Ratio::Token => (0..tokens).map(|token| gradient(token) as f32).collect(),
            Ratio::Sequence => vec![gradient(0) as f32; tokens],
        });
        let clipped = terms.iter().filter(|term| term.clipped).count();
        out.clipped_tokens += if config.ratio == Ratio::Sequence { clipped * tokens } else { clipped };
    }
    out
}

fn terms(completion: &Completion<'_>, config: &GrpoConfig) -> Vec<Term> {
    let advantage = f64::from(completion.advantage);
    match config.ratio {
        Ratio::Token => (0..completion.logp.len())
            .map(|t| {
                let reference = completion.reference.map(|reference| f64::from(reference[t]));
                term(f64::from(completion.logp[t]), f64::from(completion.old[t]), reference, advantage, config)
            })
            .collect(),
        Ratio::Sequence => {
            let sum = |list: &[f32]| list.iter().map(|x| f64::from(*x)).sum::<f64>();
            let reference = completion.reference.map(sum);
            vec![term(sum(completion.logp), sum(completion.old), reference, advantage, config)]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rewards_have_no_advantage_even_when_their_mean_is_rounded() {
        assert_eq!(advantages(&[0.1; 3], 3), [0.0; 3]);
        let a = advantages(&[0.0, 2.0, 1.0, 1.0], 2);
        assert_eq!(a, [-1.0, 1.0, 0.0, 0.0]);
    }

    fn loss(logp: &[Vec<f32>], config: &GrpoConfig) -> Outcome {
        let old = [vec![-1.0_f32, -2.0, -0.5], vec![-1.5, -0.7]];
        let reference = [vec![-1.1_f32, -1.8, -0.6], vec![-1.4, -0.9]];
        let completions: Vec<Completion> = (0..2)
            .map(|i| Completion {
                logp: &logp[i],
                old: &old[i],
                reference: Some(&reference[i]),
                advantage: [1.0, -1.0][i],
            })
            .collect();
        objective(&completions, StepSize::of(&completions), config)
    }

    #[test]
    fn gradients_are_finite_differences() {
        let logp = vec![vec![-0.9_f32, -2.05, -0.1], vec![-1.45, -1.2]];
        for ratio in [Ratio::Token, Ratio::Sequence] {
            for normalisation in [Normalisation::Completion, Normalisation::Token] {
                let config = GrpoConfig { kl_beta: 0.3, ratio, normalisation, clip_eps: 0.2 };
                let at = loss(&logp, &config);
                for (i, row) in logp.iter().enumerate() {
                    for t in 0..row.len() {
                        let moved = |by: f32| {
                            let mut logp = logp.clone();
                            logp[i][t] += by;
                            loss(&logp, &config).loss
                        };
                        let numeric = (moved(1e-3) - moved(-1e-3)) / 2e-3;
                        let got = f64::from(at.d_logp[i][t]);
                        assert!((numeric - got).abs() < 1e-3, "{config:?} {i} {t}: {numeric} {got}");
                    }
                }
            }
        }
    }

    #[test]
    fn on_policy_the_loss_is_minus_the_mean_advantage() {
        let logp = [-1.0_f32, -2.0];
        let one = |advantage| Completion { logp: &logp, old: &logp, reference: None, advantage };
        let completions = [one(0.5), one(-1.5)];
        let out = objective(&completions, StepSize::of(&completions), &GrpoConfig::default());
        assert!((out.loss - 0.5).abs() < 1e-7 && out.clipped_tokens == 0);
    }
}
