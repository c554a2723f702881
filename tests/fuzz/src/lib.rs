//! What the fuzz targets do with their bytes: hand them to the entry points that a user's files and requests reach. Each
//! body returns whatever the bytes are; a panic, an abort or a hang is a finding.
//!
//! Two things include this: the targets of cargo-fuzz (this folder, a workspace of its own) and the test `tests/fuzz.rs`,
//! which runs the corpus and seeded changes of it.

// Public for the targets; the test has it as a private module.
#![allow(unreachable_pub)]

mod http;
mod manifest;
mod safetensors;
mod tokenizer;
mod yaml;

pub use http::http;
pub use manifest::manifest;
pub use safetensors::{CONFIG, safetensors};
pub use tokenizer::tokenizer;
pub use yaml::{DOCUMENTS, yaml};

/// What a target does with its bytes.
pub type Body = fn(&[u8]);

/// The targets by name.
pub const TARGETS: [(&str, Body); 5] =
    [("http", http), ("manifest", manifest), ("safetensors", safetensors), ("tokenizer", tokenizer), ("yaml", yaml)];

/// Runs store calls and requests to their end, on a runtime of this thread.
fn block_on<T>(work: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    }
    RUNTIME.with(|runtime| runtime.block_on(work))
}
