//! Errors on the wire, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use axum::{
    Json,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

/// What can go wrong while serving, outside of single requests.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be bound.
    #[error("cannot listen on {address}")]
    Listen {
        /// What was asked for.
        address: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The listener failed.
    #[error("the HTTP server failed")]
    Serve(#[source] std::io::Error),
    /// A file of the model's folder cannot be used for serving.
    #[error("{file} of the model's folder cannot be used")]
    Folder {
        /// The file's name.
        file: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The smoke request did not get the answer it needs.
    #[error("the smoke request failed: {message}")]
    Smoke {
        /// What came instead.
        message: String,
    },
    /// The inference engine could not start.
    #[error("the inference engine could not start")]
    Engine(#[source] dsv3_infer::Error),
}

impl Error {
    /// What the operator does next.
    pub fn kind(&self) -> dsv3_core::ErrorKind {
        use dsv3_core::ErrorKind;
        match self {
            Self::Listen { .. } | Self::Serve(_) | Self::Engine(_) => ErrorKind::Unavailable,
            Self::Folder { .. } => ErrorKind::Data,
            Self::Smoke { .. } => ErrorKind::Internal,
        }
    }
}

impl From<Error> for dsv3_core::Error {
    fn from(error: Error) -> Self {
        let kind = error.kind();
        let message = error.to_string();
        let out = Self::new(kind, message);
        match std::error::Error::source(&error) {
            Some(source) => out.help(source.to_string()),
            None => out,
        }
    }
}

/// A refused or failed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
    pub(crate) code: Option<&'static str>,
}

impl ApiError {
    /// 400: a field with a bad value.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        let param = Some(param.to_owned()).filter(|param| !param.is_empty());
        Self { status: StatusCode::BAD_REQUEST, message: message.into(), param, code: Some("invalid_value") }
    }

    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: Some(code) }
    }

    /// 500 or 503: not the client's fault.
    pub(crate) fn engine(error: &dsv3_infer::Error) -> Self {
        match error {
            dsv3_infer::Error::Invalid { field, message } => Self::invalid(field, format!("{field}: {message}")),
            dsv3_infer::Error::Busy { .. } => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", error.to_string())
            }
            dsv3_infer::Error::Stopped | dsv3_infer::Error::Cancelled => Self::stopping(),
            _ => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", error.to_string()),
        }
    }

    pub(crate) fn stopping() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "the server is stopping")
    }

    /// The body, also sent as an event of a stream.
    pub(crate) fn body(&self) -> serde_json::Value {
        let kind = if self.status.is_client_error() { "invalid_request_error" } else { "server_error" };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        }
        response
    }
}
