//! Writes documents as rows, row groups and shards of the token artifact.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use arrow::{
    array::{ListBuilder, RecordBatch, UInt32Builder},
    datatypes::{DataType, Field},
};
use dsv3_core::Error;
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, ZstdLevel},
    file::properties::WriterProperties,
};

use super::{GROUP_TOKENS, TokenMeta, schema};
use crate::{
    error::{DataError, Result},
    rows::damaged,
};

/// Receives the shards of a [`TokenWriter`]: file name and bytes.
pub type ShardSink<'a> = dyn FnMut(&str, Vec<u8>) -> Result<(), Error> + 'a;

/// Writes documents as a flat stream.
pub struct TokenWriter<'a> {
    row_tokens: usize,
    shard_rows: u64,
    vocab_size: u64,
    sink: &'a mut ShardSink<'a>,
    tokens: Vec<u32>,
    starts: Vec<u32>,
    shard: Option<Shard>,
    shard_tokens: Vec<u64>,
    source_tokens: BTreeMap<String, u64>,
    documents: u64,
    total: u64,
    pad: Option<u32>,
}

struct Shard {
    writer: ArrowWriter<Vec<u8>>,
    tokens: ListBuilder<UInt32Builder>,
    starts: ListBuilder<UInt32Builder>,
    rows: u64,
    token_count: u64,
}

impl<'a> TokenWriter<'a> {
    /// A writer of rows of `row_tokens`, shards of about `shard_tokens`, of ids below `vocab_size`.
    ///
    /// # Errors
    /// When `row_tokens` is 0.
    pub fn new(row_tokens: usize, shard_tokens: u64, vocab_size: u64, sink: &'a mut ShardSink<'a>) -> Result<Self> {
        if row_tokens == 0 {
            return Err(DataError::options("row_tokens is 0; a row holds at least one token"));
        }
        Ok(Self {
            row_tokens,
            shard_rows: (shard_tokens / row_tokens as u64).max(1),
            vocab_size,
            sink,
            tokens: Vec::new(),
            starts: Vec::new(),
            shard: None,
            shard_tokens: Vec::new(),
            source_tokens: BTreeMap::new(),
            documents: 0,
            total: 0,
            pad: None,
        })
    }

    /// Tokens written so far.
    pub fn total_tokens(&self) -> u64 {
        self.total
    }

    /// Appends one document (its eos included) of `source`.
    ///
    /// # Errors
    /// When an id lies outside the vocabulary, or a finished shard cannot be stored.
    pub fn push_document(&mut self, ids: &[u32], source: &str) -> Result<()> {
        self.documents += 1;
        self.starts.push(self.tokens.len() as u32);
        self.extend_document(ids, source)
    }

    /// Appends more tokens to the document that [`Self::push_document`] began.
    ///
    /// # Errors
    /// As [`Self::push_document`].
    pub fn extend_document(&mut self, ids: &[u32], source: &str) -> Result<()> {
        if let Some(id) = ids.iter().find(|id| u64::from(**id) >= self.vocab_size) {
            return Err(DataError::tokenizer(format!("id {id} is outside the vocabulary of {}", self.vocab_size)));
        }
        *self.source_tokens.entry(source.to_owned()).or_default() += ids.len() as u64;
        self.append(ids)
    }

    /// Fills the stream with `pad` up to the next multiple of `tokens`.
    ///
    /// # Errors
    /// When a finished shard cannot be stored.
    pub fn pad_to_multiple(&mut self, tokens: u64, pad: u32) -> Result<()> {
        let fill = self.total.next_multiple_of(tokens.max(1)) - self.total;
        if fill > 0 {
            self.pad = Some(pad);
            self.append(&vec![pad; fill as usize])?;
        }
        Ok(())
    }

    fn append(&mut self, mut ids: &[u32]) -> Result<()> {
        self.total += ids.len() as u64;
        while !ids.is_empty() {
            let take = ids.len().min(self.row_tokens - self.tokens.len());
            self.tokens.extend_from_slice(&ids[..take]);
            ids = &ids[take..];
            if self.tokens.len() == self.row_tokens {
                self.end_row()?;
            }
        }
        Ok(())
    }

    fn end_row(&mut self) -> Result<()> {
        let name = self.shard_name();
        let shard = match &mut self.shard {
            Some(shard) => shard,
            none => none.insert(Shard::new(self.row_tokens).map_err(|e| damaged(Path::new(&name), None, e))?),
        };
        shard.tokens.append_value(self.tokens.iter().map(|id| Some(*id)));
        // A start at the very end of the row belongs to the next one.
        let here = self.starts.iter().filter(|start| (**start as usize) < self.tokens.len());
        shard.starts.append_value(here.map(|start| Some(*start)));
        self.starts.retain(|start| *start as usize >= self.tokens.len());
        self.starts.iter_mut().for_each(|start| *start -= self.tokens.len() as u32);
        shard.rows += 1;
        shard.token_count += self.tokens.len() as u64;
        self.tokens.clear();
        if shard.rows % (GROUP_TOKENS / self.row_tokens as u64).max(1) == 0 {
            shard.flush().map_err(|e| damaged(Path::new(&name), None, e))?;
        }
        if shard.rows == self.shard_rows {
            self.end_shard()?;
        }
        Ok(())
    }

    fn shard_name(&self) -> String {
        format!("tokens-{:05}.parquet", self.shard_tokens.len())
    }

    fn end_shard(&mut self) -> Result<()> {
        let name = self.shard_name();
        if let Some(shard) = self.shard.take() {
            let count = shard.token_count;
            let bytes = shard.finish().map_err(|e| damaged(Path::new(&name), None, e))?;
            (self.sink)(&name, bytes).map_err(|source| DataError::Sink { name, source })?;
            self.shard_tokens.push(count);
        }
        Ok(())
    }

    /// Writes what is left and returns the facts of the stream.
    ///
    /// # Errors
    /// When a shard cannot be stored.
    pub fn finish(mut self) -> Result<TokenMeta> {
        if !self.tokens.is_empty() {
            self.end_row()?;
        }
        self.end_shard()?;
        Ok(TokenMeta {
            format: 1,
            total_tokens: self.total,
            row_tokens: self.row_tokens as u64,
            documents: self.documents,
            vocab_size: self.vocab_size,
            pad_token_id: self.pad,
            shard_tokens: self.shard_tokens,
            source_tokens: self.source_tokens,
        })
    }
}

type ParquetResult<T> = std::result::Result<T, parquet::errors::ParquetError>;

impl Shard {
    fn new(row_tokens: usize) -> ParquetResult<Self> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
            .set_created_by("dsv3-pipeline".to_owned())
            .build();
        let field = || Arc::new(Field::new("item", DataType::UInt32, false));
        Ok(Self {
            writer: ArrowWriter::try_new(Vec::new(), schema(), Some(properties))?,
            tokens: ListBuilder::new(UInt32Builder::with_capacity(row_tokens)).with_field(field()),
            starts: ListBuilder::new(UInt32Builder::new()).with_field(field()),
            rows: 0,
            token_count: 0,
        })
    }

    fn flush(&mut self) -> ParquetResult<()> {
        let batch =
            RecordBatch::try_new(schema(), vec![Arc::new(self.tokens.finish()), Arc::new(self.starts.finish())])?;
        if batch.num_rows() > 0 {
            self.writer.write(&batch)?;
            self.writer.flush()?;
        }
        Ok(())
    }

    fn finish(mut self) -> ParquetResult<Vec<u8>> {
        self.flush()?;
        self.writer.into_inner()
    }
}
