//! The token artifact: one flat stream of packed documents in Parquet shards.
//!
//! Layout of a shard: column `tokens`, a list of `row_tokens` u32 per row (the last row of the last shard may be shorter);
//! column `document_starts`, a list of the offsets within the row at which a document begins. A row group holds about
//! 65,536 tokens. The artifact's manifest carries [`TokenMeta`].
//!
//! Invariant: token i of the stream lies in row i / row_tokens; every shard but the last holds whole rows. Bytes written
//! depend on the tokens and the options alone.

mod dataset;
mod writer;

use std::{collections::BTreeMap, sync::Arc};

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use serde::{Deserialize, Serialize};

pub use dataset::TokenDataset;
pub use writer::{ShardSink, TokenWriter};

/// Facts of a token artifact, kept in its manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenMeta {
    /// Version of the layout: 1.
    pub format: u32,
    /// Tokens of the stream.
    pub total_tokens: u64,
    /// Tokens of a row.
    pub row_tokens: u64,
    /// Documents of the stream.
    pub documents: u64,
    /// Size of the vocabulary the ids come from.
    pub vocab_size: u64,
    /// Id that fills the space after aligned documents; targets equal to it carry no loss. `None`: nothing was filled.
    pub pad_token_id: Option<u32>,
    /// Tokens of each shard, in order.
    pub shard_tokens: Vec<u64>,
    /// Tokens by source of document.
    pub source_tokens: BTreeMap<String, u64>,
}

/// Tokens of a row group.
pub(crate) const GROUP_TOKENS: u64 = 1 << 16;

pub(crate) fn schema() -> SchemaRef {
    let list = || DataType::List(Arc::new(Field::new("item", DataType::UInt32, false)));
    Arc::new(Schema::new(vec![Field::new("tokens", list(), false), Field::new("document_starts", list(), false)]))
}

#[cfg(test)]
mod tests;
