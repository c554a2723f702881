//! The routes, and a server that ends when it is told to.

use std::{future::Future, time::Duration};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Path, Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::{
    chat, completions,
    error::{ApiError, Error},
    metrics,
    state::AppState,
};

/// Largest request body in bytes.
const BODY_BYTES_MAX: usize = 4 << 20;

/// How long running requests may go on after the server was told to end; then they are cut.
const DRAIN: Duration = Duration::from_secs(2);

/// How long cut requests get to send their last bytes.
const CUT: Duration = Duration::from_millis(800);

/// All routes.
pub fn router(state: AppState) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics::show))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn(shape_errors))
        .with_state(state)
}

/// Serves until `shutdown` resolves: then no new connection is taken, running requests get [`DRAIN`] to finish, and what
/// is left is cut. Returns within three seconds of the shutdown; the engine has been told to stop then.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let (told, tell) = (tokio_util::sync::CancellationToken::new(), tokio_util::sync::CancellationToken::new());
    let (graceful, asked) = (tell.clone(), told.clone());
    tokio::spawn(async move {
        shutdown.await;
        asked.cancel();
        graceful.cancel();
    });
    let server = axum::serve(listener, router(state.clone())).with_graceful_shutdown(tell.cancelled_owned());
    let server = std::future::IntoFuture::into_future(server);
    tokio::pin!(server);
    let deadline = async {
        told.cancelled().await;
        tokio::time::sleep(DRAIN).await;
        let stopping = state.clone();
        tokio::task::spawn_blocking(move || stopping.engine().stop(Duration::ZERO));
        tokio::time::sleep(CUT).await;
    };
    let result = tokio::select! {
        result = &mut server => result.map_err(Error::Serve),
        () = deadline => Ok(()),
    };
    state.engine().stop(Duration::ZERO);
    result
}

async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

fn card(state: &AppState) -> Value {
    json!({
        "id": state.served.model_id,
        "object": "model",
        "created": state.created_unix_secs,
        "owned_by": "dsv3-pipeline",
        "max_model_len": state.served.context_tokens,
    })
}

async fn models(State(state): State<AppState>) -> Json<Value> {
    Json(json!({"object": "list", "data": [card(&state)]}))
}

async fn model(State(state): State<AppState>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    if id == state.served.model_id {
        return Ok(Json(card(&state)));
    }
    Err(ApiError::new(StatusCode::NOT_FOUND, "model_not_found", format!("the model {id:?} does not exist")))
}

async fn unknown(request: Request) -> ApiError {
    let message = format!("there is nothing at {} {}", request.method(), request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

/// Gives the framework's own refusals (a body too large) the API's shape.
async fn shape_errors(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status();
    let kind = response.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if !status.is_client_error() && !status.is_server_error() || kind.is_some_and(|kind| kind.contains("json")) {
        return response;
    }
    let message = match status {
        StatusCode::PAYLOAD_TOO_LARGE => format!("the body is larger than {BODY_BYTES_MAX} bytes"),
        _ => status.canonical_reason().unwrap_or("the request was refused").to_owned(),
    };
    ApiError::new(status, "invalid_request", message).into_response()
}
