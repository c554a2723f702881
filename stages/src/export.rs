//! `export`: a model as others load it: Hugging Face folder in BF16 or block-scaled FP8, tokenizer and chat template.

use dsv3_core::{Artifact, Error, kinds::Model as ModelKind};
use dsv3_data::ChatTemplate;
use dsv3_model::{LoadPrecision, SaveFormat};
use dsv3_ops::Fp8Scales;
use dsv3_stage::{Ctx, InputFacts, OutputFacts, Problems, Stage, ports};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::shared::{
    facts,
    folder::{ModelFolder, format_name},
};

/// Element types of an exported model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Dtype {
    /// Everything F32.
    F32,
    /// Everything BF16.
    Bf16,
    /// Linear layers in FP8 E4M3 with one scale for each block of 128 x 128, the rest BF16, as DeepSeek publishes.
    #[default]
    Fp8,
}

/// Options of `export`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// Element types.
    dtype: Dtype,
    /// Power-of-two scales (`ue8m0`, as V3.1 publishes) or any (`f32`); read for `dtype: fp8` only.
    scales: Fp8Scales,
    /// Chat template to store instead of the model's own.
    chat_template: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { dtype: Dtype::default(), scales: Fp8Scales::F32, chat_template: None }
    }
}

impl Config {
    fn format(&self) -> SaveFormat {
        match self.dtype {
            Dtype::F32 => SaveFormat::F32,
            Dtype::Bf16 => SaveFormat::Bf16,
            Dtype::Fp8 => SaveFormat::Fp8(self.scales),
        }
    }
}

ports! {
    /// Inputs of `export`.
    pub(crate) struct Inputs {
        /// Model to export.
        model: Artifact<ModelKind>,
    }
}

ports! {
    /// Outputs of `export`.
    pub(crate) struct Outputs {
        /// The Hugging Face folder.
        model: Artifact<ModelKind>,
    }
}

/// The stage.
pub(crate) struct Export;

impl Stage for Export {
    const NAME: &'static str = "export";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "Writes a Hugging Face folder in FP8 or BF16, multi-token prediction included";
    type Config = Config;
    type Inputs = Inputs;
    type Outputs = Outputs;

    fn check(config: &Config, inputs: &InputFacts, problems: &mut Problems) {
        facts::check_model_folder(inputs, "model", problems);
        if let Some(Err(error)) = config.chat_template.as_deref().map(ChatTemplate::new) {
            problems.push("config.chat_template", error.to_string(), "");
        }
    }

    fn facts(config: &Config, inputs: &InputFacts) -> OutputFacts {
        let template = config.chat_template.is_some() || facts::has_template(inputs, "model").unwrap_or(false);
        facts::model_output(facts::model_config(inputs, "model").as_ref(), format_name(config.format()), template)
    }

    fn run(config: Config, inputs: Inputs, ctx: &mut Ctx) -> Result<Outputs, Error> {
        let folder = ModelFolder::open(ctx, &inputs.model, LoadPrecision::Own, true)?;
        let template = config.chat_template.as_deref().map(ChatTemplate::new).transpose()?;
        let model = match &template {
            Some(template) => folder.publish_with_template(ctx, &folder.model, config.format(), template)?,
            None => folder.publish(ctx, &folder.model, config.format())?,
        };
        let manifest = ctx.manifest(&model)?;
        ctx.set_metric("bytes", manifest.bytes() as f64);
        ctx.set_metric("files", manifest.files.len() as f64);
        Ok(Outputs { model })
    }
}
