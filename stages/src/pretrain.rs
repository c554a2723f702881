//! `pretrain`: next-token and multi-token prediction on a packed stream, with loss-free expert balancing.

use dsv3_core::{
    Artifact, Error,
    kinds::{Model as ModelKind, Tokenizer as TokenizerKind, Tokens},
};
use dsv3_data::{ChatTemplate, Loader};
use dsv3_estimate::Estimate;
use dsv3_model::{Model, ModelConfig, SaveFormat};
use dsv3_stage::{Ctx, InputFacts, OutputFacts, Problems, Shrink, Stage, ports};
use dsv3_train::{Schedules, Supervised, Trainer, WindowSource, run_training};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ingest::open_tokenizer,
    shared::{
        facts, folder, tokens,
        training::{self, Length, TrainingOptions},
    },
};

/// Options of `pretrain`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The model, in the words of a Hugging Face `config.json`.
    model: ModelConfig,
    /// Tokens of a training sequence.
    sequence_tokens: usize,
    /// Length of the run.
    length: Length,
    /// Learning rate, batch size, λ and γ over the run.
    schedules: Schedules,
    /// Sequences of the training stream held out for validation, when no `validation` input is given.
    #[serde(default)]
    holdout_sequences: u64,
    /// Optimiser, memory, checkpoints, guard.
    #[serde(default)]
    training: TrainingOptions,
    /// Chat template stored with the model; the published DeepSeek-V3 form when absent.
    #[serde(default)]
    chat_template: Option<String>,
}

ports! {
    /// Inputs of `pretrain`.
    pub(crate) struct Inputs {
        /// Training stream.
        tokens: Artifact<Tokens>,
        /// Stored with the model.
        tokenizer: Artifact<TokenizerKind>,
        /// Stream whose loss is reported; read whole, in windows of `sequence_tokens`.
        validation: Option<Artifact<Tokens>>,
    }
}

ports! {
    /// Outputs of `pretrain`.
    pub(crate) struct Outputs {
        /// Hugging Face folder in F32.
        model: Artifact<ModelKind>,
    }
}

/// The stage.
pub(crate) struct Pretrain;

impl Stage for Pretrain {
    const NAME: &'static str = "pretrain";
    const VERSION: u32 = 2;
    const ABOUT: &'static str =
        "Trains a model from scratch, with multi-token prediction and loss-free expert balancing";
    const SHRINK: &'static [Shrink] = &[
        Shrink::AtMost("model.hidden_size", 32),
        Shrink::AtMost("model.num_hidden_layers", 2),
        Shrink::AtMost("model.first_k_dense_replace", 1),
        Shrink::AtMost("model.intermediate_size", 48),
        Shrink::AtMost("model.moe_intermediate_size", 16),
        Shrink::AtMost("model.num_attention_heads", 2),
        Shrink::AtMost("model.q_lora_rank", 24),
        Shrink::AtMost("model.kv_lora_rank", 16),
        Shrink::AtMost("model.qk_nope_head_dim", 8),
        Shrink::AtMost("model.qk_rope_head_dim", 8),
        Shrink::AtMost("model.v_head_dim", 8),
        Shrink::AtMost("model.num_nextn_predict_layers", 1),
        // Groups must divide the experts, so these four go together.
        Shrink::Put("model.n_routed_experts", "8"),
        Shrink::Put("model.num_experts_per_tok", "2"),
        Shrink::Put("model.n_group", "4"),
        Shrink::Put("model.topk_group", "2"),
        Shrink::AtMost("sequence_tokens", 64),
        Shrink::Put("length", r#"{"steps": 6}"#),
        Shrink::Put("schedules.batch", r#"{"sequences": 2}"#),
        Shrink::AtMost("holdout_sequences", 4),
        Shrink::Put("training.checkpoint", r#"{"steps": 2}"#),
        Shrink::AtMost("training.validate_steps", 4),
    ];
    type Config = Config;
    type Inputs = Inputs;
    type Outputs = Outputs;

    fn check(config: &Config, inputs: &InputFacts, problems: &mut Problems) {
        for problem in config.model.check() {
            problems.push(format!("config.model.{}", problem.field), problem.message, "");
        }
        config.length.check("config.length", problems);
        config.training.check("config.training", problems);
        training::check_schedules(&config.schedules, config.length, "config.schedules", problems);
        for port in ["tokens", "tokenizer", "validation"] {
            facts::check_vocabulary(inputs, port, config.model.vocab_size, "config.model.vocab_size", problems);
        }
        let (asked, most) = (config.sequence_tokens, config.model.max_position_embeddings);
        if asked == 0 || asked > most {
            let message = format!("{asked} does not lie between 1 and the model's max_position_embeddings of {most}");
            problems.push("config.sequence_tokens", message, "");
        }
        if let Some(Err(error)) = config.chat_template.as_deref().map(ChatTemplate::new) {
            problems.push("config.chat_template", error.to_string(), "");
        }
    }

    fn facts(config: &Config, _inputs: &InputFacts) -> OutputFacts {
        facts::model_output(Some(&config.model), "float32", true)
    }

    fn describe(config: &Config, _inputs: &InputFacts, at_tokens: &[u64]) -> Vec<(String, String)> {
        let estimate = Estimate::new(&config.model, config.sequence_tokens as u64);
        let counts = estimate.counts;
        let mut lines = vec![
            ("parameters".to_owned(), grouped(counts.total)),
            ("active parameters".to_owned(), grouped(counts.active)),
            ("parameters with MTP as stored".to_owned(), grouped(counts.stored)),
            ("training FLOPs per token".to_owned(), format!("{:.4e}", estimate.train_flops_per_token)),
            ("cache bytes per token".to_owned(), grouped(estimate.cache_bytes_per_token)),
            ("optimiser state bytes".to_owned(), grouped(estimate.optimizer_state_bytes)),
        ];
        // Without data an epoch has no length: fractions of it cannot be placed at a token count.
        if matches!(config.length, Length::Epochs(_)) {
            return lines;
        }
        let horizon = config.length.horizon(0);
        for tokens in at_tokens {
            let at = config.schedules.at_tokens(*tokens, config.sequence_tokens as u64, horizon);
            let text = format!(
                "step {}: LR {:e}, batch {}, λ {}, γ {}",
                at.steps, at.lr, at.sequences, at.mtp_weight, at.bias_speed
            );
            lines.push((format!("at {} tokens", grouped(*tokens)), text));
        }
        lines
    }

    fn run(config: Config, inputs: Inputs, ctx: &mut Ctx) -> Result<Outputs, Error> {
        let (stream, meta) = tokens::open(ctx, &inputs.tokens)?;
        tokens::check_vocabulary(&meta, config.model.vocab_size)?;
        let validation = inputs.validation.as_ref().map(|artifact| tokens::open(ctx, artifact)).transpose()?;
        let loader = Loader::new(meta.total_tokens, config.sequence_tokens, ctx.seed())?;
        let loader = loader.with_holdout(config.holdout_sequences)?;
        let epoch = loader.samples_per_epoch();
        let horizon = config.length.horizon(epoch * config.sequence_tokens as u64);
        let source = WindowSource {
            tokens: &stream,
            loader,
            end: end_of(config.length, epoch),
            micro_batch_tokens: config.training.micro_batch_tokens,
            pad: meta.pad_token_id,
        };
        let source = tokens::Validated::new(source, validation, config.sequence_tokens)?;
        let mut work = tokens::CountingRows::new(Supervised::new(source, config.schedules), &stream);
        let model = config.training.model(Model::init(&config.model, config.training.precision, ctx.seed())?);
        let mut trainer = Trainer::new(model, config.training.trainer())?;
        run_training(&mut trainer, &mut work, &training::host(ctx), &config.training.run(horizon))?;
        training::close(ctx, &trainer)?;
        let template = config.chat_template.as_deref().map(ChatTemplate::new).transpose()?.unwrap_or_default();
        let files = folder::tokenizer_files(&open_tokenizer(ctx, &inputs.tokenizer)?, &template)?;
        Ok(Outputs { model: folder::publish(ctx, &trainer.model, SaveFormat::F32, &files)? })
    }
}

/// Loading position at which a run of this length ends; runs counted in steps or tokens read as many passes as they need.
fn end_of(length: Length, samples_per_epoch: u64) -> u64 {
    match length {
        Length::Epochs(epochs) => (epochs * samples_per_epoch as f64) as u64,
        Length::Steps(_) | Length::Tokens(_) => u64::MAX,
    }
}

/// `671,026,419,200`.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let first = digits.len() % 3;
    let mut text = digits[..first].to_owned();
    for chunk in digits.as_bytes()[first..].chunks(3) {
        if !text.is_empty() {
            text.push(',');
        }
        text.extend(chunk.iter().map(|digit| char::from(*digit)));
    }
    text
}
