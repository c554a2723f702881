//! What every handler shares: the engine, and how this model reads and writes text.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use axum::http::StatusCode;
use dsv3_data::{ChatTemplate, DEFAULT_TEMPLATE, Tokenizer};
use dsv3_infer::Engine;
use serde_json::Value;

use crate::{
    error::{ApiError, Error},
    fields::Fields,
};

/// The text side of a model: tokenizer, chat template, ids that end a text.
#[derive(Clone, Debug)]
pub struct ModelText {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template; without one `/v1/chat/completions` is refused.
    pub template: Option<ChatTemplate>,
    /// Ids that end a text unless the client sets `ignore_eos`.
    pub eos_ids: Vec<u32>,
    /// Whether a text prompt gets a bos in front (`add_bos_token` of `tokenizer_config.json`).
    pub adds_bos: bool,
}

impl ModelText {
    /// Reads the tokenizer, the chat template and the end ids of a Hugging Face folder. A folder without a template gets
    /// DeepSeek-V3's own, if its tokenizer has the role marks.
    ///
    /// # Errors
    /// When the tokenizer is missing, or a file is damaged.
    pub fn from_folder(folder: &Path) -> Result<Self, Error> {
        let data = |file: &str| {
            let file = file.to_owned();
            move |source: dsv3_data::DataError| Error::Folder { file, source: Box::new(source) }
        };
        let tokenizer = Tokenizer::from_folder(folder).map_err(data("tokenizer.json"))?;
        let mut template = ChatTemplate::from_folder(folder).map_err(data("the chat template"))?;
        let specials = tokenizer.specials();
        if template.is_none() && specials.user.is_some() && specials.assistant.is_some() {
            template = Some(ChatTemplate::new(DEFAULT_TEMPLATE).map_err(data("the chat template"))?);
        }
        let mut eos_ids: Vec<u32> = specials.eos.into_iter().collect();
        for file in ["generation_config.json", "config.json"] {
            eos_ids.extend(ids_of(read_json(folder, file)?.get("eos_token_id")));
        }
        eos_ids.sort_unstable();
        eos_ids.dedup();
        let config = read_json(folder, "tokenizer_config.json")?;
        let adds_bos = config.get("add_bos_token").and_then(Value::as_bool).unwrap_or(false);
        Ok(Self { tokenizer, template, eos_ids, adds_bos })
    }
}

/// A JSON file of the folder; null when it is not there.
fn read_json(folder: &Path, file: &str) -> Result<Value, Error> {
    let damaged = |source: Box<dyn std::error::Error + Send + Sync>| Error::Folder { file: file.to_owned(), source };
    match std::fs::read(folder.join(file)) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| damaged(Box::new(error))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(damaged(Box::new(error))),
    }
}

fn ids_of(value: Option<&Value>) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// How a model is served.
#[derive(Clone, Debug)]
pub struct Served {
    /// Name under `/v1/models`.
    pub model_id: String,
    /// Other names that a request may use, such as the folder's path.
    pub aliases: Vec<String>,
    /// Text side.
    pub text: ModelText,
    /// Longest sequence, prompt and completion together, in tokens.
    pub context_tokens: usize,
    /// Number of token ids of the model.
    pub vocab_size: usize,
    /// Whether requests may draft with the multi-token prediction head.
    pub speculate: bool,
}

/// Shared by all handlers; cheap to clone.
#[derive(Clone)]
pub struct AppState {
    pub(crate) served: Arc<Served>,
    pub(crate) engine: Arc<Engine>,
    pub(crate) created_unix_secs: u64,
    requests: Arc<AtomicU64>,
}

impl AppState {
    /// Puts a model's text side in front of its engine.
    pub fn new(served: Served, engine: Engine) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let created_unix_secs = now.map(|since| since.as_secs()).unwrap_or_default();
        Self { served: Arc::new(served), engine: Arc::new(engine), created_unix_secs, requests: Arc::default() }
    }

    /// Name under `/v1/models`.
    pub fn model_id(&self) -> &str {
        &self.served.model_id
    }

    /// The engine behind it.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Number of a request, from 0; names it and seeds it when the client gave no seed.
    pub(crate) fn next_request(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn request_count(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// 404 for another model; an absent name means the one model there is.
    pub(crate) fn check_model(&self, fields: &Fields) -> Result<(), ApiError> {
        let Some(name) = fields.text("model")? else { return Ok(()) };
        if name == self.served.model_id || self.served.aliases.iter().any(|alias| alias == name) {
            return Ok(());
        }
        let message = format!("the model {name:?} does not exist; this server has {:?}", self.served.model_id);
        let param = Some("model".to_owned());
        Err(ApiError { param, ..ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message) })
    }
}
