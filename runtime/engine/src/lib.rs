//! engine
mod diagnostics;
mod yaml;
pub use diagnostics::*;
