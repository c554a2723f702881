//! Reads ranges of a token stream, one row group at a time, with a bounded cache of decoded groups.

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use arrow::{array::AsArray, datatypes::UInt32Type};
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder},
};

use super::{TokenMeta, schema};
use crate::{
    error::{DataError, Result},
    rows::{damaged, guarded},
};

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

/// When a group was last used, and its tokens.
type Timed = (u64, Arc<Vec<u32>>);

/// Decoded row groups, the least recently used dropped first.
#[derive(Default)]
struct Cache {
    /// By shard and row group; with the time of last use.
    groups: BTreeMap<(usize, usize), Timed>,
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

    /// Parquet rows that reads have touched so far, whether decoded for them or before; shows that a resumed run does not
    /// read everything again.
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
        let rows = range.end.div_ceil(self.row_tokens) - range.start / self.row_tokens;
        self.lock().rows_read += rows;
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

    #[cfg(test)]
    pub(super) fn limit_cache(&self, tokens: u64) {
        self.lock().tokens_max = tokens;
    }

    #[cfg(test)]
    pub(super) fn cached_tokens(&self) -> u64 {
        self.lock().tokens
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
            let mask = ProjectionMask::columns(builder.parquet_schema(), ["tokens"]);
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
