//! `POST /v1/completions`: text or token-id prompts, one or many, echo, log-probabilities, streams.

use axum::{
    Json,
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use dsv3_infer::{Request, Sampling};
use serde_json::{Map, Value, json};

use crate::{
    choices::{Job, News, Run, Usage},
    error::ApiError,
    fields::Fields,
    sse,
    state::AppState,
    text::{Piece, Shown},
};

/// Most sequences one request may start (prompts times `n`).
const CHOICES_MAX: usize = 128;

/// What both completion routes read in the same way.
pub(crate) struct Common {
    pub(crate) sampling: Sampling,
    pub(crate) stops: Vec<String>,
    pub(crate) stop_ids: Vec<u32>,
    pub(crate) count: usize,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) number: u64,
}

impl Common {
    pub(crate) fn read(state: &AppState, fields: &Fields) -> Result<Self, ApiError> {
        state.check_model(fields)?;
        let number = state.next_request();
        let sampling = Sampling {
            temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0),
            top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0),
            seed: fields.seed()?.unwrap_or(number),
        };
        let count = fields.integer("n", 1, CHOICES_MAX as u64)?.unwrap_or(1) as usize;
        let stop_ids = if fields.flag("ignore_eos")? { Vec::new() } else { state.served.text.eos_ids.clone() };
        let options = fields.get("stream_options");
        if options.is_some_and(|options| !options.is_object()) {
            return Err(fields.bad("stream_options", "an object"));
        }
        let include = options.and_then(|options| options.get("include_usage")).and_then(Value::as_bool);
        Ok(Self {
            sampling,
            stops: fields.stop()?,
            stop_ids,
            count,
            stream: fields.flag("stream")?,
            include_usage: include.unwrap_or(false),
            number,
        })
    }

    /// Sampling of choice `index`; each choice has noise of its own.
    pub(crate) fn sampling(&self, index: usize) -> Sampling {
        Sampling { seed: self.sampling.seed.wrapping_add(index as u64), ..self.sampling }
    }
}

/// Refuses a prompt that leaves no room for `max_tokens`.
pub(crate) fn check_length(state: &AppState, param: &str, prompt: usize, max_tokens: usize) -> Result<(), ApiError> {
    let context = state.served.context_tokens;
    if prompt.saturating_add(max_tokens) <= context {
        return Ok(());
    }
    let message = format!(
        "this model's context is {context} tokens, but {prompt} of the prompt and {max_tokens} of the completion were asked for"
    );
    Err(ApiError { code: Some("context_length_exceeded"), ..ApiError::invalid(param, message) })
}

struct Completion {
    common: Common,
    prompts: Vec<Prompt>,
    max_tokens: usize,
    echo: bool,
    /// Alternatives to list; `None` without log-probabilities.
    logprobs: Option<usize>,
}

struct Prompt {
    ids: Vec<u32>,
    /// Leading tokens that the server added.
    silent: usize,
}

/// The handler.
pub(crate) async fn create(State(state): State<AppState>, body: Bytes) -> Result<Response, ApiError> {
    let shared = state.clone();
    let parsed = tokio::task::spawn_blocking(move || Completion::read(&shared, &body)).await;
    let completion = parsed.map_err(|_| ApiError::stopping())??;
    let prompt_tokens = completion.prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let run = Run::start(&state, completion.jobs(state.served.speculate), prompt_tokens)?;
    let head = Head { id: format!("cmpl-{}", completion.common.number), state, logprobs: completion.logprobs };
    if completion.common.stream {
        let include_usage = completion.common.include_usage;
        let chunk = move |news: News| match news {
            News::Piece(index, piece) => vec![head.body(vec![head.choice(index, &piece, None)], None)],
            News::End(index, reason) => {
                vec![head.body(vec![head.choice(index, &Piece::default(), Some(reason))], None)]
            }
        };
        return Ok(sse::respond(run, chunk, include_usage.then_some(usage_chunk as sse::UsageChunk)));
    }
    collect(run, completion.common.count * completion.prompts.len(), &head).await
}

/// The last event of a stream that asked for `include_usage`.
fn usage_chunk(usage: Usage) -> Value {
    json!({"object": "text_completion", "choices": [], "usage": usage.json()})
}

async fn collect(mut run: Run, count: usize, head: &Head) -> Result<Response, ApiError> {
    let mut pieces: Vec<(Piece, Option<&'static str>)> = vec![Default::default(); count];
    while let Some(news) = run.next().await {
        match news? {
            News::Piece(index, piece) => {
                pieces[index].0.text.push_str(&piece.text);
                pieces[index].0.tokens.extend(piece.tokens);
            }
            News::End(index, reason) => pieces[index].1 = Some(reason),
        }
    }
    let choices = pieces.iter().enumerate().map(|(index, (piece, reason))| head.choice(index, piece, *reason));
    Ok(Json(head.body(choices.collect(), Some(run.usage))).into_response())
}

impl Completion {
    fn read(state: &AppState, body: &[u8]) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        let common = Common::read(state, &fields)?;
        let prompts = prompts(state, &fields)?;
        if prompts.len() * common.count > CHOICES_MAX {
            let message = format!("{} prompts times n = {} exceed {CHOICES_MAX} choices", prompts.len(), common.count);
            return Err(ApiError::invalid("prompt", message));
        }
        let max_tokens = fields.integer("max_tokens", 0, u64::from(u32::MAX))?.unwrap_or(16) as usize;
        for prompt in &prompts {
            check_length(state, "prompt", prompt.ids.len(), max_tokens)?;
        }
        let logprobs = fields.integer("logprobs", 0, 20)?.map(|n| n as usize);
        Ok(Self { common, prompts, max_tokens, echo: fields.flag("echo")?, logprobs })
    }

    fn jobs(&self, speculate: bool) -> Vec<Job> {
        let job = |(index, prompt): (usize, &Prompt)| Job {
            request: Request {
                ids: prompt.ids.clone(),
                max_tokens: self.max_tokens,
                sampling: self.common.sampling(index),
                stop_ids: self.common.stop_ids.clone(),
                top_logprobs: self.logprobs.unwrap_or(0),
                echo_from: (self.echo && self.logprobs.is_some()).then_some(0),
                speculate,
            },
            echo: self.echo,
            silent: prompt.silent,
            stops: self.common.stops.clone(),
            visible_only: false,
        };
        let repeated = self.prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, self.common.count));
        repeated.enumerate().map(job).collect()
    }
}

/// A string, a list of strings, a list of ids, or a list of lists of ids.
fn prompts(state: &AppState, fields: &Fields) -> Result<Vec<Prompt>, ApiError> {
    let wanted = "a string, an array of strings, an array of token ids, or an array of arrays of token ids";
    let bad = || fields.bad("prompt", wanted);
    let list = match fields.get("prompt") {
        None => return Err(ApiError::invalid("prompt", "prompt is missing")),
        Some(Value::String(text)) => return Ok(vec![encode(state, text)?]),
        Some(Value::Array(list)) if !list.is_empty() => list,
        Some(_) => return Err(bad()),
    };
    if list.len() > CHOICES_MAX && !list[0].is_number() {
        return Err(ApiError::invalid("prompt", format!("at most {CHOICES_MAX} prompts can be given")));
    }
    match &list[0] {
        Value::Number(_) => Ok(vec![ids(state, list).ok_or_else(bad)??]),
        Value::String(_) => list.iter().map(|one| encode(state, one.as_str().ok_or_else(bad)?)).collect(),
        Value::Array(_) => {
            list.iter().map(|one| ids(state, one.as_array().ok_or_else(bad)?).ok_or_else(bad)?).collect()
        }
        _ => Err(bad()),
    }
}

/// `None` when an element is no whole number.
fn ids(state: &AppState, list: &[Value]) -> Option<Result<Prompt, ApiError>> {
    let ids: Vec<u64> = list.iter().map(Value::as_u64).collect::<Option<_>>()?;
    if ids.is_empty() {
        return Some(Err(ApiError::invalid("prompt", "a prompt has no token")));
    }
    let vocab = state.served.vocab_size;
    if let Some(id) = ids.iter().find(|id| **id >= vocab as u64) {
        let message = format!("token id {id} is outside the vocabulary of {vocab}");
        return Some(Err(ApiError::invalid("prompt", message)));
    }
    Some(Ok(Prompt { ids: ids.into_iter().map(|id| id as u32).collect(), silent: 0 }))
}

fn encode(state: &AppState, text: &str) -> Result<Prompt, ApiError> {
    let served = &state.served;
    // Who writes a raw prompt writes its special tokens too, so their spellings count.
    let mut ids =
        served.text.tokenizer.encode_chat(text).map_err(|error| ApiError::invalid("prompt", error.to_string()))?;
    let mut silent = 0;
    if let Some(bos) =
        served.text.tokenizer.specials().bos.filter(|bos| served.text.adds_bos && ids.first() != Some(bos))
    {
        ids.insert(0, bos);
        silent = 1;
    }
    if ids.is_empty() {
        return Err(ApiError::invalid("prompt", "a prompt has no token"));
    }
    if let Some(id) = ids.iter().find(|id| **id as usize >= served.vocab_size) {
        let message = format!("the tokenizer's id {id} is outside the model's vocabulary of {}", served.vocab_size);
        return Err(ApiError::invalid("prompt", message));
    }
    Ok(Prompt { ids, silent })
}

/// What all bodies of one response share.
struct Head {
    id: String,
    state: AppState,
    logprobs: Option<usize>,
}

impl Head {
    fn body(&self, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.state.created_unix_secs,
            "model": self.state.served.model_id,
            "choices": choices,
            "usage": usage.map(Usage::json),
        })
    }

    fn choice(&self, index: usize, piece: &Piece, reason: Option<&str>) -> Value {
        let logprobs = self.logprobs.map(|alternatives| logprobs(&piece.tokens, alternatives));
        json!({"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason})
    }
}

fn logprobs(tokens: &[Shown], alternatives: usize) -> Value {
    let top = |token: &Shown| {
        let own = token.logprob?;
        let mut map = Map::new();
        let all = token.top.iter().map(|(text, _, logprob)| (text, *logprob));
        // Two ids may share a spelling; the likelier one keeps it.
        for (text, logprob) in all.chain(std::iter::once((&token.text, own))) {
            map.entry(text.clone()).or_insert_with(|| number(logprob));
        }
        Some(Value::Object(map))
    };
    json!({
        "tokens": tokens.iter().map(|token| &token.text).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob.map(number)).collect::<Vec<_>>(),
        "top_logprobs": (alternatives > 0).then(|| tokens.iter().map(top).collect::<Vec<_>>()),
        "text_offset": tokens.iter().map(|token| token.offset).collect::<Vec<_>>(),
    })
}

/// JSON has no infinity; OpenAI writes -9999 for what has no probability.
pub(crate) fn number(logprob: f32) -> Value {
    json!(if logprob.is_finite() { logprob } else { -9999.0 })
}
