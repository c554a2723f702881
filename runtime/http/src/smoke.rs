//! Starts the server on a free port, asks it something over HTTP, measures, and stops it (or lets it stay).

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use dsv3_core::Cancel;
use serde_json::{Value, json};

use crate::{AppState, Error, client, serve};

/// What to ask.
#[derive(Clone, Debug)]
pub struct SmokeOptions {
    /// Address to listen on; port 0 takes a free one.
    pub address: SocketAddr,
    /// User messages (raw prompts when the model has no chat template).
    pub prompts: Vec<String>,
    /// New tokens at most per prompt.
    pub max_tokens: usize,
    /// Longest wait for one answer.
    pub timeout: Duration,
    /// Goes on serving until cancelled.
    pub stay: bool,
}

/// What came back.
#[derive(Clone, Debug, PartialEq)]
pub struct SmokeReport {
    /// Where the server listened.
    pub address: SocketAddr,
    /// One answer per prompt.
    pub answers: Vec<String>,
    /// New tokens over all prompts.
    pub completion_tokens: u64,
    /// New tokens per second, HTTP and prompt reading included. A measurement: never part of a result's identity.
    pub tokens_per_second: f64,
    /// Share of drafted tokens the model agreed with; `None` when nothing was drafted.
    pub draft_acceptance: Option<f64>,
}

/// Runs the server on a thread of its own and asks it every prompt, greedily. `ready` hears the address before the first
/// request. Blocks; must not be called from an async task.
///
/// # Errors
/// When the address is taken, or an answer is missing or refused.
pub fn smoke(
    state: &AppState,
    options: &SmokeOptions,
    cancel: &Cancel,
    ready: impl FnOnce(SocketAddr),
) -> Result<SmokeReport, Error> {
    let listen = |source| Error::Listen { address: options.address.to_string(), source };
    let listener = std::net::TcpListener::bind(options.address).map_err(listen)?;
    listener.set_nonblocking(true).map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(Error::Serve)?;
    let stop = tokio_util::sync::CancellationToken::new();
    let (served, stopped) = (state.clone(), stop.clone());
    let server = runtime.spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).map_err(Error::Serve)?;
        serve(listener, served, stopped.cancelled_owned()).await
    });
    ready(address);
    let report = ask(state, options, address);
    while report.is_ok() && options.stay && !cancel.is_cancelled() && !server.is_finished() {
        std::thread::sleep(Duration::from_millis(50));
    }
    stop.cancel();
    let ended = runtime.block_on(server);
    runtime.shutdown_timeout(Duration::from_secs(1));
    let report = report?;
    match ended {
        Ok(result) => result.map(|()| report),
        Err(_) => Err(Error::Smoke { message: "the server panicked".to_owned() }),
    }
}

fn ask(state: &AppState, options: &SmokeOptions, address: SocketAddr) -> Result<SmokeReport, Error> {
    let failed = |message: String| Error::Smoke { message };
    let health = client::request(address, "GET", "/health", b"", options.timeout);
    health
        .map_err(|error| failed(error.to_string()))
        .and_then(|reply| if reply.status == 200 { Ok(()) } else { Err(failed(reply.text())) })?;
    let before = state.engine().counters();
    let started = Instant::now();
    let (mut answers, mut completion_tokens) = (Vec::new(), 0);
    for prompt in &options.prompts {
        let (text, tokens) = answer(state, options, address, prompt).map_err(failed)?;
        answers.push(text);
        completion_tokens += tokens;
    }
    let seconds = started.elapsed().as_secs_f64().max(1e-9);
    let after = state.engine().counters();
    let tried = after.drafts_tried - before.drafts_tried;
    let accepted = after.drafts_accepted - before.drafts_accepted;
    Ok(SmokeReport {
        address,
        answers,
        completion_tokens,
        tokens_per_second: completion_tokens as f64 / seconds,
        draft_acceptance: (tried > 0).then(|| accepted as f64 / tried as f64),
    })
}

fn answer(
    state: &AppState,
    options: &SmokeOptions,
    address: SocketAddr,
    prompt: &str,
) -> Result<(String, u64), String> {
    let is_chat = state.served.text.template.is_some();
    let (path, body) = match is_chat {
        true => {
            let messages = json!([{"role": "user", "content": prompt}]);
            ("/v1/chat/completions", json!({"messages": messages, "max_tokens": options.max_tokens, "temperature": 0}))
        }
        false => ("/v1/completions", json!({"prompt": prompt, "max_tokens": options.max_tokens, "temperature": 0})),
    };
    let reply = client::request(address, "POST", path, body.to_string().as_bytes(), options.timeout)
        .map_err(|error| error.to_string())?;
    let value = reply.json().ok().filter(|_| reply.status == 200).ok_or_else(|| reply.text())?;
    let choice = &value["choices"][0];
    let text = if is_chat { &choice["message"]["content"] } else { &choice["text"] };
    let tokens = value["usage"]["completion_tokens"].as_u64();
    match (text, tokens) {
        (Value::String(text), Some(tokens)) if choice["finish_reason"].is_string() => Ok((text.clone(), tokens)),
        _ => Err(reply.text()),
    }
}
