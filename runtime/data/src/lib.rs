//! Data between the files of a user and the steps of a trainer: tokenizers, chat templates, token shards, the
//! deterministic loader, records of chats, prompts and benchmarks.
//!
//! Invariant: what is read depends on files and arguments only; every error of a record names file, row and column.

mod chat;
mod error;
mod head;
mod loader;
mod needle;
mod probe;
mod records;
mod rows;
mod specials;
mod tokenizer;
mod tokens;

pub use chat::{ChatExample, ChatTemplate, DEFAULT_TEMPLATE, Message};
pub use error::{DataError, Location, Place, Result};
pub use head::head;
pub use loader::Loader;
pub use needle::{NeedleIds, NeedleRecord, read_needles};
pub use probe::{RecordKind, check_columns};
pub use records::{
    BenchmarkRecord, ChatRecord, Document, DocumentColumns, PromptRecord, TraceRecord, read_benchmark, read_chat,
    read_documents, read_prompts, read_traces,
};
pub use rows::{Row, Rows};
pub use specials::{SPECIALS, Specials};
pub use tokenizer::{Incremental, PIECE_BYTES, SPLIT_PATTERN, Tokenizer, TrainOptions, UNCUT_BYTES_MAX};
pub use tokens::{ShardSink, TokenDataset, TokenMeta, TokenWriter};
