//! The stream keeps its documents across rows and shards; a cut shard is one clear error.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use dsv3_core::Error;

use super::*;

fn write(folder: &Path, documents: &[Vec<u32>], shard_tokens: u64) -> (Vec<PathBuf>, TokenMeta) {
    let mut paths = Vec::new();
    let mut sink = |name: &str, bytes: Vec<u8>| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).map_err(|e| Error::unavailable("disk").source(e))?;
        paths.push(path);
        Ok(())
    };
    let mut writer = TokenWriter::new(8, shard_tokens, 100, &mut sink).unwrap();
    documents.iter().for_each(|ids| writer.push_document(ids, "test").unwrap());
    let meta = writer.finish().unwrap();
    (paths, meta)
}

fn documents() -> Vec<Vec<u32>> {
    (0..40).map(|d| (0..=d % 13).map(|i| (d * 7 + i) % 100).collect()).collect()
}

#[test]
fn the_stream_is_the_documents_in_order_across_rows_and_shards() {
    let folder = tempfile::tempdir().unwrap();
    let flat: Vec<u32> = documents().concat();
    for shard_tokens in [8, 64, 10_000] {
        let (paths, meta) = write(folder.path(), &documents(), shard_tokens);
        assert_eq!((meta.total_tokens, meta.documents), (flat.len() as u64, 40));
        let dataset = TokenDataset::open(&paths, &meta).unwrap();
        for range in [0..flat.len(), 3..4, 7..9, 60..130, flat.len() - 1..flat.len(), 5..5] {
            assert_eq!(dataset.read(range.start as u64..range.end as u64).unwrap(), flat[range.clone()], "{range:?}");
        }
        assert!(dataset.read(0..flat.len() as u64 + 1).is_err());
    }
    assert_eq!(TokenDataset::from_tokens(flat.clone()).read(3..9).unwrap(), flat[3..9]);
}

#[test]
fn padding_aligns_and_is_recorded() {
    let mut shards = Vec::new();
    let mut sink = |_: &str, bytes: Vec<u8>| {
        shards.push(bytes);
        Ok(())
    };
    let mut writer = TokenWriter::new(4, 1000, 10, &mut sink).unwrap();
    writer.push_document(&[5, 6, 7], "a").unwrap();
    writer.pad_to_multiple(8, 2).unwrap();
    writer.push_document(&[1], "b").unwrap();
    assert!(writer.push_document(&[10], "b").is_err());
    let meta = writer.finish().unwrap();
    assert_eq!((meta.total_tokens, meta.pad_token_id), (9, Some(2)));
    assert_eq!(meta.source_tokens, BTreeMap::from([("a".to_owned(), 3), ("b".to_owned(), 1)]));
}

#[test]
fn a_cut_shard_is_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, meta) = write(folder.path(), &documents(), 10_000);
    let bytes = std::fs::read(&paths[0]).unwrap();
    std::fs::write(&paths[0], &bytes[..bytes.len() / 2]).unwrap();
    let error = TokenDataset::open(&paths, &meta).unwrap_err();
    assert!(error.to_string().contains("tokens-00000.parquet: not a readable Parquet file"), "{error}");
}

#[test]
fn a_small_cache_gives_the_same_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let many: Vec<Vec<u32>> = (0..30).map(|d| vec![d; 9000]).collect();
    let (paths, meta) = write(folder.path(), &many, 100_000);
    let dataset = TokenDataset::open(&paths, &meta).unwrap();
    dataset.limit_cache(70_000);
    for start in [0u64, 200_000, 65_530, 131_000, 10] {
        let expected: Vec<u32> = (start..start + 20).map(|i| (i / 9000) as u32).collect();
        assert_eq!(dataset.read(start..start + 20).unwrap(), expected);
    }
    assert!(dataset.cached_tokens() <= 70_000);
}
