//! JSON Schemas: checking values against them, and the schema of a whole pipeline file.

mod check;
mod pipeline;

pub(crate) use check::check;
pub(crate) use pipeline::pipeline;
