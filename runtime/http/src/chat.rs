//! `POST /v1/chat/completions`: messages through the model's chat template.

use axum::{
    Json,
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use dsv3_data::Message;
use dsv3_infer::Request;
use serde_json::{Value, json};

use crate::{
    choices::{Job, News, Run, Usage},
    completions::{Common, check_length, number},
    error::ApiError,
    fields::Fields,
    sse,
    state::AppState,
    text::{Piece, Shown},
};

struct Chat {
    common: Common,
    ids: Vec<u32>,
    max_tokens: usize,
    /// Alternatives to list; `None` without log-probabilities.
    logprobs: Option<usize>,
}

/// The handler.
pub(crate) async fn create(State(state): State<AppState>, body: Bytes) -> Result<Response, ApiError> {
    let shared = state.clone();
    let parsed = tokio::task::spawn_blocking(move || Chat::read(&shared, &body)).await;
    let chat = parsed.map_err(|_| ApiError::stopping())??;
    let jobs = (0..chat.common.count).map(|index| chat.job(index, state.served.speculate)).collect();
    let mut run = Run::start(&state, jobs, chat.ids.len())?;
    let head = Head { id: format!("chatcmpl-{}", chat.common.number), state, with_logprobs: chat.logprobs.is_some() };
    if chat.common.stream {
        let chunk = move |news: News| match news {
            News::Piece(index, piece) => vec![head.chunk(index, json!({"content": piece.text}), Some(&piece), None)],
            News::End(index, reason) => vec![head.chunk(index, json!({}), None, Some(reason))],
        };
        let usage = chat.common.include_usage.then_some(usage_chunk as sse::UsageChunk);
        return Ok(sse::respond(run, chunk, usage));
    }
    let mut pieces: Vec<(Piece, Option<&'static str>)> = vec![Default::default(); chat.common.count];
    while let Some(news) = run.next().await {
        match news? {
            News::Piece(index, piece) => {
                pieces[index].0.text.push_str(&piece.text);
                pieces[index].0.tokens.extend(piece.tokens);
            }
            News::End(index, reason) => pieces[index].1 = Some(reason),
        }
    }
    let choice = |(index, (piece, reason)): (usize, &(Piece, Option<&'static str>))| {
        json!({
            "index": index,
            "message": {"role": "assistant", "content": piece.text},
            "logprobs": head.logprobs(piece),
            "finish_reason": reason,
        })
    };
    let choices: Vec<Value> = pieces.iter().enumerate().map(choice).collect();
    Ok(Json(head.body("chat.completion", choices, Some(run.usage))).into_response())
}

/// The last event of a stream that asked for `include_usage`.
fn usage_chunk(usage: Usage) -> Value {
    json!({"object": "chat.completion.chunk", "choices": [], "usage": usage.json()})
}

impl Chat {
    fn read(state: &AppState, body: &[u8]) -> Result<Self, ApiError> {
        let fields = Fields::parse(body)?;
        let common = Common::read(state, &fields)?;
        let messages = messages(&fields)?;
        let text = &state.served.text;
        let Some(template) = &text.template else {
            return Err(ApiError::invalid("messages", "this model has no chat template; use /v1/completions"));
        };
        let ids = template
            .encode_prompt(&text.tokenizer, &messages)
            .map_err(|error| ApiError::invalid("messages", error.to_string()))?;
        if ids.is_empty() || ids.iter().any(|id| *id as usize >= state.served.vocab_size) {
            return Err(ApiError::invalid("messages", "the chat template renders no token this model has"));
        }
        let room = state.served.context_tokens.saturating_sub(ids.len());
        let name = if fields.get("max_completion_tokens").is_some() { "max_completion_tokens" } else { "max_tokens" };
        let max_tokens = fields.integer(name, 0, u64::from(u32::MAX))?.map_or(room.max(1), |n| n as usize);
        check_length(state, "messages", ids.len(), max_tokens)?;
        let alternatives = fields.integer("top_logprobs", 0, 20)?;
        let logprobs = fields.flag("logprobs")?.then_some(alternatives.unwrap_or(0) as usize);
        if logprobs.is_none() && alternatives.is_some_and(|n| n > 0) {
            return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true"));
        }
        Ok(Self { common, ids, max_tokens, logprobs })
    }

    fn job(&self, index: usize, speculate: bool) -> Job {
        Job {
            request: Request {
                ids: self.ids.clone(),
                max_tokens: self.max_tokens,
                sampling: self.common.sampling(index),
                stop_ids: self.common.stop_ids.clone(),
                top_logprobs: self.logprobs.unwrap_or(0),
                echo_from: None,
                speculate,
            },
            echo: false,
            silent: 0,
            stops: self.common.stops.clone(),
            visible_only: true,
        }
    }
}

fn messages(fields: &Fields) -> Result<Vec<Message>, ApiError> {
    let bad = |message: String| ApiError::invalid("messages", message);
    let Some(list) = fields.get("messages") else { return Err(bad("messages is missing".to_owned())) };
    let list = list.as_array().filter(|list| !list.is_empty());
    let Some(list) = list else { return Err(fields.bad("messages", "a non-empty array of messages")) };
    list.iter()
        .enumerate()
        .map(|(index, one)| {
            let role = one.get("role").and_then(Value::as_str);
            let Some(role) = role.filter(|role| !role.is_empty()) else {
                return Err(bad(format!("messages[{index}].role must be a string")));
            };
            let Some(content) = one.get("content").and_then(content) else {
                return Err(bad(format!("messages[{index}].content must be a string or an array of text parts")));
            };
            // OpenAI's newer name of the same thing.
            let role = if role == "developer" { "system" } else { role };
            Ok(Message::new(role, content))
        })
        .collect()
}

/// A text, or the joined texts of `[{"type": "text", "text": ..}]`.
fn content(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts.iter().map(|part| part.get("text")?.as_str()).collect(),
        _ => None,
    }
}

/// What all bodies of one response share.
struct Head {
    id: String,
    state: AppState,
    with_logprobs: bool,
}

impl Head {
    fn body(&self, object: &str, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.state.created_unix_secs,
            "model": self.state.served.model_id,
            "choices": choices,
            "usage": usage.map(Usage::json),
        })
    }

    fn chunk(&self, index: usize, mut delta: Value, piece: Option<&Piece>, reason: Option<&str>) -> Value {
        if piece.is_some() {
            delta["role"] = json!("assistant");
        }
        let logprobs = piece.and_then(|piece| self.logprobs(piece));
        let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason});
        self.body("chat.completion.chunk", vec![choice], None)
    }

    fn logprobs(&self, piece: &Piece) -> Option<Value> {
        self.with_logprobs.then(|| json!({"content": piece.tokens.iter().map(token).collect::<Vec<_>>()}))
    }
}

fn token(token: &Shown) -> Value {
    let one = |text: &str, bytes: &[u8], logprob| json!({"token": text, "logprob": number(logprob), "bytes": bytes});
    let mut value = one(&token.text, &token.bytes, token.logprob.unwrap_or(f32::NEG_INFINITY));
    let top: Vec<Value> = token.top.iter().map(|(text, bytes, logprob)| one(text, bytes, *logprob)).collect();
    value["top_logprobs"] = json!(top);
    value
}
