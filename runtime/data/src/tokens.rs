//! The token artifact: one flat stream of packed documents in Parquet shards.
//!
//! Layout of a shard: column `tokens`, a list of `row_tokens` u32 per row (the last row of the last shard may be shorter);
//! column `document_starts`, a list of the offsets within the row at which a document begins. A row group holds about
//! 65,536 tokens. The artifact's manifest carries [`TokenMeta`].
//!
//! Invariant: token i of the stream lies in row i / row_tokens; every shard but the last holds whole rows. Bytes written
//! depend on the tokens and the options alone.

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use arrow::{
    array::{AsArray, ListBuilder, RecordBatch, UInt32Builder},
    datatypes::{DataType, Field, Schema, SchemaRef, UInt32Type},
};
use dsv3_core::Error;
use parquet::{
    arrow::{
        ArrowWriter,
        arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder},
    },
    basic::{Compression, ZstdLevel},
    file::properties::WriterProperties,
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{DataError, Result},
    rows::{damaged, guarded},
};

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
const GROUP_TOKENS: u64 = 1 << 16;

fn schema() -> SchemaRef {
    let list = || DataType::List(Arc::new(Field::new("item", DataType::UInt32, false)));
    Arc::new(Schema::new(vec![Field::new("tokens", list(), false), Field::new("document_starts", list(), false)]))
}

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
        if let Some(id) = ids.iter().find(|id| u64::from(**id) >= self.vocab_size) {
            return Err(DataError::tokenizer(format!("id {id} is outside the vocabulary of {}", self.vocab_size)));
        }
        self.documents += 1;
        *self.source_tokens.entry(source.to_owned()).or_default() += ids.len() as u64;
        self.starts.push(self.tokens.len() as u32);
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

/// Random access to a token stream.
pub struct TokenDataset {
    shards: Vec<ShardFile>,
    row_tokens: u64,
    total: u64,
    cache: Mutex<Cache>,
}

struct ShardFile {
    path: PathBuf,
    metadata: Option<ArrowReaderMetadata>,
    start: u64,
    /// First row of each row group and the number of rows at the end.
    group_rows: Vec<u64>,
}

/// Decoded row groups, the least recently used dropped first.
#[derive(Default)]
struct Cache {
    groups: BTreeMap<(usize, usize), (u64, Arc<Vec<u32>>)>,
    tokens: u64,
    tokens_max: u64,
    clock: u64,
    rows_read: u64,
}

/// Tokens kept decoded (256 MiB).
const CACHE_TOKENS: u64 = 1 << 26;

impl std::fmt::Debug for TokenDataset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenDataset({} tokens in {} shards)", self.total, self.shards.len())
    }
}

impl TokenDataset {
    /// Opens the shards, in the order of `paths`, of an artifact described by `meta`.
    ///
    /// # Errors
    /// When a shard is damaged, or does not hold what `meta` says.
    pub fn open(paths: &[PathBuf], meta: &TokenMeta) -> Result<Self> {
        if paths.len() != meta.shard_tokens.len() || meta.row_tokens == 0 {
            let message = format!("{} shards are described, {} are there", meta.shard_tokens.len(), paths.len());
            return Err(DataError::File { path: paths.first().cloned().unwrap_or_default(), message });
        }
        let mut shards = Vec::with_capacity(paths.len());
        let mut start = 0;
        for (path, tokens) in paths.iter().zip(&meta.shard_tokens) {
            shards.push(ShardFile::open(path, start, *tokens, meta.row_tokens)?);
            start += tokens;
        }
        if start != meta.total_tokens {
            let message = format!("shards of {start} tokens in all, {} are described", meta.total_tokens);
            return Err(DataError::File { path: paths.first().cloned().unwrap_or_default(), message });
        }
        Ok(Self::with_shards(shards, meta.row_tokens, start))
    }

    /// A stream held in memory.
    pub fn from_tokens(tokens: Vec<u32>) -> Self {
        let total = tokens.len() as u64;
        let row_tokens = total.max(1);
        let shard = ShardFile { path: PathBuf::new(), metadata: None, start: 0, group_rows: vec![0, 1] };
        let dataset = Self::with_shards(vec![shard], row_tokens, total);
        dataset.lock().groups.insert((0, 0), (u64::MAX, Arc::new(tokens)));
        dataset
    }

    fn with_shards(shards: Vec<ShardFile>, row_tokens: u64, total: u64) -> Self {
        let cache = Cache { tokens_max: CACHE_TOKENS, ..Cache::default() };
        Self { shards, row_tokens, total, cache: Mutex::new(cache) }
    }

    /// Tokens of the stream.
    pub fn total_tokens(&self) -> u64 {
        self.total
    }

    /// Parquet rows decoded so far; shows that a resumed run does not read everything again.
    pub fn rows_read(&self) -> u64 {
        self.lock().rows_read
    }

    /// Tokens of `range`.
    ///
    /// # Errors
    /// When the range goes past the end or a shard is damaged.
    pub fn read(&self, range: Range<u64>) -> Result<Vec<u32>> {
        if range.end > self.total || range.start > range.end {
            return Err(DataError::options(format!(
                "tokens {}..{} of a stream of {}",
                range.start, range.end, self.total
            )));
        }
        let mut out = Vec::with_capacity((range.end - range.start) as usize);
        let mut at = range.start;
        while at < range.end {
            let shard_index = self.shards.partition_point(|shard| shard.start <= at) - 1;
            let shard = &self.shards[shard_index];
            let row = (at - shard.start) / self.row_tokens;
            let group = shard.group_rows.partition_point(|first| *first <= row) - 1;
            let tokens = self.group(shard_index, group)?;
            let offset = (at - shard.start - shard.group_rows[group] * self.row_tokens) as usize;
            let take = (tokens.len().saturating_sub(offset)).min((range.end - at) as usize);
            if take == 0 {
                let message = format!("row group {group} is shorter than its footer says");
                return Err(DataError::File { path: shard.path.clone(), message });
            }
            out.extend_from_slice(&tokens[offset..offset + take]);
            at += take as u64;
        }
        Ok(out)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn group(&self, shard: usize, group: usize) -> Result<Arc<Vec<u32>>> {
        {
            let mut cache = self.lock();
            cache.clock += 1;
            let clock = cache.clock;
            if let Some((used, tokens)) = cache.groups.get_mut(&(shard, group)) {
                *used = clock.max(*used);
                return Ok(tokens.clone());
            }
        }
        let tokens = Arc::new(self.shards[shard].decode(group)?);
        let mut cache = self.lock();
        cache.rows_read += (tokens.len() as u64).div_ceil(self.row_tokens);
        cache.insert((shard, group), tokens.clone());
        Ok(tokens)
    }
}

impl Cache {
    fn insert(&mut self, key: (usize, usize), tokens: Arc<Vec<u32>>) {
        self.tokens += tokens.len() as u64;
        let replaced = self.groups.insert(key, (self.clock, tokens));
        self.tokens -= replaced.map_or(0, |(_, old)| old.len() as u64);
        while self.tokens > self.tokens_max && self.groups.len() > 1 {
            let Some(oldest) = self.groups.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| *key) else {
                return;
            };
            self.tokens -= self.groups.remove(&oldest).map_or(0, |(_, old)| old.len() as u64);
        }
    }
}

impl ShardFile {
    fn open(path: &Path, start: u64, tokens: u64, row_tokens: u64) -> Result<Self> {
        let file = File::open(path).map_err(|source| DataError::io(path, source))?;
        let metadata = guarded(path, None, || {
            ArrowReaderMetadata::load(&file, Default::default()).map_err(|e| damaged(path, None, e))
        })?;
        if metadata.schema().fields() != schema().fields() {
            let message = "its columns are not those of a token shard".to_owned();
            return Err(DataError::File { path: path.to_owned(), message });
        }
        let mut group_rows = vec![0];
        for group in metadata.metadata().row_groups() {
            group_rows.push(group_rows.last().copied().unwrap_or(0) + group.num_rows().max(0) as u64);
        }
        let rows = group_rows.last().copied().unwrap_or(0);
        if rows != tokens.div_ceil(row_tokens) {
            let message = format!("{rows} rows, but {tokens} tokens in rows of {row_tokens} are described");
            return Err(DataError::File { path: path.to_owned(), message });
        }
        Ok(Self { path: path.to_owned(), metadata: Some(metadata), start, group_rows })
    }

    fn decode(&self, group: usize) -> Result<Vec<u32>> {
        let path = &self.path;
        let Some(metadata) = self.metadata.clone() else { return Ok(Vec::new()) };
        let file = File::open(path).map_err(|source| DataError::io(path, source))?;
        let first = self.group_rows[group];
        guarded(path, Some(first), || {
            let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata);
            let mask = parquet::arrow::ProjectionMask::columns(builder.parquet_schema(), ["tokens"]);
            let reader = builder.with_row_groups(vec![group]).with_projection(mask).with_batch_size(4096).build();
            let mut out = Vec::new();
            for batch in reader.map_err(|e| damaged(path, Some(first), e))? {
                let batch = batch.map_err(|e| damaged(path, Some(first), e))?;
                let list = batch.column(0).as_list::<i32>();
                for row in list.iter().flatten() {
                    out.extend_from_slice(row.as_primitive::<UInt32Type>().values());
                }
            }
            Ok(out)
        })
    }
}

#[cfg(test)]
mod tests;
