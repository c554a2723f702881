//! Distillation data: a teacher's reasoning traces, rejection-sampled by a reward, mixed with a data set's own responses.
//!
//! For a problem there are two sample types: <problem, original response> and <system prompt, problem, reasoning trace>;
//! a share of the traces may go without the system prompt. Traces come from a data set in the public R1 columns, or are
//! written by a teacher model. Up to `tries` traces of a problem are judged, in order; the first whose reward reaches
//! `accept_reward` is kept, the others are rejected and counted. With no `accept_reward` the first is kept, right or wrong. Report §5.1, R1 §2.3.3.

use std::collections::BTreeMap;

use dsv3_core::{Cancel, Rng};
use dsv3_data::{ChatTemplate, Message, Tokenizer, TraceRecord};
use dsv3_hooks::RewardItem;
use dsv3_infer::{Finish, GenerateOptions, Request, Sampling, generate};
use dsv3_model::Model;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    reward::Scorer,
};

/// Which samples a problem becomes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "take", rename_all = "snake_case", deny_unknown_fields)]
pub enum Mix {
    /// Both types: the original response, and the trace under the system prompt.
    Both,
    /// One type by chance, in these shares. A problem without an accepted trace takes the original response.
    One {
        /// Share of <problem, original response>.
        original: f64,
        /// Share of <system prompt, problem, trace>.
        prompted: f64,
        /// Share of <problem, trace>.
        unprompted: f64,
    },
}

impl Default for Mix {
    fn default() -> Self {
        Self::One { original: 0.5, prompted: 0.25, unprompted: 0.25 }
    }
}

/// How traces are judged and samples made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DistillConfig {
    /// System prompt that asks for reflection and verification.
    pub system_prompt: String,
    /// Traces judged per problem at most.
    pub tries: u32,
    /// Reward a trace must reach to be kept. `null` keeps the first trace of every problem, whatever it earns: the control
    /// that shows what rejection is worth.
    pub accept_reward: Option<f64>,
    /// Which samples a problem becomes.
    pub mix: Mix,
    /// Sampling temperature of a teacher model.
    pub temperature: f64,
    /// Longest trace a teacher model may write, in tokens.
    pub tokens_max: usize,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self {
            system_prompt: "Think step by step and check your work.".to_owned(),
            tries: 4,
            accept_reward: Some(1.0),
            mix: Mix::default(),
            temperature: 1.0,
            tokens_max: 1024,
        }
    }
}

/// Who writes the traces.
pub enum Teacher<'a> {
    /// The data set brings them.
    Traces,
    /// A model does, under the system prompt.
    Model {
        /// The teacher.
        model: &'a Model,
        /// Its tokenizer.
        tokenizer: &'a Tokenizer,
        /// Its chat template.
        template: &'a ChatTemplate,
        /// Asks it to stop.
        cancel: &'a Cancel,
    },
}

/// A training sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// The conversation, in the columns of a chat data set.
    pub messages: Vec<Message>,
    /// `original`, `prompted` or `unprompted`.
    pub kind: String,
    /// Number of the problem it comes from.
    pub problem: u64,
}

/// What was made and what was turned away.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DistillReport {
    /// Problems given.
    pub problems: u64,
    /// Traces judged.
    pub judged: u64,
    /// Traces turned away.
    pub rejected: u64,
    /// rejected / judged.
    pub rejection_rate: f64,
    /// Problems none of whose traces was good enough.
    pub without_trace: u64,
    /// Problems with neither an accepted trace nor a response of their own.
    pub without_sample: u64,
    /// Samples by kind.
    pub samples: BTreeMap<String, u64>,
    /// Mean reward of the judged traces.
    pub reward_mean: f64,
}

/// Samples and report.
#[derive(Clone, Debug, Default)]
pub struct Distilled {
    /// In the order of their problems.
    pub samples: Vec<Sample>,
    /// The report.
    pub report: DistillReport,
}

impl Distilled {
    /// The samples as JSONL, in the columns of a chat data set.
    pub fn to_jsonl(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for sample in &self.samples {
            // A struct of texts always serialises.
            bytes.extend(serde_json::to_vec(sample).unwrap_or_default());
            bytes.push(b'\n');
        }
        bytes
    }
}

/// Judges traces and makes samples; a function of its arguments alone.
///
/// # Errors
/// When the reward or the teacher fails, or no sample comes out.
pub fn distill(
    problems: &[TraceRecord],
    teacher: &Teacher<'_>,
    scorer: &dyn Scorer,
    config: &DistillConfig,
    seed: u64,
) -> Result<Distilled> {
    let mut out = Distilled::default();
    let traces = accepted_traces(problems, teacher, scorer, config, seed, &mut out.report)?;
    for (index, (problem, trace)) in problems.iter().zip(traces).enumerate() {
        let rng = Rng::new(seed).key("distill").key("mix").key(index);
        let kinds = kinds(config.mix, problem.solution.is_some(), trace.is_some(), rng);
        out.report.without_sample += u64::from(kinds.is_empty());
        for kind in kinds {
            let sample = sample(problem, trace.as_deref(), kind, config, index as u64);
            *out.report.samples.entry(kind.to_owned()).or_default() += 1;
            out.samples.push(sample);
        }
    }
    if out.samples.is_empty() {
        let what = "no problem has an accepted trace or a response of its own".to_owned();
        return Err(Error::Empty { what });
    }
    Ok(out)
}

fn kinds(mix: Mix, has_original: bool, has_trace: bool, mut rng: Rng) -> Vec<&'static str> {
    match mix {
        Mix::Both => {
            let both = [has_original.then_some("original"), has_trace.then_some("prompted")];
            both.into_iter().flatten().collect()
        }
        Mix::One { original, prompted, unprompted } => {
            let draw = rng.uniform() * (original + prompted + unprompted);
            let wanted = if draw < original {
                "original"
            } else if draw < original + prompted {
                "prompted"
            } else {
                "unprompted"
            };
            match (wanted, has_original, has_trace) {
                ("original", true, _) | (_, true, false) => vec!["original"],
                ("original", false, true) => vec!["prompted"],
                (_, _, true) => vec![wanted],
                (_, false, false) => vec![],
            }
        }
    }
}

fn sample(
    problem: &TraceRecord,
    trace: Option<&str>,
    kind: &'static str,
    config: &DistillConfig,
    index: u64,
) -> Sample {
    let system = (kind == "prompted").then(|| Message::system(config.system_prompt.as_str()));
    let text = if kind == "original" { problem.solution.as_deref() } else { trace };
    let turns = [Message::user(problem.problem.as_str()), Message::assistant(text.unwrap_or_default())];
    Sample { messages: system.into_iter().chain(turns).collect(), kind: kind.to_owned(), problem: index }
}

/// The first good trace of each problem. Round r judges the r-th trace of every problem that has none yet.
fn accepted_traces(
    problems: &[TraceRecord],
    teacher: &Teacher<'_>,
    scorer: &dyn Scorer,
    config: &DistillConfig,
    seed: u64,
    report: &mut DistillReport,
) -> Result<Vec<Option<String>>> {
    let mut accepted: Vec<Option<String>> = vec![None; problems.len()];
    let mut reward_sum = 0.0;
    for round in 0..config.tries {
        let open: Vec<usize> = (0..problems.len()).filter(|i| accepted[*i].is_none()).collect();
        let traces = traces(problems, &open, teacher, config, round, seed)?;
        let metadata: Vec<String> = traces.iter().map(|trace| metadata(&problems[trace.problem])).collect();
        let items: Vec<RewardItem> = traces
            .iter()
            .zip(&metadata)
            .map(|(trace, metadata)| RewardItem {
                prompt: &problems[trace.problem].problem,
                completion: &trace.text,
                answer: &problems[trace.problem].answer,
                metadata,
                finished: trace.finished,
            })
            .collect();
        let scores = scorer.score(u64::from(round), &items)?;
        for (trace, score) in traces.into_iter().zip(scores) {
            report.judged += 1;
            reward_sum += score.total;
            if config.accept_reward.is_none_or(|least| score.total >= least) {
                accepted[trace.problem] = Some(trace.text);
            } else {
                report.rejected += 1;
            }
        }
    }
    report.problems = problems.len() as u64;
    report.without_trace = accepted.iter().filter(|trace| trace.is_none()).count() as u64;
    report.rejection_rate = report.rejected as f64 / report.judged.max(1) as f64;
    report.reward_mean = reward_sum / report.judged.max(1) as f64;
    Ok(accepted)
}

/// A trace to judge.
struct Trace {
    problem: usize,
    text: String,
    finished: bool,
}

fn metadata(problem: &TraceRecord) -> String {
    serde_json::Value::Object(problem.metadata.clone()).to_string()
}

fn traces(
    problems: &[TraceRecord],
    open: &[usize],
    teacher: &Teacher<'_>,
    config: &DistillConfig,
    round: u32,
    seed: u64,
) -> Result<Vec<Trace>> {
    let Teacher::Model { model, tokenizer, template, cancel } = teacher else {
        let text = |problem: &usize| {
            let text = problems[*problem].generations.get(round as usize)?.clone();
            Some(Trace { problem: *problem, text, finished: true })
        };
        return Ok(open.iter().filter_map(text).collect());
    };
    let requests = open.iter().map(|problem| {
        let record = &problems[*problem];
        let messages = [Message::system(config.system_prompt.as_str()), Message::user(record.problem.as_str())];
        let ids = template.encode_prompt(tokenizer, &messages);
        let ids = ids.map_err(|source| Error::Encode { record: record.at.to_string(), source: Box::new(source) })?;
        let noise = Rng::new(seed).key("distill").key("teacher").key(u64::from(round)).key(*problem).next_u64();
        let sampling = Sampling { temperature: config.temperature, top_p: 1.0, seed: noise };
        let stop_ids = tokenizer.specials().eos.into_iter().collect();
        Ok(Request::greedy(ids, config.tokens_max, stop_ids).sampled(sampling))
    });
    let requests = requests.collect::<Result<Vec<_>>>()?;
    let completions = generate(*model, requests, GenerateOptions::default(), cancel);
    let completions = completions.map_err(|source| Error::Generate { source })?;
    let trace = |(problem, completion): (&usize, dsv3_infer::Completion)| {
        let finished = completion.finish == Finish::Stop;
        let said = completion.ids.len() - usize::from(finished);
        Trace { problem: *problem, text: tokenizer.decode(&completion.ids[..said]), finished }
    };
    Ok(open.iter().zip(completions).map(trace).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reward::{Rewards, Rule};
    use dsv3_data::{Location, Place};

    fn record(generations: &[&str], solution: Option<&str>) -> TraceRecord {
        TraceRecord {
            at: Location { path: "t".into(), place: Place::Line(1) },
            problem: "1 + 1?".to_owned(),
            answer: "2".to_owned(),
            solution: solution.map(str::to_owned),
            generations: generations.iter().map(|text| (*text).to_owned()).collect(),
            metadata: serde_json::Map::new(),
        }
    }

    fn rewards() -> Rewards<'static> {
        let rules: Vec<Rule> = serde_json::from_str(r#"[{"rule": "answer"}]"#).unwrap();
        Rewards { rules, hook: None }
    }

    #[test]
    fn wrong_traces_are_rejected_and_the_next_one_is_tried() {
        let good = "<think>1 + 1 = 2</think>\n#### 2";
        let problems = [
            record(&["#### 3", good, "#### 4"], Some("#### 2")),
            record(&["#### 1"; 6], Some("#### 2")),
            record(&[], None),
        ];
        let config = DistillConfig { mix: Mix::Both, ..DistillConfig::default() };
        let out = distill(&problems, &Teacher::Traces, &rewards(), &config, 1).unwrap();
        let report = &out.report;
        assert_eq!((report.judged, report.rejected, report.without_trace, report.without_sample), (6, 5, 2, 1));
        let kinds: Vec<&str> = out.samples.iter().map(|sample| sample.kind.as_str()).collect();
        assert_eq!(kinds, ["original", "prompted", "original"]);
        assert_eq!(out.samples[1].messages[0].role, "system");
        assert_eq!(out.samples[1].messages[2].content, good);
        assert_eq!(out.to_jsonl().iter().filter(|byte| **byte == b'\n').count(), 3);
    }

    #[test]
    fn without_rejection_the_first_trace_is_kept_whatever_it_earns() {
        let problems = [record(&["#### 3", "#### 2"], None), record(&["#### 2"], None)];
        let config = DistillConfig { mix: Mix::Both, accept_reward: None, ..DistillConfig::default() };
        let out = distill(&problems, &Teacher::Traces, &rewards(), &config, 1).unwrap();
        let report = &out.report;
        assert_eq!((report.judged, report.rejected, report.rejection_rate, report.reward_mean), (2, 0, 0.0, 0.5));
        assert_eq!(out.samples[0].messages[2].content, "#### 3");
    }

    #[test]
    fn one_sample_per_problem_in_the_asked_shares() {
        let problems: Vec<TraceRecord> = (0..2000).map(|_| record(&["#### 2"], Some("#### 2"))).collect();
        let out = distill(&problems, &Teacher::Traces, &rewards(), &DistillConfig::default(), 7).unwrap();
        assert_eq!(out.samples.len(), 2000);
        let share = |kind: &str| out.report.samples[kind] as f64 / 2000.0;
        assert!((share("original") - 0.5).abs() < 0.05 && (share("prompted") - 0.25).abs() < 0.05);
    }
}
