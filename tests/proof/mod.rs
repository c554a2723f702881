//! What a sceptic asks for, held against the whole project; `tests/README.md` says which test or command shows what.

mod balance;
mod cache_mla;
mod extension;
mod fp8_options;
mod ingest;
mod input;
mod instruction_sets;
mod long_document;
pub(crate) mod models;
mod mtp;
mod numerics;
mod rl;
pub(crate) mod runtime;
