//! Model artifacts: Hugging Face folders in the store. Between stages weights are F32, so that a later stage trains the
//! very masters an earlier one left.

use std::path::Path;

use dsv3_core::{Artifact, Error, FileEntry, kinds::Model as ModelKind};
use dsv3_data::{ChatTemplate, Tokenizer};
use dsv3_model::{LoadPrecision, Model, SaveFormat};
use dsv3_stage::Ctx;
use serde_json::{Value, json};

use crate::shared::training::TrainingOptions;

/// Largest shard of a published model.
const SHARD_BYTES: u64 = 4 << 30;

/// Files of a model folder that belong to its tokenizer.
const TOKENIZER_FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"];

/// A model folder, opened.
pub(crate) struct ModelFolder {
    /// The weights.
    pub(crate) model: Model,
    /// `tokenizer.json`, read.
    pub(crate) tokenizer: Tokenizer,
    /// The folder's chat template, if it has one.
    pub(crate) template: Option<ChatTemplate>,
    /// Files to carry over to models made from this one.
    carried: Vec<(String, Vec<u8>)>,
}

impl ModelFolder {
    /// Opens the folder behind `artifact`; warnings of the loader go to the log.
    pub(crate) fn open(
        ctx: &Ctx,
        artifact: &Artifact<ModelKind>,
        precision: LoadPrecision,
        trainable: bool,
    ) -> Result<Self, Error> {
        let dir = ctx.local_dir(artifact)?;
        let loaded = dsv3_model::load(&dir, precision, trainable).map_err(|error| ctx.in_artifact(artifact, error))?;
        warn(ctx, &dir, &loaded.warnings);
        let tokenizer = Tokenizer::from_folder(&dir).map_err(|error| ctx.in_artifact(artifact, error))?;
        let template = ChatTemplate::from_folder(&dir).map_err(|error| ctx.in_artifact(artifact, error))?;
        let carried = TOKENIZER_FILES.iter().filter_map(|name| read_optional(&dir, name)).collect::<Result<_, _>>()?;
        Ok(Self { model: loaded.model, tokenizer, template, carried })
    }

    /// Opens it to be trained as `training` says.
    pub(crate) fn open_trainable(
        ctx: &Ctx,
        artifact: &Artifact<ModelKind>,
        training: &TrainingOptions,
    ) -> Result<Self, Error> {
        let folder = Self::open(ctx, artifact, LoadPrecision::As(training.precision), true)?;
        Ok(Self { model: training.model(folder.model), ..folder })
    }

    /// The template to use: the one given in the pipeline, else the folder's.
    pub(crate) fn template_or(&self, given: Option<&str>) -> Result<ChatTemplate, Error> {
        match (given, &self.template) {
            (Some(source), _) => Ok(ChatTemplate::new(source)?),
            (None, Some(template)) => Ok(template.clone()),
            (None, None) => Err(Error::invalid("the model folder has no chat template and the config gives none")
                .help("set `chat_template` in the stage's config")),
        }
    }

    /// Publishes `model` with this folder's tokenizer.
    pub(crate) fn publish(&self, ctx: &Ctx, model: &Model, format: SaveFormat) -> Result<Artifact<ModelKind>, Error> {
        publish(ctx, model, format, &self.carried)
    }

    /// Publishes `model` with this folder's tokenizer and another chat template.
    pub(crate) fn publish_with_template(
        &self,
        ctx: &Ctx,
        model: &Model,
        format: SaveFormat,
        template: &ChatTemplate,
    ) -> Result<Artifact<ModelKind>, Error> {
        let mut files = self.carried.clone();
        let config = files.iter().position(|(name, _)| name == "tokenizer_config.json");
        let old = config.map(|at| files.remove(at).1);
        files.retain(|(name, _)| name != "chat_template.jinja");
        files.push(("tokenizer_config.json".to_owned(), with_template(old.as_deref(), &self.tokenizer, template)?));
        publish(ctx, model, format, &files)
    }
}

/// Logs what the loader warns of. The folder is a layout of links of ours, whose path says nothing to a reader.
pub(crate) fn warn(ctx: &Ctx, dir: &Path, warnings: &[String]) {
    let here = format!("{}: ", dir.display());
    warnings.iter().for_each(|warning| ctx.log_warn(warning.replacen(&here, "", 1)));
}

fn read_optional(dir: &Path, name: &str) -> Option<Result<(String, Vec<u8>), Error>> {
    let path = dir.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => Some(Ok((name.to_owned(), bytes))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => Some(Err(Error::unavailable(format!("cannot read {}", path.display())).source(error))),
    }
}

/// The tokenizer files of a model trained from scratch.
pub(crate) fn tokenizer_files(tokenizer: &Tokenizer, template: &ChatTemplate) -> Result<Vec<(String, Vec<u8>)>, Error> {
    Ok(vec![
        ("tokenizer.json".to_owned(), tokenizer.to_bytes().to_vec()),
        ("tokenizer_config.json".to_owned(), with_template(None, tokenizer, template)?),
    ])
}

/// `tokenizer_config.json` with `template` and, where the old file does not say, the names of bos, eos and pad.
fn with_template(old: Option<&[u8]>, tokenizer: &Tokenizer, template: &ChatTemplate) -> Result<Vec<u8>, Error> {
    let damaged = |source| Error::data("tokenizer_config.json is not JSON").source(source);
    let mut config: Value = old.map_or(Ok(json!({})), serde_json::from_slice).map_err(damaged)?;
    let fields = config.as_object_mut().ok_or_else(|| Error::data("tokenizer_config.json is not a JSON object"))?;
    let specials = tokenizer.specials();
    for (field, id) in [("bos_token", specials.bos), ("eos_token", specials.eos), ("pad_token", specials.pad)] {
        if let Some(text) = id.and_then(|id| tokenizer.id_to_token(id)) {
            fields.entry(field).or_insert_with(|| json!(text));
        }
    }
    fields.entry("tokenizer_class").or_insert_with(|| json!("PreTrainedTokenizerFast"));
    fields.insert("chat_template".to_owned(), json!(template.source()));
    serde_json::to_vec_pretty(&config)
        .map_err(|source| Error::internal("tokenizer_config.json cannot be written").source(source))
}

/// Publishes `model` and `others` as one folder.
pub(crate) fn publish(
    ctx: &Ctx,
    model: &Model,
    format: SaveFormat,
    others: &[(String, Vec<u8>)],
) -> Result<Artifact<ModelKind>, Error> {
    let mut files: Vec<FileEntry> = Vec::new();
    let mut failed: Option<Error> = None;
    let written = dsv3_model::save(model, format, SHARD_BYTES, &mut |name, bytes| {
        // The saver speaks io errors; keep ours, which says more.
        ctx.put(name, bytes).map(|file| files.push(file)).map_err(|error| {
            let text = error.to_string();
            failed = Some(error);
            std::io::Error::other(text)
        })
    });
    if let Some(error) = failed {
        return Err(error);
    }
    written?;
    for (name, bytes) in others {
        files.push(ctx.put(name, bytes.clone())?);
    }
    let counts = dsv3_model::count::counts(&model.config);
    ctx.publish(files, json!({ "parameters": counts.total, "stored": counts.stored, "format": format_name(format) }))
}

/// Name of a format in manifests and facts.
pub(crate) fn format_name(format: SaveFormat) -> &'static str {
    match format {
        SaveFormat::F32 => "float32",
        SaveFormat::Bf16 => "bfloat16",
        SaveFormat::Fp8(_) => "fp8",
    }
}
