//! engine
mod check;
mod diagnostics;
mod plan;
mod schema;
mod spec;
mod yaml;
pub use diagnostics::*;
