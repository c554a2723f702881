//! `distill`: conversations from a teacher's reasoning traces, rejection-sampled by a reward.

use std::path::PathBuf;

use dsv3_core::{
    Artifact, Error,
    kinds::{Chat, Model as ModelKind, Report},
};
use dsv3_data::{RecordKind, read_traces};
use dsv3_hooks::World;
use dsv3_model::LoadPrecision;
use dsv3_posttrain::{DistillConfig, Rewards, Rule, Teacher, distill};
use dsv3_stage::{Ctx, HookPort, InputFacts, Problems, Shrink, Stage, ports};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::shared::{facts, folder::ModelFolder, records::check_records};

/// Options of `distill`.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// Which samples are made, and which traces are accepted.
    samples: DistillConfig,
    /// Rules whose rewards are added to the hook's.
    rules: Vec<Rule>,
    /// Chat template (Jinja) of the teacher instead of its own.
    chat_template: Option<String>,
}

ports! {
    /// Inputs of `distill`.
    pub(crate) struct Inputs {
        /// Problems with answers and, unless a teacher is given, its traces: the public R1-distillation columns.
        traces: Artifact<Chat>,
        /// A model that writes the traces.
        teacher: Option<Artifact<ModelKind>>,
    }
}

ports! {
    /// Outputs of `distill`.
    pub(crate) struct Outputs {
        /// Conversations for `sft`.
        chat: Artifact<Chat>,
        /// How many traces were judged and rejected.
        report: Artifact<Report>,
    }
}

/// The stage.
pub(crate) struct Distill;

impl Stage for Distill {
    const NAME: &'static str = "distill";
    const VERSION: u32 = 3;
    const ABOUT: &'static str = "Makes conversations from reasoning traces, keeping only those a reward accepts";
    const HOOKS: &'static [HookPort] =
        &[HookPort { name: "reward", world: World::Reward, required: false, doc: "Judges every trace" }];
    const SHRINK: &'static [Shrink] = &[Shrink::AtMost("samples.tries", 2), Shrink::AtMost("samples.tokens_max", 8)];
    type Config = Config;
    type Inputs = Inputs;
    type Outputs = Outputs;

    fn check(config: &Config, inputs: &InputFacts, problems: &mut Problems) {
        facts::check_model_folder(inputs, "teacher", problems);
        if !inputs.has("teacher") {
            check_records(inputs, "traces", RecordKind::Traces, problems);
        }
        if inputs.has("teacher") {
            facts::check_template(inputs, "teacher", config.chat_template.as_deref(), problems);
            facts::check_new_tokens(
                inputs,
                "teacher",
                config.samples.tokens_max,
                "config.samples.tokens_max",
                problems,
            );
        }
        facts::check_reward(inputs, config.rules.len(), problems);
        if config.samples.tries == 0 {
            problems.push("config.samples.tries", "0 tries accept no trace", "");
        }
    }

    fn run(config: Config, inputs: Inputs, ctx: &mut Ctx) -> Result<Outputs, Error> {
        let paths: Vec<PathBuf> = ctx.local_files(&inputs.traces)?.into_iter().map(|(_, path)| path).collect();
        let problems = read_traces(&paths)?;
        let hook = ctx.hook("reward").cloned();
        let scorer = Rewards { rules: config.rules, hook: hook.as_deref() };
        let folder = inputs.teacher.as_ref().map(|teacher| ModelFolder::open(ctx, teacher, LoadPrecision::Own, false));
        let folder = folder.transpose()?;
        let template = match &folder {
            Some(folder) => folder.template_or(config.chat_template.as_deref())?,
            None => dsv3_data::ChatTemplate::default(),
        };
        let teacher = folder.as_ref().map_or(Teacher::Traces, |folder| Teacher::Model {
            model: &folder.model,
            tokenizer: &folder.tokenizer,
            template: &template,
            cancel: ctx.cancel(),
        });
        let made = distill::distill(&problems, &teacher, &scorer, &config.samples, ctx.seed())?;
        let report = &made.report;
        ctx.set_metric("problems", report.problems as f64);
        ctx.set_metric("judged", report.judged as f64);
        ctx.set_metric("rejection_rate", report.rejection_rate);
        ctx.set_metric("reward_mean", report.reward_mean);
        ctx.set_metric("samples", made.samples.len() as f64);
        let text = serde_json::to_vec_pretty(report)
            .map_err(|source| Error::internal("the report cannot be written").source(source))?;
        let count = made.samples.len();
        Ok(Outputs {
            chat: ctx.publish(vec![ctx.put("chat.jsonl", made.to_jsonl())?], json!({ "conversations": count }))?,
            report: ctx.publish(vec![ctx.put("report.json", text)?], json!({}))?,
        })
    }
}
