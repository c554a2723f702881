//! `rl`: group relative policy optimisation with rewards from rules and a hook, on completions of the current weights.

use std::path::PathBuf;

use dsv3_core::{
    Artifact, Error,
    kinds::{Model as ModelKind, Prompts},
};
use dsv3_data::{RecordKind, read_prompts};
use dsv3_hooks::World;
use dsv3_posttrain::{Rewards, Rl as Policy, RlConfig, Rule, rollout};
use dsv3_stage::{Ctx, HookPort, InputFacts, OutputFacts, Problems, Shrink, Stage, ports};
use dsv3_train::{GuardConfig, RunOptions, Trainer, run_training, schedule::Horizon};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    sft,
    shared::{
        facts,
        folder::ModelFolder,
        records::check_records,
        training::{self, TrainingOptions},
    },
};

/// Options of `rl`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Rollout steps.
    steps: u64,
    /// Rollouts and policy updates.
    #[serde(default)]
    policy: RlConfig,
    /// Rules whose rewards are added to the hook's.
    #[serde(default)]
    rules: Vec<Rule>,
    /// Chat template (Jinja) instead of the model's own.
    #[serde(default)]
    chat_template: Option<String>,
    /// Optimiser, memory, checkpoints, guard.
    #[serde(default)]
    training: TrainingOptions,
}

ports! {
    /// Inputs of `rl`.
    pub(crate) struct Inputs {
        /// Model to start from, which is also the reference of the KL term.
        model: Artifact<ModelKind>,
        /// Prompts with answers.
        prompts: Artifact<Prompts>,
    }
}

ports! {
    /// Outputs of `rl`.
    pub(crate) struct Outputs {
        /// Hugging Face folder in F32.
        model: Artifact<ModelKind>,
    }
}

/// The stage.
pub(crate) struct Rl;

impl Stage for Rl {
    const NAME: &'static str = "rl";
    const VERSION: u32 = 3;
    const ABOUT: &'static str = "Improves a model by GRPO on its own completions, rewarded by rules and a hook";
    const HOOKS: &'static [HookPort] =
        &[HookPort { name: "reward", world: World::Reward, required: false, doc: "Scores every completion" }];
    const SHRINK: &'static [Shrink] = &[
        Shrink::AtMost("steps", 3),
        Shrink::AtMost("policy.prompts_per_step", 2),
        Shrink::AtMost("policy.group", 4),
        Shrink::AtMost("policy.minibatches", 2),
        Shrink::AtMost("policy.tokens_max", 8),
        Shrink::Put("training.checkpoint", r#"{"steps": 1}"#),
    ];
    type Config = Config;
    type Inputs = Inputs;
    type Outputs = Outputs;

    fn check(config: &Config, inputs: &InputFacts, problems: &mut Problems) {
        facts::check_model_folder(inputs, "model", problems);
        facts::check_template(inputs, "model", config.chat_template.as_deref(), problems);
        facts::check_reward(inputs, config.rules.len(), problems);
        facts::check_new_tokens(inputs, "model", config.policy.tokens_max, "config.policy.tokens_max", problems);
        check_records(inputs, "prompts", RecordKind::Prompts, problems);
        config.training.check("config.training", problems);
        if config.steps == 0 {
            problems.push("config.steps", "a run needs at least one step", "");
        }
        for (path, message) in config.policy.check(Horizon::Steps(config.steps)) {
            problems.push(format!("config.policy.{path}"), message, "");
        }
    }

    fn facts(config: &Config, inputs: &InputFacts) -> OutputFacts {
        let template = config.chat_template.is_some() || facts::has_template(inputs, "model").unwrap_or(true);
        facts::model_output(facts::model_config(inputs, "model").as_ref(), "float32", template)
    }

    fn run(config: Config, inputs: Inputs, ctx: &mut Ctx) -> Result<Outputs, Error> {
        let hook = ctx.hook("reward").cloned();
        let folder = ModelFolder::open_trainable(ctx, &inputs.model, &config.training)?;
        let template = folder.template_or(config.chat_template.as_deref())?;
        let paths: Vec<PathBuf> = ctx.local_files(&inputs.prompts)?.into_iter().map(|(_, path)| path).collect();
        let prompts = rollout::prompts(&read_prompts(&paths)?, &template, &folder.tokenizer)?;
        ctx.set_metric("prompts", prompts.len() as f64);
        let scorer = Rewards { rules: config.rules, hook: hook.as_deref() };
        let mut trainer = Trainer::new(folder.model.clone(), config.training.trainer())?;
        let mut work = Policy {
            config: config.policy,
            prompts,
            scorer: &scorer,
            tokenizer: &folder.tokenizer,
            reference: folder.model.clone(),
            seed: ctx.seed(),
            cancel: ctx.cancel(),
            probe: None,
        };
        // A policy's loss is no level that could spike.
        let guard = GuardConfig { spike_steps: 0, ..config.training.guard };
        let options = RunOptions { guard, ..config.training.run(Horizon::Steps(config.steps)) };
        run_training(&mut trainer, &mut work, &training::host(ctx), &options)?;
        training::close(ctx, &trainer)?;
        Ok(Outputs { model: sft::publish(ctx, &folder, &trainer, &template)? })
    }
}
