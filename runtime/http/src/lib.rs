//! The OpenAI-compatible HTTP server, and the only crate that knows axum.
//!
//! `/health`, `/metrics`, `/v1/models`, `/v1/completions`, `/v1/chat/completions`. Invariant: no body makes a handler
//! panic; what is refused is refused with OpenAI's error shape before anything reaches the engine.

mod chat;
mod choices;
mod client;
mod completions;
mod error;
mod fields;
mod metrics;
mod server;
mod smoke;
mod sse;
mod state;
#[cfg(test)]
mod tests;
mod text;

pub use client::{Reply, request};
pub use error::Error;
pub use server::{router, serve};
pub use smoke::{SmokeOptions, SmokeReport, smoke};
pub use state::{AppState, ModelText, Served};
