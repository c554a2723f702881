//! engine
mod diagnostics;
mod schema;
mod spec;
mod yaml;
pub use diagnostics::*;
