//! Rollouts: completions of prompts by the current weights, their rewards and advantages, and log-probabilities under
//! the training path.
//!
//! The noise of a completion is keyed by (seed, step, item), so a step replayed after an interruption writes the same
//! completions. π_old is recomputed on the training path, so that ratios start at exactly 1; the largest distance
//! |log π_train − log π_rollout| shows how far cached decoding is from it.

use dsv3_core::{Cancel, Rng};
use dsv3_data::{ChatTemplate, PromptRecord, Tokenizer};
use dsv3_hooks::RewardItem;
use dsv3_infer::{Completion, Finish, GenerateOptions, Request, Sampling, generate};
use dsv3_model::{Batch, Model, TrainOptions};
use dsv3_ops::Tape;
use dsv3_train::grpo;

use crate::{
    error::{Error, Result},
    reward::{Scored, Scorer},
    rl::Control,
    sft::split,
};

/// A prompt as the model reads it, and what its reward needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Tokens up to where the assistant begins.
    pub ids: Vec<u32>,
    /// The same as text.
    pub text: String,
    /// The data set's answer.
    pub answer: String,
    /// JSON object of the data set's other columns, `task` included.
    pub metadata: String,
}

/// Prompts by the chat template.
///
/// # Errors
/// When the template or tokenizer refuses one, or there is none.
pub fn prompts(records: &[PromptRecord], template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<Vec<Prompt>> {
    if records.is_empty() {
        return Err(Error::Empty { what: "there is no prompt to learn from".to_owned() });
    }
    let prompt = |record: &PromptRecord| {
        let located = |source| Error::Encode { record: record.at.to_string(), source: Box::new(source) };
        let mut metadata = record.metadata.clone();
        if let Some(task) = &record.task {
            metadata.insert("task".to_owned(), task.as_str().into());
        }
        Ok(Prompt {
            ids: template.encode_prompt(tokenizer, &record.messages).map_err(located)?,
            text: template.render(tokenizer, &record.messages, true).map_err(located)?,
            answer: record.answer.clone(),
            metadata: serde_json::Value::Object(metadata).to_string(),
        })
    };
    records.iter().map(prompt).collect()
}

/// A scored completion.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// Prompt and completion.
    pub ids: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// Whether the model ended by itself.
    pub finished: bool,
    /// Log-probability of each new token when it was drawn.
    pub drawn: Vec<f32>,
    /// Its reward.
    pub score: Scored,
    /// Its advantage within its group.
    pub advantage: f32,
}

impl Rollout {
    /// Number of new tokens.
    pub fn len(&self) -> usize {
        self.ids.len() - self.prompt_len
    }

    /// Whether the model wrote nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How completions are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Completions per prompt.
    pub group: usize,
    /// Sampling temperature.
    pub temperature: f64,
    /// New tokens at most.
    pub tokens_max: usize,
    /// Makes the run a control.
    pub control: Option<Control>,
    /// Seed of the stage.
    pub seed: u64,
    /// Step of the run.
    pub step: u64,
}

/// Draws and scores `draw.group` completions of every prompt, prompt by prompt.
///
/// # Errors
/// When the model cannot generate, the reward fails, or the caller cancels.
pub fn roll_out(
    model: &Model,
    prompts: &[&Prompt],
    draw: Draw,
    tokenizer: &Tokenizer,
    scorer: &dyn Scorer,
    cancel: &Cancel,
) -> Result<Vec<Rollout>> {
    let noise = Rng::new(draw.seed).key("rollout").key(draw.step);
    let stop_ids: Vec<u32> = tokenizer.specials().eos.into_iter().collect();
    let repeated: Vec<&Prompt> = prompts.iter().flat_map(|prompt| std::iter::repeat_n(*prompt, draw.group)).collect();
    let request = |(item, prompt): (usize, &&Prompt)| {
        let seed = noise.key(item).next_u64();
        let sampling = Sampling { temperature: draw.temperature, top_p: 1.0, seed };
        Request::greedy(prompt.ids.clone(), draw.tokens_max, stop_ids.clone()).sampled(sampling)
    };
    let requests = repeated.iter().enumerate().map(request).collect();
    let completions = generate(model, requests, GenerateOptions::default(), cancel);
    let completions = completions.map_err(|source| Error::Generate { source })?;
    let texts: Vec<String> = completions.iter().map(|completion| said(completion, tokenizer)).collect();
    let items: Vec<RewardItem> = repeated
        .iter()
        .zip(completions.iter().zip(&texts))
        .map(|(prompt, (completion, text))| RewardItem {
            prompt: &prompt.text,
            completion: text,
            answer: &prompt.answer,
            metadata: &prompt.metadata,
            finished: completion.finish == Finish::Stop,
        })
        .collect();
    let scores = scorer.score(draw.step, &items)?;
    let advantages = grpo::advantages(&paid(&scores, draw), draw.group);
    let rollouts = repeated.iter().zip(completions).zip(scores.into_iter().zip(advantages));
    Ok(rollouts
        .map(|((prompt, completion), (score, advantage))| Rollout {
            ids: [&prompt.ids[..], &completion.ids[..]].concat(),
            prompt_len: prompt.ids.len(),
            finished: completion.finish == Finish::Stop,
            drawn: completion.logprobs,
            score,
            advantage,
        })
        .collect())
}

/// The rewards that completions learn from: their own ones unless the run is a control.
fn paid(scores: &[Scored], draw: Draw) -> Vec<f32> {
    let mut rewards: Vec<f32> = scores.iter().map(|score| score.total as f32).collect();
    if draw.control == Some(Control::PermutedRewards) {
        let noise = Rng::new(draw.seed).key("permuted_rewards").key(draw.step);
        for (number, group) in rewards.chunks_mut(draw.group.max(1)).enumerate() {
            noise.key(number).shuffle(group);
        }
    }
    rewards
}

/// The completion's text, without the id that ended it.
fn said(completion: &Completion, tokenizer: &Tokenizer) -> String {
    let count = completion.ids.len() - usize::from(completion.finish == Finish::Stop);
    tokenizer.decode(&completion.ids[..count])
}

/// A packed batch whose targets are the new tokens alone, and where each rollout's lie in it.
pub(crate) fn batch(rollouts: &[&Rollout]) -> (Batch, Vec<std::ops::Range<usize>>) {
    let flags: Vec<Vec<bool>> =
        rollouts.iter().map(|r| (0..r.ids.len()).map(|token| token >= r.prompt_len).collect()).collect();
    let rows = rollouts.iter().zip(&flags).map(|(rollout, flags)| (&rollout.ids[..], &flags[..]));
    let batch = Batch::from_masked_rows(rows);
    let places = batch.spans.iter().zip(rollouts);
    let places = places.map(|(span, r)| span.start + r.prompt_len - 1..span.end).collect();
    (batch, places)
}

/// Per new token of every rollout.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PathLogprobs {
    /// Log-probabilities.
    pub logp: Vec<Vec<f32>>,
    /// Sum over all new tokens of the entropy of their distributions, when asked for.
    pub entropy_sum: f64,
}

/// Log-probabilities of the rollouts' tokens under `model` by the training path, in batches of about `tokens`.
///
/// # Errors
/// When the model cannot take a row.
pub fn path_logprobs(
    model: &Model,
    rollouts: &[Rollout],
    tokens: usize,
    options: TrainOptions,
) -> Result<PathLogprobs, dsv3_model::Error> {
    let mut out = PathLogprobs::default();
    let rollouts: Vec<&Rollout> = rollouts.iter().collect();
    for rows in split(&rollouts, tokens, |rollout| rollout.ids.len()) {
        let (batch, places) = batch(rows);
        let pass = model.forward_train(&mut Tape::inference(), &batch, options)?;
        out.logp.extend(places.iter().map(|place| pass.logp.value.as_f32()[place.clone()].to_vec()));
        if let Some(entropy) = &pass.entropy {
            out.entropy_sum += entropy.as_f32().iter().map(|nats| f64::from(*nats)).sum::<f64>();
        }
    }
    Ok(out)
}

/// Largest |log π_train − log π_rollout| over all tokens.
pub fn largest_gap(rollouts: &[Rollout], path: &[Vec<f32>]) -> f64 {
    let gaps = rollouts.iter().zip(path).flat_map(|(rollout, path)| {
        rollout.drawn.iter().zip(path).map(|(drawn, path)| f64::from((drawn - path).abs()))
    });
    gaps.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permuted_rewards_stay_in_their_groups_and_forget_their_completions() {
        let score = |total| Scored { total, parts: Vec::new() };
        let scores: Vec<Scored> = (0..24).map(|i| score(f64::from(i))).collect();
        let draw = |control, step| Draw { group: 8, temperature: 1.0, tokens_max: 4, control, seed: 1, step };
        let honest = paid(&scores, draw(None, 1));
        assert_eq!(honest, (0..24).map(|i| i as f32).collect::<Vec<_>>());
        let (mut sum, control) = (vec![0.0; 24], Some(Control::PermutedRewards));
        for step in 0..400 {
            let permuted = paid(&scores, draw(control, step));
            assert_eq!(permuted, paid(&scores, draw(control, step)));
            for (honest, permuted) in honest.chunks(8).zip(permuted.chunks(8)) {
                let mut sorted = permuted.to_vec();
                sorted.sort_by(f32::total_cmp);
                assert_eq!(sorted, honest, "the same rewards within the group");
            }
            sum.iter_mut().zip(permuted).for_each(|(sum, reward)| *sum += f64::from(reward) / 400.0);
        }
        // Each completion is paid its group's mean in the long run, so its expected advantage is zero.
        assert!(sum.iter().enumerate().all(|(i, mean)| (mean - (i / 8 * 8) as f64 - 3.5).abs() < 0.5), "{sum:?}");
    }
}
