//! `sft`: supervised fine-tuning on conversations, with the loss on the assistant's tokens only.

use std::path::PathBuf;

use dsv3_core::{
    Artifact, Error,
    kinds::{Chat, Model as ModelKind},
};
use dsv3_data::{ChatTemplate, RecordKind, read_chat};
use dsv3_model::SaveFormat;
use dsv3_posttrain::{ChatSource, sft};
use dsv3_stage::{Ctx, InputFacts, OutputFacts, Problems, Shrink, Stage, ports};
use dsv3_train::{Schedules, Supervised, Trainer, run_training, schedule::Horizon};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::shared::{
    facts,
    folder::ModelFolder,
    records::check_records,
    training::{self, Length, TrainingOptions},
};

/// Options of `sft`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Passes over the conversations.
    epochs: u32,
    /// Learning rate, conversations per step, λ and γ over the run.
    schedules: Schedules,
    /// Longest conversation in tokens; longer ones are left out and counted. The model's positions when absent.
    #[serde(default)]
    tokens_max: Option<usize>,
    /// Conversations, the last ones of the file, held out for validation.
    #[serde(default)]
    holdout: usize,
    /// Chat template (Jinja) instead of the model's own; it is stored with the new model.
    #[serde(default)]
    chat_template: Option<String>,
    /// Optimiser, memory, checkpoints, guard.
    #[serde(default)]
    training: TrainingOptions,
}

ports! {
    /// Inputs of `sft`.
    pub(crate) struct Inputs {
        /// Model to start from; any Hugging Face folder of the architecture will do.
        model: Artifact<ModelKind>,
        /// Conversations.
        chat: Artifact<Chat>,
    }
}

ports! {
    /// Outputs of `sft`.
    pub(crate) struct Outputs {
        /// Hugging Face folder in F32.
        model: Artifact<ModelKind>,
    }
}

/// The stage.
pub(crate) struct Sft;

impl Stage for Sft {
    const NAME: &'static str = "sft";
    const VERSION: u32 = 2;
    const ABOUT: &'static str =
        "Fine-tunes a model on conversations, each isolated, loss on the assistant's tokens only";
    const SHRINK: &'static [Shrink] = &[
        Shrink::AtMost("epochs", 2),
        Shrink::Put("schedules.batch", r#"{"sequences": 8}"#),
        Shrink::AtMost("holdout", 2),
        Shrink::Put("training.checkpoint", r#"{"steps": 2}"#),
    ];
    type Config = Config;
    type Inputs = Inputs;
    type Outputs = Outputs;

    fn check(config: &Config, inputs: &InputFacts, problems: &mut Problems) {
        facts::check_model_folder(inputs, "model", problems);
        facts::check_template(inputs, "model", config.chat_template.as_deref(), problems);
        check_records(inputs, "chat", RecordKind::Chat, problems);
        config.training.check("config.training", problems);
        training::check_schedules(&config.schedules, Length::Steps(1 << 20), "config.schedules", problems);
        if config.schedules.batch.ramp.is_some() {
            let message = "the length of the run is counted in batches of one size";
            problems.push("config.schedules.batch.ramp", message, "leave the ramp out");
        }
        let positions = facts::model_config(inputs, "model").map(|model| model.max_position_embeddings);
        if let (Some(asked), Some(most)) = (config.tokens_max, positions)
            && asked > most
        {
            let message = format!("{asked} exceeds the model's max_position_embeddings of {most}");
            problems.push("config.tokens_max", message, "");
        }
        if config.epochs == 0 {
            problems.push("config.epochs", "0 passes train nothing", "");
        }
    }

    fn facts(config: &Config, inputs: &InputFacts) -> OutputFacts {
        let template = config.chat_template.is_some() || facts::has_template(inputs, "model").unwrap_or(true);
        facts::model_output(facts::model_config(inputs, "model").as_ref(), "float32", template)
    }

    fn run(config: Config, inputs: Inputs, ctx: &mut Ctx) -> Result<Outputs, Error> {
        let folder = ModelFolder::open_trainable(ctx, &inputs.model, &config.training)?;
        let template = folder.template_or(config.chat_template.as_deref())?;
        let paths: Vec<PathBuf> = ctx.local_files(&inputs.chat)?.into_iter().map(|(_, path)| path).collect();
        let records = read_chat(&paths)?;
        let tokens_max = config.tokens_max.unwrap_or(folder.model.config.max_position_embeddings);
        let conversations = records.iter().map(|record| (record.at.to_string(), &record.messages[..]));
        let mut data = sft::encode(conversations, &template, &folder.tokenizer, tokens_max)?;
        if data.too_long > 0 {
            ctx.log_warn(format!("{} conversations of more than {tokens_max} tokens are left out", data.too_long));
        }
        ctx.set_metric("conversations", data.examples.len() as f64);
        ctx.set_metric("assistant_tokens", data.assistant_tokens() as f64);
        let train = data.examples.len().checked_sub(config.holdout).filter(|count| *count > 0);
        let train = train.ok_or_else(|| Error::data("holdout leaves no conversation to train on"))?;
        let validation = data.examples.split_off(train);
        let source =
            ChatSource::new(data.examples, u64::from(config.epochs), ctx.seed(), config.training.micro_batch_tokens)
                .with_validation(validation);
        let horizon = Horizon::Steps(source.steps(u64::from(config.schedules.batch.sequences)));
        let mut work = Supervised::new(source, config.schedules);
        let mut trainer = Trainer::new(folder.model.clone(), config.training.trainer())?;
        run_training(&mut trainer, &mut work, &training::host(ctx), &config.training.run(horizon))?;
        training::close(ctx, &trainer)?;
        Ok(Outputs { model: publish(ctx, &folder, &trainer, &template)? })
    }
}

/// Publishes the trained model with the template it was trained on.
pub(crate) fn publish(
    ctx: &Ctx,
    folder: &ModelFolder,
    trainer: &Trainer,
    template: &ChatTemplate,
) -> Result<Artifact<ModelKind>, Error> {
    folder.publish_with_template(ctx, &trainer.model, SaveFormat::F32, template)
}
