//! `GET /metrics`: the engine's counters in Prometheus' text format.

use std::fmt::Write;

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};

use crate::state::AppState;

/// The handler.
pub(crate) async fn show(State(state): State<AppState>) -> Response {
    let counters = state.engine.counters();
    let rows = [
        ("requests_total", "counter", "Completion requests received", state.request_count()),
        ("sequences_finished_total", "counter", "Sequences that ended", counters.finished),
        ("prompt_tokens_total", "counter", "Prompt tokens read by the model", counters.prompt_tokens),
        ("generated_tokens_total", "counter", "Tokens generated", counters.generated_tokens),
        ("steps_total", "counter", "Steps of the scheduler", counters.steps),
        ("drafts_total", "counter", "Drafted tokens checked by the model", counters.drafts_tried),
        ("drafts_accepted_total", "counter", "Drafted tokens the model agreed with", counters.drafts_accepted),
        ("sequences_running", "gauge", "Sequences running now", counters.running),
        ("sequences_waiting", "gauge", "Sequences waiting now", counters.waiting),
        ("cache_tokens", "gauge", "Tokens the latent cache holds", state.engine.cache_tokens() as u64),
        ("cache_bytes", "gauge", "Bytes of the latent cache", state.engine.cache_bytes() as u64),
    ];
    let mut text = String::new();
    for (name, kind, help, value) in rows {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP dsv3_{name} {help}\n# TYPE dsv3_{name} {kind}\ndsv3_{name} {value}");
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
