//! Every document that stays is in the stream once, whatever the threads; what is dropped is reported.

use std::{cell::RefCell, fs};

use dsv3_core::{Error, ErrorKind};
use dsv3_data::TokenDataset;
use dsv3_hooks::{Cause, FilterOutcome, HookError, Verdict};

use super::*;
use crate::options::{AlignOptions, FimOptions};

struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn input(&self, name: &str, documents: &[(&str, &str)]) -> Vec<PathBuf> {
        let line =
            |(text, source): &(&str, &str)| serde_json::json!({"text": text, "source": source}).to_string() + "\n";
        let path = self.folder.path().join(name);
        fs::write(&path, documents.iter().map(line).collect::<String>()).unwrap();
        vec![path]
    }

    fn run(&self, options: &IngestOptions, inputs: &[PathBuf], filter: Option<&dyn DocumentFilter>) -> Result<Made> {
        let host = Host { progress: &|_, _, _| (), cancel: &Cancel::new(), scratch: None };
        let shards = RefCell::new(Vec::new());
        let mut sink = |name: &str, bytes: Vec<u8>| -> std::result::Result<(), Error> {
            let path = self.folder.path().join(name);
            fs::write(&path, bytes).map_err(|e| Error::unavailable("disk").source(e))?;
            shards.borrow_mut().push(path);
            Ok(())
        };
        let made = ingest(options, inputs, None, filter, 7, &host, &mut sink)?;
        let dataset = TokenDataset::open(&shards.borrow(), &made.meta)?;
        let stream = dataset.read(0..made.meta.total_tokens)?;
        Ok(Made { made, stream })
    }
}

#[derive(Debug)]
struct Made {
    made: Ingested,
    stream: Vec<u32>,
}

impl Made {
    /// Texts between end tokens.
    fn documents(&self) -> Vec<String> {
        let parts = self.stream.split(|id| *id == 1);
        let texts = parts.map(|ids| self.made.tokenizer.decode(ids));
        texts.filter(|text| !text.is_empty()).collect()
    }
}

fn options() -> IngestOptions {
    IngestOptions { row_tokens: 16, vocab_size: 300, ..IngestOptions::default() }
}

struct Judge<F>(F);

impl<F: Fn(u64, &str) -> std::result::Result<Verdict, Cause> + Sync> DocumentFilter for Judge<F> {
    fn filter(&self, batch: u64, texts: &[&str]) -> std::result::Result<FilterOutcome, HookError> {
        let mut verdicts = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            let error = |cause| HookError { hook: "judge".to_owned(), batch: Some(batch), item: Some(index), cause };
            verdicts.push((self.0)(batch, text).map_err(error)?);
        }
        Ok(FilterOutcome { verdicts, faults: Vec::new() })
    }
}

#[test]
fn every_document_that_stays_is_in_the_stream_once_with_its_end() {
    let bench = Bench::new();
    let inputs = bench.input(
        "in.jsonl",
        &[("first text", "a"), ("bad", "a"), ("first text", "b"), ("  ", "a"), ("second", "b"), ("loud", "a")],
    );
    let filter = Judge(|_, text: &str| {
        Ok(match text {
            "bad" => Verdict::Drop("too bad".to_owned()),
            "loud" => Verdict::Rewrite("quiet".to_owned()),
            _ => Verdict::Keep,
        })
    });
    let made = bench.run(&options(), &inputs, Some(&filter)).unwrap();
    let mut texts = made.documents();
    texts.sort();
    assert_eq!(texts, ["first text", "quiet", "second"]);
    let report = &made.made.report;
    assert_eq!((report.documents_in, report.documents_out, report.rewritten), (6, 3, 1));
    let counts: Vec<(&str, u64)> = report.dropped.iter().map(|(reason, count)| (reason.as_str(), *count)).collect();
    assert_eq!(counts, [("duplicate", 1), ("empty", 1), ("too bad", 1)]);
    assert!(report.dropped_examples["duplicate"][0].ends_with("in.jsonl: line 3"));
    assert_eq!(report.tokens, made.stream.len() as u64);
}

#[test]
fn threads_change_nothing_and_the_seed_changes_the_order() {
    let bench = Bench::new();
    let texts: Vec<String> = (0..3000).map(|i| format!("document {i} of many, with some words in it")).collect();
    let documents: Vec<(&str, &str)> = texts.iter().map(|text| (text.as_str(), "a")).collect();
    let inputs = bench.input("in.jsonl", &documents);
    let options = IngestOptions { fim: FimOptions { rate: 0.3, sources: Vec::new() }, ..options() };
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| bench.run(&options, &inputs, None).unwrap())
    };
    let (one, three) = (with(1), with(3));
    assert!(one.stream == three.stream && one.made.tokenizer.to_bytes() == three.made.tokenizer.to_bytes());
    assert_eq!(one.made.report, three.made.report);
    let share = one.made.report.fim_documents as f64 / 3000.0;
    assert!((share - 0.3).abs() < 0.04, "{share}");
    let plain = IngestOptions { fim: FimOptions::default(), shuffle: false, ..options.clone() };
    assert_eq!(bench.run(&plain, &inputs, None).unwrap().documents(), texts);
    let shuffled = IngestOptions { fim: FimOptions::default(), ..options };
    assert_ne!(bench.run(&shuffled, &inputs, None).unwrap().documents(), texts);
}

#[test]
fn aligned_documents_begin_at_multiples_after_the_packed_ones() {
    let bench = Bench::new();
    let inputs = bench.input("in.jsonl", &[("one", "long"), ("packed", "a"), ("two two two", "long")]);
    let align = Some(AlignOptions { tokens: 32, sources: vec!["long".to_owned()] });
    let made = bench.run(&IngestOptions { align, ..options() }, &inputs, None).unwrap();
    let (stream, report) = (&made.stream, &made.made.report);
    assert_eq!((stream.len(), report.aligned_documents, report.aligned_overlong), (96, 2, 0));
    assert_eq!((stream[32], stream[64], made.made.meta.pad_token_id), (0, 0, Some(2)));
    assert_eq!(stream.iter().filter(|id| **id == 2).count() as u64, report.padding_tokens);
    assert!(made.made.tokenizer.decode(&stream[32..40]).contains("one"));
}

#[test]
fn a_failing_filter_names_the_document() {
    let bench = Bench::new();
    let texts: Vec<String> = (0..300).map(|i| i.to_string()).collect();
    let documents: Vec<(&str, &str)> = texts.iter().map(|text| (text.as_str(), "a")).collect();
    let inputs = bench.input("in.jsonl", &documents);
    let filter =
        Judge(
            |batch, text: &str| {
                if text == "270" { Err(Cause::Guest(format!("trap in batch {batch}"))) } else { Ok(Verdict::Keep) }
            },
        );
    let error: Error = bench.run(&options(), &inputs, Some(&filter)).unwrap_err().into();
    assert_eq!(error.kind, ErrorKind::Data);
    assert!(error.message.ends_with("in.jsonl: line 271: the document filter failed"), "{error}");
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("batch 1, item 14") && cause.contains("trap in batch 1"), "{cause}");
}

#[test]
fn what_cannot_be_done_says_why() {
    let bench = Bench::new();
    let inputs = bench.input("in.jsonl", &[(" ", "a")]);
    let error = bench.run(&options(), &inputs, None).unwrap_err();
    assert_eq!(error.to_string(), "no document is left of 1: 1 empty");
    let wrong = IngestOptions { fim: FimOptions { rate: 2.0, sources: Vec::new() }, ..options() };
    let error = bench.run(&wrong, &inputs, None).unwrap_err().to_string();
    assert_eq!(error, "fim.rate: 2 is no share between 0 and 1");
    let cancel = Cancel::new();
    cancel.cancel();
    let host = Host { progress: &|_, _, _| (), cancel: &cancel, scratch: None };
    let stopped = ingest(&options(), &inputs, None, None, 7, &host, &mut |_, _| Ok(())).unwrap_err();
    assert_eq!(Error::from(stopped).kind, ErrorKind::Cancelled);
}

#[test]
fn a_large_corpus_is_sampled_the_same_way_each_time() {
    let texts: Vec<String> = (0..2000).map(|i| format!("words {i} and more words {}", i * 7)).collect();
    let total = texts.iter().map(|text| text.len() as u64).sum();
    let small = IngestOptions { tokenizer_sample_bytes: total / 10, ..options() };
    let train = |options: &IngestOptions| {
        train_tokenizer(options, texts.iter().map(|text| Cow::Borrowed(text.as_str())), total, 3).unwrap()
    };
    assert_eq!(train(&small).to_bytes(), train(&small).to_bytes());
    assert_ne!(train(&small).to_bytes(), train(&options()).to_bytes());
}

/// A document of some `bytes` whose words and numbers do not repeat.
fn long_document(bytes: usize) -> String {
    let mut rng = Rng::new(1);
    let mut text = String::new();
    while text.len() < bytes {
        text += &format!("word{} and {} more.\n", rng.below(1000), rng.next_u64());
    }
    text
}

#[test]
fn a_long_document_is_one_document_and_every_token_of_it_is_there() {
    let bench = Bench::new();
    let text = long_document(3 * PIECE_BYTES);
    let inputs = bench.input("in.jsonl", &[("before", "a"), (&text, "a"), ("after", "a")]);
    let options = IngestOptions { shuffle: false, shard_tokens: 1 << 16, ..options() };
    let made = bench.run(&options, &inputs, None).unwrap();
    assert!(made.documents() == ["before", &text, "after"]);
    assert_eq!(made.made.meta.documents, 3);
    let whole = made.made.tokenizer.encode(&text).unwrap();
    let at = made.stream.iter().position(|id| *id == 1).unwrap() + 1;
    assert!(made.stream[at..at + whole.len()] == whole);
}

#[test]
fn a_request_to_stop_is_heard_inside_a_document() {
    let bench = Bench::new();
    let inputs = bench.input("in.jsonl", &[(&long_document(16 * PIECE_BYTES), "a")]);
    let tokenizer =
        bench.run(&options(), &bench.input("small.jsonl", &[("some words", "a")]), None).unwrap().made.tokenizer;
    let (cancel, steps) = (Cancel::new(), RefCell::new(Vec::new()));
    let progress = |step: &'static str, _: u64, _: Option<u64>| {
        steps.borrow_mut().push(step);
        let later = cancel.clone();
        std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            later.cancel();
        });
    };
    let host = Host { progress: &progress, cancel: &cancel, scratch: None };
    let stopped = ingest(&options(), &inputs, Some(tokenizer), None, 7, &host, &mut |_, _| Ok(())).unwrap_err();
    assert_eq!(Error::from(stopped).kind, ErrorKind::Cancelled);
    assert_eq!(*steps.borrow(), ["read"], "it was not tokenised to its end");
}

#[test]
fn a_document_that_cannot_be_tokenised_is_named_with_its_place() {
    let bench = Bench::new();
    let dull = "x".repeat(dsv3_data::UNCUT_BYTES_MAX + 1);
    let inputs = bench.input("in.jsonl", &[("one", "a"), ("two", "a"), (&dull, "a")]);
    let error: Error = bench.run(&options(), &inputs, None).unwrap_err().into();
    assert_eq!(error.kind, ErrorKind::Data);
    assert!(error.message.ends_with("in.jsonl: line 3: cannot be tokenised"), "{error}");
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("more than 8 MiB without a place where it may be cut"), "{cause}");
    assert!(error.help.unwrap().contains("break the document up"));
}

#[test]
fn a_corpus_that_lies_in_the_scratch_folder_gives_the_same_stream() {
    let bench = Bench::new();
    let texts: Vec<String> = (0..500).map(|i| format!("document {i} of many, with some words in it")).collect();
    let documents: Vec<(&str, &str)> = texts.iter().map(|text| (text.as_str(), "a")).collect();
    let inputs = bench.input("in.jsonl", &documents);
    let made = |scratch: Option<&Path>| {
        let mut shards = Vec::new();
        let host = Host { progress: &|_, _, _| (), cancel: &Cancel::new(), scratch };
        let made = ingest(&options(), &inputs, None, None, 7, &host, &mut |_, bytes| {
            shards.push(bytes);
            Ok(())
        });
        (made.unwrap().report, shards)
    };
    let folder = bench.folder.path().join("scratch");
    crate::spool::with_memory_bytes_max(0, || assert!(made(Some(&folder)) == made(None)));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "and is gone from there");
}
