//! Inference without a network: a scheduler with continuous batching over the latent cache, sampling, drafting with the
//! multi-token prediction head, and two plain functions over it, [`generate`] and [`score`].
//!
//! Invariant: what a sequence says, and the log-probabilities it reports, do not depend on the batch it ran in, on how
//! its prompt was cut into steps, on threads, or on drafting.

mod decoder;
mod engine;
mod error;
mod generate;
mod of_model;
mod request;
pub mod sampling;
mod scheduler;
mod score;
mod sequence;
mod speculate;
#[cfg(test)]
mod tests;

pub use decoder::{Decoder, Step};
/// What a [`Decoder`] hands over.
pub use dsv3_ops::Tensor;
pub use engine::{Engine, Sink};
pub use error::Error;
pub use generate::{GenerateOptions, generate};
pub use of_model::ModelCache;
pub use request::{Completion, Finish, Request, Token, Update};
pub use sampling::Sampling;
pub use scheduler::{Counters, Options, Scheduler};
pub use score::{Continuation, Score, score};
