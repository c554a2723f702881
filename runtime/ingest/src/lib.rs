//! From documents to a token stream: read, filter, drop duplicates, train a tokenizer if none is given, tokenise, FIM,
//! shuffle, pack. The stage `ingest` calls [`ingest`]; [`demo`] generates the data that the recipes ship with.
//!
//! Invariant: the stream depends on the inputs, the options, the filter and the seed; never on threads. Between reading and
//! packing the corpus lies in the scratch folder once it has more than 256 MB; memory holds what a batch needs and some
//! 80 bytes a document.

mod corpus;
pub mod demo;
mod error;
mod filter;
mod fim;
mod options;
mod pipeline;
mod report;
mod spool;

pub use dsv3_hooks::{FilterOutcome, Verdict};
pub use error::IngestError;
pub use filter::DocumentFilter;
pub use fim::{FimTokens, fim_psm};
pub use options::{AlignOptions, FimOptions, IngestOptions};
pub use pipeline::{Host, Ingested, ingest, train_tokenizer};
pub use report::IngestReport;
