//! `context_extension`: YaRN in one or more phases of longer sequences, with a retrieval check by depth before and after.

use std::path::PathBuf;

use dsv3_core::{
    Artifact, Error,
    kinds::{Benchmark, Model as ModelKind, Tokens},
};
use dsv3_data::Loader;
use dsv3_eval::NeedleReport;
use dsv3_model::{Model, RopeScaling, SaveFormat};
use dsv3_stage::{Ctx, InputFacts, OutputFacts, Problems, Shrink, Stage, ports};
use dsv3_train::{Schedules, Supervised, Trainer, WindowSource, run_training, stored_phase};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::shared::{
    facts,
    folder::ModelFolder,
    needles, tokens,
    training::{self, Length, TrainingOptions},
};

/// One phase.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Phase {
    /// Tokens of a training sequence.
    sequence_tokens: usize,
    /// Length of the phase.
    length: Length,
    /// Learning rate, batch size, λ and γ over the phase.
    schedules: Schedules,
}

/// Options of `context_extension`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// YaRN, the same in all phases.
    rope_scaling: RopeScaling,
    /// Positions the model is declared for afterwards: `max_position_embeddings`.
    max_position_embeddings: usize,
    /// Phases in order; phase i reads the i-th `tokens` input, or the only one.
    phases: Vec<Phase>,
    /// Optimiser, memory, checkpoints, guard.
    #[serde(default)]
    training: TrainingOptions,
}

ports! {
    /// Inputs of `context_extension`.
    pub(crate) struct Inputs {
        /// Model to extend.
        model: Artifact<ModelKind>,
        /// One stream for all phases, or one for each.
        tokens: Vec<Artifact<Tokens>>,
        /// Needles to retrieve: columns filler, statement, question, answer, depth, length_tokens.
        needles: Option<Artifact<Benchmark>>,
    }
}

ports! {
    /// Outputs of `context_extension`.
    pub(crate) struct Outputs {
        /// Hugging Face folder in F32, with YaRN in its config.json.
        model: Artifact<ModelKind>,
    }
}

/// The stage.
pub(crate) struct ContextExtension;

impl Stage for ContextExtension {
    const NAME: &'static str = "context_extension";
    const VERSION: u32 = 3;
    const ABOUT: &'static str = "Extends the context with YaRN in phases and measures retrieval before and after";
    const SHRINK: &'static [Shrink] = &[
        Shrink::Put("phases.*.length", r#"{"steps": 3}"#),
        Shrink::Put("phases.*.schedules.batch", r#"{"sequences": 1}"#),
        Shrink::Put("training.checkpoint", r#"{"steps": 2}"#),
    ];
    type Config = Config;
    type Inputs = Inputs;
    type Outputs = Outputs;

    fn check(config: &Config, inputs: &InputFacts, problems: &mut Problems) {
        facts::check_model_folder(inputs, "model", problems);
        config.training.check("config.training", problems);
        let reach = config.rope_scaling.factor * config.rope_scaling.original_max_position_embeddings as f64;
        if config.max_position_embeddings as f64 > reach {
            let message = format!(
                "{} positions exceed factor {} times the original {}, that is {reach}",
                config.max_position_embeddings,
                config.rope_scaling.factor,
                config.rope_scaling.original_max_position_embeddings
            );
            problems.push("config.max_position_embeddings", message, "raise rope_scaling.factor");
        }
        if config.phases.is_empty() {
            problems.push("config.phases", "there is no phase", "give at least one");
        }
        let streams = inputs.all("tokens").len();
        if streams > 1 && streams != config.phases.len() {
            let message = format!("{streams} streams for {} phases", config.phases.len());
            problems.push("inputs.tokens", message, "give one stream for all phases or one for each");
        }
        for (i, phase) in config.phases.iter().enumerate() {
            let at = format!("config.phases.{i}");
            phase.length.check(&format!("{at}.length"), problems);
            training::check_schedules(&phase.schedules, phase.length, &format!("{at}.schedules"), problems);
            if phase.sequence_tokens == 0 || phase.sequence_tokens > config.max_position_embeddings {
                let (asked, most) = (phase.sequence_tokens, config.max_position_embeddings);
                let message = format!("{asked} does not lie between 1 and max_position_embeddings of {most}");
                problems.push(format!("{at}.sequence_tokens"), message, "");
            }
        }
        if let Some(model) = extended(config, inputs) {
            // The rest is the model's own, and its positions were held against YaRN above.
            for problem in model.check().into_iter().filter(|problem| problem.field.starts_with("rope_scaling")) {
                problems.push(format!("config.{}", problem.field), problem.message, "");
            }
            facts::check_vocabulary(inputs, "tokens", model.vocab_size, "inputs.tokens", problems);
        }
    }

    fn facts(config: &Config, inputs: &InputFacts) -> OutputFacts {
        let template = facts::has_template(inputs, "model").unwrap_or(false);
        facts::model_output(extended(config, inputs).as_ref(), "float32", template)
    }

    fn run(config: Config, inputs: Inputs, ctx: &mut Ctx) -> Result<Outputs, Error> {
        let mut folder = ModelFolder::open_trainable(ctx, &inputs.model, &config.training)?;
        let needles = Needles::open(ctx, &inputs.needles)?;
        // The model as it is, only allowed to look further: what extension has to beat.
        folder.model.set_rope(None, config.max_position_embeddings)?;
        let base = needles.find(ctx, &folder, &folder.model)?;
        folder.model.set_rope(Some(config.rope_scaling.clone()), config.max_position_embeddings)?;
        let untrained = needles.find(ctx, &folder, &folder.model)?;
        let mut trainer = Trainer::new(folder.model.clone(), config.training.trainer())?;
        let stored = stored_phase(&training::host(ctx))?.unwrap_or(0);
        for (i, phase) in config.phases.iter().enumerate() {
            if i > 0 {
                trainer = trainer.next_phase(config.training.trainer());
            }
            // A checkpoint of a later phase holds everything this one would give.
            if (i as u32) < stored {
                continue;
            }
            train_phase(&config, phase, &inputs.tokens[i.min(inputs.tokens.len() - 1)], &mut trainer, ctx)?;
        }
        let trained = needles.find(ctx, &folder, &trainer.model)?;
        needles::compare(ctx, &base, &untrained, &trained);
        training::close(ctx, &trainer)?;
        Ok(Outputs { model: folder.publish(ctx, &trainer.model, SaveFormat::F32)? })
    }
}

fn train_phase(
    config: &Config,
    phase: &Phase,
    stream: &Artifact<Tokens>,
    trainer: &mut Trainer,
    ctx: &Ctx,
) -> Result<(), Error> {
    let (stream, meta) = tokens::open(ctx, stream)?;
    tokens::check_vocabulary(&meta, trainer.model.config.vocab_size)?;
    let seed = ctx.rng().key("phase").key(u64::from(trainer.state.phase)).next_u64();
    let loader = Loader::new(meta.total_tokens, phase.sequence_tokens, seed)?;
    let horizon = phase.length.horizon(loader.samples_per_epoch() * phase.sequence_tokens as u64);
    let source = WindowSource {
        tokens: &stream,
        loader,
        end: u64::MAX,
        micro_batch_tokens: config.training.micro_batch_tokens,
        pad: meta.pad_token_id,
    };
    let mut work = tokens::CountingRows::new(Supervised::new(source, phase.schedules.clone()), &stream);
    run_training(trainer, &mut work, &training::host(ctx), &config.training.run(horizon))?;
    Ok(())
}

/// The needles to retrieve, if any were given.
struct Needles(Vec<PathBuf>);

impl Needles {
    fn open(ctx: &Ctx, artifact: &Option<Artifact<Benchmark>>) -> Result<Self, Error> {
        let files = artifact.as_ref().map(|artifact| ctx.local_files(artifact)).transpose()?;
        Ok(Self(files.unwrap_or_default().into_iter().map(|(_, path)| path).collect()))
    }

    fn find(&self, ctx: &Ctx, folder: &ModelFolder, model: &Model) -> Result<NeedleReport, Error> {
        if self.0.is_empty() {
            return Ok(NeedleReport::default());
        }
        needles::find(model, &folder.tokenizer, &self.0, ctx.cancel())
    }
}

/// The model's configuration after the stage, if it is known.
fn extended(config: &Config, inputs: &InputFacts) -> Option<dsv3_model::ModelConfig> {
    let mut model = facts::model_config(inputs, "model")?;
    model.rope_scaling = Some(config.rope_scaling.clone());
    model.max_position_embeddings = config.max_position_embeddings;
    Some(model)
}
