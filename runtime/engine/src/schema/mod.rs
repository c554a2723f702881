//! JSON Schemas: checking values against them, and the schema of a whole pipeline file.

mod check;
pub(crate) use check::check;
