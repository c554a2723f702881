//! Token shards read with no reader of ours: they are the documents, each once, in order, with nothing between; what was
//! rearranged for filling in the middle is the document again; planted duplicates are found where they were planted.
//!
//! `tests/clients/read_tokens.py` does the first in Python.

use std::{fs::File, path::PathBuf};

use arrow::{array::AsArray, datatypes::UInt32Type};
use dsv3_core::{Cancel, Error};
use dsv3_ingest::{FimOptions, Host, IngestOptions, Ingested, ingest};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

const EOS: u32 = 1;

struct Made {
    _folder: tempfile::TempDir,
    shards: Vec<PathBuf>,
    made: Ingested,
}

fn make(texts: &[String], options: &IngestOptions) -> Made {
    let folder = tempfile::tempdir().expect("a folder");
    let input = folder.path().join("documents.jsonl");
    let lines: String = texts.iter().map(|text| format!("{}\n", serde_json::json!({ "text": text }))).collect();
    std::fs::write(&input, lines).expect("written");
    let host = Host { progress: &|_, _, _| (), cancel: &Cancel::new(), scratch: None };
    let mut shards = Vec::new();
    let mut sink = |name: &str, bytes: Vec<u8>| -> Result<(), Error> {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).map_err(|error| Error::unavailable("the shard").source(error))?;
        shards.push(path);
        Ok(())
    };
    let made = ingest(options, &[input], None, None, 5, &host, &mut sink).expect("an ingest");
    Made { _folder: folder, shards, made }
}

/// Both columns of a shard, row by row: tokens and the offsets at which documents begin.
fn rows(path: &PathBuf) -> Vec<(Vec<u32>, Vec<u32>)> {
    let file = File::open(path).expect("a shard");
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).expect("Parquet").build().expect("a reader");
    let mut rows = Vec::new();
    for batch in reader {
        let batch = batch.expect("a batch");
        let lists = |name: &str| -> Vec<Vec<u32>> {
            let column = batch.column_by_name(name).expect("a column").as_list::<i32>();
            column.iter().map(|row| row.expect("a row").as_primitive::<UInt32Type>().values().to_vec()).collect()
        };
        rows.extend(lists("tokens").into_iter().zip(lists("document_starts")));
    }
    rows
}

fn options() -> IngestOptions {
    IngestOptions { row_tokens: 32, shard_tokens: 1024, vocab_size: 320, shuffle: false, ..IngestOptions::default() }
}

fn texts(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("document {i}: {}{}", "words and more ".repeat(i % 9), i * 7919)).collect()
}

#[test]
fn shards_put_together_are_the_documents_and_nothing_else() {
    let texts = texts(300);
    let Made { shards, made, _folder } = make(&texts, &options());
    assert!(shards.len() > 4, "several shards: {}", shards.len());
    let (mut expected, mut expected_starts) = (Vec::new(), Vec::new());
    for text in &texts {
        expected_starts.push(expected.len());
        expected.extend(made.tokenizer.encode(text).expect("ids"));
        expected.push(EOS);
    }
    let (mut stream, mut starts) = (Vec::new(), Vec::new());
    let mut counts = Vec::new();
    for shard in &shards {
        let before = stream.len();
        for (tokens, offsets) in rows(shard) {
            starts.extend(offsets.iter().map(|offset| stream.len() + *offset as usize));
            stream.extend(tokens);
        }
        counts.push((stream.len() - before) as u64);
    }
    assert!(stream == expected, "{} tokens, {} expected", stream.len(), expected.len());
    assert_eq!(starts, expected_starts);
    assert_eq!((&made.meta.shard_tokens, made.meta.total_tokens), (&counts, expected.len() as u64));
    // Only the very last row is short.
    let lengths: Vec<usize> = shards.iter().flat_map(rows).map(|(tokens, _)| tokens.len()).collect();
    assert!(lengths[..lengths.len() - 1].iter().all(|length| *length == 32));
}

#[test]
fn what_was_rearranged_for_the_middle_is_the_document_again() {
    let texts = texts(200);
    let fim = FimOptions { rate: 1.0, sources: Vec::new() };
    let Made { shards, made, _folder } = make(&texts, &IngestOptions { fim, ..options() });
    let stream: Vec<u32> = shards.iter().flat_map(rows).flat_map(|(tokens, _)| tokens).collect();
    let specials = made.tokenizer.specials();
    let marks = [specials.fim_begin, specials.fim_hole, specials.fim_end].map(|id| id.expect("a mark"));
    let documents: Vec<&[u32]> = stream.split(|id| *id == EOS).filter(|ids| !ids.is_empty()).collect();
    assert_eq!(documents.len(), texts.len());
    let mut rearranged = 0;
    for (ids, text) in documents.iter().zip(&texts) {
        let at = marks.map(|mark| ids.iter().position(|id| *id == mark));
        let restored = match at {
            [Some(0), Some(hole), Some(end)] if hole < end => {
                rearranged += 1;
                [&ids[1..hole], &ids[end + 1..], &ids[hole + 1..end]].concat()
            }
            [None, None, None] => ids.to_vec(),
            other => panic!("marks at {other:?} in {ids:?}"),
        };
        assert_eq!(restored, made.tokenizer.encode(text).expect("ids"));
    }
    assert_eq!(rearranged, made.report.fim_documents);
    assert!(rearranged > 190, "{rearranged}");
}

#[test]
fn planted_duplicates_are_found_where_they_are() {
    let mut texts = texts(120);
    let original = texts.clone();
    // At known lines: a copy near its original, one far away, a third copy.
    texts.insert(11, original[10].clone());
    texts.push(original[3].clone());
    texts.push(original[3].clone());
    let Made { shards, made, _folder } = make(&texts, &options());
    let report = &made.report;
    assert_eq!((report.documents_in, report.documents_out, report.dropped["duplicate"]), (123, 120, 3));
    let places: Vec<&str> =
        report.dropped_examples["duplicate"].iter().filter_map(|place| place.rsplit(": ").next()).collect();
    assert_eq!(places, ["line 12", "line 122", "line 123"]);
    let stream: Vec<u32> = shards.iter().flat_map(rows).flat_map(|(tokens, _)| tokens).collect();
    let kept: Vec<String> =
        stream.split(|id| *id == EOS).filter(|ids| !ids.is_empty()).map(|ids| made.tokenizer.decode(ids)).collect();
    assert_eq!(kept, original);
    let all = make(&texts, &IngestOptions { dedup: false, ..options() });
    assert_eq!(all.made.report.documents_out, 123);
}
